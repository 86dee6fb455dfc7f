"""The head's record of a run, for those who look from outside: RUN/hosts.json."""

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

from lepton_jax.launch.supervise.verdict import Fault, Place, behind

SELDOM = 1.0  # seconds between two writes
LATELY = 60.0  # seconds over which a share of time is taken
# assumptions: seconds below which nothing is worth a word
LEAST = 3.0  # of `LATELY`, before a share is taken
MUTE = 5.0  # without a line
HELD = 2.0  # for which others wait
# assumptions: a host is called slow that waits for data this share of its time, and
# this many times as much as the others
SHARE = 0.02
TIMES = 2.0


@dataclass
class HostRecord:
    """A host as last heard of.

    Attributes:
      state: "missing", "waiting", "running", "ended" or "lost".
      name: of its machine.
      host_id: its number in this generation; None: it does not take part.
      place: where its worker was last seen.
      heard: time of `place` (monotonic, in seconds).
      silent: seconds without a line of its worker, at `heard`.
      slow: seconds for which it was the slowest host, over all generations.
      recent: time and the worker's seconds in "data", a second apart.
    """

    state: str = "missing"
    name: str = ""
    host_id: int | None = None
    place: Place | None = None
    heard: float = 0.0
    silent: float = 0.0
    slow: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=deque)

    def hear(
        self,
        place: Place,
        heard: float,
        silent: float,
    ) -> None:
        """Note where its worker was at `heard`, which may be known already."""
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
        """Seconds that its worker has waited for data."""
        return self.place.data if self.place is not None else 0.0

    @property
    def data_share(self) -> float | None:
        """Share of the last minute in which it waited for data.

        None while less than three seconds are known.
        """
        if not self.recent or self.heard - self.recent[0][0] < LEAST:
            return None
        began, before = self.recent[0]
        now, after = self.recent[-1]
        return min(1.0, (after - before) / (now - began))

    def age(self, now: float) -> float:
        """Return the seconds for which its worker has not changed."""
        assert self.place is not None
        return self.place.age + now - self.heard

    def unheard(self, now: float) -> float:
        """Return the seconds without a line of its worker.

        The silence of its supervisor counts as well.
        """
        if self.state in ("running", "lost") and self.heard:
            return self.silent + now - self.heard
        return self.silent

    def to_json(self, now: float) -> dict[str, Any]:
        """Return its row of hosts.json."""
        return {
            "state": self.state,
            "machine": self.name,
            "host_id": self.host_id,
            **({} if self.place is None else self._place_to_json(self.place, now)),
            "seconds_silent": round(self.unheard(now), 1),
            "seconds_slowest": round(self.slow, 1),
        }

    def _place_to_json(
        self,
        place: Place,
        now: float,
    ) -> dict[str, Any]:
        share = self.data_share
        return {
            "phase": place.phase,
            "step": place.step,
            "done": place.done,
            "seconds_in_it": round(self.age(now), 1),
            "limit": place.limit if place.limit < float("inf") else None,
            "seconds": {
                "data": place.data,
                "steps": place.steps,
                "evaluation": place.evaluation,
                "save": place.save,
            },
            "data_share": None if share is None else round(share, 4),
            "memory": place.memory,
            "device_memory": place.device_memory,
        }


# ---- the slowest host ----


def slowest(hosts: Mapping[int, HostRecord], now: float) -> dict[str, Any] | None:
    """Return the host that the others wait for, as {"host", "why"}.

    None if no host stands out. In one program all hosts wait for the slowest, and so
    all take the same time for a step. Only time of a host's own tells them apart: it is
    silent, the others have got further and wait, or it waits for data more than they
    do. A device that computes more slowly than the others does not show.
    """
    running = {
        number: host
        for number, host in hosts.items()
        if host.state == "running" and host.place is not None
    }
    if len(running) < 2:
        return None
    return _mute(running, now) or _waited_for(running, now) or _short_of_data(running)


def _mute(running: Mapping[int, HostRecord], now: float) -> dict[str, Any] | None:
    """Return the host that has been silent for longest, if that is long."""
    silence = {number: host.unheard(now) for number, host in running.items()}
    number = max(silence, key=lambda number: silence[number])
    if silence[number] <= MUTE:
        return None
    return {"host": number, "why": f"silent for {silence[number]:.0f} s"}


def _waited_for(running: Mapping[int, HostRecord], now: float) -> dict[str, Any] | None:
    """Return the one host that is behind, if nobody has got any further for a time."""
    # hosts that go on are heard of at different times, and so at different steps
    held = min(host.age(now) for host in running.values())
    places = {
        number: host.place for number, host in running.items() if host.place is not None
    }
    last = behind(places)
    if held <= HELD or len(last) > 1:
        return None
    number = last[0]
    seconds = running[number].age(now)
    return {
        "host": number,
        "why": f"{places[number]} for {seconds:.0f} s, and the others wait for it",
    }


def _short_of_data(running: Mapping[int, HostRecord]) -> dict[str, Any] | None:
    """Return the host that waits for data much more than the others do."""
    shares = {
        number: share
        for number, host in running.items()
        if (share := host.data_share) is not None
    }
    if len(shares) < 2:
        return None
    number = max(shares, key=lambda number: shares[number])
    usual = statistics.median(
        share for other, share in shares.items() if other != number
    )
    if shares[number] < max(SHARE, TIMES * usual):
        return None
    return {
        "host": number,
        "why": (
            f"{100 * shares[number]:.0f} % of its time it waits for data, the others"
            f" {100 * usual:.0f} %"
        ),
    }


# ---- the whole run ----


@dataclass
class Recovery:
    """One fault and the way back; times are monotonic, in seconds.

    Attributes:
      generation: the attempt that the fault ended.
      fault: that fault.
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
        """Return its row of hosts.json."""
        return {
            "generation": self.generation,
            "host": self.fault.host,
            "cause": self.fault.cause,
            "what": str(self.fault),
            "phase": self.fault.place.phase,
            "step": self.fault.place.step,
            "stack": list(self.fault.stack),
            "seconds_to_notice": round(self.seen - self.since, 3),
            "seconds_to_ended": self._after(self.ended),
            "seconds_to_begun": self._after(self.begun),
            "seconds_to_stepped": self._after(self.stepped),
        }

    def _after(self, when: float | None) -> float | None:
        return None if when is None else round(when - self.seen, 3)


@dataclass
class Record:
    """State of a run on several hosts.

    Attributes:
      state: "meeting", "running", "stopping", "ending", "waiting" or "over".
      generation: number of the attempt, from 1.
      restarts: number of attempts after a failure so far.
      restarts_left: how many more are allowed.
      hosts: by number.
      recoveries: one for each fault.
      exit_code: once the run is over.
      slowest: the last result of the function `slowest`.
      refused_connections: number of callers at the coordinator's port that were turned
        away without proof of the run's token.
      written: time of the last write (monotonic, in seconds).
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
        """Return the content of hosts.json; times are in seconds."""
        now = time.monotonic()
        hosts = sorted(self.hosts.items())
        return {
            "time": time.time(),
            "state": self.state,
            "generation": self.generation,
            "restarts": self.restarts,
            "restarts_left": self.restarts_left,
            "exit_code": self.exit_code,
            "hosts": {str(number): host.to_json(now) for number, host in hosts},
            "slowest": self.slowest,
            "refused_connections": self.refused_connections,
            "recoveries": [recovery.to_json() for recovery in self.recoveries],
        }

    def write(
        self,
        folder: Path | None,
        now: float,
        at_once: bool = False,
    ) -> None:
        """Write hosts.json into the run folder, at most once a second.

        A full disk is no reason to end the run.
        """
        if folder is None or (now - self.written < SELDOM and not at_once):
            return

        self.slowest = slowest(self.hosts, now)
        if self.slowest is not None:
            seconds = min(now - self.written, 2 * SELDOM)
            self.hosts[self.slowest["host"]].slow += seconds
        self.written = now

        fresh = folder / f"hosts.json.{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self.to_json()) + "\n")
            fresh.replace(folder / "hosts.json")
