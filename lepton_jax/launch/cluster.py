"""The hosts of a run as one of them sees them, and their addresses.

`discovery` finds the cluster of a process; `surroundings` reads it from the
environment of a scheduler.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lepton_jax.errors import SettingError

# above what Linux gives out by itself (ip_local_port_range ends at 60999)
FIRST_PORT = 61440
PORTS = 4096
# used where nobody else can be on the machine, or the user names no other port; the
# one that JAX itself uses on a TPU pod
PORT = 8476
MOST_PORT = 65535
# assumption: more than any run needs, so that a typing error cannot take all memory
MOST_HOSTS = 65536
START_HERE = "to train on this machine alone, add --hosts 1"


@dataclass(frozen=True)
class Cluster:
    """The hosts of a run, as one of them sees them; a host is a process.

    Args:
      source: "alone", "local" (to be started here), "options", "environment", "tpu",
        "slurm", "kubernetes" or "open-mpi".
      why: evidence for this cluster, in a few words.
      hosts: number of hosts.
      host_id: number of this host, from 0.
      coordinator: "name:port" where host 0 awaits the others; None where nobody has to
        be met.
      devices: number of devices that each host uses; None: all that it sees.
      visible: the machine's GPUs that this host takes, where several hosts share them;
        None: all.
      missing: number of hosts that were lost, and that this attempt goes on without.
    """

    source: str
    why: str
    hosts: int = 1
    host_id: int = 0
    coordinator: str | None = None
    devices: int | None = None
    visible: tuple[int, ...] | None = None
    missing: int = 0

    def __str__(self) -> str:
        """Return the line that a launch prints first."""
        if self.source == "local":
            return f"cluster: {self.hosts} hosts on this machine: {self.why}"
        if self.hosts == 1:
            return f"cluster: one host: {self.why}"
        return (
            f"cluster: host {self.host_id} of {self.hosts}, coordinator"
            f" {self.coordinator}: {self.why}"
        )


def two(first: Cluster, second: Cluster) -> SettingError:
    """Return the error of a process that belongs to two clusters."""
    return SettingError(
        f"there are two clusters at once: host {first.host_id} of {first.hosts} by"
        f" {first.why}, and host {second.host_id} of {second.hosts} by {second.why}",
        where="finding the cluster",
        remedy=(
            "unset the variables, or leave out the options, of the one that is not"
            f" meant; {START_HERE}"
        ),
    )


# ---- addresses ----


def address(text: str, where: str) -> str:
    """Return "name:port" for a name with or without a port.

    An IPv6 address comes out in brackets.

    Raises:
      SettingError: there is no name, or no such port.
    """
    name, port = split(text)
    name_is_good = bool(name) and not re.search(r"[\s/,]", name)
    is_number = re.fullmatch(r"\d{1,5}", port, re.ASCII) is not None
    port_is_good = is_number and 0 < int(port) <= MOST_PORT
    if not (name_is_good and port_is_good):
        raise SettingError(
            f"{text!r} is no address",
            where=where,
            remedy="write NAME:PORT, with a port from 1 to 65535",
        )
    return joined(name, int(port))


def split(text: str) -> tuple[str, str]:
    """Return name and port of an address; PORT where it has none.

    >>> split("node1:9000"), split("node1"), split("[::1]:9000"), split("::1")
    (('node1', '9000'), ('node1', '8476'), ('::1', '9000'), ('::1', '8476'))
    """
    if match := re.fullmatch(r"\[([^]]+)\](?::(.*))?", text):
        return match[1], match[2] or str(PORT)
    if text.count(":") > 1:
        return text, str(PORT)
    name, colon, port = text.partition(":")
    return name, port if colon else str(PORT)


def joined(name: str, port: int) -> str:
    """Return "name:port", with an IPv6 address in brackets."""
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def port_of(job: int) -> int:
    """Return a port for a job that may share its machines with other jobs.

    Jobs whose numbers follow each other get different ports.
    """
    return FIRST_PORT + job % PORTS
