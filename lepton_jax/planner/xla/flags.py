"""XLA's flags with which collectives run beside products, by backend.

A flag is an option of the compiled step, not of the process: `jax.jit` hands it to XLA,
which refuses one that it does not know with an error, where one in an environment
variable would end the process. `known` asks XLA once and leaves such flags out.

What the environment says wins: a flag whose name stands in `XLA_FLAGS` or
`LIBTPU_INIT_ARGS` is the user's.

    >>> chosen("tpu", 1, {})
    {}
    >>> user = {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=false"}
    >>> "xla_enable_async_all_gather" in chosen("tpu", 8, user)
    False
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.errors import PlanError, nearest

# Variables in which a user gives flags to XLA.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

# With it libtpu 0.0.42 fails on some mixtures that drop no token whose experts are
# split: "subgroup_size == 1 || shard_count == subgroup_size" of the sum of what experts
# make of tokens (program 56 of `python -m tools.bench planner-memory --half tuning
# --dropless --early`). So these are compiled without.
FUSES_SCATTERS = "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter"

# Without them libtpu 0.0.42 waits for all collectives of the 8B model on v5p:4x4x4, and
# has all-reduces in place of all-gathers; with them 60 % of the bytes move beside
# products, and all together are two thirds of what they were (`tools/overlap.py`,
# benchmarks/overlap.json). They only help together.
TPU = {
    "xla_enable_async_all_gather": True,
    "xla_enable_async_all_reduce": True,
    "xla_enable_async_reduce_scatter_fusion": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    FUSES_SCATTERS: True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
}
# Assumption: JAX's GPU performance guide advises it for training on several GPUs
# (https://docs.jax.dev/en/latest/gpu_performance_tips.html); no GPUs were at hand. Its
# flags for pipelined collectives take memory that nobody has measured here.
GPU = {"xla_gpu_enable_latency_hiding_scheduler": True}
BY_PLATFORM = {"tpu": TPU, "gpu": GPU, "cuda": GPU, "rocm": GPU}

# With it, all-gathers over the whole of a torus stay what they are.
KEEPS_GATHERS = "xla_tpu_prefer_async_allgather_to_allreduce"

# With it, and others, products and collectives run as one kernel.
FUSES = "xla_tpu_enable_async_collective_fusion"

# XLA's words for an option that it does not know.
REFUSAL = re.compile(r"No such compile option: '(\w+)'")

Flags = dict[str, Any]


def chosen(platform: str, devices: int, environment: Mapping[str, str]) -> Flags:
    """Return the flags for a step, without those that the user has set.

    Args:
      platform: JAX's name of the backend.
      devices: over which the step is divided; one has no collectives.
      environment: variables of the process.
    """
    if devices == 1:
        return {}
    return _not_given(BY_PLATFORM.get(platform, {}), environment)


def parsed(text: str) -> Flags:
    """Return flags from a command line's "NAME=VALUE,..."; "none": no flags.

    >>> parsed("xla_enable_async_all_gather=true,xla_tpu_scoped_vmem_limit_kib=65536")
    {'xla_enable_async_all_gather': True, 'xla_tpu_scoped_vmem_limit_kib': 65536}

    Raises:
      PlanError: it is not of this form.
    """
    if text == "none":
        return {}
    flags: Flags = {}
    for item in text.split(","):
        name, equals, value = item.strip().removeprefix("--").partition("=")
        if not equals or not name.startswith("xla_"):
            raise PlanError(
                f"{item!r} is no flag of XLA's{nearest(name, [*TPU, *GPU])}",
                where="XLA's flags",
                remedy='write "xla_name=value,...", or "none"',
            )
        flags[name] = _value(value)
    return flags


def known(flags: Mapping[str, Any], devices: Sequence[Any]) -> tuple[Flags, list[str]]:
    """Return the flags that this XLA knows, and the names of the others.

    Those that the environment has are left out: they are the user's.

    Args:
      flags: by name.
      devices: for which a step is compiled; they may be descriptions.
    """
    left = _not_given(flags, os.environ)
    return _known(tuple(left.items()), devices[0]) if left else ({}, [])


def spelled(value: Any) -> str:
    """Return a flag's value as XLA spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- internals ----


def _not_given(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Flags:
    """Return the flags that the user's environment does not have."""
    given = " ".join(environment.get(name, "") for name in VARIABLES)
    names = set(re.findall(r"--(\w+)", given))
    return {name: value for name, value in flags.items() if name not in names}


@lru_cache(maxsize=64)
def _known(flags: tuple[tuple[str, Any], ...], device: Any) -> tuple[Flags, list[str]]:
    left = dict(flags)
    refused: list[str] = []
    lowered = _nothing(device)
    while left:
        try:
            lowered.compile(compiler_options=left)
        except jax.errors.JaxRuntimeError as error:
            name = REFUSAL.search(str(error))
            if name is None or name[1] not in left:
                raise
            refused.append(name[1])
            del left[name[1]]
        else:
            break
    return left, refused


def _nothing(device: Any) -> Any:
    """Return the smallest program, for a device."""
    mesh = Mesh([device], ("x",))
    shape = jax.ShapeDtypeStruct((), "float32")
    where = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x: x, in_shardings=where, out_shardings=where).lower(shape)


def _value(text: str) -> Any:
    """Return a value as XLA takes it: a bool, a whole number, or text."""
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    return int(text) if re.fullmatch(r"-?\d+", text) else text
