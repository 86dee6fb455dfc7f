"""Moves between the stages of a pipeline: what the planner knows of them.

The operations are those of `rewrite.stage_moves`. Stages are a named axis: dim 0 of
what they hold, and the layers of the parameters. Where it is divided over devices,

    stage_roll       sends what a device holds to the next one: a collective permute
    stage_place      needs the samples that enter on each device: an all-gather, where
                     the batch is divided over the same devices
    stage_pick       adds up what one stage holds and zeros: an all-reduce, or a
                     reduce-scatter to such a batch
    stage_layers     sends nothing; with chunks, parameters change places, by collective
                     permutes
    stage_parts      needs samples of each micro-batch on each device: an all-gather,
                     where the batch is divided over the devices of the stages, too

Samples of a micro-batch are a named axis of their own. They are divided like the batch,
but not over the devices of the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from lepton_jax.planner.rewrite.attention import ATTENTION, ATTENTION_GRADIENT
from lepton_jax.planner.rewrite.stage_moves import (
    LAYERS,
    LAYERS_BACK,
    PARTS,
    PARTS_BACK,
    PICK,
    PLACE,
    ROLL,
)
from lepton_jax.planner.rewrite.staged_attention import (
    STAGED,
    STAGED_GRADIENT,
    STAGED_KERNELS,
    one_stage,
)

# Dims of the arrays of attention of all stages: (stages, batch, length, heads, width),
# (stages, batch, heads, length) and (stages, batch, length).
STAGES = 0
SAMPLES = 1
HEADS = {5: 3, 4: 2}
LENGTH = {5: 2, 4: 3, 3: 2}
WIDTH = 4

PERMUTE = "collective-permute"

# In `Value.stored`: behind a dim that has some of the rows of a parameter's, or that no
# dim of the parameter is.
IN_PART = -1

Spec = tuple[int, ...]


class Sent(NamedTuple):
    """A kind of collective that an operation needs, over the mesh axes of a mask."""

    kind: str
    axes: int


def join_stages(graph: Any, op: Any) -> None:
    """Join the dims of a move between stages."""
    source = op.inputs[0]
    target = op.outputs[0]
    if source is None:
        return
    nodes = list(source.nodes)
    others = list(target.nodes)
    if op.name == PLACE:
        others = others[1:]
    elif op.name == PICK:
        nodes = nodes[1:]
        op.reduced.append((0, 0))
    elif op.name == LAYERS:
        others = others[1:]
    elif op.name == LAYERS_BACK:
        nodes = nodes[1:]
    elif op.name == PARTS:
        _join_samples(graph, nodes[0], others[1])
        nodes = nodes[1:]
        others = others[2:]
    elif op.name == PARTS_BACK:
        _join_samples(graph, others[0], nodes[1])
        nodes = nodes[2:]
        others = others[1:]
    for a, b in zip(nodes, others, strict=True):
        graph.join(a, b)


def _join_samples(graph: Any, batch: int, part: int) -> None:
    """Join the samples of a batch, and of a micro-batch, with all others of theirs."""
    if graph.samples is None:
        graph.samples = Samples(part, batch)
    graph.join(graph.samples.part, part)
    graph.join(graph.samples.batch, batch)


class Samples(NamedTuple):
    """Nodes of the samples of a micro-batch, and of the batch."""

    part: int
    batch: int


def samples_of_parts(graph: Any) -> Samples | None:
    """Return the named axis of a micro-batch's samples; None: there is no pipeline."""
    if graph.samples is None:
        return None
    own = graph.find(graph.samples.part)
    batch = graph.find(graph.samples.batch)
    return Samples(own, batch) if own != batch else None


def layers_of_stages(graph: Any) -> set[int]:
    """Return the roots of the layers that a pipeline divides into stages."""
    return {
        graph.find(op.inputs[0].nodes[0])
        for op in graph.operations()
        if op.name == LAYERS and op.inputs[0] is not None
    }


def in_between(whole: Spec, parted: Spec) -> Spec:
    """Return the spec of samples by micro-batch as the batch lies.

    Args:
      whole: the spec of (samples, ...).
      parted: that of (micro-batches, samples of one, ...), as it is to lie.
    """
    return (whole[0] & ~parted[1], *parted[1:])


def stay(between: Spec, groups: int, counts: Sequence[int]) -> bool:
    """Whether each device has its own samples in micro-batches, too.

    Devices of an outer mesh axis have runs of the batch: where it divides micro-batches
    themselves, there must be as many groups of them; else there must be none.

    Args:
      between: from `in_between`.
      groups: as in `in_parts`.
      counts: the number of devices along each mask of mesh axes.
    """
    over_parts, over_samples = between[:2]
    if not over_parts | over_samples:
        return True
    is_outer = over_parts and (not over_samples or over_parts < over_samples)
    return groups == (counts[over_parts] if is_outer else 1)


def behind(name: str, stored: tuple[int, tuple[int, ...]]) -> tuple[int, tuple]:
    """Return the parameter's dims behind those of its layers by stage."""
    number, dims = stored
    assert name in (LAYERS, LAYERS_BACK), name
    return number, (IN_PART, *dims)


def sent(op: Any, spec: Spec) -> Sent | None:
    """Return what a move sends of an operand that lies so; None: nothing."""
    if op.name == ROLL and spec[0]:
        return Sent(PERMUTE, spec[0])
    if op.name == LAYERS and op.params["chunks"] > 1 and spec[0]:
        return Sent(PERMUTE, spec[0])
    if op.name == LAYERS_BACK and op.params["chunks"] > 1 and spec[1]:
        return Sent(PERMUTE, spec[1])
    return None


# ---- attention of all stages ----


def join_staged_attention(graph: Any, op: Any) -> None:
    """Join stages, samples and heads of attention; length and width are whole."""
    first = op.inputs[0]
    for number, value in enumerate(op.inputs):
        rank = len(value.shape)
        op.whole.append((number, LENGTH[rank]))
        if rank > WIDTH:
            op.whole.append((number, WIDTH))
    for value in (*op.inputs, *op.outputs):
        rank = len(value.shape)
        graph.join(value.nodes[STAGES], first.nodes[STAGES])
        graph.join(value.nodes[SAMPLES], first.nodes[SAMPLES])
        if rank in HEADS:
            graph.join(value.nodes[HEADS[rank]], first.nodes[HEADS[len(first.shape)]])
        if rank > WIDTH:
            graph.join(value.nodes[WIDTH], first.nodes[WIDTH])


def attention_spec(specs: Any, shape: Any) -> Spec:
    """Return the spec of one of attention's arrays, split as all of them can be.

    Args:
      specs: those of its inputs.
      shape: of the array.
    """
    stages = samples = heads = -1
    for spec in specs:
        stages &= spec[STAGES]
        samples &= spec[SAMPLES]
        if len(spec) in HEADS:
            heads &= spec[HEADS[len(spec)]]
    spec = [0] * len(shape)
    spec[STAGES] = stages
    spec[SAMPLES] = samples
    if len(shape) in HEADS:
        spec[HEADS[len(shape)]] = heads
    return tuple(spec)


def of_one_stage(op: Any) -> Any:
    """Return attention of all stages as attention of one that has all samples."""
    if op.name not in STAGED_KERNELS:
        return op
    names = {STAGED: ATTENTION, STAGED_GRADIENT: ATTENTION_GRADIENT}

    def merged(value: Any) -> Any:
        return SimpleNamespace(shape=one_stage(value.shape), dtype=value.dtype)

    return SimpleNamespace(
        name=names[op.name],
        inputs=[merged(value) for value in op.inputs],
        outputs=[merged(value) for value in op.outputs],
        params=op.params,
        times=op.times,
    )
