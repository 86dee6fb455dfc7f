"""What the head knows of a run, for whoever looks from outside: RUN/hosts.json."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lepton_jax.launch.verdict import Fault, Place

SELDOM = 1.0  # seconds between two writes


@dataclass
class HostRecord:
    """A host as last heard of: `state` is "missing", "waiting", "running", "ended" or "lost"."""

    state: str = "missing"
    name: str = ""
    host_id: int | None = None
    place: Place | None = None
    heard: float = 0.0  # monotonic
    silent: float = 0.0

    def to_json(self, now: float) -> dict[str, Any]:
        at = self.place
        where = {} if at is None else {"phase": at.phase, "step": at.step, "done": at.done,
                                       "seconds_in_it": round(at.age + now - self.heard, 1),
                                       "limit": at.limit if at.limit < float("inf") else None}
        return {"state": self.state, "machine": self.name, "host_id": self.host_id, **where,
                "seconds_silent": round(self.silent, 1)}


@dataclass
class Recovery:
    """One fault and the way back; times are monotonic, in seconds.

    Attributes:
      seen: when the head heard of it.
      since: when the host had last made progress, which for one that is stuck is long before.
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
        after = {name: None if at is None else round(at - self.seen, 3)
                 for name, at in (("ended", self.ended), ("begun", self.begun), ("stepped", self.stepped))}
        return {"generation": self.generation, "host": self.fault.host, "cause": self.fault.cause, "what": str(self.fault),
                "phase": self.fault.place.phase, "step": self.fault.place.step, "stack": list(self.fault.stack),
                "seconds_to_notice": round(self.seen - self.since, 3), **{f"seconds_to_{k}": v for k, v in after.items()}}


@dataclass
class Record:
    """How a run on several hosts stands.

    Attributes:
      state: "meeting", "running", "stopping", "ending", "waiting" or "over".
      generation: which attempt this is, from 1.
      restarts, restarts_left: attempts after a failure so far, and how many more are allowed.
      hosts: by number.
      recoveries: one for each fault.
      exit_code: once it is over.
    """

    state: str = "meeting"
    generation: int = 0
    restarts: int = 0
    restarts_left: int = 0
    hosts: dict[int, HostRecord] = field(default_factory=dict)
    recoveries: list[Recovery] = field(default_factory=list)
    exit_code: int | None = None
    written: float = float("-inf")

    def to_json(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        now = time.monotonic()
        return {"time": time.time(), "state": self.state, "generation": self.generation, "restarts": self.restarts,
                "restarts_left": self.restarts_left, "exit_code": self.exit_code,
                "hosts": {str(host): each.to_json(now) for host, each in sorted(self.hosts.items())},
                "recoveries": [each.to_json() for each in self.recoveries]}

    def write(self, folder: Path | None, now: float, at_once: bool = False) -> None:
        """Into the run folder, at most once a second; a full disk is no reason to end the run."""
        if folder is None or (now - self.written < SELDOM and not at_once):
            return
        self.written, fresh = now, folder / f"hosts.json.{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self.to_json()) + "\n")
            fresh.replace(folder / "hosts.json")
