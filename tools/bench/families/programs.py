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

# Programs whose steps are timed.
TIMED_CPUS = ("cpu:1", "cpu:2", "cpu:4")
# Widths and lengths, to those of the programs above; "float32" is what people use on a
# CPU (assumptions).
TIMED_SCALE = 1 / 8
TIMED_FLOAT32 = 0.8
# The seconds that a step is meant to take: more than what calls cost, and so little
# that forty programs take minutes.
LEAST_SECONDS = 0.005
MOST_SECONDS = 0.2
# Of two slow cores, to the power of 10 (assumption: it decides sizes alone).
CPU_FLOPS = 3e10
CPU_BANDWIDTH = 3e9
STEP_BY_FORWARD = 3  # a backward pass costs two forward passes


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
    if case.on:
        topology = random.choice(case.on)
    filled = random.between(LEAST_FILLED, MOST_FILLED)
    where = lepton.topology(topology)
    room = filled * where.device.memory * where.devices
    batch_size = _rounded(
        random,
        batch_for(case, room),
        where.devices,
    )
    if case.most is not None:
        batch_size = min(batch_size, case.most)
    batch_size = max(1, round(batch_size / case.unit)) * case.unit
    return Drawn(
        family,
        number,
        topology,
        replace(case, batch_size=batch_size),
    )


def draw_timed(family: str, number: int) -> Drawn:
    """Draw the program of a name, of a size whose steps a CPU can run.

    Its batch is chosen by its own FLOP and bytes, with round figures of a CPU.
    """
    random = Draw(f"time/{family}/{number}")
    random.scale = TIMED_SCALE
    topology = random.choice(TIMED_CPUS)
    case = load(family)(random)
    precision = "float32" if random.random() < TIMED_FLOAT32 else case.precision
    seconds = random.between(LEAST_SECONDS, MOST_SECONDS)
    work = forward_work(case)
    a_sample = work.flops / CPU_FLOPS + work.linear / CPU_BANDWIDTH
    devices = lepton.topology(topology).devices
    wanted = seconds / STEP_BY_FORWARD / a_sample
    batch_size = max(1, round(wanted / devices)) * devices
    if case.most is not None:
        batch_size = min(batch_size, case.most)
    sized = replace(case, batch_size=batch_size, precision=precision)
    return Drawn(family, number, topology, sized)


def batch_for(case: Case, room: float) -> int:
    """Return the batch for which the loss computes about as many bytes as `room`."""
    work = forward_work(case)
    if work.square:
        root = math.sqrt(work.linear**2 + 4 * work.square * room)
        size = (root - work.linear) / (2 * work.square)
    else:
        size = room / work.linear
    return min(GREATEST_BATCH, max(1, round(size)))


@dataclass
class Work:
    """Work of a loss, without its gradient.

    Attributes:
      linear: bytes of the results that a sample adds.
      square: bytes that each pair of samples adds.
      flops: of matmuls and convolutions, a sample.
    """

    linear: float = 0.0
    square: float = 0.0
    flops: float = 0.0


def forward_work(case: Case) -> Work:
    """Count what the loss computes.

    Each result of each operation counts, as often as its loop turns, whether XLA would
    write it or not. The batch is a prime, by which its dims are known.
    """
    traced = lepton.trace(
        case.recipe(MARK),
        case.inputs,
        case.targets,
    )
    assert traced.jaxpr is not None  # there are inputs
    work = Work()
    _count(traced.jaxpr.jaxpr, 1, work)
    return work


# ---- internals ----


def _count(
    jaxpr: Any,
    turns: int,
    work: Work,
) -> None:
    """Add what the operations of a jaxpr compute."""
    for eqn in jaxpr.eqns:
        inner_turns = turns * eqn.params.get("length", 1)
        bodies = [body for p in eqn.params.values() for body in _inner(p)]
        for body in bodies:
            _count(body, inner_turns, work)
        if not bodies:
            _add(eqn, turns, work)


def _add(
    eqn: Any,
    turns: int,
    work: Work,
) -> None:
    """Add what one operation computes, if its results have the batch."""
    for out in eqn.outvars:
        size = turns * math.prod(out.aval.shape) * out.aval.dtype.itemsize
        marks = sum(n % MARK == 0 for n in out.aval.shape if n)
        if marks == 1:
            work.linear += size / MARK
            work.flops += turns * _flops(eqn) / MARK
        elif marks > 1:
            work.square += size / MARK**2


def _flops(eqn: Any) -> float:
    """Return the FLOP of a matmul or a convolution, and 0 of all else."""
    kind = eqn.primitive.name
    out = math.prod(eqn.outvars[0].aval.shape)
    if kind == "dot_general":
        left = eqn.invars[0].aval.shape
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(left[i] for i in contracted)
    if kind == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out * math.prod(kernel) / features
    return 0.0


def _inner(parameter: Any) -> list[Any]:
    """Return the jaxpr that a parameter of an operation is, if it is one."""
    jaxpr = getattr(parameter, "jaxpr", parameter)
    return [jaxpr] if hasattr(jaxpr, "eqns") else []


def _rounded(
    random: Draw,
    batch_size: int,
    devices: int,
) -> int:
    """Round a batch size: mostly as people choose it."""
    kind = random.random()
    if kind < POWERS:
        unit = 2 ** max(
            0,
            math.floor(math.log2(batch_size)) - 1,
        )
    elif kind < POWERS + MULTIPLES:
        unit = devices
    else:
        unit = 1
    return max(unit, round(batch_size / unit) * unit, devices)
