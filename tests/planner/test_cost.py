"""The cost's FLOPs are XLA's, and its collectives are those that a platform has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import lepton_jax as lepton
from lepton_jax.hardware import convolution_flops, topology
from lepton_jax.planner import trace
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate.cost import Cost, as_compiled
from lepton_jax.planner.estimate.motion import Motion
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.search import build as search
from lepton_jax.train.program import Program
from lepton_jax.verify import hlo

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("image", "kernel", "options"),
    [
        ((2, 8, 8, 3), (3, 3, 3, 5), {}),
        ((2, 7, 5, 3), (3, 2, 3, 5), {"window_strides": (2, 3)}),
        ((2, 9, 9, 3), (3, 3, 3, 5), {"rhs_dilation": (2, 4)}),
        (
            (2, 5, 5, 3),
            (3, 3, 3, 5),
            {"padding": ((2, 1), (-1, 3)), "lhs_dilation": (2, 3)},
        ),
        ((2, 8, 8, 8), (3, 3, 2, 12), {"feature_group_count": 4}),
        ((4, 8, 8, 3), (3, 3, 3, 8), {"batch_group_count": 2}),
    ],
    ids=str,
)
def test_flops_of_a_convolution_are_those_that_xla_counts(image, kernel, options):
    x = jnp.zeros(image)
    w = jnp.zeros(kernel)
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    function = jax.jit(
        lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=NHWC, **options)
    )
    (eqn,) = (
        e
        for e in function.trace(x, w).jaxpr.eqns
        if e.primitive.name == "conv_general_dilated"
    )
    ours = convolution_flops(eqn.params, image, kernel, eqn.outvars[0].aval.shape)
    ones = lax.conv_general_dilated(
        jnp.ones((1, *image[1:3], 1)),
        jnp.ones((*kernel[:2], 1, 1)),
        dimension_numbers=NHWC,
        **{k: v for k, v in options.items() if not k.endswith("_count")},
    )
    by_hand = (
        2 * float(ones.sum()) * eqn.outvars[0].aval.shape[0] * kernel[3] * kernel[2]
    )
    assert ours == by_hand
    if "batch_group_count" not in options:  # which XLA rewrites
        assert ours == function.lower(x, w).compile().cost_analysis()["flops"]


class Net(nnx.Module):
    """At 6x6 a fifth of a padded 3x3 convolution's taps lie on padding."""

    def __init__(self, rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(4, 16, (3, 3), rngs=rngs),
                nnx.Conv(16, 32, (3, 3), feature_group_count=4, rngs=rngs),
                nnx.Conv(32, 32, (3, 3), strides=2, rngs=rngs),
            ]
        )
        self.out = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.out(x.mean((1, 2)))


@pytest.fixture(scope="module")
def traced():
    recipe = lepton.Recipe(
        model=Net,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=16,
    )
    return trace(recipe, np.zeros((16, 6, 6, 4), np.float32), np.zeros(16, np.int32))


def estimated(traced, sizes, masks):
    where = topology(f"cpu:{int(np.prod(sizes))}")
    names = Names(traced.gradient("none"), traced.arguments)
    assert masks.keys() <= {g.name for g in names.groups}
    chosen = tuple(masks.get(g.name, 0) for g in names.groups)
    return Cost(traced, names, where).estimate(Assignment(sizes, chosen, 0))


def test_a_step_of_convolutions_takes_as_many_flops_as_xla_finds(traced):
    alone = search.fixed(traced, topology("cpu:1"), search.by_hand(traced, (1,), {}, 0))
    compiled = Program(traced, alone, jax.devices()[:1]).lower().compile()
    assert estimated(traced, (1,), {}).flops == pytest.approx(
        hlo.read(compiled.as_text()).dot_flops, rel=1e-6
    )


@pytest.mark.parametrize(
    "masks", [{"batch": 1}, {"convs/*/bias.0": 1, "out.0": 1}], ids=str
)
def test_splitting_samples_or_channels_splits_the_flops(traced, masks):
    assert estimated(traced, (4,), masks).flops == pytest.approx(
        estimated(traced, (1,), {}).flops / 4
    )


@pytest.mark.parametrize(
    ("kind", "count", "where", "compiled"),
    [
        ("reduce-scatter", 8, "cpu:8", "all-reduce"),
        ("all-gather", 8, "cpu:8", "all-gather"),
        ("reduce-scatter", 64, "v5p:4x4x4", "all-reduce"),
        ("all-gather", 64, "v5p:4x4x4", "all-reduce"),
        ("reduce-scatter", 16, "v5p:4x4x4", "reduce-scatter"),
        ("reduce-scatter", 64, "v5e:8x8", "all-reduce"),
        ("all-gather", 64, "v5e:8x8", "all-gather"),
        ("reduce-scatter", 16, "v5e:4x4", "reduce-scatter"),
    ],
)
def test_collectives_are_those_that_xla_makes(kind, count, where, compiled):
    assert as_compiled(kind, count, topology(where)) == compiled


class Loops(nnx.Module):
    """Nine loops one after the other, each around a matmul."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(9)])

    def __call__(self, x):
        for layer in self.layers:
            kernel = layer.kernel[...]
            x, _ = lax.scan(lambda x, _, w=kernel: (x @ w, None), x, length=3)
        return x


def test_each_loop_has_a_number_of_its_own():
    recipe = lepton.Recipe(
        model=Loops,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=16,
    )
    traced = trace(recipe, np.zeros((16, 8), np.float32), np.zeros(16, np.int32))
    names = Names(traced.gradient("none"), traced.arguments)

    jobs = Cost(traced, names, topology("h200:8")).jobs

    loops = [op for op in names.graph.operations() if op.name == "scan"]
    assert len(loops) >= 18
    assert {job.loop for job in jobs} == set(range(len(loops) + 1))


# ---- collectives and loops ----


class Recurrent(nnx.Module):
    """A kernel that each step of a loop multiplies with."""

    def __init__(self, rngs):
        self.kernel = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        kernel = self.kernel.kernel[...]

        def step(state, _):
            return jnp.tanh(state @ kernel), None

        state, _ = lax.scan(step, x, None, length=50)
        return self.out(state)


@pytest.fixture(scope="module")
def recurrent():
    recipe = lepton.Recipe(
        model=Recurrent,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=16,
    )
    return trace(recipe, np.zeros((16, 16), np.float32), np.zeros(16, np.int32))


def gathers(traced, platform, parts=1):
    """Return how often a step gathers each kernel that a product in a loop reads."""
    graph = traced.gradient("none")
    motion = Motion(graph, platform)
    return {
        motion.runs(op, value, "all-gather", parts)
        for op in graph.operations()
        for value in op.inputs
        if op.name == "dot_general"
        and op.times > 1
        and value is not None
        and value.stored is not None
    }


def test_a_recurrent_kernel_is_gathered_before_the_loop_on_a_cpu_and_in_it_on_a_tpu(
    recurrent,
):
    assert gathers(recurrent, "cpu") == {1}
    assert gathers(recurrent, "tpu") == {50}


def test_micro_batches_gather_a_kernel_once_on_a_cpu(recurrent):
    assert gathers(recurrent, "cpu", parts=4) == {1}
    assert gathers(recurrent, "tpu", parts=4) == {200}


def test_products_that_round_halve_what_a_tpu_gathers(recurrent):
    graph = recurrent.gradient("none")
    shares = {
        platform: {
            Motion(graph, platform).sent_share(op, op.inputs[1], "all-gather")
            for op in graph.operations()
            if op.name == "dot_general" and op.inputs[1] is not None
        }
        for platform in ("cpu", "tpu")
    }
    assert shares == {"cpu": {1.0}, "tpu": {0.5}}


class Depthwise(nnx.Module):
    """A depthwise convolution, whose kernel's gradient XLA's CPU backend densifies."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(12, 12, (3, 3), feature_group_count=12, rngs=rngs)
        self.out = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        return self.out(self.conv(x).mean((1, 2)))


@pytest.fixture(scope="module")
def depthwise():
    recipe = lepton.Recipe(
        model=Depthwise,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=4,
    )
    return trace(recipe, np.zeros((4, 6, 6, 12), np.float32), np.zeros(4, np.int32))


def test_flops_of_a_depthwise_kernels_gradient_are_those_that_a_cpu_computes(depthwise):
    alone = search.fixed(
        depthwise, topology("cpu:1"), search.by_hand(depthwise, (1,), {}, 0)
    )
    compiled = Program(depthwise, alone, jax.devices()[:1]).lower().compile()
    flops = estimated(depthwise, (1,), {}).flops
    assert flops == pytest.approx(hlo.read(compiled.as_text()).dot_flops, rel=0.03)
    assert flops > 3 * depthwise.flops


@pytest.mark.parametrize("seed", range(8))
def test_flops_of_random_convolutions_are_those_that_xla_counts(seed):
    random = np.random.default_rng(seed)
    channels, groups = ((6, 1), (8, 2), (9, 3), (4, 1))[seed % 4]
    dims = 1 + seed % 2
    image = (2, *(int(n) for n in random.integers(5, 12, dims)), channels)
    window = tuple(int(n) for n in random.integers(1, 5, dims))
    kernel = (*window, channels // groups, 2 * channels)
    strides = tuple(int(n) for n in random.integers(1, 3, dims))
    apart = tuple(int(n) for n in random.integers(1, 3, dims))
    numbers = NHWC if dims == 2 else ("NWC", "WIO", "NWC")

    def convolved(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            "SAME",
            rhs_dilation=apart,
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    function = jax.jit(convolved)
    arguments = (jnp.zeros(image), jnp.zeros(kernel))
    (eqn,) = function.trace(*arguments).jaxpr.eqns
    ours = convolution_flops(eqn.params, image, kernel, eqn.outvars[0].aval.shape)
    compiled = function.lower(*arguments).compile()
    assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=0.03)


class Causal(nnx.Module):
    """Layers whose causal padding is an operation of its own."""

    def __init__(self, rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(8, 8, 3, kernel_dilation=2, padding="CAUSAL", rngs=rngs)
                for _ in range(3)
            ]
        )
        self.out = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.out(x.mean(1))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_cpu_computes_no_layer_again_and_no_causal_padding(remat):
    recipe = lepton.Recipe(
        model=Causal,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=4,
    )
    inputs = np.zeros((4, 12, 8), np.float32)
    causal = trace(recipe, inputs, np.zeros(4, np.int32))
    plan = lepton.plan(causal, topology("cpu:1"), remat=remat)
    compiled = Program(causal, plan, jax.devices()[:1]).lower().compile()
    found = hlo.read(compiled.as_text()).dot_flops
    assert plan.flops == pytest.approx(found, rel=0.01)
