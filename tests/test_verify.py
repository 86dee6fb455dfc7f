"""XLA's program of a plan, next to the plan."""

import importlib.util
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

import lepton_jax as lepton
from lepton_jax.errors import PlanError
from lepton_jax.hardware import topology
from lepton_jax.models import LSTM, MoELM, TransformerLM
from lepton_jax.planner import ahead, trace
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.search.build import build, by_hand
from lepton_jax.planner.search.pins import Pins
from lepton_jax.planner.search.problem import Problem
from lepton_jax.verify import comparison as verification
from lepton_jax.verify.comparison import prove, verify
from lepton_jax.verify.expected import Expected
from lepton_jax.verify.hlo import CollectiveFound
from lepton_jax.verify.matching import compare

pytestmark = pytest.mark.usefixtures("quick_compilation")

EIGHT = topology("cpu:8")
MESH = {"fsdp": 4, "tensor": 2}


def language_model(loop="scan", precision="float32", batch_size=32, **fields):
    recipe = lepton.Recipe(
        model=lambda rngs: TransformerLM(
            512, dim=128, layers=2, heads=4, loop=loop, rngs=rngs
        ),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=batch_size,
        precision=precision,
        **fields,
    )
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    return trace(recipe, tokens, tokens)


def planned(traced, where=EIGHT, sizes=(4, 2), remat="none"):
    """Return a plan that keeps weights in parts over the first axis.

    The second axis, if there is one, splits heads, hidden width and vocabulary.
    """
    split = ("key", "up", "embed.0", "head.1") if len(sizes) > 1 else ()
    groups = [g.name for g in Names(traced.gradient(remat), traced.arguments).groups]
    masks = {"batch": 1} | {
        name: 2 for name in groups if any(part in name for part in split)
    }
    problem = Problem(traced, where, "time", Pins())
    assignment = by_hand(traced, sizes, masks, 1, remat)
    return build(
        traced,
        where,
        problem.names(remat),
        assignment,
        estimate=problem.cost(remat).estimate(assignment, causes=True),
        held=problem.memory(remat).predict(assignment),
    )


@pytest.fixture(scope="module")
def traced():
    return language_model()


@pytest.fixture(scope="module")
def plan(traced):
    return planned(traced, remat="full")


@pytest.fixture(scope="module")
def check(traced, plan):
    return verify(traced, plan)


def test_a_plan_that_xla_follows(check):
    assert check.plan.mesh == MESH
    assert check.unexpected == ()
    sent = {axes: (a, b) for axes, a, b in check.totals}
    for row in check.rows:
        sent.setdefault(row.axes, (row.planned, row.found))
    for axes in (("fsdp",), ("tensor",)):
        before, after = sent[axes]
        assert before > 0 and after == pytest.approx(before, rel=0.1), axes
    assert check.found["flops"] == pytest.approx(check.predicted["flops"], rel=0.02)
    assert check.fits
    assert check.memory_error is None
    assert check.found["arguments"] == pytest.approx(
        check.predicted["arguments"], rel=0.02
    )
    assert (
        check.peak
        == check.memory.peak
        == check.found["arguments"] + check.found["temporaries"]
    )


def test_the_text_and_the_record(check):
    text = str(check)
    record = json.loads(json.dumps(check.to_dict()))
    assert "the plan explains all collectives" in text
    assert "fsdp=4 x tensor=2" in text
    assert "+0.0%" in text
    assert record["fits"]
    assert record["unexpected"] == []
    assert record["xla"]["peak"] == check.peak
    assert {tuple(row["axes"]) for row in record["traffic"]} >= {("fsdp",), ("tensor",)}


def test_several_steps_a_call_and_micro_batches_are_those_of_one_step(
    traced, plan, check
):
    several = verify(traced, replace(plan, steps_per_call=plan.steps_per_call % 4 + 2))
    assert several.rows == check.rows
    assert several.flops == check.flops
    parts = verify(traced, replace(plan, micro_batches=2))
    assert parts.flops == check.flops
    assert parts.unexpected == ()
    gathered = [
        sum(r.found for r in c.rows if (r.axes, r.kind) == (("fsdp",), "all-gather"))
        for c in (check, parts)
    ]
    assert gathered[1] == pytest.approx(2 * gathered[0], rel=0.1)  # for each part anew


def test_what_a_weights_gradient_sums_over_two_axes_is_sent_at_once():
    """Samples lie over one axis, their tokens over the other, the state over both."""
    traced = language_model()
    check = verify(
        traced,
        build(
            traced,
            EIGHT,
            Names(traced.gradient("none"), traced.arguments),
            by_hand(traced, (4, 2), {"batch": 1, "inputs.1": 2}, 3),
        ),
    )
    # XLA for CPU sums what it scatters over one axis after the other
    assert all("scatter-add" in u.op_name for u in check.unexpected)
    rows = [
        r
        for r in check.rows
        if r.axes == ("fsdp", "sequence") and r.kind == "all-reduce"
    ]
    planned = sum(r.planned for r in rows)
    embedding = 2 * 7 / 8 * 512 * 128 * 4
    assert sum(r.found for r in rows) == pytest.approx(planned - embedding, rel=0.02)
    assert planned > 5 * embedding


def test_a_recurrent_cell_gathers_nothing_but_its_state():
    """Under a mesh JAX traces a `reshard` for a `jnp.where` in a loop.

    The graph that the planner sees doesn't have it.
    """
    recipe = lepton.Recipe(
        model=lambda rngs: LSTM(512, 8, dim=32, hidden=64, rngs=rngs),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=32,
    )
    traced = trace(
        recipe,
        jax.ShapeDtypeStruct((1, 12), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    check = verify(
        traced,
        build(
            traced,
            EIGHT,
            Names(traced.gradient("none"), traced.arguments),
            by_hand(traced, (8,), {"out.0": 1}, 0),
        ),
    )
    (gathered,) = (row for row in check.rows if row.kind == "all-gather")
    assert check.unexpected == ()
    assert (gathered.found, gathered.found_count) == (
        gathered.planned,
        gathered.planned_count,
    )


def test_a_step_without_the_constraints_is_told_line_by_line(traced, plan, monkeypatch):
    monkeypatch.setattr(
        "lepton_jax.train.program.laid_out", lambda function, *args, **options: function
    )
    broken = verify(traced, plan)
    assert broken.unexpected
    assert list(broken.unexpected) == sorted(broken.unexpected, key=lambda u: -u.excess)
    first = broken.unexpected[0]
    assert first.where.rpartition(":")[0].endswith("models/transformer.py")
    assert first.bytes >= first.excess > 0
    assert 0.01 < first.share < 1
    assert first.count >= 1
    assert set(first.axes) <= set(MESH)
    assert first.where in str(broken)


def test_bfloat16_on_a_cpu_is_sent_as_float32():
    traced = language_model(precision="bfloat16")
    check = verify(traced, planned(traced, sizes=(8,)))
    assert check.unexpected == ()
    assert any("16-bit" in note for note in check.notes)


# ---- matching, without a compiler ----


FSDP = ((0, 2, 4, 6), (1, 3, 5, 7))
TENSOR = ((0, 1), (2, 3), (4, 5), (6, 7))


def collective(kind, size, groups, times=1, line=1, **fields):
    return CollectiveFound(
        kind, size, groups, times, "jit(step)/dot_general", "model.py", line, **fields
    )


def move(kind, axes, sent, line=1, count=1):
    return Expected(f"model.py:{line}", kind, axes, count, sent)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    moves = [
        move("reduce-scatter", ("fsdp",), 750),
        move("all-gather", ("fsdp",), 750, line=2),
    ]
    assert compare(moves, [collective("all-reduce", 1000, FSDP)], MESH)[1] == ()


def test_a_reduce_scatter_that_was_not_formed():
    moves = [move("reduce-scatter", ("fsdp",), 750)]
    (item,) = compare(moves, [collective("all-reduce", 1000, FSDP, sliced=True)], MESH)[
        1
    ]
    assert item.excess == 750
    assert item.share == 1.0
    assert "did not form" in item.why


def test_several_joined_under_one_line_are_expected():
    moves = [move("all-gather", ("fsdp",), 750, line=n) for n in range(4)]
    assert compare(moves, [collective("all-gather", 4000, FSDP, line=2)], MESH)[1] == ()


def test_a_gather_decomposed_into_a_ring_is_expected():
    ring = tuple((i, (i + 2) % 8) for i in range(8))
    pieces = collective("collective-permute", 250, ring, times=5, windowed=True)
    rows, unexpected, absent = compare(
        [move("all-gather", ("fsdp",), 750)], [pieces], MESH
    )
    assert unexpected == absent == ()
    assert sum(r.found for r in rows) == pytest.approx(750, rel=0.15)


def test_an_axis_over_which_nothing_is_planned():
    moves = [move("all-gather", ("fsdp",), 750)]
    rows, (item,), _ = compare(
        moves,
        [
            collective("all-gather", 1000, FSDP),
            collective("all-reduce", 100, TENSOR, 3, line=7),
        ],
        MESH,
    )
    assert item.axes == ("tensor",)
    assert item.where == "model.py:7"
    assert item.count == 3
    assert "nothing is planned" in item.why
    assert [r.axes for r in rows] == [("fsdp",), ("tensor",)]


def test_what_is_planned_in_a_loop_and_compiled_outside_of_it_is_named():
    moves = [
        move("all-gather", ("fsdp",), 64 * 750, line=3, count=64),
        move("all-reduce", ("tensor",), 1000),
    ]
    found = [
        collective("all-gather", 1000, FSDP, line=3),
        collective("all-reduce", 1000, TENSOR),
    ]
    rows, unexpected, absent = compare(moves, found, MESH)
    assert unexpected == ()
    (item,) = absent
    assert (item.where, item.count) == ("model.py:3", 64)
    assert item.missing == 63 * 750
    assert item.share == pytest.approx(63 * 750 / (64 * 750 + 1000))
    gathers = {row.inside: row for row in rows if row.kind == "all-gather"}
    assert gathers[True].found == 0
    assert gathers[False].planned == 0


def test_a_plan_whose_collectives_xla_does_not_run_differs_from_its_program(check):
    doubled = [
        replace(row, planned_seconds=row.planned_seconds + check.plan.step_seconds)
        for row in check.rows
    ]
    assert check.agrees
    different = replace(check, rows=tuple(doubled))
    assert not different.agrees
    assert "DIFFER" in str(different)
    assert not different.to_dict()["agrees"]


def test_small_collectives_in_large_numbers_have_weight_by_their_seconds():
    """Each costs its latency, however few bytes it sends."""
    moves = [move("all-reduce", ("fsdp",), 2048 * 15, count=2048)]
    found = [collective("all-reduce", 10, FSDP)]

    def seconds(kind, axes, buffer):
        return 1e-5 + buffer / 1e9

    rows, _, _ = compare(moves, found, MESH, seconds)
    planned = sum(row.planned_seconds for row in rows)
    compiled = sum(row.found_seconds for row in rows)
    assert planned == pytest.approx(2048 * 1e-5, rel=0.01)
    assert compiled == pytest.approx(1e-5, rel=0.01)


def test_groups_that_are_no_axes():
    (item,) = compare(
        [move("all-gather", ("fsdp",), 750)],
        [collective("all-reduce", 5000, ((0, 1, 2), (3, 4, 5, 6, 7)))],
        MESH,
    )[1]
    assert item.axes == ()
    assert "no product" in item.why


def test_too_much_over_an_axis_names_the_lines_that_are_not_planned():
    moves = [move("all-gather", ("fsdp",), 750, line=1)]
    known = collective("all-gather", 1000, FSDP, line=1)
    more = collective("all-gather", 900, FSDP, line=2)
    (item,) = compare(moves, [more, known], MESH)[1]
    assert item.where == "model.py:2"
    assert item.excess == 675
    # a quarter may come on top
    assert (
        compare(moves, [collective("all-gather", 200, FSDP, line=2), known], MESH)[1]
        == ()
    )


# ---- proving ----


def too_large(needed):
    error = ahead.TooLarge(
        "XLA refuses the program", where="device memory", remedy="shard more"
    )
    error.needed = needed
    return error


def test_a_candidate_that_does_not_fit_is_passed_over(traced, monkeypatch):
    fast, lean = (
        replace(planned(traced, sizes=(8,), remat=remat), memory=int(12e6))
        for remat in ("none", "full")
    )
    monkeypatch.setattr(
        verification, "candidates", lambda *args, **options: [fast, lean]
    )
    chosen, (first, second) = prove(traced, EIGHT, 2, whole=True)
    assert chosen.remat == "full"
    assert not first.fits
    assert second.fits
    assert second.plan == chosen
    proven, passed = chosen.notes[-2:]
    assert proven.startswith("proven: XLA's peak is")
    assert proven.endswith("MiB of 11.4 MiB")
    assert passed.startswith("passed over: FSDP (mesh fsdp=8, remat none) needs")


def test_a_candidate_that_xla_refuses_is_passed_over(traced, monkeypatch):
    fast = planned(traced, sizes=(8,))
    lean = planned(traced, sizes=(8,), remat="full")
    refused = too_large(33.5 * 2**30)
    compile_for = ahead.compile_for
    answers = iter([refused, None])

    def refusing(lowered):
        if answer := next(answers):
            raise answer
        return compile_for(lowered)

    monkeypatch.setattr(ahead, "compile_for", refusing)
    monkeypatch.setattr(
        verification, "candidates", lambda *args, **options: [fast, lean]
    )
    chosen, (first, second) = prove(traced, EIGHT, 2, whole=True)
    assert chosen.remat == "full"
    assert second.fits
    assert not first.fits
    assert first.peak == refused.needed
    assert "33.5 GiB" in chosen.notes[-1]
    assert "does not fit" in str(first)
    assert first.to_dict()["memory_error"]


def test_nothing_fits(traced, monkeypatch):
    def refusing(lowered):
        raise too_large(33.5 * 2**30)

    monkeypatch.setattr(ahead, "compile_for", refusing)
    monkeypatch.setattr(
        verification,
        "candidates",
        lambda *args, **options: [planned(traced, sizes=(8,))],
    )
    with pytest.raises(PlanError, match="none of the 1 best plans fits") as error:
        prove(traced, EIGHT, 1, whole=True)
    assert "33.5 GiB of 1" in error.value.what
    assert "micro_batches" in error.value.remedy


def test_a_recipe_without_data_has_no_step():
    recipe = lepton.Recipe(
        model=lambda rngs: TransformerLM(64, dim=32, layers=1, heads=2, rngs=rngs),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=8,
    )
    with pytest.raises(PlanError, match="no batch"):
        verify(trace(recipe, None, None), None)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiles for a TPU that is not there",
)


@needs_libtpu
def test_a_plan_for_tpus_that_are_not_there():
    traced = language_model(precision="bfloat16")
    where = topology("v5e:2x2")
    check = verify(traced, planned(traced, where, sizes=(4,)))
    assert check.fits
    assert check.peak < check.plan.memory
    assert check.flops == pytest.approx(check.predicted["flops"], rel=0.02)
    assert {row.axes for row in check.rows if row.found} == {("fsdp",)}


def mixture_traffic(where):
    """Return (count, bytes) of all-to-alls, planned and compiled, of a mixture."""
    recipe = lepton.Recipe(
        model=lambda rngs: MoELM(64, dim=64, layers=1, heads=2, rngs=rngs),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=8,
    )
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    traced = trace(recipe, tokens, tokens)
    plan = lepton.plan(traced, topology(where), mesh={"expert": 4}, remat="none")
    check = verify(traced, plan)
    (row,) = (row for row in check.rows if row.kind == "all-to-all")
    assert not check.unexpected and not check.absent
    return (row.planned_count, row.planned), (row.found_count, row.found)


@needs_libtpu
def test_a_mixture_sends_what_both_passes_read_once_on_a_tpu_and_rounds_it():
    planned, compiled = mixture_traffic("v5e:2x2")
    assert planned == compiled
    assert planned[0] == 4


def test_a_mixture_sends_what_both_passes_read_twice_on_a_cpu():
    planned, compiled = mixture_traffic("cpu:4")
    assert planned == compiled
    assert planned[0] == 5
