"""How the host feeds a plan's program: where the data lies, and how many steps share a
call.
"""

from __future__ import annotations

import math

import jax

from lepton_jax.hardware import Topology
from lepton_jax.planner.program.trace import Trace
from lepton_jax.trees import nbytes

# of computing in one call: about a hundred times what dispatching it costs the host
CALL_SECONDS = 1e-2
MOST_STEPS_PER_CALL = 32
MOST_BLOCK_BYTES = 64 * 2**20
RESIDENT_SHARE = 0.05  # of a device's memory


def batch_bytes(trace: Trace) -> int:
    return sum(nbytes(x) for x in jax.tree.leaves((trace.inputs, trace.targets)))


def residence(trace: Trace, topology: Topology) -> tuple[str, str]:
    """Where the training data lies ("resident" or "streamed"), and why."""
    if trace.samples is None:
        return "streamed", "it is not held as arrays in memory"
    held = batch_bytes(trace) // trace.recipe.batch_size * trace.samples
    # virtual devices share one memory
    copies = topology.devices if topology.platform == "cpu" else 1
    if held * copies > RESIDENT_SHARE * topology.chip.memory:
        return (
            "streamed",
            (
                f"{size(held)} on each device would be more than {RESIDENT_SHARE:.0%}"
                " of its memory"
            ),
        )
    return "resident", f"{size(held)} on each device spare copying each batch there"


def slow_loops(trace: Trace, topology: Topology) -> bool:
    """XLA's CPU backend: a convolution of one step in a loop took 20 times as long as
    outside of it (jax 0.10, 0.12).
    """
    return topology.platform == "cpu" and "conv_general_dilated" in trace.operations


def steps_per_call(trace: Trace, topology: Topology) -> tuple[int, str]:
    """How many steps one XLA call runs, and why."""
    asked = trace.recipe.steps_per_call
    if trace.jaxpr is None:
        return (
            asked or 1,
            "the data is not known yet, so nothing is said about the batch",
        )
    if slow_loops(trace, topology):
        why = "XLA's CPU backend runs convolutions inside loops on a slow path"
        return 1, why + (
            f", so {asked} as asked for would be slower" if asked and asked > 1 else ""
        )
    if asked:
        return asked, "as the recipe asks"
    seconds = trace.flops / topology.devices / topology.chip.bf16_flops
    # a virtual CPU device is a share of the machine, not one more
    seconds *= topology.devices if topology.platform == "cpu" else 1
    most = min(
        MOST_STEPS_PER_CALL, max(1, MOST_BLOCK_BYTES // max(1, batch_bytes(trace)))
    )
    steps = min(
        most, 2 ** max(0, math.ceil(math.log2(CALL_SECONDS / max(seconds, 1e-9))))
    )
    return (
        2 ** int(math.log2(steps)),
        f"a step computes for about {seconds * 1e3:.2g} ms",
    )


def size(count: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
