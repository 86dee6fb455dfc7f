"""Measured figures of this machine's CPU, in place of the catalogue's round ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.hardware.chips import CHIPS, Chip

# Rows of the square matmul: enough for the peak, and a millisecond or so on a slow core
# (assumption).
SIDE = 512
# Bytes that the copy reads: beyond any cache but a server's (assumption).
COPIED = 2**25
# Bytes per device of the all-reduce (assumption).
REDUCED = 2**20
# Seconds and runs after which a measurement stops (assumption).
MOST_SECONDS = 0.12
MOST_RUNS = 20
# Seconds: keeps the rate of an all-reduce finite.
LEAST_SECONDS = 1e-5


def calibrate_cpu() -> Chip:
    """Return the catalogue's "cpu" with measured peaks, bandwidths and latencies.

    It takes about a second. It measures a matmul in each of three dtypes, a copy, and
    an all-reduce over the CPU devices of this process. With one device the links keep
    the catalogue's figures.

    Use the result as `topology("cpu:8", {"cpu": calibrate_cpu()})`. It varies from call
    to call as the machine's load does, so use one result for plans that are compared.
    """
    devices = jax.devices("cpu")
    with jax.default_device(devices[0]):
        peaks = {
            dtype: _matmul_rate(dtype) for dtype in ("bfloat16", "float16", "float32")
        }
        bandwidth = _copy_rate()
    measured: dict[str, Any] = {"peaks": peaks, "bandwidth": bandwidth}
    if len(devices) > 1:
        measured["link_bandwidth"], measured["call_latency"] = _all_reduce_rate(devices)
        # It is part of the call's latency.
        measured["link_latency"] = 0.0
    keys = [f"peaks.{dtype}" for dtype in peaks]
    keys += [key for key in measured if key != "peaks"]
    source = (
        f"calibrated this CPU, {len(devices)} devices, JAX {jax.__version__},"
        f" {time.strftime('%Y-%m-%d')}"
    )
    return replace(
        CHIPS["cpu"],
        **measured,
        sources={**CHIPS["cpu"].sources, **dict.fromkeys(keys, source)},
    )


def _matmul_rate(dtype: str) -> float:
    x = jnp.ones((SIDE, SIDE), dtype)
    return 2.0 * SIDE**3 / _seconds(jax.jit(lambda x: x @ x), x)


def _copy_rate() -> float:
    numbers = jnp.ones(COPIED // 4, jnp.float32)
    return 2.0 * COPIED / _seconds(jax.jit(lambda x: x + 1), numbers)


def _all_reduce_rate(devices: list[jax.Device]) -> tuple[float, float]:
    """Return the memory's bytes/s for collectives, and the seconds of an empty one."""
    count = len(devices)
    mesh = Mesh(np.asarray(devices), ("all",))
    reduce = jax.jit(
        jax.shard_map(
            partial(jax.lax.psum, axis_name="all"),
            mesh=mesh,
            in_specs=PartitionSpec("all"),
            out_specs=PartitionSpec(),
        )
    )
    split = NamedSharding(mesh, PartitionSpec("all"))
    seconds = []
    for numbers in (1, REDUCED // 4):
        rows = np.ones((count, numbers), np.float32)
        seconds.append(_seconds(reduce, jax.device_put(rows, split)))
    small, large = seconds
    # An all-reduce costs two passes.
    sent = 2 * (count - 1) * REDUCED
    return sent / max(large - small, LEAST_SECONDS), small / 2


def _seconds(
    run: Callable[..., jax.Array],
    *args: jax.Array,
) -> float:
    """Return the seconds of the fastest of several runs, after one that compiles."""
    run(*args).block_until_ready()
    best = float("inf")
    end = time.perf_counter() + MOST_SECONDS
    for _ in range(MOST_RUNS):
        start = time.perf_counter()
        run(*args).block_until_ready()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            break
    return best
