"""Predicted memory against XLA's account, and what makes it usable in a search."""

import json
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.errors import PlanError
from lepton_jax.hardware import topology
from lepton_jax.planner import ahead, trace
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate.memory import (
    Around,
    Timeline,
    describe,
    peak,
    predict,
    windowed,
)
from lepton_jax.planner.estimate.sizes import Place, Sizes, _never_minor, tiling
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.search.bounds import bounds
from lepton_jax.planner.search.build import fixed
from lepton_jax.planner.search.limits import SURETY, Surety
from lepton_jax.planner.xla import heap
from lepton_jax.train.program import Program

TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)
LABEL = jax.ShapeDtypeStruct((1,), jnp.int32)


def language(batch_size=64, **more):
    model = partial(models.TransformerLM, 1024, dim=128, layers=3, heads=4, **more)
    return lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=batch_size,
        steps_per_call=1,
    )


def perceptron(batch_size=4096):
    return lepton.Recipe(
        model=partial(models.MLP, (256, 1024, 1024, 10)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=batch_size,
        steps_per_call=1,
    )


CASES = {
    "mlp": (perceptron, jax.ShapeDtypeStruct((1, 256), jnp.float32), LABEL),
    "lm": (language, TOKENS, TOKENS),
    "lm-scan": (partial(language, loop="scan"), TOKENS, TOKENS),
}


def assigned(traced, keep, sizes=(8,), remat="none", micro_batches=1):
    names = Names(traced.gradient(remat), traced.arguments)
    masks = tuple(1 if k == names.batch else 0 for k in range(len(names.groups)))
    return names, Assignment(sizes, masks, keep, remat, micro_batches)


def both(traced, where, keep, **more):
    """Return the predicted bytes by kind, and XLA's account."""
    names, assignment = assigned(traced, keep, **more)
    predicted, _ = predict(traced, names, assignment, where)
    plan = fixed(traced, where, assignment)
    devices = ahead.mesh_devices(
        where, plan.mesh, ahead.devices_for(where)[: where.devices]
    )
    return predicted, ahead.compile_for(Program(traced, plan, devices).lower())[1]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_prediction_is_what_xla_reports(name, keep):
    recipe, inputs, targets = CASES[name]
    predicted, memory = both(trace(recipe(), inputs, targets), topology("cpu:8"), keep)
    held = sum(
        predicted[kind]
        for kind in ("params", "optimizer", "variables", "batch", "data")
    )
    assert held == pytest.approx(memory.arguments, rel=1e-3), (
        "arguments are known, not predicted"
    )
    assert sum(predicted.values()) == pytest.approx(memory.peak, rel=0.15)


def test_prediction_of_straight_code_that_is_computed_again():
    predicted, memory = both(
        trace(language(), TOKENS, TOKENS), topology("cpu:8"), 1, remat="full"
    )
    assert sum(predicted.values()) == pytest.approx(memory.peak, rel=0.15)


def test_micro_batches_share_the_activations():
    traced = trace(perceptron(65_536), *CASES["mlp"][1:])
    once, four = (both(traced, topology("cpu:8"), 0, micro_batches=n) for n in (1, 4))
    assert sum(four[0].values()) == pytest.approx(four[1].peak, rel=0.15)
    assert sum(four[0].values()) < sum(once[0].values())
    assert four[1].peak < once[1].peak
    assert four[0]["gradients"] > once[0]["gradients"], "their sums lie beside them"


def test_rematerialization_of_a_loop_keeps_less():
    traced = trace(language(8192, loop="scan"), TOKENS, TOKENS)
    totals = {}
    for remat in ("none", "dots", "full"):
        names, assignment = assigned(traced, 1, remat=remat)
        for where in ("v5p:2x2x2", "cpu:8"):
            totals[where, remat] = sum(
                predict(traced, names, assignment, topology(where))[0].values()
            )
    assert (
        totals["v5p:2x2x2", "none"]
        > totals["v5p:2x2x2", "dots"]
        > totals["v5p:2x2x2", "full"]
    )
    assert totals["cpu:8", "none"] > totals["cpu:8", "full"]


def test_the_largest_values_name_their_line():
    traced = trace(language(), TOKENS, TOKENS)
    names, assignment = assigned(traced, 0)
    predicted, largest = predict(traced, names, assignment, topology("cpu:8"))
    sizes = [size for size, _ in largest]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < sum(predicted.values())
    assert any("transformer.py:" in text for _, text in largest)


def test_one_buffer_of_a_chain_is_alive_at_a_time():
    """Elementwise operations write nothing, and what was read is given up."""
    model = partial(models.MLP, (64, 64, 64, 64, 4))
    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=64,
    )
    traced = trace(recipe, jax.ShapeDtypeStruct((1, 64), jnp.float32), LABEL)
    graph = traced.gradient("none")
    timeline = Timeline(graph, "gpu")
    assert len(timeline.values) < len(graph.values) / 2
    assert (timeline.ends >= timeline.starts).all()
    ones = np.full(len(graph.values), 1.0)
    top = peak(timeline, ones, ones)
    assert (
        top.bytes == top.each[top.alive].sum() or top.bytes == timeline.gradients.sum()
    )
    assert describe(timeline, int(np.flatnonzero(top.alive)[0])).startswith(
        ("float32", "int32", "bool")
    )


def buffers(timeline, *shape):
    """Buffers that anything makes of values of this shape."""
    return [
        b
        for b in range(len(timeline.values))
        if timeline.made[b] and timeline.value(b).shape == shape
    ]


def test_stacks_that_lie_in_other_tiles_are_two_on_tpu():
    """What comes out of attention: heads, and the same numbers as one row a token."""

    def loss(w, x):
        def layer(x, w):
            heads = jnp.tanh(x @ w).reshape(32, 4, 16)
            rows = heads.reshape(32, 64)
            return rows, (heads, rows)

        x, (heads, rows) = jax.lax.scan(layer, x, w)
        return x.sum() + jnp.sin(heads).sum() + jnp.cos(rows).sum()

    w, x = jnp.ones((7, 64, 64)), jnp.ones((32, 64))
    graph = Graph(jax.make_jaxpr(loss)(w, x), parameters=1)

    def stacks(platform):
        timeline = Timeline(graph, platform)
        shapes = ((7, 32, 4, 16), (7, 32, 64))
        return len({b for shape in shapes for b in buffers(timeline, *shape)})

    assert stacks("tpu") == 2
    assert stacks("gpu") == 1


def test_a_product_on_tpu_writes_what_its_end_computes():
    """The masked gradient behind a relu is written instead of the product.

    The relu itself is computed where it is read.
    """
    recipe = lepton.Recipe(
        model=partial(models.MLP, (256, 512, 10)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=64,
    )
    traced = trace(recipe, jax.ShapeDtypeStruct((1, 256), jnp.float32), LABEL)
    timeline = Timeline(traced.gradient("none"), "tpu")
    names, assignment = assigned(traced, 0)
    top = peak(timeline, *Sizes(names.graph, names).bytes(assignment))
    makers = [timeline.owners[b] for b in buffers(timeline, 64, 512) if top.each[b]]
    assert [op and op.name for op in makers] == ["dot_general", "select_n"]


def test_a_loop_keeps_one_stack_of_what_is_the_same():
    def loss(params, xs):
        def step(carry, x):
            carry = jnp.tanh(carry @ params)
            return carry, (carry * 2, carry * 2, x.sum())

        carry, (one, two, _) = jax.lax.scan(step, xs[0], xs)
        return (one * two).sum() + carry.sum()

    shapes = (
        jax.ShapeDtypeStruct((64, 64), jnp.float32),
        jax.ShapeDtypeStruct((7, 32, 64), jnp.float32),
    )
    graph = Graph(jax.make_jaxpr(loss)(*shapes), 1, 0)
    assert len(buffers(Timeline(graph, "tpu"), 7, 32, 64)) == 1


@pytest.mark.parametrize(
    "optimizer, arrays", [(optax.sgd(1e-3), 1), (optax.adam(1e-3), 3)]
)
def test_narrow_rows_are_copied_with_all_that_the_optimizer_keeps_of_them(
    optimizer, arrays
):
    recipe = lepton.Recipe(
        model=partial(models.TwoTower, 4096, 1024, dim=32, hidden=(64,)),
        loss=lepton.losses.squared_error,
        optimizer=optimizer,
        batch_size=64,
    )
    traced = trace(
        recipe, {"user": LABEL, "item": LABEL}, jax.ShapeDtypeStruct((1,), jnp.float32)
    )
    names, assignment = assigned(traced, 0)
    timeline = Timeline(names.graph, "tpu")
    sizes = Sizes(names.graph, names)
    top = peak(timeline, *sizes.bytes(assignment), moments=sizes.moments(traced))
    held = sorted(
        top.each[b] for b in timeline.tables if timeline.value(b).shape[-1] == 32
    )
    assert held == [1024 * 128 * 4 * arrays, 4096 * 128 * 4 * arrays], (
        "rows are as wide as the vector"
    )


def test_kernels_are_made_ready_before_a_loop_over_micro_batches():
    traced = trace(perceptron(65_536), *CASES["mlp"][1:])
    timeline = Timeline(traced.gradient("none"), "cpu")
    names, assignment = assigned(traced, 1)
    bytes_ = Sizes(names.graph, names).bytes(assignment)
    kernels = [b for b in buffers(timeline, 1024, 1024) if timeline.hoisted[b]]
    assert kernels, "gathered parameters"
    inside = peak(timeline, *bytes_, around=Around(1.0))
    alone = peak(timeline, *bytes_)
    assert inside.alive[kernels].all()
    assert inside.bytes >= alone.bytes


def wide_perceptron():
    model = partial(models.MLP, (256, 512, 512, 512, 10))
    return trace(
        lepton.Recipe(
            model=model,
            loss=lepton.losses.cross_entropy,
            optimizer=optax.sgd(0.1),
            batch_size=65_536,
        ),
        *CASES["mlp"][1:],
    )


def test_gradients_that_are_summed_in_a_loop_wait_for_the_chain():
    """The chain is the backward pass from layer to layer.

    libtpu computes these gradients behind it, and keeps what they need until then.
    """
    graph = wide_perceptron().gradient("none")
    plain = Timeline(graph, "tpu", eager=True)
    waits = plain.variant(windowed=True, eager=True)
    for timeline in (plain, waits):
        summed = np.isin(timeline.product_values[:, 2], timeline.kernel_products[:, 2])
        assert summed.sum() == 4
        chain = timeline.product_moments[~summed].max()
        assert (timeline.product_moments[summed] > chain).all() == (timeline is waits)
    kept = [
        sum(t.ends[b] - t.starts[b] for b in buffers(t, 65_536, 512)) / t.length
        for t in (plain, waits)
    ]
    assert kept[1] > kept[0]
    assert waits.variant(False, True) is not waits
    assert plain.variant(True, True) is waits


@pytest.mark.parametrize(
    "shares, batch_size, expected",
    [(8, 65_536, True), (4, 65_536, False), (64, 1_048_576, False), (8, 4096, False)],
)
def test_products_over_few_rows_or_devices_are_summed_afterwards(
    shares, batch_size, expected
):
    recipe = lepton.Recipe(
        model=partial(models.MLP, (256, 512, 512, 10)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=batch_size,
    )
    traced = trace(recipe, *CASES["mlp"][1:])
    names, assignment = assigned(traced, 1, sizes=(shares,))
    timeline = Timeline(names.graph, "tpu")
    used = Sizes(names.graph, names).bytes(assignment)[1]
    assert windowed(timeline, names, assignment, used) == expected


def test_the_head_is_made_ready_before_a_loop_over_micro_batches_on_tpu():
    timeline = Timeline(
        trace(language(loop="scan"), TOKENS, TOKENS).gradient("none"), "tpu"
    )
    ready = [timeline.value(b).shape for b in np.flatnonzero(timeline.hoisted)]
    assert (128, 1024) in ready, "the head, which no loop over layers slices"
    assert all(len(shape) == 2 for shape in ready)


def test_what_waits_long_has_no_room_beside_the_memory():
    """An activation of the forward pass gives way to a fetch for the next product."""
    traced = wide_perceptron()
    names, assignment = assigned(traced, 1)
    timeline = Timeline(names.graph, "tpu").variant(True, True)
    stored, computed = Sizes(names.graph, names).bytes(assignment)
    chip = topology("v5p:2x2x2").chip
    peaks = [
        peak(timeline, stored, computed, room, chip=chip).bytes
        for room in (0.0, 48 * 2.0**20, 2.0**40)
    ]
    assert peaks[0] > peaks[1] > peaks[2]


def test_the_order_of_the_program_leaves_gaps_that_the_order_of_size_does_not():
    starts = np.array([0, 0, 2])
    ends = np.array([1, 9, 9])
    sizes = np.array([2.0, 1.0, 3.0])
    assert heap.packed("tpu", starts, ends, sizes) == 6.0
    assert heap.packed("cpu", starts, ends, sizes) == 4.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(0, 9)),
        max_size=30,
    ),
    st.sampled_from(["tpu", "cpu", "gpu"]),
)
def test_a_heap_holds_what_is_alive_and_no_more_than_all(spans, platform):
    starts, lasts, sizes = (np.array([s[i] for s in spans], np.int64) for i in range(3))
    need = heap.packed(platform, starts, starts + lasts, sizes.astype(float))
    alive = (
        heap.alive(starts, starts + lasts, sizes.astype(float)).max() if spans else 0.0
    )
    assert alive <= need <= sizes.sum()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20), st.integers(0, 8), st.integers(0, 70), st.integers(0, 3)
        ),
        max_size=20,
    )
)
def test_the_memory_beside_is_never_overfull(spans):
    starts, lasts, sizes, rank = (
        np.array([s[i] for s in spans], np.int64) for i in range(4)
    )
    chosen = heap.in_vector_memory(
        starts, starts + lasts, sizes.astype(float), 64.0, rank
    )
    assert (
        heap.alive(
            starts, starts + lasts, np.where(chosen, sizes, 0).astype(float)
        ).max()
        <= 64
        if spans
        else True
    )
    assert not chosen[sizes > 64].any()


def test_the_memory_beside_is_for_what_is_read_soon():
    starts = np.array([0, 4])
    ends = np.array([9, 5])
    sizes = np.array([60.0, 50.0])
    assert heap.in_vector_memory(
        starts, ends, sizes, 100.0, np.array([3, 0])
    ).tolist() == [False, True]
    assert heap.in_vector_memory(
        starts, ends, sizes, 100.0, np.array([0, 0])
    ).tolist() == [True, False]


@pytest.mark.parametrize(
    "shape, times",
    [
        ((1024, 1024), 1.0),
        ((8, 64), 128 / 64),
        ((2048, 10), 16 / 10),
        ((12, 12, 768), 16 / 12),
        ((4, 512), 1.0),
        ((1, 1), 1.0),
    ],
)
def test_tiles(shape, times):
    array = np.array([shape], float)
    assert tiling(array, np.zeros(array.shape))[0] == pytest.approx(times)


def test_tiles_of_images_lie_along_batch_and_channels():
    image = np.array([[32.0, 96.0, 96.0, 64.0]])
    inner = np.array([[Place.LATE, Place.NEVER, Place.NEVER, Place.LATE]])
    assert tiling(image, inner)[0] == 2.0
    assert tiling(image, np.zeros((1, 4)))[0] < 2.0


def test_an_early_dim_lies_along_the_lanes_only_if_it_fills_them():
    places = np.array([[Place.EARLY, Place.LATE, Place.LATE]] * 2)
    shapes = np.array([[3547.0, 192.0, 320.0], [3584.0, 192.0, 320.0]])
    assert tiling(shapes, places).tolist() == [1.2, 1.0]


def test_a_prediction_is_cheap():
    traced = trace(language(), TOKENS, TOKENS)
    names, assignment = assigned(traced, 1)
    timeline = Timeline(names.graph, "tpu")
    sizes = Sizes(names.graph, names)
    ask = partial(
        predict,
        traced,
        names,
        assignment,
        topology("v5p:2x2x2"),
        timeline=timeline,
        sizes=sizes,
    )
    ask()
    start = time.process_time()
    for _ in range(20):
        ask()
    assert (time.process_time() - start) / 20 < 0.03, "a search asks thousands of times"


# ---- bounds ----


def test_the_exact_part_of_a_peak_is_not_widened():
    surety = Surety(0.8, 1.5, 100.0)
    held = {"params": 10_000, "batch": 500, "activations": 1000}
    assert bounds(held, surety) == (10_500 + 700, 10_500 + 1600)
    assert bounds({"params": 10_000}, surety) == (10_000, 10_100)


@pytest.mark.parametrize("platform", SURETY)
def test_a_peak_lies_between_its_bounds(platform):
    held = {"params": 2**30, "temporaries": 2**30}
    for surety in SURETY[platform].values():
        least, most = bounds(held, surety)
        assert 2**30 <= least <= 2**31 <= most


def planned(memory):
    """Return the plan of a small network for a device with this much memory."""
    where = topology("v5p:2x2x1")
    chip = replace(where.chip, memory=memory)
    traced = trace(perceptron(65_536), *CASES["mlp"][1:])
    return lepton.plan(traced, replace(where, chip=chip), remat="none", micro_batches=1)


def test_a_plan_that_fits_by_its_peak_alone_says_so():
    plan = planned(16e9)
    assert plan.fits == "yes"
    assert plan.peak_least <= plan.peak <= plan.peak_bound

    tight = planned((plan.peak + plan.peak_bound) / 2)
    assert tight.fits == "may not"
    assert any("it may not fit" in note for note in tight.notes)
    assert "may not fit" in str(tight)

    with pytest.raises(PlanError, match="nothing fits"):
        planned(plan.peak / 2)


def test_a_measured_peak_takes_the_place_of_the_predicted_one():
    plan = planned(16e9)
    state = plan.bytes_per_device["params"]
    found = plan.with_measured(2 * state + 1e9, 2 * state + 2e9, "a probe")
    assert (
        found.peak == sum(found.bytes_per_device.values()) == 2 * state + 1_000_000_000
    )
    assert found.bytes_per_device["params"] == state, "what is exact stays"
    assert found.peak_bound == 2 * state + 2_000_000_000
    assert "by a probe" in str(found).replace("\n  ", " ")
    assert plan.with_measured(17e9, 18e9, "a probe").fits == "no"


def test_a_plan_of_before_the_bounds_loads_and_is_not_said_to_fit():
    plan = planned(16e9)
    assert lepton.Plan.from_json(plan.to_json()) == plan
    saved = json.loads(plan.to_json())
    for name in ("peak_least", "peak_bound", "peak_source"):
        del saved[name]
    old = lepton.Plan.from_json(json.dumps(saved))
    assert old.peak == plan.peak
    assert old.fits == "may not"


# ---- what XLA writes ----


def test_dims_that_both_operands_of_a_product_share_are_not_tiled():
    def loss(w, x):
        z = jnp.tanh(x @ w)
        return jnp.einsum("bnd,bmd->bnm", z, z).sum()

    shapes = (
        jax.ShapeDtypeStruct((16, 16), jnp.float32),
        jax.ShapeDtypeStruct((1024, 13, 16), jnp.float32),
    )
    graph = Graph(jax.make_jaxpr(loss)(*shapes), 1, 0)
    product = next(v for v in graph.values if v.shape == (1024, 13, 13))
    assert _never_minor(graph)[product.index] == {0}


@pytest.mark.parametrize(("samples", "waits"), [(1, True), (2, False)])
def test_logits_of_a_single_sample_are_looked_up_at_the_end(samples, waits):
    """All through the backward pass libtpu keeps them, in float32."""
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    traced = trace(language(samples), tokens, tokens).on(topology("v5e:2x2"))
    names = Names(traced.gradient("none"), traced.arguments)
    timeline = Timeline(names.graph, "tpu").variant(False, True, samples == 1)

    logits = buffers(timeline, samples, 512, 1024)

    lasts = timeline.ends[logits].max()
    first_layer = buffers(timeline, samples, 512, 128)[0]
    assert (lasts > timeline.ends[first_layer]) == waits


@pytest.mark.parametrize("policy", ["none", "keep attention"])
@pytest.mark.parametrize(("head", "times"), [(64, 2), (32, 4), (128, 1)])
def test_arrays_of_a_kernel_lie_in_rows_of_one_head(head, times, policy):
    """Such a row takes all lanes; values lie as the product has them."""
    recipe = language(4).with_(
        model=partial(
            models.TransformerLM, 1024, dim=4 * head, layers=3, heads=4, loop="scan"
        )
    )
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    traced = trace(recipe, tokens, tokens).on(topology("v5e:2x2"))
    names = Names(traced.gradient(policy), traced.arguments)
    sizes = Sizes(names.graph, names)
    alone = Assignment((1,), (0,) * len(names.groups), keep=0)

    (plain, _), (tiled, _) = (sizes.bytes(alone, tiles) for tiles in (False, True))

    stacks = [
        value.index
        for op in names.graph.main.operations
        if op.name == "scan"
        for value in op.outputs
        if value.shape == (3, 4, 512, 4, head)
    ]
    taken = sorted(tiled[stacks] / plain[stacks])
    if policy == "none":
        assert taken == [1, *3 * [times]], "values; queries, keys and what comes out"
    else:
        assert taken == [times], "what comes out"


def test_strided_slices_are_kernels_of_their_own_on_tpu_alone():
    def loss(w, x):
        h = x * w
        return (jnp.tanh(h[:, ::2]) * h[:, 1::2]).sum()

    shapes = (
        jax.ShapeDtypeStruct((64,), jnp.float32),
        jax.ShapeDtypeStruct((32, 64), jnp.float32),
    )
    graph = Graph(jax.make_jaxpr(loss)(*shapes), 1, 0)
    assert len(buffers(Timeline(graph, "tpu"), 32, 32)) == 2
    assert len(buffers(Timeline(graph, "gpu"), 32, 32)) == 0


def test_what_is_computed_again_is_a_reader_of_what_was_computed_first():
    def loss(w, x):
        h = jnp.tanh(x @ w)
        return (h.sum() * jnp.tanh(x @ w)).sum()

    shapes = (
        jax.ShapeDtypeStruct((16, 16), jnp.float32),
        jax.ShapeDtypeStruct((8, 16), jnp.float32),
    )
    graph = Graph(jax.make_jaxpr(loss)(*shapes), 1, 0)
    timeline = Timeline(graph, "gpu")
    names = [timeline.owners[b].name for b in buffers(timeline, 8, 16)]
    assert names.count("tanh") == 1
    assert names.count("dot_general") == 1


def test_a_kernel_that_may_be_updated_while_it_is_read_is_copied_on_cpus():
    """No devices sum gradients here, so an update waits for its own gradient alone."""
    where = topology("cpu:3")
    model = partial(models.MLP, (48, 768, 768, 6))
    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=32,
        steps_per_call=1,
    )
    traced = trace(recipe, jax.ShapeDtypeStruct((1, 48), jnp.float32), LABEL)
    names = Names(traced.gradient("none"), traced.arguments)
    nothing = Assignment((3,), (0,) * len(names.groups), 0, "none", 1)
    predicted, _ = predict(traced, names, nothing, where)
    plan = fixed(traced, where, nothing)
    devices = ahead.mesh_devices(where, plan.mesh, ahead.devices_for(where))
    _, memory = ahead.compile_for(Program(traced, plan, devices).lower())
    assert sum(predicted.values()) == pytest.approx(memory.peak, rel=0.1)
    assert memory.temporaries > 768 * 768 * 4, "the copy"
