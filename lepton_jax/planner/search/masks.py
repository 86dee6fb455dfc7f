"""Masks of mesh axes: bit `1 << i` of a mask stands for mesh axis i.

On a mesh of sizes (4, 2) the mask 0b01 splits something in 4 parts, 0b10 in 2, and 0b11
in 8. An assignment has one such mask for each group of `Names` (a group is a named axis
of the model).

>>> [parts((4, 2), mask) for mask in (0b00, 0b01, 0b10, 0b11)]
[1, 4, 2, 8]
"""

from __future__ import annotations

import math

from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.program.named import Names


def has(mask: int, axis: int) -> bool:
    """Whether a mask holds a mesh axis."""
    return bool(mask >> axis & 1)


def parts(
    sizes: tuple[int, ...],
    mask: int,
) -> int:
    """Return the number of parts that a mask splits something in."""
    return math.prod(size for axis, size in enumerate(sizes) if has(mask, axis))


def real_axes(sizes: tuple[int, ...]) -> list[int]:
    """Return the mesh axes that have more than one device."""
    return [axis for axis, size in enumerate(sizes) if size > 1]


def sample_axes(assignment: Assignment, names: Names) -> int:
    """Return the mask of the mesh axes that split the samples."""
    return 0 if names.batch is None else assignment.masks[names.batch]


def split_length(names: Names, assignment: Assignment) -> int:
    """Return the mask of the mesh axes that split the sequence of some kernel."""
    mask = 0
    for group in names.lengths:
        mask |= assignment.masks[group]
    return mask


def divides(
    names: Names,
    group: int,
    count: int,
) -> bool:
    """Whether all extents of a group can be split into `count` parts."""
    return names.groups[group].divisor % count == 0


def nothing_split(
    sizes: tuple[int, ...],
    names: Names,
) -> Assignment:
    """Return the assignment in which each device computes everything."""
    return Assignment(
        sizes,
        masks=(0,) * len(names.groups),
        keep=0,
    )


def by_group_name(
    assignment: Assignment,
    names: Names,
) -> dict[str, int]:
    """Return the mask of each group by its name."""
    group_names = [group.name for group in names.groups]
    return dict(zip(group_names, assignment.masks, strict=True))


def reordered(
    assignment: Assignment,
    old: Names,
    new: Names,
) -> list[int]:
    """Return the masks in the order of other groups with the same names."""
    masks = by_group_name(assignment, old)
    return [masks.get(group.name, 0) for group in new.groups]
