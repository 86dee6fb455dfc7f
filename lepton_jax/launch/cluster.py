"""Which processes train together, and which of them this one is: said on the command
line, or found in the environment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from lepton_jax.cli import settings
from lepton_jax.errors import PlanError, SettingError

# above what Linux gives out by itself (ip_local_port_range ends at 60999)
FIRST_PORT = 61440
PORTS = 4096
PORT = 8476  # where nobody else can be on the machine, or the user names no other
MOST_HOSTS = 65536  # a typing error shall not take all memory
START_HERE = "to train on this machine alone, add --hosts 1"


@dataclass(frozen=True)
class Cluster:
    """The hosts of a run, as one of them sees them; a host is a process.

    Args:
      source: "alone", "local" (to be started here), "options", "environment", "tpu",
        "slurm", "kubernetes" or "open-mpi".
      why: what was found, in a few words.
      hosts: how many there are.
      host_id: which of them this is, from 0.
      coordinator: "name:port" where host 0 awaits the others; None where nobody has to
        be met.
      devices: how many devices each host uses; None: all that it sees.
      visible: which of the machine's GPUs this host takes, where several hosts share
        them; None: all.
    """

    source: str
    why: str
    hosts: int = 1
    host_id: int = 0
    coordinator: str | None = None
    devices: int | None = None
    visible: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.source == "local":
            return f"cluster: {self.hosts} hosts on this machine: {self.why}"
        place = (
            f"host {self.host_id} of {self.hosts}, coordinator {self.coordinator}"
            if self.hosts > 1
            else "one host"
        )
        return f"cluster: {place}: {self.why}"


def find(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    hosts: str | int | None = None,
    host_id: int | None = None,
    devices: int | None = None,
    metadata: Callable[[str], str | None] | None = None,
) -> Cluster:
    """The cluster of this process.

    The innermost decides: Open MPI inside SLURM, Kubernetes or a TPU pod; a TPU pod
    inside Kubernetes. What the command line says goes before the environment, which
    must not contradict it.

    Args:
      environ: the environment variables.
      coordinator, hosts, host_id: of the command line: all three; or `hosts` alone,
        "local:4" or 1.
      devices: how many devices each host uses.
      metadata: attribute of a TPU VM's metadata server, None where it has none; without
        it no server is asked.

    Raises:
      SettingError: options or variables that are half set, ill-typed or out of range;
        two clusters at once.
    """
    from lepton_jax.launch import surroundings  # which is made of this file's Cluster

    asked = _asked(coordinator, hosts, host_id)
    if asked is None:
        return replace(surroundings.find(environ, metadata), devices=devices)
    if asked.hosts > 1:
        try:
            around = surroundings.find(environ, metadata)
        except SettingError:  # half a cluster is no second one
            around = Cluster("alone", "")
        same = asked.source == "options" and (around.hosts, around.host_id) == (
            asked.hosts,
            asked.host_id,
        )
        if around.hosts > 1 and not same:
            raise two(asked, around)
    return replace(asked, devices=devices)


def two(one: Cluster, other: Cluster) -> SettingError:
    """The error of a process that belongs to two clusters."""
    return SettingError(
        f"there are two clusters at once: host {one.host_id} of {one.hosts} by"
        f" {one.why}, and host {other.host_id} of {other.hosts} by {other.why}",
        where="finding the cluster",
        remedy=(
            "unset the variables, or leave out the options, of the one that is not"
            f" meant; {START_HERE}"
        ),
    )


def _asked(
    coordinator: str | None,
    hosts: str | int | None,
    host_id: int | None,
) -> Cluster | None:
    given = {"--coordinator": coordinator, "--hosts": hosts, "--host-id": host_id}
    if all(value is None for value in given.values()):
        return None
    count, local = _count(hosts)
    if local or (count == 1 and coordinator is None):
        extra = [
            name
            for name in ("--coordinator", "--host-id")
            if given[name] not in (None, 0)
        ]
        if extra:
            raise SettingError(
                f"{' and '.join(extra)} can't go with --hosts {hosts}",
                where=f"command line, {extra[0]}",
                remedy="leave out one or the other",
            )
        if count == 1:
            return Cluster("alone", f"--hosts {hosts}")
        return Cluster("local", f"--hosts {hosts}", hosts=count)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        there = [name for name, value in given.items() if value is not None]
        raise SettingError(
            f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} given,"
            f" {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not",
            where="command line",
            remedy=(
                "give all three on every host: --coordinator NAME:PORT --hosts N"
                " --host-id I; or start all hosts on this machine by --hosts local:N"
            ),
        )
    assert coordinator is not None and host_id is not None
    if not 0 <= host_id < count:
        raise SettingError(
            f"--host-id is {host_id}, and --hosts is {count}",
            where="command line, --host-id",
            remedy=f"number the hosts from 0 to {count - 1}",
        )
    return Cluster(
        "options",
        "--coordinator, --hosts and --host-id",
        count,
        host_id,
        address(coordinator, "command line, --coordinator"),
    )


def _count(hosts: str | int | None) -> tuple[int, bool]:
    """--hosts as a number, and whether they are to be started here."""
    if hosts is None:
        return 0, False
    match = re.fullmatch(
        r"(local:)?(\d{1,9})",
        str(hosts),
        re.ASCII,
    )
    if not match or not 1 <= int(match[2]) <= MOST_HOSTS:
        raise SettingError(
            f"--hosts is {str(hosts)!r}",
            where="command line, --hosts",
            remedy=(
                f"write a number from 1 to {MOST_HOSTS}, or local:4 to start four hosts"
                " on this machine"
            ),
        )
    return int(match[2]), match[1] is not None


def address(text: str, where: str) -> str:
    """ "name:port" from a name with or without a port; an IPv6 address in brackets.

    Raises:
      SettingError: there is no name, or no such port.
    """
    name, port = split(text)
    if (
        not name
        or re.search(r"[\s/,]", name)
        or not re.fullmatch(r"\d{1,5}", port, re.ASCII)
        or not 0 < int(port) < 65536
    ):
        raise SettingError(
            f"{text!r} is no address",
            where=where,
            remedy="write NAME:PORT, with a port from 1 to 65535",
        )
    return joined(name, int(port))


def split(text: str) -> tuple[str, str]:
    """Name and port of "name:port", "name", "[::1]:port" or a bare IPv6 address; PORT
    where none is said.
    """
    if match := re.fullmatch(r"\[([^]]+)\](?::(.*))?", text):
        return match[1], match[2] or str(PORT)
    if text.count(":") > 1:
        return text, str(PORT)
    name, colon, port = text.partition(":")
    return name, port if colon else str(PORT)


def joined(name: str, port: int) -> str:
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def port_of(job: int) -> int:
    """A port for a job that may share its machines with others; jobs in a row get
    different ones.
    """
    return FIRST_PORT + job % PORTS


def join(devices: int | None) -> None:
    """Before JAX's first use: ask for `devices` virtual devices, should the platform
    turn out to be the CPU.

    Raises:
      PlanError: JAX already runs with another number of devices.
    """
    if devices is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        if len(jax.devices()) < devices:
            raise PlanError(
                f"JAX is already running with {len(jax.devices())} devices, {devices}"
                " are asked for",
                where="--devices",
                remedy="start a new process",
            ) from error


def options(group: Any) -> None:
    """Add the options that say where the hosts are."""
    group.add_argument(
        "--hosts",
        metavar="N",
        help=(
            "how many processes train together: local:4 starts four here, a number goes"
            " with --coordinator and --host-id; with --on, how many machines to ask for"
            " (default: what SLURM, Kubernetes, Open MPI or a TPU pod says, else this"
            " machine alone)"
        ),
    )
    group.add_argument(
        "--coordinator", metavar="NAME:PORT", help="where host 0 awaits the others"
    )
    group.add_argument(
        "--host-id",
        type=settings.reader(int),
        metavar="I",
        help="which of the hosts this is, from 0",
    )
    group.add_argument(
        "--token-file",
        metavar="FILE",
        help=(
            "the token by which the hosts know each other, the same on all, in a file"
            " that its owner alone can read (default: the variable LEPTON_TOKEN; else"
            " host 0 makes one, and leaves it in the run folder for those who see it)"
        ),
    )
