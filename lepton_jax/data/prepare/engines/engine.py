"""The protocol of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from lepton_jax.data.prepare.pieces import Job, Task


class Engine(ABC):
    """A place where `run_piece` is called on many pieces.

    It decides only where and when: what is made of a piece does not depend on it.
    """

    @abstractmethod
    def run(self, job: Job, tasks: Sequence[Task]) -> Iterator[Task]:
        """Do a pass; yield each piece when it is done, in any order.

        Raises:
          DataError: a piece can't be read, or a step failed on it.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what the engine has started."""
