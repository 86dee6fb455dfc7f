"""Requests put together into batches, and their answers taken apart again.

    request a, 3 rows ─┐
    request b, 1 row  ─┼─ size 8: a a a b c c c (c) ─ program ─┬─ a's 3 rows
    request c, 3 rows ─┘              filled up with c's last  ├─ b's 1 row
                                                               └─ c's 3 rows

A batch is whatever has come in while the batch before it ran, the more urgent first;
nobody waits for company, but for a moment after a batch whose clients may ask again,
unless a wait is asked for. If a batch fails, each of its
requests runs alone, so that only the one that can't be computed gets an error.

All methods are for the event loop's thread alone. A quick program runs in that thread,
too: handing a batch to another one and back takes longer than the program.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lepton_jax.errors import first_line
from lepton_jax.ship.serve.afterwards import Afterwards
from lepton_jax.ship.serve.ladder import Ladder
from lepton_jax.ship.serve.refusal import Refusal, broken, busy, late

Arrays = Mapping[str, np.ndarray]
Program = Callable[[Arrays], Arrays]

PRIORITIES = (1, 2, 3)  # 1 is first
DEFAULT_PRIORITY = 2
# Seconds of a program up to which it runs in the event loop's thread: there and back to
# another thread costs 0.1 ms, and the loop may well pause for ten times that
# (python -m tools.bench serve).
QUICK = 1e-3
# Share of a batch's time for which its clients are waited for to ask again (assumption:
# what that costs them is less than a batch that is nearly empty).
BACK = 0.05


@dataclass(frozen=True)
class Limits:
    """Limits of a model's queue.

    Attributes:
      waiting: rows that may wait.
      seconds: that a request waits at most, unless it says otherwise.
      collect: seconds that the first request waits for company.
    """

    waiting: int = 1024
    seconds: float = 30.0
    collect: float = 0.0


@dataclass(slots=True)
class Done:
    """A request's outputs, and how they came about.

    Attributes:
      outputs: arrays by name.
      sizes: the compiled size that computed them; of a request in several parts, that
        of each, in their order.
      waited: seconds in the queue.
      computed: seconds of the batch, or batches.
      charge: what the meter charges for it, which is known some milliseconds later;
        None: there is none.
    """

    outputs: dict[str, np.ndarray]
    sizes: tuple[int, ...]
    waited: float
    computed: float
    charge: Any = None

    @property
    def size(self) -> int:
        """The largest compiled size that computed a part."""
        return max(self.sizes)


@dataclass(eq=False, slots=True)
class Ticket:
    """A request, or a part of one, in the queue."""

    inputs: Arrays
    rows: int
    priority: int
    entered: float
    deadline: float  # when it has waited for too long
    future: asyncio.Future[Done]
    is_gone: Callable[[], bool]
    taken: float = 0.0


@dataclass(eq=False, slots=True)
class Batch:
    """Tickets that run together."""

    tickets: list[Ticket]
    rows: int
    size: int
    seconds: float = 0.0
    outcomes: list[Arrays | Exception] = field(default_factory=list)


class Batcher:
    """The queue of one model, and the runs of its program.

    Args:
      programs: by compiled size.
      ladder: the same sizes, with their times.
      limits: of the queue.
      meter: is told of batches and of the queue's length; None: nobody is.
      together: whether rows of several requests may share a batch; not so for a program
        in which a row's result depends on the others.
      afterwards: what is done when the clients have their answers.
      is_alone: whether the server has no other request under way, so that nobody can
        share a batch.
    """

    def __init__(
        self,
        programs: Mapping[int, Program],
        ladder: Ladder,
        limits: Limits | None = None,
        meter: Any = None,
        together: bool = True,
        afterwards: Afterwards | None = None,
        is_alone: Callable[[], bool] = lambda: False,
    ):
        self.ladder = ladder
        self.limits = limits or Limits()
        self.waiting = 0  # rows
        self.together = together
        self._programs = programs
        self._meter = meter
        self._afterwards = afterwards or Afterwards()
        self._is_alone = is_alone
        self._queues: dict[int, deque[Ticket]] = {
            priority: deque() for priority in PRIORITIES
        }
        self._loop = asyncio.get_running_loop()
        self._running: Batch | None = None
        self._planned: asyncio.Handle | None = None  # the next look at the queue
        self._is_collecting = False  # whether that look waits for company
        self._last_rows = 0  # of the last batch in the other thread
        self._back = 0.0  # until when its clients are waited for
        self._timer: asyncio.TimerHandle | None = None  # of the first deadline
        self._expires = 0.0  # when it goes off
        self._worker: ThreadPoolExecutor | None = None
        self._is_closed = False
        if meter is not None:
            meter.queue(0, self.limits.waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and self._running is None

    async def submit(
        self,
        inputs: Arrays,
        rows: int,
        priority: int = 0,
        timeout: float | None = None,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Done:
        """Return the outputs for some rows.

        Args:
          inputs: arrays by name, the rows first.
          rows: how many.
          priority: 1 is first; 0, or one that is not known: the default.
          timeout: seconds that the request may wait for its batch; None: the queue's.
          is_gone: whether its client has gone, so that nobody reads the answer.

        Raises:
          Refusal: the queue is full, the wait is over, or the program fails on it.
          CancelledError: the client has gone.
        """
        if priority not in PRIORITIES:
            priority = DEFAULT_PRIORITY
        self._admit(rows, priority)
        seconds = self.limits.seconds if timeout is None else timeout
        tickets = [
            self._enter(part, count, priority, seconds, is_gone)
            for part, count in self._parts(inputs, rows)
        ]
        if self._is_alone():
            self._last_rows = 0  # nobody of the last batch is coming back
            self._next()
        else:
            self._plan()
        if not tickets[-1].taken:
            self._watch_for(tickets[-1].deadline)
        try:
            if len(tickets) == 1:
                return await tickets[0].future
            return _joined(await asyncio.gather(*(each.future for each in tickets)))
        except BaseException:
            # the parts of a request stand or fall together
            for ticket in tickets:
                self._drop(ticket)
            raise

    def close(self) -> None:
        """Let go of the thread, once nothing runs."""
        self._is_closed = True
        for ticket in self._waiting_tickets():
            self._refuse(ticket, busy("the model is no longer served here"))
        if self._worker is not None:
            self._worker.shutdown(wait=False)

    # ---- the queue ----

    def _admit(self, rows: int, priority: int) -> None:
        """Make room for a request.

        Raises:
          Refusal: there is none.
        """
        if self._is_closed:
            raise busy("the model is no longer served here")
        excess = self.waiting + rows - self.limits.waiting
        if excess <= 0:
            return
        if not self._displace(excess, priority):
            seconds = math.ceil(self.ladder.total(self.waiting))
            raise busy(
                f"{self.waiting} rows wait, of at most {self.limits.waiting}",
                max(1, seconds),
            )

    def _displace(self, rows: int, priority: int) -> bool:
        """Refuse waiting requests that are less urgent, to make room for some rows.

        Returns:
          Whether there is room now; if not, nobody was refused.
        """
        chosen = []
        for level in reversed(PRIORITIES):
            if level <= priority:
                break
            for ticket in reversed(self._queues[level]):
                if rows <= 0:
                    break
                if not ticket.future.done():
                    chosen.append(ticket)
                    rows -= ticket.rows
        if rows > 0:
            return False
        for ticket in chosen:
            self._refuse(ticket, busy("a more urgent request took the place"))
        return True

    def _parts(
        self,
        inputs: Arrays,
        rows: int,
    ) -> Iterator[tuple[Arrays, int]]:
        """Yield the parts of a request, each of which fits the largest size."""
        largest = self.ladder.largest
        if rows <= largest:
            yield inputs, rows
            return
        for start in range(0, rows, largest):
            part = {
                name: array[start : start + largest] for name, array in inputs.items()
            }
            yield part, min(largest, rows - start)

    def _enter(
        self,
        inputs: Arrays,
        rows: int,
        priority: int,
        seconds: float,
        is_gone: Callable[[], bool],
    ) -> Ticket:
        future: asyncio.Future[Done] = self._loop.create_future()
        now = time.perf_counter()
        ticket = Ticket(inputs, rows, priority, now, now + seconds, future, is_gone)
        self._queues[priority].append(ticket)
        self.waiting += rows
        return ticket

    def _waiting_tickets(self) -> list[Ticket]:
        return [
            ticket
            for queue in self._queues.values()
            for ticket in queue
            if not ticket.future.done()
        ]

    def _leave(self, ticket: Ticket) -> None:
        """Take a ticket out of the count of those that wait."""
        self.waiting -= ticket.rows
        ticket.taken = time.perf_counter()

    def _drop(self, ticket: Ticket) -> None:
        """Forget a ticket whose answer nobody reads; its place is skipped later."""
        if not ticket.taken:
            self._leave(ticket)
            ticket.inputs = {}
        ticket.future.cancel()

    def _refuse(self, ticket: Ticket, refusal: Refusal) -> None:
        if ticket.taken or ticket.future.done():
            return
        self._leave(ticket)
        ticket.inputs = {}
        ticket.future.set_exception(refusal)

    def _watch_for(self, deadline: float) -> None:
        """Look at the queue at a deadline.

        One timer, of the first deadline, serves all that wait.
        """
        if self._timer is not None:
            if self._expires <= deadline:
                return
            self._timer.cancel()
        self._expires = deadline
        delay = max(0.0, deadline - time.perf_counter())
        self._timer = self._loop.call_later(delay, self._expire)

    def _expire(self) -> None:
        """Refuse those that have waited for too long."""
        self._timer = None
        now = time.perf_counter()
        for ticket in self._waiting_tickets():
            if ticket.deadline <= now:
                waited = now - ticket.entered
                self._refuse(ticket, late(f"no batch was free within {waited:.3g} s"))
        left = [ticket.deadline for ticket in self._waiting_tickets()]
        if left:
            self._watch_for(min(left))

    # ---- batches ----

    def _plan(self) -> None:
        """Look at the queue soon: after all that the sockets hold now has been read."""
        if self._running is not None:
            return
        if self._planned is not None:
            if not self._is_collecting or self._collecting() > 0:
                return
            self._planned.cancel()
        self._is_collecting = False
        self._planned = self._loop.call_soon(self._next)

    def _next(self) -> None:
        """Run a batch of what waits."""
        self._planned = None
        if self._running is not None or not self.waiting:
            return
        delay = self._collecting()
        self._is_collecting = delay > 0
        if self._is_collecting:
            self._planned = self._loop.call_later(delay, self._next)
            return
        batch = self._take()
        if batch is None:
            return
        if self.ladder.is_quick(batch.size, QUICK):
            self._compute(batch)
            self._settle(batch)
            self._plan()
        else:
            self._running = batch
            self._start(batch)

    def _collecting(self) -> float:
        """Return the seconds for which those that wait still wait for company."""
        now = time.perf_counter()
        return max(self._until_back(now), self._until_collected(now))

    def _until_back(self, now: float) -> float:
        """Return the seconds in which those of the last batch may ask again.

        Clients that each wait for an answer come back together. Without this the first
        of them would run alone, and keep the others waiting.
        """
        if self.waiting >= self._last_rows:
            return 0.0
        return self._back - now

    def _until_collected(self, now: float) -> float:
        """Return the seconds that are left of the wait that was asked for."""
        if not self.limits.collect or self.waiting >= self.ladder.best:
            return 0.0
        oldest = min(
            (ticket.entered for ticket in self._waiting_tickets()),
            default=0.0,
        )
        return oldest + self.limits.collect - now

    def _take(self) -> Batch | None:
        """Take the next batch out of the queue; None: nobody waits any more."""
        size = self.ladder.first(self.waiting)
        tickets: list[Ticket] = []
        rows = 0
        for queue in self._queues.values():
            while queue:
                ticket = queue[0]
                if ticket.future.done():
                    queue.popleft()
                    continue
                if ticket.is_gone():
                    self._drop(ticket)
                    queue.popleft()
                    continue
                is_full = rows + ticket.rows > size or not self.together
                if tickets and is_full:
                    return self._batch(tickets, rows)
                queue.popleft()
                self._leave(ticket)
                tickets.append(ticket)
                rows += ticket.rows
        return self._batch(tickets, rows) if tickets else None

    def _batch(self, tickets: list[Ticket], rows: int) -> Batch:
        if self._meter is not None:
            self._meter.queue(self.waiting)
        return Batch(tickets, rows, self.ladder.around(rows))

    def _start(self, batch: Batch) -> None:
        """Compute a batch in the thread for that."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "lepton-serve")
        done = self._loop.run_in_executor(self._worker, self._compute, batch)
        done.add_done_callback(self._finish)

    def _finish(self, done: asyncio.Future[None]) -> None:
        """Start the next batch, and then answer those of the last one."""
        batch = self._running
        assert batch is not None
        self._running = None
        if len(batch.tickets) > 1:
            self._last_rows = batch.rows
            self._back = time.perf_counter() + BACK * batch.seconds
        self._next()
        done.result()  # an error here is one of ours: `_compute` keeps the program's
        self._settle(batch)

    def _compute(self, batch: Batch) -> None:
        """Run a batch; if it fails, each of its tickets alone."""
        began = time.perf_counter()
        try:
            batch.outcomes.extend(self._run(batch.tickets, batch.size))
        except Exception as error:
            # whatever the program raises, the batch-mates get their answers
            if len(batch.tickets) == 1:
                batch.outcomes.append(error)
            else:
                batch.outcomes.extend(map(self._run_alone, batch.tickets))
        batch.seconds = time.perf_counter() - began

    def _run_alone(self, ticket: Ticket) -> Arrays | Exception:
        try:
            return self._run([ticket], self.ladder.around(ticket.rows))[0]
        except Exception as error:
            return error

    def _run(self, tickets: Sequence[Ticket], size: int) -> list[Arrays]:
        """Return the outputs of some tickets that run together."""
        names = tickets[0].inputs
        inputs = {
            name: filled([ticket.inputs[name] for ticket in tickets], size)
            for name in names
        }
        outputs = {
            name: np.asarray(array)
            for name, array in self._programs[size](inputs).items()
        }
        parts: list[Arrays] = []
        start = 0
        for ticket in tickets:
            end = start + ticket.rows
            parts.append({name: array[start:end] for name, array in outputs.items()})
            start = end
        return parts

    def _settle(self, batch: Batch) -> None:
        """Give the tickets of a batch their answers."""
        answers: list[Done | None] = []
        for ticket, outcome in zip(batch.tickets, batch.outcomes, strict=True):
            done = None
            if ticket.future.done():  # its client has gone meanwhile
                pass
            elif isinstance(outcome, Exception):
                ticket.future.set_exception(_failure(outcome))
            else:
                done = Done(
                    dict(outcome),
                    (batch.size,),
                    ticket.taken - ticket.entered,
                    batch.seconds,
                )
                ticket.future.set_result(done)
            answers.append(done)
        if self._meter is not None:
            self._afterwards.do(self._charge, batch, answers)

    def _charge(self, batch: Batch, answers: Sequence[Done | None]) -> None:
        """Tell the meter of a batch, and its requests what they are charged."""
        counts = [ticket.rows for ticket in batch.tickets]
        charges = self._meter.batch(counts, batch.size, batch.seconds)
        for done, charge in zip(answers, charges, strict=True):
            if done is not None:
                done.charge = charge


def filled(parts: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Return arrays one after the other, filled up to a size with the last row.

    A row that was sent is one that the program can take; zeros may not be.

    Args:
      parts: arrays (rows, ...), of at most `size` rows in all.
      size: rows of the result.
    """
    first = parts[0]
    if len(parts) == 1 and len(first) == size:
        return first
    whole = np.empty((size, *first.shape[1:]), first.dtype)
    end = 0
    for part in parts:
        start = end
        end += len(part)
        whole[start:end] = part
    whole[end:] = parts[-1][-1]
    return whole


# ---- internals ----


def _failure(error: Exception) -> Refusal:
    """Return the refusal of a request on which the program failed."""
    if isinstance(error, Refusal):
        return error
    text = first_line(error)
    return broken(f"the model failed: {type(error).__name__}: {text}")


def _joined(parts: Sequence[Done]) -> Done:
    """Return the answer to a request that ran in several parts."""
    outputs = {
        name: np.concatenate([part.outputs[name] for part in parts])
        for name in parts[0].outputs
    }
    return Done(
        outputs,
        tuple(part.size for part in parts),
        max(part.waited for part in parts),
        sum(part.computed for part in parts),
        parts[-1].charge,
    )
