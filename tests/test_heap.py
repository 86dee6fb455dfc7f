"""The memory that a process keeps between two steps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lepton_jax import heap

# Steps of a program that needs 27 MB, and the page faults of the last of them.
PROGRAM = """
import resource
import lepton_jax
import jax, jax.numpy as jnp
f = jax.jit(lambda x: (jnp.sin(x) @ jnp.cos(x)).sum())
x = jnp.ones((1500, 1500))
for _ in range(3):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
def test_a_step_finds_the_memory_of_the_one_before(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    faults = {}
    for name in ("kept", "given back"):
        if name == "given back":
            monkeypatch.setenv("MALLOC_ARENA_MAX", "4")  # a user's own choice
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        )
        faults[name] = int(done.stdout)
    assert faults["kept"] < 0.2 * faults["given back"]


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_TRIM_THRESHOLD_": "1"}, False),
        ({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, False),
        ({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.rtld.nns=2"}, True),
    ],
)
def test_a_users_own_setting_stays(environment, wanted):
    assert heap._wanted(environment) is wanted
