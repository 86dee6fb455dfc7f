"""Near duplicates of texts: of those that are alike, the first stays.

The rows are taken in the order of (source, row). A row is dropped if it is alike to an
earlier one that stays:

    0 "a small white cat"     stays
    1 "a small white cat!"    alike to 0: dropped, partner 0
    2 "small white cat! Oh"   alike to 1, which does not count, but not to 0: stays

So each dropped row has a partner that stays and that it is alike to, which need not be
so if all rows that are connected by likeness were one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome
from lepton_jax.data.prepare.steps.columns import require, require_choice, require_range
from lepton_jax.data.prepare.steps.dropping import (
    DROPPED,
    existing_digest,
    existing_rows,
    with_existing,
    without,
)
from lepton_jax.data.prepare.steps.minhash import (
    Sets,
    as_lists,
    band_keys,
    choose_bands,
    from_lists,
    likeness,
    shingles,
)
from lepton_jax.data.prepare.steps.text import TEXT
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError

SKETCH = pl.Schema(
    {
        "shingles": pl.List(pl.UInt32()),
        "bands": pl.List(pl.UInt64()),
    }
)
SKETCHES = pl.Schema(
    {
        SOURCE: pl.UInt32(),
        ROW: pl.UInt64(),
        **SKETCH,
    }
)


class Twin(NamedTuple):
    """An earlier row that another is alike to.

    Attributes:
      row: its number among all rows.
      likeness: of the two, 0 to 1.
    """

    row: int
    likeness: float


@dataclass(frozen=True)
class NearDuplicates(Fitted):
    """Drop rows whose text is much like that of an earlier row.

    Texts are compared by the Jaccard index of their sets of shingles, which is computed
    of each pair that MinHash proposes: no row is dropped that is less alike than
    `threshold`, and of the pairs just that much alike a share of `recall` is found.
    The note names the row that stays, and the likeness. Rows without a word are never
    dropped. The sets of all rows are held in memory while the state is found: 4 bytes
    for each distinct shingle of a row, and 8 for each band.

    On 4,000 texts of 40 words, half of them copies of the others with up to seven words
    exchanged, all 971 pairs with a likeness of 0.8 or more are found, and none else;
    with a threshold of 0.9, 99.8 % of 552. `MinHashLSH` of datasketch with 128
    permutations finds 85 % and 81 %, and 13 % and 9 % of what it finds is less alike
    (`python tests/data/prepare/figures_of_steps.py near`).

    Attributes:
      column: of text.
      threshold: least likeness of near duplicates, above 0 to 1.
      size: characters or words of a shingle.
      of: "characters", which suits every script, or "words".
      recall: share of the pairs with a likeness of `threshold` to find; of pairs that
        are more alike more are found.
      permutations: values of a signature. More give longer bands: fewer candidates.
      existing: path of an existing set with the same column: rows that are much like
        one of its rows are dropped, too. The note then gives the partner's row, and
        names the set in its reason.
    """

    column: str
    threshold: float = 0.8
    size: int = 5
    of: Literal["characters", "words"] = "characters"
    recall: float = 0.99
    permutations: int = 128
    existing: str | None = None

    serves: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True
    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        require(
            self,
            schema,
            [self.column],
            TEXT,
        )
        require_choice(self, "of", ("characters", "words"))
        require_range(self, "threshold", 0.01, 1)
        require_range(self, "recall", 0, 1 - 1e-9)
        require_range(self, "size", 1, 1000)
        require_range(self, "permutations", 1, 4096)
        self._bands()
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
        sketch = (
            pl.col(self.column)
            .cast(pl.String)
            .map_batches(
                self._sketch,
                return_dtype=pl.Struct(SKETCH),
                is_elementwise=True,
            )
            .alias("sketch")
        )
        return table.select(
            SOURCE,
            ROW,
            sketch,
        ).unnest("sketch")

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
        rows = pl.concat(
            [
                known,
                partial.sort(
                    SOURCE,
                    ROW,
                ),
            ]
        )
        twins = first_alike(
            rows,
            self.threshold,
            len(known),
        )
        dropped = rows[list(twins)].select(
            SOURCE,
            ROW,
        )
        partners = rows[[twin.row for twin in twins.values()]]
        reasons = [
            f"near duplicate: likeness {twin.likeness:.3f}" for twin in twins.values()
        ]
        state = dropped.with_columns(
            partners[SOURCE].alias("partner_source"),
            partners[ROW].alias("partner_row"),
            pl.Series(
                "reason",
                reasons,
                dtype=pl.String,
            ),
        )
        return with_existing(
            state.cast(DROPPED),
            self.existing,
        )

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        return without(table, state)

    def _bands(self) -> tuple[int, int]:
        chosen = choose_bands(
            self.threshold,
            self.recall,
            self.permutations,
        )
        if chosen is None:
            raise DataError(
                f"{self.permutations} permutations can't find {self.recall:.0%} of the"
                f" pairs with a likeness of {self.threshold:g}",
                where="NearDuplicates.permutations",
                remedy="take more permutations, a lower recall or a higher threshold",
            )
        return chosen

    def _sketch(
        self,
        text: pl.Series,
    ) -> pl.Series:
        """Return a struct of SKETCH for each text."""
        sets = shingles(
            text,
            self.size,
            self.of,
        )
        has_any = np.diff(sets.bounds) > 0
        bounds = np.concatenate([[0], sets.bounds[1:][has_any]])
        bands, length = self._bands()
        keys = band_keys(
            Sets(sets.members, bounds),
            bands,
            length,
        )
        edges = np.concatenate([[0], np.cumsum(has_any) * bands])
        columns = {
            "shingles": as_lists(sets),
            "bands": as_lists(
                Sets(
                    keys.reshape(-1),
                    edges,
                )
            ),
        }
        return pl.DataFrame(
            columns,
            schema=SKETCH,
        ).to_struct(text.name)

    def _known(self) -> pl.DataFrame:
        """Return SKETCHES of the existing set, with a null as SOURCE."""
        tables = [SKETCHES.to_frame()]
        if self.existing is not None:
            for rows in existing_rows(
                self.existing,
                [self.column],
            ):
                nameless = rows.lazy().with_columns(pl.lit(None).alias(SOURCE))
                tables.append(self.partial(nameless).collect().cast(SKETCHES))
        return pl.concat(tables)


def first_alike(
    rows: pl.DataFrame,
    threshold: float,
    always: int = 0,
    *,
    is_only_them: bool = False,
) -> dict[int, Twin]:
    """Return, for each row to drop, the most alike of the earlier rows that stay.

    Args:
      rows: SKETCHES, in their order.
      threshold: least likeness.
      always: number of leading rows that stay in any case.
      is_only_them: whether others are compared with these alone.
    """
    sets = from_lists(rows["shingles"])
    staying: dict[int, list[int]] = {}  # rows that stay, by the key of a band
    twins = {}
    for row, keys in _shared_keys(rows):
        if row >= always:
            candidates = {
                other
                for key in keys
                for other in staying.get(
                    key,
                    (),
                )
            }
            best = _most_alike(sets, row, sorted(candidates))
            if best is not None and best.likeness >= threshold:
                twins[row] = best
            if row in twins or is_only_them:
                continue
        for key in keys:
            staying.setdefault(
                key,
                [],
            ).append(row)
    return twins


# ---- internals ----


def _shared_keys(rows: pl.DataFrame) -> Iterator[tuple[int, list[int]]]:
    """Yield rows that share a band with another row, and the keys of such bands."""
    numbered = rows.select(
        pl.int_range(pl.len()).alias("row"),
        "bands",
    )
    keys = numbered.explode("bands").drop_nulls()
    shared = keys.filter(pl.col("bands").is_duplicated())
    for row, pairs in groupby(
        shared.iter_rows(),
        key=itemgetter(0),
    ):
        yield row, [key for _, key in pairs]


def _most_alike(
    sets: Sets,
    row: int,
    others: Sequence[int],
) -> Twin | None:
    """Return the first of the rows that are most alike to one."""
    best = None
    own = sets.of(row)
    for other in others:
        value = likeness(own, sets.of(other))
        if best is None or value > best.likeness:
            best = Twin(other, value)
    return best
