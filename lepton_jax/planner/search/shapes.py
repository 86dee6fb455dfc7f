"""Starting points of the search: mesh shapes, and the layouts that experts write.

On a mesh of (4, 2) devices and a model with a batch and a sequence, the layouts are:
the batch over the outer axis alone, with the state kept whole or in parts; the same
with the sequence over the inner axis; and the batch over both, with the state kept in
parts over the inner one (hybrid FSDP).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import Assignment, expert_groups
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.search.limits import (
    LIKELY_INNER_LOG2,
    MOST_INNER,
    MOST_MESHES,
    MOST_PAIRS,
    SMALL_MESH,
)
from lepton_jax.planner.search.masks import divides, parts
from lepton_jax.planner.search.problem import Problem

# sizes of the mesh axes, outermost first
Sizes = tuple[int, ...]
# masks of mesh axes by group, and the mask over which the state is kept in parts
Start = tuple[dict[int, int], int]


# ---- mesh shapes ----


def meshes(topology: Topology) -> list[Sizes]:
    """Return factorizations of the devices into at most three axes, likelier first.

    >>> from lepton_jax.hardware import topology
    >>> meshes(topology("h200:8"))
    [(8,), (4, 2), (2, 4), (2, 2, 2)]
    """
    devices = topology.devices
    if devices == 1:
        return [(1,)]

    pairs: list[Sizes] = [*_pairs(devices)]
    triples = [
        (outer, middle, inner)
        for outer, rest in _pairs(devices)
        for middle, inner in _pairs(rest)
        if outer >= middle >= inner and inner <= MOST_INNER
    ]
    triples.sort(key=_unlikely)
    likely = [
        (devices,),
        *_over_slices(topology),
        *pairs[:MOST_PAIRS],
        *triples,
    ]
    return list(dict.fromkeys(likely))[:MOST_MESHES]


def _over_slices(topology: Topology) -> Iterator[Sizes]:
    """Yield meshes whose outer axis is the slices, since the network is slow.

    >>> from lepton_jax.hardware import topology
    >>> list(_over_slices(topology("2*v5e:2x2")))
    [(2, 4), (2, 2, 2)]
    """
    if topology.slices == 1:
        return
    inside = topology.devices // topology.slices
    yield topology.slices, inside
    for outer, inner in _pairs(inside):
        if outer >= inner:
            yield topology.slices, outer, inner


def staged_meshes(topology: Topology, stages: int) -> list[Sizes]:
    """Return mesh sizes whose outermost axis is that of the stages.

    >>> from lepton_jax.hardware import topology
    >>> staged_meshes(topology("h200:8"), 2)
    [(2, 4), (2, 2, 2)]
    """
    rest = topology.devices // stages
    if rest == 1:
        return [(stages,)]
    return [(stages, rest), *((stages, *pair) for pair in _pairs(rest))][:MOST_MESHES]


def _pairs(count: int) -> list[tuple[int, int]]:
    """Return all (a, b) with a * b = count and both above 1, the largest a first."""
    divisors = [k for k in range(2, count) if count % k == 0]
    return [(count // k, k) for k in divisors]


def _unlikely(shape: tuple[int, int, int]) -> tuple[float, int]:
    outer, _, inner = shape
    return abs(math.log2(inner) - LIKELY_INNER_LOG2), -outer


# ---- starting points ----


def starts(
    problem: Problem,
    sizes: Sizes,
) -> Iterator[Assignment]:
    """Yield the layouts that experts write for a mesh of these sizes.

    They are data parallelism, FSDP, both with an axis left for others, experts,
    sequences, and rows of embeddings; those whose extents do not divide are left out.
    """
    names = problem.names("none")
    for masks, keep in _layouts(problem, sizes):
        if not all(divides(names, k, parts(sizes, m)) for k, m in masks.items()):
            continue
        groups = range(len(names.groups))
        full = tuple(masks.get(k, 0) for k in groups)
        start = Assignment(sizes, full, keep)
        yield problem.pins.force(start, names)


def _layouts(
    problem: Problem,
    sizes: Sizes,
) -> Iterator[Start]:
    names = problem.names("none")
    every = (1 << len(sizes)) - 1
    batch = names.batch
    if batch is None:
        yield {}, every
        yield {}, 0
        return

    if problem.pins.stage_axes:
        yield from _stages(names, batch, len(sizes), problem.pins.stage_axes)
        return
    if len(sizes) == 1 or problem.pins.meshes:
        yield from _batch_everywhere(names, batch, every)
    if len(sizes) == 1:
        yield from _one_axis(names, every)
    else:
        small = problem.topology.devices <= SMALL_MESH
        yield from _last_axis_free(names, batch, len(sizes), small)
    if len(sizes) == 3:
        yield {batch: 1}, 1
    yield from _experts(names, batch, len(sizes))


def _batch_everywhere(
    names: Names,
    batch: int,
    every: int,
) -> Iterator[Start]:
    """Yield data parallelism, FSDP, and rows of embeddings."""
    yield {batch: every}, 0
    yield {batch: every}, every
    if names.rows:
        looked_up = dict.fromkeys(names.rows, every)
        yield {batch: every, **looked_up}, 0


def _one_axis(
    names: Names,
    every: int,
) -> Iterator[Start]:
    """Yield an idle axis, and one that splits a sequence."""
    yield {}, 0
    for k in sequences(names):
        yield {k: every}, every


def _last_axis_free(
    names: Names,
    batch: int,
    count: int,
    small: bool,
) -> Iterator[Start]:
    """Yield the batch over all axes but the last, which others may have."""
    every = (1 << count) - 1
    last = 1 << (count - 1)
    outer = every & ~last

    yield {batch: outer}, outer
    for k in sequences(names):
        yield {batch: outer, k: last}, every
    yield {batch: every}, last
    if small:
        yield {}, 0
        yield {batch: last}, 0


def _experts(
    names: Names,
    batch: int,
    count: int,
) -> Iterator[Start]:
    """Yield experts over the last axis, with and without the batch along it."""
    every = (1 << count) - 1
    last = 1 << (count - 1)
    outer = every & ~last

    for k in expert_groups(names):
        yield {batch: every, k: last}, outer
        if count > 1:
            yield {batch: outer, k: last}, outer


def _stages(
    names: Names,
    batch: int,
    count: int,
    stages: int,
) -> Iterator[Start]:
    """Yield stages over their axes, the batch over these and others, or others alone.

    The last of two other axes is also left free.
    """
    every = (1 << count) - 1
    others = every & ~stages
    last = 1 << (count - 1) & others
    layers = dict.fromkeys(names.stages, stages)
    for samples in (every, others, every & ~last, others & ~last):
        for keep in dict.fromkeys((0, others & samples, others, every)):
            yield {**layers, batch: samples}, keep


def sequences(names: Names) -> list[int]:
    """Return the groups of inputs' later dims that no parameter has."""
    groups = []
    for k, group in enumerate(names.groups):
        is_later = all(_later_input(names, i, dim) for i, dim in group.members)
        if is_later and k not in names.samples:
            groups.append(k)
    return groups


def _later_input(
    names: Names,
    index: int,
    dim: int,
) -> bool:
    path = names.paths[index]
    return dim > 0 and path.startswith(("inputs", "targets"))
