"""The roll call: all hosts meet on the coordinator's port before JAX starts there.

JAX ends the process, without a word of who is missing, where a host does not come or says another number of hosts. Here host 0
hears of each host its number and some facts that must be the same everywhere, and either all go on or all end in one error.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from lepton_jax.errors import SettingError
from lepton_jax.launch.cluster import Cluster, joined, split

PATIENCE = 2.0  # seconds for a line of a connection; whoever needs longer is none of ours
LONGEST = 1 << 16  # bytes of a line
MARGIN = 5.0  # seconds that the others wait for host 0's verdict beyond the limit


def meet(cluster: Cluster, facts: Mapping[str, str], limit: float) -> None:
    """Return once all hosts of the cluster are there and their facts are the same.

    Args:
      cluster: as this host found it.
      facts: what must not differ between the hosts, by name.
      limit: seconds to wait for all.

    Raises:
      SettingError: on every host that came: who is missing, which two claim one number, which differs in what, why the port
        can't be used or reached.
    """
    assert cluster.coordinator is not None
    name, port = split(cluster.coordinator)
    said = {"host": cluster.host_id, "hosts": cluster.hosts, "facts": dict(facts)}
    if cluster.host_id:
        _go(name, int(port), said, cluster, limit)
    else:
        _receive(int(port), said, cluster, limit)


def _receive(port: int, own: dict[str, Any], cluster: Cluster, limit: float) -> None:
    ipv6 = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(("", port), family=socket.AF_INET6 if ipv6 else socket.AF_INET, dualstack_ipv6=ipv6,
                                        backlog=cluster.hosts)
    except OSError as error:
        raise taken(port, error, cluster) from error
    until = time.monotonic() + limit
    came: dict[int, socket.socket] = {}
    heard_of: list[socket.socket] = []  # of two that claim one number, both are told
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        fault: SettingError | None = None
        while len(came) < cluster.hosts - 1 and fault is None:
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                fault = missing([host for host in range(1, cluster.hosts) if host not in came], cluster, limit)
                continue
            heard = _line(connection, PATIENCE)
            if heard is not None and isinstance(heard.get("host"), int) and isinstance(heard.get("facts"), dict):
                host = heard["host"]
                fault = differs(own, heard, cluster)
                if fault is None and host in came and _alive(came[host]):
                    fault = twice(host, cluster)
                came[host] = connection
                heard_of.append(connection)
        listener.close()  # JAX listens there next
        verdict = {} if fault is None else {"what": fault.what, "remedy": fault.remedy}
        for connection in heard_of:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(verdict).encode() + b"\n")
    if fault is not None:
        raise fault


def taken(port: int, error: OSError, cluster: Cluster) -> SettingError:
    """Host 0's port is another's."""
    return SettingError(f"host 0 can't listen on port {port}: {error.strerror}", where=cluster,
                        remedy="end what uses the port, or give another by --coordinator or JAX_COORDINATOR_ADDRESS")


def unmet(name: str, port: int, cluster: Cluster, limit: float, fault: str) -> SettingError:
    """Host 0 does not answer."""
    return SettingError(f"host 0 can't be met at {joined(name, port)} within {limit:.0f} s: {fault}", where=cluster,
                        remedy="look whether host 0 runs, and whether that name and port are right and open")


def missing(hosts: list[int], cluster: Cluster, limit: float) -> SettingError:
    few = ", ".join(map(str, hosts[:8])) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    return SettingError(f"of {cluster.hosts} hosts {len(hosts)} did not come within {limit:.0f} s: {few}", where=cluster,
                        remedy="look whether they were started, with this coordinator, and reach its port")


def differs(own: dict[str, Any], heard: dict[str, Any], cluster: Cluster) -> SettingError | None:
    host = heard["host"]
    if heard.get("hosts") != own["hosts"]:
        return SettingError(f"host {host} counts {heard.get('hosts')} hosts, host 0 counts {own['hosts']}", where=cluster,
                            remedy="start all hosts with the same --hosts")
    if not 0 < host < own["hosts"]:
        return twice(host, cluster)
    for name in sorted(own["facts"].keys() | heard["facts"].keys()):
        here, there = own["facts"].get(name), heard["facts"].get(name)
        if here != there:
            return SettingError(f"host {host} differs from host 0 in {name}: {there} there, {here} here", where=cluster,
                                remedy="make them the same on all hosts, and start again")
    return None


def twice(host: int, cluster: Cluster) -> SettingError:
    return SettingError(f"two processes say that they are host {host}", where=cluster,
                        remedy="give each its own --host-id, and end what an earlier start left behind")


def _go(name: str, port: int, said: dict[str, Any], cluster: Cluster, limit: float) -> None:
    until, fault = time.monotonic() + limit, "no answer"
    while time.monotonic() < until:
        try:
            with socket.create_connection((name, port), timeout=min(5.0, max(0.1, until - time.monotonic()))) as connection:
                connection.sendall(json.dumps(said).encode() + b"\n")
                verdict = _line(connection, until + MARGIN - time.monotonic())
        except OSError as error:
            fault, verdict = error.strerror or str(error), None
        if verdict is not None:
            if verdict:
                raise SettingError(str(verdict.get("what")), where=cluster, remedy=str(verdict.get("remedy")))
            return
        time.sleep(0.2)
    raise unmet(name, port, cluster, limit, fault)


def _alive(connection: socket.socket) -> bool:
    """Whether the other end still holds it: a host that was started again comes a second time."""
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _line(connection: socket.socket, patience: float) -> dict[str, Any] | None:
    """One line of JSON; None if what comes is no such thing."""
    until, text = time.monotonic() + patience, b""
    while not text.endswith(b"\n") and len(text) < LONGEST:
        connection.settimeout(max(0.01, until - time.monotonic()))
        try:
            more = connection.recv(LONGEST)
        except OSError:
            return None
        if not more:
            return None
        text += more
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
