"""Blocks that threads read ahead of their use, in order, within a memory limit.

One thread at a time decides what the next block is made of, which is cheap and has an
order; several threads read blocks at once, which is expensive and needs none:

    deciding   0 1 2 3 4 5            one after the other, under a lock
    thread A   [read 0 ][read 2   ]
    thread B     [read 1    ][read 3]
    given out           0   1      2 3

The number of threads, and of blocks read ahead, begins small. While the reader of the
blocks waits, it grows up to what the budget allows; a thread that made nothing faster
is taken back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from lepton_jax.data.budget import Budget

Block = TypeVar("Block")
Job = Callable[[], Block]

# Share of the time spent waiting from which on more is read at once: the bar that the
# feed is to keep (docs/data.md).
MOST_WAIT = 0.01
# Seconds over which the wait is measured. Assumption: several blocks, and soon enough.
WINDOW_SECONDS = 0.25
# Gain in blocks a second from which on one more thread is worth having. Assumption:
# half of what a perfect eighth thread would bring.
LEAST_GAIN = 1.06

FIRST_AHEAD = 2  # blocks; assumption: two hide the time of one read
MOST_AHEAD = 64  # blocks; assumption: more hide nothing that 64 do not


class Readahead(Generic[Block]):
    """An iterator of blocks that threads make.

    Args:
      decide: returns what makes the next block; raises StopIteration at the end. One
        thread calls it at a time.
      budget: threads at most, and bytes of the blocks that are held.
      block_bytes: of one block.

    Attributes:
      tuning: how much is read at once, now.
    """

    def __init__(
        self,
        decide: Callable[[], Job],
        budget: Budget,
        block_bytes: int,
    ):
        self.tuning = Tuning(budget, block_bytes)
        self._decide = decide
        self._deciding = threading.Lock()
        self._changed = threading.Condition()
        self._slots: deque[_Slot] = deque()
        self._reserved = 0  # slots of blocks that are being decided
        self._decided_all = False
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._start_threads()

    def __iter__(self) -> Readahead[Block]:
        return self

    def __next__(self) -> Block:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(self._is_ready)
            if not self._slots:
                raise StopIteration
            slot = self._slots.popleft()
            self._changed.notify_all()

        now = time.perf_counter()
        if self.tuning.given(now, now - began):
            self._start_threads()
        if slot.error is not None:
            self.close()
            raise slot.error
        return slot.block

    def close(self) -> None:
        """Stop reading; blocks that are being read are finished and thrown away."""
        with self._changed:
            self._closed = True
            self._slots.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads.clear()

    def _is_ready(self) -> bool:
        if self._slots:
            return self._slots[0].is_done
        return self._closed or (self._decided_all and not self._reserved)

    def _start_threads(self) -> None:
        while len(self._threads) < self.tuning.workers:
            thread = threading.Thread(
                target=self._work,
                args=(len(self._threads),),
                name=f"lepton-feed-{len(self._threads)}",
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()
        with self._changed:
            self._changed.notify_all()

    def _work(self, number: int) -> None:
        while self._reserve(number):
            slot = self._next_slot()
            if slot is None:
                return
            slot.make()
            with self._changed:
                slot.is_done = True
                self._changed.notify_all()
            del slot

    def _reserve(self, number: int) -> bool:
        """Wait until this thread may make a block; False: there is nothing to do."""

        def may_go_on() -> bool:
            held = len(self._slots) + self._reserved
            is_free = number < self.tuning.workers and held < self.tuning.ahead
            return self._closed or self._decided_all or is_free

        with self._changed:
            self._changed.wait_for(may_go_on)
            if self._closed or self._decided_all:
                return False
            self._reserved += 1
            return True

    def _next_slot(self) -> _Slot | None:
        """Decide the next block; None: the last one is decided."""
        with self._deciding:
            slot = _Slot()
            try:
                if not self._decided_all:
                    slot.job = self._decide()
            except StopIteration:
                self._decided_all = True
            except BaseException as error:
                slot.error = error
                self._decided_all = True
            is_block = slot.job is not None or slot.error is not None

            with self._changed:
                self._reserved -= 1
                if is_block and not self._closed:
                    self._slots.append(slot)
                self._changed.notify_all()
        return slot if is_block else None


class _Slot:
    """The place of one block among those that are read ahead."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.block: Any = None
        self.error: BaseException | None = None
        self.is_done = False

    def make(self) -> None:
        if self.error is not None:
            return
        assert self.job is not None
        try:
            self.block = self.job()
        except BaseException as error:
            self.error = error
        self.job = None


class Tuning:
    """How many threads read, and how many blocks ahead.

    Both grow while blocks are waited for. A thread more is kept if it brings more
    blocks a second: decoding releases Python's lock, but a person's function may not.

    >>> tuning = Tuning(Budget(memory=800, workers=2), block_bytes=100)
    >>> tuning.workers, tuning.ahead
    (1, 2)
    >>> tuning.given(now=0.0, waited=0.0)
    False
    >>> tuning.given(now=1.0, waited=0.5)  # half of the time
    True
    >>> tuning.workers, tuning.ahead
    (2, 4)

    Attributes:
      workers: threads, at least 1.
      ahead: blocks that are read or being read, at least 1.
      block_bytes: of a block.
    """

    def __init__(
        self,
        budget: Budget,
        block_bytes: int,
    ):
        self.block_bytes = block_bytes
        affordable = budget.memory // max(1, block_bytes)
        self._most_ahead = max(1, min(MOST_AHEAD, affordable))
        self._most_workers = max(1, min(budget.workers, self._most_ahead))
        self.workers = 1
        self.ahead = min(FIRST_AHEAD, self._most_ahead)
        self._began: float | None = None
        self._blocks = 0
        self._waited = 0.0
        self._rate_before: float | None = None  # before the last thread was added

    def measured(self) -> dict[str, float]:
        """Return threads, blocks ahead, and the bytes that these take at most."""
        return {
            "workers": self.workers,
            "blocks_ahead": self.ahead,
            "bytes": self.bytes,
        }

    @property
    def bytes(self) -> int:
        """Bytes of the blocks that are held at most."""
        return self.ahead * self.block_bytes

    def given(
        self,
        now: float,
        waited: float,
    ) -> bool:
        """Count a block that was given out; return whether more is read at once.

        Args:
          now: when, in seconds.
          waited: seconds that it was waited for.
        """
        if self._began is None:  # the first block is always waited for
            self._began = now
            return False
        self._blocks += 1
        self._waited += waited
        seconds = now - self._began
        if seconds < WINDOW_SECONDS:
            return False

        rate = self._blocks / seconds
        share = self._waited / seconds
        self._began = now
        self._blocks = 0
        self._waited = 0.0
        return self._adjust(rate, share)

    def _adjust(
        self,
        rate: float,
        share: float,
    ) -> bool:
        """Set threads and blocks by what a window measured.

        Args:
          rate: blocks a second.
          share: of the time that was spent waiting.
        """
        before = self._rate_before
        self._rate_before = None
        if before is not None and rate < before * LEAST_GAIN and share > MOST_WAIT:
            self.workers -= 1
            self._most_workers = self.workers
            return False
        if share <= MOST_WAIT:
            return False

        grows = False
        if self.workers < self._most_workers:
            self.workers += 1
            self._rate_before = rate
            grows = True
        if self.ahead < self._most_ahead:
            self.ahead = min(2 * self.ahead, self._most_ahead)
            grows = True
        return grows
