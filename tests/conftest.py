"""Eight virtual CPU devices for the whole suite.

The environment variables must be set before JAX is first used.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Two workers share the cores. OpenMP's threads wait for each other by turning round:
# next to other work, `time pytest tests/test_table_baselines.py` then takes 60 s of the
# cores instead of 8.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# many tests compile the same small programs: nearly half of the suite's time
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lepton-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# a shell's background jobs and nohup ignore these, and so would every process that a
# test starts and then signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def pytest_configure():
    """Draw the same examples at each run, and new ones where that is asked for."""
    chosen = "new" if os.environ.get("LEPTON_NEW_EXAMPLES") else "same"
    hypothesis.settings.register_profile("same", derandomize=True)
    hypothesis.settings.register_profile("new")
    hypothesis.settings.load_profile(chosen)


@pytest.hookimpl(tryfirst=True)  # before pytest takes out what -m leaves out
def pytest_collection_modifyitems(config, items):
    """Mark what tests/slow.txt lists, and put the longest files first."""
    _mark_slow(items, whole_files=not any("::" in argument for argument in config.args))
    _longest_first(items)


def _mark_slow(items, whole_files):
    lines = (ROOT / "tests" / "slow.txt").read_text().splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    collected = set()
    files = set()
    for item in items:
        file = str(item.path.relative_to(ROOT / "tests"))
        name = f"{file}::{item.nodeid.partition('::')[2]}"
        files.add(file)
        if name in listed:
            collected.add(name)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.listed)
    if whole_files:
        gone = [name for name in listed - collected if name.partition("::")[0] in files]
        assert not gone, f"tests/slow.txt lists what is not there: {sorted(gone)}"


def _longest_first(items):
    """Put the longest files first, so that at the end no core waits for the other.

    Files whose tests start many processes are apart, so that they don't run at once.
    """
    longest = (
        "test_faults.py",
        "test_exactness.py",
        "test_correctness.py",
        "test_models.py",
        "test_training_on_hosts.py",
        "test_bad_inputs.py",
        "test_public.py",
        "test_degrade.py",
        "test_resume.py",
        "test_bench.py",
    )
    items.sort(
        key=lambda item: (
            longest.index(item.path.name) if item.path.name in longest else len(longest)
        )
    )


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def settings_of_jax():
    """Fail a file that leaves a setting of JAX changed: the next file's bits differ."""
    import jax

    before = dict(jax.config.values)
    yield
    changed = {
        name for name, value in jax.config.values.items() if value != before[name]
    }
    assert not changed, f"{changed} are left changed"


@contextlib.contextmanager
def _quick_compilation():
    import jax  # reads the environment
    from jax._src import compiler

    usual = compiler.get_compile_options
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x).lower(0.0).compile(options)
    except jax.errors.JaxRuntimeError:  # newer XLA has no choice of emitters
        options = {}

    def quick(*arguments, **more):
        made = usual(*arguments, **more)
        if not jax.config.values["jax_disable_most_optimizations"]:
            return made  # for `usual_compilation`
        made.env_option_overrides = [*made.env_option_overrides, *options.items()]
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quick)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        # operations outside of a jit that were compiled so would go on being used
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without LLVM's dearer passes and XLA's own emitters of fusions.

    That takes half of the time where much is compiled and little is computed. What must
    hold to the bit is compiled as users compile it.
    """
    with _quick_compilation():
        yield


@pytest.fixture
def quick_compilation_here():
    """The same for one test."""
    with _quick_compilation():
        yield


@pytest.fixture
def usual_compilation():
    """Compile as users do, for one test of a file that else compiles quickly."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def blobs():
    """600 samples of 12 numbers in 3 classes that a linear model can tell apart."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(600, 12)).astype(np.float32)
    return inputs, (inputs @ rng.normal(size=(12, 3))).argmax(1).astype(np.int32)


@pytest.fixture
def launch(tmp_path):
    """Start `tools/launch.py` as a process, with the devices of a plain machine."""
    started = []

    def start(*arguments, **options):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tools" / "launch.py"),
                *map(str, arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
