"""The memory that a process keeps between two steps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lepton_jax import heap

# The page faults of that of 40 steps which had the least. A step makes an array of
# 64 MiB, which glibc by itself gives back whatever came before: it keeps up to 32 MiB.
PROGRAM = """
import resource
import lepton_jax
import jax, jax.numpy as jnp
step = jax.jit(lambda x: x * 2)
x = jnp.ones((4096, 4096))
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""
PAGES = 2**26 // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
@pytest.mark.parametrize(
    ("users_choice", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "4"}, False)]
)
def test_a_step_finds_the_memory_of_the_one_before(monkeypatch, users_choice, kept):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name, value in users_choice.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 0.02 * PAGES) == kept


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
