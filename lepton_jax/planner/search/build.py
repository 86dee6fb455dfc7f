"""A plan as plain data, from an assignment and what was predicted of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology
from lepton_jax.planner import assignment as assemble
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate import feeding
from lepton_jax.planner.estimate.cost import Estimate
from lepton_jax.planner.plans import ArrayPlan, Axis, Collective, Plan, Rival
from lepton_jax.planner.program import products
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.remat import meaning
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.rewrite import Stages
from lepton_jax.planner.rewrite.own import OWN_GRADIENT
from lepton_jax.planner.search import lengths
from lepton_jax.planner.search.bounds import NOT_KNOWN, Bounds
from lepton_jax.planner.search.flagged import flags_for
from lepton_jax.planner.search.limits import CAUSES, NAMED_FLAGS
from lepton_jax.planner.search.masks import has, sample_axes
from lepton_jax.planner.xla import flags
from lepton_jax.trees import by_path, nbytes

# what a kernel of attention does, by its name
KERNELS = {
    "blocks": (
        "scores of a block of queries at a time, computed again in the backward pass;"
        " blocks that see nothing are skipped"
    ),
    "splash": (
        "JAX's kernel for TPUs: scores stay in the memory next to the processor, and"
        " blocks that see nothing are skipped"
    ),
}


@dataclass(frozen=True)
class Verdict:
    """Why a search chose an assignment, and what else it found: see `Plan`.

    Attributes:
      flags: XLA's; None: those that are good for the backend.
    """

    objective: str = "time"
    rivals: tuple[Rival, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bounds: Bounds = NOT_KNOWN
    flags: Mapping[str, Any] | None = None


def build(
    trace: Trace,
    topology: Topology,
    names: Names,
    assignment: Assignment,
    *,
    estimate: Estimate | None = None,
    held: Mapping[str, int] | None = None,
    axes: tuple[str, ...] = (),
    verdict: Verdict | None = None,
) -> Plan:
    """Return the plan of an assignment.

    Args:
      trace: of the recipe.
      topology: the devices.
      assignment: what was decided.
      names: named axes under the assignment's policy, whose order its masks have.
      estimate: predicted time; None: not known.
      held: predicted bytes of a device by kind; None: not known.
      axes: names of the mesh axes; empty: the field's words for what they do.
      verdict: of the search; None: there was none.
    """
    verdict = verdict or Verdict()
    words = assemble.axis_names(assignment, names)
    axes = axes or words
    data, _ = feeding.residence(trace, topology)
    steps, _ = feeding.steps_per_call(trace, topology)
    reasons = _feeding_reasons(trace, topology, assignment)
    notes = _notes(trace, names, assignment)
    notes += products.notes(trace.forms.products, topology.device)
    chosen = verdict.flags
    if chosen is None:
        chosen = flags_for(topology, names, assignment)
    return Plan(
        topology=topology.name,
        objective=verdict.objective,
        name=assemble.strategy(assignment, words, names),
        mesh=dict(
            zip(
                axes,
                assignment.sizes,
                strict=True,
            )
        ),
        batch_axes=_picked(sample_axes(assignment, names), axes),
        arrays=assemble.arrays(trace, names, assignment, axes),
        batch=assemble.batch_arrays(trace, names, assignment, axes),
        axes=_named_axes(names, assignment, axes),
        batch_size=trace.recipe.batch_size,
        micro_batches=assignment.micro_batches,
        remat=assignment.remat,
        unroll_micro_batches=feeding.slow_loops(trace, topology),
        steps_per_call=steps,
        data=data,
        bytes_per_device=dict(held or {}),
        memory=int(topology.device.memory),
        seconds={} if estimate is None else dict(estimate.seconds),
        flops=0.0 if estimate is None else estimate.flops,
        collectives=() if estimate is None else _collectives(estimate, axes),
        price_per_hour=topology.price_per_hour,
        rivals=verdict.rivals,
        reasons={
            **verdict.reasons,
            **reasons,
            **_offload_reasons(topology, assignment, estimate),
            **_flag_reasons(chosen),
        },
        notes=(*verdict.notes, *notes),
        peak_least=verdict.bounds.least,
        peak_bound=verdict.bounds.most,
        loss_pieces=trace.forms.loss_pieces,
        attention=trace.forms.attention,
        stages=trace.forms.stages.count,
        stage_parts=trace.forms.stages.parts,
        stage_chunks=trace.forms.stages.chunks,
        stage_groups=trace.forms.stages.groups,
        products=trace.forms.products,
        experts=trace.forms.experts,
        context=lengths.context(names, assignment),
        flags=dict(chosen),
    )


def _offload_reasons(
    topology: Topology,
    assignment: Assignment,
    estimate: Estimate | None,
) -> dict[str, str]:
    """Return the decision about the host's memory: what goes there, and how fast."""
    if estimate is None or not estimate.offloaded:
        return {}
    size = feeding.size(estimate.offloaded)
    kept = feeding.size(estimate.offloaded / assignment.micro_batches)
    link = topology.device.host_bandwidth / 1e9
    return {
        "offload": f"{size} of a device go to its host's memory in a step and come"
        f" back, beside the products, over {link:g} GB/s each way; the host holds"
        f" {kept} at a time"
    }


def _flag_reasons(chosen: Mapping[str, Any]) -> dict[str, str]:
    """Return the decision about XLA's flags, which names the first ones."""
    if not chosen:
        return {}
    listed = [f"{name}={flags.spelled(value)}" for name, value in chosen.items()]
    named = ", ".join(listed[:NAMED_FLAGS])
    if len(listed) > NAMED_FLAGS:
        named += f" and {len(listed) - NAMED_FLAGS} more (the plan's field `flags`)"
    return {
        "XLA flags": f"collectives may run beside products: {named}; XLA_FLAGS and"
        " LIBTPU_INIT_ARGS win over them"
    }


def _picked(
    mask: int,
    axes: tuple[str, ...],
) -> tuple[str, ...]:
    """Return the names of the mesh axes in a mask."""
    return tuple(name for axis, name in enumerate(axes) if has(mask, axis))


def _named_axes(
    names: Names,
    assignment: Assignment,
    axes: tuple[str, ...],
) -> tuple[Axis, ...]:
    pairs = zip(names.groups, assignment.masks, strict=True)
    return tuple(
        Axis(
            name=group.name,
            size=group.size,
            mesh=_picked(mask, axes),
            members=len(group.members),
        )
        for group, mask in pairs
    )


def _collectives(
    estimate: Estimate,
    axes: tuple[str, ...],
) -> tuple[Collective, ...]:
    """Return the communication of a step, the longest first."""
    collectives = []
    for (kind, mask), move in estimate.moves.items():
        count, size, seconds, causes = move
        largest = sorted(causes, key=lambda cause: -causes[cause])
        collectives.append(
            Collective(
                kind=kind,
                axes=_picked(mask, axes),
                count=count,
                bytes=size,
                seconds=seconds,
                what="; ".join(largest[:CAUSES]),
            )
        )
    collectives.sort(key=lambda collective: -collective.seconds)
    return tuple(collectives)


def _feeding_reasons(
    trace: Trace,
    topology: Topology,
    assignment: Assignment,
) -> dict[str, str]:
    """Return each decision that follows from the recipe and the topology, and why."""
    data, why_data = feeding.residence(trace, topology)
    steps, why_steps = feeding.steps_per_call(trace, topology)
    reasons = {
        f"data {data}": why_data,
        f"{steps} step{'s' if steps > 1 else ''} per call": why_steps,
        f"remat {assignment.remat}": meaning(assignment.remat),
    }
    if assignment.micro_batches > 1 and feeding.slow_loops(trace, topology):
        reasons["micro-batches unrolled"] = (
            "XLA's CPU backend runs convolutions inside loops on a slow path"
        )
    kernel = trace.forms.attention
    if kernel:
        reasons[f"attention {kernel}"] = KERNELS[kernel]
    if trace.forms.products:
        decision, why = products.reason(trace.forms.products)
        reasons[decision] = why
    if trace.forms.experts:
        reasons["experts without dropped tokens"] = (
            "each device sorts the tokens that it has by their expert; where experts"
            " are split, tokens are gathered for them and results summed"
        )
    pieces = trace.forms.loss_pieces
    if pieces > 1:
        reasons[f"loss in {pieces} pieces"] = (
            "logits of all tokens, and their gradients, are not held at once; the"
            " head's gradient is taken piece by piece in the forward pass"
        )
    stages = trace.forms.stages
    if stages.count > 1:
        reasons[f"pipeline of {stages.count} stages"] = _of_stages(stages)
    for path, table in trace.tables.tables.items():
        reasons[f"rows of {path}"] = table.why
    return reasons


def _of_stages(stages: Stages) -> str:
    """Return what a pipeline does and costs, in words."""
    chunks = f", {stages.chunks} runs of layers each" if stages.chunks > 1 else ""
    return (
        f"{stages.parts} micro-batches in flight{chunks}; a device keeps the layers of"
        f" its stage alone, and hands activations on after each of {stages.turns}"
        f" turns; {stages.bubble:.0%} of the stages' work is the bubble, which nobody"
        " reads"
    )


def _notes(
    trace: Trace,
    names: Names,
    assignment: Assignment,
) -> list[str]:
    """Return what could not be done, or was left to XLA."""
    notes = []
    batch_size = trace.recipe.batch_size
    devices = math.prod(assignment.sizes)
    if names.batch is not None:
        split = assignment.counts[sample_axes(assignment, names)]
        if split < devices and batch_size % devices:
            notes.append(
                f"a batch of {batch_size} does not divide by {devices}"
                f" devices: it is split in {split}"
            )
    for name, count in names.graph.unknown.items():
        notes.append(
            f"there is no rule for the primitive {name!r} ({count} of them): its"
            " operands are whole on each device; lepton.planner.rule says how they may"
            " be split (docs/kernels.md)"
        )
    again = {
        op.params["own"].rule.name
        for op in names.graph.operations()
        if op.name == OWN_GRADIENT and op.params["own"].repeats
    }
    for name in sorted(again):
        notes.append(
            f"the gradient of {name!r} runs its forward pass again: the dims of what it"
            " keeps are not known (`saves` of lepton.planner.rule)"
        )
    return [*notes, *trace.tables.hints, *trace.tables.refused]


def without_data(trace: Trace, topology: Topology) -> Plan:
    """Return what can be said before the shapes of the data are known.

    It covers the state, of which each device has a copy.
    """
    arrays = _copied(trace)
    held = dict.fromkeys(("params", "variables", "optimizer"), 0)
    for array in arrays:
        if array.kind in held:
            held[array.kind] += array.bytes
    steps, why_steps = feeding.steps_per_call(trace, topology)
    return Plan(
        topology=topology.name,
        name="data parallel",
        objective="time",
        mesh={"data": topology.devices},
        batch_axes=("data",),
        arrays=arrays,
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
        notes=(why_steps,),
    )


def _copied(trace: Trace) -> tuple[ArrayPlan, ...]:
    """Return the arrays of the state, of which each device has a copy."""
    reason = "the data is not known yet: a copy on each device"
    leaves = by_path(trace.state)
    return tuple(
        ArrayPlan(
            path=path,
            kind=path.partition("/")[0],
            shape=tuple(leaf.shape),
            dtype=assemble.dtype_name(leaf),
            bytes=nbytes(leaf),
            spec=(),
            use=(),
            reason=reason,
        )
        for path, leaf in leaves.items()
    )


# ---- assignments written by hand ----


def fixed(
    trace: Trace,
    topology: Topology,
    assignment: Assignment,
) -> Plan:
    """Return the plan of an assignment, without a search or a prediction."""
    names = Names(trace.gradient(assignment.remat), trace.arguments)
    return build(trace, topology, names, assignment)


def by_hand(
    trace: Trace,
    sizes: tuple[int, ...],
    masks: Mapping[str, int],
    keep: int,
    remat: str = "none",
    micro_batches: int = 1,
) -> Assignment:
    """Return an assignment from the names of named axes to masks of mesh axes.

    Raises:
      PlanError: there is no such named axis.
    """
    names = Names(trace.gradient(remat), trace.arguments)
    known = [group.name for group in names.groups]
    unknown = sorted(set(masks) - set(known))
    if unknown:
        raise PlanError(
            f"there is no named axis {unknown[0]!r}",
            where="by_hand",
            remedy=f"there are {', '.join(known)}",
        )
    in_order = tuple(masks.get(name, 0) for name in known)
    return Assignment(sizes, in_order, keep, remat, micro_batches)
