"""Seconds of attention that is an operation of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lepton_jax.hardware import Chip
from lepton_jax.planner.program.graph import Operation
from lepton_jax.planner.program.kernels import (
    HEADS,
    LENGTH,
    WIDTH,
    kernel_flops,
    seen_share,
)
from lepton_jax.planner.rewrite import ring
from lepton_jax.planner.rewrite.attention import ATTENTION, How

# Share of a chip's rate of products that the kernel of JAX for TPUs reaches.
# Assumption: MaxText states 60 to 70 % for whole steps on v5p, of which attention is
# the slower part; no TPU was at hand to measure it.
SPLASH_FRACTION = 0.6

# Numbers of a block's scores that are read or written between the products of
# `rewrite.attention`, forward and backward. Assumption, from the operations there:
# mask, maximum, exp and sum, division; and mask, exp, slope, product.
FORWARD_PASSES = 5
BACKWARD_PASSES = 6
SCORE_BYTES = 4


def attention_seconds(op: Operation, chip: Chip) -> float:
    """Return the seconds of attention over all samples and heads on one device."""
    query, key = (value.shape for value in op.inputs[:2] if value is not None)
    return _seconds(op, query, key, op.params["how"], chip)


def ring_seconds(op: Operation, devices: int, chip: Chip) -> float:
    """Return the seconds of a device's products in a ring, over all samples and heads.

    Args:
      op: attention or its gradient.
      devices: of the ring.
      chip: the device.
    """
    return sum(
        count * _seconds(op, query, key, how, chip)
        for query, key, how, count in _products(op, devices)
    )


def ring_flops(op: Operation, devices: int) -> float:
    """Return the FLOP of a device's products in a ring, see `ring_seconds`."""
    return sum(
        count * kernel_flops(op.name, query, key, how)
        for query, key, how, count in _products(op, devices)
    )


def _products(op: Operation, devices: int) -> Iterator[tuple[Any, Any, How, int]]:
    """Iterate over a device's products: shapes of query and key, kind, number."""
    query, key = (value.shape for value in op.inputs[:2] if value is not None)
    local = query[LENGTH] // devices
    for how, length, count in ring.work(op.params["how"], local, devices):
        own = (*query[:LENGTH], length, *query[LENGTH + 1 :])
        others = (*key[:LENGTH], length, *key[LENGTH + 1 :])
        yield own, others, how, count


def _seconds(
    op: Operation,
    query: Sequence[int],
    key: Sequence[int],
    how: How,
    chip: Chip,
) -> float:
    """Return the seconds of an operation on arrays of some shapes."""
    dtype = op.outputs[0].dtype
    flops = kernel_flops(op.name, query, key, how)
    rate = chip.peak(dtype) * chip.matmul_fraction
    if how.kernel.startswith("splash"):
        # a product's depth, or its columns, are those of a head
        width = query[WIDTH]
        filled = width / (-(-width // chip.tile_depth) * chip.tile_depth)
        return flops / (rate * SPLASH_FRACTION * filled)

    passes = FORWARD_PASSES if op.name == ATTENTION else BACKWARD_PASSES
    scores = float(math.prod((query[0], query[HEADS], query[LENGTH], key[LENGTH])))
    scores *= seen_share(query[LENGTH], key[LENGTH], how)
    moved = passes * scores * SCORE_BYTES
    return flops / rate + moved / (chip.bandwidth * chip.memory_fraction)
