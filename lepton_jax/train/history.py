"""The records that a fit leaves in memory: every step's, and every evaluation."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lepton_jax.train.notices import Noticed

# Last records that a mean is taken of, so that it is steadier than one batch's value
# (assumption).
MEAN_OF = 10


@dataclass
class History:
    """The record of one `fit`.

    Attributes:
      first: the step before the first of the records.
      names: of the values that each step records.
      evaluations: (step, metrics) of each evaluation.
      status: how it ended: "finished", "interrupted", "diverged" or "failed".
      notices: why the run may be worse than it could be, with the steps at which that
        was noticed.
      reason: why it ended before its last step, if a policy or a person stopped it.
      seconds: wall time of the fit, compilations included.
      samples: consumed in training.
      data_wait: seconds that the devices waited for data.
      window_seconds: seconds that the steps took, which are those that it may wait in:
        without compilations, evaluations and saves.
      padding: share of the tokens that were padding, where rows are fitted.
      compilations: of the train step.
      steps: trained.
      folder: the run folder, if there is one.
    """

    first: int = 0
    names: list[str] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notices: list[Noticed] = field(default_factory=list)
    status: str = "finished"
    reason: str | None = None
    seconds: float = 0.0
    samples: int = 0
    data_wait: float = 0.0
    window_seconds: float = 0.0
    padding: float | None = None
    compilations: int = 0
    folder: Path | None = None
    steps: int = 0
    _chunks: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def last(self) -> int:
        """The step of the last record."""
        return self.first + self.steps

    @property
    def data_wait_share(self) -> float:
        """Share of the steps' time that the devices waited for data, 0 to 1."""
        return self.data_wait / self.window_seconds if self.window_seconds else 0.0

    @property
    def records(self) -> dict[str, np.ndarray]:
        """Name to one float32 value per step, measured before that step's update."""
        columns = self._rows().T
        return dict(zip(self.names, columns, strict=True))

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the values of one record, a step each: `history["loss"]`."""
        return self.records[name]

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation; without one, means of the last records."""
        if self.evaluations:
            return self.evaluations[-1][1]
        if not self.steps:
            return {}
        return {
            name: float(np.mean(values[-MEAN_OF:]))
            for name, values in self.records.items()
        }

    def append(self, rows: np.ndarray) -> None:
        """Add rows (steps, records)."""
        self._chunks.append(rows)
        self.steps += len(rows)

    def truncate(self, step: int) -> None:
        """Leave out what is later than a step, which the run went back to."""
        before = min(self.first, step)
        steps = max(0, step - self.first)
        self._chunks = [self._rows()[:steps]]
        self.first = before
        self.steps = steps
        self.evaluations = [
            (at, metrics) for at, metrics in self.evaluations if at <= step
        ]

    def _rows(self) -> np.ndarray:
        """Return all records: float32 (steps, names)."""
        if not self._chunks:
            return np.empty((0, len(self.names)), np.float32)
        self._chunks = [np.concatenate(self._chunks)]
        return self._chunks[0]

    # ---- how it shows itself ----

    def _table(self) -> list[list[str]]:
        """Return a header, and a row for each evaluation."""
        names = list(self.evaluations[0][1]) if self.evaluations else []
        table = [
            [
                "step",
                "train loss",
                *(f"test {name}" for name in names),
            ]
        ]
        for step, metrics in self.evaluations:
            train_loss = self._train_loss(step)
            values = [f"{metrics[name]:.4f}" for name in names]
            table.append([str(step), train_loss, *values])
        return table

    def _train_loss(self, step: int) -> str:
        """Return the mean training loss up to a step, or "-"."""
        stop = step - self.first
        losses = self.records["loss"][max(0, stop - MEAN_OF) : stop]
        return f"{losses.mean():.4f}" if len(losses) else "-"

    def _summary(self) -> str:
        rate = ""
        if self.seconds:
            rate = f"{self.samples / self.seconds:,.0f} samples/s"
            rate += f", waited for data {self.data_wait_share:.1%} of the steps' time"
        if self.padding is not None:
            rate += f", {self.padding:.1%} padding"
        why = f", {self.reason}" if self.reason else ""
        return f"{self.status}: {self.steps} steps in {self.seconds:.1f} s, {rate}{why}"

    def __str__(self) -> str:
        table = self._table()
        columns = zip(*table, strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines = []
        for row in table:
            pairs = zip(row, widths, strict=True)
            cells = [cell.rjust(width) for cell, width in pairs]
            lines.append("  ".join(cells))
        notices = [f"! {noticed}" for noticed in self.notices]
        return "\n".join([*lines, self._summary(), *notices])

    def _repr_html_(self) -> str:
        header, *rows = self._table()
        body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
        notices = "".join(f"<p>{html.escape(f'! {n}')}</p>" for n in self.notices)
        return (
            f"<table><tr>{_cells('th', header)}</tr>{body}</table>"
            f"<p>{html.escape(self._summary())}</p>{notices}"
        )


def _cells(
    tag: str,
    row: list[str],
) -> str:
    return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in row)
