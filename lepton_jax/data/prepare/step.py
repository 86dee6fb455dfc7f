"""The protocol of a step.

A step is a frozen dataclass: its fields are its arguments, plain data that JSON holds.
`run` is a pure function of rows and of the step's state; it is written in Polars
expressions, and calls Python (`map_batches`) only where there is no expression.

What a step has to learn from the rows (a mean, a vocabulary, which rows are duplicates)
is its state. It is fitted piece by piece, so that it can be fitted anywhere:

    piece 0: [1, 2]  --partial-->  count 2, sum 3  \
    piece 1: [6]     --partial-->  count 1, sum 6  --merge-->  count 3, sum 9
    piece 2: []      --partial-->  count 0, sum 0  /              |
                                                                finish
                                                                  v
                                                               mean 3

Partials and states are tables: they are stored as Arrow files, and opening one runs no
code.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import polars as pl

SPLIT = "lepton.split"  # name of the split of each row, String

# What a step has learned from some of the rows, and from all of them.
Partial = pl.DataFrame
State = pl.DataFrame


class Outcome(NamedTuple):
    """Result of a step: the rows that stay, and notes on the others.

    Attributes:
      table: the rows that stay, in their order. SOURCE and ROW go with each row.
      notes: rows and cells that were dropped, changed or flagged, with the columns
        NOTES; None: the step never has any, such as one that scales each row.
    """

    table: pl.LazyFrame
    notes: pl.LazyFrame | None = None


@dataclasses.dataclass(frozen=True)
class Step(ABC):
    """A step that needs no state.

    Attributes:
      serves: whether the step is part of what happens to a raw row at prediction;
        not so what only chooses rows to train on.
      idempotent: whether it claims that, with the same state, applying it to its own
        result changes nothing.
      order_independent: whether it claims that each row's outcome depends on that row
        and the state alone, and the state on which rows there are, not on their order.
        The suite `conformance` holds a step to what it claims.
    """

    serves: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    def check(self, schema: pl.Schema) -> pl.Schema:
        """Return the columns after this step, before any row is read.

        Args:
          schema: the columns before it.

        Raises:
          DataError: a column is missing or has a type that the step can't work on; the
            message names the nearest column that there is.
        """
        frame = pl.LazyFrame(schema=schema)
        return self.run(frame, None).table.collect_schema()

    @abstractmethod
    def run(
        self,
        table: pl.LazyFrame,
        state: State | None,
    ) -> Outcome:
        """Apply the step.

        Args:
          table: rows of one piece, or raw rows at prediction.
          state: the fitted state; None for a step without.
        """

    def to_json(self) -> dict[str, Any]:
        """Return the step as plain data: its class's name and its arguments."""
        return {
            "step": type(self).__name__,
            **dataclasses.asdict(self),
        }


@dataclasses.dataclass(frozen=True)
class Fitted(Step):
    """A step with a state that is fitted on rows before it is applied.

    Attributes:
      fits_on: "train": the rows of the training split alone, as every statistic does;
        "all": all rows, for what chooses rows, such as a search for duplicates.
    """

    fits_on: ClassVar[Literal["train", "all"]] = "train"

    def writes(self) -> Collection[str] | None:
        """Return the columns that the step adds or changes; None: it may drop rows.

        Where the columns are known, what stands behind the step and reads others can be
        fitted in the same pass. None, which says nothing, is always right.
        """
        return None

    @abstractmethod
    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        """Return the partial state of some rows, possibly of none."""

    @abstractmethod
    def merge(self, partials: Sequence[Partial]) -> Partial:
        """Return the partial state of the rows of several partials, in their order.

        Merging in any grouping gives the same state: exactly for counts and sets, up to
        1e-12 relatively for sums.
        """

    @abstractmethod
    def finish(self, partial: Partial) -> State:
        """Return the state.

        Raises:
          DataError: there is no row, or no value, to learn it from.
        """
