"""What this machine's CPU really does, in place of the catalogue's round figures."""

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

# of the square matmul: large enough for the peak, a millisecond or so on a slow core
SIDE = 512
COPIED = 2**25  # bytes that the copy reads: beyond any cache but a server's
REDUCED = 2**20  # bytes per device of the all-reduce


def calibrate_cpu() -> Chip:
    """The catalogue's "cpu" with measured peaks, bandwidths and latencies; takes about
    a second.

    Measures a matmul in each of three dtypes, a copy, and an all-reduce over the CPU
    devices of this process (with one device the links keep the catalogue's figures).
    The result goes as `topology("cpu:8", {"cpu": calibrate_cpu()})`. It varies from
    call to call as the machine's load does, so plans that are compared want one and the
    same.
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
        measured["link_latency"] = 0.0  # part of the call's
    keys = [
        *(f"peaks.{dtype}" for dtype in peaks),
        *(key for key in measured if key != "peaks"),
    ]
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
    return (
        2.0
        * COPIED
        / _seconds(jax.jit(lambda x: x + 1), jnp.ones(COPIED // 4, jnp.float32))
    )


def _all_reduce_rate(devices: list[jax.Device]) -> tuple[float, float]:
    """Bytes/s of the machine's memory for collectives, and seconds of an empty one."""
    n = len(devices)
    mesh = Mesh(np.asarray(devices), ("all",))
    reduce = jax.jit(
        jax.shard_map(
            partial(jax.lax.psum, axis_name="all"),
            mesh=mesh,
            in_specs=PartitionSpec("all"),
            out_specs=PartitionSpec(),
        )
    )
    small, large = (
        _seconds(
            reduce,
            jax.device_put(
                np.ones((n, count), np.float32),
                NamedSharding(mesh, PartitionSpec("all")),
            ),
        )
        for count in (1, REDUCED // 4)
    )
    # an all-reduce costs two passes
    return 2 * (n - 1) * REDUCED / max(large - small, 1e-5), small / 2


def _seconds(
    run: Callable[..., jax.Array],
    *args: jax.Array,
    most: float = 0.12,
) -> float:
    """The fastest of several runs, after one that compiles; stops after `most`
    seconds.
    """
    run(*args).block_until_ready()
    best = float("inf")
    end = time.perf_counter() + most
    for _ in range(20):
        start = time.perf_counter()
        run(*args).block_until_ready()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            break
    return best
