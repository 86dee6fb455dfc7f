"""One request's way through a server: its identity, and where its time went."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lepton_jax.ship.watch.charges import Charge

# Where a request's time goes, in this order: the body is read, raw rows become inputs,
# the request waits for a batch, the batch is computed, the answer is written.
STAGES = ("read", "prepare", "queue", "compute", "write")

# An id that a client chose stands in logs and headers, so it may hold nothing that
# ends a line there. 128 characters: assumption, twice a UUID with a prefix.
SAFE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
BYTES_OF_AN_ID = 8  # enough that two of a billion requests share one by chance of 3 %


@dataclass
class Visit:
    """A request under way.

    Attributes:
      id: its id, in the answer's header and in every line of the log about it.
      traceparent: W3C's header of the caller's trace; None: there is none.
      began: `time.perf_counter()` at its arrival, seconds.
      model: name of the model that it asks; empty until it is known.
      version: of the model.
      rows: how many it holds.
      protocol: "json" or "binary".
      stages: seconds by stage.
      charge: its share of the batch that it was in; None: it was in none.
    """

    id: str
    traceparent: str | None = None
    began: float = 0.0
    model: str = ""
    version: str = ""
    rows: int = 0
    protocol: str = "json"
    stages: dict[str, float] = field(default_factory=dict)
    charge: Charge | None = None
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)
    _last: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        self.began = self.began or self.clock()
        self._last = self.began

    def names(
        self,
        model: str,
        version: str,
        rows: int = 0,
        protocol: str = "json",
    ) -> None:
        """Say which model the request asks, once this is known and exists."""
        self.model = model
        self.version = version
        self.rows = rows
        self.protocol = protocol

    def mark(self, stage: str) -> None:
        """End a stage: the time since the last mark, or arrival, went to it."""
        now = self.clock()
        self.add(stage, now - self._last)
        self._last = now

    def add(self, stage: str, seconds: float) -> None:
        """Add time that was measured elsewhere to a stage; `mark` does not count it."""
        assert stage in STAGES, stage
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds


def identity(given: str | None) -> str:
    """Return the id that a client gave, if it can stand in a log; else a new one."""
    if given is not None and SAFE_ID.fullmatch(given):
        return given
    return secrets.token_hex(BYTES_OF_AN_ID)
