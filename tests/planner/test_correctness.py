"""A plan computes what one device computes.

This holds for every model of the zoo, however its arrays are split.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.planner import assignment as assemble
from lepton_jax.planner import planning
from lepton_jax.planner.program import named
from lepton_jax.planner.search import build as search
from lepton_jax.train.program import Program
from lepton_jax.trees import by_path

STEPS = 5
BATCH = 16
LENGTH = 8
VOCAB = 64
RTOL = 1e-5  # of the losses in float32
CPU = lepton.topology("cpu:8")
MESHES = [
    {"data": 8, "tensor": 1},
    {"data": 1, "tensor": 8},
    {"data": 2, "tensor": 4},
    None,
]


class Adversaries(nnx.Module):
    """A generator and its critic, each with a loss of its own in the outputs."""

    def __init__(self, rngs):
        self.generator = models.MLP((8, 32, 16), rngs=rngs)
        self.critic = models.MLP((16, 32, 8), rngs=rngs)
        self.noise = nnx.Rngs(noise=7)

    def __call__(self, x):
        fake = self.generator(jax.random.normal(self.noise.noise(), (x.shape[0], 8)))
        graph, params = nnx.split(self.critic)
        frozen = nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, params))
        scores = {
            "real": self.critic(x),
            "fake": self.critic(jax.lax.stop_gradient(fake)),
            "fooled": frozen(fake),
        }
        return {name: score.mean(-1) for name, score in scores.items()}


def adversarial(outputs, targets):
    bce = optax.sigmoid_binary_cross_entropy
    return (
        bce(outputs["real"], targets)
        + bce(outputs["fake"], 1 - targets)
        + bce(outputs["fooled"], targets)
    )


class LinenLM(linen.Module):
    @linen.compact
    def __call__(self, tokens, train: bool):
        embed = linen.Embed(VOCAB, 32)
        x = embed(tokens) + self.param(
            "position",
            linen.initializers.normal(0.02),
            (LENGTH, 32),
        )
        x = x + linen.MultiHeadDotProductAttention(8, use_bias=False)(
            linen.LayerNorm()(x),
            mask=linen.make_causal_mask(tokens),
        )
        hidden = linen.gelu(linen.Dense(64)(linen.LayerNorm()(x)))
        x = x + linen.Dropout(0.1, deterministic=not train)(linen.Dense(32)(hidden))
        return embed.attend(linen.LayerNorm()(x))


class Separable(nnx.Module):
    """Depthwise and pointwise convolutions in turn, then one in groups.

    One of the depthwise convolutions is strided; the groups have four channels.
    """

    def __init__(self, rngs):
        self.first = nnx.Conv(
            3,
            16,
            (3, 3),
            rngs=rngs,
        )
        self.deep = nnx.List(
            [
                nnx.Conv(
                    16,
                    16,
                    (3, 3),
                    strides=2,
                    feature_group_count=16,
                    rngs=rngs,
                ),
                nnx.Conv(
                    16,
                    32,
                    (3, 3),
                    feature_group_count=16,
                    kernel_dilation=2,
                    rngs=rngs,
                ),
            ]
        )
        self.point = nnx.List(
            [
                nnx.Conv(
                    16,
                    16,
                    (1, 1),
                    rngs=rngs,
                ),
                nnx.Conv(
                    32,
                    32,
                    (1, 1),
                    rngs=rngs,
                ),
            ]
        )
        self.groups = nnx.Conv(
            32,
            64,
            (3, 3),
            feature_group_count=8,
            rngs=rngs,
        )
        self.out = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for deep, point in zip(self.deep, self.point, strict=True):
            x = nnx.relu(point(nnx.relu(deep(x))))
        return self.out(self.groups(x).mean((1, 2)))


def picture_net(rngs):
    return models.CNN(
        8,
        size=(8, 8, 3),
        widths=(8, 16),
        dense=16,
        batch_norm=True,
        dropout=0.2,
        rngs=rngs,
    )


def language_model(rngs, **options):
    return models.TransformerLM(
        VOCAB,
        dim=32,
        layers=2,
        heads=8,
        kv_heads=4,
        hidden=64,
        rngs=rngs,
        **options,
    )


def mixture(rngs):
    return models.MoELM(
        VOCAB,
        dim=32,
        layers=2,
        heads=8,
        hidden=32,
        experts=8,
        group=LENGTH,
        loop="scan",
        rngs=rngs,
    )


RNG = np.random.default_rng(0)


def numbers(*shape):
    return RNG.normal(size=(STEPS, BATCH, *shape)).astype(np.float32)


def ids(below, *shape):
    return RNG.integers(0, below, (STEPS, BATCH, *shape)).astype(np.int32)


TEXT = ids(VOCAB, LENGTH + 1)
SENTENCES = TEXT[..., :-1], TEXT[..., 1:]
entropy = lepton.losses.cross_entropy
ZOO = {
    "cnn": (
        picture_net,
        entropy,
        (numbers(8, 8, 3), ids(8)),
    ),
    "separable": (
        Separable,
        entropy,
        (numbers(8, 8, 3), ids(8)),
    ),
    "lstm": (
        functools.partial(
            models.LSTM,
            VOCAB,
            8,
            dim=16,
            hidden=32,
        ),
        entropy,
        (ids(VOCAB, 5), ids(8)),
    ),
    "two-tower": (
        functools.partial(
            models.TwoTower,
            64,
            32,
            dim=16,
            hidden=(32,),
            width=16,
            dropout=0.1,
        ),
        lepton.losses.squared_error,
        ({"user": ids(64), "item": ids(32)}, numbers()),
    ),
    "lm": (language_model, entropy, SENTENCES),
    "lm-scan": (
        functools.partial(language_model, loop="scan", tied=True),
        entropy,
        SENTENCES,
    ),
    "moe": (mixture, entropy, SENTENCES),
    "gan": (
        Adversaries,
        adversarial,
        (numbers(16), np.ones((STEPS, BATCH), np.float32)),
    ),
    "linen": (LinenLM(), entropy, SENTENCES),
    "mlp": (
        functools.partial(
            models.MLP,
            (16, 32, 32, 8),
            dropout=0.3,
        ),
        entropy,
        (numbers(16), ids(8)),
    ),
}


class Key(NamedTuple):
    data: np.ndarray


class Run(NamedTuple):
    """Losses of the steps, the state after them, and the specs of its arrays."""

    losses: np.ndarray
    state: Any
    specs: dict[str, tuple]


class Case(NamedTuple):
    """A traced model with its batches, and a run on one device."""

    trace: Any
    batches: Any
    start: Any
    one: Run


def host(x):
    """Return a copy on the host, which no donation takes."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return Key(np.array(jax.random.key_data(x)))
    return np.array(x)


def put(start, sharding):
    keyed = jax.tree.map(
        lambda x: jax.random.wrap_key_data(x.data) if isinstance(x, Key) else x,
        start,
        is_leaf=lambda x: isinstance(x, Key),
    )
    return jax.device_put(keyed, sharding)


@pytest.fixture(autouse=True, scope="module")
def small_arrays_are_split_too(quick_compilation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "SMALL", 0)
        yield
    case.cache_clear()


@functools.cache
def case(name, **fields):
    model, loss, batches = ZOO[name]
    fields = {"optimizer": optax.sgd(0.05, momentum=0.9), "steps_per_call": 1} | fields
    recipe = lepton.Recipe(
        model=model,
        loss=loss,
        batch_size=BATCH,
        **fields,
    )
    trace = lepton.trace(recipe, *jax.tree.map(lambda x: x[0], batches))
    program = Program(trace, on_one_device(trace), jax.devices()[:1])
    state = program.init(0)
    start = jax.tree.map(host, state)
    return Case(trace, batches, start, run(program, batches, state))


def on_one_device(trace):
    assignment = search.by_hand(trace, (1,), {}, 0)
    return search.fixed(trace, lepton.topology("cpu:1"), assignment)


def run(program, batches, state):
    def batch_of(step):
        return jax.tree.map(lambda x: x[step], batches)

    losses = []
    for step in range(STEPS):
        batch = jax.device_put(batch_of(step), program.block_sharding)
        state, records = program.train(state, batch, 0, 1)
        losses.append(float(records[0, 0]))
    return Run(
        np.array(losses),
        jax.tree.map(host, state),
        specs_of(state),
    )


def specs_of(state):
    return {path: tuple(leaf.sharding.spec) for path, leaf in by_path(state).items()}


def check(known, plan, rtol=RTOL):
    """Check that five steps under a plan give what one device computes.

    These are the losses, the variables and nearly the parameters.
    """
    program = Program(
        known.trace,
        plan,
        jax.devices()[: math.prod(plan.mesh.values())],
    )
    start = put(known.start, program.state_sharding)

    result = run(program, known.batches, start)

    np.testing.assert_allclose(result.losses, known.one.losses, rtol=rtol)
    assert result.specs == {a.path: a.spec for a in plan.arrays}
    near = functools.partial(
        np.testing.assert_allclose,
        rtol=100 * rtol,
        atol=10 * rtol,
    )
    jax.tree.map(near, result.state.params, known.one.state.params)
    jax.tree.map(near, result.state.variables, known.one.state.variables)
    return program


def assigned(
    known,
    sizes,
    masks,
    keep,
    remat="none",
    micro_batches=1,
):
    assignment = search.by_hand(
        known.trace,
        sizes,
        masks,
        keep,
        remat,
        micro_batches,
    )
    return search.fixed(known.trace, CPU, assignment)


def groups(known, *parts):
    """List the named axes whose name ends in one of the parts."""
    graph = known.trace.gradient("none")
    axes = named.Names(graph, known.trace.arguments).groups
    chosen = [axis.name for axis in axes if axis.name.endswith(parts)]
    assert chosen, f"no named axis ends in {parts}"
    return chosen


@pytest.mark.parametrize(
    "mesh",
    MESHES,
    ids=lambda m: "x".join(map(str, m.values())) if m else "own",
)
@pytest.mark.parametrize("name", ZOO)
def test_the_planners_choice_gives_the_losses_of_one_device(name, mesh):
    known = case(name)
    plan = planning.plan(
        known.trace,
        CPU,
        mesh=mesh,
    )
    assert math.prod(plan.mesh.values()) == 8
    assert mesh is None or plan.mesh == mesh
    check(known, plan)


@pytest.mark.parametrize("name", ZOO)
def test_every_named_axis_that_divides_may_be_split(name):
    known = case(name)
    names = named.Names(known.trace.gradient("none"), known.trace.arguments)
    masks = {
        g.name: 1 if k == names.batch else 2
        for k, g in enumerate(names.groups)
        if g.divisor % 4 == 0
    }
    plan = assigned(
        known,
        (2, 4),
        masks,
        1,
    )
    assert len(masks) > 1
    assert any(any(a.use) for a in plan.arrays)
    check(known, plan)


def test_state_in_parts_is_gathered_where_it_is_used():
    known = case("lm")
    plan = assigned(
        known,
        (8,),
        {"batch": 1},
        1,
    )
    assert plan.mesh == {"fsdp": 8}
    assert all(
        "fsdp" in a.spec and not any(a.use) for a in plan.arrays if a.kind == "params"
    )
    program = check(known, plan)
    state = program.init(0)
    assert specs_of(state) == {a.path: a.spec for a in plan.arrays}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        jax.tree.map(host, state.params),
        known.start.params,
    )


@pytest.mark.parametrize(("remat", "micro_batches"), [("dots", 1), ("full", 2)])
@pytest.mark.parametrize("name", ["lm", "lm-scan"])
def test_rematerialization_and_micro_batches_under_a_split(name, remat, micro_batches):
    known = case(name)
    masks = {
        "batch": 1,
        **dict.fromkeys(
            groups(known, "attention/key.1", "attention/key.2", "up.1", "up.2"), 2
        ),
    }
    check(
        known,
        assigned(
            known,
            (2, 4),
            masks,
            1,
            remat,
            micro_batches,
        ),
    )


def test_experts_lie_on_the_axis_of_the_samples():
    known = case("moe")
    names = named.Names(known.trace.gradient("none"), known.trace.arguments)
    (experts,) = (names.groups[k].name for k in assemble.expert_groups(names))
    plan = assigned(
        known,
        (8,),
        {"batch": 1, experts: 1},
        0,
    )
    kernels = {
        a.path.rsplit("/", 1)[-1]: a
        for a in plan.arrays
        if a.kind == "params" and "feed_forward/" in a.path
    }
    assert all(kernels[k].use == (None, "expert") for k in ("gate", "up", "down")), (
        "one expert a device, of each layer"
    )
    program = check(known, plan)
    assert "all-to-all" in program.lower().compile().as_text(), (
        "tokens move to the experts"
    )


def test_rows_of_embeddings_lie_on_the_axis_of_the_samples():
    known = case("two-tower")
    plan = assigned(
        known,
        (8,),
        {"batch": 1, "users.0": 1, "items.0": 1},
        0,
    )
    assert "row-sharded embeddings" in plan.name
    assert {a.path: a.spec for a in plan.arrays}["params/users/embedding"] == (
        plan.batch_axes[0],
    )
    check(known, plan)


@pytest.mark.parametrize("name", ["lm", "linen"])
def test_a_sequence_may_be_split(name):
    known = case(name)
    (later,) = (
        groups(known, "inputs.1") if name == "lm" else groups(known, "position.0")
    )
    check(
        known,
        assigned(
            known,
            (2, 4),
            {"batch": 1, later: 2},
            3,
        ),
    )


def test_three_axes_with_storage_on_one_and_samples_on_two():
    known = case("lm-scan")
    masks = {"batch": 5, **dict.fromkeys(groups(known, "up.2", "embed.0"), 2)}
    check(
        known,
        assigned(
            known,
            (2, 2, 2),
            masks,
            4,
        ),
    )


def test_pinned_arrays_lie_as_pinned():
    known = case("lm")
    pins = {
        "**/embedding": P("tensor", None),
        "**/query/kernel": P(None, "tensor"),
        "head/kernel": P(
            ("data", "tensor"),
        ),
    }
    plan = planning.plan(
        known.trace,
        CPU,
        mesh={"data": 2, "tensor": 4},
        pins=pins,
    )
    specs = {
        a.path.removeprefix("params/"): a.spec
        for a in plan.arrays
        if a.kind == "params"
    }
    assert specs["embed/embedding"] == ("tensor",)
    assert specs["head/kernel"] == (("data", "tensor"),)
    assert all(
        specs[f"blocks/{i}/attention/query/kernel"] == (None, "tensor")
        for i in range(2)
    )
    check(known, plan)


@pytest.mark.parametrize(
    ("name", "pins", "remat", "micro_batches"),
    [
        (
            "cnn",
            {
                "convs/*/kernel": P(None, None, None, "tensor"),
                "dense/kernel": P("tensor", None),
            },
            "full",
            None,
        ),
        (
            "two-tower",
            {
                "users/embedding": P(("data", "tensor"), None),
                "items/embedding": P(None, "tensor"),
            },
            None,
            None,
        ),
        (
            "moe",
            {"**/feed_forward/up": P(None, "tensor")},
            "dots",
            2,
        ),
    ],
)
def test_pins_with_the_rest_left_to_the_search(name, pins, remat, micro_batches):
    known = case(name)
    plan = planning.plan(
        known.trace,
        CPU,
        mesh={"data": 2, "tensor": 4},
        pins=pins,
        remat=remat,
        micro_batches=micro_batches,
    )
    assert plan.remat == (remat or plan.remat)
    assert plan.micro_batches == (micro_batches or plan.micro_batches)
    check(known, plan)


def test_factored_moments_lie_as_their_parameters():
    known = case("mlp", optimizer=optax.adafactor(1e-2, min_dim_size_to_factor=8))
    plan = assigned(
        known,
        (2, 4),
        {"batch": 1, **dict.fromkeys(groups(known, "bias.0"), 2)},
        1,
    )
    rows = [a for a in plan.arrays if "v_row/" in a.path and a.shape != (1,)]
    assert rows
    assert all(a.spec for a in rows)
    check(known, plan)


@pytest.mark.parametrize(("precision", "rtol"), [("bfloat16", 5e-3), ("float16", 5e-3)])
def test_low_precision_agrees_to_its_rounding(precision, rtol):
    """Losses agree to 5e-3.

    Partial sums of a split dim are rounded to 8 (or 11) bits before they are added;
    2^-8 is 4e-3.
    """
    known = case("mlp" if precision == "float16" else "lm-scan", precision=precision)
    masks = {
        "batch": 1,
        **dict.fromkeys(groups(known, "up.2", "attention/key.2", "bias.0"), 2),
    }
    check(
        known,
        assigned(known, (2, 4), masks, 1),
        rtol,
    )


def test_outputs_under_a_split_are_those_of_one_device():
    known = case("lm")
    inputs = known.batches[0][0]
    masks = {"batch": 1, **dict.fromkeys(groups(known, "up.1", "head.1"), 2)}
    split = assigned(known, (2, 4), masks, 1)
    outputs = []
    for plan in (split, on_one_device(known.trace)):
        devices = jax.devices()[: math.prod(plan.mesh.values())]
        program = Program(known.trace, plan, devices)
        state = put(known.start, program.state_sharding)
        outputs.append(program.predict(state, jnp.asarray(inputs), lambda x: x))

    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
