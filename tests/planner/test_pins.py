"""Pins: what may be fixed, how it binds the search, and the error for each mistake."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lepton_jax as lepton
from lepton_jax.errors import PlanError
from lepton_jax.planner import planning
from lepton_jax.planner.search.build import by_hand, fixed
from lepton_jax.train.program import Program
from lepton_jax.trees import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")

CPU = lepton.topology("cpu:8")
MESH = {"data": 2, "tensor": 4}


@functools.cache
def traced(vocab=64, **fields):
    recipe = lepton.Recipe(
        model=lambda rngs: lepton.models.TransformerLM(
            vocab,
            dim=32,
            layers=2,
            heads=4,
            hidden=64,
            rngs=rngs,
        ),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=16,
        **fields,
    )
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return lepton.trace(recipe, tokens, tokens)


def plan(**options):
    return planning.plan(traced(), CPU, **options)


def specs(plan):
    return {
        a.path.removeprefix("params/"): a for a in plan.arrays if a.kind == "params"
    }


def test_a_pin_is_kept_and_the_moments_lie_alike():
    found = plan(
        mesh=MESH,
        pins={"**/up/kernel": P(None, "tensor")},
    )
    arrays = specs(found)

    assert all(
        arrays[f"blocks/{layer}/feed_forward/up/kernel"].spec == (None, "tensor")
        for layer in "01"
    )

    moments = [
        a
        for a in found.arrays
        if a.path.endswith("up/kernel") and a.kind == "optimizer"
    ]

    assert len(moments) == 4
    assert all(a.spec == (None, "tensor") for a in moments)


@pytest.mark.parametrize(
    "spec",
    [
        ("tensor", None),
        ["tensor"],
        P("tensor"),
    ],
)
def test_a_spec_may_be_a_tuple_a_list_or_shorter_than_the_shape(spec):
    assert specs(plan(mesh=MESH, pins={"embed/embedding": spec}))[
        "embed/embedding"
    ].spec == ("tensor",)


def test_a_pin_of_none_keeps_an_array_whole(monkeypatch):
    monkeypatch.setattr("lepton_jax.planner.program.named.SMALL", 0)
    found = plan(
        mesh={"fsdp": 8},
        pins={"head/kernel": P()},
        objective="memory",
    )
    arrays = specs(found)

    assert arrays["head/kernel"].spec == ()
    assert arrays["blocks/0/feed_forward/up/kernel"].spec != (), (
        "the others are split, to save memory"
    )


def test_a_star_pins_all_it_matches_and_two_stars_no_folder_too():
    pins = {
        "blocks/*/attention/key/kernel": P(None, "tensor"),
        "**/embed/embedding": P("tensor"),
    }
    arrays = specs(plan(mesh=MESH, pins=pins))

    assert arrays["embed/embedding"].spec == ("tensor",)
    assert all(
        arrays[f"blocks/{i}/attention/key/kernel"].spec == (None, "tensor")
        for i in (0, 1)
    )


def test_mesh_remat_and_micro_batches_are_taken_as_given():
    found = plan(
        mesh={"a": 4, "b": 2},
        remat="full",
        micro_batches=2,
    )

    assert (found.mesh, found.remat, found.micro_batches) == (
        {"a": 4, "b": 2},
        "full",
        2,
    )
    assert planning.plan(traced(micro_batches=4), CPU).micro_batches == 4


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (
            {"mesh": {"data": 3, "tensor": 4}},
            ["data=3 x tensor=4", "12 places", "8 devices", "multiply to 8"],
        ),
        ({"mesh": {"data": 0, "tensor": 8}}, ["'data' has size 0", "whole numbers"]),
        ({"mesh": {"data": 2.0, "tensor": 4}}, ["'data' has size 2.0"]),
        ({"mesh": {}}, ["1 places", "8 devices"]),
        ({"pins": {"**/embedding": P("tensor")}}, ["no mesh is given", "mesh="]),
        (
            {"mesh": MESH, "pins": {"**/embeding": P("tensor")}},
            [
                "'**/embeding' matches no parameter",
                "did you mean 'embedding'",
                "blocks/*/attention/key/kernel",
            ],
        ),
        (
            {"mesh": MESH, "pins": {"**/embedding": P("tensr")}},
            ["'tensr'", "did you mean 'tensor'", "the mesh has data, tensor"],
        ),
        (
            {"mesh": MESH, "pins": {"norm/scale": P(None, "tensor")}},
            ["has 2 entries", "(32,)", "at most 1"],
        ),
        (
            {
                "mesh": MESH,
                "pins": {
                    "**/up/kernel": P(None, "tensor"),
                    "**/gate/kernel": P(None, "data"),
                },
            },
            ["pins disagree", "feed_forward/up.1", "gate/kernel"],
        ),
        (
            {"remat": "ful"},
            ["'ful' is not known", "did you mean 'full'", "none, dots, full"],
        ),
        ({"micro_batches": 3}, ["3 micro-batches", "batch of 16"]),
        ({"micro_batches": -1}, ["-1 micro-batches"]),
        ({"micro_batches": 0}, ["0 micro-batches"]),
        ({"micro_batches": 2.0}, ["2.0 micro-batches"]),
        ({"objective": "speed"}, ["'speed' is not known", "time, memory, cost"]),
        (
            {"mesh": MESH, "pins": {"embed/embedding": P("tensor", "tensor")}},
            ["'tensor'", "twice"],
        ),
        (
            {"mesh": MESH, "pins": {"embed/embedding": "tensor"}},
            ["'tensor'", "PartitionSpec"],
        ),
        ({"mesh": MESH, "pins": {"embed/embedding": 4}}, ["4", "PartitionSpec"]),
    ],
    ids=lambda x: None if isinstance(x, list) else next(iter(x)),
)
def test_mistakes_are_told_what_where_and_what_to_do(options, fragments):
    with pytest.raises(PlanError) as error:
        plan(**options)
    for fragment in fragments:
        assert fragment in str(error.value)

    assert "remedy:" in str(error.value)


def test_an_axis_that_does_not_divide_is_told_the_arithmetic():
    with pytest.raises(
        PlanError, match=r"dim 0 of embed/embedding over 4 devices: 63 / 4 is 15\.75"
    ):
        planning.plan(
            traced(vocab=63),
            CPU,
            mesh=MESH,
            pins={"embed/embedding": P("tensor")},
        )


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("h20:8", ["'h20' is not in the catalogue", "did you mean 'h200'"]),
        ("cpu", ["chip:count"]),
        ("cpu:0", ["chip:count"]),
        ("v5e:4x4x4", ["3 dims", "v5e"]),
        ("h100:2x16", ["16 h100 in a node"]),
    ],
)
def test_a_topology_that_is_not_known(name, fragments):
    with pytest.raises(PlanError) as error:
        lepton.topology(name)
    assert all(fragment in str(error.value) for fragment in fragments)


# ---- a pin says how an array is stored ----


class Attention(nnx.Module):
    """Grouped queries: fewer heads of keys and values."""

    def __init__(self, heads, kv_heads, rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.query = nnx.Linear(32, 32, rngs=rngs)
        self.key, self.value = (
            nnx.Linear(32, 32 // heads * kv_heads, rngs=rngs) for _ in range(2)
        )
        self.out = nnx.Linear(32, 64, rngs=rngs)
        self.heads = heads
        self.kv_heads = kv_heads

    def __call__(self, tokens):
        def split(x, heads):
            return x.reshape(*x.shape[:2], heads, -1)

        x = self.embed(tokens)
        x = jax.nn.dot_product_attention(
            split(self.query(x), self.heads),
            split(self.key(x), self.kv_heads),
            split(self.value(x), self.kv_heads),
        )
        return self.out(x.reshape(*tokens.shape, 32))


def trained(trace, plan):
    """Return the losses of two steps, of a state that lies as planned."""
    program = Program(
        trace,
        plan,
        jax.devices()[: math.prod(plan.mesh.values())],
    )
    state = program.init(0)
    leaves = by_path(state)
    specs = {path: tuple(leaf.sharding.spec) for path, leaf in leaves.items()}
    assert specs == {array.path: array.spec for array in plan.arrays}

    losses = []
    for step in range(2):
        draw = np.random.default_rng(step).integers
        batch = tuple(
            draw(0, 8, x.shape).astype(np.int32) for x in (trace.inputs, trace.targets)
        )
        state, records = program.train(
            state,
            jax.device_put(batch, program.block_sharding),
            0,
            1,
        )
        losses.append(float(records[0, 0]))
    return losses


def language(model):
    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-2),
        batch_size=8,
        steps_per_call=1,
    )
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return lepton.trace(recipe, tokens, tokens)


@functools.cache
def alone(model):
    trace = language(model)
    assignment = by_hand(trace, (1,), {}, 0)
    plan = fixed(trace, lepton.topology("cpu:1"), assignment)
    return trace, trained(trace, plan)


MHA = functools.partial(Attention, 4, 4)
GQA = functools.partial(Attention, 4, 2)
MOE = functools.partial(
    lepton.models.MoELM,
    64,
    dim=32,
    layers=1,
    heads=4,
    hidden=64,
    experts=4,
)


@pytest.mark.parametrize(
    ("model", "mesh", "pins"),
    [
        (
            MHA,
            {"tensor": 8},
            {"query/kernel": P(None, "tensor")},
        ),
        (
            MHA,
            {"data": 8},
            {"query/kernel": P(None, "data"), "out/kernel": P("data")},
        ),
        (
            GQA,
            {"tensor": 8},
            {"key/kernel": P(None, "tensor"), "query/kernel": P(None, "tensor")},
        ),
        (
            GQA,
            {"data": 2, "tensor": 4},
            {"key/kernel": P(None, "tensor"), "value/kernel": P("tensor", "data")},
        ),
        (
            GQA,
            {"data": 2, "tensor": 4},
            {"query/kernel": P(None, ("data", "tensor"))},
        ),
        (
            GQA,
            {"data": 2, "tensor": 4},
            {"embed/embedding": P(None, ("data", "tensor")), "key/bias": P("tensor")},
        ),
        (
            MOE,
            {"data": 8},
            {
                "**/feed_forward/up": P(None, "data"),
                "**/feed_forward/down": P(None, None, "data"),
            },
        ),
        (
            MOE,
            {"expert": 4, "x": 2},
            {"**/feed_forward/gate": P("expert", None, "x")},
        ),
    ],
    ids=str,
)
def test_a_pin_of_storage_that_divides_is_kept_whatever_the_heads_have_in_common(
    model, mesh, pins
):
    trace, expected = alone(model)
    plan = planning.plan(
        trace,
        CPU,
        mesh=mesh,
        pins=pins,
    )
    arrays = specs(plan)
    for pattern, spec in pins.items():
        found = [
            a
            for path, a in arrays.items()
            if path.endswith(pattern.removeprefix("**/"))
        ]
        assert found
        assert all(a.spec == tuple(spec) for a in found)
    np.testing.assert_allclose(
        trained(trace, plan),
        expected,
        rtol=2e-5,
    )


def test_what_is_only_stored_in_parts_is_gathered_where_it_is_used():
    plan = planning.plan(
        language(MHA),
        CPU,
        mesh={"tensor": 8},
        pins={"query/kernel": P(None, "tensor")},
    )
    query = specs(plan)["query/kernel"]

    assert query.spec == (None, "tensor")
    assert query.use == ()
    assert "gathered where it is used" in query.reason
