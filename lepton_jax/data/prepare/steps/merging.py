"""Joining of another source by a key, and mixing of sources by weight.

The union of sources needs no step: `Preparation` makes it, and checks their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl

from lepton_jax.data import readers
from lepton_jax.data.prepare.step import Fitted, Outcome
from lepton_jax.data.prepare.steps.columns import (
    KEY,
    dropped,
    fault,
    listed,
    noted,
    require,
    require_choice,
    require_free,
)
from lepton_jax.data.prepare.steps.content import hash_expression
from lepton_jax.data.prepare.steps.dropping import existing_digest, existing_rows
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError, nearest

RANGE = 2**62  # the hashes of rows are below
KEPT = 4  # digits of a share in a reason
_MATCHED = "lepton.matched"
_SHARE = "lepton.share"
_LIMIT = "lepton.limit"


@dataclass(frozen=True)
class Join(Fitted):
    """Add the columns of another source by a key.

    The other source is part of the fitted state, and so goes with the model; it has to
    fit into memory. Each of its keys must be there once, so that no row becomes two.
    A row whose key it lacks, or is missing, has a note.

    Attributes:
      other: path of the other source.
      on: columns of the key, which both have.
      columns: what is added; None: all of the other's columns but the key.
      how: "left" keeps a row without match, with missing values; "inner" drops it.
      expect: "one-to-one": each key must be once among the rows, too; "many-to-one".
    """

    other: str
    on: Sequence[str]
    columns: Sequence[str] | None = None
    how: Literal["left", "inner"] = "left"
    expect: Literal["many-to-one", "one-to-one"] = "many-to-one"

    order_independent: ClassVar[bool] = True
    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "on",
            listed(self.on, "on"),
        )
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
        require_choice(self, "how", ("left", "inner"))
        require_choice(self, "expect", ("many-to-one", "one-to-one"))
        keys = self.on
        require(self, schema, keys, KEY)
        there = self._others_schema()
        for name in (*keys, *(self.columns or ())):
            if name not in there:
                raise DataError(
                    f"the other source has no column {name!r}{nearest(name, there)}",
                    where=f"Join({self.other!r})",
                    remedy=f"its columns are: {', '.join(there)}",
                )
        for name in keys:
            if not _are_comparable(
                schema[name],
                there[name],
            ):
                raise DataError(
                    f"the key {name!r} is {schema[name]} here and {there[name]} in the"
                    " other source",
                    where=f"Join({self.other!r})",
                    remedy="read both with one type, or cast it with CheckSchema",
                )
        added = self._added(list(there))
        require_free(self, schema, added)
        return pl.Schema({**schema, **{name: there[name] for name in added}})

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "other_digest": existing_digest(self.other)}

    def partial(
        self,
        table: pl.LazyFrame,
    ) -> pl.LazyFrame:
        keys = self.on
        if self.expect == "one-to-one":
            return table.select(*keys, SOURCE, ROW)
        return table.select(keys).unique().sort(keys)

    def merge(
        self,
        partials: Sequence[pl.DataFrame],
    ) -> pl.DataFrame:
        rows = pl.concat(partials)
        if self.expect == "one-to-one":
            return rows
        keys = self.on
        return rows.unique().sort(keys)

    def finish(
        self,
        partial: pl.DataFrame,
    ) -> pl.DataFrame:
        """Return the other source, with "lepton.matched": whether a row has its key."""
        keys = self.on
        names = self._added(list(self._others_schema()))
        other = pl.concat(
            existing_rows(
                self.other,
                [*keys, *names],
            )
        )
        places = pl.col(ROW).cast(pl.String)
        _check_once(
            other.with_columns(places.alias("place")),
            keys,
            self.other,
        )
        if self.expect == "one-to-one":
            places = pl.format("{}:{}", SOURCE, ROW)
            ordered = partial.sort(
                SOURCE,
                ROW,
            ).with_columns(places.alias("place"))
            _check_once(ordered, keys, "the rows")
        typed = other.drop(ROW).cast(
            {name: partial.schema[name] for name in keys},
        )
        seen = partial.select(keys).unique()
        seen = seen.with_columns(pl.lit(True).alias(_MATCHED))
        matched = typed.join(
            seen,
            on=keys,
            how="left",
            maintain_order="left",
        )
        return matched.with_columns(pl.col(_MATCHED).fill_null(False))

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        keys = self.on
        other = state.lazy().with_columns(pl.lit(True).alias(_MATCHED))
        joined = table.join(
            other,
            on=keys,
            how="left",
            maintain_order="left",
        )
        alone = fault(
            keys[0],
            pl.col(_MATCHED).is_null(),
            f"no row of {self.other} has this key",
        )
        if self.how == "inner":
            outcome = dropped(joined, [alone])
            return Outcome(
                outcome.table.drop(_MATCHED),
                outcome.notes,
            )
        return Outcome(
            joined.drop(_MATCHED),
            noted(joined, "flagged", [alone]),
        )

    def _others_schema(self) -> dict[str, pl.DataType]:
        reader = readers.reader_of(self.other)
        return {column.name: column.type for column in reader.columns()}

    def _added(
        self,
        names: Sequence[str],
    ) -> list[str]:
        """Return the columns that are added."""
        if self.columns is not None:
            return list(self.columns)
        keys = self.on
        return [name for name in names if name not in keys]


@dataclass(frozen=True)
class Mixture(Fitted):
    """Drop rows so that the sources are there in some proportion.

    No row is there twice: as many rows stay as the scarcest source allows, measured by
    its weight. Which ones stay is decided by a hash of (source, row), so that a row
    that stays also does when others are added, and is the same on every machine; the
    numbers are as of independent draws. To repeat the rows of a small source instead,
    give the weights to the feed.

    Attributes:
      weights: of the sources, in their order in the preparation; above 0, or 0 for a
        source that is dropped.
      seed: of the hash.
    """

    weights: Sequence[float]
    seed: int = 0

    serves: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True
    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "weights",
            tuple(self.weights),
        )

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        weights = list(self.weights)
        if not weights or min(weights) < 0 or max(weights) == 0:
            raise DataError(
                f"weights are {weights}",
                where="Mixture.weights",
                remedy="give a number for each source, none below 0, one above 0",
            )
        return schema

    def partial(
        self,
        table: pl.LazyFrame,
    ) -> pl.LazyFrame:
        count = pl.len().cast(pl.UInt64).alias("count")
        return table.group_by(SOURCE).agg(count)

    def merge(
        self,
        partials: Sequence[pl.DataFrame],
    ) -> pl.DataFrame:
        sources = pl.concat(partials).group_by(SOURCE)
        counts = sources.agg(pl.col("count").sum())
        return counts.sort(SOURCE)

    def finish(
        self,
        partial: pl.DataFrame,
    ) -> pl.DataFrame:
        counts = dict(partial.iter_rows())
        weights = dict(enumerate(self.weights))
        for source in sorted({*counts, *weights}):
            self._check_source(source, counts, weights)
        wanted = {source: weight for source, weight in weights.items() if weight > 0}
        total = min(counts[source] / weight for source, weight in wanted.items())
        shares = {
            source: min(
                weights[source] * total / counts[source],
                1.0,
            )
            for source in counts
        }
        return pl.DataFrame(
            {
                SOURCE: list(shares),
                _SHARE: list(shares.values()),
                _LIMIT: [int(share * RANGE) for share in shares.values()],
            },
            schema={
                SOURCE: pl.UInt32(),
                _SHARE: pl.Float64(),
                _LIMIT: pl.UInt64(),
            },
        )

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        number = pl.lit(self.seed).alias("seed")
        place = hash_expression([SOURCE, ROW, number]).struct.field("hash_low")
        known = table.join(
            state.lazy(),
            on=SOURCE,
            how="left",
            maintain_order="left",
        )
        share = pl.col(_SHARE).round(KEPT)
        reason = pl.format("mixture: {} of the source's rows stay", share)
        outcome = dropped(
            known,
            [
                fault(
                    "",
                    place >= pl.col(_LIMIT),
                    reason,
                )
            ],
        )
        return Outcome(
            outcome.table.drop(_SHARE, _LIMIT),
            outcome.notes,
        )

    def _check_source(
        self,
        source: int,
        counts: dict[int, int],
        weights: dict[int, float],
    ) -> None:
        """Raise DataError if a source has no weight, or a weight no row."""
        if source not in weights:
            raise DataError(
                f"source {source} has no weight: there are {len(weights)}",
                where="Mixture.weights",
                remedy="give a weight for each source, in their order",
            )
        if weights[source] > 0 and not counts.get(source):
            raise DataError(
                f"source {source} has the weight {weights[source]:g}, but no rows",
                where="Mixture.weights",
                remedy="give it the weight 0, or look why its rows were dropped",
            )


# ---- internals ----


def _are_comparable(
    one: pl.DataType,
    other: pl.DataType,
) -> bool:
    """Whether two types of keys have the same values."""
    return one == other or (one.is_integer() and other.is_integer())


def _check_once(
    rows: pl.DataFrame,
    keys: Sequence[str],
    whose: str,
) -> None:
    """Raise DataError if a key is there twice; missing keys do not count."""
    known = rows.drop_nulls(list(keys))
    is_twice = known.select(keys).is_duplicated()
    if not is_twice.any():
        return
    twice = known.filter(is_twice)
    first = twice.row(0, named=True)
    is_same = [pl.col(name) == first[name] for name in keys]
    same = twice.filter(pl.all_horizontal(is_same))
    places = " and ".join(same["place"].head(2))
    key = ", ".join(f"{name} = {first[name]!r}" for name in keys)
    raise DataError(
        f"a key is there more than once: {key}, and {twice.height} rows have such keys",
        where=f"{whose}, rows {places}",
        remedy="put Duplicates before it, name more columns in `on`, or"
        " expect 'many-to-one' if only the other source's keys are single",
    )
