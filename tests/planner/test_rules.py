"""The rules of primitives: which dims are one thing, for each family of them.

No assignment of mesh axes changes what a function computes.
"""

import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from lepton_jax.compat import make_mesh
from lepton_jax.planner.apply import laid_out
from lepton_jax.planner.program.graph import Graph, Value
from lepton_jax.planner.program.layout import Layout, contraction, meets_stored
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.rules import RULES
from lepton_jax.verify.hlo import read

pytestmark = pytest.mark.usefixtures("quick_compilation")


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def graph_of(function, *args):
    """Return the graph of a function of shapes; a tuple is one of float32."""
    shapes = [floats(*arg) if isinstance(arg, tuple) else arg for arg in args]
    return Graph(jax.make_jaxpr(function)(*shapes))


def axes(graph):
    """Return a letter for each named axis, such as "ab,bc->ac" of a matrix product.

    The letters are in the order in which inputs and results show the axes.
    """
    letters: dict[int, str] = {}

    def word(value):
        roots = [graph.find(node) for node in value.nodes]
        for root in roots:
            letters.setdefault(root, chr(ord("a") + len(letters)))
        return "".join(letters[root] for root in roots)

    assert all(isinstance(result, Value) for result in graph.main.results)
    inputs = ",".join(map(word, graph.main.inputs))
    results = ",".join(map(word, graph.main.results))
    return f"{inputs}->{results}"


def backward(function, wrt=None):
    """Return the backward pass of a function.

    Its last argument is the result's cotangent. It returns the gradients of the first
    `wrt` of the others.
    """

    def gradients(*args):
        *args, cotangent = args
        count = len(args) if wrt is None else wrt

        def of_first(*primals):
            return function(*primals, *args[count:])

        _, pullback = jax.vjp(of_first, *args[:count])
        return pullback(cotangent)

    return gradients


@jax.custom_jvp
def own_sine(x):
    return jnp.sin(x)


own_sine.defjvp(
    lambda primals, tangents: (own_sine(*primals), tangents[0] * jnp.cos(primals[0]))
)


@jax.custom_vjp
def own_product(x, w):
    return x @ w


own_product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, g: (g @ kept[1].T, kept[0].T @ g),
)

NHWC = ("NHWC", "HWIO", "NHWC")
conv = partial(
    lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=NHWC,
)
max_pool, avg_pool = (
    partial(
        pool,
        window_shape=(2, 2),
        strides=(2, 2),
    )
    for pool in (nnx.max_pool, nnx.avg_pool)
)


def recurrent(h, xs, w):
    return lax.scan(
        lambda h, x: (jnp.tanh(h @ w + x), h),
        h,
        xs,
    )


FAMILIES = {
    "elementwise": (
        lambda x, y: x + y * jnp.exp(x),
        "ab,ab->ab",
        (4, 6),
        (4, 6),
    ),
    "bias": (
        lambda x, b: x + b,
        "ab,b->ab",
        (4, 6),
        (6,),
    ),
    "a size of 1 is not what it meets": (
        jnp.minimum,
        "ab,cb->ab",
        (4, 6),
        (1, 6),
    ),
    "positions": (
        lambda x: x + jnp.arange(6.0),
        "ab->ab",
        (4, 6),
    ),
    "where": (
        lambda x: jnp.where(
            x > 0,
            jnp.clip(x, 0, 1),
            0,
        ),
        "ab->ab",
        (4, 6),
    ),
    "sum": (
        lambda x: x.sum(1),
        "ab->a",
        (4, 6),
    ),
    "mean kept": (
        lambda x: x - x.mean(1, keepdims=True),
        "ab->ab",
        (4, 6),
    ),
    "softmax": (
        jax.nn.softmax,
        "ab->ab",
        (4, 6),
    ),
    "logsumexp": (
        partial(jax.nn.logsumexp, axis=-1),
        "ab->a",
        (4, 6),
    ),
    "argmax": (
        lambda x: x.argmax(-1),
        "ab->a",
        (4, 6),
    ),
    "argmin": (
        lambda x: x.argmin(0),
        "ab->b",
        (4, 6),
    ),
    "one_hot": (
        lambda i: jax.nn.one_hot(i, 5),
        "a->ab",
        ids(4),
    ),
    "transpose": (
        lambda x: x.transpose(2, 0, 1),
        "abc->cab",
        (4, 6, 2),
    ),
    "squeeze": (
        lambda x: x.squeeze(1),
        "abc->ac",
        (4, 1, 6),
    ),
    "expand_dims": (
        lambda x: jnp.expand_dims(x, (0, 2)),
        "ab->cadb",
        (4, 6),
    ),
    "broadcast": (
        lambda x: jnp.broadcast_to(x, (4, 6)),
        "ab->cb",
        (1, 6),
    ),
    "with itself": (
        lambda x: x[:, None] * x[None],
        "a->aa",
        (4,),
    ),
    "reshape splits": (
        lambda x: x.reshape(6, 2, 4),
        "ab->abc",
        (6, 8),
    ),
    "reshape merges": (
        lambda x: x.reshape(6, 8),
        "abc->ab",
        (6, 2, 4),
    ),
    "reshape regroups": (
        lambda x: x.reshape(3, 8),
        "ab->ac",
        (6, 4),
    ),
    "reshape, two groups": (
        lambda x: x.reshape(2, 3, 35),
        "abc->adb",
        (6, 5, 7),
    ),
    "reshape flattens": (
        lambda x: x.reshape(-1),
        "ab->a",
        (4, 6),
    ),
    "reshape, ones within": (
        lambda x: x.reshape(4, 6, 1),
        "abc->acd",
        (4, 1, 6),
    ),
    "reshape, ones before": (
        lambda x: x.reshape(1, 24),
        "ab->ca",
        (4, 6),
    ),
    "reshape, ones after": (
        lambda x: x.reshape(4, 6, 1, 1),
        "ab->abcd",
        (4, 6),
    ),
    "reshape, ones alone": (
        lambda x: x.reshape(1, 1, 1),
        "ab->cde",
        (1, 1),
    ),
    "reshape, read in another order": (
        lambda x: lax.reshape(x, (8, 6), (1, 2, 0)),
        "abc->ba",
        (6, 2, 4),
    ),
    "repeat": (
        lambda x: jnp.repeat(x, 2, 1),
        "ab->ab",
        (4, 6),
    ),
    "dot": (
        jnp.matmul,
        "ab,bc->ac",
        (4, 6),
        (6, 8),
    ),
    "dot with batch": (
        jnp.matmul,
        "abc,acd->abd",
        (3, 4, 6),
        (3, 6, 8),
    ),
    "outer": (
        jnp.outer,
        "a,b->ab",
        (4,),
        (6,),
    ),
    "einsum": (
        partial(jnp.einsum, "bgsec,bgsd->ebgcd"),
        "abcde,abcf->dabef",
        (2, 3, 4, 5, 6),
        (2, 3, 4, 7),
    ),
    "attention, grouped": (
        jax.nn.dot_product_attention,
        "abcd,aecd,aecf->abcf",
        (2, 8, 4, 6),
        (2, 9, 2, 6),
        (2, 9, 2, 6),
    ),
    "conv": (
        conv,
        "abcd,efdg->ahig",
        (2, 8, 8, 3),
        (3, 3, 3, 5),
    ),
    "conv backward": (
        backward(conv),
        "abcd,efdg,ahig->ajkd,lmdg",
        (2, 8, 8, 3),
        (3, 3, 3, 5),
        (2, 8, 8, 5),
    ),
    "conv by channel": (
        partial(conv, feature_group_count=4),
        "abcd,efgd->ahid",
        (2, 8, 8, 4),
        (3, 3, 1, 8),
    ),
    "conv by groups": (
        partial(conv, feature_group_count=2),
        "abcd,efgd->ahid",
        (2, 8, 8, 4),
        (3, 3, 2, 6),
    ),
    "conv by groups backward": (
        backward(partial(conv, feature_group_count=2)),
        "abcd,efgd,ahid->ajkd,lmnd",
        (2, 8, 8, 4),
        (3, 3, 2, 6),
        (2, 8, 8, 6),
    ),
    "conv by groups of the batch": (
        partial(conv, batch_group_count=2),
        "abcd,efda->ghia",
        (4, 8, 8, 3),
        (3, 3, 3, 6),
    ),
    "max pool": (
        max_pool,
        "abcd->aefd",
        (2, 8, 8, 3),
    ),
    "max pool backward": (
        backward(max_pool),
        "abcd,aefd->aghd",
        (2, 8, 8, 3),
        (2, 4, 4, 3),
    ),
    "avg pool": (
        avg_pool,
        "abcd->aefd",
        (2, 8, 8, 3),
    ),
    "avg pool backward": (
        backward(avg_pool),
        "abcd,efgh->eijh",
        (2, 8, 8, 3),
        (2, 4, 4, 3),
    ),
    "lookup": (
        lambda t, i: t[i],
        "ab,cd->cdb",
        (10, 4),
        ids(2, 3),
    ),
    "lookup of columns": (
        lambda t, i: jnp.take(t, i, axis=1),
        "ab,c->ac",
        (10, 4),
        ids(3),
    ),
    "lookup backward": (
        backward(lambda t, i: t[i], 1),
        "ab,cd,cde->fe",
        (10, 4),
        ids(2, 3),
        (2, 3, 4),
    ),
    "take_along_axis": (
        lambda x, i: jnp.take_along_axis(x, i, 1),
        "ab,ac->ac",
        (4, 10),
        ids(4, 3),
    ),
    "take_along_axis backward": (
        backward(
            lambda x, i: jnp.take_along_axis(x, i, 1),
            1,
        ),
        "ab,ac,ac->ad",
        (4, 10),
        ids(4, 3),
        (4, 3),
    ),
    "scatter": (
        lambda x, i, u: x.at[i].set(u),
        "ab,c,cb->ab",
        (10, 4),
        ids(3),
        (3, 4),
    ),
    "scatter-max": (
        lambda x, i, u: x.at[i].max(u),
        "ab,c,cb->ab",
        (10, 4),
        ids(3),
        (3, 4),
    ),
    "scatter-mul": (
        lambda x, i, u: x.at[i].multiply(u),
        "ab,c,cb->ab",
        (10, 4),
        ids(3),
        (3, 4),
    ),
    "segment_sum": (
        lambda x, i: jax.ops.segment_sum(x, i, 5),
        "ab,a->cb",
        (10, 4),
        ids(10),
    ),
    "cumsum": (
        partial(jnp.cumsum, axis=1),
        "ab->ab",
        (4, 6),
    ),
    "cumlogsumexp": (
        partial(lax.cumlogsumexp, axis=1),
        "ab->ab",
        (4, 6),
    ),
    "sort": (
        partial(jnp.sort, axis=1),
        "ab->ab",
        (4, 6),
    ),
    "sort of pairs": (
        lambda k, v: lax.sort(
            (k, v),
            num_keys=1,
            dimension=0,
        ),
        "ab,ab->ab,ab",
        (4, 6),
        (4, 6),
    ),
    "argsort": (
        jnp.argsort,
        "ab->ab",
        (4, 6),
    ),
    "top_k": (
        lambda x: lax.top_k(x, 2),
        "ab->ac,ad",
        (4, 6),
    ),
    "reversal": (
        lambda x: x[:, ::-1],
        "ab->ab",
        (4, 6),
    ),
    "concatenate": (
        lambda x, y: jnp.concatenate([x, y], 1),
        "ab,ac->ad",
        (4, 6),
        (4, 2),
    ),
    "stack": (
        lambda x, y: jnp.stack([x, y], 1),
        "ab,ab->acb",
        (4, 6),
        (4, 6),
    ),
    "tile": (
        lambda x: jnp.tile(x, (1, 2)),
        "ab->ac",
        (4, 6),
    ),
    "split": (
        lambda x: jnp.split(x, 2, 1),
        "ab->ac,ad",
        (4, 6),
    ),
    "slice": (
        lambda x: x[:, 1:3],
        "ab->ac",
        (4, 6),
    ),
    "stride": (
        lambda x: x[::2],
        "ab->cb",
        (4, 6),
    ),
    "pad": (
        lambda x: jnp.pad(x, ((0, 0), (1, 1))),
        "ab->ac",
        (4, 6),
    ),
    "dynamic_slice": (
        lambda x, i: lax.dynamic_slice(x, (0, i[0]), (4, 2)),
        "ab,c->ad",
        (4, 6),
        ids(1),
    ),
    "dynamic_update_slice": (
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i[0])),
        "ab,ac,d->ab",
        (4, 6),
        (4, 2),
        ids(1),
    ),
    "scan, carry and stacks": (
        recurrent,
        "ab,cab,bb->ab,dab",
        (2, 4),
        (5, 2, 4),
        (4, 4),
    ),
    "scan over layers": (
        lambda x, ws: lax.scan(lambda x, w: (x @ w[0] @ w[1], None), x, ws)[0],
        "ab,cdbb->ab",
        (2, 4),
        (3, 2, 4, 4),
    ),
    "associative_scan": (
        partial(lax.associative_scan, jnp.add, axis=1),
        "ab->ac",
        (4, 8),
    ),
    "while": (
        lambda x, w: lax.while_loop(
            lambda c: c[0] < 3,
            lambda c: (c[0] + 1, c[1] * w),
            (0, x),
        )[1],
        "ab,b->ab",
        (4, 6),
        (6,),
    ),
    "fori_loop": (
        lambda x, w: lax.fori_loop(
            0,
            3,
            lambda i, c: c * w[i],
            x,
        ),
        "ab,cb->ab",
        (4, 6),
        (3, 6),
    ),
    "cond": (
        lambda p, x, y: lax.cond(
            p[0] > 0,
            lambda x, y: x,
            lambda x, y: y.T,
            x,
            y,
        ),
        "a,bc,cb->bc",
        (1,),
        (4, 6),
        (6, 4),
    ),
    "switch": (
        lambda i, x: lax.switch(
            i[0],
            [
                jnp.sin,
                jnp.cos,
                lambda x: x * 2,
            ],
            x,
        ),
        "a,bc->bc",
        ids(1),
        (4, 6),
    ),
    "custom_jvp": (own_sine, "ab->ab", (4, 6)),
    "custom_jvp backward": (
        backward(own_sine),
        "ab,ab->ab",
        (4, 6),
        (4, 6),
    ),
    "custom_vjp": (
        own_product,
        "ab,bc->ac",
        (4, 6),
        (6, 8),
    ),
    "custom_vjp backward": (
        backward(own_product),
        "ab,bc,ac->ab,bc",
        (4, 6),
        (6, 8),
        (4, 8),
    ),
    "remat": (
        jax.checkpoint(lambda x, w: jnp.sin(x @ w)),
        "ab,bc->ac",
        (4, 6),
        (6, 8),
    ),
    "remat backward": (
        backward(jax.checkpoint(lambda x, w: jnp.sin(x @ w))),
        "ab,bc,ac->ab,bc",
        (4, 6),
        (6, 8),
        (4, 8),
    ),
    "jit in jit": (
        jax.jit(lambda x, w: jax.jit(jnp.dot)(x, w)),
        "ab,bc->ac",
        (4, 6),
        (6, 8),
    ),
    "vmap": (
        jax.vmap(
            lambda x, w: x @ w,
            (1, None),
        ),
        "ab,ac->bc",
        (5, 4),
        (5, 8),
    ),
    "vmap of a lookup": (
        jax.vmap(lambda t, i: t[i]),
        "abc,ad->adc",
        (3, 10, 4),
        ids(3, 5),
    ),
    "vmap of a scan": (
        jax.vmap(
            lambda h, xs: lax.scan(
                lambda h, x: (h + x, h),
                h,
                xs,
            )
        ),
        "ab,acb->ab,adb",
        (3, 4),
        (3, 5, 4),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_dims_that_are_one_thing(family):
    function, expected, *args = FAMILIES[family]
    graph = graph_of(function, *args)
    assert axes(graph) == expected
    assert not graph.unknown


@pytest.mark.parametrize(
    ("function", "args", "whole", "reduced"),
    [
        (
            lambda x: x.sum(1),
            [(4, 6)],
            [],
            [(0, 1)],
        ),
        (
            jnp.matmul,
            [(4, 6), (6, 8)],
            [],
            [(0, 1)],
        ),
        (
            lambda t, i: t[i],
            [(10, 4), ids(3)],
            [],
            [(0, 0)],
        ),
        (
            partial(jnp.cumsum, axis=1),
            [(4, 6)],
            [(0, 1)],
            [],
        ),
        (
            lambda x: x.reshape(6, 8),
            [(6, 2, 4)],
            [(0, 2)],
            [],
        ),
        (
            lambda x: x[:, 1:3],
            [(4, 6)],
            [(0, 1)],
            [],
        ),
        (
            lambda x: lax.top_k(x, 2),
            [(4, 6)],
            [(0, 1)],
            [],
        ),
        (
            lambda x, y: jnp.concatenate([x, y], 1),
            [(4, 6), (4, 2)],
            [(0, 1), (1, 1)],
            [],
        ),
        (
            max_pool,
            [(2, 8, 8, 3)],
            [(0, 1), (0, 2)],
            [],
        ),
    ],
)
def test_what_is_summed_over_and_what_each_device_needs_all_of(
    function, args, whole, reduced
):
    operations = [
        op for op in graph_of(function, *args).operations() if op.whole or op.reduced
    ]
    assert [(op.whole, op.reduced) for op in operations] == [(whole, reduced)]


def test_an_unknown_primitive_claims_nothing():
    graph = graph_of(lambda x: jnp.sin(jnp.linalg.cholesky(x)), (4, 4))
    # jnp symmetrizes its argument
    assert axes(graph) == "aa->bc"
    assert graph.unknown == {"cholesky": 1}


def test_loops_have_dims_of_their_own_and_count():
    graph = graph_of(
        recurrent,
        (2, 4),
        (5, 2, 4),
        (4, 4),
    )
    steps = {graph.find(n) for n in graph.loops}
    stepped = [[graph.find(n) in steps for n in v.nodes] for v in graph.main.inputs]
    assert stepped == [[False, False], [True, False, False], [False, False]]
    assert [op.times for op in graph.operations() if op.name == "dot_general"] == [5]


def test_a_parameters_gradient_is_stored_like_it():
    def loss(w, x):
        return (
            (jnp.tanh(x @ w["a"]) @ w["b"].astype(jnp.bfloat16).T)
            .sum()
            .astype(jnp.float32)
        )

    params = {"a": floats(6, 8), "b": floats(4, 8)}
    program = jax.make_jaxpr(jax.grad(loss))(params, floats(2, 6))

    graph = Graph(program, 2, 2)

    assert [v.stored for v in graph.main.results] == [(0, (0, 1)), (1, (0, 1))]
    products = [
        op.outputs[0].stored for op in graph.operations() if op.name == "dot_general"
    ]
    parameters = sorted(stored[0] for stored in products if stored)
    assert parameters == [0, 1], "a gradient is made as it is kept"
    transpose = next(op for op in graph.operations() if op.name == "transpose")
    stored = transpose.outputs[0].stored
    assert stored == (1, (1, 0)), "cast and transposed it is still the parameter"


def test_contractions_say_how_indices_run():
    (op,) = graph_of(
        partial(jnp.einsum, "bij,bjk->bik"),
        (3, 4, 6),
        (3, 6, 8),
    ).operations()
    assert set(contraction(op).indices) == {
        (0, 0, 0),
        (1, None, 1),
        (None, 2, 2),
        (2, 1, None),
    }


@pytest.mark.parametrize(
    ("sizes", "storage", "moves"),
    [
        (
            (2, 4),
            (0, 0),
            [("all-reduce", 3, 6 * 8 * 4)],
        ),
        (
            (2, 4),
            (0, 3),
            [("reduce-scatter", 3, 6 * 8 * 4)],
        ),
        (
            (2, 4),
            (0, 2),
            [
                ("all-reduce", 1, 6 * 2 * 4),
                (
                    "reduce-scatter",
                    2,
                    6 * 8 * 4,
                ),
            ],
        ),
        (
            (2, 2),
            (1, 2),
            [("reduce-scatter", 3, 6 * 8 * 4)],
        ),
    ],
)
def test_what_two_mesh_axes_sum_is_one_collective_of_the_whole(sizes, storage, moves):
    """A weight's gradient is summed over samples and their sequence.

    Samples are split over axis 0, and their sequence over axis 1.
    """

    def gradient(w, x, g):
        return jnp.einsum("bsd,bsf->df", x, g) + 0 * w

    program = jax.make_jaxpr(gradient)(floats(6, 8), floats(4, 8, 6), floats(4, 8, 8))
    graph = Graph(program, 1, 1)
    (op,) = (op for op in graph.operations() if op.name == "dot_general")
    op.outputs[0].stored = (0, (0, 1))
    samples, steps = (graph.find(n) for n in graph.main.inputs[1].nodes[:2])
    layout = Layout(graph, sizes, {samples: 1, steps: 2}, [storage])

    decision = layout.decide(op, contraction(op))

    assert [(m.kind, m.axes, m.bytes) for m in decision.moves] == moves


def test_the_channels_of_a_grouped_convolution_divide_by_its_groups():
    function = partial(conv, feature_group_count=3)
    graph = graph_of(
        lambda w, x: function(x, w),
        (3, 3, 2, 12),
        (4, 8, 8, 6),
    )
    (channels,) = (
        g
        for g in Names(graph, ["params/kernel", "inputs"]).groups
        if (0, 3) in g.members
    )
    assert channels.divisor == 3, (
        "6 and 12 channels divide by 2 and 6, the groups do not"
    )


def test_every_rule_is_of_a_primitive_that_there_is():
    from jax._src.lax import (
        control_flow,
        convolution,
        slicing,
        special,
        windowed_reductions,
    )
    from jax._src.lax import lax as base

    known = {
        p.name
        for m in (
            base,
            slicing,
            special,
            windowed_reductions,
            convolution,
            control_flow,
        )
        for n, p in vars(m).items()
        if n.endswith("_p")
    } | {"cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"}
    assert {
        "scatter-max",
        "scatter-add",
        "stack",
        "sort",
        "reduce_window_max",
    } <= known & RULES.keys()
    assert {
        name
        for name in RULES
        if name.startswith(("reduce_", "scatter-", "select_and_", "cum", "arg"))
    } <= known


# ---- no assignment changes what is computed ----


def looped(x, w):
    return lax.scan(lambda h, row: (jnp.tanh(h @ w + row), h), x[0], x)[1]


STEPS = {  # (8, 16, 8) and weights (8, 8) to the same
    "dot": lambda x, w: jnp.tanh(x @ w),
    "bias": lambda x, w: x + w[0],
    "softmax": lambda x, w: jax.nn.softmax(x, axis=1) * 4,
    "swap": lambda x, w: x.swapaxes(0, 2),
    "merge": lambda x, w: jnp.sin(x.reshape(128, 8)).reshape(8, 16, 8),
    "regroup": lambda x, w: jnp.cos(x.reshape(4, 32, 8)).reshape(8, 16, 8) + x,
    "flat": lambda x, w: x.reshape(-1)[::-1].reshape(x.shape),
    "attend": lambda x, w: jnp.einsum(
        "bst,btd->bsd",
        jax.nn.softmax(
            jnp.einsum(
                "bsd,btd->bst",
                x @ w,
                x,
            )
        ),
        x,
    ),
    "cumsum": lambda x, w: jnp.cumsum(x, 1) / 8,
    "sort": lambda x, w: jnp.sort(x, 2),
    "halves": lambda x, w: jnp.concatenate(jnp.split(x, 2, 1)[::-1], 1),
    "roll": lambda x, w: jnp.roll(x, 3, 1),
    "stack": lambda x, w: jnp.stack([x, -x], 1).reshape(8, 32, 8)[:, 8:24],
    "pad": lambda x, w: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1],
    "lookup": lambda x, w: x + w[jnp.argmax(x, -1)],
    "along": lambda x, w: jnp.take_along_axis(
        x,
        jnp.argsort(x, 1),
        1,
    ),
    "add rows": lambda x, w: x.at[:, jnp.arange(4) * 3].add(w[:4]),
    "top_k": lambda x, w: x + jnp.pad(lax.top_k(x, 4)[0], ((0, 0), (0, 0), (0, 4))),
    "loop": looped,
    "layers": lambda x, w: lax.scan(lambda x, row: (jnp.tanh(x * row), None), x, w)[0],
    "while": lambda x, w: lax.fori_loop(0, 3, lambda i, x: x * w[i] + x.mean(0), x),
    "cond": lambda x, w: lax.cond(
        w[0, 0] > 0,
        lambda x: jnp.tanh(x @ w),
        lambda x: x,
        x,
    ),
    "pool": lambda x, w: jnp.repeat(
        nnx.max_pool(x, (4,), strides=(4,)),
        4,
        1,
    ),
    "conv": lambda x, w: lax.conv_general_dilated(
        x,
        w[None],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
    ),
    "depthwise": lambda x, w: lax.conv_general_dilated(
        x,
        w[:3, None],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=8,
    ),
    "groups": lambda x, w: lax.conv_general_dilated(
        x,
        w[None, :2],
        (2,),
        ((0, 0),),
        (2,),
        (2,),
        ("NWC", "WIO", "NWC"),
        4,
    ),
    "batch groups": lambda x, w: jnp.tile(
        lax.conv_general_dilated(
            x,
            w[None],
            (1,),
            "SAME",
            batch_group_count=4,
            dimension_numbers=("NWC", "WIO", "NWC"),
        ),
        (4, 1, 1),
    ),
    "remat": jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w.T),
    "own rule": lambda x, w: own_product(x.reshape(128, 8), w).reshape(8, 16, 8),
    "scan sums": lambda x, w: lax.associative_scan(jnp.add, x, axis=1) / 8,
    "vmapped": lambda x, w: jax.vmap(lambda row: own_sine(row @ w))(x),
    "experts": (
        lambda x, w: jnp.einsum("ebd,edf->ebf", x, w[:, :, None] * jnp.ones(8)).reshape(
            8, 16, 8
        )
    ),
    "dropped": lambda x, w: jnp.where(
        jax.random.bernoulli(
            jax.random.key(3),
            0.7,
            x.shape,
        ),
        x,
        0,
    ),
    "cholesky": lambda x, w: x @ jnp.linalg.cholesky(w @ w.T + jnp.eye(8)),
}


def composed(names):
    def value(weights, x):
        for name, w in zip(names, weights, strict=True):
            x = STEPS[name](x, w)
        return (x * jnp.cos(x)).sum(), x

    return jax.grad(value, has_aux=True)


def anyhow(seed, sizes):
    """Return a layout drawn at random.

    Any mesh axes are given to any named axis and to any dim of a stored array, where
    they divide it.
    """

    def layout(graph, paths):
        draw = random.Random(seed)
        counts = Layout(graph, sizes, {}, []).counts
        nodes = {graph.find(node) for value in graph.values for node in value.nodes}
        loops = {graph.find(node) for node in graph.loops}
        uses = {}
        for root in sorted(nodes - loops):
            if draw.random() < 0.6:
                uses[root] = draw.randrange(len(counts))

        storage = []
        for path, value in zip(paths, graph.main.inputs, strict=False):
            if path.startswith("params"):
                dim = draw.randrange(len(value.shape))
                extent = value.shape[dim]
                masks = [m for m, count in enumerate(counts) if extent % count == 0]
                spec = [0] * len(value.shape)
                spec[dim] = draw.choice(masks)
                storage.append(tuple(spec))
        return Layout(graph, sizes, uses, storage, meets_stored(graph))

    return layout


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    names=st.lists(
        st.sampled_from(sorted(STEPS)),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**20),
    sizes=st.sampled_from(
        [
            (8,),
            (2, 4),
            (4, 2),
            (2, 2, 2),
        ]
    ),
)
def test_any_layout_of_any_composition_computes_the_same(names, seed, sizes):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(8, 8)).astype(np.float32) / 3 for _ in names]
    x = rng.normal(size=(8, 16, 8)).astype(np.float32)
    mesh = make_mesh({f"axis{i}": n for i, n in enumerate(sizes)}, jax.devices()[:8])
    function = composed(names)
    split = laid_out(
        function,
        anyhow(seed, sizes),
        mesh,
        ("params", "inputs"),
        gradients=True,
    )

    results = jax.tree.leaves(jax.jit(split)(weights, x))

    # sums run in another order; relative to the largest entry too, for small ones are
    # sums of large ones
    expected = jax.tree.leaves(jax.jit(function)(weights, x))
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(
            ours,
            theirs,
            rtol=1e-5,
            atol=1e-5 * max(1.0, np.abs(theirs).max()),
        )


@pytest.mark.parametrize(
    "split",
    [{1: 1}, {1: 4}, {1: 7}],
    ids=str,
)
def test_dims_that_only_an_operation_makes_are_not_split_within_it(split):
    """XLA pads between the elements of a split dim wrongly.

    jax.lax.associative_scan interleaves its halves so.
    """
    rows = np.random.default_rng(0).normal(size=(4, 32, 8)).astype(np.float32)

    def everywhere(graph):
        uses = {}
        for value in graph.values:
            if len(value.shape) == 3:
                for dim, mask in split.items():
                    uses[graph.find(value.nodes[dim])] = mask
        return uses

    check_split(partial(lax.associative_scan, jnp.add, axis=1), everywhere, rows)


def test_a_lookup_by_split_indices_in_a_split_dim():
    """XLA looks up wrong rows in such a case.

    Indices and rows are split, and the result over the axes of both.
    """
    rows = np.random.default_rng(0).normal(size=(8, 16, 8)).astype(np.float32)
    places = np.arange(4, dtype=np.int32) * 3

    def uses(graph):
        x, indices = graph.main.inputs
        return {graph.find(x.nodes[1]): 1, graph.find(indices.nodes[0]): 5}

    check_split(
        lambda x, i: x[:, i],
        uses,
        rows,
        places,
    )


@pytest.mark.parametrize(
    ("groups", "kernel", "stride"),
    [
        (16, (3, 3, 1, 16), 1),
        (16, (3, 3, 1, 32), 1),
        (8, (3, 3, 2, 24), 1),
        (8, (3, 3, 2, 16), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("split", ["samples", "channels"])
def test_grouped_convolutions_move_nothing_but_gradients(groups, kernel, stride, split):
    """XLA's partitioner alone gathers samples and channels of most of them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 8, 8, 16)).astype(np.float32)
    w = rng.normal(size=kernel).astype(np.float32)

    def squared(w, x):
        y = lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "SAME",
            dimension_numbers=NHWC,
            feature_group_count=groups,
        )
        return (y * y).sum()

    gradients = jax.grad(squared, (0, 1))

    def layout(graph, paths):
        weights, images = graph.main.inputs
        if split == "samples":
            return Layout(graph, (8,), {graph.find(images.nodes[0]): 1}, [(0, 0, 0, 0)])
        return Layout(graph, (8,), {graph.find(weights.nodes[3]): 1}, [(0, 0, 0, 1)])

    mesh = make_mesh({"axis": 8}, jax.devices()[:8])
    function = jax.jit(laid_out(gradients, layout, mesh, ("params", "x")))

    results = function(w, x)

    expected = jax.jit(gradients)(w, x)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    moved = read(function.lower(w, x).compile().as_text()).collectives
    gathered = {"samples": [("all-reduce", w.nbytes)], "channels": []}[split]
    assert [(c.kind, c.bytes) for c in moved if c.bytes > 4] == gathered


def check_split(function, uses, *args):
    mesh = make_mesh({"a": 2, "b": 2, "c": 2}, jax.devices()[:8])

    def layout(graph, paths):
        return Layout(graph, (2, 2, 2), uses(graph), [])

    def without_params(_, *args):
        return function(*args)

    split = laid_out(without_params, layout, mesh, ("params", "x", "i"))

    results = jax.jit(split)((), *args)

    np.testing.assert_allclose(results, function(*args), rtol=1e-5, atol=1e-5)
