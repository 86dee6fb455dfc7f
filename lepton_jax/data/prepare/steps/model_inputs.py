"""The last steps before a model: numbers of the types that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from lepton_jax.data.prepare.step import Outcome, Step
from lepton_jax.data.prepare.steps.columns import NUMBER, fault, listed, noted, require
from lepton_jax.errors import DataError


@dataclass(frozen=True)
class AsFloats(Step):
    """Write numbers as Float32, and missing ones as NaN, for models that take them.

    `lepton_jax.models.TabularMLP` does: a missing number has a code of its own there.

    Args:
      columns: names of columns of numbers.
    """

    columns: str | Sequence[str]

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "columns",
            listed(self.columns),
        )

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        require(self, schema, self.columns, NUMBER)
        return pl.Schema(
            {
                **schema,
                **dict.fromkeys(
                    self.columns,
                    pl.Float32(),
                ),
            }
        )

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        floats = pl.col(self.columns).cast(pl.Float32).fill_null(float("nan"))
        return Outcome(table.with_columns(floats))


@dataclass(frozen=True)
class TrimEnd(Step):
    """Cut characters off the end of words: Adult's test file writes ">50K.".

    Args:
      columns: names of columns of text.
      characters: each of them is cut off, as often as it stands there.
    """

    columns: str | Sequence[str]
    characters: str

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "columns",
            listed(self.columns),
        )
        if not self.characters:
            raise DataError(
                "there is no character to cut off",
                where="TrimEnd.characters",
                remedy='give some, such as "."',
            )

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        require(self, schema, self.columns)
        for name in self.columns:
            if schema[name] != pl.String:
                raise DataError(
                    f"the column {name!r} is {schema[name]}, but must be text",
                    where="TrimEnd",
                    remedy="leave the column out",
                )
        return pl.Schema(schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        after = {
            name: pl.col(name).str.strip_chars_end(self.characters)
            for name in self.columns
        }
        reason = f"one of {self.characters!r} cut off the end"
        faults = [
            fault(
                name,
                pl.col(name) != after[name],
                reason,
            )
            for name in after
        ]
        trimmed = [value.alias(name) for name, value in after.items()]
        return Outcome(
            table.with_columns(trimmed),
            noted(table, "changed", faults, after),
        )
