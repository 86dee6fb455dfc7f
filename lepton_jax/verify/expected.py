"""The collectives that a plan expects of its compiled train step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology, topology
from lepton_jax.planner import Plan, Trace
from lepton_jax.planner.estimate.cost import as_compiled
from lepton_jax.planner.estimate.jobs import sum_shares
from lepton_jax.planner.estimate.motion import Motion, moved_value
from lepton_jax.planner.estimate.orthogonal import stack_moves
from lepton_jax.planner.estimate.reads import Reads, moved_before
from lepton_jax.planner.estimate.rows import row_moves
from lepton_jax.planner.program.around import PASSED_ON, PERMUTATION
from lepton_jax.planner.program.graph import Operation, Value
from lepton_jax.planner.program.layout import (
    Layout,
    Move,
    contraction,
    itemsize,
)
from lepton_jax.planner.program.named import Names
from lepton_jax.verify.hlo_text import of_a_library


@dataclass
class Expected:
    """A collective that the plan expects.

    Attributes:
      where: "file:line" of the user's code; empty if none is known.
      kind: such as "all-reduce".
      axes: the mesh axes.
      count: runs in one step.
      sent: bytes that a device sends in one step.
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
    """Return the collectives that the plan's layout needs, operation by operation.

    Each is as large as `platform` makes it.
    """
    graph = replace(trace, forms=plan.forms).gradient(plan.remat)
    layout = plan.layout(graph, trace.arguments)
    layout.batched = Names(graph, trace.arguments).batched
    layout.parts = plan.micro_batches
    shares = sum_shares(graph.main)
    where = _topology(plan)
    motion = Motion(graph, platform)

    collectives = []
    for op, value, move in _moves(layout, graph.lasting, platform):
        axes = _names(move.axes, plan)
        kind = PASSED_ON if move.kind == PERMUTATION else move.kind
        if where is not None:
            devices = math.prod(plan.mesh[axis] for axis in axes)
            kind = as_compiled(kind, devices, where, plan.flags)
        buffer = move.bytes * _scale(value, kind, platform, shares)
        buffer *= motion.sent_share(op, value, move.kind)
        count = motion.runs(op, value, move.kind, plan.micro_batches)
        count *= move.steps
        buffer /= move.steps
        sent = ring(kind, axes, buffer, plan.mesh) * count
        collectives.append(
            Expected(
                place(op),
                kind,
                axes,
                count,
                sent,
            )
        )
    for row in row_moves(trace, layout.storage, layout.counts):
        axes = _names(row.axes, plan)
        sent = ring(row.kind, axes, row.bytes, plan.mesh)
        collectives.append(Expected("", row.kind, axes, 1, sent))
    for stack in stack_moves(trace, layout.storage, layout.counts):
        axes = _names(stack.axes, plan)
        sent = ring(stack.kind, axes, stack.bytes, plan.mesh)
        collectives += [Expected("", stack.kind, axes, 1, sent)] * stack.runs
    return collectives


def _names(mask: int, plan: Plan) -> tuple[str, ...]:
    """Return the names of the mesh axes in a mask."""
    return tuple(name for i, name in enumerate(plan.mesh) if mask >> i & 1)


def _moves(
    layout: Layout,
    lasting: set[int],
    platform: str,
) -> Iterable[tuple[Operation, Value, Move]]:
    """Yield each operation's moves, with the value that is moved.

    A stored value is gathered once a region, so later gathers of it are left out. One
    that lasts is gathered in the forward and in the backward pass. Any other value is
    moved once to where several products want it, if the platform's backend does so.
    """
    gathered = set()
    reads = Reads(platform)
    for op in layout.graph.operations():
        product = contraction(op)
        earlier = reads.before(op, product)
        decision = layout.decide(op, product)
        for move in decision.moves:
            if moved_before(layout, product, decision, move, earlier):
                continue
            value = moved_value(op, product, move)
            if move.where.startswith("input") and value.stored is not None:
                if value.index in gathered and value.index not in lasting:
                    continue
                gathered.add(value.index)
            yield op, value, move


def _scale(
    value: Value,
    kind: str,
    platform: str,
    shares: Mapping[int, float],
) -> float:
    """Return the bytes that XLA sends as a multiple of those that the layout says."""
    if platform == "cpu":
        # XLA's backend reduces each term of a sum, and sends 16-bit numbers as float32.
        return 2 if itemsize(value) == 2 else 1
    return shares.get(value.index, 1.0) if kind == "all-reduce" else 1


def _topology(plan: Plan) -> Topology | None:
    """Return the plan's topology if the catalogue has its chip."""
    with contextlib.suppress(PlanError):
        return topology(plan.topology)
    return None


def ring(
    kind: str,
    axes: Iterable[str],
    size: float,
    mesh: Mapping[str, int],
) -> float:
    """Return the bytes that a device sends for a collective of a buffer.

    Args:
      kind: such as "all-reduce".
      axes: mesh axes of the collective.
      size: bytes of the buffer (cf. `CollectiveFound.sent`).
      mesh: sizes of the mesh's axes.
    """
    if kind == PASSED_ON:
        return size
    devices = math.prod(mesh[axis] for axis in axes)
    passes = 2 if kind == "all-reduce" else 1
    return passes * size * (devices - 1) / devices


def place(op: Operation) -> str:
    """Return "file:line" of the innermost line of an operation that is no library's.

    It is empty if there is none.
    """
    for eqn in (op.eqn, *reversed(op.callers)):
        trace = eqn.source_info.traceback
        for frame in () if trace is None else trace.frames:
            if not of_a_library(frame.file_name):
                return f"{frame.file_name}:{frame.line_num}"
    return ""
