"""Joining the other hosts before JAX is first used; and processes started together, of
which one that fails ends all.
"""

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
from ipaddress import ip_address
from typing import IO, Any, TypeVar

import jax
from jax.errors import JaxRuntimeError

from lepton_jax.compat import found_at, without_proxies
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import tokens
from lepton_jax.launch.cluster import Cluster, split
from lepton_jax.launch.meeting import meet
from lepton_jax.launch.process import GLOO, variables

T = TypeVar("T")
# seconds in which all hosts must have come: Kubernetes and TPU pods pull images and add
# machines, the others start at once
TIME_TO_MEET = {"kubernetes": 600.0, "tpu": 600.0}
SOON = 50.0
# seconds from asking a host to end until it is ended; one that waits for a lost host
# can't hear
GRACE = 10.0
# the same after a signal from outside, when all hosts are there and may save
GRACE_TO_SAVE = 90.0
# of networks that do not exist, RFC 5737 and 3849
ELSEWHERE = "192.0.2.1", "2001:db8::1"
LOCK = threading.Lock()


def run(
    cluster: Cluster,
    work: Callable[[], T],
    told: bool = False,
) -> T:
    """This host's share of the run: join the others, and work.

    Args:
      cluster: as `cluster.find` gave it.
      work: what to do once all hosts have met.
      told: a supervisor started this process, where all have met already.

    Returns:
      What `work` returns.

    Raises:
      SettingError: the hosts do not meet.
    """
    if not told and cluster.host_id == 0 and cluster.source != "alone":
        print(cluster, file=sys.stderr, flush=True)
    if cluster.hosts > 1:
        join(cluster, met=told)
    return work()


def facts() -> dict[str, str]:
    """What must not differ between the hosts, whatever they train."""
    return {"jax": jax.__version__, "lepton_jax": version("lepton-jax")}


def time_to_meet(cluster: Cluster) -> float:
    """Seconds in which all hosts must have come: 600 where machines are still being
    started (Kubernetes, TPU), else 50.
    """
    return TIME_TO_MEET.get(cluster.source, SOON)


def heed_sigterm(once: bool = False) -> None:
    """From here on SIGTERM is Ctrl-C, which saves: a scheduler sends it, and the first
    process of a container ignores it.

    Args:
      once: only the first one; a scheduler may send it to a supervisor and to its
        worker too.
    """
    came: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        if not (once and came):
            came.append(number)
            signal.raise_signal(signal.SIGINT)

    # a shell starts processes in the background so
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, interrupt)


def join(cluster: Cluster, met: bool = False) -> None:
    """Meet the other hosts, and join them to one JAX; nothing may have used JAX before.

    They know each other by LEPTON_TOKEN.

    Args:
      cluster: as this host found it.
      met: they have met already.

    Raises:
      SettingError: there is no token; the coordinator's port is taken or can't be
        reached, a host does not come within the limit, or differs; JAX_PLATFORMS names
        what JAX does not know.
    """
    if not met:
        token = tokens.of_run(cluster, None)()
        meet(cluster, facts(), time_to_meet(cluster), token)
    # it takes SIGTERM away from whoever saves at it
    jax.config.update("jax_enable_preemption_service", False)
    found_at(own_address(cluster.coordinator or ""))
    # JAX listens on all addresses, and asks nobody who it is: not where all hosts are
    # here
    name = split(cluster.coordinator or "")[0]
    here = cluster.coordinator if name in ("127.0.0.1", "::1") else None
    with without_proxies():
        # without "deactivate" JAX looks around for itself, and under SLURM takes one
        # GPU a process
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.hosts,
            cluster.host_id,
            local_device_ids=cluster.visible,
            coordinator_bind_address=here,
            cluster_detection_method="deactivate",
        )
    try:
        jax.devices()
    except RuntimeError as error:
        # another host is gone, chips fail, or an earlier process still holds them
        if "known backends" not in str(error):
            raise JaxRuntimeError(str(error)) from error
        raise SettingError(
            str(error).partition(" (set JAX_")[0],
            where=f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}",
            remedy="set JAX_PLATFORMS=cpu, or install JAX for the chips that are there",
        ) from error


def own_address(coordinator: str) -> str | None:
    """The address at which the other hosts find this one: that from which it reaches
    the coordinator. No packet is sent.

    On the coordinator's own machine that may be a loopback address, which serves where
    the coordinator's is one, too; else it is the address that this machine's name
    stands for, or from which it would reach other networks.

    Args:
      coordinator: name or address, with a port.

    Returns:
      A numerical address; None if none can be found.
    """
    name = split(coordinator)[0]
    address = _source(name)
    if (
        address is None
        or not ip_address(address).is_loopback
        or name in ("localhost", "127.0.0.1", "::1")
    ):
        return address
    outward = (_source(far) for far in (socket.gethostname(), *ELSEWHERE))
    return next(
        (
            found
            for found in outward
            if found is not None and not ip_address(found).is_loopback
        ),
        address,
    )


def _source(name: str) -> str | None:
    """This machine's address towards a name; None if there is no way to it."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(
            name, 9, type=socket.SOCK_DGRAM
        ):
            with (
                contextlib.suppress(OSError),
                socket.socket(family, kind, protocol) as probe,
            ):
                probe.connect(address)
                return str(probe.getsockname()[0])
    return None


def spawn(
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str] | None = None,
    lifeline: bool = False,
    with_fewer: bool = False,
    first: str = "",
) -> int:
    """Run a process for each host, and end all if one fails.

    Host 0 writes to this process's own output; what the others write is passed on to
    standard error behind `[host I] `. SIGINT and SIGTERM are passed on to all.

    Args:
      commands: one a host.
      environment: variables to set on top of this process's own.
      lifeline: they are told to end by the end of their standard input instead of by a
        signal, which ssh would not pass on.
      with_fewer: one that fails ends nobody, and how it went is what host 0 says.
      first: with `lifeline`, what each reads first there.

    Returns:
      0, or the exit code of the host that failed first (128 + n if signal n ended it);
      130 if a signal asked for the end.

    Raises:
      SettingError: a process can't be started.
    """
    inherited = variables(environment)
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    lock = threading.Lock()
    with _passing_on(processes) as signalled:
        try:
            for host, command in enumerate(commands):
                pipes: dict[str, Any] = {
                    "stdin": subprocess.PIPE if lifeline else subprocess.DEVNULL
                }
                pipes |= (
                    {}
                    if host == 0
                    else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
                )
                try:
                    # a group of its own: Ctrl-C in the terminal would reach it twice
                    process = subprocess.Popen(
                        command, env=inherited, process_group=0, **pipes
                    )
                except OSError as error:
                    raise SettingError(
                        f"host {host} can't be started: {error.strerror}",
                        where=command[0],
                        remedy="start fewer hosts, or mend that and start again",
                    ) from error
                processes.append(process)
                if process.stdin is not None:
                    with contextlib.suppress(OSError):  # it has ended already
                        process.stdin.write(first.encode())
                        process.stdin.flush()
                if host:
                    readers.append(
                        threading.Thread(
                            target=forward,
                            args=(process.stdout, host, lock),
                            daemon=True,
                        )
                    )
                    readers[-1].start()
            failed = _wait(processes, signalled, with_fewer)
        finally:
            _end(processes)
            for reader in readers:
                reader.join(timeout=5)
    if with_fewer:
        failed = 0 if processes[0].returncode else None
    if failed is None:
        return 0
    code = processes[failed].returncode
    if signalled:
        return 130
    how = (
        f"was ended by {signal.Signals(-code).name}"
        if code < 0
        else f"ended with exit code {code}"
    )
    fault = LeptonError(
        f"host {failed} {how}; the others were stopped",
        where=f"host {failed} of {len(processes)}",
        remedy=(
            f"see what it wrote above{f', behind [host {failed}]' if failed else ''}"
        ),
    )
    print(f"error: {fault}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passing_on(processes: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to all processes while it is open; yields the signals that
    came.
    """
    came: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        came.append(number)
        for process in processes:
            _tell(process, number)

    # only there may handlers be set
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    processes: Sequence[subprocess.Popen],
    signalled: Sequence[int],
    with_fewer: bool,
) -> int | None:
    """Until all have ended well, or the first has not: its number. After a signal,
    until all have, or the grace is over.

    `with_fewer`: until all have ended, however they did.
    """
    failed: int | None = None
    until: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        if failed is None:
            failed = next((host for host, code in enumerate(codes) if code), None)
        if None not in codes or (
            failed is not None and not signalled and not with_fewer
        ):
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


def forward(
    stream: IO[bytes],
    host: int,
    lock: threading.Lock = LOCK,
) -> None:
    """Its lines to standard error behind `[host I] `, until it ends."""
    with stream:
        for line in stream:
            said = GLOO.sub(b"", line)
            if not said:
                continue
            text = said.decode(errors="replace").rstrip("\r\n")
            # a closed terminal is no reason to block the host
            with lock, contextlib.suppress(OSError):
                # in one piece, for host 0 writes there too
                sys.stderr.write(f"[host {host}] {text}\n")
                sys.stderr.flush()
