"""ResNet, ViT and ConvNeXt: the sizes of the papers, the shapes, and what can't be."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_jax import models

pytestmark = pytest.mark.usefixtures("quick_compilation")

RESNET_18 = partial(models.ResNet, **models.resnet_size(18))
RESNET_50 = partial(models.ResNet, **models.resnet_size(50))


def shapes_of(make):
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


# the paper's ViT-B/16 has 768 more, a position for the class token
@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (partial(RESNET_18, 1000), 11_689_512),
        (partial(RESNET_50, 1000), 25_557_032),
        (
            partial(models.ViT, 1000, pool="class", **models.vit_size("base")),
            86_566_888,
        ),
        (partial(models.ConvNeXt, 1000, **models.convnext_size("tiny")), 28_589_128),
    ],
    ids=["resnet18", "resnet50", "vit-base", "convnext-tiny"],
)
def test_the_named_sizes_have_the_parameters_of_the_papers(make, parameters):
    state = nnx.state(shapes_of(make), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == parameters


SMALL = [
    partial(models.ResNet, 3, blocks=(1, 1), width=4, size=8),
    partial(
        models.ResNet, 3, blocks=(1, 1), width=4, widen=4, stem="large", dropout=0.5
    ),
    partial(models.ViT, 3, size=8, patch=4, dim=8, layers=1, heads=2, pool="class"),
    partial(models.ViT, 3, size=8, dim=8, layers=1, heads=2, registers=2),
    partial(
        models.ViT, 3, size=8, dim=8, layers=1, heads=2, convolutions=2, dropout=0.1
    ),
    partial(
        models.ConvNeXt, 3, blocks=(1, 1), dims=(4, 8), patch=2, size=8, dropout=0.1
    ),
]
SMALL[3] = partial(SMALL[3], patch=2)
IMAGES = np.random.default_rng(0).random((4, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_each_model_gives_logits_and_every_parameter_a_gradient(number):
    model = SMALL[number](rngs=nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    # what begins at zero would hide the parameters before it
    params = jax.tree.map(lambda x: x + 0.05, params)

    @jax.jit
    def loss(params):
        logits = nnx.merge(graph, params, rest)(IMAGES)
        assert logits.shape == (4, 3)
        return (logits * jnp.arange(12).reshape(4, 3)).sum()

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    assert all(np.isfinite(g).all() and np.any(g) for g in gradients)


def test_residual_blocks_begin_as_the_identity():
    block = models.resnet.Residual(4, 4, widen=1, stride=1, rngs=nnx.Rngs(0))
    block.eval()
    x = jnp.abs(IMAGES[..., :1] * jnp.ones(4))
    np.testing.assert_allclose(block(x), x)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (partial(models.ResNet, 0), "classes"),
        (partial(models.ResNet, 2, size=4), "too small"),
        (partial(models.ResNet, 2, stem="tiny"), "stem"),
        (partial(models.ResNet, 2, dropout=1.0), "dropout"),
        (partial(models.resnet_size, 19), "19"),
        (partial(models.ViT, 2, size=30, patch=16), "divide"),
        (partial(models.ViT, 2, dim=10, heads=3), "heads"),
        (partial(models.ViT, 2, pool="max"), "pool"),
        (partial(models.vit_size, "huge"), "huge"),
        (partial(models.ConvNeXt, 2, size=16), "too small"),
        (partial(models.ConvNeXt, 2, blocks=(1,)), "as many"),
        (partial(models.convnext_size, "huge"), "huge"),
    ],
)
def test_sizes_that_can_not_be_are_value_errors(make, word):
    is_model = isinstance(make.func, type)
    with pytest.raises(ValueError, match=word):
        make(rngs=nnx.Rngs(0)) if is_model else make()
