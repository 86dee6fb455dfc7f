"""Seconds of single operations of XLA's CPU backend, on which its cost model rests.

`python tools/cpu_rates.py` prints the core's seconds of each program, the least of
several runs: threads' seconds together, so that other processes on the machine disturb
little. The names are those in `lepton_jax/planner/estimate/cpu.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax import lax

RUNS = 20
MOST_SECONDS = 1.0
PLANE = ("NHWC", "HWIO", "NHWC")
SPACE = ("NDHWC", "DHWIO", "NDHWC")
MEGA = 2**20


class Program(NamedTuple):
    """A program to time.

    Attributes:
      name: as the cost model cites it.
      function, arguments: what is compiled.
      work: FLOP, elements, bytes, operations or steps of it.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    work: float


def conv(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    """Convolve images, padded to keep their size."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=PLANE,
        feature_group_count=groups,
    )


def transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve images to twice their size."""
    return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=PLANE)


def space(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve in three dims."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=SPACE
    )


def by_kernel(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return the gradient of a sum by the second argument."""
    return jax.grad(lambda x, kernel: function(x, kernel).sum(), 1)


def pooled(x: jax.Array) -> jax.Array:
    """Return the maxima of squares of four pixels."""
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def added(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Add one to some rows of zeros."""
    return jnp.zeros_like(table).at[rows].add(1.0)


def chain(x: jax.Array) -> jax.Array:
    """Multiply a matrix by itself a hundred times."""
    for _ in range(100):
        x = jnp.tanh(x @ x)
    return x


def recurrent(x: jax.Array) -> Any:
    """Multiply in a loop of a thousand steps that keeps each result."""

    def step(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jnp.tanh(state @ state), state

    return lax.scan(step, x, None, length=1000)


def products() -> Iterator[Program]:
    """Yield matmuls and convolutions."""
    ones = jnp.ones
    for side in (64, 512):
        square = ones((side, side))
        yield Program(f"dot{side}", jnp.dot, (square, square), 2.0 * side**3)
    images = ones((8, 32, 32, 32))
    kernel = ones((3, 3, 32, 64))
    taps = 2.0 * 8 * 32 * 32 * 9
    yield Program("conv fwd", conv, (images, kernel), taps * 32 * 64)
    yield Program("conv dw", by_kernel(conv), (images, kernel), taps * 32 * 64)
    colours = (ones((8, 32, 32, 3)), ones((3, 3, 3, 32)))
    yield Program("conv3 fwd", conv, colours, taps * 3 * 32)
    deep = (images, ones((3, 3, 1, 32)))
    yield Program("depth fwd", lambda x, w: conv(x, w, 32), deep, taps * 32)
    four = (images, ones((3, 3, 8, 32)))
    grouped = by_kernel(lambda x, w: conv(x, w, 4))
    yield Program("group4 fwd", lambda x, w: conv(x, w, 4), four, taps * 8 * 32)
    yield Program("group4 dw", grouped, four, taps * 8 * 32)
    halves = (ones((8, 16, 16, 32)), kernel)
    yield Program("convT dw", by_kernel(transposed), halves, taps / 4 * 32 * 64)
    volume = (ones((2, 16, 16, 16, 8)), ones((3, 3, 3, 8, 16)))
    yield Program("conv3d", space, volume, 2.0 * 2 * 16**3 * 27 * 8 * 16)


def elements() -> Iterator[Program]:
    """Yield operations on single elements, rows and loops."""
    row = jnp.ones((MEGA,))
    table = jnp.ones((20_000, 64))
    key = jax.random.key(0)
    rows = jax.random.randint(key, (4096,), 0, 20_000)
    pixels = jnp.ones((8, 64, 64, 32))
    tiny = jnp.ones((8, 8))
    yield Program("add 1M", lambda x: x + 1, (row,), 8.0 * MEGA)
    yield Program("add 32M", lambda x: x + 1, (jnp.ones(32 * MEGA),), 256.0 * MEGA)
    for name, function in (("tanh", jnp.tanh), ("exp", jnp.exp), ("sin", jnp.sin)):
        yield Program(f"{name} 1M", function, (row,), MEGA)
    yield Program("rng 1M", lambda k: jax.random.uniform(k, (MEGA,)), (key,), MEGA)
    yield Program("cumsum", lambda x: jnp.cumsum(x, 1), (row.reshape(-1, 256),), MEGA)
    yield Program("sort 100k", jnp.sort, (jax.random.uniform(key, (100_000,)),), 1e5)
    yield Program("gather 4096x64", lambda t, i: t[i], (table, rows), 4096 * 64)
    yield Program("scatter 4096x64", added, (table, rows), 4096 * 64)
    gradient = jax.grad(lambda x: pooled(x).sum())
    yield Program("maxpool grad", gradient, (pixels,), pixels.size)
    yield Program("100 small dots", chain, (tiny,), 100)
    yield Program("scan1000 dot", recurrent, (tiny,), 1000)


def core_seconds(program: Program) -> float:
    """Return the least seconds of all threads that a run takes."""
    run = jax.jit(program.function).lower(*program.arguments).compile()
    jax.block_until_ready(run(*program.arguments))
    best = float("inf")
    end = time.perf_counter() + MOST_SECONDS
    for _ in range(RUNS):
        start = time.process_time()
        jax.block_until_ready(run(*program.arguments))
        best = min(best, time.process_time() - start)
        if time.perf_counter() > end:
            break
    return best


def main() -> None:
    """Print a line for each program."""
    for program in (*products(), *elements()):
        seconds = core_seconds(program)
        rate = program.work / seconds
        print(f"{program.name:16} {seconds * 1e6:10.1f} us  {rate:.3g}/s", flush=True)


if __name__ == "__main__":
    main()
