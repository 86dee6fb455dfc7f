"""Files and mailbox of a run: everything that it writes to, and where it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lepton_jax.checkpoint.durable import Checkpoints, NoCheckpoints
from lepton_jax.checkpoint.local import LocalCheckpoints, NoLocalCheckpoints
from lepton_jax.hosts.mailbox import Mailbox, NoMailbox
from lepton_jax.monitor import Monitor, SampleTrace


class NoSampleTrace(SampleTrace):
    """The sample trace of a run that does not write one."""

    def __init__(self) -> None:
        pass

    def back(self, step: int) -> None:
        pass

    def add(
        self,
        step: int,
        names: list[str],
    ) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Outputs:
    """Everything of a run that is outside of this process's memory.

    A run without a folder writes nowhere: it has a null object for each part, so the
    loop need not ask whether there is one.

    Attributes:
      monitor: receives the events.
      folder: of the run; None: it has none.
      mailbox: a person's requests; with several hosts only host 0 has one.
      checkpoints: the durable ones, in the run folder.
      local: the fast ones, on each host's own disk.
      samples: receives what each step was made of.
    """

    monitor: Monitor
    folder: Path | None = None
    mailbox: Mailbox = field(default_factory=NoMailbox)
    checkpoints: Checkpoints = field(default_factory=NoCheckpoints)
    local: LocalCheckpoints = field(default_factory=NoLocalCheckpoints)
    samples: SampleTrace = field(default_factory=NoSampleTrace)
