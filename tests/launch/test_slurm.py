"""Runs under a real SLURM of two nodes on this machine.

They need its daemons (Debian: slurmctld, slurmd, munge).
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lepton_jax.launch.surroundings import expand
from lepton_jax.monitor import read_events, read_samples

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
missing = [
    name
    for name in NEEDED
    if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
]
pytestmark = [
    pytest.mark.skipif(
        bool(missing), reason=f"no SLURM here: {', '.join(missing)} not installed"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts tasks only as root"),
]
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={host} NodeHostname={host} Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName={host}b NodeHostname={host} Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
JOINED = """
import os
from pathlib import Path
from lepton_jax.launch import discovery, joining
cluster = discovery.find(os.environ, devices=2)
joining.ask_for_devices(2)

def work():
    import jax
    from jax.experimental.multihost_utils import process_allgather
    seen = process_allgather(jax.numpy.array(jax.process_index())).tolist()
    said = f"{jax.process_index()} {jax.process_count()} {jax.device_count()} {seen}"
    # Gloo writes to the output too, in the middle of a line
    Path(f"saw{jax.process_index()}").write_text(said)

joining.run(cluster, work)
"""


@pytest.fixture(scope="module")
def slurm():
    """Return the environment of a cluster with two nodes, both of them this machine."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path is short
    host = socket.gethostname()
    daemons = []
    (folder / "state").mkdir()
    probes = [socket.create_server(("", 0)) for _ in range(3)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=host, ports=ports)
    )
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    folder.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "LEPTON_TOKEN": "the-token-of-a-run-in-these-tests",
    }

    def start(*command):
        with (folder / "daemons.log").open("ab") as log:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            )

    try:
        start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/key",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/seed",
        )
        until = time.monotonic() + 60
        while not (folder / "munge.socket").exists() and time.monotonic() < until:
            time.sleep(0.1)
        start("slurmctld", "-D", "-i")
        start("slurmd", "-D", "-N", host)
        start("slurmd", "-D", "-N", f"{host}b")
        nodes = ""
        while nodes.split() != ["2", "idle"]:
            done = subprocess.run(
                ["sinfo", "--noheader", "--format=%D %t"],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            nodes = done.stdout
            logs = [
                (folder / name).read_text()[-2000:]
                for name in ("daemons.log", "ctld.log")
                if (folder / name).exists()
            ]
            assert time.monotonic() < until, (nodes, done.stderr, *logs)
            time.sleep(0.2)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(folder)


def shown(environment, job):
    return subprocess.run(
        ["scontrol", "show", "job", job],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def finished(environment, job, limit=120):
    """Return the job's state once it has ended."""
    until = time.monotonic() + limit
    while True:
        said = shown(environment, job)
        state = said.partition("JobState=")[2].split()[0]
        if state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            return state
        assert time.monotonic() < until, said
        time.sleep(0.2)


def submitted(environment, folder, *arguments):
    """Return the number of a job that launch.py has submitted."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "launch.py",
            *map(str, arguments),
            "--on",
            "slurm",
            "--submit",
        ],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_from_submit_to_finished(slurm, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    arguments = [
        ROOT / "recipes" / "logistic.py",
        "--steps",
        20,
        "--run-dir",
        "runs/mine",
        "--job-time",
        "10m",
        "--job-name",
        "mine",
    ]
    job = submitted(slurm, folder, *arguments)
    state = finished(slurm, job)
    log = (folder / f"mine-{job}.log").read_text()
    assert state == "COMPLETED", log
    assert f"cluster: one host: SLURM job {job}, step 0 on" in log

    events = [
        json.loads(line)
        for line in (folder / "runs" / "mine" / "events.jsonl").read_text().splitlines()
    ]
    assert max(event.get("step") or 0 for event in events) == 20


@pytest.mark.slow
def test_two_nodes_go_on_from_their_save_after_a_requeue(slurm, tmp_path):
    job = submitted(
        slurm,
        tmp_path,
        ROOT / "recipes" / "logistic.py",
        "--steps",
        600,
        "--save-every",
        50,
        "--hosts",
        2,
        "--run-dir",
        "run",
        "--trace-samples",
        "--job-name",
        "twice",
        "--job-time",
        "10m",
    )
    run = tmp_path / "run"
    log = tmp_path / f"twice-{job}.log"
    until = time.monotonic() + 100
    while not (run / "checkpoints" / "50").exists():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)
    subprocess.run(["scontrol", "requeue", job], env=slurm, check=True)
    while "JobState=PENDING" not in shown(slurm, job):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    # SLURM lets a job that was queued again wait for two minutes
    subprocess.run(
        ["scontrol", "update", f"JobId={job}", "StartTime=now"], env=slurm, check=True
    )
    state = finished(slurm, job)
    said = log.read_text()
    assert state == "COMPLETED", said
    assert "Restarts=1" in shown(slurm, job), said

    events = read_events(run)
    starts = [event for event in events if event["kind"] == "start"]
    ends = [
        (event["status"], event["step"]) for event in events if event["kind"] == "end"
    ]
    assert [event["devices"] for event in starts] == [2, 2]
    assert [status for status, _ in ends] == ["interrupted", "finished"]

    saved = ends[0][1]  # by SIGTERM, not by the next fifty
    assert saved in [event["step"] for event in events if event["kind"] == "save"]
    assert f"resumed at step {saved}" in said
    assert "going on, attempt" not in said
    assert "[Gloo]" not in said

    first = [event["first"] for event in events if event["kind"] == "steps"]
    assert saved + 1 in first
    assert sorted(set(first)) == sorted(first)

    samples = [name for line in read_samples(run) for name in line["samples"]]
    assert len(samples) == 600 * 256, "each of an epoch's samples once"
    assert len(set(samples[:16000])) == 16000, "each of an epoch's samples once"


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(slurm, tmp_path):
    job = submitted(
        slurm,
        tmp_path,
        ROOT / "recipes" / "csv_mlp.py",
        "--data",
        "gone.csv",
        "--label",
        "x",
        "--job-name",
        "bad",
    )
    state = finished(slurm, job)
    log = (tmp_path / f"bad-{job}.log").read_text()
    assert state == "FAILED"
    assert log.count("gone.csv") >= 1
    assert "going on" not in log
    assert "error: " in log
    assert "remedy:" in log


def test_two_nodes_join(slurm, tmp_path):
    (tmp_path / "work.py").write_text(JOINED)
    command = (
        f"srun --nodes=2 --ntasks-per-node=1 {shlex.quote(sys.executable)} work.py"
    )
    done = subprocess.run(
        ["salloc", "--nodes=2", "bash", "-c", command],
        env=slurm,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    saw = [path.read_text() for path in sorted(tmp_path.glob("saw*"))]
    assert saw == ["0 2 4 [0, 1]", "1 2 4 [0, 1]"]
    assert "cluster: host 0 of 2" in done.stderr
    assert "SLURM job" in done.stderr


def test_without_srun_it_is_an_error(slurm, tmp_path):
    command = (
        f"{shlex.quote(sys.executable)} -m lepton_jax launch {ROOT}/recipes/logistic.py"
    )
    done = subprocess.run(
        ["salloc", "--nodes=2", "bash", "-c", command],
        env=slurm,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert "srun did not start this process" in done.stderr


@pytest.mark.parametrize(
    "nodes",
    ["node[01-03,07],gpu5", "a[1-2]b[08-11]", "n[0-1],n[5,9]", "x", "n[099-101]"],
)
def test_lists_of_nodes_read_as_slurm_reads_them(slurm, nodes):
    said = subprocess.run(
        ["scontrol", "show", "hostnames", nodes],
        env=slurm,
        capture_output=True,
        text=True,
        check=True,
    )
    assert expand(nodes) == said.stdout.split()
