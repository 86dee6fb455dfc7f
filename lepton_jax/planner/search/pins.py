"""What the user fixes before the search: specs of arrays, the mesh, rematerialization,
micro-batches.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import PartitionSpec

from lepton_jax.errors import PlanError, nearest
from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.program.layout import Spec
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.remat import POLICIES
from lepton_jax.planner.program.trace import Trace


@dataclass(frozen=True)
class Pins:
    """Checked pins.

    Attributes:
      meshes: the only mesh sizes that may be searched; empty: all.
      axes: names of the pinned mesh's axes.
      groups: name of a named axis to the mesh axes that split it, apart from those that
        split the batch.
      storage: parameter's path to the spec with which it is kept.
      remat, micro_batches: None: the search decides.
    """

    meshes: tuple[tuple[int, ...], ...] = ()
    axes: tuple[str, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    storage: Mapping[str, Spec] = field(default_factory=dict)
    remat: str | None = None
    micro_batches: int | None = None

    def force(
        self,
        assignment: Assignment,
        names: Names,
    ) -> Assignment:
        """The assignment with pinned named axes as they are pinned."""
        if not self.groups:
            return assignment
        batch = 0 if names.batch is None else assignment.masks[names.batch]
        masks = [
            (
                self.groups[g.name] & ~(batch if k != names.batch else 0)
                if g.name in self.groups
                else mask
            )
            for k, (g, mask) in enumerate(
                zip(names.groups, assignment.masks, strict=True)
            )
        ]
        return replace(assignment, masks=tuple(masks))


def read(
    trace: Trace,
    topology: Topology,
    names: Names,
    pins: Mapping[str, Any] | None,
    mesh: Mapping[str, int] | None,
    remat: str | None,
    micro_batches: int | None,
) -> Pins:
    """Check what the user asks for.

    Raises:
      PlanError: a pattern matches nothing, an axis isn't in the mesh, sizes don't
        multiply up or don't divide.
    """
    where = f"plan for {topology.name}"
    if remat is not None and remat not in POLICIES:
        raise PlanError(
            f"remat {remat!r} is not known{nearest(str(remat), POLICIES)}",
            where=where,
            remedy=f"use one of {', '.join(POLICIES)}",
        )
    asked = trace.recipe.micro_batches if micro_batches is None else micro_batches
    if asked is not None and (
        isinstance(asked, bool)
        or not isinstance(asked, int)
        or asked < 1
        or trace.recipe.batch_size % asked
    ):
        raise PlanError(
            f"{asked!r} micro-batches do not divide a batch of"
            f" {trace.recipe.batch_size}",
            where=where,
            remedy="ask for a whole number that divides batch_size",
        )
    if mesh is None:
        if pins:
            raise PlanError(
                "pins name mesh axes, but no mesh is given",
                where=where,
                remedy='give the mesh besides, e.g. mesh={"fsdp": 8, "tensor": 4}',
            )
        return Pins(remat=remat, micro_batches=asked)
    sizes = tuple(mesh.values())
    for name, n in mesh.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise PlanError(
                f"mesh axis {name!r} has size {n!r}",
                where=where,
                remedy="give whole numbers of at least 1",
            )
    if math.prod(sizes) != topology.devices:
        raise PlanError(
            f"the mesh {' x '.join(f'{k}={v}' for k, v in mesh.items())} has"
            f" {math.prod(sizes)} places, and {topology.name} has {topology.devices}"
            " devices",
            where=where,
            remedy=f"let the sizes multiply to {topology.devices}",
        )
    groups, storage = _pinned(
        names,
        pins or {},
        mesh,
        where,
    )
    return Pins(
        (sizes,),
        tuple(mesh),
        groups,
        storage,
        remat,
        asked,
    )


def _pinned(
    names: Names,
    pins: Mapping[str, Any],
    mesh: Mapping[str, int],
    where: str,
) -> tuple[dict[str, int], dict[str, Spec]]:
    bits = {name: 1 << i for i, name in enumerate(mesh)}
    params = {
        p.removeprefix("params/"): i
        for i, p in enumerate(names.paths)
        if p.startswith("params/")
    }
    params |= {
        p: i for i, p in enumerate(names.paths) if p.startswith(("inputs", "targets"))
    }
    found: dict[str, int] = {}
    storage: dict[str, Spec] = {}
    for pattern, spec in pins.items():
        matched = [p for p in params if _matches(p, pattern)]
        if not matched:
            raise PlanError(
                f"the pin {pattern!r} matches no"
                f" parameter{nearest(pattern.rsplit('/', 1)[-1], _last(params))}",
                where=where,
                remedy="parameters are "
                + ", ".join(
                    sorted(
                        {
                            names.patterns[i].removeprefix("params/")
                            for i in params.values()
                        }
                    )[:12]
                ),
            )
        for path in matched:
            value = names.graph.main.inputs[params[path]]
            _check_form(pattern, spec, where)
            if len(spec) > len(value.shape):
                raise PlanError(
                    f"the pin {pattern!r} has {len(spec)} entries, and {path} has shape"
                    f" {value.shape}",
                    where=where,
                    remedy=f"give at most {len(value.shape)} entries",
                )
            masks = [
                _mask(
                    pattern,
                    path,
                    d,
                    entry,
                    value.shape[d],
                    mesh,
                    bits,
                    where,
                )
                for d, entry in enumerate(spec)
            ]
            storage[names.paths[params[path]]] = tuple(masks) + (0,) * (
                len(value.shape) - len(masks)
            )
            for d, mask in enumerate(masks):
                k = names.of.get(names.graph.find(value.nodes[d]))
                if not mask or k is None:
                    continue
                group = names.groups[k]
                count = math.prod(n for a, n in mesh.items() if bits[a] & mask)
                parameter = names.paths[params[path]].startswith("params/")
                if parameter and group.divisor % count:
                    continue  # kept in parts and gathered where it is used
                if found.get(group.name, mask) != mask:
                    raise PlanError(
                        f"pins disagree on the named axis {group.name}, which {path}"
                        f" has as dim {d}",
                        where=where,
                        remedy="pin dims that are one thing alike",
                    )
                if group.divisor % count:
                    raise PlanError(
                        f"the pin {pattern!r} splits the named axis {group.name} over"
                        f" {count}, but its extents have only {group.divisor} in"
                        " common",
                        where=where,
                        remedy=f"use an axis whose size divides {group.divisor}",
                    )
                found[group.name] = mask
    return found, storage


def _check_form(
    pattern: str,
    spec: Any,
    where: str,
) -> None:
    listed = isinstance(spec, tuple | list | PartitionSpec)
    parts = list(spec) if listed else [spec]
    axes = [
        a
        for part in parts
        for a in (part if isinstance(part, tuple | list) else (part,))
        if a is not None
    ]
    twice = next((a for a in axes if axes.count(a) > 1), None)
    if not listed or any(not isinstance(a, str) for a in axes):
        raise PlanError(
            f"the pin {pattern!r} is {spec!r}, and no PartitionSpec",
            where=where,
            remedy=(
                "give an entry a dim: a mesh axis, a tuple of them, or None, e.g."
                ' P(None, "tensor")'
            ),
        )
    if twice:
        raise PlanError(
            f"the pin {pattern!r} has the mesh axis {twice!r} twice",
            where=where,
            remedy="split one dim alone by an axis",
        )


def _mask(
    pattern: str,
    path: str,
    d: int,
    entry: Any,
    extent: int,
    mesh: Mapping[str, int],
    bits: Mapping[str, int],
    where: str,
) -> int:
    axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    for axis in axes:
        if axis not in bits:
            raise PlanError(
                f"the pin {pattern!r} names the mesh axis"
                f" {axis!r}{nearest(str(axis), bits)}",
                where=where,
                remedy=f"the mesh has {', '.join(bits)}",
            )
    count = math.prod(mesh[a] for a in axes)
    if extent % count:
        raise PlanError(
            f"the pin {pattern!r} splits dim {d} of {path} over {count} devices:"
            f" {extent} / {count} is {extent / count:.4g}",
            where=where,
            remedy="choose an axis whose size divides the dim",
        )
    return sum(bits[a] for a in axes)


def _matches(path: str, pattern: str) -> bool:
    """As in a shell, "**/" also for no folder at all."""
    return fnmatch.fnmatchcase(path, pattern) or (
        pattern.startswith("**/") and fnmatch.fnmatchcase(path, pattern[3:])
    )


def _last(params: Mapping[str, int]) -> list[str]:
    return sorted({part for p in params for part in p.split("/")})
