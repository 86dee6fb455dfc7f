"""The roll call: all hosts meet on the coordinator's port before JAX starts there.

JAX ends the process, without a word of who is missing, where a host does not come or
says another number of hosts. Here host 0 hears from each host its number and some facts
that must be the same everywhere, and either all go on or all end in one error.

Example, for two hosts: host 1 connects and sends {"host": 1, "hosts": 2, "facts":
{"jax": "0.10.2", ...}}. Host 0 compares that with its own, and answers {} if all is
well; else {"what": "host 1 differs from host 0 in jax: ...", "remedy": "..."}, which
both of them raise.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_jax.errors import SettingError
from lepton_jax.launch import proof, tokens
from lepton_jax.launch.cluster import Cluster, joined, split
from lepton_jax.launch.door import PROOF_TIME, Door, listen
from lepton_jax.launch.wire import Line

CHANNEL = "roll call"
TICK = 0.05  # seconds
AGAIN_AFTER = 0.2  # seconds
CALL_TIME = 5.0  # seconds for one attempt to connect
# assumption: seconds that the others wait for host 0's verdict beyond the limit
MARGIN = 5.0
MOST_NAMED = 8  # hosts that an error lists


class NoAnswerError(ConnectionError):
    """Nobody has answered at host 0's port yet."""


def reason(error: Exception) -> str:
    """Return why a connection failed: the system's words, where it has some."""
    return getattr(error, "strerror", None) or str(error)


def meet(
    cluster: Cluster,
    facts: Mapping[str, str],
    limit: float,
    token: str,
) -> None:
    """Return once all hosts of the cluster are there and their facts are the same.

    Args:
      cluster: as this host found it.
      facts: texts that must not differ between the hosts, by name.
      limit: seconds to wait for all.
      token: by which they know each other.

    Raises:
      SettingError: on every host that came: which hosts are missing, which two claim
        one number, which one differs in what, why the port can't be used or reached.
    """
    assert cluster.coordinator is not None
    name, port = split(cluster.coordinator)
    hello = {
        "host": cluster.host_id,
        "hosts": cluster.hosts,
        "facts": dict(facts),
    }
    if cluster.host_id:
        _call(
            (name, int(port)),
            hello,
            cluster,
            limit,
            token,
        )
    else:
        _receive(int(port), hello, cluster, limit, token)


# ---- host 0 ----


def _receive(
    port: int,
    own: dict[str, Any],
    cluster: Cluster,
    limit: float,
    token: str,
) -> None:
    try:
        listener = listen(port, cluster)
    except OSError as error:
        raise taken(port, error, cluster) from error

    until = time.monotonic() + limit
    with contextlib.closing(Door(listener, token, CHANNEL)) as door:
        roll = _Roll(own, cluster, limit, door)
        while not roll.complete and roll.fault is None:
            if time.monotonic() > until:
                roll.end_without_some()
            for line, hello in door.serve(TICK):
                roll.take(line, hello)

        door.lock()  # JAX listens there next
        roll.answer()
        while not roll.flush() and time.monotonic() < until:
            time.sleep(TICK)
    if roll.fault is not None:
        raise roll.fault


class _Roll:
    """The hosts that have come to host 0, and what is wrong with them."""

    def __init__(
        self,
        own: dict[str, Any],
        cluster: Cluster,
        limit: float,
        door: Door,
    ):
        self.fault: SettingError | None = None
        self._own = own
        self._cluster = cluster
        self._limit = limit
        self._door = door
        self._line: dict[int, Line] = {}
        # of two that claim one number, both get the answer
        self._heard: list[Line] = []

    @property
    def complete(self) -> bool:
        return len(self._line) == self._cluster.hosts - 1

    def take(
        self,
        line: Line,
        hello: dict[str, Any],
    ) -> None:
        """Take what a caller says of itself."""
        if not _is_host(hello):
            self._door.drop(line)
            return

        host = hello["host"]
        self._blame(differs(self._own, hello, self._cluster))
        before = self._line.get(host)
        if before is not None:
            before.receive()  # notices if that one has gone
            if before.open and before is not line:
                self._blame(twice(host, self._cluster))
        self._line[host] = line
        self._heard.append(line)
        self._door.keep(line)

    def end_without_some(self) -> None:
        """Note the hosts that have not come in time as the fault."""
        numbers = range(1, self._cluster.hosts)
        absent = [host for host in numbers if host not in self._line]
        refused = str(self._door.refused)
        self._blame(
            missing(
                absent,
                self._cluster,
                self._limit,
                refused,
            )
        )

    def answer(self) -> None:
        """Tell all that came whether they may go on."""
        verdict = {}
        if self.fault is not None:
            verdict = {"what": self.fault.what, "remedy": self.fault.remedy}
        for line in self._heard:
            line.send(**verdict)

    def flush(self) -> bool:
        """Return whether all have the answer."""
        return all(line.flush() for line in self._heard)

    def _blame(self, fault: SettingError | None) -> None:
        """Keep the first fault."""
        if self.fault is None:
            self.fault = fault


def _is_host(hello: dict[str, Any]) -> bool:
    return isinstance(hello.get("host"), int) and isinstance(hello.get("facts"), dict)


# ---- the other hosts ----


def _call(
    address: tuple[str, int],
    hello: dict[str, Any],
    cluster: Cluster,
    limit: float,
    token: str,
) -> None:
    until = time.monotonic() + limit
    fault: Exception = NoAnswerError("no answer")
    while (left := until - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(address, timeout=min(CALL_TIME, left))
        except OSError as error:
            fault = error
            time.sleep(AGAIN_AFTER)
            continue

        with contextlib.closing(Line(connection, token, CHANNEL, head=False)) as line:
            line.send(**hello)
            verdict = _answer(line, until + MARGIN)
        if verdict is None:
            fault = line.error or fault
            time.sleep(AGAIN_AFTER)
        elif verdict:
            raise SettingError(
                str(verdict.get("what")),
                where=cluster,
                remedy=str(verdict.get("remedy")),
            )
        else:
            return
    raise unmet(address, cluster, limit, fault)


def _answer(line: Line, until: float) -> dict[str, Any] | None:
    """Return host 0's verdict; None if it says nothing, or is not host 0."""
    patience = time.monotonic() + PROOF_TIME
    while line.open and time.monotonic() < (until if line.proven else patience):
        select.select([line], [], [], TICK)
        messages = line.receive()
        if messages:
            return messages[0]
    return None


# ---- errors ----


def taken(
    port: int,
    error: OSError,
    cluster: Cluster,
) -> SettingError:
    """Return the error of a host 0 whose port is another's."""
    return SettingError(
        f"host 0 can't listen on port {port}: {error.strerror}",
        where=cluster,
        remedy=(
            "end what uses the port, or give another by --coordinator or"
            " JAX_COORDINATOR_ADDRESS"
        ),
    )


def unmet(
    address: tuple[str, int],
    cluster: Cluster,
    limit: float,
    fault: Exception,
) -> SettingError:
    """Return the error of a host to which host 0 does not answer.

    Args:
      address: name and port of host 0.
      cluster: as this host found it.
      limit: seconds for which it has tried.
      fault: why the last attempt failed.
    """
    remedy = (
        "look whether host 0 runs, and whether that name and port are right and open"
    )
    if isinstance(fault, proof.TokenError):
        remedy = f"{proof.REMEDY}, and look whether it is host 0 that answers there"
    elif isinstance(fault, tokens.NotThereError):
        remedy = (
            "look whether host 0 runs; name the same --run-dir on all hosts, in "
            f"storage that all of them see, or {proof.REMEDY}"
        )
    return SettingError(
        f"host 0 can't be met at {joined(*address)} within {limit:.0f} s:"
        f" {reason(fault)}",
        where=cluster,
        remedy=remedy,
    )


def missing(
    hosts: Sequence[int],
    cluster: Cluster,
    limit: float,
    refused: str = "",
) -> SettingError:
    """Return the error of hosts that did not come.

    Args:
      hosts: their numbers.
      cluster: as host 0 found it.
      limit: seconds for which host 0 has waited.
      refused: words about callers without the token; empty if there were none.
    """
    few = ", ".join(map(str, hosts[:MOST_NAMED]))
    if len(hosts) > MOST_NAMED:
        few += f" and {len(hosts) - MOST_NAMED} more"
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
    hello: dict[str, Any],
    cluster: Cluster,
) -> SettingError | None:
    """Return the error of a host that does not fit to host 0; None if it does.

    Args:
      own: number of hosts and facts of host 0.
      hello: the same of the host, with its number.
      cluster: as host 0 found it.
    """
    host = hello["host"]
    if hello.get("hosts") != own["hosts"]:
        return SettingError(
            f"host {host} counts {hello.get('hosts')} hosts, host 0 counts"
            f" {own['hosts']}",
            where=cluster,
            remedy="start all hosts with the same --hosts",
        )
    if not 0 < host < own["hosts"]:
        return twice(host, cluster)

    own_facts = own["facts"]
    its_facts = hello["facts"]
    for name in sorted(own_facts.keys() | its_facts.keys()):
        here = own_facts.get(name)
        there = its_facts.get(name)
        if here != there:
            return SettingError(
                f"host {host} differs from host 0 in {name}: {there} there, {here}"
                " here",
                where=cluster,
                remedy="make them the same on all hosts, and start again",
            )
    return None


def twice(host: int, cluster: Cluster) -> SettingError:
    """Return the error of two processes that claim one number."""
    return SettingError(
        f"two processes say that they are host {host}",
        where=cluster,
        remedy="give each its own --host-id, and end what an earlier start left behind",
    )
