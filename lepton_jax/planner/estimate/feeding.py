"""The feeding of a plan's program: residence of the data, and steps of one call."""

from __future__ import annotations

import math

import jax

from lepton_jax.hardware import Topology
from lepton_jax.planner.program.trace import Trace
from lepton_jax.trees import nbytes

# Seconds of computing in one call: about a hundred times what dispatching it costs the
# host (assumption).
CALL_SECONDS = 1e-2
# Steps in one call at the most, so that events don't lag (assumption).
MOST_STEPS_PER_CALL = 32
# Bytes of the batches of one call at the most (assumption).
MOST_BLOCK_BYTES = 64 * 2**20
# Share of a device's memory that resident data may take (assumption).
RESIDENT_SHARE = 0.05
# Keeps a division by a step's seconds finite.
LEAST_SECONDS = 1e-9


def batch_bytes(trace: Trace) -> int:
    """Return the bytes of one batch."""
    leaves = jax.tree.leaves((trace.inputs, trace.targets))
    return sum(nbytes(leaf) for leaf in leaves)


def residence(
    trace: Trace,
    topology: Topology,
) -> tuple[str, str]:
    """Return where the training data lies ("resident" or "streamed"), and why."""
    if trace.samples is None:
        return "streamed", "it is not held as arrays in memory"
    held = batch_bytes(trace) // trace.recipe.batch_size * trace.samples
    # Virtual devices share one memory.
    copies = topology.devices if topology.platform == "cpu" else 1
    if held * copies > RESIDENT_SHARE * topology.chip.memory:
        reason = (
            f"{size(held)} on each device would be more than {RESIDENT_SHARE:.0%} of"
            " its memory"
        )
        return "streamed", reason
    return "resident", f"{size(held)} on each device spare copying each batch there"


def slow_loops(trace: Trace, topology: Topology) -> bool:
    """Whether XLA runs this program's convolutions slowly inside of loops.

    Its CPU backend took 20 times as long for a convolution of one step in a loop as
    outside of it (jax 0.10 and 0.12).
    """
    return topology.platform == "cpu" and "conv_general_dilated" in trace.operations


def steps_per_call(
    trace: Trace,
    topology: Topology,
) -> tuple[int, str]:
    """Return how many steps one XLA call runs, and why."""
    asked = trace.recipe.steps_per_call
    if trace.jaxpr is None:
        reason = "the data is not known yet, so nothing is said about the batch"
        return asked or 1, reason
    if slow_loops(trace, topology):
        reason = "XLA's CPU backend runs convolutions inside loops on a slow path"
        if asked and asked > 1:
            reason += f", so {asked} as asked for would be slower"
        return 1, reason
    if asked:
        return asked, "as the recipe asks"

    seconds = trace.flops / topology.devices / topology.chip.bf16_flops
    if topology.platform == "cpu":
        # A virtual device is a share of the machine, not one machine more.
        seconds *= topology.devices
    room = MOST_BLOCK_BYTES // max(1, batch_bytes(trace))
    most = min(MOST_STEPS_PER_CALL, max(1, room))
    doublings = math.ceil(math.log2(CALL_SECONDS / max(seconds, LEAST_SECONDS)))
    steps = min(most, 2 ** max(0, doublings))
    return 2 ** int(
        math.log2(steps)
    ), f"a step computes for about {seconds * 1e3:.2g} ms"


def size(count: float) -> str:
    """Return a number of bytes for people to read: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
