"""Seconds of what XLA's CPU backend computes far below the machine's peak.

A matmul reaches some 100 GFLOP/s on a core, and so does a convolution over many
channels. A convolution of single channels reaches less than a hundredth of it, and a
sort or a random number costs as much as hundreds of additions. On a TPU such work hides
behind the memory; on a CPU it decides which of two programs is the faster one.

All figures are for one core of an AMD EPYC and jaxlib 0.10, and were measured by
`python -m tools.bench cpu-rates`, which prints the core's seconds of each program. The
names in it are given behind each figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lepton_jax.planner.estimate.traffic import kernels
from lepton_jax.planner.program.graph import Graph, Operation, Value
from lepton_jax.planner.program.layout import itemsize

# FLOP/s of a core in a large float32 matmul ("dot512").
CORE_FLOPS = 1e11
# Seconds of a core to start a kernel ("100 small dots", "scan1000 dot").
KERNEL_SECONDS = 5e-7

# A product whose two least dims multiply to p reaches p / (p + HALF_SQUARE) of the peak
# ("dot n8 k8", "dot n16 k16", "dots n8 k16", "dots n4 k8").
HALF_SQUARE = 350.0
# Share of that rate if the left operand is summed over dims before the others, as in
# a kernel's gradient ("dot x", "dot dw").
LEFT_TRANSPOSED_SHARE = 0.73

# A product of so many FLOP has half of the use of further cores (assumption: fits the
# tuning half of `python -m tools.bench planner-time`).
HALF_SHARED = 2e7

# Seconds of an array in a joined all-reduce, for each of its devices: the backend lets
# them meet once for each array (assumption: fits the same; a hundred small arrays took
# 15e-6 to 50e-6 each on two devices of a core).
MEETING_SECONDS = 1.5e-5

# Seconds of an array of the state, which a call takes and a kernel writes ("add100",
# whose two threads count).
ARRAY_SECONDS = 1.5e-6

# Bytes of a 16-bit number, and how much longer each takes than one of a float32, since
# the numbers are widened and rounded again ("silu", "silu 16-bit").
HALF_BYTES = 2
WIDENED = 4.0

# A convolution from c to f channels reaches c f / (c f + HALF_PAIRS) of the peak
# ("conv3x20 fwd", "conv4x16 fwd", "conv1d fwd").
HALF_PAIRS = 400.0
# In two dims it is quicker, c / (c + HALF_CHANNELS), if it gives more than WIDE
# channels, or more than NARROW from an even number or from one ("conv fwd", "conv3 fwd
# wide", "conv4x20 fwd").
HALF_CHANNELS = 1.5
NARROW = 16
WIDE = 32
# Results between NARROW and WIDE channels are as slow otherwise as those of so many
# ("conv3x20 fwd").
BETWEEN = 8
# The gradient of a kernel that gives f channels reaches f / (f + HALF_OUTPUTS)
# ("conv dw", "conv3 dw").
HALF_OUTPUTS = 60.0
# Dims of a kernel of a convolution in one, two and three dims.
LINE_RANK = 3
PLANE_RANK = 4
SPATIAL_RANK = 5

# In three dims and in groups, c input channels reach c^1.5 / (c^1.5 + HALF_RATE) of the
# peak, times a share ("conv3d", "depth fwd", "group4 fwd").
CHANNEL_POWER = 1.5
HALF_RATE = 30.0
# Share of that rate in three dims ("conv3d").
SPATIAL_SHARE = 0.2
# FLOP/s of the gradient of a transposed convolution's kernel, which XLA reverses, holes
# of the input counted ("convT dw", a quarter of whose taps meet no hole).
REVERSED_FLOPS = 7.5e9
# Share of that rate if the channels are in groups ("depth fwd", "group4 fwd").
GROUPED_SHARE = 0.22
# The same of one dim ("depth line fwd").
GROUPED_LINE_SHARE = 0.05
# Share of the rate of a convolution without groups that is in a loop ("conv1d dw" and
# the same in a scan, "scan8 conv1d dw").
LOOP_SHARE = 0.1
# FLOP/s, times the groups, of a grouped kernel's gradient ("group4 dw").
BATCH_GROUPED_FLOPS = 9e8

# Seconds of a core per element of the result.
SECONDS_PER_RESULT = {
    **dict.fromkeys(("exp", "expm1", "exp2", "log", "log1p"), 4e-10),  # "exp 1M"
    **dict.fromkeys(("tanh", "logistic", "erf", "pow", "cbrt"), 4e-10),  # "tanh 1M"
    **dict.fromkeys(("sin", "cos", "tan", "erf_inv", "lgamma"), 3e-9),  # "sin 1M"
    **dict.fromkeys(("random_bits", "threefry2x32"), 5e-9),  # "rng 1M"
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin"), 3e-9),  # "cumsum"
    "cumlogsumexp": 3e-9,  # as a cumsum
    "select_and_scatter_add": 6e-9,  # "maxpool grad"
    "select_and_gather_add": 6e-9,  # as its transpose
    "gather": 6e-10,  # "gather 4096x64"
}
# Seconds of a core per element of an operand.
SECONDS_PER_UPDATE = 2e-9  # "scatter 4096x64"
SECONDS_PER_COMPARISON = 1.2e-8  # "sort 100k", 17 comparisons an element


def slow_work(graph: Graph) -> np.ndarray:
    """Return the seconds of a core for each byte of a value that a device has.

    They are those of the operations that make the value, or for a sort and a scatter
    of those that read it, in one step.

    Returns:
      A float array, (values,).
    """
    seconds = np.zeros(len(graph.values))
    for op in graph.operations():
        work = _work(op)
        if work is not None:
            value, per_element = work
            seconds[value.index] += op.times * per_element / itemsize(value)
    return seconds


def _work(op: Operation) -> tuple[Value, float] | None:
    """Return the value whose elements an operation is slow for, and the seconds."""
    if op.name in SECONDS_PER_RESULT and op.outputs:
        return op.outputs[0], SECONDS_PER_RESULT[op.name]
    if op.name.startswith("scatter") and len(op.inputs) > 2:
        updates = op.inputs[2]
        return None if updates is None else (updates, SECONDS_PER_UPDATE)
    if op.name in ("sort", "top_k", "approx_top_k") and op.inputs[0] is not None:
        keys = op.inputs[0]
        dim = op.params.get("dimension", -1) if keys.shape else None
        extent = 1 if dim is None else keys.shape[dim]
        return keys, SECONDS_PER_COMPARISON * math.log2(max(extent, 2))
    return None


def widened_traffic(
    graph: Graph,
    counts: np.ndarray,
) -> np.ndarray:
    """Return how often values pass the memory; those of 16 bits count for more.

    Args:
      graph: the program.
      counts: how often each value is read or written, see `traffic`.
    """
    narrow = np.array([itemsize(v) == HALF_BYTES for v in graph.values], bool)
    return np.where(narrow, WIDENED, 1.0) * counts


def kernel_seconds(graph: Graph) -> float:
    """Return the seconds of a core to start all kernels of a step, matmuls apart."""
    return KERNEL_SECONDS * kernels(graph)


def meeting_seconds(flops: float, devices: int) -> float:
    """Return the seconds that devices meet for an array of a joined all-reduce.

    Args:
      flops: a device's peak, FLOP/s.
      devices: how many meet.
    """
    return MEETING_SECONDS * devices * waiting(flops)


def cores_of(flops: float) -> float:
    """Return how many cores a device has; 1/2 if two of them share one.

    Args:
      flops: the device's peak, FLOP/s.
    """
    return flops / CORE_FLOPS


def waiting(flops: float) -> float:
    """Return by how much sharing its core slows a device's single-threaded work.

    Args:
      flops: the device's peak, FLOP/s.
    """
    return max(1.0, 1.0 / cores_of(flops))


def shared_slowdown(flops: float, peak: float) -> float:
    """Return by how much a product is slower than if all cores worked on it alike.

    Args:
      flops: of the product.
      peak: of the device, FLOP/s.
    """
    cores = cores_of(peak)
    if cores <= 1:
        return 1.0
    return cores / (1 + (cores - 1) * flops / (flops + HALF_SHARED))


def convolution_slowdown(op: Operation) -> float:
    """Return by how much a convolution is slower than a matmul of as many FLOPs."""
    kernel = op.inputs[1]
    assert kernel is not None
    grouped = op.params["feature_group_count"] > 1
    spatial = len(kernel.shape) == SPATIAL_RANK
    numbers = op.params["dimension_numbers"]
    outputs, channels = (kernel.shape[dim] for dim in numbers.rhs_spec[:2])
    if grouped or spatial:
        scaled = channels**CHANNEL_POWER
        share = scaled / (scaled + HALF_RATE)
        if grouped:
            is_line = len(kernel.shape) == LINE_RANK
            share *= GROUPED_LINE_SHARE if is_line else GROUPED_SHARE
        share *= SPATIAL_SHARE if spatial else 1.0
    elif _gives_a_kernel(op):
        share = outputs / (outputs + HALF_OUTPUTS)
    else:
        share = _dense_share(channels, outputs, len(kernel.shape))
    if _is_reversed(op):
        share = min(share, REVERSED_FLOPS / CORE_FLOPS)
    if op.times > 1 and not grouped:
        share *= LOOP_SHARE
    return 1.0 / share


def product_slowdown(op: Operation, extents: Sequence[int]) -> float:
    """Return by how much a product is slower than a large one of as many FLOPs.

    Args:
      op: the product, no convolution.
      extents: of its result's rows and columns, and of what is summed over.
    """
    least, middle, _ = sorted(extents)
    share = least * middle / (least * middle + HALF_SQUARE)
    (summed, _), (batch, _) = op.params["dimension_numbers"]
    left = op.inputs[0]
    assert left is not None
    own = [d for d in range(len(left.shape)) if d not in (*summed, *batch)]
    if summed and own and max(summed) < min(own):
        share *= LEFT_TRANSPOSED_SHARE
    return 1.0 / share


def _dense_share(channels: int, outputs: int, rank: int) -> float:
    """Return the share of the peak that a convolution reaches.

    Args:
      channels: of its input.
      outputs: channels of its result.
      rank: dims of its kernel.
    """
    pairs = channels * outputs
    if rank == PLANE_RANK and outputs > NARROW:
        if outputs > WIDE or channels == 1 or channels % 2 == 0:
            return channels / (channels + HALF_CHANNELS)
        if outputs < WIDE:
            pairs = channels * BETWEEN
    return pairs / (pairs + HALF_PAIRS)


def _gives_a_kernel(op: Operation) -> bool:
    """Whether a convolution gives the gradient of a kernel.

    Its window, the gradient of the result, is larger than what it gives.
    """
    numbers = op.params["dimension_numbers"]
    kernel = op.inputs[1]
    assert kernel is not None
    dims = zip(
        numbers.rhs_spec[2:],
        numbers.out_spec[2:],
        op.params["rhs_dilation"],
        strict=True,
    )
    return any(
        (kernel.shape[k] - 1) * holes + 1 > op.outputs[0].shape[o]
        for k, o, holes in dims
    )


def _is_reversed(op: Operation) -> bool:
    """Whether a convolution gives the kernel's gradient of a transposed convolution.

    Its input has holes, and its kernel, the gradient of the result, is larger than what
    it gives.
    """
    numbers = op.params["dimension_numbers"]
    kernel = op.inputs[1]
    assert kernel is not None
    wide = [
        kernel.shape[k] > op.outputs[0].shape[o]
        for k, o in zip(numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ]
    return max(op.params["lhs_dilation"], default=1) > 1 and any(wide)
