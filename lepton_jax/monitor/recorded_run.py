"""A run put together from its events: curves, evaluations, marks and times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.monitor.chart import Mark
from lepton_jax.monitor.events import Event

Series = tuple[np.ndarray, np.ndarray]  # steps, ascending, and their values


class Attempt(NamedTuple):
    """One start of a run, from its time to the time of its last event."""

    at: float
    until: float


@dataclass
class Run:
    """The events of one folder, put together.

    If a resumed run repeats a step, the later record wins; steps that a rollback has
    undone are kept apart.

    Attributes:
      start: the last start event.
      end: the end event after it, if any.
      records: what each step recorded, by name.
      undone: parts of the loss that a rollback has undone.
      evaluations: metrics by step.
      step_seconds: the mean time of a step, in windows.
      waits: the percentage of time that waited for data, in windows.
      marks: what happened at which step.
      attempts: the starts.
      compilations: how often each program was compiled since the last start.
      seconds: of all attempts.
      window_seconds: of all windows of steps.
      wait_seconds: those of them that waited for data.
      samples: of all windows.
      feed: what reading took and gave in the last window that says so: "workers",
        "blocks_ahead", "bytes", "padding".
      last: the last step.
    """

    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Series] = field(default_factory=dict)
    undone: list[Series] = field(default_factory=list)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    step_seconds: Series = field(default_factory=lambda: _series([]))
    waits: Series = field(default_factory=lambda: _series([]))
    marks: list[Mark] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    compilations: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    window_seconds: float = 0.0
    wait_seconds: float = 0.0
    samples: int = 0
    feed: dict[str, float] = field(default_factory=dict)
    last: int = 0

    @property
    def status(self) -> str:
        """The end of the run, in words."""
        return self.end.get("status") or "no end recorded"

    @property
    def metrics(self) -> list[str]:
        """Names of the recipe's metrics."""
        return self.start.get("metrics") or []


def collect(events: Iterable[Event]) -> Run:
    """Put the events of a folder together.

    Fields that are missing are passed over. It takes time in proportion to the events.
    """
    collector = _Collector()
    for event in events:
        collector.add(event)
    return collector.finish()


class _Collector:
    """A run under construction, event by event."""

    def __init__(self) -> None:
        self.run = Run()
        self.parts: dict[str, list[Series]] = {}  # of each record, as they were written
        self.windows: list[tuple[int, float, float]] = []  # step, seconds, wait in %

    def add(self, event: Event) -> None:
        kind = event["kind"]
        run = self.run
        # a start may first find damage
        if run.attempts and not run.end and kind not in ("start", "damaged"):
            at = event.get("time") or 0.0
            run.attempts[-1] = run.attempts[-1]._replace(until=at)

        handle = getattr(self, f"_on_{kind}", None)
        if handle is not None:
            handle(event)

    def finish(self) -> Run:
        run = self.run
        run.seconds = sum(attempt.until - attempt.at for attempt in run.attempts)
        run.records = {name: _series(parts) for name, parts in self.parts.items()}
        if self.windows:
            steps, seconds, waits = np.array(self.windows, np.float64).T
            run.step_seconds = _series([(steps, seconds)])
            run.waits = _series([(steps, waits)])
        return run

    def _on_start(self, event: Event) -> None:
        run = self.run
        step = event.get("step") or 0
        if run.attempts or step:
            self._mark(step, "resume", "resumed", f"resumed at step {step:,}")
        at = event.get("time") or 0.0
        run.attempts.append(Attempt(at, at))
        run.start = event
        run.end = {}
        run.compilations = {}

    def _on_steps(self, event: Event) -> None:
        run = self.run
        first = event.get("first")
        last = event.get("last")
        if first is None or last is None or last < first:
            return

        for name, values in (event.get("records") or {}).items():
            numbers = [v if isinstance(v, int | float) else math.nan for v in values]
            y = np.array(numbers, np.float64)
            x = np.arange(
                first,
                first + len(y),
                dtype=np.float64,
            )
            self.parts.setdefault(name, []).append((x, y))

        seconds = event.get("seconds")
        wait = event.get("data_wait")
        if seconds:
            share = math.nan if wait is None else 100 * wait / seconds
            self.windows.append(
                (
                    last,
                    seconds / (last - first + 1),
                    share,
                )
            )
            run.window_seconds += seconds
            run.wait_seconds += wait or 0.0
            run.samples += event.get("samples") or 0
        run.feed = event.get("feed") or run.feed
        run.last = last

    def _on_evaluation(self, event: Event) -> None:
        step = event.get("step")
        if step is not None:
            self.run.evaluations[step] = event.get("metrics") or {}

    def _on_compile(self, event: Event) -> None:
        run = self.run
        program = str(event.get("program"))
        run.compilations[program] = run.compilations.get(program, 0) + 1
        if (event.get("count") or 1) > 1:
            text = f"{program} compiled again"
            self._mark(run.last, "compile", "compiled again", text)

    def _on_save(self, event: Event) -> None:
        if event.get("step") is not None:
            self._mark(event["step"], "save", "checkpoint", "")

    def _on_rollback(self, event: Event) -> None:
        """Take out what a rollback has undone, and keep that of the loss apart."""
        if event.get("step") is None:
            return
        run = self.run
        to = event.get("to") or 0
        if "loss" in self.parts:
            x, y = _series(self.parts["loss"])
            if len(x) and x[-1] > to:
                run.undone.append((x[x > to], y[x > to]))
        for name, parts in self.parts.items():
            self.parts[name] = [(x[x <= to], y[x <= to]) for x, y in parts]
        run.evaluations = {
            step: metrics for step, metrics in run.evaluations.items() if step <= to
        }

        run.last = to
        step = event["step"]
        text = f"rolled back from step {step:,} to {to:,}: {event.get('why') or ''}"
        self._mark(step, "rollback", "rolled back", text)

    def _on_damaged(self, event: Event) -> None:
        step = event.get("step")
        if step is not None:
            text = f"checkpoint of step {step:,} damaged"
            self._mark(step, "damaged", "damaged checkpoint", text)

    def _on_end(self, event: Event) -> None:
        self.run.end = event
        if event.get("status") == "diverged":
            step = event.get("step")
            step = self.run.last if step is None else step
            self._mark(step, "diverged", "diverged", f"diverged at step {step:,}")

    def _mark(
        self,
        step: int,
        kind: str,
        name: str,
        text: str,
    ) -> None:
        self.run.marks.append(Mark(step, kind, name, text))


def _series(parts: Sequence[Series]) -> Series:
    """Join parts, in the order of writing, to one ascending curve.

    If a step has two values, the later one stays.
    """
    if not parts:
        return np.zeros(0), np.zeros(0)
    x = np.concatenate([part for part, _ in parts])[::-1]
    y = np.concatenate([part for _, part in parts])[::-1]
    steps, places = np.unique(x, return_index=True)
    return steps, y[places]
