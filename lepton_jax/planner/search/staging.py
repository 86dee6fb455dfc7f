"""Pipelines that a search looks at: stages, micro-batches in flight, chunks.

A pipeline is a form of the program (`rewrite.stages`), so each one is a search of its
own. A person asks for one with `stages`, or by a mesh axis that is called "stage". By
itself the planner looks at some where the plan that it has does not fit, or waits for
the network for a larger share of a step than a pipeline's bubble would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology, lay
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.rewrite import Stages
from lepton_jax.planner.search.pins import Pins, Request
from lepton_jax.planner.search.problem import Candidate, Problem
from lepton_jax.planner.search.roles import stage_axes
from lepton_jax.planner.search.shapes import staged_meshes

# Micro-batches in flight, over the stages, that are tried where nobody says how many: a
# bubble of a third to a seventeenth of the work. Assumption: more micro-batches have
# too few samples.
FLIGHTS = (2, 4, 8, 16)
# Numbers of micro-batches that are searched for a number of stages. Assumption: each
# search takes seconds, and neighbouring ones are nearly alike.
MOST_FLIGHTS = 2
# Stages that are tried where nobody asks for a pipeline. Assumption: a pipeline crosses
# the slowest links, of which there are few.
COUNTS = (2, 4, 8)
# Micro-batches for which a program is traced to see whether it has a stack.
SOME_PARTS = 2
# numbers that say what a pipeline is: stages, micro-batches in flight, chunks
MOST_NUMBERS = 3


@dataclass(frozen=True)
class Asked:
    """What a person asks of a pipeline; None: the search decides.

    Attributes:
      count, parts, chunks: as in `Stages`.
      outermost: whether the stages have the outermost axis of the mesh.
      batch: samples of which micro-batches in flight are parts.
    """

    count: int | None = None
    parts: int | None = None
    chunks: int | None = None
    outermost: bool = True
    batch: int = 0

    def stages(self, parts: int) -> Stages:
        """Return the pipeline with some micro-batches in flight.

        The devices of an outermost axis have runs of the batch. If each run has
        micro-batches of its own, a device keeps its samples outside of the pipeline.
        """
        assert self.count is not None
        groups = self.count if self.outermost and parts % self.count == 0 else 1
        return Stages(self.count, parts, self.chunks or 1, groups)


def asked(request: Request, trace: Trace, where: str) -> Asked:
    """Check what a person asks of a pipeline.

    Raises:
      PlanError: it is no pipeline, the mesh has another, or the model can't be one.
    """
    own = _read(request.stages, where)
    pieces = request.micro_batches or trace.recipe.micro_batches or 1
    own = replace(own, batch=trace.recipe.batch_size // pieces)
    mesh = request.mesh or {}
    axes = stage_axes(mesh)
    size = 1
    for axis in axes:
        size *= mesh[axis]
    own = replace(own, outermost=axes == list(mesh)[: len(axes)])
    if own.count is None and axes:
        own = replace(own, count=size)
    if own.count is None or own.count == 1:
        return own
    if request.mesh is not None and own.count != size:
        raise PlanError(
            f"{own.count} stages are asked for, and the mesh divides {size}",
            where=where,
            remedy=f'give the mesh an axis "stage" of size {own.count}',
        )
    _check(own, trace, where)
    return own


def options(own: Asked, trace: Trace, topology: Topology) -> list[Stages]:
    """Return the pipelines that fit what a person asks, to search one by one."""
    assert own.count is not None
    batch = own.batch or trace.recipe.batch_size
    if own.parts is not None:
        return [own.stages(own.parts)]
    possible = [own.count * k for k in FLIGHTS if batch % (own.count * k) == 0]
    others = max(1, topology.devices // own.count)
    even = [parts for parts in possible if batch // parts % others == 0]
    flights = (even or possible[:MOST_FLIGHTS] or [1])[-MOST_FLIGHTS:]
    return [own.stages(parts) for parts in flights]


def worth_trying(problem: Problem, best: Candidate) -> list[Stages]:
    """Return the pipelines to try after a search that had none; mostly none.

    Args:
      problem: what was searched.
      best: the best that was found.
    """
    topology = problem.topology
    if topology.platform == "cpu" or problem.pins.meshes or topology.devices == 1:
        return []
    if best.fits and not _slow_outside(topology):
        return []
    waits = best.estimate.seconds["communication"] / best.estimate.total
    pieces = problem.pins.micro_batches or 1
    batch = problem.trace.recipe.batch_size // pieces
    tried = []
    for count in COUNTS:
        if topology.devices % count:
            continue
        own = Asked(count, batch=batch)
        stages = options(own, problem.trace, topology)[-1]
        if stages.parts > 1 and (not best.fits or waits > stages.bubble):
            tried.append(stages)
    # By itself the planner changes no model.
    if not tried or problem.batches.change:
        return []
    layers = problem.trace.stack(SOME_PARTS) if _even(problem.trace) else 0
    return [s for s in tried if layers and layers % s.count == 0]


def staged(pins: Pins, stages: Stages, topology: Topology) -> Pins:
    """Return pins whose mesh has an axis for the stages, outermost if none is named."""
    if stages.count == 1:
        return pins
    if not pins.meshes:
        shapes = tuple(staged_meshes(topology, stages.count))
        return replace(pins, meshes=shapes, stage_axes=1)
    named = stage_axes(dict(zip(pins.axes, pins.meshes[0], strict=True)))
    mask = sum(1 << i for i, axis in enumerate(pins.axes) if axis in named)
    return replace(pins, stage_axes=mask)


# ---- internals ----


def _slow_outside(topology: Topology) -> bool:
    """Whether a network links groups of devices, and not those in a group."""
    half = topology.devices // 2
    if topology.devices % 2 or half < 2:
        return False
    outer = lay({"outer": 2, "inner": half}, topology)["outer"]
    inner = lay({"outer": half, "inner": 2}, topology)["inner"]
    return outer.kind == "network" != inner.kind


def _even(trace: Trace) -> bool:
    return trace.recipe.batch_size % SOME_PARTS == 0


def _read(stages: Any, where: str) -> Asked:
    if stages is None:
        return Asked()
    numbers: Sequence[Any] = stages if isinstance(stages, tuple | list) else (stages,)
    counts = [isinstance(n, int) and not isinstance(n, bool) for n in numbers]
    if not 1 <= len(numbers) <= MOST_NUMBERS or not all(counts):
        raise _no_pipeline(stages, where)
    if min(numbers) < 1:
        raise _no_pipeline(stages, where)
    return Asked(*numbers)


def _no_pipeline(stages: Any, where: str) -> PlanError:
    return PlanError(
        f"stages is {stages!r}",
        where=where,
        remedy=(
            "give a number of stages, or (stages, micro-batches in flight), or these"
            " and the chunks of a stage; 1 stage for no pipeline"
        ),
    )


def _check(own: Asked, trace: Trace, where: str) -> None:
    assert own.count is not None
    batch = own.batch
    chunks = own.chunks or 1
    if own.parts is not None and batch % own.parts:
        raise PlanError(
            f"{own.parts} micro-batches in flight do not divide a batch of {batch}",
            where=where,
            remedy="ask for a whole number that divides it",
        )
    if chunks > 1 and own.parts is not None and own.parts % own.count:
        raise PlanError(
            f"{own.parts} micro-batches in flight do not divide into groups of"
            f" {own.count}, in which they pass through stages with chunks",
            where=where,
            remedy="ask for a multiple of the stages",
        )
    layers = trace.stack(_some_parts(own, batch))
    if not layers:
        raise PlanError(
            "the model has no stack of layers to divide into stages",
            where=where,
            remedy=(
                "run equal layers in one jax.lax.scan that carries activations alone,"
                ' batch dim first (the models here: loop="scan"), or ask for no stages'
            ),
        )
    if layers % (own.count * chunks):
        raise PlanError(
            f"{layers} layers do not divide into {own.count} stages"
            + (f" of {chunks} chunks" if chunks > 1 else ""),
            where=where,
            remedy=f"ask for stages whose number divides {layers}",
        )


def _some_parts(own: Asked, batch: int) -> int:
    if own.parts is not None and own.parts > 1:
        return own.parts
    return next((n for n in range(2, batch + 1) if batch % n == 0), 1)
