"""Peak memory of a train step on one device, predicted before anything is compiled.

A peak is the state, the batch, and what the program itself holds at the most. The
state and the batch are exact: each array's bytes by its spec. For the rest, each buffer
of a `Timeline` gets its bytes under the assignment, and those that exist at the same
time are packed as XLA packs them.

Take `(tanh(x @ w) * 2 + 1).sum()` with w[4, 8] and x[16, 4] in float32. Its buffers are
the gathered w, the product (512 bytes) and the sum (4 bytes), see `xla.schedule`. If
two devices keep half of w each, it has to be gathered (128 bytes) while the product is
computed. If each device keeps all of w, there is nothing to gather:

    >>> import jax, jax.numpy as jnp
    >>> from lepton_jax.planner.program.graph import Graph
    >>> def loss(w, x):
    ...     h = x @ w
    ...     return (jnp.tanh(h) * 2.0 + 1.0).sum()
    >>> w, x = jnp.ones((4, 8)), jnp.ones((16, 4))
    >>> timeline = Timeline(Graph(jax.make_jaxpr(loss)(w, x), parameters=1), "gpu")
    >>> computed = timeline.value_bytes
    >>> stored = computed.copy()
    >>> stored[0] /= 2
    >>> peak(timeline, stored, computed).bytes
    640.0
    >>> peak(timeline, computed, computed).bytes
    516.0
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lepton_jax.compat import source_line
from lepton_jax.hardware import Chip, Topology
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate import rows
from lepton_jax.planner.estimate.feeding import slow_loops
from lepton_jax.planner.estimate.sizes import Sizes
from lepton_jax.planner.estimate.workspace import laid_out, workspace_bytes
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.xla import heap
from lepton_jax.planner.xla.figures import (
    LASTING_PART,
    PATIENCE,
    VECTOR_MEMORY,
    WINDOWED_DEVICES,
    WINDOWED_ROWS,
)
from lepton_jax.planner.xla.operations import size
from lepton_jax.planner.xla.schedule import Timeline
from lepton_jax.trees import by_path, nbytes

__all__ = ["Around", "Peak", "Timeline", "describe", "peak", "predict", "windowed"]

# Largest values of a prediction: (bytes, description).
Largest = list[tuple[int, str]]
# How many of them it lists.
SHOWN = 12
# A value is gathered if it is larger in computing by more than rounding.
LARGER = 1.001
# What waits long comes just behind what is fetched for a product in the ranks of the
# vector memory.
FETCHED_RANK = 1.001 * PATIENCE
# Keeps a division by the seconds of moving a buffer finite.
LEAST_SECONDS = 1e-12


class Peak(NamedTuple):
    """The most that a program holds.

    Attributes:
      bytes: bytes of its temporaries, with the gaps between them.
      moment: the moment of the timeline at which it holds them.
      each: bytes of each buffer.
      alive: whether each buffer exists at that moment.
    """

    bytes: float
    moment: int
    each: np.ndarray
    alive: np.ndarray


class Around(NamedTuple):
    """Surroundings of a program: loops over micro-batches or steps, and the update.

    Attributes:
      bytes: bytes that exist all the time, in a loop over micro-batches.
      stepping: whether the program is the body of a loop over steps.
      unsummed: whether the state is updated with gradients that no devices sum.
    """

    bytes: float = 0.0
    stepping: bool = False
    unsummed: bool = False


ALONE = Around()


class _Spans(NamedTuple):
    """First and last moment of each buffer."""

    starts: np.ndarray
    ends: np.ndarray


def peak(
    timeline: Timeline,
    stored: np.ndarray,
    computed: np.ndarray,
    vector: float = 0.0,
    moments: np.ndarray | None = None,
    chip: Chip | None = None,
    around: Around = ALONE,
) -> Peak:
    """Return the most that a program holds at once.

    Args:
      timeline: the timeline of the graph.
      stored: bytes on one device of each value as it is stored (see `Sizes.bytes`).
      computed: the same as it is computed with.
      vector: bytes of the memory next to the HBM.
      moments: for each parameter, how many arrays of its shape the optimizer keeps.
      chip: a TPU, which keeps some buffers in the `vector` bytes.
      around: what the program is part of.
    """
    tpu = timeline.platform == "tpu"
    unsummed = around.unsummed
    bytes_ = _buffer_bytes(timeline, stored, computed, moments, unsummed)
    spans = _spans(timeline, around.stepping, bool(around.bytes))
    if around.bytes and tpu:
        # A loop over micro-batches adds gradients to their sums where it computes them.
        bytes_ = np.where(timeline.summed, 0.0, bytes_)

    in_hbm = bytes_
    if chip is not None:
        waits = _waits(timeline, computed, bytes_, chip)
        fast = _in_vector_memory(timeline, spans, bytes_, waits, vector)
        in_hbm = np.where(fast, 0.0, bytes_)

    held = heap.alive(
        spans.starts,
        spans.ends,
        in_hbm,
        timeline.length,
    )
    moment = int(np.argmax(held))
    total = around.bytes + heap.packed(
        timeline.platform,
        spans.starts,
        spans.ends,
        in_hbm,
    )
    # Gradients that devices sum lie in the HBM in any case.
    gradients = float(bytes_[timeline.gradients].sum())
    total = max(total, gradients + around.bytes)
    alive = (spans.starts <= moment) & (moment <= spans.ends)
    return Peak(total, moment, bytes_, alive)


def _spans(
    timeline: Timeline,
    stepping: bool,
    micro_batches: bool,
) -> _Spans:
    """Return when buffers exist in a program that loops may stand around."""
    starts = timeline.starts
    ends = timeline.ends
    length = timeline.length
    if stepping and timeline.tables:
        # The loop over steps carries the tables.
        buffers = np.arange(len(starts))
        tables = np.isin(buffers, list(timeline.tables))
        starts = np.where(tables, 0, starts)
        ends = np.where(tables, length, ends)
    if micro_batches:
        starts = np.where(timeline.hoisted, 0, starts)
        ends = np.where(timeline.hoisted, length, ends)
    return _Spans(starts, ends)


def _in_vector_memory(
    timeline: Timeline,
    spans: _Spans,
    bytes_: np.ndarray,
    waits: np.ndarray,
    vector: float,
) -> np.ndarray:
    """Whether each buffer is in a TPU's memory next to the HBM.

    A buffer that waits long gives way to operands that are fetched from the HBM for a
    product, so each such fetch competes as one more buffer of one moment.
    """
    barred = timeline.in_hbm | timeline.around_loop
    able = np.where(barred, 0.0, bytes_)
    rank = np.maximum(waits, PATIENCE)

    at_products = np.isin(timeline.accesses[:, 0], timeline.product_moments)
    moments, fetched = timeline.accesses[at_products].T
    late = (moments > spans.starts[fetched]) & (rank[fetched] > PATIENCE)
    moments = moments[late]
    fetched = fetched[late]

    chosen = heap.in_vector_memory(
        np.append(spans.starts, moments),
        np.append(spans.ends, moments),
        np.append(able, bytes_[fetched]),
        vector,
        np.append(rank, np.full(len(moments), FETCHED_RANK)),
    )
    return chosen[: len(bytes_)]


def _waits(
    timeline: Timeline,
    computed: np.ndarray,
    bytes_: np.ndarray,
    chip: Chip,
) -> np.ndarray:
    """Return how long each buffer only waits while others are computed.

    The unit is the time that moving it to or from the HBM takes.
    """
    operands = timeline.product_values
    shares = computed[operands] / timeline.value_bytes[operands]
    shares = shares.min(1, initial=1.0)
    length = timeline.length + 2
    busy = np.bincount(
        timeline.product_moments,
        timeline.product_flops * shares / chip.bf16_flops,
        length,
    )
    moments, buffers = timeline.accesses.T
    moving = bytes_ / chip.bandwidth
    moved = np.bincount(moments, moving[buffers], length)
    clock = np.cumsum(np.maximum(busy, moved))
    last = np.maximum(timeline.ends - 1, timeline.starts)
    waited = clock[last] - clock[timeline.starts]
    return waited / np.maximum(moving, LEAST_SECONDS)


def _buffer_bytes(
    timeline: Timeline,
    stored: np.ndarray,
    computed: np.ndarray,
    moments: np.ndarray | None,
    unsummed: bool,
) -> np.ndarray:
    """Return the bytes of each buffer, 0 for one that doesn't exist."""
    as_stored = stored[timeline.values]
    as_computed = computed[timeline.values]
    bytes_ = np.where(timeline.computed, as_computed, as_stored) * timeline.scales
    whole = as_computed <= LARGER * as_stored
    bytes_[(timeline.gathered & whole) | ~timeline.made] = 0.0

    for b, (value, condition) in timeline.conditions.items():
        if condition in ("summed", "unsummed"):
            exists = unsummed == (condition == "unsummed")
        elif condition == "ungathered":
            exists = not computed[value] > LARGER * stored[value]
        else:
            exists = computed[value] >= size(timeline.graph.values[value])
        bytes_[b] *= exists
    if moments is not None:
        for b, parameter in timeline.tables.items():
            bytes_[b] *= 1 + moments[parameter]
    return bytes_


def predict(
    trace: Trace,
    names: Names,
    assignment: Assignment,
    topology: Topology,
    *,
    steps_per_call: int = 1,
    data: str = "streamed",
    timeline: Timeline | None = None,
    sizes: Sizes | None = None,
) -> tuple[dict[str, int], Largest]:
    """Predict the bytes of one device by kind, whose sum is the peak.

    Args:
      trace: what runs.
      names: named axes of the graph `trace.gradient(assignment.remat)`.
      assignment: how it is split.
      topology: where it runs.
      steps_per_call: as in the plan.
      data: as in the plan.
      timeline: timeline of the graph, if it exists already.
      sizes: sizes of the graph, if they exist already.

    Returns:
      Bytes by kind, and (bytes, description) of the largest values that exist at the
      peak.
    """
    tpu = topology.platform == "tpu"
    timeline = timeline or Timeline(names.graph, topology.platform)
    sizes = sizes or Sizes(names.graph, names)
    held = sizes.state(trace, assignment, tpu)
    held |= _fed(trace, names, assignment, steps_per_call, data)

    # Sums of the gradients, and the batch cut to pieces.
    several = assignment.micro_batches > 1
    around = float(held["params"] + held["batch"]) if several else 0.0
    if several and slow_loops(trace, topology):
        # Straight code, all of which XLA's CPU backend starts at once.
        assignment = replace(assignment, micro_batches=1)

    stored, computed = sizes.bytes(assignment, tpu)
    if sizes.working:
        layout = laid_out(names, assignment, sizes.prefers)
        worked = workspace_bytes(layout, sizes.working, tpu)
        for value, bytes_ in worked.items():
            stored[value] = bytes_
            computed[value] = bytes_
    vector = 0.0
    if tpu:
        name = topology.chip.name
        vector = VECTOR_MEMORY.get(name, 0.0)
        # v5e's scheduler puts work off that others' don't (libtpu of jax 0.10).
        eager = name != "v5e"
        window = windowed(timeline, names, assignment, computed)
        pieces = _sample_parts(names, assignment) * assignment.micro_batches
        alone = trace.recipe.batch_size <= pieces
        timeline = timeline.variant(window, eager, alone)
    top = peak(
        timeline,
        stored,
        computed,
        vector,
        sizes.moments(trace),
        topology.chip if tpu else None,
        Around(
            around,
            stepping=steps_per_call > 1,
            unsummed=not several and _sample_parts(names, assignment) == 1,
        ),
    )
    held |= _by_purpose(timeline, top, around)
    storage = names.storage(assignment.masks, assignment.keep, assignment.counts)
    held["temporaries"] += rows.taken_bytes(trace)
    if tpu:
        copies = rows.copied_bytes(trace, storage, assignment.counts)
        held["temporaries"] += copies
    return held, _largest(timeline, top)


def _by_purpose(
    timeline: Timeline,
    top: Peak,
    around: float,
) -> dict[str, int]:
    """Split a peak into gradients, activations and other temporaries."""
    held = top.each[top.alive & timeline.gradients]
    gradients = min(top.bytes, float(held.sum()) + around)
    lasting = timeline.ends - timeline.starts > timeline.length // LASTING_PART
    kept = top.alive & ~timeline.gradients & lasting
    activations = float(top.each[kept].sum())
    activations = min(top.bytes - gradients, activations)
    return {
        "gradients": int(gradients),
        "activations": int(activations),
        "temporaries": int(top.bytes - gradients - activations),
    }


def _largest(
    timeline: Timeline,
    top: Peak,
) -> Largest:
    alive = np.where(top.alive, top.each, 0)
    largest = []
    for buffer in np.argsort(-alive)[:SHOWN]:
        if top.alive[buffer]:
            text = describe(timeline, int(buffer))
            largest.append((int(top.each[buffer]), text))
    return largest


def windowed(
    timeline: Timeline,
    names: Names,
    assignment: Assignment,
    computed: np.ndarray,
) -> bool:
    """Whether libtpu sums the gradients of kernels while it computes them.

    It then computes them piece by piece in a loop, and sends each piece at once. It did
    (libtpu of jax 0.10, on v5e, v5p and v6e, MLPs of `lepton_jax.models`) where each of
    8 to 32 devices keeps a part and all of them hold samples, for products over more
    rows on each device than `WINDOWED_ROWS` for each byte of a number.
    """
    devices = assignment.counts[assignment.keep]
    samples = _sample_parts(names, assignment)
    least, most = WINDOWED_DEVICES
    kernels = timeline.kernel_products
    if not least <= devices <= most or devices != samples or not len(kernels):
        return False
    numbers = computed[kernels] / timeline.number_bytes[kernels]
    left, right, product = numbers.T
    largest = np.argmax(product)
    rows = np.sqrt(left * right / product)[largest]
    number_bytes = timeline.number_bytes[kernels[largest, 2]]
    return bool(rows > WINDOWED_ROWS * number_bytes)


def _sample_parts(names: Names, assignment: Assignment) -> int:
    """Return over how many devices the samples are split."""
    if names.batch is None:
        return 1
    return assignment.counts[assignment.masks[names.batch]]


def _fed(
    trace: Trace,
    names: Names,
    assignment: Assignment,
    steps: int,
    data: str,
) -> dict[str, int]:
    """Return the bytes of the batch, and of data that each device holds all of."""
    split = _sample_parts(names, assignment)
    count = trace.recipe.batch_size
    leaves = by_path((trace.inputs, trace.targets)).values()
    batch = sum(nbytes(leaf) for leaf in leaves)
    if data == "resident":
        # The batch is the samples' numbers, as int32.
        return {
            "batch": 4 * count * steps // split,
            "data": batch // count * (trace.samples or 0),
        }
    return {"batch": batch * steps // split, "data": 0}


def describe(timeline: Timeline, buffer: int) -> str:
    """Return a buffer as "float32[8, 4] exp at file.py:12 (function)"."""
    value = timeline.value(buffer)
    op = timeline.owners[buffer]
    text = f"{value.dtype}{list(value.shape)}"
    return text if op is None else f"{text} {op.name} at {source_line(op.eqn)}"
