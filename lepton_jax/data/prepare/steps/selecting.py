"""Choosing, renaming and computing columns, and filtering rows.

At prediction a column that only training has, such as a weight, is absent: Select, Drop
and Rename then do without it. What must be there is checked before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from lepton_jax.data.prepare.step import SPLIT, Outcome, Step
from lepton_jax.data.prepare.steps.columns import (
    dropped,
    fault,
    list_columns,
    listed,
    require,
    require_free,
)
from lepton_jax.data.prepare.steps.expressions import Expression
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError

KEPT = (SOURCE, ROW, SPLIT)  # columns that no selection drops


@dataclass(frozen=True)
class Select(Step):
    """Keep these columns alone, in this order.

    Args:
      columns: their names.
    """

    columns: str | Sequence[str]

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns)
        names = self._kept(schema.names())
        return pl.Schema({name: schema[name] for name in names})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        names = table.collect_schema().names()
        return Outcome(table.select(self._kept(names)))

    def _kept(self, names: Sequence[str]) -> list[str]:
        inner = [name for name in names if name in KEPT and name not in self.columns]
        chosen = [name for name in self.columns if name in names]
        return [*inner, *chosen]


@dataclass(frozen=True)
class Drop(Step):
    """Leave columns out.

    Args:
      columns: their names.
    """

    columns: str | Sequence[str]

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        _check_inner("Drop", self.columns)

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns)
        kept = {
            name: dtype for name, dtype in schema.items() if name not in self.columns
        }
        return pl.Schema(kept)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        return Outcome(
            table.drop(
                self.columns,
                strict=False,
            )
        )


@dataclass(frozen=True)
class Rename(Step):
    """Give columns other names.

    Args:
      names: the new name of each old one.
    """

    names: Mapping[str, str]

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        listed(self.names, "names")
        listed(self.names.values(), "names")
        _check_inner(
            "Rename",
            [*self.names, *self.names.values()],
        )

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.names)
        rest = {name: dtype for name, dtype in schema.items() if name not in self.names}
        require_free(self, rest, self.names.values())
        return pl.Schema(
            {
                self.names.get(
                    name,
                    name,
                ): dtype
                for name, dtype in schema.items()
            }
        )

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        return Outcome(
            table.rename(
                dict(self.names),
                strict=False,
            )
        )


@dataclass(frozen=True)
class Filter(Step):
    """Keep the rows for which a condition is true; not at prediction.

    A row for which it is null, since a cell is missing, is dropped, too.

    Args:
      condition: an expression, such as 'age >= 18 and sex in ("f", "m")'; what there
        is to write: `lepton_jax.data.prepare.steps.expressions`.
    """

    condition: str

    serves: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Expression(self, self.condition)

    def check(self, schema: pl.Schema) -> pl.Schema:
        dtype = Expression(
            self,
            self.condition,
        ).type_on(schema)
        if dtype != pl.Boolean:
            raise DataError(
                f"the condition {self.condition} is not true or false, but {dtype}",
                where="Filter",
                remedy="compare it with something, such as: age >= 18",
            )
        return pl.Schema(schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        expression = Expression(self, self.condition)
        value = expression.on(table.collect_schema())
        columns = expression.columns
        column = columns[0] if len(columns) == 1 else ""
        unknown = f"not known, as a cell is missing: {self.condition}"
        untrue = f"not so: {self.condition}"
        when_unknown = pl.when(value.is_null()).then(pl.lit(unknown))
        reason = when_unknown.otherwise(pl.lit(untrue))
        return dropped(
            table,
            [
                fault(
                    column,
                    ~value.fill_null(False),
                    reason,
                )
            ],
        )


@dataclass(frozen=True)
class Derive(Step):
    """Compute a column from others of the same row.

    Args:
      column: its name; one that is there is replaced.
      expression: such as 'log(1 + fare)'; see Filter.
    """

    column: str
    expression: str

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_inner("Derive", [self.column], but=SPLIT)
        Expression(self, self.expression)

    def check(self, schema: pl.Schema) -> pl.Schema:
        dtype = Expression(
            self,
            self.expression,
        ).type_on(schema)
        return pl.Schema({**schema, self.column: dtype})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        expression = Expression(self, self.expression)
        value = expression.on(table.collect_schema()).alias(self.column)
        return Outcome(table.with_columns(value))


# ---- internals ----


def _check_inner(
    step: str,
    names: Sequence[str],
    but: str = "",
) -> None:
    for name in names:
        if name in KEPT and name != but:
            raise DataError(
                f"{name!r} goes with each row",
                where=step,
                remedy="name other columns",
            )
