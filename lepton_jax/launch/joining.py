"""Joining the other hosts: one JAX of all processes, before JAX is first used."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from importlib.metadata import version
from ipaddress import ip_address
from typing import Any, TypeVar

import jax
from jax.errors import JaxRuntimeError

from lepton_jax.compat import found_at, without_proxies
from lepton_jax.errors import PlanError, SettingError
from lepton_jax.launch import tokens
from lepton_jax.launch.cluster import Cluster, split
from lepton_jax.launch.meeting import meet

T = TypeVar("T")
# assumption: seconds in which all hosts must have come; Kubernetes and TPU pods pull
# images and add machines, the others start at once
TIME_TO_MEET = {"kubernetes": 600.0, "tpu": 600.0}
SOON = 50.0
# addresses of networks that do not exist, RFC 5737 and 3849
ELSEWHERE = "192.0.2.1", "2001:db8::1"
DISCARD = 9  # a port, RFC 863; nothing is sent to it
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def run(
    cluster: Cluster,
    work: Callable[[], T],
    supervised: bool = False,
) -> T:
    """Join the other hosts, and do this host's share of the run.

    Args:
      cluster: as `discovery.find` gave it.
      work: called once all hosts have met.
      supervised: a supervisor started this process, where all have met already.

    Returns:
      The result of `work`.

    Raises:
      SettingError: the hosts do not meet.
    """
    if not supervised and cluster.host_id == 0 and cluster.source != "alone":
        print(cluster, file=sys.stderr, flush=True)
    if cluster.hosts > 1:
        join(cluster, met=supervised)
    return work()


def facts() -> dict[str, str]:
    """Return what must not differ between the hosts, whatever they train."""
    return {"jax": jax.__version__, "lepton_jax": version("lepton-jax")}


def time_to_meet(cluster: Cluster) -> float:
    """Return the seconds in which all hosts must have come.

    600 where machines are still being started (Kubernetes, TPU), else 50.
    """
    return TIME_TO_MEET.get(cluster.source, SOON)


def ask_for_devices(count: int | None) -> None:
    """Ask for virtual devices, should the platform turn out to be the CPU.

    Call it before JAX's first use.

    Args:
      count: number of devices; None: leave JAX as it is.

    Raises:
      PlanError: JAX already runs with fewer devices.
    """
    if count is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        present = len(jax.devices())
        if present < count:
            raise PlanError(
                f"JAX is already running with {present} devices, {count} are asked for",
                where="--devices",
                remedy="start a new process",
            ) from error


def heed_sigterm(once: bool = False) -> None:
    """Treat SIGTERM as Ctrl-C, which saves, from here on.

    A scheduler sends SIGTERM, and the first process of a container ignores it.

    Args:
      once: heed only the first one; a scheduler may send it to a supervisor and to its
        worker too.
    """
    signals: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        if once and signals:
            return
        signals.append(number)
        signal.raise_signal(signal.SIGINT)

    # a shell starts processes in the background with SIGINT ignored
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, interrupt)


def join(cluster: Cluster, met: bool = False) -> None:
    """Meet the other hosts and join them to one JAX, before its first use.

    The hosts know each other by LEPTON_TOKEN.

    Args:
      cluster: as this host found it.
      met: the hosts have met already.

    Raises:
      SettingError: there is no token; the coordinator's port is taken or can't be
        reached, a host does not come within the limit, or differs; JAX_PLATFORMS names
        what JAX does not know.
    """
    if not met:
        token = tokens.of_run(cluster, None)()
        meet(cluster, facts(), time_to_meet(cluster), token)

    # JAX's preemption service takes SIGTERM away from the handler that saves
    jax.config.update("jax_enable_preemption_service", False)
    coordinator = cluster.coordinator or ""
    found_at(own_address(coordinator))

    # JAX listens on all addresses and takes any caller for a host; where all hosts are
    # on this machine, it need not listen to others
    here = None
    if split(coordinator)[0] in ("127.0.0.1", "::1"):
        here = cluster.coordinator
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
    _start_backends()


def _start_backends() -> None:
    """Let JAX find its devices.

    Raises:
      SettingError: JAX_PLATFORMS names what JAX does not know.
      JaxRuntimeError: another host is gone, chips fail, or an earlier process still
        holds them.
    """
    try:
        jax.devices()
    except RuntimeError as error:
        # JAX (0.10) raises a plain RuntimeError for both, so that its text alone tells
        # which it is
        if "known backends" not in str(error):
            raise JaxRuntimeError(str(error)) from error
        raise SettingError(
            str(error).partition(" (set JAX_")[0],
            where=f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}",
            remedy="set JAX_PLATFORMS=cpu, or install JAX for the chips that are there",
        ) from error


def own_address(coordinator: str) -> str | None:
    """Return the address at which the other hosts find this one.

    It is the one from which this host reaches the coordinator; no packet is sent. On
    the coordinator's own machine that may be a loopback address, which serves where the
    coordinator's is one, too. Else it is the address that this machine's name stands
    for, or from which it would reach other networks.

    Args:
      coordinator: name or address, with a port.

    Returns:
      A numerical address; None if none can be found.
    """
    name = split(coordinator)[0]
    address = _source(name)
    if address is None or not _is_loopback(address) or name in LOOPBACK:
        return address

    for far in (socket.gethostname(), *ELSEWHERE):
        outward = _source(far)
        if outward is not None and not _is_loopback(outward):
            return outward
    return address


def _is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


def _source(name: str) -> str | None:
    """Return this machine's address towards a name; None if there is no way to it."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(
            name, DISCARD, type=socket.SOCK_DGRAM
        ):
            with (
                contextlib.suppress(OSError),
                socket.socket(family, kind, protocol) as probe,
            ):
                probe.connect(address)
                return str(probe.getsockname()[0])
    return None
