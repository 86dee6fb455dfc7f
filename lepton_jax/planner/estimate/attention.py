"""Seconds of attention that is an operation of its own."""

from __future__ import annotations

import math

from lepton_jax.hardware import Chip
from lepton_jax.planner.program.graph import Operation
from lepton_jax.planner.program.kernels import (
    HEADS,
    LENGTH,
    WIDTH,
    attention_flops,
    seen_share,
)
from lepton_jax.planner.rewrite.attention import ATTENTION

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
    how = op.params["how"]
    dtype = op.outputs[0].dtype
    flops = attention_flops(op)
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
