"""The cluster of this process: from the command line, or else from the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lepton_jax.errors import SettingError
from lepton_jax.launch import surroundings
from lepton_jax.launch.cluster import MOST_HOSTS, Cluster, address, two
from lepton_jax.launch.options import reader


def find(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    hosts: str | int | None = None,
    host_id: int | None = None,
    devices: int | None = None,
    metadata: surroundings.Metadata | None = None,
) -> Cluster:
    """Return the cluster of this process.

    The innermost one decides: Open MPI inside SLURM, Kubernetes or a TPU pod; a TPU pod
    inside Kubernetes. The command line goes before the environment, which must not
    contradict it.

    Args:
      environ: the environment variables.
      coordinator: --coordinator of the command line.
      hosts: --hosts of the command line; either all three are given, or `hosts` alone,
        as "local:4" or 1.
      host_id: --host-id of the command line.
      devices: number of devices that each host uses.
      metadata: returns an attribute of a TPU VM's metadata server, None where it has
        none; without this argument no server is asked.

    Raises:
      SettingError: options or variables that are half set, ill-typed or out of range;
        two clusters at once.
    """
    asked = _asked(coordinator, hosts, host_id)
    if asked is None:
        return replace(surroundings.innermost(environ, metadata), devices=devices)
    if asked.hosts > 1:
        _check_alone(asked, environ, metadata)
    return replace(asked, devices=devices)


def _check_alone(
    asked: Cluster,
    environ: Mapping[str, str],
    metadata: surroundings.Metadata | None,
) -> None:
    """Raise SettingError if the environment tells of another cluster."""
    try:
        around = surroundings.innermost(environ, metadata)
    except SettingError:
        return  # half a cluster is no second one

    same = (around.hosts, around.host_id) == (asked.hosts, asked.host_id)
    if around.hosts > 1 and not (asked.source == "options" and same):
        raise two(asked, around)


def _asked(
    coordinator: str | None,
    hosts: str | int | None,
    host_id: int | None,
) -> Cluster | None:
    """Return the cluster that the command line names; None if it names none."""
    options = {"--coordinator": coordinator, "--hosts": hosts, "--host-id": host_id}
    if all(value is None for value in options.values()):
        return None

    count, local = _count(hosts)
    if local or (count == 1 and coordinator is None):
        return _started_here(options, count)

    missing = [name for name, value in options.items() if value is None]
    if missing:
        raise _incomplete(options, missing)

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
        hosts=count,
        host_id=host_id,
        coordinator=address(coordinator, "command line, --coordinator"),
    )


def _started_here(options: Mapping[str, Any], count: int) -> Cluster:
    """Return the cluster of --hosts 1 or --hosts local:N."""
    hosts = options["--hosts"]
    extra = [
        name
        for name in ("--coordinator", "--host-id")
        if options[name] not in (None, 0)
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


def _incomplete(options: Mapping[str, Any], missing: list[str]) -> SettingError:
    given = [name for name, value in options.items() if value is not None]
    return SettingError(
        f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} given,"
        f" {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not",
        where="command line",
        remedy=(
            "give all three on every host: --coordinator NAME:PORT --hosts N"
            " --host-id I; or start all hosts on this machine by --hosts local:N"
        ),
    )


def _count(hosts: str | int | None) -> tuple[int, bool]:
    """Return --hosts as a number, and whether the hosts are to be started here."""
    if hosts is None:
        return 0, False

    match = re.fullmatch(r"(local:)?(\d{1,9})", str(hosts), re.ASCII)
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


def add_options(group: Any) -> None:
    """Add the options that say where the hosts are to an argparse group."""
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
        type=reader(int),
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
