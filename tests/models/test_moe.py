from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_jax import models
from lepton_jax.models.moe import Experts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def by_hand(
    layer: Experts,
    x: np.ndarray,
    slots: int,
) -> np.ndarray:
    """Token by token: every first choice finds its slot before any second one does."""
    x = np.asarray(x, np.float64)
    probabilities = np.asarray(
        jax.nn.softmax(layer.router(jnp.asarray(x, jnp.float32))), np.float64
    )
    gate, up, down = (
        np.asarray(kernel[...], np.float64)
        for kernel in (layer.gate, layer.up, layer.down)
    )
    out = np.zeros_like(x)
    for row in range(len(x)):
        chosen = np.argsort(-probabilities[row], axis=-1, kind="stable")[
            :, : layer.chosen
        ]
        filled = np.zeros(layer.experts, int)
        for choice in range(layer.chosen):
            for token, experts in enumerate(chosen):
                expert = experts[choice]
                filled[expert] += 1
                if filled[expert] <= slots:
                    hidden = x[row, token] @ gate[expert]
                    value = (
                        hidden / (1 + np.exp(-hidden)) * (x[row, token] @ up[expert])
                    ) @ down[expert]
                    total = (
                        probabilities[row, token, experts].sum()
                        if layer.chosen > 1
                        else 1
                    )
                    out[row, token] += probabilities[row, token, expert] / total * value
    return out


@pytest.mark.parametrize(
    ("chosen", "capacity", "slots"),
    [
        (2, 4.0, 16),
        (3, 1.0, 12),
        (2, 0.5, 4),
        (1, 1.25, 5),
    ],
)
def test_experts_compute_the_mixture_of_the_chosen_ones(chosen, capacity, slots):
    layer = Experts(
        8,
        12,
        4,
        chosen=chosen,
        capacity=capacity,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(1), (3, 16, 8))
    dispatch, combine = layer.route(x[:, None])
    assert dispatch.shape == combine.shape == (3, 1, 16, 4, slots)
    assert dispatch.sum(2).max() <= 1, "a slot holds one token"
    np.testing.assert_allclose(
        layer(x),
        by_hand(layer, x, slots),
        atol=1e-5,
    )


def test_with_room_for_all_no_token_is_dropped_and_the_gates_add_up():
    layer = Experts(
        8,
        12,
        4,
        chosen=2,
        capacity=4.0,
        rngs=nnx.Rngs(0),
    )
    dispatch, combine = layer.route(jax.random.normal(jax.random.key(1), (2, 2, 16, 8)))
    np.testing.assert_array_equal(dispatch.sum((3, 4)), 2)
    np.testing.assert_allclose(
        combine.sum((3, 4)),
        1,
        rtol=1e-6,
    )


def test_tokens_without_a_slot_get_nothing_and_the_first_come_first():
    layer = Experts(
        8,
        12,
        4,
        chosen=1,
        capacity=1.0,
        rngs=nnx.Rngs(0),
    )
    # all to the same expert
    layer.router.kernel[...] = jnp.zeros((8, 4)).at[0, 2].set(10.0)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (2, 16, 8)))
    out = layer(x)
    assert (jnp.abs(out[:, :4]).max(-1) > 0).all()
    assert not out[:, 4:].any()


def test_groups_do_not_compete_for_slots():
    x = jax.random.normal(jax.random.key(1), (2, 16, 8))
    whole, parts = (
        Experts(
            8,
            12,
            4,
            capacity=0.5,
            group=group,
            rngs=nnx.Rngs(0),
        )
        for group in (16, 8)
    )
    np.testing.assert_allclose(
        parts(x),
        whole(x.reshape(4, 8, 8)).reshape(2, 16, 8),
        atol=1e-6,
    )
    # shorter than a group
    np.testing.assert_allclose(
        whole(x[:, :6]),
        parts(x[:, :6]),
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="12 is no multiple of the group of 8"):
        parts(x[:, :12])


def test_the_router_decides_in_float32_whatever_the_rest_computes_in():
    layer = Experts(
        8,
        12,
        4,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(layer)
    low = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16), state))
    x = jax.random.normal(
        jax.random.key(1),
        (1, 1, 16, 8),
        jnp.bfloat16,
    )
    assert low.router(x).dtype == jnp.float32
    assert {low.route(x)[0].dtype, low.route(x)[1].dtype, low(x[0]).dtype} == {
        jnp.dtype("bfloat16")
    }


def test_impossible_mixtures_are_refused():
    for arguments in ({"chosen": 5}, {"chosen": 0}, {"capacity": 0.0}, {"group": 0}):
        with pytest.raises(ValueError, match=r"experts|positive"):
            models.MoELM(
                11,
                dim=16,
                layers=1,
                heads=2,
                experts=4,
                rngs=nnx.Rngs(0),
                **arguments,
            )
