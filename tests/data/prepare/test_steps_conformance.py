"""Every step keeps the laws of steps. A new step joins by a line in EXAMPLES."""

import dataclasses
import datetime
import inspect
from decimal import Decimal

import hypothesis.strategies as st
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings

from lepton_jax import DataError
from lepton_jax.data import prepare
from lepton_jax.data.prepare import Fitted, Outcome, Step
from lepton_jax.data.prepare.step import SPLIT
from lepton_jax.data.prepare.steps.columns import require
from lepton_jax.data.readers.reader import ROW, SOURCE

NUMBERS = ("float", "small", "whole", "price", "yes")
KEYS = ("word", "whole", "yes", "day")

# Steps that need files, several sources or splits: see test_texts_conformance.py.
ELSEWHERE = {
    prepare.FileTokens,
    prepare.Images,
    prepare.Join,
    prepare.Leaks,
    prepare.Mixture,
}
EXAMPLES = [
    prepare.AsFloats(NUMBERS),
    prepare.Bins(NUMBERS, 3),
    prepare.Bins(NUMBERS, 4, by="width"),
    prepare.ByteTokens("word", length=3, end=258),
    prepare.CharacterTokens("word"),
    prepare.TrimEnd("word", "ab"),
    prepare.CheckSchema(
        {"whole": "float64", "extra": {"type": "text", "optional": True}}
    ),
    prepare.CheckSchema(
        {
            "float": prepare.Field("int64", least=-2),
            "word": prepare.Field(missing=False),
        },
        otherwise="drop",
    ),
    prepare.CheckSchema(
        {"float": prepare.Field("int16", most=3), "word": prepare.Field("float32")},
        unexpected="drop",
        otherwise="missing",
    ),
    prepare.Classes("word"),
    prepare.CleanText("word", form="NFKC"),
    prepare.ClipOutliers(NUMBERS, by="quantile", limit=0.2),
    prepare.DateFeatures("day", cyclic=["month", "week"], since="2000-01-01"),
    prepare.DateFeatures(["moment"], ["hour", "minute"], ["second"], since="day"),
    prepare.Derive("sum", "float + whole * 2 if known(price) else -small"),
    prepare.Drop(["nothing", "word"]),
    prepare.DropMissing(["float", "word", "nothing"]),
    prepare.DropOutliers(["float", "whole"], by="zscore", limit=1.0),
    prepare.Duplicates(),
    prepare.Duplicates(["word", "whole"]),
    prepare.FillMissing([*NUMBERS, "word", "day", "moment"], by="most_frequent"),
    prepare.FillMissing(NUMBERS, by="mean"),
    prepare.FillMissing(NUMBERS, by="median"),
    prepare.FillWith("nothing", "a"),
    prepare.FillWith(["float", "small", "whole", "price"], 7),
    prepare.Filter('whole >= 0 and word != "b"'),
    prepare.FlagOutliers(NUMBERS, limit=0.5),
    prepare.HashCategories(KEYS, buckets=5),
    prepare.Interpolate(["float", "whole"], order="moment", group="word"),
    prepare.Interpolate("price", order="small", ends="nearest"),
    prepare.Labels("word", separator=","),
    prepare.LogScale(NUMBERS),
    prepare.LogScale(NUMBERS, negative="mirror"),
    prepare.MarkMissing(["float", "word", "nothing"]),
    prepare.MinMaxScale(NUMBERS, low=-1, clip=True),
    prepare.NearDuplicates("word", size=1, permutations=16),
    prepare.NgramTokens("word", characters=(1, 2), length=2),
    prepare.OneHot(KEYS, least=2),
    prepare.Oversample("word"),
    prepare.QuantileScale(NUMBERS, count=5),
    prepare.QuantileScale(NUMBERS, onto="normal"),
    prepare.Rename({"float": "number", "word": "float"}),
    prepare.RobustScale(NUMBERS),
    prepare.Sample(0.5),
    prepare.Select(["word", "float"]),
    prepare.Split(test=0.3, validation=0.2),
    prepare.Split(test=0.3, validation=0.5, stratify=["word", "yes"], seed=3),
    prepare.SplitAt("day", test="2001-01-01", validation="2000-02-01"),
    prepare.SplitByGroup(test=0.3, group="word"),
    prepare.SplitByHash(test=0.3, validation=0.3, columns=KEYS),
    prepare.Split(folds=4, fold=2, validation=0.2, stratify="word"),
    prepare.SplitByGroup(folds=2, fold=1, group="word"),
    prepare.SplitByHash(folds=3, fold=2, validation=0.5, columns=KEYS),
    prepare.SplitBySource(test=[1]),
    prepare.SplitByTime(test=0.3, validation=0.3, column="moment"),
    prepare.Standardize(NUMBERS),
    prepare.TextQuality("word", least_characters=1, most_digits=0.5),
    prepare.Undersample("word", ratio=1.5),
    prepare.Vocabulary(KEYS, least=2, most=3),
    prepare.Weigh("word"),
    prepare.WordTokens("word"),
]

numbers = st.one_of(
    st.none(),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, float("nan")]),
    st.floats(-1000, 1000, width=32),
)
COLUMNS = {
    "float": (pl.Float64, numbers),
    "small": (pl.Float32, numbers),
    "whole": (pl.Int64, st.none() | st.integers(-3, 3)),
    "price": (
        pl.Decimal(10, 2),
        st.none() | st.sampled_from([Decimal("1.50"), Decimal(2), Decimal("-0.25")]),
    ),
    "yes": (pl.Boolean, st.none() | st.booleans()),
    "word": (pl.String, st.none() | st.sampled_from(["a", "b", "ä", "", "7"])),
    "nothing": (pl.Null, st.none()),
    "day": (
        pl.Date,
        st.none() | st.dates(datetime.date(1999, 12, 1), datetime.date(2001, 3, 1)),
    ),
    "moment": (
        pl.Datetime("us"),
        st.none()
        | st.datetimes(datetime.datetime(1999, 1, 1), datetime.datetime(1999, 1, 3)),
    ),
}


@st.composite
def tables(draw, most=12):
    count = draw(st.integers(0, most))
    rows = st.lists(
        st.tuples(*(cells for _, cells in COLUMNS.values())),
        min_size=count,
        max_size=count,
    )
    types = {name: dtype for name, (dtype, _) in COLUMNS.items()}
    table = pl.DataFrame(draw(rows), schema=types, orient="row")
    second = draw(st.integers(0, count))
    number = pl.int_range(pl.len(), dtype=pl.Int64)
    return table.with_columns(
        (number >= second).cast(pl.UInt32).alias(SOURCE),
        pl.when(number < second)
        .then(number)
        .otherwise(number - second)
        .cast(pl.UInt64)
        .alias(ROW),
    )


@st.composite
def divided_tables(draw):
    table = draw(tables())
    ends = st.integers(0, len(table))
    cuts = draw(st.lists(ends, max_size=3))
    return table, sorted(cuts)


@pytest.mark.parametrize("step", EXAMPLES, ids=lambda step: type(step).__name__)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(divided=divided_tables(), is_split=st.booleans())
def test_every_step_keeps_the_laws(step, divided, is_split):
    table, cuts = divided
    if is_split and "Split" not in type(step).__name__:
        splits = pl.Series(["train", "test", "train", "validation"] * 3)
        table = table.with_columns(splits.head(len(table)).alias(SPLIT))
    prepare.conformance(step, table, cuts=cuts)


def test_every_public_step_is_among_the_examples():
    names = [getattr(prepare, name) for name in prepare.__all__]
    steps = {
        value for value in names if inspect.isclass(value) and issubclass(value, Step)
    }
    listed = {type(step) for step in EXAMPLES}
    assert steps - {Step, Fitted} <= listed | ELSEWHERE


def test_each_step_learns_from_an_ordinary_table():
    table = pl.DataFrame(
        {
            "float": [1.5, None, 3.0, float("nan"), 100.0, -2.0],
            "small": pl.Series([1, 2, 3, 4, None, 6], dtype=pl.Float32),
            "whole": [1, 2, None, 2, 2, 3],
            "price": pl.Series(["1.50", None, "2", "2", "3", "4"]).cast(
                pl.Decimal(10, 2)
            ),
            "yes": [True, False, None, True, True, False],
            "word": ["a", "b", "a", "a", None, "b"],
            "nothing": [None] * 6,
            "day": [datetime.date(2000, 1, day) for day in range(1, 7)],
            "moment": [datetime.datetime(1999, 1, 1, hour) for hour in range(6)],
        },
        schema_overrides={"nothing": pl.Null},
    )
    for step in EXAMPLES:
        report = prepare.conformance(step, table)
        assert report.unlearned is None, f"{step}: {report.unlearned}"
        assert ("mergeable" in report.kept) == isinstance(step, Fitted)


# Steps that break one law each.


class OnFloat:
    def check(self, schema):
        require(self, schema, ["float"])
        return schema


@dataclasses.dataclass(frozen=True)
class Silent(OnFloat, Step):
    def run(self, table, state):
        return Outcome(table.filter(pl.col("float") > 0))


@dataclasses.dataclass(frozen=True)
class Centered(OnFloat, Step):
    order_independent = True

    def run(self, table, state):
        return Outcome(table.with_columns(pl.col("float") - pl.col("float").mean()))


@dataclasses.dataclass(frozen=True)
class Added(OnFloat, Step):
    idempotent = True

    def run(self, table, state):
        return Outcome(table.with_columns(pl.col("float") + 1))


@dataclasses.dataclass(frozen=True)
class Unchecked(Step):
    def check(self, schema):
        return pl.Schema({**schema, "float": schema["float"]})

    def run(self, table, state):
        return Outcome(table)


@dataclasses.dataclass(frozen=True)
class MeanOfMeans(OnFloat, Fitted):
    def partial(self, table):
        return table.select(pl.col("float").mean().fill_null(0.0))

    def merge(self, partials):
        return pl.concat(partials).mean()

    def finish(self, partial):
        return partial

    def run(self, table, state):
        return Outcome(table)


@dataclasses.dataclass(frozen=True)
class Mistyped(OnFloat, Step):
    def run(self, table, state):
        return Outcome(table.with_columns(pl.col("float").cast(pl.String)))


@pytest.mark.parametrize(
    ("step", "law"),
    [
        (Unchecked(), "checked"),
        (Silent(), "traced"),
        (Centered(), "divisible"),
        (Added(), "idempotent"),
        (MeanOfMeans(), "mergeable"),
        (Mistyped(), "pure"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_that_breaks_a_law_is_told_which(step, law):
    table = pl.DataFrame({"float": [1.0, -2.0, 4.0, 8.0, 16.0]})
    with pytest.raises(DataError, match=f"^{law}: "):
        prepare.conformance(step, table, cuts=[1, 1, 3])
