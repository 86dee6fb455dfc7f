from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax import models


def test_a_score_is_the_product_of_the_two_vectors_and_each_row_its_own():
    model = models.TwoTower(
        7,
        5,
        dim=4,
        hidden=(6,),
        width=3,
        center=2.5,
        rngs=nnx.Rngs(0),
    )
    user = jnp.array([0, 6, 6])
    item = jnp.array([4, 4, 0])
    left = model.user_tower(model.users.embedding[...])[user]
    right = model.item_tower(model.items.embedding[...])[item]
    np.testing.assert_allclose(
        model(user=user, item=item),
        2.5 + (left * right).sum(-1),
        rtol=1e-5,
    )
    gradient = nnx.grad(lambda m: jnp.square(m(user, item)).sum())(model)
    touched = jnp.abs(gradient["users"]["embedding"][...]).sum(1) > 0
    assert touched.tolist() == [True, *[False] * 5, True]
    assert all((g != 0).any() for g in jax.tree.leaves(gradient))
