"""Several labels a row, as a zero or a one for each label that there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome, Partial, State
from lepton_jax.data.prepare.steps.columns import (
    Kind,
    dropped,
    fault,
    is_key,
    noted,
    nothing_to_learn,
    require,
)
from lepton_jax.errors import DataError

PLACES = pl.List(pl.UInt8())
COUNTS = pl.Schema(
    {
        "value": pl.String(),
        "count": pl.UInt64(),
    }
)
_UNKNOWN = "lepton.unknown"


def _is_labels(dtype: pl.DataType) -> bool:
    if isinstance(dtype, pl.List):
        return any(dtype.inner == kind for kind in _OF_LABELS)
    return is_key(dtype)


_OF_LABELS = (pl.String, pl.Int64, pl.Boolean, pl.Null)
LABELS = Kind(
    "lists of labels, or labels with a separator between them",
    _is_labels,
    "write the labels as text, or as lists of text",
)


@dataclass(frozen=True)
class Labels(Fitted):
    """Replace labels by a 1 at the place of each, else 0: List(UInt8).

    "red;round" of blue, red and round is [0, 1, 1]. Labels are in the order of their
    spelling; white space around one does not count. No label at all is all zeros. A row
    whose cell is missing is dropped, with a note; of a label that training did not see
    there is no place: the row has a note, and stays.

    Args:
      column: name of the target: lists, or text.
      separator: between the labels of a text.
    """

    column: str
    separator: str = ";"

    order_independent: ClassVar[bool] = True

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, [self.column], LABELS)
        if not self.separator:
            raise DataError(
                "the separator is empty",
                where="Labels.separator",
                remedy='give one, such as ";"',
            )
        return pl.Schema({**schema, self.column: PLACES})

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        labels = self._labels(table.collect_schema())
        values = table.select(labels.explode(empty_as_null=False).alias("value"))
        count = pl.len().alias("count")
        counts = values.drop_nulls().group_by("value").agg(count)
        return counts.cast(COUNTS).sort("value")

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        labels = pl.concat(partials).group_by("value")
        return labels.agg(pl.col("count").sum()).sort("value")

    def finish(self, partial: Partial) -> State:
        if partial.is_empty():
            raise nothing_to_learn(self, self.column, "label")
        return partial.with_row_index("code")

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        known = state["value"].to_list()
        labels = self._labels(table.collect_schema())
        unknown = labels.list.set_difference(known).list.join(", ")
        marked = table.with_columns(unknown.alias(_UNKNOWN))

        column = pl.col(self.column)
        outcome = dropped(marked, [fault(self.column, column.is_null(), "missing")])
        strange = pl.col(_UNKNOWN)
        words = pl.format("{} is no label of the training split: left out", strange)
        is_strange = strange.str.len_bytes() > 0
        shown = outcome.table.with_columns(labels.list.join(", ").alias(self.column))
        changed = noted(
            shown,
            "changed",
            [fault(self.column, is_strange, words)],
        )
        places = [labels.list.contains(value).cast(pl.UInt8) for value in known]
        coded = outcome.table.with_columns(pl.concat_list(places).alias(self.column))
        assert outcome.notes is not None
        return Outcome(
            coded.drop(_UNKNOWN),
            pl.concat([outcome.notes, changed]),
        )

    # ---- internals ----

    def _labels(self, schema: pl.Schema) -> pl.Expr:
        """Return the labels of each row, distinct and trimmed: List(String)."""
        column = pl.col(self.column)
        if isinstance(schema[self.column], pl.List):
            lists = column.cast(pl.List(pl.String))
        else:
            lists = column.cast(pl.String).str.split(self.separator)
        trimmed = lists.list.eval(pl.element().str.strip_chars())
        present = trimmed.list.eval(
            pl.element().filter(pl.element().str.len_bytes() > 0)
        )
        return present.list.unique(maintain_order=True)
