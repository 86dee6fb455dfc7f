"""What a fit leaves in memory: every step's record, every evaluation."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class History:
    """The record of one `fit`.

    Attributes:
      first: the step before the first of the records.
      names: of the values that each step records.
      evaluations: (step, metrics) of each evaluation.
      status: "finished", "interrupted", "diverged" or "failed".
      reason: why it ended before its last step, if a policy or a person stopped it.
      seconds: wall time of the fit, compilations included.
      samples: consumed in training.
      data_wait: seconds that the loop waited for data.
      compilations: of the train step.
      steps: trained.
      folder: the run folder, if there is one.
    """

    first: int = 0
    names: list[str] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    status: str = "finished"
    reason: str | None = None
    seconds: float = 0.0
    samples: int = 0
    data_wait: float = 0.0
    compilations: int = 0
    folder: Path | None = None
    steps: int = 0
    _chunks: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def last(self) -> int:
        """The step of the last record."""
        return self.first + self.steps

    @property
    def records(self) -> dict[str, np.ndarray]:
        """Name to one float32 value per step, measured before that step's update."""
        self._chunks = (
            [np.concatenate(self._chunks)]
            if self._chunks
            else [np.empty((0, len(self.names)), np.float32)]
        )
        return dict(
            zip(
                self.names,
                self._chunks[0].T,
                strict=True,
            )
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """One record's values, a step each: `history["loss"]`."""
        return self.records[name]

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation; without one, the means of the last records."""
        if self.evaluations:
            return self.evaluations[-1][1]
        return {
            name: float(np.mean(values[-10:]))
            for name, values in self.records.items()
            if len(values)
        }

    def append(self, rows: np.ndarray) -> None:
        """Add rows (steps, records)."""
        self._chunks.append(rows)
        self.steps += len(rows)

    def truncate(self, step: int) -> None:
        """Leave out what is later than a step, which the run went back to."""
        self.first, kept = min(self.first, step), max(0, step - self.first)
        self._chunks = [np.stack(list(self.records.values()), 1)[:kept]]
        self.steps = kept
        self.evaluations = [
            (at, metrics) for at, metrics in self.evaluations if at <= step
        ]

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        names = list(self.evaluations[0][1]) if self.evaluations else []
        rows = []
        losses = self.records["loss"]
        for step, metrics in self.evaluations:
            trained = losses[max(0, step - self.first - 10) : step - self.first]
            train = f"{trained.mean():.4f}" if len(trained) else "-"
            rows.append(
                [
                    str(step),
                    train,
                    *(f"{metrics[name]:.4f}" for name in names),
                ]
            )
        return ["step", "train loss", *(f"test {name}" for name in names)], rows

    def __str__(self) -> str:
        header, rows = self._rows()
        widths = [
            max(len(row[i]) for row in [header, *rows]) for i in range(len(header))
        ]
        lines = [
            "  ".join(
                cell.rjust(width) for cell, width in zip(row, widths, strict=True)
            )
            for row in [header, *rows]
        ]
        rate = f"{self.samples / self.seconds:,.0f} samples/s" if self.seconds else ""
        why = f", {self.reason}" if self.reason else ""
        return "\n".join(
            [
                *lines,
                (
                    f"{self.status}: {self.steps} steps in {self.seconds:.1f} s,"
                    f" {rate}{why}"
                ),
            ]
        )

    def _repr_html_(self) -> str:
        header, rows = self._rows()
        cell = lambda tag, row: "".join(
            f"<{tag}>{html.escape(value)}</{tag}>" for value in row
        )
        body = "".join(f"<tr>{cell('td', row)}</tr>" for row in rows)
        return (
            f"<table><tr>{cell('th', header)}</tr>{body}</table>"
            f"<p>{html.escape(str(self).splitlines()[-1])}</p>"
        )
