"""The training loop: one page, and the order in which things happen on it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.errors import JaxRuntimeError

from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.checkpoint.local import LocalCheckpoints
from lepton_jax.compat import jit_where
from lepton_jax.controller import with_measurements, without_halt, with_rate_factor
from lepton_jax.controller.journal import Journal
from lepton_jax.controller.live import Live
from lepton_jax.data import (
    Arrays,
    Dataset,
    Loader,
    blocks_between,
    epoch_samples,
    one_pass,
)
from lepton_jax.errors import DivergedError, LeptonError
from lepton_jax.hosts import agreement, phase
from lepton_jax.monitor import Monitor, SampleTrace
from lepton_jax.recipe import Recipe
from lepton_jax.step.precision import all_finite
from lepton_jax.step.state import State
from lepton_jax.train.diagnosis import described, diagnose
from lepton_jax.train.history import History
from lepton_jax.train.program import Program
from lepton_jax.train.recovery import (
    WEIGHT,
    Halt,
    Rollbacks,
    find_halt,
    lost_at_the_end,
    remember,
)
from lepton_jax.train.restore import Reader

CALLS_IN_FLIGHT = 8
LOG_SECONDS = 0.25


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
       are read a fixed number of calls late. Host 0 alone writes files beside the
       checkpoints.

    Args:
      program, state, step: what trains, from where.
      train, test: data sets; `test` may be None.
      position: of `train`, as a loader's state.
      until: the step to reach.
      monitor: receives the events.
      checkpoints: None: nothing is saved.
      folder: of the run. None: no journal is written.
      live: passes on a person's requests; with several hosts each has one.
      kept: what the checkpoint that the run goes on from holds beside state and
        position.
      samples: is told what each step was made of.
      local: where to keep fast checkpoints on this machine; None: there are none.
      budget: step at which the whole run ends, of which policies are told; None:
        `until`.
      given: knobs whose bases are the recipe's and not those of the checkpoint.
      reader: reads the checkpoints to which the run may go back; None: one of its own.
    """

    def __init__(
        self,
        program: Program,
        state: State,
        step: int,
        train: Any,
        test: Any,
        position: dict[str, Any],
        until: int,
        monitor: Monitor,
        checkpoints: Checkpoints | None,
        folder: Path | None = None,
        live: Live | None = None,
        kept: dict[str, Any] | None = None,
        samples: SampleTrace | None = None,
        local: LocalCheckpoints | None = None,
        *,
        budget: int | None = None,
        given: Mapping[str, float] | None = None,
        reader: Reader | None = None,
    ):
        self.program = program
        self.state = state
        self.step = step
        self.until = until
        self.recipe = program.recipe
        self.monitor = monitor
        self.checkpoints = checkpoints
        self.folder = folder
        self.train = train
        self.test = test
        self.position = position
        self.budget = until if budget is None else budget
        self._given_knobs = dict(given or {})
        self._reader = reader or Reader(program)
        self.history = History(first=step, names=program.records)
        self.stop_requested = self.stop_wished = False
        kept = kept or {}
        controller = program.controller
        own = None if agreement.host() else folder
        self.journal = Journal(
            own,
            controller,
            program.records,
            step,
            self.budget,
            kept.get("journal"),
        )
        self.rollbacks = Rollbacks(controller.limits, kept.get("rollbacks"))
        self._live = live or Live(None)
        self._saved = -1
        self._beat = agreement.Beat()
        self._measured: dict[str, float] = {}
        self._samples = samples
        self._local = local
        self._locally_saved = time.monotonic()
        self._halt: Halt | None = None
        self._slow = kept.get("slow")
        self._stopped: str | None = kept.get("stopped") if step >= until else None
        self._loader: Any = None
        self._last_row: np.ndarray | None = None
        self._lost = 0  # steps up to the last one read whose loss was not finite
        self._jumps = dict(controller.limits.get("jumps", {}))
        self._pending: deque[tuple[Any, int, int, dict[str, Any]]] = deque()
        self._window: list[np.ndarray] = []
        self._began = self._window_began = time.perf_counter()
        self._wait = 0.0
        self._epoch, self._order = epoch_samples(train), order(self.recipe, train)

    def run(self) -> History:
        """Train, evaluate and save until the last step, until a policy stops, or until
        a person asks for a stop.
        """
        last = self.step >= self.until
        with _stop_on_interrupt(self):
            try:
                self._begin()
                while not last:
                    self._hand_over()
                    if self._beat.due(self.step):
                        self._live.obey(self)
                    last = self.step == self.until or self.stop_requested
                    evaluating = last or self._due("evaluate_every")
                    saving = last or self._due("save_every")
                    self.read(everything=evaluating or saving)
                    if not self.halted:
                        self._close_step(evaluating, saving)
                    if self.halted:
                        last = self._see_to_halt()
            finally:
                if self._loader is not None:
                    self._loader.close()
                self.journal.close()
                if self._samples is not None:
                    self._samples.close()
                self.history.seconds = time.perf_counter() - self._began
        if self._lost and self.step >= self.until:
            # float16 skips such steps for a while; a run must not end in the middle of
            # it
            raise self._diverged(
                Halt(
                    self.step,
                    None,
                    None,
                    _lost_in_words(self._lost),
                )
            )
        if self.checkpoints is not None:
            with phase.phase("save"):
                self.checkpoints.wait()
        stopped = self.stop_requested and self.step < self.until
        self.history.status = "interrupted" if stopped else "finished"
        self.history.seconds = time.perf_counter() - self._began
        return self.history

    def _begin(self) -> None:
        """What stands before the first step; a run that may be rolled back has a
        checkpoint to go back to.
        """
        self.state = with_measurements(self.state, steps=self.budget)
        if self._slow:  # after a rollback that the checkpoint does not know of
            self.state = with_rate_factor(self.state, *self._slow)
        self.journal.begin(self.state, self.step)
        if self._given_knobs:
            self.journal.given(self.step, self._given_knobs)
        if self._samples is not None:
            self._samples.back(self.step)
        for line in self.journal.undone:
            self.monitor.event(
                "warning",
                text=(
                    f"{line['who']} asked the run after step {line['step']} to"
                    f" {line['request']} {line.get('settings', '')}: that is later than"
                    " the checkpoint, and must be asked again"
                ),
            )
        self._open()
        if (
            self.rollbacks.most
            and self.checkpoints is not None
            and self.step < self.until
        ):
            self.save(None)

    def _open(self) -> None:
        """Read data from this position on."""
        per_block = self.program.plan.steps_per_call
        resident = self.program.plan.data == "resident"
        self._loader = Loader(
            self.train,
            batch_size=self.recipe.batch_size,
            steps=per_block,
            sharding=self.program.block_sharding,
            seed=self.recipe.seed,
            shuffle=self.recipe.shuffle,
            position=self.position,
            blocks=blocks_between(self.step, self.until, per_block),
            resident=resident,
            limits=self.program.limits,
        )
        self._data = self.program.resident(self.train) if resident else None
        self._block = None
        self._offset = per_block

    def _hand_over(self) -> None:
        """Hand the devices one call: what is left of a block of steps, up to the next
        step at which something may be due.
        """
        per_block = self.program.plan.steps_per_call
        batch_size = self.recipe.batch_size
        if self.step in self._jumps:
            self.position = self._jumps.pop(self.step)
            self._loader.close()
            self._open()
        if self._offset == per_block:
            waiting = time.perf_counter()
            with phase.phase("data"):
                self._block = next(self._loader)
                self._offset = 0
            self._wait += time.perf_counter() - waiting
        count = min(per_block - self._offset, self._next_stop() - self.step)
        start = self._offset
        self._offset = self._offset + count
        self.state, records = self.program.train(
            self.state,
            self._block,
            start,
            self._offset,
            self._data,
        )
        self.step += count
        phase.reached(step=self.step, phase="steps")
        self.position = (
            self._loader.state((per_block - self._offset) * batch_size) | self._order
        )
        self._pending.append(
            (
                records,
                start,
                self._offset,
                self.position,
            )
        )
        if self._samples is not None:
            for back in reversed(range(count)):
                self._samples.add(
                    self.step - back,
                    self._loader.names(self.position["samples"] - back * batch_size),
                )

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
        if saving and self.checkpoints is not None:
            self.save(metrics)

    def _save_what_was_trained(self) -> None:
        """Save although the evaluation of this step failed: the training did not.

        A save of several hosts is one of all of them, and others may not have failed.
        """
        if self.checkpoints is not None and agreement.hosts() == 1:
            self.save(None)
            self.checkpoints.wait()

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the test set, and the event that says so; policies see
        those of the recipe's cadence alone.
        """
        began = time.perf_counter()
        with phase.phase("evaluation"):
            metrics = evaluate(
                self.program,
                self.state,
                self.test,
            )
        self.history.evaluations.append((self.step, metrics))
        self.monitor.event(
            "evaluation",
            step=self.step,
            samples=epoch_samples(self.test),
            metrics=metrics,
            seconds=time.perf_counter() - began,
        )
        if self._due("evaluate_every"):
            self.state = with_measurements(
                self.state,
                evaluations=self._evaluations() + 1,
                **{f"evaluation_{name}": x for name, x in metrics.items()},
            )
        self.waited(time.perf_counter() - began)
        return metrics

    def save(self, metrics: dict[str, float] | None) -> None:
        """Begin a checkpoint of this step, unless it is there already; parameters that
        are not finite halt the run.
        """
        assert self.checkpoints is not None
        if self.step == self._saved or self.step in self.checkpoints.steps():
            return
        began = time.perf_counter()
        if not _finite(self.state.params):
            self._halt = Halt(
                self.step,
                None,
                None,
                f"the update of step {self.step} made parameters that are not finite",
            )
            return
        with phase.phase("save"):
            self.checkpoints.save(
                self.step,
                self.state,
                self.record,
                metrics,
            )
        self._saved = self.step
        self.monitor.event(
            "save",
            step=self.step,
            seconds=time.perf_counter() - began,
        )
        self.waited(time.perf_counter() - began)

    # ---- how it stands ----

    @property
    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds beside state, position and plan."""
        return {
            "journal": self.journal.lines,
            "rollbacks": self.rollbacks.kept,
            "stopped": self._stopped,
            "given": self.program.given(),
        }

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state."""
        return {
            "position": self.position,
            "plan": self.program.plan.to_json(),
            **self.kept,
        }

    @property
    def halted(self) -> bool:
        """Whether the run can't simply go on from here."""
        return self._halt is not None

    def hear(self, requests: Callable[[], list[Any]]) -> list[Any]:
        """A person's requests, as host 0 found them; with several hosts also what only
        one of them knows: the time, and whether somebody asked it for a stop.
        """
        if agreement.hosts() > 1 and agreement.host() and self.stop_wished:
            agreement.wish("stop")

        def say() -> dict[str, Any]:
            return {
                "requests": requests(),
                "stop": self.stop_wished or bool(agreement.wished("stop")),
                "fed": self._measured,
                "save": (
                    self._local is not None
                    and time.monotonic() - self._locally_saved >= self._local.every
                ),
            }

        heard = self._beat.hear(self.step, say)
        self._measured = {}
        self.stop_requested |= heard["stop"]
        if heard["fed"]:
            self.state = with_measurements(self.state, **heard["fed"])
        if heard["save"]:
            self._save_locally()
        return heard["requests"]

    def _save_locally(self) -> None:
        """A checkpoint on each host's own disk. What went wrong with the one before is
        told, and the run goes on.
        """
        assert self._local is not None
        began = time.perf_counter()
        self._locally_saved = time.monotonic()
        self.read(everything=True)
        if self.halted:
            return
        try:
            self._local.save(
                self.step,
                self.state,
                self.record,
            )
        except LeptonError as error:
            self.monitor.event("warning", text=f"{error.what} ({error.where})")
        self.waited(time.perf_counter() - began)

    def status(self) -> dict[str, Any]:
        """For whoever asks: step, the last record that was read, and time."""
        record = (
            dict(
                zip(
                    self.program.records,
                    self._last_row.tolist(),
                    strict=True,
                )
            )
            if self._last_row is not None
            else {}
        )
        return {
            "until": self.until,
            "record": record,
            "rollbacks": self.rollbacks.count,
            "seconds": time.perf_counter() - self._began,
        }

    def waited(self, seconds: float) -> None:
        """Take time that the loop stood still out of the steps' time."""
        self._window_began += seconds

    def _due(self, cadence: str) -> bool:
        """Whether this step is one of a cadence's: every so many steps, or the first at
        or past an epoch's end.
        """
        every = getattr(self.recipe, cadence) or (
            self.recipe.evaluate_every if cadence == "save_every" else None
        )
        if every:
            return self.step % every == 0
        if self._epoch is None:
            return False
        consumed = self.position["samples"]
        return (
            consumed // self._epoch > (consumed - self.recipe.batch_size) // self._epoch
        )

    def _next_stop(self) -> int:
        """The first step after this one at which something may be due."""
        stops = [self.until, *(step for step in self._jumps if step > self.step)]
        for every in (
            self.recipe.evaluate_every,
            self.recipe.save_every,
            self.recipe.log_every,
        ):
            if every:
                stops.append((self.step // every + 1) * every)
        if self._epoch is not None and not (
            self.recipe.evaluate_every and self.recipe.save_every
        ):
            left = self._epoch - self.position["samples"] % self._epoch
            stops.append(self.step + math.ceil(left / self.recipe.batch_size))
        return min(stops)

    def _evaluations(self) -> float:
        held = getattr(self.state.controller, "fed", {})
        return float(held["evaluations"]) if "evaluations" in held else 0.0

    # ---- records ----

    def read(self, everything: bool) -> None:
        """Fetch records that the devices have finished (or all), look whether they halt
        the run, and report a window when it is time.
        """
        every = self.recipe.log_every
        due = everything or (
            self.step % every == 0
            if every
            else time.perf_counter() - self._window_began >= LOG_SECONDS
        )
        # several must find a halt at the same call, whichever is ahead
        alone = agreement.hosts() == 1
        while (
            self._pending
            and not self.halted
            and (
                everything
                or len(self._pending) > CALLS_IN_FLIGHT
                or (due and alone and self._pending[0][0].is_ready())
            )
        ):
            records, start, stop, position = self._pending.popleft()
            rows = np.asarray(records)[start:stop]
            done = self.history.last
            self._halt = find_halt(
                rows,
                self.program.records,
                self.program.controller,
                done,
                self._lost,
            )
            self._lost = lost_at_the_end(
                rows,
                self.program.records,
                self.program.controller,
                self._lost,
            )
            self._tell_of_weightless(rows, done)
            if self._halt is not None:
                surplus = len(rows) - (self._halt.step - done)
                rows = rows[: len(rows) - surplus]
                self.step = self._halt.step
                if surplus:
                    self.position = (
                        self._loader.at(
                            position["samples"] - surplus * self.recipe.batch_size
                        )
                        | self._order
                    )
                else:
                    self.position = position
                self._pending.clear()
            phase.reached(done=done + len(rows))
            self._window.append(rows)
            self.history.append(rows)
            self.history.samples += len(rows) * self.recipe.batch_size
            self.journal.add(rows)
        if (due or self.halted) and self._window:
            self._report()

    def _tell_of_weightless(
        self,
        rows: np.ndarray,
        done: int,
    ) -> None:
        """Report the steps that made no update because nothing in their batch
        counts.
        """
        names = self.program.records
        if WEIGHT not in names:
            return
        for row in np.flatnonzero(rows[:, names.index(WEIGHT)] == 0).tolist():
            self.monitor.event(
                "skipped",
                step=done + row + 1,
                reason=(
                    "all weights of the batch are 0: it is no step, nothing is updated"
                ),
            )

    def _report(self) -> None:
        """The decisions and the event of the steps read since the last one."""
        now = time.perf_counter()
        rows = np.concatenate(self._window)
        last = self.history.last
        seconds = now - self._window_began
        self.journal.flush()
        self.monitor.event(
            "steps",
            first=last - len(rows) + 1,
            last=last,
            seconds=seconds,
            data_wait=self._wait,
            samples=len(rows) * self.recipe.batch_size,
            records=dict(
                zip(
                    self.program.records,
                    rows.T.tolist(),
                    strict=True,
                )
            ),
        )
        so_far = now - self._began
        self._measured = {
            "seconds": so_far,
            "price": so_far / 3600 * (self.program.plan.price_per_hour or 0.0),
            "data_wait": self._wait / max(seconds, 1e-9),
        }
        if agreement.hosts() == 1:
            self.state = with_measurements(self.state, **self._measured)
            self._measured = {}
        self.history.data_wait += self._wait
        self._last_row = rows[-1]
        self._window = []
        self._window_began = now
        self._wait = 0.0

    # ---- stopping, going back ----

    def _see_to_halt(self) -> bool:
        """End the run with the step that halted it, or go back; returns whether it was
        the last one.
        """
        halt = self._halt
        self._halt = None
        assert halt is not None
        if halt.knob != "stop":
            self._go_back(halt)
            return False
        self.state = without_halt(self.state)
        self.history.reason = self._stopped = (
            f"stopped by {halt.policy} at step {halt.step} because {halt.why}"
        )
        self._close_step(evaluating=True, saving=True)
        return not self.halted or self._see_to_halt()

    def _go_back(self, halt: Halt) -> None:
        """Restore the last good checkpoint, with a lower learning rate, and go on with
        the data behind the step that halted.
        """
        if (
            self.rollbacks.count >= self.rollbacks.most
            or self.checkpoints is None
            or self.folder is None
        ):
            raise self._diverged(halt)
        began = time.perf_counter()
        checkpoints = self.checkpoints
        self.state = None  # type: ignore[assignment]  # what is restored needs its memory

        def read(step: int) -> State:
            return self._reader.read(checkpoints, step).state

        def on_damaged(step: int, reason: str) -> None:
            self.monitor.event(
                "damaged",
                step=step,
                reason=reason,
            )

        with phase.phase("restore"):
            to, state = self.rollbacks.restore(
                checkpoints,
                read,
                halt,
                on_damaged,
            )
        self.state = with_measurements(
            with_rate_factor(state, *self.rollbacks.slow),
            steps=self.budget,
        )
        told = {
            "step": halt.step,
            "to": to,
            "policy": halt.policy,
            "why": halt.why,
            "rate": self.rollbacks.slow[0],
            "count": self.rollbacks.count,
            "most": self.rollbacks.most,
        }
        self.journal.rolled_back(**told, position=self.position)
        self.monitor.event("rollback", **told)
        self.step = self._saved = to
        self._beat.again(to)
        if self._samples is not None:
            self._samples.back(to)
        phase.reached(step=to, done=to)
        self.journal.begin(self.state, to)
        self.history.truncate(to)
        own = self.folder
        entry = {
            "to": to,
            "position": self.position,
            "slow": self.rollbacks.slow,
            **self.kept,
        }
        agreement.first(lambda: remember(own, entry))
        self.checkpoints.set_aside(to)
        if self._local is not None:
            self._local.forget(to)
        self._loader.close()
        self._open()
        self.waited(time.perf_counter() - began)

    def _diverged(self, halt: Halt) -> DivergedError:
        if self.checkpoints is not None:
            self.checkpoints.wait()
        saved = self.checkpoints.steps() if self.checkpoints else []
        what = (
            halt.why
            if halt.knob is None
            else f"{halt.policy} gave up at step {halt.step}: {halt.why}"
        )
        if self.rollbacks.tried:
            tried = "; ".join(self.rollbacks.tried)
            what += f" after {self.rollbacks.count} rollbacks: {tried}"
        where = f"step {halt.step}{_culprit(self.train)}"

        remedy = "lower the learning rate, set clip_norm, or fix the data"
        cause = self._cause(halt) if halt.knob is None else None
        if cause is not None:
            what += f": {cause[0]}"
            remedy = cause[1]
        if self.rollbacks.most and not self.folder:
            remedy = (
                f"a run that is to go back to a checkpoint needs a run_dir; {remedy}"
            )
        last = "no checkpoint was committed"
        if saved:
            last = f"step {saved[-1]} is the last committed checkpoint"
        return DivergedError(what, where=where, remedy=f"{remedy}; {last}")

    def _cause(self, halt: Halt) -> tuple[str, str] | None:
        """The cause of numbers that are not finite, and a remedy; None: not found out.

        The step's batch is computed once more, with the parameters of the seed: faults
        of a batch show with any parameters. Those of the step are lost, as its update
        has been made.
        """
        batch = self._batch_of(halt.step)
        if batch is None:
            return None
        names = self._loader.names(self.position["samples"])
        try:
            finding = diagnose(
                self.program,
                self.program.init(self.recipe.seed),
                batch,
            )
            if not finding.is_of_the_batch:
                return self._cause_in_parameters(halt.step, batch, finding.loss)
        except (LeptonError, JaxRuntimeError, MemoryError):
            return None  # there is no memory for it, say: the loss alone is told
        if finding.inputs:
            remedy = "fix or leave out these samples"
        elif self.recipe.precision == "float16":
            remedy = (
                "scale the inputs or the activations to within 65504, the largest"
                ' float16, or use precision="bfloat16"'
            )
        else:
            remedy = (
                "guard that operation against what these samples bring (a zero to"
                " divide by, a mask without a single True), or leave the samples out"
            )
        return described(finding, names), remedy

    def _cause_in_parameters(
        self,
        step: int,
        batch: tuple[Any, Any],
        loss: float,
    ) -> tuple[str, str]:
        """Cause and remedy where the batch is sound: its loss with the seed's
        parameters.
        """
        what = (
            f"the same batch has a loss of {loss:.4g} with the parameters of the seed,"
            " so the parameters have grown too large"
        )
        checkpoints = self.checkpoints
        earlier = [] if checkpoints is None else checkpoints.steps()
        earlier = [saved for saved in earlier if saved < step]
        if checkpoints is not None and earlier:
            state = self._reader.read(checkpoints, earlier[-1]).state
            finding = diagnose(self.program, state, batch)
            if finding.origins:
                what += f"; with those of step {earlier[-1]} {finding.origins[0]}"
        return what, "lower the learning rate, or set clip_norm"

    def _batch_of(self, step: int) -> tuple[Any, Any] | None:
        """The batch of the step at whose end the position stands; None: can't be
        had.
        """
        if agreement.hosts() > 1 or isinstance(self.train, grain.IterDataset):
            return None  # each host has its own rows; or the data can't be read twice
        size = self.recipe.batch_size
        start = self.position["samples"] - size
        if start < 0 or step != self.step:
            return None
        position = self._loader.at(start) if isinstance(self.train, Dataset) else start
        loader = Loader(
            self.train,
            batch_size=size,
            steps=1,
            sharding=self.program.batch_sharding,
            seed=self.recipe.seed,
            shuffle=self.recipe.shuffle,
            position=position,
            blocks=1,
        )
        try:
            return next(loader)
        finally:
            loader.close()


def _lost_in_words(steps: int) -> str:
    last = (
        "the loss of the last step is" if steps == 1 else f"the last {steps} losses are"
    )
    return f"{last} not finite, and nothing was updated since"


def order(recipe: Recipe, train: Any) -> dict[str, Any]:
    """What a position in the data means nothing without: the seed of the shuffling, and
    how many samples there are.
    """
    return {"seed": recipe.seed if recipe.shuffle else None, "of": epoch_samples(train)}


def evaluate(
    program: Program,
    state: State,
    test: Any,
) -> dict[str, float]:
    """Loss and metrics over a data set, every sample counted once.

    Where samples of a batch can meet, the last batch runs at its own size; otherwise it
    is filled up, and its filling masked.

    Raises:
      DataError: no sample has weight, or a metric of the whole set would gather too
        much.
    """
    size = program.recipe.batch_size
    samples = epoch_samples(test)
    assert samples is not None
    program.evaluation.check(samples)

    sums = None
    parts = []
    fill = samples % size == 0 or program.evaluation.meeting is None
    for batch, rows in one_pass(test, size, program.sharding_of, fill, program.limits):
        sums, part = program.evaluate_and_keep(
            sums,
            state,
            batch,
            rows,
        )
        if part is not None:
            parts.append(program.evaluation.real(part, rows))
    return program.metrics(sums, parts)


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
                return (
                    "; the training data itself has a number that isn't finite in"
                    f" {len(rows)} samples, first in {rows[0]}"
                )
    return ""


class _stop_on_interrupt:
    """The first Ctrl-C asks the loop to stop at the next step and save; the second one
    stops at once.
    """

    def __init__(self, loop: Loop):
        self.loop = loop
        self.before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._asked)

    def _asked(
        self,
        number: int,
        frame: Any,
    ) -> None:
        self.loop.stop_wished = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *unused: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
