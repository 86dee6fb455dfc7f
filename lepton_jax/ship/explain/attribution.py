"""An attribution: what each entry of the inputs adds to an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Attribution:
    """Shares of the inputs in an output, row by row.

    Attributes:
      method: by which they were found.
      values: for each input, of the shape of its rows; of ids, a number for each.
      target: of each row, the number of the output that is explained.
      outputs: it, (rows,).
      baseline: it where nothing is there, (rows,).
      names: of the columns of an input, by its name; of some.
      steps: points at which the model was asked for each row.
    """

    method: str
    values: dict[str, np.ndarray]
    target: np.ndarray
    outputs: np.ndarray
    baseline: np.ndarray
    names: dict[str, tuple[str, ...]]
    steps: int

    @property
    def total(self) -> np.ndarray:
        """Sum of each row's shares, (rows,)."""
        return total_of(self.values)

    @property
    def gap(self) -> np.ndarray:
        """Distance of the sum of shares from the change of the output, (rows,)."""
        return np.abs(self.total - (self.outputs - self.baseline))

    def to_fields(self) -> dict[str, Any]:
        """Return it as plain data: lists of numbers, by row."""
        return {
            "method": self.method,
            "target": self.target.tolist(),
            "output": self.outputs.tolist(),
            "baseline": self.baseline.tolist(),
            "attributions": {name: x.tolist() for name, x in self.values.items()},
            "columns": {name: list(own) for name, own in self.names.items()},
        }

    def ranked(
        self,
        row: int,
        most: int = 10,
    ) -> list[tuple[str, float]]:
        """Return the entries with the largest shares of a row, named.

        Args:
          row: its number.
          most: entries.
        """
        entries = []
        for name, values in self.values.items():
            own = values[row].reshape(-1)
            columns = self.names.get(name)
            for at, share in enumerate(own):
                label = columns[at] if columns else f"{name}[{at}]"
                entries.append((label, float(share)))
        entries.sort(key=lambda entry: -abs(entry[1]))
        return entries[:most]


def total_of(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the sum of each row's shares over all inputs, (rows,)."""
    rows = [array.reshape(len(array), -1) for array in values.values()]
    return np.sum([array.sum(axis=1) for array in rows], axis=0)
