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

import numpy as np

from lepton_jax.planner.estimate.traffic import kernels
from lepton_jax.planner.program.graph import Graph, Operation, Value
from lepton_jax.planner.program.layout import itemsize

# FLOP/s of a core in a large float32 matmul ("dot512").
CORE_FLOPS = 1e11
# Seconds of a core to start a kernel ("100 small dots", "scan1000 dot").
KERNEL_SECONDS = 5e-7

# Bytes below which a value stays in a core's cache (assumption: its second level), and
# the share of the seconds that it then takes (assumption; "add 1M" and "add 32M" differ
# by a factor of four or more).
CACHED = 2**20
CACHED_SHARE = 0.3

# Bytes of a 16-bit number, and how much longer each takes than one of a float32, since
# the numbers are widened and rounded again ("silu", "silu 16-bit").
HALF_BYTES = 2
WIDENED = 4.0

# How much faster than other values the update passes parameters and their state, which
# it writes in place (assumption: one of Adam passed 25 GB a second on a core, where the
# catalogue has 15 for two cores).
IN_PLACE = 3.0

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
# Dims of a kernel of a two- and of a three-dimensional convolution.
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


def cached_traffic(
    graph: Graph,
    counts: np.ndarray,
) -> np.ndarray:
    """Return how often values pass the memory.

    Those in caches count for less, those of 16 bits for more.

    Args:
      graph: the program.
      counts: how often each value is read or written, see `traffic`.
    """
    sizes = [math.prod(v.shape) * itemsize(v) for v in graph.values]
    small = np.array(sizes) <= CACHED
    narrow = np.array([itemsize(v) == HALF_BYTES for v in graph.values], bool)
    slower = np.where(narrow, WIDENED, 1.0)
    return np.where(small, CACHED_SHARE, 1.0) * slower * counts


def kernel_seconds(graph: Graph) -> float:
    """Return the seconds of a core to start all kernels of a step, matmuls apart."""
    return KERNEL_SECONDS * kernels(graph)


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
        share *= GROUPED_SHARE if grouped else 1.0
        share *= SPATIAL_SHARE if spatial else 1.0
    elif _gives_a_kernel(op):
        share = outputs / (outputs + HALF_OUTPUTS)
    else:
        share = _dense_share(channels, outputs, len(kernel.shape))
    if _is_reversed(op):
        share = min(share, REVERSED_FLOPS / CORE_FLOPS)
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
