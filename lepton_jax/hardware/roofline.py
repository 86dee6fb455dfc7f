"""Seconds of work on one device by the roofline: of computing and moving, the greater
decides.

How to Scale Your Model, part 1, https://jax-ml.github.io/scaling-book/roofline;
Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model
for multicore architectures".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_jax.hardware.chips import Chip

OVERLAP = 1.5  # 1: one after the other; infinite: entirely at once
# sublanes of a TPU's register, and the smallest dim of a tensor core's operation: the
# shorter side pads to it
SHORT = 8


def matmul_seconds(
    chip: Chip,
    m: int,
    n: int,
    k: int,
    batch: int = 1,
    dtype: Any = "bfloat16",
) -> float:
    """Seconds of `batch` products [m, k] x [k, n] -> [m, n] on one device, operands and
    result in `dtype`.

    The dims are padded to the chip's tiles: m and n to `tile` (the shorter of them, if
    below it, to 8), k to `tile_depth`. Computing and moving overlap in part: with the
    exponent 1.5 the published rates of one tpu7x device for squares of 512 to 32768
    come out within 17 % (AI-Hypercomputer, accelerator-microbenchmarks, Ironwood
    readme).
    """
    if not m * n * k * batch:
        return 0.0
    short, long = (m, n) if m < n else (n, m)
    tile = chip.tile
    depth = chip.tile_depth
    short = (
        -(-short // tile) * tile
        if short > tile
        else -(-short // min(SHORT, tile)) * min(SHORT, tile)
    )
    padded = short * (-(-long // tile) * tile) * (-(-k // depth) * depth)
    compute = 2.0 * batch * padded / (chip.peak(dtype) * chip.matmul_fraction)
    moved = (
        batch
        * (m * k + k * n + m * n)
        * itemsize(dtype)
        / (chip.bandwidth * chip.memory_fraction)
    )
    return chip.op_seconds + (compute**OVERLAP + moved**OVERLAP) ** (1 / OVERLAP)


def convolution_flops(
    params: dict[str, Any],
    left: Sequence[int],
    right: Sequence[int],
    out: Sequence[int],
) -> float:
    """FLOP of JAX's `conv_general_dilated` for the shapes of its operands and result.

    A multiplication and an addition are two. Taps on padding or in the holes of a
    dilated input cost nothing, as XLA counts.
    """
    numbers = params["dimension_numbers"]
    space = zip(
        numbers.lhs_spec[2:],
        numbers.rhs_spec[2:],
        numbers.out_spec[2:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    pairs = math.prod(
        taps(
            left[a],
            right[b],
            out[c],
            stride,
            low,
            holes,
            apart,
        )
        for a, b, c, stride, (low, _), holes, apart in space
    )
    return (
        2.0
        * out[numbers.out_spec[0]]
        * out[numbers.out_spec[1]]
        * right[numbers.rhs_spec[1]]
        * pairs
    )


@lru_cache(maxsize=4096)
def taps(
    size: int,
    kernel: int,
    out: int,
    stride: int,
    low: int,
    holes: int,
    apart: int,
) -> int:
    """Pairs of an output's and a kernel's position along one dim that meet an element
    of the input.

    Args:
      low: padding before the input.
      holes, apart: dilation of the input and of the kernel.
    """
    total = 0
    places = np.arange(out, dtype=np.int64) * stride - low
    for k in range(kernel):
        at = places + k * apart
        total += int(np.sum((at >= 0) & (at < size * holes) & (at % holes == 0)))
    return total


def memory_seconds(chip: Chip, size: float) -> float:
    """Seconds in which one device reads or writes `size` bytes of its memory; an
    operation that does nothing else.
    """
    return chip.op_seconds + size / (chip.bandwidth * chip.memory_fraction)


@lru_cache(maxsize=64)
def itemsize(dtype: Any) -> int:
    """Bytes of one element; "float8" is every dtype of that size."""
    return 1 if dtype == "float8" else jnp.dtype(dtype).itemsize
