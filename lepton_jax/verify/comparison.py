"""A plan against XLA: the train step compiled ahead of time; what it holds, computes
and sends beside the prediction.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology, topology
from lepton_jax.planner import Plan, Trace, ahead, candidates
from lepton_jax.planner.estimate.cost import as_compiled, summed
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.program.graph import Operation
from lepton_jax.planner.program.layout import Move, contraction, itemsize
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.show.rows import meshed
from lepton_jax.planner.show.text import grid
from lepton_jax.planner.show.words import si
from lepton_jax.train.program import Program
from lepton_jax.verify import hlo
from lepton_jax.verify.hlo import CollectiveFound
from lepton_jax.verify.hlo_text import of_a_library

# kinds of a plan's bytes that are there before a step
ARGUMENTS = ("params", "optimizer", "variables", "batch", "data")
SLACK = 0.25  # of the traffic planned over some axes may come on top without a word
SMALL = 0.005  # of a step's traffic: what is less is not worth a word
SHOWN = 12  # unexpected contributions in the text


@dataclass(frozen=True)
class Row:
    """Traffic of one kind over the same mesh axes in one step: collectives, and bytes
    that a device sends, as rings.
    """

    axes: tuple[str, ...]
    kind: str
    planned: float
    planned_count: int
    found: float
    found_count: int


@dataclass(frozen=True)
class Unexpected:
    """Collectives of the compiled step that the plan doesn't explain.

    Attributes:
      where: "file:line" of the user's code; empty if XLA does not tell.
      kind, axes: as in `CollectiveFound`; no axes if the groups are no product of them.
      count: how many a step runs.
      bytes: of all of them, sent by a device in one step.
      excess: of these, those beyond the plan.
      share: of the step's traffic that `bytes` is.
      op_name: JAX's name stack.
      why: what differs from the plan.
    """

    where: str
    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    excess: float
    share: float
    op_name: str
    why: str


@dataclass(frozen=True)
class Verification:
    """What a plan predicts of its train step and what XLA made of it, on one device.

    Attributes:
      plan: that was compiled.
      memory: XLA's account; None if it refuses the program.
      memory_error: why it refuses.
      flops: of dots and convolutions of a step, loops multiplied out.
      rows: traffic by axes and kind, the largest first.
      unexpected: the largest first.
      seconds: that compiling took.
      notes: what limits these figures.
    """

    plan: Plan
    memory: ahead.Memory | None
    memory_error: ahead.TooLarge | None
    flops: float
    rows: tuple[Row, ...]
    unexpected: tuple[Unexpected, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> float | None:
        """Bytes by XLA's account; of a program that it refuses as far as its message
        tells.
        """
        if self.memory is None:
            return self.memory_error.needed if self.memory_error else None
        return self.memory.peak

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.peak <= self.plan.memory

    @property
    def predicted(self) -> dict[str, float]:
        """The plan's figures under XLA's names; empty of a plan without a
        prediction.
        """
        held = self.plan.bytes_per_device
        found = {}
        if held:
            arguments = sum(held.get(kind, 0) for kind in ARGUMENTS)
            found = {
                "arguments": arguments,
                "temporaries": self.plan.peak - arguments,
                "peak": self.plan.peak,
            }
        return found | ({"flops": self.plan.flops} if self.plan.flops else {})

    @property
    def found(self) -> dict[str, float]:
        m = self.memory
        held = (
            {}
            if m is None
            else {
                "arguments": m.arguments,
                "temporaries": m.peak - m.arguments,
                "peak": m.peak,
            }
        )
        return held | ({"flops": self.flops} if m is not None else {})

    def to_dict(self) -> dict[str, Any]:
        """Everything but the plan as plain data."""
        return {
            "plan": self.plan.name,
            "mesh": self.plan.mesh,
            "topology": self.plan.topology,
            "fits": self.fits,
            "limit": self.plan.memory,
            "predicted": self.predicted,
            "xla": self.found,
            "memory_error": self.memory_error and self.memory_error.what,
            "peak": self.peak,
            "traffic": [asdict(row) for row in self.rows],
            "unexpected": [asdict(u) for u in self.unexpected],
            "compile_seconds": self.seconds,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        plan = self.plan
        lines = [
            f"{plan.name}, mesh {meshed(plan)}, remat {plan.remat},"
            f" {plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)}:"
            f" compiled for {plan.topology} in {self.seconds:.0f} s"
        ]
        if self.memory_error is not None:
            return "\n".join([*lines, f"it does not fit: {self.memory_error.what}"])
        told = lambda name, n: si(n) + "FLOP" if name == "flops" else size(n)
        cells = [
            [
                name,
                told(name, self.predicted[name]) if name in self.predicted else "-",
                told(name, n),
                _off(n, self.predicted.get(name)),
            ]
            for name, n in self.found.items()
        ]
        lines += [
            "",
            *grid(
                ("a device", "predicted", "XLA", "off by"),
                cells,
                "<>>>",
            ),
        ]
        lines += [f"{'fits' if self.fits else 'DOES NOT FIT'} in {size(plan.memory)}"]
        if self.rows:
            cells = [
                [
                    " + ".join(r.axes) or "no whole axes",
                    r.kind,
                    f"{r.planned_count:,}",
                    size(r.planned),
                    f"{r.found_count:,}",
                    size(r.found),
                ]
                for r in self.rows
            ]
            cells += [
                [
                    f"{' + '.join(axes)}, all kinds",
                    "",
                    "",
                    size(a),
                    "",
                    size(b),
                ]
                for axes, a, b in self.totals
            ]
            lines += [
                "",
                *grid(
                    (
                        "collectives of a step, over",
                        "",
                        "planned",
                        "sent",
                        "XLA's",
                        "sent",
                    ),
                    cells,
                    "<<>>>>",
                ),
            ]
        share = sum(u.share for u in self.unexpected)
        lines += [
            "",
            (
                f"not explained by the plan: {share:.0%} of the traffic"
                if self.unexpected
                else "the plan explains all collectives"
            ),
        ]
        lines += [
            f"  {u.share:5.1%}  {size(u.bytes)}  {u.count} x {u.kind} over"
            f" {' + '.join(u.axes) or 'no whole axes'} "
            f" {u.where or u.op_name or 'no source line'}: {u.why}"
            for u in self.unexpected[:SHOWN]
        ]
        lines += (
            [f"  and {len(self.unexpected) - SHOWN} smaller ones"]
            if len(self.unexpected) > SHOWN
            else []
        )
        return "\n".join([*lines, *(f"! {note}" for note in self.notes)])

    @property
    def totals(self) -> list[tuple[tuple[str, ...], float, float]]:
        """(axes, bytes planned, bytes found) of axes with several kinds."""
        groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.axes].append(row)
        return [
            (
                axes,
                sum(r.planned for r in rows),
                sum(r.found for r in rows),
            )
            for axes, rows in groups.items()
            if len(rows) > 1
        ]


def verify(
    trace: Trace,
    plan: Plan,
    on: Topology | Sequence[Any] | np.ndarray | None = None,
) -> Verification:
    """Compile the train step of a plan for its topology, which need not be there, and
    compare; one step a call.

    Args:
      on: the topology, or live devices in the mesh's order; None: the topology of the
        plan's name.

    Raises:
      PlanError: it can't be compiled for here: libtpu, the GPU or enough virtual CPU
        devices are missing.
    """
    if trace.jaxpr is None:
        raise PlanError(
            "there is no batch to compile a train step for",
            where="verify",
            remedy="give the recipe its data",
        )
    devices: Any = on
    if on is None or isinstance(on, Topology):
        where = on or topology(plan.topology)
        devices = ahead.mesh_devices(
            where,
            plan.mesh,
            ahead.devices_for(where),
        )
    start = time.perf_counter()
    try:
        compiled, memory = ahead.compile_for(
            Program(trace, replace(plan, steps_per_call=1), devices).lower()
        )
    except ahead.TooLarge as error:
        return Verification(
            plan,
            None,
            error,
            0.0,
            (),
            (),
            time.perf_counter() - start,
        )
    seconds = time.perf_counter() - start
    platform = next(
        iter(devices.flat if hasattr(devices, "flat") else devices)
    ).platform
    module = hlo.read(compiled.as_text() or "")
    moves = expected(trace, plan, platform)
    rows, unexpected = compare(
        moves,
        module.collectives,
        plan.mesh,
    )
    return Verification(
        plan,
        memory,
        None,
        module.dot_flops,
        rows,
        unexpected,
        seconds,
        tuple(_notes(module, platform, trace)),
    )


def prove(
    trace: Trace,
    where: Topology,
    count: int,
    **options: Any,
) -> tuple[Plan, list[Verification]]:
    """The best plan that fits by XLA's own account of memory: compiles the best `count`
    candidates.

    Args:
      options: of `planner.plan`.

    Returns:
      The plan, and the verification of each candidate, best first.

    Raises:
      PlanError: none fits.
    """
    devices = ahead.devices_for(where)
    checks = [
        verify(
            trace,
            plan,
            ahead.mesh_devices(where, plan.mesh, devices),
        )
        for plan in candidates(trace, where, count, **options)
    ]
    fitting = [check for check in checks if check.fits]
    if options.get("objective") == "memory":
        fitting.sort(key=lambda check: check.peak or 0)
    if not fitting:
        best = min(
            checks,
            key=lambda check: check.peak or float("inf"),
        )
        raise PlanError(
            f"none of the {len(checks)} best plans fits by XLA's account:"
            f" {_needs(best)}",
            where=f"proof for {where.name}",
            remedy=(
                f"prove more candidates than {count}, lower batch_size, raise"
                " micro_batches, set remat to full, or take more devices"
            ),
        )
    chosen = fitting[0]
    notes = [
        f"proven: XLA's peak is {size(chosen.peak or 0)} of {size(chosen.plan.memory)}"
    ]
    notes += [f"passed over: {_needs(check)}" for check in checks if not check.fits]
    plan = replace(
        chosen.plan,
        notes=(*chosen.plan.notes, *notes),
    )
    return plan, [
        replace(check, plan=plan) if check is chosen else check for check in checks
    ]


def _needs(check: Verification) -> str:
    needed = "more" if check.peak is None else size(check.peak)
    plan = check.plan
    return (
        f"{plan.name} (mesh {meshed(plan)}, remat {plan.remat}) needs {needed} of"
        f" {size(plan.memory)}"
    )


def _off(found: float, predicted: float | None) -> str:
    return "-" if not predicted else f"{found / predicted - 1:+.1%}"


def _notes(
    module: hlo.Compiled,
    platform: str,
    trace: Trace,
) -> Iterable[str]:
    if module.unknown_loops:
        yield (
            f"{len(module.unknown_loops)} loops count as one turn each, since XLA"
            " doesn't tell how many they have"
        )
    if module.rematerialized:
        yield f"XLA computes {module.rematerialized} instructions again to save memory"
    kernels = {
        name: n
        for name, n in module.custom_calls.items()
        if "matmul" in name.lower() or "attention" in name.lower()
    }
    if kernels:
        yield (
            f"the FLOP of {', '.join(f'{n} x {name}' for name, n in kernels.items())}"
            " are not counted"
        )
    if platform == "cpu" and trace.recipe.precision != "float32":
        yield (
            "XLA for CPU sends 16-bit numbers as float32, and so are the planned bytes"
            " above"
        )


# ---- what the plan expects ----


@dataclass
class Expected:
    """A move of the plan: `sent` by a device in one step, at the user's line
    "file:line" (empty: none is known).
    """

    where: str
    kind: str
    axes: tuple[str, ...]
    count: int
    sent: float


def expected(
    trace: Trace,
    plan: Plan,
    platform: str,
) -> list[Expected]:
    """The collectives that the plan's layout needs, operation by operation, as large as
    this platform makes them.
    """
    graph = trace.gradient(plan.remat)
    layout = plan.layout(graph, trace.arguments)
    layout.batched = Names(graph, trace.arguments).batched
    layout.parts = plan.micro_batches
    where = _topology(plan)
    terms = summed(graph.block, {})
    gathered = set()
    found = []
    for op in graph.operations():
        for move in layout.decide(op, contraction(op)).moves:
            value = op.outputs[0] if move.where == "out" else op.inputs[_side(op, move)]
            assert value is not None
            if move.where.startswith("input") and value.stored is not None:
                if value.index in gathered and value.index not in graph.lasting:
                    continue  # gathered once a block
                gathered.add(value.index)
            axes = tuple(name for i, name in enumerate(plan.mesh) if move.axes >> i & 1)
            count = op.times * plan.micro_batches
            kind = move.kind
            buffer = move.bytes
            if where is not None:
                kind = as_compiled(
                    kind,
                    math.prod(plan.mesh[a] for a in axes),
                    where,
                )
            # XLA's backend reduces each term, and sends 16-bit numbers as float32
            if platform == "cpu":
                buffer *= 2 if itemsize(value) == 2 else 1
            elif kind == "all-reduce":
                buffer *= terms.get(value.index, 1.0)
            found.append(
                Expected(
                    place(op),
                    kind,
                    axes,
                    count,
                    ring(kind, axes, buffer, plan.mesh) * count,
                )
            )
    return found


def _topology(plan: Plan) -> Topology | None:
    """The plan's, if the catalogue has its chip."""
    with contextlib.suppress(PlanError):
        return topology(plan.topology)
    return None


def ring(
    kind: str,
    axes: Iterable[str],
    size: float,
    mesh: Mapping[str, int],
) -> float:
    """Bytes that a device sends for a collective of a buffer of `size` bytes (cf.
    `CollectiveFound.sent`).
    """
    n = math.prod(mesh[a] for a in axes)
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) / n


def place(op: Operation) -> str:
    """ "file:line" of the innermost line of an operation that is no library's; empty if
    there is none.
    """
    for eqn in (op.eqn, *reversed(op.callers)):
        trace = eqn.source_info.traceback
        for frame in () if trace is None else trace.frames:
            if not of_a_library(frame.file_name):
                return f"{frame.file_name}:{frame.line_num}"
    return ""


def _side(op: Operation, move: Move) -> int:
    product = contraction(op)
    if move.where.startswith("input"):
        return int(move.where.removeprefix("input "))
    side = (
        None
        if product is None
        else product.left
        if move.where == "left"
        else product.right
    )
    assert side is not None, move
    return side


# ---- what was found ----


@dataclass
class Found:
    """A collective of the compiled step; `sent` as a ring that does what it is for
    would send, `left` of it unexplained.
    """

    collective: CollectiveFound
    where: str
    kind: str
    axes: tuple[str, ...]
    sent: float
    left: float


def compare(
    moves: Sequence[Expected],
    collectives: Iterable[CollectiveFound],
    mesh: Mapping[str, int],
) -> tuple[tuple[Row, ...], tuple[Unexpected, ...]]:
    """Both sides by axes and kind, and what of the found ones the moves don't explain.

    A found one is explained by moves at its source line over its axes; then, since XLA
    joins several under one line, by what is left of its kind over its axes; then, since
    XLA makes one kind of another, by what is left over them, or over a part of them.
    What remains is told where it is more than `SLACK` of what is planned over the axes.
    """
    found = [f for c in collectives if (f := _found(c, mesh)).sent > 0]
    total = max(sum(f.sent for f in found), 1.0)
    planned: dict[tuple[str, ...], float] = defaultdict(float)
    left: dict[tuple[str, str, tuple[str, ...]], float] = defaultdict(float)
    for move in moves:
        planned[move.axes] += move.sent
        left[move.where, move.kind, move.axes] += move.sent
    for near in (
        lambda f, k: (
            k
            == (
                f.where,
                f.kind,
                f.axes,
            )
        ),
        lambda f, k: (k[0], k[2]) == (f.where, f.axes),
        lambda f, k: k[1:] == (f.kind, f.axes),
        lambda f, k: k[2] == f.axes,
        lambda f, k: set(k[2]) & set(f.axes),
    ):
        for f in sorted(found, key=lambda f: f.left):
            for key in [k for k in left if left[k] and near(f, k)] if f.left else ():
                used = min(f.left, left[key])
                left[key] -= used
                f.left -= used
    excess: dict[tuple[str, ...], float] = defaultdict(float)
    for f in found:
        excess[f.axes] += f.left
    told = [
        f
        for f in found
        if f.left > 0.1 * f.sent and excess[f.axes] > SLACK * planned.get(f.axes, 0.0)
    ]
    unexpected = [_unexpected(alike, planned, moves, total) for alike in _alike(told)]
    return _rows(moves, found), tuple(
        sorted(
            (u for u in unexpected if u.excess > SMALL * total),
            key=lambda u: -u.excess,
        )
    )


def _found(c: CollectiveFound, mesh: Mapping[str, int]) -> Found:
    axes = c.axes(mesh) or hlo.axes_of(c.groups, mesh, permute=True) or ()
    sent = c.sent
    n = math.prod(mesh[a] for a in axes)
    if c.windowed and n > 1:  # n or n + 1 pieces, where a ring of n needs n - 1
        sent *= (n - 1) / (n + 0.5)
    return Found(
        c,
        f"{c.file}:{c.line}" if c.file else "",
        c.kind,
        axes,
        sent,
        sent,
    )


def _alike(found: Iterable[Found]) -> Iterable[list[Found]]:
    groups: dict[tuple, list[Found]] = defaultdict(list)
    for f in found:
        groups[f.where, f.kind, f.axes, f.collective.sliced].append(f)
    return groups.values()


def _unexpected(
    alike: list[Found],
    planned: Mapping[tuple[str, ...], float],
    moves: Sequence[Expected],
    total: float,
) -> Unexpected:
    first = alike[0]
    sent = sum(f.sent for f in alike)
    kinds: dict[str, float] = defaultdict(float)
    for m in moves:
        if m.axes == first.axes:
            kinds[m.kind] += m.sent
    halves = " and ".join(k for k in ("all-gather", "reduce-scatter") if kinds[k])
    here = sum(m.sent for m in moves if m.axes == first.axes and m.where == first.where)
    over = " and ".join(first.axes)
    if not any(set(axes) & set(first.axes) for axes in planned):
        why = (
            f"nothing is planned over {over}"
            if over
            else "its groups are no product of mesh axes"
        )
    elif first.kind == "all-reduce" and first.collective.sliced:
        why = (
            "each use takes a slice of it: a reduce-scatter, which XLA did not form,"
            " sends half"
        )
    elif first.kind == "all-reduce" and halves and kinds["all-reduce"] < sent / 2:
        why = f"{halves} planned over {over} would send half"
    elif here:
        why = f"{size(here)} are planned at this line over {over}"
    else:
        why = f"nothing is planned at this line over {over}"
    return Unexpected(
        first.where,
        first.kind,
        first.axes,
        sum(f.collective.times for f in alike),
        sent,
        sum(f.left for f in alike),
        sent / total,
        first.collective.op_name,
        why,
    )


def _rows(moves: Iterable[Expected], found: Iterable[Found]) -> tuple[Row, ...]:
    sums: dict[tuple[tuple[str, ...], str], list[float]] = defaultdict(
        lambda: [0.0, 0, 0.0, 0]
    )
    for axes, kind, side, sent, count in (
        *((m.axes, m.kind, 0, m.sent, m.count) for m in moves),
        *((f.axes, f.kind, 2, f.sent, f.collective.times) for f in found),
    ):
        sums[axes, kind][side] += sent
        sums[axes, kind][side + 1] += count
    rows = [
        Row(
            axes,
            kind,
            a,
            int(m),
            b,
            int(n),
        )
        for (axes, kind), (a, m, b, n) in sums.items()
    ]
    weight: dict[tuple[str, ...], float] = defaultdict(float)
    for row in rows:
        weight[row.axes] += row.found + row.planned
    return tuple(
        sorted(
            rows,
            key=lambda r: (
                -weight[r.axes],
                r.axes,
                -r.found - r.planned,
            ),
        )
    )
