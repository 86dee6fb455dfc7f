"""Pins: what the user fixes before the search.

A person may fix the mesh, the specs with which parameters are kept, rematerialization
and micro-batches. `read` checks all of it before anything is searched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import PartitionSpec

from lepton_jax.errors import PlanError, nearest
from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.patience import LIMIT_SECONDS
from lepton_jax.planner.plans import CONTEXTS
from lepton_jax.planner.program import keeping
from lepton_jax.planner.program.graph import Value
from lepton_jax.planner.program.layout import Spec
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.remat import POLICIES
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.search.limits import LISTED_PARAMETERS
from lepton_jax.planner.search.masks import divides, parts, sample_axes
from lepton_jax.trees import matches


@dataclass(frozen=True)
class Request:
    """The user's settings for a search, unchecked: see `planning.plan`."""

    objective: str = "time"
    mesh: Mapping[str, int] | None = None
    pins: Mapping[str, Any] | None = None
    remat: str | None = None
    micro_batches: int | None = None
    stages: Any = None
    time_limit: float | None = LIMIT_SECONDS
    context: str | None = None
    flags: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Pins:
    """Checked pins.

    Attributes:
      meshes: the only mesh sizes that may be searched; empty: all.
      axes: names of the pinned mesh's axes.
      groups: name of a named axis to the mesh axes that split it, apart from those that
        split the batch.
      storage: parameter's path to the spec with which it is kept.
      remat, micro_batches, context: None: the search decides.
      flags: XLA's, as in `Plan`; None: those that are good for the backend.
      stage_axes: mask of the mesh axes over which the stages of a pipeline are divided.
    """

    meshes: tuple[tuple[int, ...], ...] = ()
    axes: tuple[str, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    storage: Mapping[str, Spec] = field(default_factory=dict)
    remat: str | None = None
    micro_batches: int | None = None
    stage_axes: int = 0
    context: str | None = None
    flags: Mapping[str, Any] | None = None

    def force(
        self,
        assignment: Assignment,
        names: Names,
    ) -> Assignment:
        """Return the assignment with pinned named axes as they are pinned."""
        if not self.groups and not self.stage_axes:
            return assignment

        samples = sample_axes(assignment, names)
        masks = list(assignment.masks)
        for k in range(len(masks)):
            if k in names.stages:
                masks[k] = self.stage_axes
            elif k not in names.samples:
                masks[k] &= ~self.stage_axes
        for k, group in enumerate(names.groups):
            if group.name in self.groups:
                taken = 0 if k in (names.batch, *names.stages) else samples
                pinned = self.groups[group.name]
                masks[k] = pinned & ~taken
        self._divide_parts(assignment, masks, names)
        return replace(assignment, masks=tuple(masks))

    def _divide_parts(
        self,
        assignment: Assignment,
        masks: list[int],
        names: Names,
    ) -> None:
        """Divide the samples of a micro-batch like the batch, but not over stages."""
        if not self.stage_axes or names.batch is None:
            return
        mask = masks[names.batch] & ~self.stage_axes
        pieces = assignment.counts[mask] * (self.micro_batches or 1)
        for k in names.samples - {names.batch}:
            fits = divides(names, k, pieces)
            masks[k] = mask if fits else 0


def read(
    request: Request,
    trace: Trace,
    topology: Topology,
    names: Names,
) -> Pins:
    """Check what the user asks for.

    Raises:
      PlanError: a pattern matches nothing, an axis isn't in the mesh, sizes don't
        multiply up or don't divide.
    """
    where = f"plan for {topology.name}"
    _check_context(request.context, where)
    _check_remat(request.remat, trace, where)
    micro_batches = request.micro_batches
    if micro_batches is None:
        micro_batches = trace.recipe.micro_batches
    if micro_batches is not None:
        _check_micro_batches(micro_batches, trace.recipe.batch_size, where)

    if request.mesh is None:
        if request.pins:
            raise PlanError(
                "pins name mesh axes, but no mesh is given",
                where=where,
                remedy='give the mesh as well, e.g. mesh={"fsdp": 8, "tensor": 4}',
            )
        return Pins(
            remat=request.remat,
            micro_batches=micro_batches,
            context=request.context,
            flags=request.flags,
        )

    _check_mesh(request.mesh, topology, where)
    reader = _Reader(names, request.mesh, where)
    pins = request.pins or {}
    for pattern, spec in pins.items():
        reader.pin(pattern, spec)
    sizes = tuple(request.mesh.values())
    return Pins(
        meshes=(sizes,),
        axes=tuple(request.mesh),
        groups=reader.groups,
        storage=reader.storage,
        remat=request.remat,
        micro_batches=micro_batches,
        context=request.context,
        flags=request.flags,
    )


# ---- checks of single settings ----


def _check_remat(remat: str | None, trace: Trace, where: str) -> None:
    if remat is None or remat in POLICIES:
        return
    if not isinstance(remat, str) or not keeping.is_keeping(remat):
        raise PlanError(
            f"remat {remat!r} is not known{nearest(str(remat), POLICIES)}",
            where=where,
            remedy=f"use one of {', '.join(POLICIES)}, or 'keep' and what is kept, such"
            " as 'keep attention,0-2 and offload 3', as a plan shows it",
        )
    kept = keeping.keeping_of(remat)
    twice = {*kept.always, *kept.first} & {*kept.host}
    if twice:
        raise PlanError(
            f"remat {remat!r} has {_written(min(twice))} in two places",
            where=where,
            remedy="name it once: what is offloaded is kept, too",
        )
    known = [value.key for value in trace.keepable()]
    missing = [key for key in kept.keys if key not in known]
    if missing:
        raise PlanError(
            f"remat {remat!r} keeps {_written(missing[0])}, which the model has not",
            where=where,
            remedy=f"keep some of {', '.join(map(_written, known))}"
            if known
            else f"use one of {', '.join(POLICIES)}: the model has no products",
        )


def _written(key: keeping.Key) -> str:
    """Return what a policy keeps, in words."""
    return f"product {key}" if isinstance(key, int) else key


def _check_context(context: str | None, where: str) -> None:
    if context is not None and context not in CONTEXTS:
        raise PlanError(
            f"context {context!r} is not known{nearest(str(context), CONTEXTS)}",
            where=where,
            remedy=f"use one of {', '.join(CONTEXTS)}",
        )


def _check_micro_batches(
    parts: Any,
    batch_size: int,
    where: str,
) -> None:
    if not _is_count(parts) or batch_size % parts:
        raise PlanError(
            f"{parts!r} micro-batches do not divide a batch of {batch_size}",
            where=where,
            remedy="ask for a whole number that divides batch_size",
        )


def _check_mesh(
    mesh: Mapping[str, int],
    topology: Topology,
    where: str,
) -> None:
    for name, size in mesh.items():
        if not _is_count(size):
            raise PlanError(
                f"mesh axis {name!r} has size {size!r}",
                where=where,
                remedy="give whole numbers of at least 1",
            )

    places = math.prod(mesh.values())
    if places != topology.devices:
        axes = [f"{name}={size}" for name, size in mesh.items()]
        spelled = " x ".join(axes)
        raise PlanError(
            f"the mesh {spelled} has {places} places, and {topology.name} has"
            f" {topology.devices} devices",
            where=where,
            remedy=f"let the sizes multiply to {topology.devices}",
        )


def _is_count(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return value >= 1


# ---- specs of arrays ----


class _Reader:
    """Reads pins of arrays for one mesh.

    Attributes:
      groups: name of a named axis to the mesh axes that split it.
      storage: parameter's path to the spec with which it is kept.
    """

    def __init__(
        self,
        names: Names,
        mesh: Mapping[str, int],
        where: str,
    ):
        self.groups: dict[str, int] = {}
        self.storage: dict[str, Spec] = {}
        self._names = names
        self._mesh = mesh
        self._bits = {name: 1 << i for i, name in enumerate(mesh)}
        self._where = where
        self._indices = _indices(names)

    def pin(self, pattern: str, spec: Any) -> None:
        """Note one pin for all arrays that its pattern matches."""
        paths = self._indices
        matched = [path for path in paths if matches(path, pattern)]
        if not matched:
            raise self._unmatched(pattern)
        for path in matched:
            self._pin_array(pattern, path, spec)

    def _unmatched(self, pattern: str) -> PlanError:
        words: set[str] = set()
        patterns: set[str] = set()
        for path, index in self._indices.items():
            words.update(path.split("/"))
            known_pattern = self._names.patterns[index]
            patterns.add(known_pattern.removeprefix("params/"))

        last = pattern.rpartition("/")[2]
        similar = nearest(last, sorted(words))
        known = sorted(patterns)
        return PlanError(
            f"the pin {pattern!r} matches no parameter{similar}",
            where=self._where,
            remedy="parameters are " + ", ".join(known[:LISTED_PARAMETERS]),
        )

    def _pin_array(
        self,
        pattern: str,
        path: str,
        spec: Any,
    ) -> None:
        index = self._indices[path]
        value = self._names.graph.main.inputs[index]
        shape = self._names.shape(index)
        _check_form(pattern, spec, self._where)
        if len(spec) > len(shape):
            raise PlanError(
                f"the pin {pattern!r} has {len(spec)} entries, and {path} has shape"
                f" {shape}",
                where=self._where,
                remedy=f"give at most {len(shape)} entries",
            )

        masks = []
        for dim, entry in enumerate(spec):
            axes = _axes(entry)
            self._check_axes(pattern, axes)
            self._check_divides(pattern, path, dim, shape[dim], axes)
            mask = sum(self._bits[axis] for axis in axes)
            masks.append(mask)

        not_named = len(shape) - len(masks)
        full_path = self._names.paths[index]
        self.storage[full_path] = (*masks, *(0,) * not_named)
        for dim, mask in enumerate(masks):
            if mask:
                self._pin_group(pattern, path, value, dim, mask)

    def _check_axes(
        self,
        pattern: str,
        axes: tuple[str, ...],
    ) -> None:
        for axis in axes:
            if axis not in self._bits:
                raise PlanError(
                    f"the pin {pattern!r} names the mesh axis"
                    f" {axis!r}{nearest(str(axis), self._bits)}",
                    where=self._where,
                    remedy=f"the mesh has {', '.join(self._bits)}",
                )

    def _check_divides(
        self,
        pattern: str,
        path: str,
        dim: int,
        extent: int,
        axes: tuple[str, ...],
    ) -> None:
        count = math.prod(self._mesh[axis] for axis in axes)
        if extent % count:
            raise PlanError(
                f"the pin {pattern!r} splits dim {dim} of {path} over {count} devices:"
                f" {extent} / {count} is {extent / count:.4g}",
                where=self._where,
                remedy="choose an axis whose size divides the dim",
            )

    def _pin_group(
        self,
        pattern: str,
        path: str,
        value: Value,
        dim: int,
        mask: int,
    ) -> None:
        """Split the named axis of a dim in computing, too, if all its extents allow."""
        names = self._names
        root = names.graph.find(value.nodes[dim])
        k = names.of.get(root)
        if k is None:
            return

        group = names.groups[k]
        count = parts(tuple(self._mesh.values()), mask)
        is_split = divides(names, k, count)
        index = self._indices[path]
        is_parameter = names.paths[index].startswith("params/")
        # such a parameter is kept in parts and gathered where it is used
        if is_parameter and not is_split:
            return

        before = self.groups.get(group.name, mask)
        if before != mask:
            raise PlanError(
                f"pins disagree on the named axis {group.name}, which {path}"
                f" has as dim {dim}",
                where=self._where,
                remedy="pin dims that are one thing alike",
            )
        if not is_split:
            raise PlanError(
                f"the pin {pattern!r} splits the named axis {group.name} over"
                f" {count}, but its extents have only {group.divisor} in common",
                where=self._where,
                remedy=f"use an axis whose size divides {group.divisor}",
            )
        self.groups[group.name] = mask


def _indices(names: Names) -> dict[str, int]:
    """Return the number of each parameter and input by its path, parameters first."""
    params = {
        path.removeprefix("params/"): i
        for i, path in enumerate(names.paths)
        if path.startswith("params/")
    }
    inputs = {
        path: i
        for i, path in enumerate(names.paths)
        if path.startswith(("inputs", "targets"))
    }
    return params | inputs


def _check_form(
    pattern: str,
    spec: Any,
    where: str,
) -> None:
    is_list = isinstance(spec, tuple | list | PartitionSpec)
    entries = list(spec) if is_list else [spec]
    axes: list[Any] = []
    for entry in entries:
        if isinstance(entry, tuple | list):
            axes += entry
        else:
            axes.append(entry)
    axes = [axis for axis in axes if axis is not None]

    all_names = all(isinstance(axis, str) for axis in axes)
    if not is_list or not all_names:
        raise PlanError(
            f"the pin {pattern!r} is {spec!r}, and no PartitionSpec",
            where=where,
            remedy=(
                "give an entry a dim: a mesh axis, a tuple of them, or None, e.g."
                ' P(None, "tensor")'
            ),
        )
    twice = [axis for axis in axes if axes.count(axis) > 1]
    if twice:
        raise PlanError(
            f"the pin {pattern!r} has the mesh axis {twice[0]!r} twice",
            where=where,
            remedy="split one dim alone by an axis",
        )


def _axes(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a spec."""
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry)
