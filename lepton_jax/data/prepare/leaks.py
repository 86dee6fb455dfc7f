"""Alarms for what one split knows of another, and inputs of the target."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal, NamedTuple

import polars as pl

from lepton_jax.data.prepare.dependence import (
    BINS,
    TARGET_BINS,
    codes_of,
    share_of_target,
)
from lepton_jax.data.prepare.step import SPLIT, Fitted, Outcome
from lepton_jax.data.prepare.steps.columns import listed, require
from lepton_jax.data.prepare.steps.content import HASH, hash_expression
from lepton_jax.data.prepare.steps.near_duplicates import NearDuplicates, first_alike
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError, nearest

KINDS = ("duplicates", "near_duplicates", "groups", "time", "target")
EXAMPLES = 5  # of an alarm (assumption: more is not read)
# Rows of the training split on which the target's dependence is measured. Assumption:
# with 32 bins and ten classes each cell has about 60.
SAMPLE = 20_000
LEAST_SHARE = 0.9  # of the target's entropy that is an alarm (assumption)
LONGEST = 100  # characters of a text that are looked at as a value (assumption)
HASHES = list(HASH)
TRAIN = "train"
_IN = "in.other"  # suffix of columns of the row on the other side


@dataclass(frozen=True)
class Leak:
    """An alarm.

    Attributes:
      kind: one of KINDS.
      what: what is wrong, a sentence without a full stop.
      column: whose fault it is; "": of whole rows.
      count: rows, groups or values concerned.
      share: of the rows of the later split; of "target", of the target's entropy.
      examples: up to five, as "SOURCE:ROW", or "SOURCE:ROW and SOURCE:ROW".
    """

    kind: str
    what: str
    column: str
    count: int
    share: float
    examples: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the alarm as plain data."""
        return dataclasses.asdict(self)


FOUND = pl.Schema(
    {
        "kind": pl.String(),
        "what": pl.String(),
        "column": pl.String(),
        "count": pl.Int64(),
        "share": pl.Float64(),
        "examples": pl.List(pl.String()),
    }
)


@dataclass(frozen=True)
class Leaks(Fitted):
    """Look for what the splits know of each other; the rows stay as they are.

    Put it behind the step that splits and, for "target", where the columns are as they
    come. What is found is the step's state; `leaks_of(state)` gives it as a list:

      duplicates: rows of one split that equal a row of another in the inputs.
      near_duplicates: rows whose text in `near` is much like that of another split.
      groups: values of `group` that are in two splits.
      time: rows of the training split that are not before all of another split.
      target: inputs that give away 0.9 of the target's entropy or more, beyond what
        chance would, on a sample of 20,000 rows of the training split, the same in any
        order; numbers are binned. Columns with a value of their own in nearly each row
        can't be judged, and are left out.

    Attributes:
      target: the column to predict; None: "target" is not looked at.
      inputs: columns that make rows equal; None: all but the target.
      near: column of text; None: near duplicates are not looked for.
      threshold: least likeness of near duplicates; see `NearDuplicates`.
      group: column that must not be in two splits with one value, such as a patient.
      time: column by which the training split must be before the others.
      error: kinds that are an error.
    """

    target: str | None = None
    inputs: Sequence[str] | None = None
    near: str | None = None
    threshold: float = 0.8
    group: str | None = None
    time: str | None = None
    error: Sequence[str] = ()

    serves: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True
    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def __post_init__(self) -> None:
        if self.inputs is not None:
            object.__setattr__(
                self,
                "inputs",
                listed(self.inputs, "inputs"),
            )
        kinds = (
            listed(
                self.error,
                "error",
            )
            if self.error
            else ()
        )
        object.__setattr__(self, "error", kinds)

    def writes(self) -> tuple[str, ...]:
        """Return the columns that the step changes: none."""
        return ()

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        if SPLIT not in schema:
            raise DataError(
                f"there are no splits to compare: no column {SPLIT!r}",
                where="Leaks",
                remedy="put Leaks behind the step that splits the rows",
            )
        named = (self.target, self.group, self.time)
        require(
            self,
            schema,
            [name for name in named if name is not None],
        )
        if self.inputs is not None:
            require(self, schema, self.inputs)
        if self.near is not None:
            self._sketching().check(schema)
        for kind in self.error:
            if kind not in KINDS:
                raise DataError(
                    f"{kind!r} is no kind of leak{nearest(kind, KINDS)}",
                    where="Leaks.error",
                    remedy=f"use some of {', '.join(KINDS)}",
                )
        return schema

    def partial(
        self,
        table: pl.LazyFrame,
    ) -> pl.LazyFrame:
        schema = table.collect_schema()
        columns = [
            pl.col(SOURCE),
            pl.col(ROW),
            pl.col(SPLIT),
            hash_expression(self._inputs(schema)).struct.unnest(),
        ]
        if self.group is not None:
            group = hash_expression([self.group]).struct.field("hash_low")
            is_there = pl.col(self.group).is_not_null()
            columns.append(pl.when(is_there).then(group).alias("group"))
        if self.time is not None:
            time = pl.col(self.time).to_physical().cast(pl.Float64)
            columns.append(time.alias("time"))
        rows = table.select(columns)
        keys = [SOURCE, ROW]
        if self.near is not None:
            sketches = self._sketching().partial(table)
            rows = _beside(rows, sketches, keys)
        if self.target is not None:
            rows = _beside(
                rows,
                self._sampled(table, schema),
                keys,
            )
        return rows

    def merge(
        self,
        partials: Sequence[pl.DataFrame],
    ) -> pl.DataFrame:
        rows = pl.concat(partials)
        if "order" not in rows.columns:
            return rows
        # The rows of the lowest hashes of all are the lowest of each part, too.
        least = rows["order"].drop_nulls().bottom_k(SAMPLE)
        if len(least) < SAMPLE:
            return rows
        is_sampled = pl.col("order") <= least.max()
        return rows.with_columns(
            pl.when(is_sampled).then(name).alias(name) for name in ("order", "cells")
        )

    def finish(
        self,
        partial: pl.DataFrame,
    ) -> pl.DataFrame:
        rows = partial.sort(SOURCE, ROW)
        found = list(self._found(rows))
        wrong = [leak for leak in found if leak.kind in self.error]
        if wrong:
            raise _error(wrong)
        return pl.DataFrame(
            [leak.to_json() for leak in found],
            schema=FOUND,
        )

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        return Outcome(table)

    def _inputs(
        self,
        schema: pl.Schema,
    ) -> list[str]:
        if self.inputs is not None:
            return list(self.inputs)
        own = (SOURCE, ROW, SPLIT, self.target)
        return [name for name in schema if name not in own]

    def _sketching(self) -> NearDuplicates:
        assert self.near is not None
        return NearDuplicates(self.near, self.threshold)

    def _sampled(
        self,
        table: pl.LazyFrame,
        schema: pl.Schema,
    ) -> pl.LazyFrame:
        """Return SOURCE, ROW, "order" and "cells" (JSON) of a sample of training."""
        assert self.target is not None
        names = dict.fromkeys([*self._inputs(schema), self.target])
        cells = [
            _cell(
                name,
                schema[name],
            )
            for name in names
            if _is_value(schema[name])
        ]
        order = hash_expression([SOURCE, ROW]).struct.field("hash_low")
        return (
            table.filter(pl.col(SPLIT) == TRAIN)
            .with_columns(order.alias("order"))
            .bottom_k(SAMPLE, by="order")
            .select(
                SOURCE,
                ROW,
                "order",
                pl.struct(cells).struct.json_encode().alias("cells"),
            )
        )

    def _found(
        self,
        rows: pl.DataFrame,
    ) -> Iterator[Leak]:
        splits = rows.partition_by(
            SPLIT,
            as_dict=True,
            maintain_order=True,
        )
        names = [name for (name,) in splits if name is not None]
        names.sort(key=lambda name: (name != TRAIN, name))
        for first, later in combinations(names, 2):
            pair = Pair(
                first,
                later,
                splits[(first,)],
                splits[(later,)],
            )
            yield from _duplicates(pair)
            if self.near is not None:
                yield from _near_duplicates(
                    pair,
                    self.near,
                    self.threshold,
                )
            if self.group is not None:
                yield from _groups(pair, self.group)
            if self.time is not None and first == TRAIN:
                yield from _time(pair, self.time)
        if self.target is not None:
            yield from _target(rows, self.target)


class Pair(NamedTuple):
    """Two splits, of which the training split is the first, if it is one of them."""

    first_name: str
    later_name: str
    first: pl.DataFrame
    later: pl.DataFrame

    @property
    def names(self) -> str:
        """The names, for messages."""
        return f"{self.first_name!r} and {self.later_name!r}"


def leaks_of(state: pl.DataFrame) -> list[Leak]:
    """Return the alarms in a fitted state of `Leaks`."""
    return [
        Leak(**{**row, "examples": tuple(row["examples"])})
        for row in state.iter_rows(named=True)
    ]


# ---- internals ----


def _beside(
    rows: pl.LazyFrame,
    more: pl.LazyFrame,
    keys: list[str],
) -> pl.LazyFrame:
    return rows.join(
        more,
        on=keys,
        how="left",
        maintain_order="left",
    )


def _is_value(dtype: pl.DataType) -> bool:
    """Whether a column can be measured: no bytes, lists or arrays."""
    return not dtype.is_nested() and dtype != pl.Binary


def _cell(
    name: str,
    dtype: pl.DataType,
) -> pl.Expr:
    column = pl.col(name)
    if dtype.is_numeric():
        number = column.cast(pl.Float64)
        return pl.when(number.is_finite()).then(number).alias(name)
    if dtype.is_temporal():
        return column.to_physical().cast(pl.Float64)
    return column.cast(pl.String).str.head(LONGEST)


def _places(rows: pl.DataFrame) -> list[str]:
    """Return examples, of rows or of pairs of rows."""
    places = []
    for row in rows.head(EXAMPLES).iter_rows(named=True):
        place = f"{row[SOURCE]}:{row[ROW]}"
        if SOURCE + _IN in row:
            other = f"{row[SOURCE + _IN]}:{row[ROW + _IN]}"
            place = f"{other} and {place}"
        places.append(place)
    return places


def _joined(
    pair: Pair,
    keys: Sequence[str],
) -> pl.DataFrame:
    """Return rows of the later split with the first equal row of the first one."""
    first = pair.first.unique(
        keys,
        keep="first",
        maintain_order=True,
    )
    numbers = [SOURCE, ROW, *keys]
    return (
        pair.later.select(numbers)
        .drop_nulls(list(keys))
        .join(first.select(numbers), on=list(keys), suffix=_IN, maintain_order="left")
    )


def _duplicates(pair: Pair) -> Iterator[Leak]:
    both = _joined(pair, HASHES)
    if len(both):
        yield Leak(
            "duplicates",
            f"rows of {pair.later_name!r} equal rows of {pair.first_name!r} in the"
            " inputs",
            "",
            len(both),
            len(both) / len(pair.later),
            tuple(_places(both)),
        )


def _near_duplicates(
    pair: Pair,
    column: str,
    threshold: float,
) -> Iterator[Leak]:
    rows = pl.concat([pair.first, pair.later])
    twins = first_alike(
        rows,
        threshold,
        len(pair.first),
        is_only_them=True,
    )
    if not twins:
        return
    later = rows[list(twins)]
    first = rows[[twin.row for twin in twins.values()]]
    both = later.with_columns(
        first[SOURCE].alias(SOURCE + _IN),
        first[ROW].alias(ROW + _IN),
    )
    yield Leak(
        "near_duplicates",
        f"rows of {pair.later_name!r} are like rows of {pair.first_name!r} by"
        f" {threshold:g} or more",
        column,
        len(twins),
        len(twins) / len(pair.later),
        tuple(_places(both)),
    )


def _groups(
    pair: Pair,
    column: str,
) -> Iterator[Leak]:
    both = _joined(pair, ["group"])
    if len(both):
        groups = both.unique(
            "group",
            keep="first",
            maintain_order=True,
        )
        yield Leak(
            "groups",
            f"values of {column!r} are in {pair.names}",
            column,
            len(groups),
            len(both) / len(pair.later),
            tuple(_places(groups)),
        )


def _time(
    pair: Pair,
    column: str,
) -> Iterator[Leak]:
    begin = pair.later["time"].min()
    late = pair.first.filter(pl.col("time") > begin)
    if len(late):
        yield Leak(
            "time",
            f"rows of {pair.first_name!r} are later than the first of"
            f" {pair.later_name!r}",
            column,
            len(late),
            len(late) / len(pair.first),
            tuple(_places(late)),
        )


def _target(
    rows: pl.DataFrame,
    target: str,
) -> Iterator[Leak]:
    """Return the inputs that give the target away, the most telling first."""
    sample = [json.loads(cells) for cells in rows["cells"].drop_nulls()]
    known = [cells for cells in sample if cells.get(target) is not None]
    if not known:
        return
    wanted = codes_of(
        [cells[target] for cells in known],
        TARGET_BINS,
    )
    leaks = []
    for name in known[0]:
        if name == target:
            continue
        codes = codes_of(
            [cells[name] for cells in known],
            BINS,
        )
        share = share_of_target(codes, wanted)
        if share is not None and share >= LEAST_SHARE:
            leaks.append(
                Leak(
                    "target",
                    f"{name!r} gives away {share:.0%} of what there is to know of"
                    f" {target!r}",
                    name,
                    len(known),
                    share,
                )
            )
    yield from sorted(
        leaks,
        key=lambda leak: (-leak.share, leak.column),
    )


def _error(leaks: Sequence[Leak]) -> DataError:
    worst = leaks[0]
    what = worst.what if worst.kind == "target" else f"{worst.count} {worst.what}"
    if worst.examples:
        what += f" ({', '.join(worst.examples)})"
    if len(leaks) > 1:
        what += f", and {len(leaks) - 1} more"
    remedy = f"{_REMEDIES[worst.kind]}; or take {worst.kind!r} out of Leaks.error"
    return DataError(what, where=f"Leaks: {worst.kind}", remedy=remedy)


_REMEDIES = {
    "duplicates": "put Duplicates before the step that splits",
    "near_duplicates": "put NearDuplicates before the step that splits",
    "groups": "split by group",
    "time": "split by time",
    "target": "leave the column out, unless it is known before the target is",
}
