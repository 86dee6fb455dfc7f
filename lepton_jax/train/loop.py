"""The training loop: one page, and the order in which things happen on it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.compat import jit_where
from lepton_jax.controller import with_measurements, with_rate_factor, without_halt
from lepton_jax.data import epoch_samples
from lepton_jax.errors import DivergedError, LeptonError
from lepton_jax.hosts import agreement, phase
from lepton_jax.hosts.mailbox import Letter
from lepton_jax.step.precision import all_finite
from lepton_jax.step.state import State
from lepton_jax.train.cadence import Cadence
from lepton_jax.train.divergence import Divergence
from lepton_jax.train.evaluation import evaluate
from lepton_jax.train.history import History
from lepton_jax.train.interrupt import on_interrupt
from lepton_jax.train.outputs import Outputs
from lepton_jax.train.program import Program
from lepton_jax.train.records import Records
from lepton_jax.train.recovery import Halt, HaltWatch, Rollbacks, remember
from lepton_jax.train.requests import perform
from lepton_jax.train.restore import Reader
from lepton_jax.train.run_record import Position, RunRecord
from lepton_jax.train.supply import Supply

# Calls that the host may be ahead of the devices: enough that they never wait for it,
# few enough that a halt is noticed soon (assumption).
CALLS_IN_FLIGHT = 8
# Seconds between two looks of a paused run for requests (assumption).
PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Start:
    """The beginning of a run.

    Attributes:
      state: after `step`.
      step: steps done so far.
      record: the run's past, from the checkpoint that it goes on from.
      bases: of the knobs for which the recipe's value replaces the checkpoint's.
    """

    state: State
    step: int = 0
    record: RunRecord = field(default_factory=RunRecord)
    bases: Mapping[str, float] = field(default_factory=dict)


class _Call(NamedTuple):
    """A call of the devices whose records are not read yet.

    Attributes:
      records: float32 (steps a block, names), of which rows `start` to `stop` count.
      start, stop: as above.
      position: in the data, after its last step.
    """

    records: Any
    start: int
    stop: int
    position: Position


class Loop:
    """Trains from one step to another.

    The order, which tests hold it to:

    1. A step's record is measured with the parameters before its update.
    2. The position in the data moves with the step, when the step is handed to the
       devices. A checkpoint of step s holds the state after s updates, and the position
       of the first sample that step s + 1 consumes.
    3. Where several fall on one step: a person's requests are done, then records are
       read, then the test set is evaluated, then the state is saved; so a checkpoint
       knows its evaluation, and no state is saved after a loss that isn't finite.
    4. An event and a decision is on disk before the checkpoint that contains its step
       begins.
    5. Nothing waits for a device except the reading of records before an evaluation or
       a save, the evaluation's result, and a call that is `CALLS_IN_FLIGHT` calls ahead
       of the devices.
    6. Where a policy asks for a stop or a rollback in step s, the steps handed over
       since count for nothing: the run ends with the state and the position after s; or
       it goes on from the last good checkpoint, with the sample after s.
    7. Where several hosts train together, all do the same at the same step. What the
       clock or a person decides, host 0 says at a beat, a step known to all; records
       are read a fixed number of calls late. Host 0 alone writes files next to the
       checkpoints.

    Args:
      program: what is trained.
      start: from where.
      train: the training data.
      test: the test data, or None.
      until: the step to reach.
      outputs: folder, events, checkpoints and mailbox of the run.
      budget: the steps before and at the end of the budget that policies are told of;
        None: 0 and `until`.
      reader: reads the checkpoints to which the run may go back; None: one of its own.
    """

    def __init__(
        self,
        program: Program,
        start: Start,
        train: Any,
        test: Any,
        until: int,
        outputs: Outputs,
        budget: tuple[int, int] | None = None,
        reader: Reader | None = None,
    ):
        self.program = program
        self.state = start.state
        self.step = start.step
        self.test = test
        self.until = until
        self.outputs = outputs
        self.budget = budget or (0, until)
        self.paused = False
        self.stop_wished = False
        self.stop_requested = False

        past = start.record
        limits = program.controller.limits
        self.supply = Supply(program, train, past.position, until)
        self.records = Records(
            program,
            start.step,
            self.budget,
            outputs,
            past,
        )
        self.rollbacks = Rollbacks(limits, past.rollbacks)
        self._cadence = Cadence(
            program.recipe, epoch_samples(train), until, self.supply.jumps
        )
        self._watch = HaltWatch(program.records, program.controller)
        self._start = start
        self._reader = reader or Reader(program)
        self._beat = agreement.Beat()
        self._pending: deque[_Call] = deque()
        self._halt: Halt | None = None
        self._stopped = past.stopped if start.step >= until else None
        self._saved = -1
        self._locally_saved = time.monotonic()

    def run(self) -> History:
        """Train, evaluate and save until the last step.

        The run ends earlier if a policy stops it, or a person asks for a stop.

        Raises:
          DivergedError: a number is not finite, and the run can't go back.
        """
        last = self.step >= self.until
        with on_interrupt(self._wish_to_stop):
            try:
                self._begin()
                while not last:
                    self._hand_over()
                    if self._beat.due(self.step):
                        self._listen()
                    last = self.step == self.until or self.stop_requested
                    evaluating = last or self._is_evaluation_due()
                    saving = last or self._cadence.saves(self.step, self._consumed)
                    self.read(everything=evaluating or saving)
                    if not self.halted:
                        self._close_step(evaluating, saving)
                    if self.halted:
                        last = self._see_to_halt()
            finally:
                self.supply.close()
                self.records.close()
        return self._end()

    # ---- from step to step ----

    def _begin(self) -> None:
        """Do what stands before the first step.

        A run that may be rolled back needs a checkpoint to go back to.
        """
        begun, end = self.budget
        self.state = with_measurements(self.state, steps=end, begun=begun)
        slow = self._start.record.slow
        if slow:  # after a rollback that the checkpoint does not know of
            self.state = with_rate_factor(self.state, *slow)
        self.records.begin(
            self.state,
            self.step,
            self._start.bases,
        )
        self.supply.open(self.step)
        if self.rollbacks.most and self.step < self.until:
            self.save(None)

    def _hand_over(self) -> None:
        """Hand the devices one call, which ends where something may be due."""
        self.supply.jump(self.step)
        stop = self._cadence.next_stop(self.step, self._consumed)
        piece = self.supply.take(stop - self.step, self._are_busy)
        self.state, records = self.program.train(
            self.state,
            piece.block,
            piece.start,
            piece.stop,
            piece.data,
        )
        count = piece.stop - piece.start
        self.step += count
        phase.reached(step=self.step, phase="steps")
        self.supply.advance()
        position = self.supply.position
        call = _Call(records, piece.start, piece.stop, position)
        self._pending.append(call)

        if self.records.traces_samples:
            for back in reversed(range(count)):
                names = self.supply.names(back)
                self.records.trace(self.step - back, names)

    def _are_busy(self) -> bool:
        """Whether the devices still compute the call that was handed over last."""
        return bool(self._pending) and not self._pending[-1].records.is_ready()

    def read(self, everything: bool) -> None:
        """Read the records that the devices have finished, or all of them.

        It is seen whether they halt the run, and a window is reported when it is time.
        """
        due = everything or self._cadence.reports(
            self.step, self.records.window_seconds()
        )
        while self._pending and not self.halted and self._may_read(everything, due):
            self._read_call(self._pending.popleft())
        if (due or self.halted) and self.records.has_unreported:
            self.records.report(self.supply.take_waited(), self.supply.measured())
            if agreement.hosts() == 1:
                self.state = with_measurements(
                    self.state, **self.records.take_measured()
                )

    def _may_read(
        self,
        everything: bool,
        due: bool,
    ) -> bool:
        """Whether the oldest call's records are to be read now."""
        if everything or len(self._pending) > CALLS_IN_FLIGHT:
            return True
        # Several hosts must find a halt at the same call, whichever is ahead.
        is_alone = agreement.hosts() == 1
        return due and is_alone and self._pending[0].records.is_ready()

    def _read_call(self, call: _Call) -> None:
        rows = np.asarray(call.records)[call.start : call.stop]
        done = self.history.last
        self._halt = self._watch.look(rows, done)
        self.records.report_weightless(rows)
        if self._halt is not None:
            surplus = done + len(rows) - self._halt.step
            rows = rows[: len(rows) - surplus]
            self.step = self._halt.step
            self.supply.go_back(call.position, surplus)
            self._pending.clear()
        self.records.add(rows)

    def _close_step(
        self,
        evaluating: bool,
        saving: bool,
    ) -> None:
        metrics = None
        if evaluating and self.test is not None:
            try:
                metrics = self.evaluate()
            except Exception:
                self._save_what_was_trained()
                raise
        if self.step == self.until:
            self.records.conclude()
        if saving:
            self.save(metrics)

    def _end(self) -> History:
        checkpoints = self.outputs.checkpoints
        if self._watch.lost and self.step >= self.until:
            # float16 skips such steps for a while; a run must not end in the middle of
            # it.
            raise self._diverged(self._watch.halt_at_the_end(self.step))
        with phase.phase("save"):
            checkpoints.wait()
        stopped = self.stop_requested and self.step < self.until
        self.history.status = "interrupted" if stopped else "finished"
        self.history.seconds = self.records.seconds()
        return self.history

    # ---- evaluating and saving ----

    def evaluate(self) -> dict[str, float]:
        """Return loss and metrics on the test set, and record them.

        Policies see only the evaluations that the recipe asks for.
        """
        began = time.perf_counter()
        with phase.phase("evaluation"):
            metrics = evaluate(self.program, self.state, self.test)
        self.records.evaluated(
            self.step,
            metrics,
            epoch_samples(self.test),
            time.perf_counter() - began,
        )
        if self._is_evaluation_due():
            signals = {f"evaluation_{name}": value for name, value in metrics.items()}
            count = self._evaluations() + 1
            self.state = with_measurements(self.state, evaluations=count, **signals)
        self.records.pause(time.perf_counter() - began)
        return metrics

    def save(self, metrics: dict[str, float] | None) -> None:
        """Begin a checkpoint of this step, unless it is there already.

        Parameters that are not finite halt the run.

        Args:
          metrics: of this step's evaluation, if there was one.
        """
        checkpoints = self.outputs.checkpoints
        if self.step == self._saved or not checkpoints.lacks(self.step):
            return
        began = time.perf_counter()
        if not _finite(self.state.params):
            why = f"the update of step {self.step} made parameters that are not finite"
            self._halt = Halt(self.step, None, None, why)
            return
        record = self.record.to_json()
        with phase.phase("save"):
            checkpoints.save(self.step, self.state, record, metrics)
        self._saved = self.step
        self.records.saved(self.step, time.perf_counter() - began)
        self.records.pause(time.perf_counter() - began)

    def _save_what_was_trained(self) -> None:
        """Save although the evaluation of this step failed: the training did not.

        A save of several hosts is one of all of them, and others may not have failed.
        """
        if agreement.hosts() == 1:
            self.save(None)
            self.outputs.checkpoints.wait()

    def _save_locally(self) -> None:
        """Begin a checkpoint on each host's own disk.

        If the one before could not be written that is told, and the run goes on.
        """
        began = time.perf_counter()
        self._locally_saved = time.monotonic()
        self.read(everything=True)
        if self.halted:
            return
        try:
            record = self.record.to_json()
            self.outputs.local.save(
                self.step,
                self.state,
                record,
            )
        except LeptonError as error:
            text = f"{error.what} ({error.where})"
            self.records.monitor.event("warning", text=text)
        self.records.pause(time.perf_counter() - began)

    # ---- requests ----

    def _listen(self) -> None:
        """Do what host 0 says, and what a person asks; a paused run stays in here."""
        while True:
            letters = self._hear()
            for name, content in letters:
                self.outputs.mailbox.answer(name, perform(self, content))
            if letters:
                continue  # there may be more
            if not self.paused or self.halted or self.stop_requested:
                return
            began = time.perf_counter()
            phase.reached(phase="pause")
            self.read(everything=True)
            time.sleep(PAUSE_SECONDS)
            self.records.pause(time.perf_counter() - began)

    def _hear(self) -> list[Letter]:
        """Hear from host 0, and return a person's requests.

        With several hosts it also says what only one of them knows: the time, and
        whether a person has asked it for a stop.
        """
        if agreement.hosts() > 1 and agreement.host() and self.stop_wished:
            agreement.wish("stop")
        measured = self.records.take_measured()

        def say() -> dict[str, Any]:
            since = time.monotonic() - self._locally_saved
            return {
                "requests": [] if self.halted else self.outputs.mailbox.take(),
                "stop": self.stop_wished or bool(agreement.wished("stop")),
                "fed": measured,
                "save": since >= self.outputs.local.every,
            }

        heard = self._beat.hear(self.step, say)
        self.stop_requested |= heard["stop"]
        if heard["fed"]:
            self.state = with_measurements(self.state, **heard["fed"])
        if heard["save"]:
            self._save_locally()
        return heard["requests"]

    def _wish_to_stop(self) -> None:
        self.stop_wished = True

    def status(self) -> dict[str, Any]:
        """Return how the run stands, for a person who asks."""
        return {
            "until": self.until,
            "record": self.records.last_record(),
            "rollbacks": self.rollbacks.count,
            "seconds": self.records.seconds(),
        }

    # ---- stopping, going back ----

    def _see_to_halt(self) -> bool:
        """End the run with the step that halted it, or go back.

        Returns:
          Whether that step was the last one.
        """
        halt = self._halt
        self._halt = None
        assert halt is not None
        if halt.knob != "stop":
            self._go_back(halt)
            return False
        self.state = without_halt(self.state)
        self._stopped = (
            f"stopped by {halt.policy} at step {halt.step} because {halt.why}"
        )
        self.history.reason = self._stopped
        self._close_step(evaluating=True, saving=True)
        return not self.halted or self._see_to_halt()

    def _go_back(self, halt: Halt) -> None:
        """Go on from the last good checkpoint, with a lower learning rate.

        The data goes on after the step that halted.
        """
        folder = self.outputs.folder
        if self.rollbacks.used_up or folder is None:
            raise self._diverged(halt)
        began = time.perf_counter()
        to, state = self._restore(halt)
        state = with_rate_factor(state, *self.rollbacks.slow)
        self.state = with_measurements(state, steps=self.budget[1])

        self.step = to
        self._saved = to
        self._beat.again(to)
        phase.reached(step=to, done=to)
        event = {
            "step": halt.step,
            "to": to,
            "policy": halt.policy,
            "why": halt.why,
            "rate": self.rollbacks.slow[0],
            "count": self.rollbacks.count,
            "most": self.rollbacks.most,
        }
        position = self.supply.position
        self.records.rolled_back(
            event,
            position.to_json(),
            self.state,
        )

        record = replace(self.record, slow=self.rollbacks.slow)
        agreement.first(lambda: remember(folder, to, record))
        self.outputs.checkpoints.set_aside(to)
        self.outputs.local.forget(to)
        self.supply.go_on(to, position)
        self.records.pause(time.perf_counter() - began)

    def _restore(self, halt: Halt) -> tuple[int, State]:
        checkpoints = self.outputs.checkpoints
        # The restored state needs the memory of this one.
        self.state = None  # type: ignore[assignment]

        def read(step: int) -> State:
            return self._reader.read(checkpoints, step).state

        def on_damaged(step: int, reason: str) -> None:
            self.records.monitor.event(
                "damaged",
                step=step,
                reason=reason,
            )

        with phase.phase("restore"):
            return self.rollbacks.restore(checkpoints, read, halt, on_damaged)

    def _diverged(self, halt: Halt) -> DivergedError:
        divergence = Divergence(
            self.program,
            self.supply,
            self.outputs.checkpoints,
            self._reader,
            self.outputs.folder,
        )
        is_last = halt.step == self.step
        return divergence.error(halt, self.rollbacks, is_last)

    # ---- how it stands ----

    @property
    def history(self) -> History:
        """The records in memory."""
        return self.records.history

    @property
    def halted(self) -> bool:
        """Whether the run can't simply go on from here."""
        return self._halt is not None

    @property
    def record(self) -> RunRecord:
        """Content of a checkpoint of this step, next to the state."""
        return RunRecord(
            position=self.supply.position,
            plan=self.program.plan.to_json(),
            journal=self.records.journal.lines,
            rollbacks=self.rollbacks.to_json(),
            stopped=self._stopped,
            given=self.program.given(),
        )

    @property
    def _consumed(self) -> int:
        return self.supply.position.samples

    def _is_evaluation_due(self) -> bool:
        return self._cadence.evaluates(self.step, self._consumed)

    def _evaluations(self) -> float:
        """Return how many evaluations policies have seen; 0 if none of them looks."""
        signals = getattr(self.state.controller, "fed", {})
        return float(signals.get("evaluations", 0.0))


@jit_where
def _finite(params: Any) -> Any:
    return all_finite(params)
