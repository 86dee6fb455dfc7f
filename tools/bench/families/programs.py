"""Programs to try the planner on: a family's case, a topology and a batch size.

A program is named by its family and a number, and both together are its seed: the same
name is the same program on each machine and at each commit. How large its batch is must
not depend on what the planner predicts, since a changed rule would change the programs.
So a batch is chosen by the bytes that the loss computes for a sample, fused or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lepton_jax as lepton
from tools.bench.families.case import Case
from tools.bench.families.draw import Draw
from tools.bench.families.split import load

TPUS = (
    "v5e:2x2",
    "v5e:4x4",
    "v5e:2x4",
    "v6e:2x2",
    "v6e:4x4",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v4:2x2x1",
)
CPUS = (
    "cpu:1",
    "cpu:2",
    "cpu:3",
    "cpu:4",
    "cpu:6",
    "cpu:7",
    "cpu:8",
)
# Bytes that the forward pass computes, in units of the memory of all devices. A plan
# without rematerialization keeps about a fifth to a half of them.
LEAST_FILLED = 0.2
MOST_FILLED = 6.0
# No dim is as large, and no other dim is a multiple of it.
MARK = 4093
GREATEST_BATCH = 2**20
# Shares of batches that are a power of 2, or else a multiple of the devices
# (assumption: the rest is as good as never seen).
POWERS = 0.7
MULTIPLES = 0.2


@dataclass(frozen=True)
class Drawn:
    """A program to plan and compile.

    Attributes:
      family, number: its name.
      topology: where it runs.
      case: what it computes, with its batch size.
    """

    family: str
    number: int
    topology: str
    case: Case


def names(
    families: Sequence[str],
    count: int,
) -> list[tuple[str, int]]:
    """Return the names of programs, each family as often as the others.

    Args:
      families: their names.
      count: number of programs.
    """
    return [(families[i % len(families)], i // len(families)) for i in range(count)]


def draw(family: str, number: int) -> Drawn:
    """Draw the program of a name."""
    random = Draw(f"memory/{family}/{number}")
    topology = random.choice(random.choice((TPUS, CPUS)))
    case = load(family)(random)
    filled = random.between(LEAST_FILLED, MOST_FILLED)
    where = lepton.topology(topology)
    room = filled * where.device.memory * where.devices
    batch_size = _rounded(random, batch_for(case, room), where.devices)
    if case.most is not None:
        batch_size = min(batch_size, case.most)
    return Drawn(family, number, topology, replace(case, batch_size=batch_size))


def batch_for(case: Case, room: float) -> int:
    """Return the batch for which the loss computes about as many bytes as `room`."""
    linear, square = forward_bytes(case)
    if square:
        root = math.sqrt(linear**2 + 4 * square * room)
        size = (root - linear) / (2 * square)
    else:
        size = room / linear
    return min(GREATEST_BATCH, max(1, round(size)))


def forward_bytes(case: Case) -> tuple[float, float]:
    """Count the bytes that the loss computes: for a sample, and for a pair of them.

    Each result of each operation counts, as often as its loop turns, whether XLA would
    write it or not. The batch is a prime, by which its dims are known.
    """
    traced = lepton.trace(case.recipe(MARK), case.inputs, case.targets)
    assert traced.jaxpr is not None  # there are inputs
    totals = [0.0, 0.0, 0.0]
    _count(traced.jaxpr.jaxpr, 1, totals)
    return totals[1], totals[2]


# ---- internals ----


def _count(
    jaxpr: Any,
    turns: int,
    totals: list[float],
) -> None:
    """Add bytes of a batch, divided by it as often as it is among an array's dims."""
    for eqn in jaxpr.eqns:
        inner_turns = turns * eqn.params.get("length", 1)
        inner = [_inner(p) for p in eqn.params.values()]
        bodies = [body for body in inner if body is not None]
        for body in bodies:
            _count(body, inner_turns, totals)
        if bodies:
            continue
        for out in eqn.outvars:
            size = math.prod(out.aval.shape) * out.aval.dtype.itemsize
            marks = min(2, sum(n % MARK == 0 for n in out.aval.shape if n))
            totals[marks] += turns * size / MARK**marks


def _inner(parameter: Any) -> Any:
    """Return the jaxpr that a parameter of an operation is, if it is one."""
    jaxpr = getattr(parameter, "jaxpr", parameter)
    return jaxpr if hasattr(jaxpr, "eqns") else None


def _rounded(
    random: Draw,
    batch_size: int,
    devices: int,
) -> int:
    """Round a batch size: mostly as people choose it."""
    kind = random.random()
    if kind < POWERS:
        unit = 2 ** max(0, math.floor(math.log2(batch_size)) - 1)
    elif kind < POWERS + MULTIPLES:
        unit = devices
    else:
        unit = 1
    return max(unit, round(batch_size / unit) * unit, devices)
