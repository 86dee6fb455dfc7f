"""Rates of single operations of XLA's CPU backend, on which its cost model rests.

`tools.bench cpu-rates` times small programs, each with one kind of operation. A
program's seconds are those of all its threads together, the least of several runs, so
that other processes on the machine disturb little. The names are those in
`lepton_jax/planner/estimate/cpu.py` and in the catalogue of chips.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tools.bench import options as checks

# Readings of the clock of a program, and the seconds after which there is no further
# one. Between two readings it runs for LEAST_SECONDS or longer: some systems count the
# seconds of threads in steps of 10 ms.
READINGS = 10
MOST_SECONDS = 1.0
LEAST_SECONDS = 0.1
# Dims of series, images and volumes, and of their kernels, as lax has them.
ROW = ("NHC", "HIO", "NHC")
PLANE = ("NHWC", "HWIO", "NHWC")
SPACE = ("NDHWC", "DHWIO", "NDHWC")
MEGA = 2**20
# FLOP of a pair of channels: 8 images of 32 x 32 pixels, kernels of 3 x 3.
TAPS = 2.0 * 8 * 32 * 32 * 9


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


def line(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    """Convolve in one dim, padded to keep the length."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (1,),
        "SAME",
        dimension_numbers=ROW,
        feature_group_count=groups,
    )


def by_kernel(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return the gradient of a sum by the second argument."""
    return jax.grad(lambda x, kernel: function(x, kernel).sum(), 1)


def gated(x: jax.Array) -> jax.Array:
    """Multiply numbers by their SiLU."""
    return jax.nn.silu(x) * x


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


def kernel_gradient(x: jax.Array, by_result: jax.Array) -> jax.Array:
    """Return the gradient of a matrix by which rows were multiplied."""
    return x.T @ by_result


def added_to_each(arrays: list[jax.Array]) -> list[jax.Array]:
    """Add one to each of many small arrays."""
    return [x + 1 for x in arrays]


def layers(x: jax.Array, kernels: jax.Array) -> jax.Array:
    """Convolve in one dim in a loop, a kernel a step."""
    return lax.scan(lambda y, kernel: (line(y, kernel), None), x, kernels)[0]


def recurrent(x: jax.Array) -> Any:
    """Multiply in a loop of a thousand steps that keeps each result."""

    def step(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jnp.tanh(state @ state), state

    return lax.scan(step, x, None, length=1000)


def products() -> Iterator[Program]:
    """Yield matmuls and convolutions."""
    for side in (64, 512):
        square = jnp.ones((side, side))
        flops = 2.0 * side**3
        yield Program(f"dot{side}", jnp.dot, (square, square), flops)
    yield from small_products()
    yield from convolutions()
    yield from grouped_convolutions()
    yield from lines()


def small_products() -> Iterator[Program]:
    """Yield matmuls of which two dims are small, and a kernel's gradient."""
    for least in (8, 16):
        rows = jnp.ones((MEGA // 64, least))
        square = jnp.ones((least, least))
        flops = 2.0 * rows.size * least
        yield Program(f"dot n{least} k{least}", jnp.matmul, (rows, square), flops)
    for outputs, summed in ((8, 16), (4, 8)):
        stack = jnp.ones((64, 256, summed))
        matrices = jnp.ones((64, summed, outputs))
        flops = 2.0 * stack.size * outputs
        yield Program(
            f"dots n{outputs} k{summed}", jnp.matmul, (stack, matrices), flops
        )

    rows = jnp.ones((4096, 256))
    square = jnp.ones((256, 256))
    flops = 2.0 * rows.size * 256
    yield Program("dot x", jnp.dot, (rows, square), flops)
    yield Program("dot dw", kernel_gradient, (rows, rows), flops)


def convolutions() -> Iterator[Program]:
    """Yield convolutions in which each channel meets each."""
    images = jnp.ones((8, 32, 32, 32))
    kernel = jnp.ones((3, 3, 32, 64))
    flops = TAPS * 32 * 64
    yield Program("conv fwd", conv, (images, kernel), flops)
    yield Program("conv dw", by_kernel(conv), (images, kernel), flops)

    colours = jnp.ones((8, 32, 32, 3))
    few = jnp.ones((3, 3, 3, 32))
    yield Program("conv3 fwd", conv, (colours, few), TAPS * 3 * 32)
    yield Program("conv3 dw", by_kernel(conv), (colours, few), TAPS * 3 * 32)
    yield from few_channels()

    # a quarter of the pixels, each of which is written to four
    halves = jnp.ones((8, 16, 16, 32))
    yield Program("convT dw", by_kernel(transposed), (halves, kernel), flops / 4)

    volume = jnp.ones((2, 16, 16, 16, 8))
    cube = jnp.ones((3, 3, 3, 8, 16))
    flops = 2.0 * 2 * 16**3 * 27 * 8 * 16
    yield Program("conv3d", space, (volume, cube), flops)


def few_channels() -> Iterator[Program]:
    """Yield convolutions from few channels, whose rate depends on both numbers."""
    for channels, outputs, name in (
        (3, 20, "conv3x20 fwd"),
        (3, 64, "conv3 fwd wide"),
        (4, 16, "conv4x16 fwd"),
        (4, 20, "conv4x20 fwd"),
    ):
        images = jnp.ones((8, 32, 32, channels))
        kernel = jnp.ones((3, 3, channels, outputs))
        yield Program(name, conv, (images, kernel), TAPS * channels * outputs)

    series = jnp.ones((8, 1024, 16))
    kernel = jnp.ones((3, 16, 20))
    yield Program("conv1d fwd", line, (series, kernel), 2.0 * 8 * 1024 * 3 * 16 * 20)


def grouped_convolutions() -> Iterator[Program]:
    """Yield convolutions in which each channel meets those of its group."""
    images = jnp.ones((8, 32, 32, 32))
    single = jnp.ones((3, 3, 1, 32))
    depthwise = partial(conv, groups=32)
    yield Program("depth fwd", depthwise, (images, single), TAPS * 32)

    eight = jnp.ones((3, 3, 8, 32))
    in_four = partial(conv, groups=4)
    flops = TAPS * 8 * 32
    yield Program("group4 fwd", in_four, (images, eight), flops)
    yield Program("group4 dw", by_kernel(in_four), (images, eight), flops)


def lines() -> Iterator[Program]:
    """Yield convolutions in one dim, the last of them in a loop."""
    series = jnp.ones((8, 256, 32))
    single = jnp.ones((4, 1, 32))
    flops = 2.0 * 8 * 256 * 4 * 32
    yield Program("depth line fwd", partial(line, groups=32), (series, single), flops)

    kernel = jnp.ones((3, 32, 32))
    flops = 2.0 * 8 * 256 * 3 * 32 * 32
    yield Program("conv1d dw", by_kernel(line), (series, kernel), flops)
    kernels = jnp.ones((8, 3, 32, 32))
    yield Program("scan8 conv1d", layers, (series, kernels), 8 * flops)
    # forward, by the input and by the kernel
    gradient = by_kernel(layers)
    yield Program("scan8 conv1d dw", gradient, (series, kernels), 24 * flops)


def elements() -> Iterator[Program]:
    """Yield operations on single elements."""
    row = jnp.ones((MEGA,))
    long = jnp.ones((32 * MEGA,))
    # each is read and written, 4 bytes
    yield Program("add 1M", lambda x: x + 1, (row,), 8.0 * MEGA)
    yield Program("add 32M", lambda x: x + 1, (long,), 256.0 * MEGA)
    yield Program("tanh 1M", jnp.tanh, (row,), MEGA)
    yield Program("exp 1M", jnp.exp, (row,), MEGA)
    yield Program("sin 1M", jnp.sin, (row,), MEGA)
    half = row.astype(jnp.bfloat16)
    yield Program("silu", gated, (row,), MEGA)
    yield Program("silu 16-bit", gated, (half,), MEGA)
    random = partial(jax.random.uniform, shape=(MEGA,))
    yield Program("rng 1M", random, (jax.random.key(0),), MEGA)


def rows_and_loops() -> Iterator[Program]:
    """Yield operations on rows, windows and in loops."""
    key = jax.random.key(0)
    matrix = jnp.ones((MEGA // 256, 256))
    yield Program("cumsum", partial(jnp.cumsum, axis=1), (matrix,), MEGA)
    numbers = jax.random.uniform(key, (100_000,))
    yield Program("sort 100k", jnp.sort, (numbers,), numbers.size)

    table = jnp.ones((20_000, 64))
    rows = jax.random.randint(key, (4096,), 0, 20_000)
    entries = 4096 * 64
    yield Program("gather 4096x64", lambda t, i: t[i], (table, rows), entries)
    yield Program("scatter 4096x64", added, (table, rows), entries)

    pixels = jnp.ones((8, 64, 64, 32))
    gradient = jax.grad(lambda x: pooled(x).sum())
    yield Program("maxpool grad", gradient, (pixels,), pixels.size)

    tiny = jnp.ones((8, 8))
    yield Program("100 small dots", chain, (tiny,), 100)
    yield Program("scan1000 dot", recurrent, (tiny,), 1000)

    many = [jnp.ones((16,)) for _ in range(100)]
    yield Program("add100", added_to_each, (many,), 100)


def core_seconds(program: Program) -> float:
    """Return the least seconds of all threads that a run takes."""
    run = jax.jit(program.function).lower(*program.arguments).compile()

    def seconds(runs: int) -> float:
        start = time.process_time()
        for _ in range(runs):
            jax.block_until_ready(run(*program.arguments))
        return time.process_time() - start

    runs = 1
    while seconds(runs) < LEAST_SECONDS:
        runs *= 2
    best = float("inf")
    end = time.perf_counter() + MOST_SECONDS
    for _ in range(READINGS):
        best = min(best, seconds(runs) / runs)
        if time.perf_counter() > end:
            break
    return best


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `cpu-rates` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "cpu-rates",
        __doc__,
        "rates of single operations on a CPU core, for the planner's cost model",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the programs, and print a line for each."""
    rows = []
    with jax.default_device(jax.devices("cpu")[0]):
        for program in (*products(), *elements(), *rows_and_loops()):
            seconds = core_seconds(program)
            rate = program.work / seconds
            rows.append({"name": program.name, "seconds": seconds, "rate": rate})
            print(f"{program.name:16} {seconds * 1e6:10.1f} us  {rate:.3g}/s")
    return rows
