"""Bounds of a predicted peak: at least 97 % of programs lie below the upper one.

What a program is given (its state, a batch, data that lies on the device) is exact.
Uncertain is what XLA decides: what it writes to memory, when, and where. So a bound is
the exact part, and a multiple of the uncertain one with some bytes for what is small:

    bound = exact + most * uncertain + slack

The figures are in `limits.SURETY`, with the command that computes them.

    >>> held = {"params": 1000, "activations": 400 * 2**20}
    >>> bounds(held, Surety(0.75, 1.25, 2**20))
    Bounds(least=313525224, most=525337576)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.search.limits import SURETY, Surety
from lepton_jax.planner.search.masks import has, real_axes, sample_axes

# Kinds of bytes that XLA doesn't decide.
EXACT = ("params", "optimizer", "variables", "batch", "data")


class Bounds(NamedTuple):
    """Bytes between which a peak lies.

    Attributes:
      least: 97 % of peaks are above.
      most: 97 % of peaks are below.
    """

    least: int
    most: int


NOT_KNOWN = Bounds(0, 0)


def bounds(held: Mapping[str, int], surety: Surety) -> Bounds:
    """Return the bounds of a peak.

    Args:
      held: predicted bytes by kind, whose sum is the peak.
      surety: how sure the uncertain ones are.
    """
    exact = sum(held.get(kind, 0) for kind in EXACT)
    uncertain = sum(held.values()) - exact
    least = exact + surety.least * uncertain - surety.slack
    most = exact + surety.most * uncertain + surety.slack
    return Bounds(int(max(exact, least)), int(most))


def surety_of(
    platform: str,
    names: Names,
    assignment: Assignment,
    attention: str,
) -> Surety:
    """Return how sure predictions are of an assignment on a platform.

    Where mesh axes split more than the samples, XLA may hold whole what the plan has
    in parts. Of models over long sequences, whose attention is a kernel, most of the
    memory is what layers keep, of which XLA decides little.

    Args:
      platform: of the devices.
      names: named axes of the program.
      assignment: how it is split.
      attention: the kernel of its attention, as in `Forms`.
    """
    if attention in SURETY[platform]:
        return SURETY[platform][attention]
    samples = sample_axes(assignment, names)
    axes = real_axes(assignment.sizes)
    more = any(not has(samples, axis) for axis in axes)
    return SURETY[platform]["more" if more else "samples"]
