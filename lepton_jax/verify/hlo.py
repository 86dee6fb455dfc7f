"""The collectives and the FLOPs of a program as XLA compiled it, read from its text.

The text is read by computations: a collective in a loop's body counts as often as the
loop turns, in a fusion or an asynchronous computation as often as its caller runs.
Modules of CPU, TPU and GPU can be read.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from lepton_jax.verify.collectives import KINDS, CollectiveFound, axes_of
from lepton_jax.verify.hlo_module import Module, product_of
from lepton_jax.verify.hlo_text import Instruction

__all__ = ["KINDS", "CollectiveFound", "Compiled", "axes_of", "read"]

# Custom calls that neither compute nor move anything worth a word.
PLUMBING = {
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "PadToStatic",
    "SliceToDynamic",
    "AssumeGatherIndicesInBound",
    "annotate_device_placement",
    "MoveToHost",
    "MoveToDevice",
}


@dataclass(frozen=True)
class Compiled:
    """The work of a compiled module in one call, on one device.

    Attributes:
      collectives: in the order of the module's text.
      dot_flops: FLOPs of matmuls and convolutions (a multiplication and an addition
        are two), loops multiplied out; of a conditional the costliest branch.
      rematerialized: instructions that XLA itself computes again to save memory (not
        those of `jax.checkpoint`).
      unknown_loops: while loops whose number of turns is not in the text and was taken
        as 1.
      custom_calls: number of calls by target that hold neither known FLOPs nor known
        collectives (kernels).
      partitions: devices.
    """

    collectives: list[CollectiveFound]
    dot_flops: float
    rematerialized: int
    unknown_loops: list[str]
    custom_calls: dict[str, int]
    partitions: int


def read(text: str) -> Compiled:
    """Read the text of an optimized module, `compiled.as_text()`."""
    module = Module(text)
    times, exact = module.times()
    collectives: list[CollectiveFound] = []
    instructions: list[Instruction] = []
    for name, computation in module.computations.items():
        if name not in times:
            continue
        instructions += computation.instructions.values()
        for collective in module.collectives(name, times[name]):
            counted = replace(
                collective,
                times=times[name],
                exact=exact[name],
            )
            collectives.append(counted)

    calls: Counter[str] = Counter()
    for instruction in instructions:
        if instruction.opcode != "custom-call" or product_of(instruction):
            continue
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if target and target[1] not in PLUMBING:
            calls[target[1]] += 1

    return Compiled(
        collectives=collectives,
        dot_flops=float(module.flops(module.entry)),
        rematerialized=sum(".remat" in i.name for i in instructions),
        unknown_loops=sorted(module.loops.unknown),
        custom_calls=dict(sorted(calls.items())),
        partitions=module.partitions,
    )
