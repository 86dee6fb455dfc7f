"""A plan for other devices than it was made for, in the same forms.

A run that was given a plan may lose hosts and go on with those that are left. The plan
can't: its mesh has another number of devices. So the search is asked for a mesh with
the same axes, the same rematerialization, micro-batches, way of attention and stages;
and for less and less of that where it can't be had.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology
from lepton_jax.planner.planning import plan as search
from lepton_jax.planner.plans import Plan
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.search.roles import sample_axes, stage_axes


def resized(given: Plan, trace: Trace, topology: Topology) -> Plan:
    """Return a plan for a topology that is as much like another plan as possible.

    Pins of single arrays are not kept: a plan holds only what became of them.

    Args:
      given: the plan for other devices.
      trace: of the recipe.
      topology: the devices.

    Raises:
      PlanError: nothing fits.
    """
    for asked in _requests(given, topology.devices):
        try:
            return search(trace, topology, objective=given.objective, **asked)
        except PlanError:
            continue  # less of the given plan may be possible
    return search(trace, topology, objective=given.objective)


def meshes(mesh: Mapping[str, int], devices: int) -> list[dict[str, int]]:
    """Return the meshes of some devices with the axes of another one, nearest first.

    An axis that splits samples may have any size, another one a divisor of its own. The
    axes that split samples change first, then the outer ones.

    >>> meshes({"data": 4, "tensor": 2}, 6)
    [{'data': 3, 'tensor': 2}, {'data': 6}]
    >>> meshes({"sequence": 8}, 4), meshes({"stage": 4}, 3)
    ([{'sequence': 4}], [])
    """
    samples = sample_axes(mesh)
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    possible = [
        [n for n in divisors if name in samples or size % n == 0]
        for name, size in mesh.items()
    ]
    every = itertools.product(*possible)
    found = [sizes for sizes in every if math.prod(sizes) == devices]

    inner_first = list(mesh)[::-1]
    order = [name for name in inner_first if name not in samples]
    order += [name for name in inner_first if name in samples]

    def change(own: Mapping[str, int]) -> list[float]:
        """Return by how much each axis changes, the first to stay first."""
        return [abs(math.log(own[name] / mesh[name])) for name in order]

    named = [dict(zip(mesh, sizes, strict=True)) for sizes in found]
    named.sort(key=change)
    return [_without_ones(own) for own in named]


# ---- internals ----


def _without_ones(mesh: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in mesh.items() if size > 1}


def _requests(given: Plan, devices: int) -> Iterator[dict[str, Any]]:
    """Give what the search is asked for, most of the given plan first."""
    kept = {"remat": given.remat, "micro_batches": given.micro_batches}
    flags = {"flags": given.flags} if given.flags else {}
    alike = [mesh for mesh in meshes(given.mesh, devices) if mesh]
    for mesh in alike[:1]:
        asked = {"mesh": mesh, **flags, **_forms(given, mesh)}
        yield asked | kept
        yield asked
    yield kept | flags


def _forms(given: Plan, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Return the forms of a plan that a smaller mesh can have."""
    forms: dict[str, Any] = {}
    if given.context:
        forms["context"] = given.context
    count = math.prod(mesh[axis] for axis in stage_axes(mesh))
    if count > 1:
        forms["stages"] = (count, given.stage_parts, given.stage_chunks)
    return forms
