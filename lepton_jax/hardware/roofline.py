"""Seconds of work on one device by the roofline: computing and moving overlap in part.

How to Scale Your Model, part 1, https://jax-ml.github.io/scaling-book/roofline;
Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model
for multicore architectures".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_jax.hardware.chips import Chip

# Exponent of the sum of computing and moving. With 1 one follows the other, with
# infinity both run entirely at once. With 1.5 the published rates of one tpu7x device
# for squares of 512 to 32768 come out within 17 % (AI-Hypercomputer,
# accelerator-microbenchmarks, Ironwood readme).
OVERLAP = 1.5
# Bytes of a product's number, at least: those of 8 bits are summed in more.
LEAST_RESULT = 2
# Numbers to which the shorter side of a matmul's output is padded if it is below a
# tile: the sublanes of a TPU's register, and the smallest dim of a tensor core's
# operation.
SHORT = 8


def matmul_seconds(
    chip: Chip,
    m: int,
    n: int,
    k: int,
    batch: int = 1,
    dtype: Any = "bfloat16",
) -> float:
    """Return the seconds of `batch` products [m, k] x [k, n] -> [m, n] on one device.

    Operands and result have `dtype`; the result of 8 bits has `LEAST_RESULT` bytes a
    number. The dims are padded to the chip's tiles: m and n to `tile` (the shorter of
    them, if below it, to `SHORT`), k to `tile_depth`. Computing and moving overlap in
    part, see `OVERLAP`.
    """
    if not m * n * k * batch:
        return 0.0
    short, long = (m, n) if m < n else (n, m)
    tile = chip.tile
    row = tile if short > tile else min(SHORT, tile)
    padded = _padded(short, row) * _padded(long, tile)
    padded *= _padded(k, chip.tile_depth)
    rate = chip.peak(dtype) * chip.matmul_fraction
    compute = 2.0 * batch * padded / rate
    size = itemsize(dtype)
    written = batch * m * n * max(size, LEAST_RESULT)
    moved = (batch * (m * k + k * n) * size + written) / (
        chip.bandwidth * chip.memory_fraction
    )
    return chip.op_seconds + (compute**OVERLAP + moved**OVERLAP) ** (1 / OVERLAP)


def _padded(extent: int, multiple: int) -> int:
    return -(-extent // multiple) * multiple


def convolution_flops(
    params: dict[str, Any],
    left: Sequence[int],
    right: Sequence[int],
    out: Sequence[int],
) -> float:
    """Return the FLOPs of JAX's `conv_general_dilated`.

    A multiplication and an addition are two. Taps on padding or in the holes of a
    dilated input cost nothing, as XLA counts.

    Args:
      params: parameters of the primitive.
      left: shape of the input.
      right: shape of the kernel.
      out: shape of the result.
    """
    numbers = params["dimension_numbers"]
    pairs = 1
    for d in range(len(params["window_strides"])):
        low, _ = params["padding"][d]
        pairs *= taps(
            size=left[numbers.lhs_spec[2 + d]],
            kernel=right[numbers.rhs_spec[2 + d]],
            out=out[numbers.out_spec[2 + d]],
            stride=params["window_strides"][d],
            low=low,
            holes=params["lhs_dilation"][d],
            apart=params["rhs_dilation"][d],
        )
    batch, features = (out[d] for d in numbers.out_spec[:2])
    inputs = right[numbers.rhs_spec[1]]
    return 2.0 * batch * features * inputs * pairs


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
    """Count the taps of a convolution along one dim that meet an element of its input.

    A tap is a pair of an output's and a kernel's position. Three inputs under a kernel
    of three with padding of one have nine taps, two of them on padding:

        >>> taps(size=3, kernel=3, out=3, stride=1, low=1, holes=1, apart=1)
        7

    Args:
      size: extent of the input.
      kernel: extent of the kernel.
      out: extent of the output.
      stride: steps of the input from one output to the next.
      low: padding before the input.
      holes: dilation of the input.
      apart: dilation of the kernel.
    """
    total = 0
    places = np.arange(out, dtype=np.int64) * stride - low
    for k in range(kernel):
        at = places + k * apart
        inside = (at >= 0) & (at < size * holes)
        total += int(np.sum(inside & (at % holes == 0)))
    return total


def memory_seconds(chip: Chip, size: float) -> float:
    """Return the seconds of an operation that only reads or writes `size` bytes."""
    return chip.op_seconds + size / (chip.bandwidth * chip.memory_fraction)


@lru_cache(maxsize=64)
def itemsize(dtype: Any) -> int:
    """Return the bytes of one element; "float8" stands for every dtype of that size."""
    return 1 if dtype == "float8" else jnp.dtype(dtype).itemsize
