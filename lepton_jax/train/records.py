"""Records of a run's steps: history, journal, events and sample trace."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton_jax.controller.journal import Journal
from lepton_jax.hosts import agreement, phase
from lepton_jax.train.history import History
from lepton_jax.train.notices import Noticed, NoticeWatch, found_at_the_end
from lepton_jax.train.outputs import NoSampleTrace, Outputs
from lepton_jax.train.program import Program
from lepton_jax.train.recovery import WEIGHT
from lepton_jax.train.run_record import RunRecord

SECONDS_AN_HOUR = 3600
AVERAGING = "averaging_decay"  # a knob of what is served, not of what is trained
# Seconds that keep a share of a window that took no time from being a division by zero.
SHORTEST_WINDOW = 1e-9


class Records:
    """The records of one `fit`, in memory and on the disk.

    Records of steps gather in a window; a report writes the window's decisions and its
    event, and begins the next one.

    Args:
      program: whose steps are recorded.
      step: steps done so far.
      budget: steps before and at the end of the budget of which policies are told.
      outputs: the run's folder, monitor and sample trace. Only the first host writes a
        journal into the folder.
      past: says which lines of the journal belong to the run's past.

    Attributes:
      history: what stays in memory.
      measured: what the host has measured and the state was not told yet, by signal.
    """

    def __init__(
        self,
        program: Program,
        step: int,
        budget: tuple[int, int],
        outputs: Outputs,
        past: RunRecord,
    ):
        self.names = program.records
        self.history = History(first=step, names=self.names)
        self.journal = Journal(
            None if agreement.host() else outputs.folder,
            program.controller,
            self.names,
            step,
            *budget,
            past.journal,
        )
        self.notices = NoticeWatch(self.names, program.controller)
        self.monitor = outputs.monitor
        self._end = budget[1]
        moved = {knob for _, knob in program.controller.moves}
        self._is_steered = bool(moved - {AVERAGING})
        self.measured: dict[str, float] = {}
        self._samples = outputs.samples
        self._batch_size = program.recipe.batch_size
        self._price_per_hour = program.plan.price_per_hour or 0.0
        self._window: list[np.ndarray] = []
        self._last_row: np.ndarray | None = None
        self._began = time.perf_counter()
        self._window_began = self._began

    def begin(
        self,
        state: Any,
        step: int,
        bases: Mapping[str, float],
    ) -> None:
        """Write what stands before the first step.

        Args:
          state: after `step`.
          step: steps done so far.
          bases: of the knobs for which the recipe's value replaces the checkpoint's.
        """
        self.journal.begin(state, step)
        if bases:
            self.journal.given(step, bases)
        self._samples.back(step)
        for line in self.journal.undone:
            request = f"{line['request']} {line.get('settings', '')}"
            self.monitor.event(
                "warning",
                text=(
                    f"{line['who']} asked the run after step {line['step']} to"
                    f" {request}: that is later than the checkpoint, and must be asked"
                    " again"
                ),
            )

    @property
    def traces_samples(self) -> bool:
        """Whether the names of the samples are wanted, which takes time to find."""
        return not isinstance(self._samples, NoSampleTrace)

    def trace(
        self,
        step: int,
        names: list[str],
    ) -> None:
        """Write the names of the samples that a step is made of."""
        self._samples.add(step, names)

    def add(self, rows: np.ndarray) -> None:
        """Add the records of the next steps: float32 (steps, names)."""
        phase.reached(done=self.history.last + len(rows))
        for noticed in self.notices.look(rows, self.history.last):
            self._tell(noticed)
        self._window.append(rows)
        self.history.append(rows)
        self.history.samples += len(rows) * self._batch_size
        self.journal.add(rows)

    def report_weightless(self, rows: np.ndarray) -> None:
        """Report the next steps that update nothing, as nothing in their batch counts.

        Args:
          rows: records of the next steps, before they are added.
        """
        if WEIGHT not in self.names:
            return
        weights = rows[:, self.names.index(WEIGHT)]
        for row in np.flatnonzero(weights == 0).tolist():
            self.monitor.event(
                "skipped",
                step=self.history.last + row + 1,
                reason=(
                    "all weights of the batch are 0: it is no step, nothing is updated"
                ),
            )

    @property
    def has_unreported(self) -> bool:
        """Whether there are steps in the window."""
        return bool(self._window)

    def report(
        self,
        data_wait: float,
        feed: Mapping[str, float],
    ) -> None:
        """Write the window's decisions and its event.

        Args:
          data_wait: seconds that the loop has waited for the window's data.
          feed: what reading takes and gives; see `Feed.measured`.
        """
        now = time.perf_counter()
        rows = np.concatenate(self._window)
        last = self.history.last
        seconds = now - self._window_began
        # First the decisions: a checkpoint that contains a step begins after both.
        self.journal.flush()
        self.monitor.event(
            "steps",
            first=last - len(rows) + 1,
            last=last,
            seconds=seconds,
            data_wait=data_wait,
            samples=len(rows) * self._batch_size,
            **({"feed": dict(feed)} if feed else {}),
            records=self._by_name(rows.T),
        )
        seconds_so_far = now - self._began
        self.measured = {
            "seconds": seconds_so_far,
            "price": seconds_so_far / SECONDS_AN_HOUR * self._price_per_hour,
            "data_wait": data_wait / max(seconds, SHORTEST_WINDOW),
        }
        self.history.data_wait += data_wait
        self.history.window_seconds += seconds
        self.history.padding = feed.get("padding", self.history.padding)
        self._last_row = rows[-1]
        self._window = []
        self._window_began = now

    def take_measured(self) -> dict[str, float]:
        """Return what was measured since this was asked last, for the state."""
        measured = self.measured
        self.measured = {}
        return measured

    def window_seconds(self) -> float:
        """Return the seconds since the last report, less those that were paused."""
        return time.perf_counter() - self._window_began

    def pause(self, seconds: float) -> None:
        """Take time that the loop stood still out of the steps' time."""
        self._window_began += seconds

    def evaluated(
        self,
        step: int,
        metrics: dict[str, float],
        samples: int | None,
        seconds: float,
    ) -> None:
        """Record an evaluation on a number of samples."""
        self.history.evaluations.append((step, metrics))
        self.monitor.event(
            "evaluation",
            step=step,
            samples=samples,
            metrics=metrics,
            seconds=seconds,
        )

    def saved(
        self,
        step: int,
        seconds: float,
    ) -> None:
        """Record that a checkpoint has begun."""
        self.monitor.event("save", step=step, seconds=seconds)

    def rolled_back(
        self,
        event: Mapping[str, Any],
        position: Mapping[str, Any],
        state: Any,
    ) -> None:
        """Record a rollback, and forget the steps that it undoes.

        Args:
          event: {"step", "to", ...} as it is told.
          position: where the data goes on, in plain data.
          state: the one that the run goes on with.
        """
        self.journal.rolled_back(**event, position=position)
        self.monitor.event("rollback", **event)
        to = event["to"]
        self._samples.back(to)
        self.journal.begin(state, to)
        self.history.truncate(to)
        self.notices.forget(to)
        self.history.notices = [n for n in self.history.notices if n.step <= to]

    def conclude(self) -> None:
        """Say what the curves of a run that is at its end say against it.

        Only a run with policies that steer it is judged, which promise more than a
        plain one does; averaging alone does not steer.
        """
        history = self.history
        if not self._is_steered or history.last < self._end:
            return
        is_whole = history.first == 0
        for noticed in found_at_the_end(
            history.last, history.records, history.evaluations, is_whole
        ):
            if not self.notices.has_said(noticed):
                self.journal.noticed(**noticed._asdict())
                self._tell(noticed)

    def _tell(self, noticed: Noticed) -> None:
        self.history.notices.append(noticed)
        self.monitor.event("notice", **noticed.to_json())

    def last_record(self) -> dict[str, float]:
        """Return the last record that was reported; before there is one, {}."""
        if self._last_row is None:
            return {}
        return self._by_name(self._last_row)

    def _by_name(self, values: np.ndarray) -> dict[str, Any]:
        return dict(
            zip(
                self.names,
                values.tolist(),
                strict=True,
            )
        )

    def seconds(self) -> float:
        """Return the seconds since the fit began."""
        return time.perf_counter() - self._began

    def close(self) -> None:
        """Close the journal and the sample trace."""
        self.journal.close()
        self._samples.close()
        self.history.seconds = self.seconds()
