"""Exact duplicates: the first of equal rows stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome
from lepton_jax.data.prepare.steps.columns import listed, require
from lepton_jax.data.prepare.steps.content import HASH, content_hash, hash_expression
from lepton_jax.data.prepare.steps.dropping import (
    DROPPED,
    existing_digest,
    existing_rows,
    with_existing,
    without,
)
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError

HASHES = list(HASH)


@dataclass(frozen=True)
class Duplicates(Fitted):
    """Drop rows that equal an earlier row in some columns.

    Of equal rows the first by (source, row) stays, whatever the order in which they are
    read; the note of each other names it. Rows are compared by a hash of 124 bits; see
    `lepton_jax.data.prepare.steps.content`. A missing cell equals a missing cell.

    Attributes:
      columns: what is compared; None: all columns.
      existing: path of an existing set, such as a test set that is published: rows that
        equal one of its rows are dropped, too. The note then gives the partner's row,
        and names the set in its reason.
    """

    columns: Sequence[str] | None = None
    existing: str | None = None

    serves: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True
    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def __post_init__(self) -> None:
        if self.columns is not None:
            object.__setattr__(
                self,
                "columns",
                listed(self.columns),
            )

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        require(self, schema, self.columns or ())
        if self.existing is not None and self.columns is None:
            raise DataError(
                f"columns are not named that are compared with {self.existing}",
                where="Duplicates.columns",
                remedy="name those that the rows and the existing set both have",
            )
        return schema

    def to_json(self) -> dict[str, Any]:
        data = super().to_json()
        if self.existing is not None:
            data["existing_digest"] = existing_digest(self.existing)
        return data

    def partial(
        self,
        table: pl.LazyFrame,
    ) -> pl.LazyFrame:
        columns = self._compared(table.collect_schema().names())
        hashes = hash_expression(columns)
        return table.select(
            SOURCE,
            ROW,
            hashes,
        ).unnest("hash")

    def merge(
        self,
        partials: Sequence[pl.DataFrame],
    ) -> pl.DataFrame:
        return pl.concat(partials)

    def finish(
        self,
        partial: pl.DataFrame,
    ) -> pl.DataFrame:
        known = self._known()
        low = pl.concat([partial["hash_low"], known["hash_low"]])
        # Few rows remain after this, which looks at one column of the hash alone.
        twice = low.is_duplicated()
        rows = partial.filter(twice.head(len(partial)))
        known = known.filter(twice.tail(len(known)))
        # A row of the existing set has no source, and is before all others.
        every = pl.concat([known, _in_order(rows)])
        first = every.unique(HASHES, keep="first", maintain_order=True)
        partners = first.select(
            *HASHES,
            pl.col(SOURCE).alias("partner_source"),
            pl.col(ROW).alias("partner_row"),
            pl.lit("duplicate").alias("reason"),
        )
        equal = every.join(partners, on=HASHES, maintain_order="left")
        is_own = pl.col(ROW) == pl.col("partner_row")
        is_own &= pl.col(SOURCE).eq_missing(pl.col("partner_source"))
        is_given = pl.col(SOURCE).is_not_null()
        later = equal.filter(is_given & ~is_own)
        dropped = later.select(list(DROPPED)).cast(DROPPED)
        return _in_order(with_existing(dropped, self.existing))

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        return without(table, state)

    def _compared(
        self,
        names: Sequence[str],
    ) -> list[str]:
        if self.columns is not None:
            return list(self.columns)
        return [name for name in names if name not in (SOURCE, ROW)]

    def _known(self) -> pl.DataFrame:
        """Return the hashes of the existing set, with a null as SOURCE."""
        schema = pl.Schema(
            {
                SOURCE: pl.UInt32(),
                ROW: pl.UInt64(),
                **HASH,
            }
        )
        tables = [schema.to_frame()]
        if self.existing is not None:
            columns = list(self.columns or ())
            for rows in existing_rows(self.existing, columns):
                hashes = content_hash(rows.select(columns))
                table = hashes.with_columns(
                    rows[ROW],
                    pl.lit(None).alias(SOURCE),
                )
                table = table.select(schema.names())
                tables.append(table.cast(schema))
        return pl.concat(tables)


# ---- internals ----


def _in_order(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.sort(SOURCE, ROW)
