"""Named axes of whole models.

Which dims of their parameters are one, what ties layers, and how arrays are kept.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.planner import assignment as assemble
from lepton_jax.planner.program import named
from lepton_jax.planner.program.named import Names, starred


@functools.cache
def names(
    model,
    *inputs,
    loss=lepton.losses.cross_entropy,
    remat="none",
    batch=16,
):
    recipe = lepton.Recipe(
        model=model,
        loss=loss,
        optimizer=optax.adam(1e-3),
        batch_size=batch,
    )
    shapes = [jax.ShapeDtypeStruct((1, *shape), dtype) for shape, dtype in inputs]
    x = shapes[0] if len(shapes) == 2 else {"user": shapes[0], "item": shapes[1]}
    trace = lepton.trace(recipe, x, shapes[-1])
    return Names(trace.gradient(remat), trace.arguments)


def lm(
    loop="unrolled",
    tied=False,
    remat="none",
):
    return names(
        _lm(loop, tied),
        ((12,), jnp.int32),
        ((12,), jnp.int32),
        remat=remat,
    )


@functools.cache
def _lm(loop, tied):
    return functools.partial(
        models.TransformerLM,
        48,
        dim=32,
        layers=3,
        heads=8,
        kv_heads=4,
        hidden=40,
        tied=tied,
        loop=loop,
    )


def members(names, name):
    """Return starred parameter paths, without "params/", and dims of a named axis."""
    (group,) = (g for g in names.groups if g.name == name)
    return {
        (names.patterns[i].removeprefix("params/").removesuffix("/kernel"), d)
        for i, d in group.members
    }


def test_the_axes_of_a_transformer():
    axes = lm()
    block = "blocks/*/"
    assert {g.name: (g.size, g.divisor) for g in axes.groups} == {
        "norm/scale.0": (32, 32),
        "blocks/*/feed_forward/up.1": (40, 40),
        "blocks/*/attention/key.1": (32, 4),
        "embed.0": (48, 48),
        "head.1": (48, 48),
        "batch": (16, 16),
        "inputs.1": (12, 12),
    }
    assert members(axes, block + "feed_forward/up.1") == {
        (block + "feed_forward/up", 1),
        (block + "feed_forward/gate", 1),
        (block + "feed_forward/down", 0),
    }
    assert members(axes, block + "attention/key.1") == {
        (block + "attention/query", 1),
        (block + "attention/key", 1),
        (block + "attention/value", 1),
        (block + "attention/out", 0),
    }
    assert axes.groups[axes.batch].name == "batch"
    assert ("inputs", 0) in members(axes, "batch")


def test_a_tied_head_is_the_embeddings_vocabulary():
    assert "head.1" not in {g.name for g in lm(tied=True).groups}
    assert lm(tied=True).groups
    assert members(lm(tied=True), "embed.0") == {("embed/embedding", 0)}


def test_looped_layers_have_the_axes_of_unrolled_ones_and_the_loop_is_none():
    looped, unrolled = (
        {(g.size, g.divisor) for g in lm(loop).groups} for loop in ("scan", "unrolled")
    )
    assert looped == unrolled

    axes = lm("scan")
    graph = axes.graph
    for path, value in zip(axes.paths, graph.main.inputs, strict=False):
        if path.startswith("params/blocks"):
            assert graph.find(value.nodes[0]) not in axes.of, path


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_rematerialization_leaves_the_axes_as_they_are(loop, remat):
    def axes(names):
        return {(g.name, g.size, g.divisor, len(g.members)) for g in names.groups}

    assert axes(lm(loop, remat=remat)) == axes(lm(loop))


def test_experts_are_a_group_that_meets_the_samples():
    found = names(
        lambda rngs: models.MoELM(
            48,
            dim=32,
            layers=2,
            heads=4,
            hidden=24,
            experts=8,
            rngs=rngs,
        ),
        ((12,), jnp.int32),
        ((12,), jnp.int32),
    )
    (experts,) = assemble.expert_groups(found)
    dims = {
        (found.patterns[i].rsplit("/", 1)[-1], d)
        for i, d in found.groups[experts].members
    }
    assert dims == {
        ("gate", 0),
        ("up", 0),
        ("down", 0),
        ("kernel", 1),
    }, "the router's columns are experts too"


def test_rows_of_a_recommender_are_looked_up():
    found = names(
        lambda rngs: models.TwoTower(
            96,
            64,
            dim=16,
            hidden=(32,),
            width=8,
            rngs=rngs,
        ),
        ((), jnp.int32),
        ((), jnp.int32),
        ((), jnp.float32),
        loss=lepton.losses.squared_error,
    )
    assert {found.groups[k].name for k in found.rows} == {"users.0", "items.0"}


def test_channels_of_a_cnn_go_from_layer_to_layer():
    found = names(
        lambda rngs: models.CNN(
            10,
            size=(8, 8, 3),
            widths=(16, 24),
            dense=12,
            batch_norm=True,
            rngs=rngs,
        ),
        ((8, 8, 3), jnp.float32),
        ((), jnp.int32),
    )
    first = next(g for g in found.groups if g.size == 16 and g.name != "batch")
    dims = {(found.paths[i].removeprefix("params/"), d) for i, d in first.members}
    assert {
        ("convs/0/kernel", 3),
        ("convs/1/kernel", 2),
        ("norms/0/scale", 0),
        ("norms/0/bias", 0),
    } <= dims


def test_ties_never_make_two_dims_of_one_array_the_same():
    """Input and output of layers of 16 to 16 are apart.

    They are apart although the output of each is the next one's input.
    """

    def model(rngs):
        return models.MLP((16, 16, 16, 16), rngs=rngs)

    axes = names(model, ((16,), jnp.float32), ((), jnp.int32))

    graph = axes.graph
    for path, value in zip(axes.paths, graph.main.inputs, strict=False):
        if path.endswith("kernel"):
            left, right = (axes.of[graph.find(node)] for node in value.nodes)
            assert left != right, path


def test_one_dim_takes_a_mesh_axis_and_the_rest_is_kept_where_most_is_left(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)
    axes = lm()
    numbers = {g.name: k for k, g in enumerate(axes.groups)}
    masks = [0] * len(axes.groups)
    masks[numbers["norm/scale.0"]] = 2
    masks[numbers["blocks/*/feed_forward/up.1"]] = 2
    counts = [1, 2, 4, 8]  # devices along no axis, axis 0, axis 1, both
    up = axes.paths.index("params/blocks/0/feed_forward/up/kernel")  # (32, 40)

    use = axes.use(up, masks, counts)
    assert use == (2, 0), "the first dim that may takes it"

    stored = axes.store(up, (2, 0), 3, counts)
    assert stored == (2, 1), "the rest goes to the dim that stays largest"

    stored = axes.store(up, (0, 0), 3, counts)
    assert stored == (0, 3), "40 > 32"

    with_three = [1, 2, 4, 8, 3, 6, 12, 24]
    stored = axes.store(up, (0, 0), 4, with_three)
    assert stored == (0, 0), "neither 32 nor 40 divides by 3"

    monkeypatch.setattr(named, "SMALL", 2**16)
    assert axes.store(up, (0, 0), 3, counts) == (0, 0), "too small"


def test_layers_of_a_loop_are_not_kept_along_it(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)

    def model(rngs):
        return models.TransformerLM(
            48,
            dim=32,
            layers=8,
            heads=8,
            hidden=40,
            loop="scan",
            rngs=rngs,
        )

    axes = names(model, ((12,), jnp.int32), ((12,), jnp.int32))
    counts = [1, 8]
    unsplit = [0] * len(axes.groups)
    for index, path in enumerate(axes.paths):
        if path.startswith("params/blocks"):
            use = axes.use(index, unsplit, counts)
            along_the_loop, *_ = axes.store(index, use, 1, counts)
            assert along_the_loop == 0, path


def test_numbers_in_paths_are_stars():
    assert starred("params/blocks/12/mlp/0/kernel") == "params/blocks/*/mlp/*/kernel"
    assert starred("params/Dense_1/kernel") == "params/Dense_*/kernel"
