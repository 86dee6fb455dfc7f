"""Families that are judged apart from the others, each with its own two halves.

The other families were split into halves before there was what these are made of. Of
each of these, programs with an even number tune, the others judge.

    >>> names("long", "tuning", 3)
    [('long', 0), ('long', 2), ('long', 4)]
    >>> names("long", "judging", 2, first=20)
    [('long', 41), ('long', 43)]
"""

from __future__ import annotations

from tools.bench.families.split import HALVES

# The family's module, and what its programs are.
FAMILIES = {
    "long": "language models over long sequences",
    "dropless": "mixtures of experts that drop no token",
    "rings": "language models whose keys and values go around a ring",
    "stages": "language models in pipelines",
}


def names(family: str, half: str, count: int, first: int = 0) -> list[tuple[str, int]]:
    """Return the names of programs of a family's half.

    Args:
      family: one of `FAMILIES`.
      half: "tuning" or "judging".
      count: number of programs.
      first: place of the first one in the half; judged programs are new where earlier
        ones are passed over.
    """
    offset = HALVES.index(half)
    return [(family, 2 * (first + i) + offset) for i in range(count)]
