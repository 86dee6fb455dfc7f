"""Measure a language model's step with attention in blocks and without, on CPUs.

    python tools/attention.py --out benchmarks/attention-cpu.json

Forward and backward pass of the 10M model of `recipes/lm.py`, with fewer layers, as the
planner has them run on one CPU device. Both programs take turns, so that what else runs
on the machine meets both. A batch has as many tokens at each length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from lepton_jax import models
from lepton_jax.planner import rewrite

TOKENS = 2048
LENGTHS = (128, 256, 512, 1024)
LAYERS = 2
TURNS = 9
KERNELS = ("", "blocks")


def step(length: int, kernel: str) -> Callable[[], Any]:
    """Return a function that runs one forward and backward pass."""
    arguments = models.transformer_size("10m") | {"layers": LAYERS}
    graph, params = nnx.split(models.TransformerLM(**arguments, rngs=nnx.Rngs(0)))
    shape = (TOKENS // length, length)
    tokens = np.random.default_rng(0).integers(0, arguments["vocab"], shape)

    def loss(params: Any, tokens: Any) -> Any:
        logits = nnx.merge(graph, params)(tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return each.mean()

    gradient = jax.value_and_grad(rewrite.Forms(attention=kernel).of(loss))
    compiled = jax.jit(rewrite.rewritten(gradient))
    return lambda: jax.block_until_ready(compiled(params, tokens))


def measured(length: int) -> dict[str, Any]:
    """Return the median seconds of a step, with and without blocks."""
    steps = {kernel: step(length, kernel) for kernel in KERNELS}
    for run in steps.values():
        run()  # compiles
    seconds: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for _ in range(TURNS):
        for kernel, run in steps.items():
            start = time.perf_counter()
            run()
            seconds[kernel].append(time.perf_counter() - start)
    plain, blocks = (statistics.median(seconds[kernel]) for kernel in KERNELS)
    pairs = zip(seconds["blocks"], seconds[""], strict=True)
    return {
        "length": length,
        "plain_seconds": round(plain, 4),
        "blocks_seconds": round(blocks, 4),
        "median_of_ratios": round(statistics.median(b / p for b, p in pairs), 3),
    }


def main() -> None:
    """Measure each length, print it and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    rows = []
    for length in LENGTHS:
        rows.append(measured(length))
        print(rows[-1], flush=True)
    if options.out is not None:
        record = {"tokens": TOKENS, "layers": LAYERS, "turns": TURNS, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
