"""The hosts of a run: starting those of this machine, and joining the others before JAX is first used."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, TypeVar

import jax

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch.cluster import Cluster
from lepton_jax.launch.meeting import meet

T = TypeVar("T")
# seconds in which all hosts must have come: Kubernetes and TPU pods pull images and add machines, the others start at once
TIME_TO_MEET = {"kubernetes": 600.0, "tpu": 600.0}
SOON = 50.0
GRACE = 10.0  # seconds from asking a host to end until it is ended; one that waits for a lost host can't hear
GRACE_TO_SAVE = 90.0  # the same after a signal from outside, when all hosts are there and may save
ROOT = Path(__file__).resolve().parents[2]


def run(cluster: Cluster, work: Callable[[], T], arguments: Sequence[str] = ()) -> T | dict[str, Any]:
    """This host's share of the run: start the hosts of "local" and wait for them, else join the others and work.

    Args:
      cluster: as `cluster.find` gave it.
      work: what to do once all hosts have met.
      arguments: the command line that started this process, for the hosts to start.

    Returns:
      What `work` returns; for hosts that were started here {"status": ..., "exit_code": ...}.

    Raises:
      LeptonError: the hosts do not meet.
    """
    if cluster.source == "local":
        print(cluster, file=sys.stderr, flush=True)
        code = spawn([[*command, *arguments, "--coordinator", meeting, "--hosts", str(cluster.hosts), "--host-id", str(host)]
                      for command, meeting in [_here()] for host in range(cluster.hosts)],
                     {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cpu"})  # they can't share chips
        return {"status": {0: "finished", 130: "interrupted"}.get(code, "failed"), "exit_code": code}
    if cluster.host_id == 0 and cluster.source != "alone":
        print(cluster, file=sys.stderr, flush=True)
    if cluster.hosts > 1:
        join(cluster)
    return work()


def check(cluster: Cluster) -> None:
    """Raises SettingError where training can't yet use the cluster."""
    if cluster.hosts > 1:
        raise SettingError(f"training runs on one host so far, and there are {cluster.hosts}", where=cluster,
                           remedy="start one process, with all devices of its machine; under a scheduler add --hosts 1")


def heed_sigterm() -> None:
    """From here on SIGTERM is Ctrl-C, which saves: a scheduler sends it, and the first process of a container ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts processes in the background so
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def join(cluster: Cluster, limit: float | None = None) -> None:
    """Meet the other hosts; nothing may have used JAX before.

    Args:
      limit: seconds to wait for them; None: 600 where machines are still being started (Kubernetes, TPU), else 50.

    Raises:
      SettingError: the coordinator's port is taken or can't be reached, a host does not come within the limit, or differs.
    """
    limit = TIME_TO_MEET.get(cluster.source, SOON) if limit is None else limit
    meet(cluster, {"jax": jax.__version__, "lepton_jax": version("lepton-jax")}, limit)
    # without "deactivate" JAX looks around for itself, and under SLURM takes one GPU a process
    jax.distributed.initialize(cluster.coordinator, cluster.hosts, cluster.host_id, local_device_ids=cluster.visible,
                               cluster_detection_method="deactivate")


def _here() -> tuple[list[str], str]:
    """The command that starts a host on this machine, and where the hosts meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "lepton_jax.launch"], f"127.0.0.1:{port}"


def spawn(commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None, lifeline: bool = False) -> int:
    """Run a process for each host, and end all if one fails.

    Host 0 writes to this process's own output; what the others write is passed on to standard error behind `[host I] `.
    SIGINT and SIGTERM are passed on to all.

    Args:
      commands: one a host.
      environment: variables to set on top of this process's own.
      lifeline: they are told to end by the end of their standard input instead of by a signal, which ssh would not pass on.

    Returns:
      0, or the exit code of the host that failed first (128 + n if signal n ended it); 130 if a signal asked for the end.

    Raises:
      SettingError: a process can't be started.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(environment or {})}
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    lock = threading.Lock()
    with _passing_on(processes) as signalled:
        try:
            for host, command in enumerate(commands):
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE if lifeline else subprocess.DEVNULL}
                pipes |= {} if host == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
                try:
                    # a group of its own: Ctrl-C in the terminal would reach it twice
                    process = subprocess.Popen(command, env=variables, process_group=0, **pipes)
                except OSError as error:
                    raise SettingError(f"host {host} can't be started: {error.strerror}", where=command[0],
                                       remedy="start fewer hosts, or mend that and start again") from error
                processes.append(process)
                if host:
                    readers.append(threading.Thread(target=_forward, args=(process.stdout, host, lock), daemon=True))
                    readers[-1].start()
            failed = _wait(processes, signalled)
        finally:
            _end(processes)
            for reader in readers:
                reader.join(timeout=5)
    if failed is None:
        return 0
    code = processes[failed].returncode
    if signalled:
        return 130
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    fault = LeptonError(f"host {failed} {how}; the others were stopped", where=f"host {failed} of {len(processes)}",
                        remedy=f"see what it wrote above{f', behind [host {failed}]' if failed else ''}")
    print(f"error: {fault}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passing_on(processes: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to all processes while it is open; yields the signals that came."""
    came: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        came.append(number)
        for process in processes:
            _tell(process, number)

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield came
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen], signalled: Sequence[int]) -> int | None:
    """Until all have ended well, or the first has not: its number. After a signal, until all have, or the grace is over."""
    failed: int | None = None
    until: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        if failed is None:
            failed = next((host for host, code in enumerate(codes) if code), None)
        if None not in codes or (failed is not None and not signalled):
            return failed
        if signalled:
            until = until or time.monotonic() + GRACE_TO_SAVE
            if time.monotonic() > until:
                return codes.index(None) if failed is None else failed
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Ask those that still run to end, and after the grace end them."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        _tell(process, signal.SIGTERM)
    until = time.monotonic() + GRACE
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()


def _tell(process: subprocess.Popen, number: int) -> None:
    """A signal, or the end of its standard input where that is its lifeline."""
    if process.stdin is not None:
        process.stdin.close()
    elif process.poll() is None:
        process.send_signal(number)


def _forward(stream: IO[bytes], host: int, lock: threading.Lock) -> None:
    with stream:
        for line in stream:
            text = line.decode(errors="replace").rstrip("\r\n")
            with lock, contextlib.suppress(OSError):  # a closed terminal is no reason to block the host
                sys.stderr.write(f"[host {host}] {text}\n")  # in one piece, for host 0 writes there too
                sys.stderr.flush()
