"""Launches that can't work.

Each ends soon, with exit code 2, in an error that says what is wrong and how to fix it.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
from test_cluster import INDEXED, JOBSET, MPI, NAMED, SLICES, SLURM, TPU

from lepton_jax.cli import launch as cli
from lepton_jax.cli import plan as planning
from lepton_jax.launch import joining, meeting

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "logistic.py")
LIMIT = 60.0  # seconds, for the longest of them
AROUND = (
    "SLURM_",
    "OMPI_",
    "PMIX_",
    "TPU_",
    "MEGASCALE_",
    "JAX_COORDINATOR",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "JOB_",
    "JOBSET_",
    "REPLICATED_",
    "KUBERNETES_",
    "CUDA_VISIBLE",
    "LEPTON_",
)


class Bad(NamedTuple):
    """A bad command line with its environment, and fragments of its error."""

    name: str
    given: tuple[str, ...]
    what: str
    remedy: str
    environ: Mapping[str, str] = MappingProxyType({})


def without(whole, *names):
    return {name: value for name, value in whole.items() if name not in names}


ENVIRONMENTS = [
    Bad(
        "slurm-without-rank",
        (),
        what="SLURM_PROCID is not",
        remedy="by srun",
        environ=without(SLURM, "SLURM_PROCID"),
    ),
    Bad(
        "slurm-without-nodes",
        (),
        what="SLURM_STEP_NODELIST is not",
        remedy="by srun",
        environ=without(SLURM, "SLURM_STEP_NODELIST"),
    ),
    Bad(
        "slurm-without-job",
        (),
        what="SLURM_JOB_ID is not",
        remedy="by srun",
        environ=without(SLURM, "SLURM_JOB_ID"),
    ),
    Bad(
        "slurm-batch-without-srun",
        (),
        what="srun did not start this process",
        remedy="write `srun`",
        environ={
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_JOB_NUM_NODES": "2",
        },
    ),
    Bad(
        "slurm-allocation-without-srun",
        (),
        what="for 2 tasks",
        remedy="--hosts 1",
        environ={"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"},
    ),
    Bad(
        "slurm-shell-of-a-step",
        (),
        what="srun did not start this process",
        remedy="write `srun`",
        environ={**SLURM, "SLURM_PTY_PORT": "1234"},
    ),
    Bad(
        "slurm-rank-beyond-tasks",
        (),
        what="SLURM_PROCID is '2'",
        remedy="from 0 to 1",
        environ={**SLURM, "SLURM_PROCID": "2"},
    ),
    Bad(
        "slurm-nodes-cut",
        (),
        what="'n[1-' is no list of nodes",
        remedy="node[01-03,07]",
        environ={**SLURM, "SLURM_STEP_NODELIST": "n[1-"},
    ),
    Bad(
        "slurm-heterogeneous",
        (),
        what="heterogeneous",
        remedy="one kind",
        environ={**SLURM, "SLURM_HET_SIZE": "2"},
    ),
    Bad(
        "mpi-without-rank",
        (),
        what="OMPI_COMM_WORLD_RANK is not",
        remedy="mpirun",
        environ=without(MPI, "OMPI_COMM_WORLD_RANK"),
    ),
    Bad(
        "mpi-rank-beyond-size",
        (),
        what="OMPI_COMM_WORLD_RANK is '4'",
        remedy="from 0 to 3",
        environ={**MPI, "OMPI_COMM_WORLD_RANK": "4"},
    ),
    Bad(
        "mpi-hides-rank-0",
        (),
        what="rank 0 is",
        remedy="-x JAX_COORDINATOR_ADDRESS",
        environ=without(MPI, "PMIX_NAMESPACE"),
    ),
    Bad(
        "tpu-without-names",
        (),
        what="TPU_WORKER_HOSTNAMES is not",
        remedy="as GKE does",
        environ=without(TPU, "TPU_WORKER_HOSTNAMES"),
    ),
    Bad(
        "tpu-without-number",
        (),
        what="TPU_WORKER_ID is not",
        remedy="as GKE does",
        environ=without(TPU, "TPU_WORKER_ID"),
    ),
    Bad(
        "tpu-number-beyond-names",
        (),
        what="TPU_WORKER_ID is '4'",
        remedy="from 0 to 3",
        environ={**TPU, "TPU_WORKER_ID": "4"},
    ),
    Bad(
        "tpu-slices-half-set",
        (),
        what="MEGASCALE_SLICE_ID is not",
        remedy="as GKE does",
        environ={**TPU, **without(SLICES, "MEGASCALE_SLICE_ID")},
    ),
    Bad(
        "pods-without-count",
        (),
        what="JAX_NUM_PROCESSES is not",
        remedy="in the manifest",
        environ=without(INDEXED, "JAX_NUM_PROCESSES"),
    ),
    Bad(
        "pods-without-coordinator",
        (),
        what="JAX_COORDINATOR_ADDRESS is not",
        remedy="in the manifest",
        environ=without(INDEXED, "JAX_COORDINATOR_ADDRESS"),
    ),
    Bad(
        "pods-index-beyond-count",
        (),
        what="JOB_COMPLETION_INDEX is '3'",
        remedy="from 0 to 2",
        environ={**INDEXED, "JOB_COMPLETION_INDEX": "3"},
    ),
    Bad(
        "jobset-without-name",
        (),
        what="JOBSET_NAME is not",
        remedy="in the manifest",
        environ=without(JOBSET, "JOBSET_NAME"),
    ),
    Bad(
        "coordinator-alone",
        (),
        what="JAX_NUM_PROCESSES and JAX_PROCESS_ID are not",
        remedy="set all three",
        environ={"JAX_COORDINATOR_ADDRESS": "first"},
    ),
    Bad(
        "count-of-letters",
        (),
        what="JAX_NUM_PROCESSES is 'two'",
        remedy="a whole number",
        environ={**NAMED, "JAX_NUM_PROCESSES": "two"},
    ),
    Bad(
        "address-without-port",
        (),
        what="'first:http' is no address",
        remedy="NAME:PORT",
        environ={**NAMED, "JAX_COORDINATOR_ADDRESS": "first:http"},
    ),
    Bad(
        "slurm-and-tpu",
        (),
        what="two clusters at once",
        remedy="unset",
        environ={**SLURM, **TPU},
    ),
    Bad(
        "tpu-and-jax",
        (),
        what="two clusters at once",
        remedy="unset",
        environ={**TPU, **NAMED},
    ),
]
OPTIONS = [
    Bad(
        "local-in-slurm",
        ("--hosts", "local:2"),
        what="two clusters at once",
        remedy="--hosts 1",
        environ=SLURM,
    ),
    Bad(
        "options-against-slurm",
        ("--hosts", "2", "--coordinator", "a:1", "--host-id", "0"),
        what="two clusters at once",
        remedy="unset",
        environ=SLURM,
    ),
    Bad(
        "hosts-alone",
        ("--hosts", "2"),
        what="--coordinator and --host-id are not",
        remedy="local:N",
    ),
    Bad(
        "coordinator-option-alone",
        ("--coordinator", "a:1"),
        what="--hosts and --host-id are not",
        remedy="all three",
    ),
    Bad(
        "host-beyond-hosts",
        ("--hosts", "2", "--coordinator", "a:1", "--host-id", "2"),
        what="--host-id is 2",
        remedy="from 0 to 1",
    ),
    Bad(
        "port-beyond-65535",
        ("--hosts", "2", "--coordinator", "a:99999", "--host-id", "1"),
        what="'a:99999'",
        remedy="1 to 65535",
    ),
    Bad(
        "no-hosts",
        ("--hosts", "local:0"),
        what="--hosts is 'local:0'",
        remedy="local:4",
    ),
    Bad(
        "local-with-coordinator",
        ("--hosts", "local:2", "--coordinator", "a:1"),
        what="can't go with",
        remedy="leave out",
    ),
    Bad(
        "no-token",
        ("--hosts", "2", "--coordinator", "a:1", "--host-id", "0"),
        what="the 2 hosts have no token",
        remedy="LEPTON_TOKEN to the same value",
        environ={"LEPTON_TOKEN": " "},
    ),
    Bad(
        "no-token-in-slurm",
        (),
        what="the 2 hosts have no token",
        remedy="name the same --run-dir",
        environ={**SLURM, "LEPTON_TOKEN": ""},
    ),
    Bad(
        "token-of-a-few-letters",
        ("--hosts", "local:2"),
        what="the run's token has 6 characters",
        remedy="secrets.token_hex",
        environ={"LEPTON_TOKEN": "secret"},
    ),
    Bad(
        "token-of-words",
        ("--hosts", "local:2"),
        what="holds spaces",
        remedy="letters, digits",
        environ={"LEPTON_TOKEN": "our own secret " * 4},
    ),
    Bad(
        "token-not-in-ascii",
        ("--hosts", "local:2"),
        what="none of ASCII's",
        remedy="letters, digits",
        environ={"LEPTON_TOKEN": "\u00e9" * 40},
    ),
    Bad(
        "token-file-gone",
        ("--hosts", "local:2", "--token-file", "gone"),
        what="No such file",
        remedy="umask 077",
    ),
    Bad(
        "token-file-is-a-folder",
        ("--hosts", "local:2", "--token-file", "old"),
        what="is no file",
        remedy="name a file",
    ),
    Bad(
        "token-file-empty",
        ("--hosts", "local:2", "--token-file", "empty"),
        what="still empty",
        remedy="umask 077",
    ),
    Bad(
        "token-file-that-others-read",
        ("--hosts", "local:2", "--token-file", "open"),
        what="mode 0644: others know",
        remedy="delete it",
    ),
    Bad(
        "token-in-a-job",
        ("--on", "slurm", "--job-env", "LEPTON_TOKEN=x"),
        what="where others read it",
        remedy="leave it out",
    ),
    Bad(
        "least-beyond-hosts",
        ("--hosts", "local:2", "--least-hosts", "3"),
        what="--least-hosts is 3",
        remedy="at most 2",
    ),
    Bad(
        "least-of-none",
        ("--hosts", "local:2", "--least-hosts", "0"),
        what="--least-hosts is 0",
        remedy="from 1",
    ),
    Bad(
        "limit-unknown",
        ("--hosts", "local:2", "--limit", "step=5"),
        what="did you mean 'steps'",
        remedy="NAME=SECONDS",
    ),
    Bad(
        "limit-of-letters",
        ("--hosts", "local:2", "--limit", "steps=long"),
        what="'long' is no number",
        remedy="steps=60",
    ),
    Bad(
        "grace-negative",
        ("--hosts", "local:2", "--grace", "-1"),
        what="'-1' is no number of seconds",
        remedy="--grace",
    ),
    Bad(
        "restarts-of-letters",
        ("--hosts", "local:2", "--restarts", "many"),
        what="'many' is no whole number",
        remedy="--restarts",
    ),
    Bad(
        "go-on-nowhere",
        ("--hosts", "local:2", "--go-on"),
        what="without --run-dir",
        remedy="--run-dir",
    ),
    Bad(
        "run-folder-is-a-file",
        ("--hosts", "local:2", "--run-dir", "file"),
        what="is a file",
        remedy="another folder",
    ),
    Bad(
        "run-folder-occupied",
        ("--hosts", "local:2", "--run-dir", "old"),
        what="already holds a run",
        remedy="--resume old",
    ),
    Bad(
        "nothing-to-resume",
        ("--hosts", "local:2", "--resume", "gone"),
        what="no run to resume",
        remedy="name the folder",
    ),
    Bad(
        "setting-unknown",
        ("--hosts", "local:2", "--step", "3"),
        what="did you mean '--steps'",
        remedy="the settings are",
    ),
    Bad(
        "devices-of-none",
        ("--hosts", "local:2", "--devices", "0"),
        what="--devices is 0",
        remedy="1 to",
    ),
    Bad(
        "on-the-moon",
        ("--on", "moon", "--submit"),
        what="--on is 'moon'",
        remedy="slurm, k8s",
    ),
    Bad(
        "submitted-without-client",
        ("--on", "slurm", "--submit"),
        what="sbatch is not installed here",
        remedy="leave out --submit",
    ),
    Bad(
        "hosts-file-gone",
        ("--on", "ssh:gone", "--submit"),
        what="can't be read",
        remedy="a host a line",
    ),
    Bad(
        "pods-without-image",
        ("--on", "k8s", "--submit"),
        what="needs an image",
        remedy="--job-image",
    ),
    Bad(
        "pods-without-volume",
        ("--on", "k8s", "--job-image", "i", "--run-dir", "/data/run", "--submit"),
        what="lost with its container",
        remedy="--job-volume",
    ),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Make a working folder without a cluster around it, and without its client."""
    for name in os.environ:
        if name.startswith(AROUND):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LEPTON_TOKEN", "the-token-of-a-run-in-these-tests")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").touch(0o600)
    (tmp_path / "open").write_text("0123456789abcdef" * 4)
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    return tmp_path


def check(case, code, err, seconds):
    assert code == 2, err
    assert seconds < LIMIT, err
    what, _, remedy = err[err.rindex("error: ") :].rpartition("\n  remedy: ")
    assert case.what in what, err
    assert "\n  where:  " in what, err
    assert case.remedy in remedy, err
    assert "Traceback" not in err


@pytest.mark.parametrize("case", ENVIRONMENTS + OPTIONS, ids=lambda case: case.name)
def test_what_is_wrong_before_anything_starts(case, here, monkeypatch, capsys):
    for name, value in case.environ.items():
        monkeypatch.setenv(name, value)
    before = sorted(here.rglob("*"))
    started = time.monotonic()
    code = cli.main([RECIPE, *case.given])
    check(case, code, capsys.readouterr().err, time.monotonic() - started)
    assert sorted(here.rglob("*")) == before, "nothing is left behind"


def test_the_time_to_meet_is_within_the_limit():
    assert joining.SOON + meeting.MARGIN < LIMIT


# ---- hosts that do not fit to each other ----


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(port, *each, name="127.0.0.1"):
    """Run the command lines of several hosts at the same time.

    A `None` is a host that does not come. Returns the exit code of each, and the
    seconds.
    """
    codes = {}

    def one(number, given):
        codes[number] = cli.main([RECIPE, "--coordinator", f"{name}:{port}", *given])

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(each)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    return [codes[number] for number in range(len(each))], time.monotonic() - started


def host(number, count=2, *more):
    return ["--hosts", str(count), "--host-id", str(number), *more]


MISFITS = {
    "host-missing": (
        [host(0)],
        "of 2 hosts 1 did not come within 1 s: 1",
        "look whether they were started",
    ),
    "coordinator-unreachable": (
        [host(1)],
        "host 0 can't be met at 127.0.0.1:",
        "look whether host 0 runs",
    ),
    "counts-differ": (
        [host(0, 2), host(1, 3)],
        "host 1 counts 3 hosts, host 0 counts 2",
        "the same --hosts",
    ),
    "numbered-twice": (
        [host(0, 3), host(1, 3), host(1, 3)],
        "two processes say that they are host 1",
        "its own --host-id",
    ),
    "settings-differ": (
        [host(0), host(1, 2, "--steps", "7")],
        "host 1 differs from host 0 in settings",
        "the same on all",
    ),
    "runs-differ": (
        [host(0, 2, "--run-dir", "a"), host(1, 2, "--run-dir", "b")],
        "another run",
        "another port",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_hosts_that_do_not_fit(name, here, monkeypatch, capsys):
    monkeypatch.setattr(joining, "SOON", 1.0)
    each, what, remedy = MISFITS[name]
    codes, seconds = together(free_port(), *each)
    err = capsys.readouterr().err
    assert codes == [2] * len(each), err
    assert seconds < LIMIT, err
    assert "Traceback" not in err, err
    assert what in err, "all hosts say so"
    assert remedy in err, "all hosts say so"
    assert err.count("\n  remedy: ") == len(each), "all hosts say so"


@pytest.mark.parametrize("fact", ["jax", "lepton_jax", "recipe"])
def test_versions_that_differ(fact, here, monkeypatch, capsys):
    monkeypatch.setattr(joining, "SOON", 20.0)
    if fact == "recipe":
        text = Path(RECIPE).read_bytes()
        copies = iter([text, text + b"\n"])
        monkeypatch.setattr(Path, "read_bytes", lambda path: next(copies))
    else:
        same = joining.facts()
        facts = iter([same, {**same, fact: "0.0.1"}])
        monkeypatch.setattr(joining, "facts", lambda: next(facts))
    codes, seconds = together(free_port(), host(0), host(1))
    err = capsys.readouterr().err
    for code in codes:
        check(
            Bad(
                "",
                (),
                what=f"host 1 differs from host 0 in {fact}: ",
                remedy="the same on all hosts",
            ),
            code,
            err,
            seconds,
        )


def test_a_port_that_is_taken(here, capsys):
    with socket.create_server(("", 0)) as taken:
        codes, seconds = together(taken.getsockname()[1], host(0))
    check(
        Bad("", (), what="host 0 can't listen on port", remedy="--coordinator"),
        *codes,
        capsys.readouterr().err,
        seconds,
    )


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks another language"),
        (b"", "the connection was closed"),
    ],
)
def test_a_port_that_is_somebody_elses(answer, fault, here, monkeypatch, capsys):
    monkeypatch.setattr(joining, "SOON", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def serve():
            while True:
                try:
                    connection, _ = stranger.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                    _ = answer and connection.recv(1)  # until the other end gives up

        threading.Thread(target=serve, daemon=True).start()
        codes, seconds = together(stranger.getsockname()[1], host(1))
        stranger.shutdown(socket.SHUT_RDWR)
    check(
        Bad("", (), what=f"within 1 s: {fault}", remedy="that name and port are right"),
        *codes,
        capsys.readouterr().err,
        seconds,
    )


def test_a_name_that_is_none(here, monkeypatch, capsys):
    monkeypatch.setattr(joining, "SOON", 1.0)
    codes, seconds = together(8476, host(1), name="nobody.invalid")
    check(
        Bad(
            "",
            (),
            what="host 0 can't be met at nobody.invalid:8476",
            remedy="name and port",
        ),
        *codes,
        capsys.readouterr().err,
        seconds,
    )


# ---- what only the training processes find: real ones ----

TWO = ("--hosts", "local:2")
PROCESSES = [
    Bad(
        "no-permission-in-the-run-folder",
        (*TWO, "--run-dir", "/proc/lepton"),
        what="/proc/lepton",
        remedy="another run folder",
    ),
    Bad(
        "a-mesh-that-does-not-fit",
        (*TWO, "--devices", "1", "--plan", "eight.json"),
        what="the plan is for 8 devices, 2 are given",
        remedy="plan anew",
    ),
    Bad(
        "no-such-platform",
        TWO,
        what="Backend 'nope' is not in the list of known",
        remedy="JAX_PLATFORMS=cpu",
        environ={"JAX_PLATFORMS": "nope"},
    ),
    Bad(
        "no-permission-for-local-checkpoints",
        (*TWO, "--local-dir", "/proc/lepton"),
        what="/proc/lepton",
        remedy="--local-dir",
    ),
    Bad(
        "data-that-are-gone",
        (*TWO, "--data", "gone.csv"),
        what="gone.csv",
        remedy="check the path",
    ),
    Bad(
        "a-recipe-that-can-not-be",
        (*TWO, "--seed", "-1"),
        what="seed is -1",
        remedy="seed=0",
    ),
]


@pytest.fixture(autouse=True, scope="module")
def processes(tmp_path_factory):
    """Start processes next to the other tests.

    Returns exit code, standard error and seconds of each, by name.
    """
    plan = tmp_path_factory.mktemp("plan") / "eight.json"
    assert planning.main([RECIPE, "--on", "cpu:8", "--save", str(plan)]) == 0

    def start(case):
        folder = tmp_path_factory.mktemp("process")
        shutil.copy(plan, folder / "eight.json")
        environ = {
            k: v
            for k, v in os.environ.items()
            if k != "XLA_FLAGS" and not k.startswith(AROUND)
        }
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / "launch.py", RECIPE, *case.given],
            cwd=folder,
            text=True,
            env={**environ, "JAX_PLATFORMS": "cpu", **case.environ},
            capture_output=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stderr, time.monotonic() - started

    with ThreadPoolExecutor(2) as pool:
        futures = {case.name: pool.submit(start, case) for case in PROCESSES}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", PROCESSES, ids=lambda case: case.name)
def test_what_the_workers_find(case, processes):
    code, err, seconds = processes(case.name)
    check(case, code, err, seconds)
    assert err.count("error: ") == 1, "it is said once"
