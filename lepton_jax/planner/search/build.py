"""A plan from what was decided and predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology
from lepton_jax.planner import assignment as assemble
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate import feeding as schedule
from lepton_jax.planner.estimate.cost import Estimate
from lepton_jax.planner.plans import ArrayPlan, Axis, Collective, Plan, Rival
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.remat import MEANINGS
from lepton_jax.planner.program.trace import Trace
from lepton_jax.trees import by_path, nbytes

CAUSES = 3


def build(
    trace: Trace,
    topology: Topology,
    names: Names,
    assignment: Assignment,
    *,
    objective: str = "time",
    estimate: Estimate | None = None,
    held: Mapping[str, int] | None = None,
    rivals: Sequence[Rival] = (),
    axes: tuple[str, ...] = (),
    reasons: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan of an assignment, whose masks are in the order of `names`."""
    axes = axes or assemble.axis_names(assignment, names)
    pick = lambda mask: tuple(n for i, n in enumerate(axes) if mask >> i & 1)
    batch = 0 if names.batch is None else assignment.masks[names.batch]
    data, why_data = schedule.residence(trace, topology)
    steps, why = schedule.steps_per_call(trace, topology)
    why_all = dict(reasons or {})
    why_all[f"data {data}"] = why_data
    why_all[f"{steps} step{'s' if steps > 1 else ''} per call"] = why
    why_all[f"remat {assignment.remat}"] = MEANINGS[assignment.remat]
    slow = schedule.slow_loops(trace, topology)
    if assignment.micro_batches > 1 and slow:
        why_all["micro-batches unrolled"] = (
            "XLA's CPU backend runs convolutions inside loops on a slow path"
        )
    moves = (
        ()
        if estimate is None
        else tuple(
            Collective(
                kind,
                pick(mask),
                count,
                size,
                seconds,
                "; ".join(sorted(causes, key=lambda c: -causes[c])[:CAUSES]),
            )
            for (kind, mask), (count, size, seconds, causes) in sorted(
                estimate.moves.items(),
                key=lambda m: -m[1][2],
            )
        )
    )
    unknown = names.graph.unknown
    rest = math.prod(n for i, n in enumerate(assignment.sizes) if not batch >> i & 1)
    devices = math.prod(assignment.sizes)
    if names.batch is not None and rest > 1 and trace.recipe.batch_size % devices:
        notes = [
            *notes,
            (
                f"a batch of {trace.recipe.batch_size} does not divide by {devices}"
                f" devices: it is split in {devices // rest}"
            ),
        ]
    notes = [
        *notes,
        *(
            f"there is no rule for the primitive {name!r} ({count} of them): its"
            " operands are whole on each device"
            for name, count in unknown.items()
        ),
    ]
    return Plan(
        topology=topology.name,
        objective=objective,
        name=assemble.strategy(
            assignment, assemble.axis_names(assignment, names), names
        ),
        mesh=dict(
            zip(
                axes,
                assignment.sizes,
                strict=True,
            )
        ),
        batch_axes=pick(batch),
        arrays=assemble.arrays(trace, names, assignment, axes),
        batch=assemble.batch_arrays(trace, names, assignment, axes),
        axes=tuple(
            Axis(
                g.name,
                g.size,
                pick(m),
                len(g.members),
            )
            for g, m in zip(names.groups, assignment.masks, strict=True)
        ),
        batch_size=trace.recipe.batch_size,
        micro_batches=assignment.micro_batches,
        remat=assignment.remat,
        unroll_micro_batches=slow,
        steps_per_call=steps,
        data=data,
        bytes_per_device=dict(held or {}),
        memory=int(topology.device.memory),
        seconds={} if estimate is None else dict(estimate.seconds),
        flops=0.0 if estimate is None else estimate.flops,
        collectives=moves,
        price_per_hour=topology.price_per_hour,
        rivals=tuple(rivals),
        reasons=why_all,
        notes=tuple(notes),
    )


def without_data(trace: Trace, topology: Topology) -> Plan:
    """What can be said before the shapes of the data are known: the state, a copy of it
    on each device.
    """
    copied = [
        ArrayPlan(
            path,
            path.partition("/")[0],
            tuple(leaf.shape),
            assemble.dtype_name(leaf),
            nbytes(leaf),
            (),
            (),
            "the data is not known yet: a copy on each device",
        )
        for path, leaf in by_path(trace.state).items()
    ]
    held = {
        kind: sum(a.bytes for a in copied if a.kind == kind)
        for kind in ("params", "variables", "optimizer")
    }
    steps, why = schedule.steps_per_call(trace, topology)
    return Plan(
        topology=topology.name,
        name="data parallel",
        objective="time",
        mesh={"data": topology.devices},
        batch_axes=("data",),
        arrays=tuple(copied),
        batch=(),
        axes=(),
        batch_size=trace.recipe.batch_size,
        micro_batches=trace.recipe.micro_batches or 1,
        remat="none",
        unroll_micro_batches=False,
        steps_per_call=steps,
        data="streamed",
        bytes_per_device={**held, "gradients": held["params"]},
        memory=int(topology.device.memory),
        seconds={},
        flops=0.0,
        collectives=(),
        price_per_hour=topology.price_per_hour,
        rivals=(),
        reasons={
            "nothing was searched": (
                "the data is not known yet, so neither activations nor time are"
            )
        },
        notes=(why,),
    )


def fixed(
    trace: Trace,
    topology: Topology,
    assignment: Assignment,
) -> Plan:
    """The plan of an assignment, without a search or a prediction."""
    return build(
        trace,
        topology,
        Names(trace.gradient(assignment.remat), trace.arguments),
        assignment,
    )


def by_hand(
    trace: Trace,
    sizes: tuple[int, ...],
    masks: Mapping[str, int],
    keep: int,
    remat: str = "none",
    micro_batches: int = 1,
) -> Assignment:
    """An assignment from the names of named axes to masks of mesh axes.

    Raises:
      PlanError: there is no such named axis.
    """
    names = Names(trace.gradient(remat), trace.arguments)
    unknown = set(masks) - {g.name for g in names.groups}
    if unknown:
        raise PlanError(
            f"there is no named axis {sorted(unknown)[0]!r}",
            where="by_hand",
            remedy=f"there are {', '.join(g.name for g in names.groups)}",
        )
    return Assignment(
        sizes,
        tuple(masks.get(g.name, 0) for g in names.groups),
        keep,
        remat,
        micro_batches,
    )
