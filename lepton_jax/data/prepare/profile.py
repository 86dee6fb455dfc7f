"""Profiles: how the values of each column are distributed.

A profile is plain data, some kilobytes for a table of any size: it is kept next to a
model, so that a server can compare what arrives with what the model was trained on.

    column "age" of four rows: 20, 30, missing, 90      edges 0, 40, 80

    below 0    0 to 40    40 to 80    from 80 on    missing
          0          2           0             1          1

The edges are fitted on one table, the training split. Another table is counted in the
same ones (`profile(tables, like=...)`), for only then can two profiles be compared.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import polars as pl

from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError

# Assumptions: what a picture of 300 pixels shows, and what a table has room for.
BINS = 24  # of equal width, for pictures
WORDS = 20  # the most frequent words of a column of categories
# Bins of equal weight, in which tables are compared: the ten that are usual for the
# population stability index (Siddiqi 2006, "Credit Risk Scorecards", chapter 8).
PARTS = 10
# Rows of each table that edges and words are fitted on, evenly spaced. Assumption: they
# place an edge to within a hundredth of the rows.
FITTED_ROWS = 20_000
# Share of the values left out at either end of a picture, so that one outlier does not
# squeeze the others into one bin. Assumption.
TAIL = 0.005
# Fences of outliers, in interquartile ranges beyond the quartiles: Tukey 1977,
# "Exploratory Data Analysis".
FENCES = 1.5
# A column of words with more characters than this on average, or in which more than
# this share of the rows are different, is text, of which the lengths are profiled.
# Assumptions.
TEXT_CHARACTERS = 40
TEXT_DISTINCT = 0.5
FEWEST_ROWS_OF_TEXT = 200  # below, words that differ may still be categories

SECONDS_OF_A_DAY = 86_400


@dataclass
class ColumnProfile:
    """The distribution of a column.

    Attributes:
      kind: "number", "time" (days since 1970), "category", or what is profiled by a
        number of its own: "text" (characters), "list" (values), "bytes" (bytes).
      type: Polars' name of its type.
      rows: all of them.
      missing: rows without a value; NaN is none.
      mean: of the numbers; None: there is no number.
      m2: sum of the squared distances from the mean.
      least: the least number.
      greatest: the greatest number.
      outliers: numbers beyond the fences.
      fences: the numbers between which none is an outlier.
      edges: ascending edges of the bins for pictures.
      counts: numbers below the first edge, in each bin, and from the last edge on.
      parts: ascending edges of the bins of equal weight.
      part_counts: the numbers in these, one more than edges.
      words: the most frequent words, most frequent first.
      word_counts: rows of each of these.
      others: rows with another word.
      other_words: how many other words there were in the rows they were fitted on.
    """

    kind: str
    type: str
    rows: int = 0
    missing: int = 0
    mean: float | None = None
    m2: float = 0.0
    least: float | None = None
    greatest: float | None = None
    outliers: int = 0
    fences: list[float] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    parts: list[float] = field(default_factory=list)
    part_counts: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    word_counts: list[int] = field(default_factory=list)
    others: int = 0
    other_words: int = 0

    @property
    def std(self) -> float | None:
        """Standard deviation of the numbers, of the whole table."""
        count = sum(self.counts)
        return math.sqrt(self.m2 / count) if count else None

    def empty(self) -> ColumnProfile:
        """Return a profile of no rows with the same edges and words."""
        return ColumnProfile(
            self.kind,
            self.type,
            fences=self.fences,
            edges=self.edges,
            counts=[0] * len(self.counts),
            parts=self.parts,
            part_counts=[0] * len(self.part_counts),
            words=self.words,
            word_counts=[0] * len(self.word_counts),
            other_words=self.other_words,
        )


@dataclass
class Profile:
    """The distributions of the columns of a table.

    Attributes:
      rows: of the table.
      columns: by name.
    """

    rows: int
    columns: dict[str, ColumnProfile]

    def to_json(self) -> str:
        """Return the profile as text for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Return the profile that `to_json` wrote.

        Raises:
          DataError: the text is no profile.
        """
        known = {field.name for field in fields(ColumnProfile)}
        try:
            content = json.loads(text)
            columns = {
                name: ColumnProfile(
                    **{k: v for k, v in column.items() if k in known},
                )
                for name, column in content["columns"].items()
            }
            return cls(int(content["rows"]), columns)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"this is no profile of a table: {error}",
                where="Profile.from_json",
                remedy="give the text that Profile.to_json returned",
            ) from error


Tables = Callable[[], Iterable[pl.DataFrame]]


def profile(
    tables: Tables,
    like: Profile | None = None,
) -> Profile:
    """Profile a table that is given in pieces.

    Args:
      tables: returns the pieces, the same ones at each call; with equal columns.
      like: the profile whose edges and words are used; None: they are fitted.
    """
    if like is None:
        columns = _fitted(tables())
    else:
        columns = {name: column.empty() for name, column in like.columns.items()}

    rows = 0
    for table in tables():
        rows += table.height
        for name, column in columns.items():
            if name in table.columns:
                _count(column, table[name])
    return Profile(rows, columns)


def as_numbers(
    series: pl.Series,
    kind: str,
) -> np.ndarray:
    """Return the numbers of a column by which it is profiled: float64, no NaN."""
    series = series.drop_nulls()
    match kind:
        case "time":
            series = series.cast(pl.Datetime("us")).dt.epoch("s") / SECONDS_OF_A_DAY
        case "text":
            series = series.cast(pl.String).str.len_chars()
        case "bytes":
            series = series.bin.size()
        case "list":
            series = _lengths(series)
    values = (
        series.cast(
            pl.Float64,
            strict=False,
        )
        .drop_nulls()
        .to_numpy()
    )
    return values[~np.isnan(values)]


# ---- internals ----


def _fitted(tables: Iterable[pl.DataFrame]) -> dict[str, ColumnProfile]:
    """Return profiles of no rows, with edges and words fitted on a sample."""
    samples = [_sample(table) for table in tables]
    if not samples:
        return {}
    table = pl.concat(samples, how="vertical_relaxed")
    names = [name for name in table.columns if name not in (SOURCE, ROW)]
    return {name: _column(table[name]) for name in names}


def _sample(table: pl.DataFrame) -> pl.DataFrame:
    return table.gather_every(
        max(
            1,
            table.height // FITTED_ROWS,
        )
    )


def _column(series: pl.Series) -> ColumnProfile:
    kind = _kind(series)
    column = ColumnProfile(kind, str(series.dtype))
    if kind == "category":
        _fit_words(column, series)
    else:
        _fit_edges(column, as_numbers(series, kind))
    return column


def _kind(series: pl.Series) -> str:
    dtype = series.dtype
    if dtype.is_numeric():
        return "number"
    if dtype in (pl.Date, pl.Datetime):
        return "time"
    if dtype == pl.Binary:
        return "bytes"
    if dtype.is_nested():
        return "list"
    if dtype == pl.String and _is_text(series.drop_nulls()):
        return "text"
    return "category"


def _is_text(words: pl.Series) -> bool:
    characters = words.str.len_chars().mean()
    if not isinstance(characters, float) or characters > TEXT_CHARACTERS:
        return characters is not None
    if len(words) < FEWEST_ROWS_OF_TEXT:
        return False
    return words.n_unique() > TEXT_DISTINCT * len(words)


def _lengths(series: pl.Series) -> pl.Series:
    if isinstance(series.dtype, pl.Array):
        return pl.Series([math.prod(series.dtype.shape)] * len(series))
    if series.dtype == pl.List:
        return series.list.len()
    return pl.Series(
        [len(value) for value in series.to_list()],
        dtype=pl.UInt32,
    )


def _fit_words(
    column: ColumnProfile,
    series: pl.Series,
) -> None:
    counts = Counter(_words(series).to_list())
    # equal counts in the order of the words: the same profile each time
    ranked = sorted(
        counts,
        key=lambda word: (-counts[word], word),
    )
    column.words = ranked[:WORDS]
    column.word_counts = [0] * len(column.words)
    column.other_words = len(ranked) - len(column.words)


def _words(series: pl.Series) -> pl.Series:
    return series.drop_nulls().cast(pl.String)


def _fit_edges(
    column: ColumnProfile,
    values: np.ndarray,
) -> None:
    values = values[np.isfinite(values)]
    if not len(values):
        column.counts = [0]
        column.part_counts = [0]
        return

    low, first, third, high = np.quantile(
        values,
        [TAIL, 0.25, 0.75, 1 - TAIL],
    )
    reach = FENCES * (third - first)
    column.fences = [float(first - reach), float(third + reach)]
    column.edges = _even_edges(values, low, high)
    column.counts = [0] * (len(column.edges) + 1)

    parts = np.quantile(
        values,
        np.arange(1, PARTS) / PARTS,
    )
    column.parts = [float(edge) for edge in np.unique(parts)]
    column.part_counts = [0] * (len(column.parts) + 1)


def _even_edges(
    values: np.ndarray,
    low: float,
    high: float,
) -> list[float]:
    """Return edges of equal width; of few whole numbers, one around each."""
    least = float(values.min())
    greatest = float(values.max())
    are_whole = bool((values == np.round(values)).all())
    if are_whole and greatest - least < BINS:
        return [
            float(x) - 0.5
            for x in np.arange(
                least,
                greatest + 2,
            )
        ]
    if not high > low:
        low, high = least, greatest
    if not high > low:
        return [low - 0.5, low + 0.5]
    return [
        float(edge)
        for edge in np.linspace(
            low,
            high,
            BINS + 1,
        )
    ]


def _count(
    column: ColumnProfile,
    series: pl.Series,
) -> None:
    """Add the rows of a piece."""
    column.rows += len(series)
    if column.kind == "category":
        column.missing += series.null_count()
        _count_words(column, series)
        return

    values = as_numbers(series, column.kind)
    column.missing += len(series) - len(values)
    if not len(values):
        return
    _add_moments(column, values)
    column.counts = _added(
        column.counts,
        column.edges,
        values,
    )
    column.part_counts = _added(
        column.part_counts,
        column.parts,
        values,
    )
    if column.fences:
        low, high = column.fences
        column.outliers += int(((values < low) | (values > high)).sum())


def _count_words(
    column: ColumnProfile,
    series: pl.Series,
) -> None:
    counts = Counter(_words(series).to_list())
    known = [
        counts.pop(
            word,
            0,
        )
        for word in column.words
    ]
    column.word_counts = [
        before + more
        for before, more in zip(
            column.word_counts,
            known,
            strict=True,
        )
    ]
    column.others += sum(counts.values())


def _add_moments(
    column: ColumnProfile,
    values: np.ndarray,
) -> None:
    """Add numbers to mean, spread and range.

    Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances", equation 2.1.
    """
    before = sum(column.counts)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    mean = float(finite.mean())
    m2 = float(((finite - mean) ** 2).sum())
    total = before + len(finite)
    delta = mean - (column.mean or 0.0)
    column.m2 += m2 + delta**2 * before * len(finite) / total
    column.mean = (column.mean or 0.0) + delta * len(finite) / total
    column.least = _least(
        column.least,
        float(finite.min()),
    )
    greatest = _least(
        _negative(column.greatest),
        -float(finite.max()),
    )
    column.greatest = -greatest


def _least(
    before: float | None,
    now: float,
) -> float:
    return now if before is None else min(before, now)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _added(
    counts: Sequence[int],
    edges: Sequence[float],
    values: np.ndarray,
) -> list[int]:
    places = np.searchsorted(
        np.asarray(edges),
        values,
        side="right",
    )
    more = np.bincount(
        places,
        minlength=len(counts),
    )
    return [int(count) for count in np.asarray(counts) + more]
