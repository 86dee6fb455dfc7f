"""What a cheap method is given, and what it says: samples in, a `Baseline` out.

A baseline is a function `(train, test) -> Baseline` that needs no network. The least
example answers with the most frequent class:

    def most_frequent(train: Samples, test: Samples) -> Baseline:
        counts = np.bincount(train.targets, minlength=train.classes)
        outputs = np.log(np.tile(counts / counts.sum(), (len(test), 1)))
        return Baseline("most frequent class", "counted in training", outputs)

It returns outputs in the form in which the model returns them, so that the recipe's
metrics are computed of both, on the same rows, and can be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from lepton_jax.errors import DataError

Task = Literal["classes", "binary", "quantities", "other"]


class Interval(NamedTuple):
    """A value with its 95 % confidence interval.

    Attributes:
      value: of a metric on the test rows.
      low: end of the interval.
      high: its other end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows of a data set as plain NumPy arrays on the host.

    Attributes:
      inputs: the model's inputs before `Recipe.preprocess`: an array (rows, ...), or a
        dict of them.
      targets: an array (rows, ...), or a dict of them.
      total: rows of the whole data set; `len()` of them are here.
      task: "classes": integer targets (rows,), the model gives (rows, classes) logits;
        "binary": targets 0 and 1 in the shape of the model's logits; "quantities":
        targets in the shape of the model's outputs; "other": none of these.
      classes: count of classes, for "classes"; else 0.
      read_raw: numbers of rows, or None for all, to the raw rows as a Polars table;
        None: they are not known.
    """

    inputs: Any
    targets: Any
    total: int
    task: Task = "other"
    classes: int = 0
    read_raw: Callable[[Any], Any] | None = field(
        default=None,
        repr=False,
    )

    def __len__(self) -> int:
        arrays = self.inputs
        while isinstance(arrays, Mapping):
            arrays = next(iter(arrays.values()))
        return len(arrays)

    def raw(self, rows: np.ndarray | None = None) -> Any:
        """Return the raw rows in the order of `inputs`: a `polars.DataFrame`.

        A text has its words there, a table its numbers and categories as they were
        read.

        Args:
          rows: numbers of the wanted ones; None: all.

        Raises:
          DataError: the recipe has no preparation, or its sources are gone.
        """
        if self.read_raw is None:
            raise DataError(
                "the raw rows of these samples are not known",
                where="Samples.raw",
                remedy="use `inputs`, or set Recipe.preparation and use its splits",
            )
        return self.read_raw(rows)


@dataclass(frozen=True, eq=False)
class Baseline:
    """A cheap method's result on the test rows.

    Either `outputs` is given, and the recipe's metrics are computed of it, or the
    metrics' values per row, or their values with an interval.

    Attributes:
      name: what a person calls it: "naive Bayes with bigrams".
      fitted: how it was fitted, in one sentence.
      outputs: of each test row, as the model gives them: for "classes" logits or
        log-probabilities (rows, classes), for "binary" logits in the shape of the
        targets, for "quantities" the quantities.
      values: by metric, a value for each test row whose mean is the metric: the hits of
        an accuracy, the squared errors of none.
      metrics: by metric, a value with its interval, for what is no mean over rows.
    """

    name: str
    fitted: str
    outputs: Any = None
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    metrics: Mapping[str, Interval] = field(default_factory=dict)


BaselineFunction = Callable[[Samples, Samples], Baseline]


class NotHere(Exception):
    """Reason why a baseline does not apply to these samples: an extra, a shape."""
