"""What the head knows of a run, for whoever looks from outside: RUN/hosts.json."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lepton_jax.launch.verdict import Fault, Place, behind

SELDOM = 1.0  # seconds between two writes
LATELY = 60.0  # seconds over which a share of time is taken
# seconds: of such a share; without a line; for which others wait, that are worth a word
LEAST = 3.0
MUTE = 5.0
HELD = 2.0
# of its time a host waits for data, and so many times as much as the others, to be
# called slow
SHARE = 0.02
TIMES = 2.0


@dataclass
class HostRecord:
    """A host as last heard of: `state` is "missing", "waiting", "running", "ended" or
    "lost".
    """

    state: str = "missing"
    name: str = ""
    host_id: int | None = None
    place: Place | None = None
    heard: float = 0.0  # monotonic
    silent: float = 0.0
    slow: float = 0.0  # seconds for which it was the slowest, over all attempts
    # time and its seconds in "data", a second apart
    recent: deque[tuple[float, float]] = field(default_factory=deque)

    def hear(
        self,
        place: Place,
        heard: float,
        silent: float,
    ) -> None:
        """Where its worker was at `heard`, which may be what was known already."""
        if place.data < self.data:  # another worker
            self.recent.clear()
        if not self.recent or heard - self.recent[-1][0] >= SELDOM:
            self.recent.append((heard, place.data))
        while heard - self.recent[0][0] > LATELY:
            self.recent.popleft()
        self.place = place
        self.heard = heard
        self.silent = silent

    @property
    def data(self) -> float:
        return self.place.data if self.place is not None else 0.0

    @property
    def data_share(self) -> float | None:
        """Of the last minute, what it waited for data; None while less than three
        seconds are known.
        """
        if not self.recent or self.heard - self.recent[0][0] < LEAST:
            return None
        (began, before), (now, after) = self.recent[0], self.recent[-1]
        return min(1.0, (after - before) / (now - began))

    def unheard(self, now: float) -> float:
        """Seconds without a line of its worker's; its supervisor's silence counts."""
        return (
            self.silent + now - self.heard
            if self.state in ("running", "lost") and self.heard
            else self.silent
        )

    def to_json(self, now: float) -> dict[str, Any]:
        at = self.place
        share = self.data_share
        where = (
            {}
            if at is None
            else {
                "phase": at.phase,
                "step": at.step,
                "done": at.done,
                "seconds_in_it": round(at.age + now - self.heard, 1),
                "limit": at.limit if at.limit < float("inf") else None,
                "seconds": {
                    "data": at.data,
                    "steps": at.steps,
                    "evaluation": at.evaluation,
                    "save": at.save,
                },
                "data_share": None if share is None else round(share, 4),
                "memory": at.memory,
                "device_memory": at.device_memory,
            }
        )
        return {
            "state": self.state,
            "machine": self.name,
            "host_id": self.host_id,
            **where,
            "seconds_silent": round(self.unheard(now), 1),
            "seconds_slowest": round(self.slow, 1),
        }


def slowest(hosts: Mapping[int, HostRecord], now: float) -> dict[str, Any] | None:
    """The host that the others wait for, as {"host", "why"}; None if none stands out.

    In one program all hosts wait for the slowest, and so all take the same time for a
    step. What tells them apart is time of a host's own: it is silent, the others have
    got further and wait, or it waits for data more than they do. A device that computes
    more slowly than the others does not show.
    """
    running = {
        host: each
        for host, each in hosts.items()
        if each.state == "running" and each.place is not None
    }
    if len(running) < 2:
        return None
    mute = max(
        running,
        key=lambda host: running[host].unheard(now),
    )
    if running[mute].unheard(now) > MUTE:
        return {"host": mute, "why": f"silent for {running[mute].unheard(now):.0f} s"}
    places = {
        host: each.place for host, each in running.items() if each.place is not None
    }
    # hosts that go on are heard of at different times, and so at different steps
    held = min(at.age + now - running[host].heard for host, at in places.items())
    last = behind(places)
    if held > HELD and len(last) == 1:
        host = last[0]
        return {
            "host": host,
            "why": (
                f"{places[host]} for {places[host].age + now - running[host].heard:.0f}"
                " s, and the others wait for it"
            ),
        }
    shares = {
        host: share
        for host, each in running.items()
        if (share := each.data_share) is not None
    }
    if len(shares) < 2:
        return None
    host = max(shares, key=lambda host: shares[host])
    usual = statistics.median(share for other, share in shares.items() if other != host)
    if shares[host] < max(SHARE, TIMES * usual):
        return None
    return {
        "host": host,
        "why": (
            f"{100 * shares[host]:.0f} % of its time it waits for data, the others"
            f" {100 * usual:.0f} %"
        ),
    }


@dataclass
class Recovery:
    """One fault and the way back; times are monotonic, in seconds.

    Attributes:
      seen: when the head heard of it.
      since: when the host had last made progress, which for one that is stuck is long
        before.
      ended: when all workers had ended.
      begun: when the next attempt began.
      stepped: when all hosts had trained a step of it.
    """

    generation: int
    fault: Fault
    seen: float
    since: float
    ended: float | None = None
    begun: float | None = None
    stepped: float | None = None

    def to_json(self) -> dict[str, Any]:
        after = {
            name: None if at is None else round(at - self.seen, 3)
            for name, at in (
                ("ended", self.ended),
                ("begun", self.begun),
                ("stepped", self.stepped),
            )
        }
        return {
            "generation": self.generation,
            "host": self.fault.host,
            "cause": self.fault.cause,
            "what": str(self.fault),
            "phase": self.fault.place.phase,
            "step": self.fault.place.step,
            "stack": list(self.fault.stack),
            "seconds_to_notice": round(self.seen - self.since, 3),
            **{f"seconds_to_{k}": v for k, v in after.items()},
        }


@dataclass
class Record:
    """How a run on several hosts stands.

    Attributes:
      state: "meeting", "running", "stopping", "ending", "waiting" or "over".
      generation: which attempt this is, from 1.
      restarts, restarts_left: attempts after a failure so far, and how many more are
        allowed.
      hosts: by number.
      recoveries: one for each fault.
      refused_connections: how many callers at the coordinator's port were turned away
        without proof of the run's token.
      exit_code: once it is over.
      slowest: as the function of that name found it last.
    """

    state: str = "meeting"
    generation: int = 0
    restarts: int = 0
    restarts_left: int = 0
    hosts: dict[int, HostRecord] = field(default_factory=dict)
    recoveries: list[Recovery] = field(default_factory=list)
    exit_code: int | None = None
    slowest: dict[str, Any] | None = None
    refused_connections: int = 0
    written: float = float("-inf")

    def to_json(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        now = time.monotonic()
        return {
            "time": time.time(),
            "state": self.state,
            "generation": self.generation,
            "restarts": self.restarts,
            "restarts_left": self.restarts_left,
            "exit_code": self.exit_code,
            "hosts": {
                str(host): each.to_json(now)
                for host, each in sorted(self.hosts.items())
            },
            "slowest": self.slowest,
            "refused_connections": self.refused_connections,
            "recoveries": [each.to_json() for each in self.recoveries],
        }

    def write(
        self,
        folder: Path | None,
        now: float,
        at_once: bool = False,
    ) -> None:
        """Into the run folder, at most once a second; a full disk is no reason to end
        the run.
        """
        if folder is None or (now - self.written < SELDOM and not at_once):
            return
        self.slowest = slowest(self.hosts, now)
        if self.slowest is not None:
            self.hosts[self.slowest["host"]].slow += min(now - self.written, 2 * SELDOM)
        self.written = now
        fresh = folder / f"hosts.json.{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self.to_json()) + "\n")
            fresh.replace(folder / "hosts.json")
