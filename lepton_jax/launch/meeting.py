"""The roll call: all hosts meet on the coordinator's port before JAX starts there.

JAX ends the process, without a word of who is missing, where a host does not come or
says another number of hosts. Here host 0 hears of each host its number and some facts
that must be the same everywhere, and either all go on or all end in one error.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from lepton_jax.errors import SettingError
from lepton_jax.launch import proof
from lepton_jax.launch.cluster import Cluster, joined, split
from lepton_jax.launch.door import BACKLOG, PROOF_TIME, Door
from lepton_jax.launch.wire import Line

CHANNEL = "roll call"
TICK = 0.05  # seconds
AGAIN_AFTER = 0.2  # seconds
MARGIN = 5.0  # seconds that the others wait for host 0's verdict beyond the limit


def meet(
    cluster: Cluster,
    facts: Mapping[str, str],
    limit: float,
    token: str,
) -> None:
    """Return once all hosts of the cluster are there and their facts are the same.

    Args:
      cluster: as this host found it.
      facts: what must not differ between the hosts, by name.
      limit: seconds to wait for all.
      token: by which they know each other.

    Raises:
      SettingError: on every host that came: who is missing, which two claim one number,
        which differs in what, why the port can't be used or reached.
    """
    assert cluster.coordinator is not None
    name, port = split(cluster.coordinator)
    said = {
        "host": cluster.host_id,
        "hosts": cluster.hosts,
        "facts": dict(facts),
    }
    if cluster.host_id:
        _go(
            name,
            int(port),
            said,
            cluster,
            limit,
            token,
        )
    else:
        _receive(int(port), said, cluster, limit, token)


def _receive(
    port: int,
    own: dict[str, Any],
    cluster: Cluster,
    limit: float,
    token: str,
) -> None:
    ipv6 = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if ipv6 else socket.AF_INET,
            dualstack_ipv6=ipv6,
            backlog=max(cluster.hosts, BACKLOG),
        )
    except OSError as error:
        raise taken(port, error, cluster) from error

    until = time.monotonic() + limit
    came: dict[int, Line] = {}
    heard_of: list[Line] = []  # of two that claim one number, both are told
    fault: SettingError | None = None
    with contextlib.closing(Door(listener, token, CHANNEL)) as door:
        while len(came) < cluster.hosts - 1 and fault is None:
            if time.monotonic() > until:
                absent = [host for host in range(1, cluster.hosts) if host not in came]
                fault = missing(
                    absent,
                    cluster,
                    limit,
                    str(door.refused),
                )
            for line, heard in door.serve(TICK):
                if not _is_host(heard):
                    door.drop(line)
                    continue
                host = heard["host"]
                fault = fault or differs(own, heard, cluster)
                if host in came:
                    came[host].receive()  # whether it is still there
                    if came[host].open and came[host] is not line:
                        fault = fault or twice(host, cluster)
                came[host] = line
                heard_of.append(line)
                door.keep(line)

        door.lock()  # JAX listens there next
        verdict = {} if fault is None else {"what": fault.what, "remedy": fault.remedy}
        for line in heard_of:
            line.send(**verdict)
        while not all(line.flush() for line in heard_of) and time.monotonic() < until:
            time.sleep(TICK)
    if fault is not None:
        raise fault


def _is_host(heard: dict[str, Any]) -> bool:
    return isinstance(heard.get("host"), int) and isinstance(heard.get("facts"), dict)


def taken(
    port: int,
    error: OSError,
    cluster: Cluster,
) -> SettingError:
    """Host 0's port is another's."""
    return SettingError(
        f"host 0 can't listen on port {port}: {error.strerror}",
        where=cluster,
        remedy=(
            "end what uses the port, or give another by --coordinator or"
            " JAX_COORDINATOR_ADDRESS"
        ),
    )


def unmet(
    name: str,
    port: int,
    cluster: Cluster,
    limit: float,
    fault: str,
) -> SettingError:
    """Host 0 does not answer."""
    remedy = (
        "look whether host 0 runs, and whether that name and port are right and open"
    )
    if fault in (proof.NOT_TAKEN, proof.NOT_GIVEN):
        remedy = f"{proof.REMEDY}, and look whether it is host 0 that answers there"
    elif "no token" in fault:  # see `tokens.Token`
        remedy = (
            "look whether host 0 runs; name the same --run-dir on all hosts, in "
            f"storage that all of them see, or {proof.REMEDY}"
        )
    return SettingError(
        f"host 0 can't be met at {joined(name, port)} within {limit:.0f} s: {fault}",
        where=cluster,
        remedy=remedy,
    )


def missing(
    hosts: list[int],
    cluster: Cluster,
    limit: float,
    refused: str = "",
) -> SettingError:
    """Hosts that did not come.

    Args:
      refused: what is to be said of callers without the token.
    """
    few = ", ".join(map(str, hosts[:8])) + (
        f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
    )
    remedy = "look whether they were started, with this coordinator, and reach its port"
    if refused:
        remedy += f"; {proof.REMEDY}"
    what = (
        f"of {cluster.hosts} hosts {len(hosts)} did not come within {limit:.0f} s:"
        f" {few}"
    )
    return SettingError(what + refused, where=cluster, remedy=remedy)


def differs(
    own: dict[str, Any],
    heard: dict[str, Any],
    cluster: Cluster,
) -> SettingError | None:
    host = heard["host"]
    if heard.get("hosts") != own["hosts"]:
        return SettingError(
            f"host {host} counts {heard.get('hosts')} hosts, host 0 counts"
            f" {own['hosts']}",
            where=cluster,
            remedy="start all hosts with the same --hosts",
        )
    if not 0 < host < own["hosts"]:
        return twice(host, cluster)
    for name in sorted(own["facts"].keys() | heard["facts"].keys()):
        here = own["facts"].get(name)
        there = heard["facts"].get(name)
        if here != there:
            return SettingError(
                f"host {host} differs from host 0 in {name}: {there} there, {here}"
                " here",
                where=cluster,
                remedy="make them the same on all hosts, and start again",
            )
    return None


def twice(host: int, cluster: Cluster) -> SettingError:
    return SettingError(
        f"two processes say that they are host {host}",
        where=cluster,
        remedy="give each its own --host-id, and end what an earlier start left behind",
    )


def _go(
    name: str,
    port: int,
    said: dict[str, Any],
    cluster: Cluster,
    limit: float,
    token: str,
) -> None:
    until = time.monotonic() + limit
    fault = "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            address = (name, port)
            connection = socket.create_connection(address, timeout=min(5.0, left))
        except OSError as error:
            fault = error.strerror or str(error)
            time.sleep(AGAIN_AFTER)
            continue

        with contextlib.closing(Line(connection, token, CHANNEL, head=False)) as line:
            line.send(**said)
            verdict = _answer(line, until + MARGIN)
        if verdict is None:
            fault = line.fault or fault
            time.sleep(AGAIN_AFTER)
        elif verdict:
            raise SettingError(
                str(verdict.get("what")),
                where=cluster,
                remedy=str(verdict.get("remedy")),
            )
        else:
            return
    raise unmet(name, port, cluster, limit, fault)


def _answer(line: Line, until: float) -> dict[str, Any] | None:
    """What host 0 says; None if it says nothing, or is not host 0."""
    patience = time.monotonic() + PROOF_TIME
    while line.open and time.monotonic() < (until if line.proven else patience):
        select.select([line], [], [], TICK)
        messages = line.receive()
        if messages:
            return messages[0]
    return None
