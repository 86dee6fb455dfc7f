"""Text as the numbers of its characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome
from lepton_jax.data.prepare.steps.columns import require
from lepton_jax.errors import DataError

TOKENS = pl.List(pl.Int32())
CODES = pl.Schema({"code": pl.UInt32()})  # code points, ascending


@dataclass(frozen=True)
class CharacterTokens(Fitted):
    """Replace text by the numbers of its characters, lists of Int32.

    They are numbered from 0 in the order of their code points: in "abca", a is 0, b is
    1 and c is 2. All rows are looked at: which characters there are is no statistic. At
    prediction, another character is an error: there is no number for it.

    Args:
      column: name of a column of text.
    """

    column: str

    order_independent: ClassVar[bool] = True
    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        require(self, schema, [self.column])
        if schema[self.column] != pl.String:
            raise DataError(
                f"the column {self.column!r} is {schema[self.column]}, not text",
                where="CharacterTokens",
                remedy="name a column of text",
            )
        return pl.Schema({**schema, self.column: TOKENS})

    def partial(
        self,
        table: pl.LazyFrame,
    ) -> pl.LazyFrame:
        texts = table.select(self.column).collect(
            engine="in-memory",
        )[self.column]
        codes = np.unique(_codes("".join(texts.drop_nulls())))
        return pl.LazyFrame(
            {"code": codes},
            schema=CODES,
        )

    def merge(
        self,
        partials: Sequence[pl.DataFrame],
    ) -> pl.DataFrame:
        return pl.concat(partials).unique().sort("code")

    def finish(
        self,
        partial: pl.DataFrame,
    ) -> pl.DataFrame:
        if partial.is_empty():
            raise DataError(
                f"the column {self.column!r} has no text",
                where="CharacterTokens",
                remedy="give a text that is not empty",
            )
        return partial

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        known = state["code"].to_numpy()
        column = pl.col(self.column).map_batches(
            partial(_tokens, known=known),
            return_dtype=TOKENS,
            is_elementwise=True,
        )
        return Outcome(table.with_columns(column))


# ---- internals ----


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(
        text.encode("utf-32-le", "surrogatepass"),
        np.uint32,
    )


def _tokens(
    texts: pl.Series,
    known: np.ndarray,
) -> pl.Series:
    """Return the numbers of each text's characters; null for a missing text."""
    rows = [
        None
        if text is None
        else _numbers(
            text,
            known,
        )
        for text in texts
    ]
    return pl.Series(
        texts.name,
        rows,
        dtype=TOKENS,
    )


def _numbers(
    text: str,
    known: np.ndarray,
) -> pl.Series:
    codes = _codes(text)
    numbers = np.searchsorted(known, codes).clip(
        max=len(known) - 1,
    )
    strange = np.flatnonzero(known[numbers] != codes)
    if len(strange):
        raise DataError(
            f"{chr(codes[strange[0]])!r} is no character of the training text",
            where=f"character {strange[0]}",
            remedy="leave it out, or replace it by one that is",
        )
    return pl.Series(numbers, dtype=pl.Int32)
