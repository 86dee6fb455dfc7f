"""Bounds of a predicted peak: at least 97 % of programs lie below the upper one.

What a program is given (its state, a batch, data that lies on the device) is exact.
Uncertain is what XLA decides: what it writes to memory, when, and where. So a bound is
the exact part, and a multiple of the uncertain one with some bytes for what is small:

    bound = exact + most * uncertain + slack

The figures are in `limits.SURETY`, with the command that computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.search.limits import SURETY, Surety

# Kinds of bytes that XLA doesn't decide.
EXACT = ("params", "optimizer", "variables", "batch", "data")
# Primitives that make a program one of loops.
LOOPS = {"scan", "while"}


class Bounds(NamedTuple):
    """Bytes between which a peak lies.

    Attributes:
      least: 97 % of peaks are above.
      most: 97 % of peaks are below.
    """

    least: int
    most: int


def bounds(
    held: Mapping[str, int],
    platform: str,
    program: str,
) -> Bounds:
    """Return the bounds of a peak.

    Args:
      held: predicted bytes by kind, whose sum is the peak.
      platform: of the topology: "cpu", "tpu" or "cuda".
      program: the kind of the program, see `kind_of`.
    """
    surety = surety_for(platform, program)
    exact = sum(held.get(kind, 0) for kind in EXACT)
    uncertain = sum(held.values()) - exact
    least = exact + surety.least * uncertain - surety.slack
    most = exact + surety.most * uncertain + surety.slack
    return Bounds(int(max(exact, least)), int(most))


def surety_for(platform: str, program: str) -> Surety:
    """Return how sure predictions are of a kind of program on a platform."""
    return SURETY[platform][program]


def kind_of(trace: Trace) -> str:
    """Return the kind of a program: "convolutions", "loops" or "straight"."""
    operations = trace.operations
    if "conv_general_dilated" in operations:
        return "convolutions"
    if LOOPS.intersection(operations):
        return "loops"
    return "straight"
