"""The training loop: one page, and the order in which things happen on it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from typing import Any

import jax
import numpy as np

from lepton_jax.checkpoint import Checkpoints
from lepton_jax.compat import jit_where
from lepton_jax.data import Arrays, Loader, blocks_between, epoch_samples
from lepton_jax.errors import DivergedError
from lepton_jax.history import History
from lepton_jax.monitor import Monitor
from lepton_jax.precision import all_finite
from lepton_jax.program import Program
from lepton_jax.recipe import Recipe
from lepton_jax.state import State

CALLS_IN_FLIGHT = 8
LOG_SECONDS = 0.25


class Loop:
    """Trains from one step to another.

    The order, which tests hold it to:

    1. A step's record is measured with the parameters before its update.
    2. The position in the data moves with the step, when the step is handed to the devices. A checkpoint of step s
       holds the state after s updates, and the position of the first sample that step s + 1 consumes.
    3. Where several fall on one step: records are read, then the test set is evaluated, then the state is saved; so
       a checkpoint knows its evaluation, and no state is saved after a loss that isn't finite.
    4. An event is on disk before the checkpoint that contains its step begins.
    5. Nothing waits for a device except the reading of records before an evaluation or a save, the evaluation's
       result, and a call that is `CALLS_IN_FLIGHT` calls ahead of the devices.

    Args:
      program, state, step: what trains, from where.
      train, test: data sets; `test` may be None.
      position: of `train`, as a loader's state.
      until: the step to reach.
      monitor: receives the events.
      checkpoints: None: nothing is saved.
    """

    def __init__(self, program: Program, state: State, step: int, train: Any, test: Any, position: dict[str, Any],
                 until: int, monitor: Monitor, checkpoints: Checkpoints | None):
        self.program, self.state, self.step, self.until = program, state, step, until
        self.recipe, self.monitor, self.checkpoints = program.recipe, monitor, checkpoints
        self.train, self.test, self.position = train, test, position
        self.history = History(first=step, names=program.records)
        self.stop_requested = False
        self._pending: deque[tuple[Any, int, int]] = deque()
        self._window: list[np.ndarray] = []
        self._window_began, self._wait = time.perf_counter(), 0.0
        self._first, self._epoch, self._order = step, epoch_samples(train), order(self.recipe, train)

    def run(self) -> History:
        """Train, evaluate and save until the last step, or until Ctrl-C asks for a stop at the next one."""
        per_block, batch_size = self.program.plan.steps_per_call, self.recipe.batch_size
        began, block, offset = time.perf_counter(), None, per_block
        resident = self.program.plan.data == "resident"
        loader = Loader(self.train, batch_size=batch_size, steps=per_block, sharding=self.program.block_sharding,
                        seed=self.recipe.seed, shuffle=self.recipe.shuffle, position=self.position,
                        blocks=blocks_between(self.step, self.until, per_block), resident=resident)
        data = self.program.resident(self.train) if resident else None
        with _stop_on_interrupt(self):
            try:
                while self.step < self.until and not self.stop_requested:
                    if offset == per_block:
                        waiting = time.perf_counter()
                        block, offset = next(loader), 0
                        self._wait += time.perf_counter() - waiting
                    count = min(per_block - offset, self._next_stop() - self.step)
                    self.state, records = self.program.train(self.state, block, offset, offset + count, data)
                    self._pending.append((records, offset, offset + count))
                    self.step, offset = self.step + count, offset + count
                    self.position = loader.state((per_block - offset) * batch_size) | self._order
                    last = self.step == self.until or self.stop_requested
                    evaluating, saving = last or self._due("evaluate_every"), last or self._due("save_every")
                    self._read(everything=evaluating or saving)
                    metrics = self.evaluate() if evaluating and self.test is not None else None
                    if saving and self.checkpoints is not None:
                        self.save(metrics)
            finally:
                loader.close()
                self.history.seconds = time.perf_counter() - began
                self.history.samples = (self.step - self._first) * batch_size
        if self.checkpoints is not None:
            self.checkpoints.wait()
        self.history.status = "finished" if self.step == self.until else "interrupted"
        self.history.seconds = time.perf_counter() - began
        return self.history

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the test set, and the event that says so."""
        began = time.perf_counter()
        metrics = evaluate(self.program, self.state, self.test)
        self.history.evaluations.append((self.step, metrics))
        self.monitor.event("evaluation", step=self.step, samples=epoch_samples(self.test), metrics=metrics,
                           seconds=time.perf_counter() - began)
        self._window_began += time.perf_counter() - began
        return metrics

    def save(self, metrics: dict[str, float] | None) -> None:
        """Begin a checkpoint of this step, unless it is there already."""
        assert self.checkpoints is not None
        if self.step in self.checkpoints.steps():
            return
        began = time.perf_counter()
        if not _finite(self.state.params):
            raise self._diverged(f"the update of step {self.step} made parameters that are not finite", self.step)
        record = {"position": self.position, "plan": self.program.plan.to_json()}
        self.checkpoints.save(self.step, self.state, record, metrics)
        self.monitor.event("save", step=self.step, seconds=time.perf_counter() - began)
        self._window_began += time.perf_counter() - began

    def _due(self, cadence: str) -> bool:
        """Whether this step is one of a cadence's: every so many steps, or the first at or past an epoch's end."""
        every = getattr(self.recipe, cadence) or (self.recipe.evaluate_every if cadence == "save_every" else None)
        if every:
            return self.step % every == 0
        if self._epoch is None:
            return False
        consumed = self.position["samples"]
        return consumed // self._epoch > (consumed - self.recipe.batch_size) // self._epoch

    def _next_stop(self) -> int:
        """The first step after this one at which something may be due."""
        stops = [self.until]
        for every in (self.recipe.evaluate_every, self.recipe.save_every, self.recipe.log_every):
            if every:
                stops.append((self.step // every + 1) * every)
        if self._epoch is not None and not (self.recipe.evaluate_every and self.recipe.save_every):
            left = self._epoch - self.position["samples"] % self._epoch
            stops.append(self.step + math.ceil(left / self.recipe.batch_size))
        return min(stops)

    def _read(self, everything: bool) -> None:
        """Fetch records that the devices have finished (or all), check them, and report a window when it is time."""
        every = self.recipe.log_every
        due = everything or (self.step % every == 0 if every else
                             time.perf_counter() - self._window_began >= LOG_SECONDS)
        while self._pending and (everything or len(self._pending) > CALLS_IN_FLIGHT
                                 or (due and self._pending[0][0].is_ready())):
            records, start, stop = self._pending.popleft()
            self._window.append(np.asarray(records)[start:stop])
            self.history.append(self._window[-1])
            self._check(self._window[-1])
        if due and self._window:
            self._report()

    def _report(self) -> None:
        """The event of the steps read since the last one."""
        now, rows = time.perf_counter(), np.concatenate(self._window)
        last = self.history.first + self.history.steps
        self.monitor.event("steps", first=last - len(rows) + 1, last=last, seconds=now - self._window_began,
                           data_wait=self._wait, samples=len(rows) * self.recipe.batch_size,
                           records=dict(zip(self.program.records, rows.T.tolist(), strict=True)))
        self.history.data_wait += self._wait
        self._window, self._window_began, self._wait = [], now, 0.0

    def _check(self, fresh: np.ndarray) -> None:
        """Raise at the first loss that is not finite and whose update no policy refused.

        float16 gets over those that a smaller loss scale mends.
        """
        bad = ~np.isfinite(fresh[:, 0])
        if "loss_scale" in self.program.records:
            bad &= fresh[:, self.program.records.index("loss_scale")] <= 1
        for name in ("skip", "restore", "rollback"):
            if name in self.program.records:
                bad &= fresh[:, self.program.records.index(name)] == 0
        if not bad.any():
            return
        self._report()
        step = self.history.first + self.history.steps - len(fresh) + int(np.argmax(bad)) + 1
        raise self._diverged(f"the loss of step {step} is {fresh[np.argmax(bad), 0]}", step)

    def _diverged(self, what: str, step: int) -> DivergedError:
        if self.checkpoints is not None:
            self.checkpoints.wait()
        saved = self.checkpoints.steps() if self.checkpoints else []
        return DivergedError(
            what, where=f"step {step}{_culprit(self.train)}",
            remedy="lower the learning rate, set clip_norm, or mend the data; "
                   + (f"step {saved[-1]} is the last committed checkpoint" if saved else "no checkpoint was committed"))


def order(recipe: Recipe, train: Any) -> dict[str, Any]:
    """What a position in the data means nothing without: the seed of the shuffling, and how many samples there are."""
    return {"seed": recipe.seed if recipe.shuffle else None, "of": epoch_samples(train)}


def evaluate(program: Program, state: State, test: Any) -> dict[str, float]:
    """Loss and metrics over a data set, every sample counted once: the last batch is filled up, and its filling masked."""
    size, total, sums = program.recipe.batch_size, epoch_samples(test), None
    assert total is not None
    loader = Loader(test, batch_size=size, steps=1, sharding=program.batch_sharding, blocks=math.ceil(total / size))
    try:
        for index, batch in enumerate(loader):
            sums = program.evaluate(sums, state, batch, min(size, total - index * size))
    finally:
        loader.close()
    return program.metrics(sums)


@jit_where
def _finite(params: Any) -> Any:
    return all_finite(params)


def _culprit(train: Any) -> str:
    """Where the training data itself holds a number that isn't finite."""
    if not isinstance(train, Arrays):
        return ""
    for leaf in jax.tree.leaves((train.inputs, train.targets)):
        if np.issubdtype(leaf.dtype, np.floating):
            rows = np.flatnonzero(~np.isfinite(leaf.reshape(len(leaf), -1)).all(1))
            if len(rows):
                return f"; the training data itself has a number that isn't finite in {len(rows)} samples, first in {rows[0]}"
    return ""


class _stop_on_interrupt:
    """The first Ctrl-C asks the loop to stop at the next step and save; the second one stops at once."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._asked)

    def _asked(self, number: int, frame: Any) -> None:
        self.loop.stop_requested = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *unused: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
