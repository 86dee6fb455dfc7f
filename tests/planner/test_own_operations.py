"""Operations that a user brings, with a rule of how they may be split."""

from __future__ import annotations

import doctest
import math
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import pallas as pl

import lepton_jax as lepton
from lepton_jax import losses
from lepton_jax.planner.program import named, remat, ruled
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.layout import Layout
from lepton_jax.planner.rewrite import notation, own, rule
from lepton_jax.planner.search import build
from lepton_jax.train.program import Program
from lepton_jax.verify.comparison import verify

RTOL = 1e-5
BATCH, LENGTH, WIDTH = 8, 6, 16
EPSILON = 1e-6


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.mark.parametrize("module", (notation, own, rule), ids=lambda m: m.__name__)
def test_the_examples_of_rules_hold(module):
    assert doctest.testmod(module).failed == 0


# ---- a kernel: rows divided by their root mean square ----


def forward_kernel(x_ref, scale_ref, out_ref, root_ref):
    x = x_ref[...]
    root = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    out_ref[...] = x * root * scale_ref[...]
    root_ref[...] = root


def call(x, scale, interpret):
    rows = math.prod(x.shape[:-1])
    width = x.shape[-1]
    shapes = (
        jax.ShapeDtypeStruct((rows, width), x.dtype),
        jax.ShapeDtypeStruct((rows, 1), x.dtype),
    )
    out, root = pl.pallas_call(forward_kernel, shapes, interpret=interpret)(
        x.reshape(rows, width), scale[None]
    )
    return out.reshape(x.shape), root.reshape(*x.shape[:-1], 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def unruled(x, scale, interpret=True):
    return call(x, scale, interpret)[0]


def kept(x, scale, interpret):
    out, root = call(x, scale, interpret)
    return out, (x, scale, root)


def pulled(interpret, saved, slope):
    x, scale, root = saved
    normal = x * root
    slope_of_normal = slope * scale
    inner = (slope_of_normal * normal).mean(-1, keepdims=True)
    axes = tuple(range(x.ndim - 1))
    return root * (slope_of_normal - normal * inner), (slope * normal).sum(axes)


unruled.defvjp(kept, pulled)

DIMS = "... width, width -> ... width"


@lepton.planner.rule(DIMS, whole="width", saves="... _")
def ruled_rows(x, scale, interpret=False):
    return unruled(x, scale, interpret)


@lepton.planner.rule(DIMS, whole="width")
def again(x, scale, interpret=False):
    return unruled(x, scale, interpret)


def plain(x, scale):
    root = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * root * scale


class Model(nnx.Module):
    def __init__(self, norm, *, rngs):
        self.embed = nnx.Embed(32, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.scale = nnx.Param(jnp.linspace(0.5, 1.5, 4 * WIDTH))
        self.down = nnx.Linear(4 * WIDTH, 32, rngs=rngs)
        self.norm = norm

    def __call__(self, tokens):
        x = nnx.tanh(self.up(self.embed(tokens)))
        return self.down(self.norm(x, self.scale[...]))


def traced(norm, **more):
    recipe = lepton.Recipe(
        model=partial(Model, norm),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.5),
        batch_size=BATCH,
        steps_per_call=1,
        **more,
    )
    return lepton.trace(recipe, *(x[0] for x in batches()))


def batches():
    x = np.random.default_rng(0).integers(0, 32, (2, BATCH, LENGTH + 1), np.int32)
    return x[..., :-1], x[..., 1:]


def trained(trace, plan):
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    state = program.init(0)
    values = []
    for step in range(2):
        batch = jax.tree.map(lambda x, step=step: x[step], batches())
        batch = jax.device_put(batch, program.block_sharding)
        state, records = program.train(state, batch, 0, 1)
        values.append(float(records[0, 0]))
    return values


def planned(trace, sizes, masks, keep=0, remat="none"):
    count = math.prod(sizes)
    trace = trace.on(lepton.topology(f"cpu:{count}"))
    assignment = build.by_hand(trace, sizes, masks, keep, remat)
    return trace, build.fixed(trace, lepton.topology(f"cpu:{count}"), assignment)


@pytest.fixture(scope="module")
def expected():
    return trained(*planned(traced(plain), (1,), {}))


@pytest.fixture(autouse=True)
def small_arrays_split(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)


def stated(dims, **more):
    """Return the rows' kernel with another rule."""

    def rows(x, scale, interpret=False):
        return unruled(x, scale, interpret)

    return lepton.planner.rule(dims, **more)(rows)


# ---- it trains ----

WAYS = {
    "one device": ((1,), {}, 0, "none"),
    "fsdp": ((8,), {"batch": 1}, 1, "dots"),
    "the whole dim split": ((2, 4), {"batch": 1, "scale.0": 2}, 0, "full"),
}


@pytest.mark.parametrize(
    ("norm", "way"),
    [
        (ruled_rows, "one device"),
        (ruled_rows, "fsdp"),
        (ruled_rows, "the whole dim split"),
        (again, "fsdp"),
        (unruled, "fsdp"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_kernel_trains_as_plain_jax(norm, way, expected):
    sizes, masks, keep, remat = WAYS[way]
    trace = traced(norm)

    losses_ = trained(*planned(trace, sizes, masks, keep, remat))

    np.testing.assert_allclose(losses_, expected, rtol=RTOL)


@pytest.mark.parametrize("shape", ((3, 5), (2, 3, 5), (7, 1)))
def test_values_and_gradients_are_those_of_plain_jax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    scale = jnp.arange(1.0, 1 + shape[-1])

    def both(norm):
        def loss(x, scale):
            return jnp.sin(norm(x, scale)).sum()

        mapped = jax.vmap(lambda x: norm(x, scale))
        return (
            *jax.value_and_grad(loss, (0, 1))(x, scale),
            jax.grad(lambda x: mapped(x).sum())(jnp.stack([x, 2 * x])),
        )

    for norm in (ruled_rows, again):
        pairs = zip(*map(jax.tree.leaves, (both(plain), both(norm))), strict=True)
        for known, found in pairs:
            np.testing.assert_allclose(found, known, rtol=RTOL, atol=RTOL)


# ---- it is planned ----


def operations(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    graph = Graph(jax.make_jaxpr(function)(*args))
    return graph, [op for op in graph.operations() if op.name in own.OWN_OPERATIONS]


def choice_of(function, shapes, splits, sizes=(2,)):
    """Return how the last operation is split, its operands being split already.

    Args:
      function: of arrays.
      shapes: of its operands.
      splits: (operand, dim) to the mask of its mesh axes.
      sizes: of the mesh axes.
    """
    graph, found = operations(function, *shapes)
    uses = {}
    for (number, dim), mask in splits.items():
        uses[graph.find(graph.main.inputs[number].nodes[dim])] = mask
    layout = Layout(graph, sizes, uses, [])
    return layout.decide(found[-1], None).choice


def test_rows_stay_split_and_the_gradient_of_the_scale_is_a_sum():
    def slopes(x, scale):
        return jax.grad(lambda x, s: ruled_rows(x, s).sum(), (0, 1))(x, scale)

    choice = choice_of(slopes, [(8, 4), (4,)], {(0, 0): 1})

    assert choice.results == ((1, 0), (0,))
    assert choice.sums == (0, 1)
    assert choice.moves == (("all-reduce", 1, 16.0, "result 1"),)
    assert choice.share == 0.5


def test_a_whole_dim_that_is_split_is_exchanged_for_rows():
    choice = choice_of(ruled_rows, [(8, 4), (4,)], {(0, 1): 1})
    kinds = [kind for kind, *_ in choice.moves]

    assert choice.inputs[0] == (1, 0)
    assert kinds[0] == "all-to-all"


def test_rows_that_do_not_divide_are_whole():
    choice = choice_of(ruled_rows, [(7, 4), (4,)], {(0, 1): 1})

    assert choice.inputs == {0: (0, 0), 1: (0,)}
    assert choice.share == 1


def test_a_dim_that_is_summed_over_is_split_and_added_up():
    @lepton.planner.rule("batch width, width classes -> batch classes", summed="width")
    def product(x, w):
        return x @ w

    choice = choice_of(product, [(8, 64), (64, 6)], {(0, 1): 1})

    assert choice.inputs == {0: (0, 1), 1: (1, 0)}
    assert choice.moves == (("all-reduce", 1, 8 * 6 * 4.0, "result 0"),)


def test_an_array_that_is_gathered_over_two_axes_is_counted_whole():
    choice = choice_of(ruled_rows, [(7, 16), (16,)], {(0, 1): 3}, sizes=(2, 4))
    gathers = [move for move in choice.moves if move[0] == "all-gather"]

    assert ("all-gather", 3, 7 * 16 * 4.0, "operand 0") in gathers


def test_flops_are_those_that_are_traced_or_told():
    shapes = [(8, 4), (4, 6)]

    def product(x, w):
        return x @ w

    def kernel(x, w):
        def body(x_ref, w_ref, out_ref):
            out_ref[...] = x_ref[...] @ w_ref[...]

        shape = jax.ShapeDtypeStruct((8, 6), x.dtype)
        return pl.pallas_call(body, shape, interpret=True)(x, w)

    dims = "batch width, width classes -> batch classes"
    told = lepton.planner.rule(dims, flops=lambda x, w: 2 * x.size * w.shape[1] + 1)
    pairs = [(lepton.planner.rule(dims), 384), (told, 385)]
    for decorate, flops in pairs:
        for function in (product, kernel):
            _, [op] = operations(decorate(function), *shapes)

            assert ruled.own_flops(op.eqn) == flops


def test_the_workspace_counts_as_memory():
    named_ = stated(DIMS, whole="width", workspace="... width")

    _, [op] = operations(named_, (8, 4), (4,))

    assert [value.shape for value in op.outputs] == [(8, 4), (8, 4)]


def test_what_dots_keep_is_not_computed_again():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 4), (4,))]

    def count(norm):
        def loss(x, scale):
            for _ in range(3):
                x = jnp.tanh(norm(x, scale))
            return x.sum()

        policy = remat.POLICIES["dots"]
        program = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(*shapes)
        return str(program).count("own_operation[")

    assert count(ruled_rows) < count(stated(DIMS, whole="width", keep=False))


# ---- what a plan says ----


def test_a_plan_says_what_has_no_rule_and_what_runs_twice():
    notes = " ".join(planned(traced(unruled), (1,), {})[1].notes)
    assert "'pallas_call' (1 of them)" in notes and "lepton.planner.rule" in notes

    notes = " ".join(planned(traced(again), (1,), {})[1].notes)
    assert "gradient of 'again' runs its forward pass again" in notes

    assert planned(traced(ruled_rows), (1,), {})[1].notes == ()


# ---- mistakes ----


@pytest.mark.parametrize(
    ("dims", "more", "message"),
    [
        ("batch width", {}, "it has no ->"),
        ("batch wi-dth -> batch", {}, "'wi-dth' is no name"),
        ("a a -> a", {}, "stands twice"),
        ("a b -> a", {"whole": "c"}, "whole names 'c'"),
        ("a b -> a", {"saves": "a c"}, "saves names 'c'"),
        ("width -> width", {}, "1 operands are named, 2 given"),
        ("batch, width -> batch width", {}, "an array of 2 dims is named 'batch'"),
        ("batch width, width -> batch", {}, "returns float32[8, 4]"),
        (DIMS, {"saves": "... _, width"}, "float32[8, 1]"),
    ],
)
def test_a_rule_that_does_not_fit_is_an_error(dims, more, message):
    x, scale = jnp.ones((8, 4)), jnp.ones(4)

    with pytest.raises(lepton.ModelError, match=re.escape(message)):
        stated(dims, **more)(x, scale)


# ---- compiled ----


def test_xla_computes_and_sends_what_is_planned():
    trace, plan = planned(traced(ruled_rows), (2, 4), {"batch": 1, "scale.0": 2})
    found = verify(trace, lepton.plan(trace, lepton.topology("cpu:8"), mesh=plan.mesh))

    assert not found.unexpected and not found.absent
    assert found.flops == pytest.approx(found.plan.flops, rel=0.01)


def test_a_kernel_with_a_rule_is_compiled_for_tpus(monkeypatch):
    pytest.importorskip("libtpu", reason="pip install 'lepton-jax[tpu]'")
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", 128)
    where = lepton.topology("v5e:2x4")
    trace = traced(ruled_rows).on(where)
    plan = lepton.plan(trace, where, mesh={"fsdp": 8})

    found = verify(trace, plan)

    assert not found.unexpected and not found.absent
    assert found.flops == pytest.approx(plan.flops, rel=0.01)
