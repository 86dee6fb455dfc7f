"""Schema, missing values, categories, dates, interpolation, and checks of columns."""

import datetime
import math

import hypothesis.strategies as st
import polars as pl
import pytest
from hypothesis import given, settings

from lepton_jax import DataError
from lepton_jax.data import prepare
from lepton_jax.data.prepare.conformance import fitted
from lepton_jax.data.readers.reader import ROW, SOURCE

NAN = float("nan")


def numbered(columns, **types):
    return pl.DataFrame(columns, schema_overrides=types).with_columns(
        pl.lit(0, dtype=pl.UInt32).alias(SOURCE),
        pl.int_range(pl.len(), dtype=pl.UInt64).alias(ROW),
    )


def outcome(step, table, train=None):
    schema = step.check(table.schema)
    train = table if train is None else train
    result = step.run(table.lazy(), fitted(step, [train[:2], train[2:]]))
    rows = result.table.collect()
    assert rows.schema == schema
    notes = None if result.notes is None else result.notes.collect()
    return rows, notes


# Columns are checked before a row is read.


@pytest.mark.parametrize(
    "make",
    [
        lambda name: prepare.Standardize(name),
        lambda name: prepare.FillMissing(name, "median"),
        lambda name: prepare.ClipOutliers(name),
        lambda name: prepare.Vocabulary(name),
        lambda name: prepare.DropMissing(name),
        lambda name: prepare.Interpolate("x", order=name),
        lambda name: prepare.SplitByTime(test=0.5, column=name),
        lambda name: prepare.Undersample(name),
        lambda name: prepare.Select(name),
        lambda name: prepare.Filter(f"{name} > 1"),
        lambda name: prepare.CheckSchema({name: "int64"}),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(make):
    schema = pl.Schema({"age": pl.Int64, "x": pl.Float64})
    make("age").check(schema)
    with pytest.raises(DataError, match=r"'agee'.*did you mean 'age'"):
        make("agee").check(schema)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (prepare.Standardize("word"), "String, but must be a number"),
        (prepare.FillMissing("word", "mean"), "String, but must be a number"),
        (prepare.Vocabulary("x"), "Float64, but must be text"),
        (prepare.DateFeatures("word"), "must be a date"),
        (prepare.DateFeatures("day", ["hour"]), "there is no hour"),
        (prepare.FillWith("x", "none"), "'none' is no value of the column 'x'"),
        (prepare.FillWith("whole", 1.5), "1.5 is no value of the column 'whole'"),
        (prepare.MarkMissing("y"), "'y_missing' already"),
        (prepare.Rename({"x": "y"}), "'y' already"),
        (prepare.Weigh("word", weight="x"), "'x' already"),
        (prepare.SplitAt("day", test=3), "split at 3"),
        (prepare.CheckSchema({"word": "date", "day": "int8"}), "can't be cast"),
    ],
    ids=str,
)
def test_a_column_of_a_wrong_type_is_an_error_with_a_remedy(step, message):
    schema = pl.Schema(
        {
            "word": pl.String,
            "x": pl.Float64,
            "day": pl.Date,
            "whole": pl.Int32,
            "y": pl.Int8,
            "y_missing": pl.Boolean,
        }
    )
    with pytest.raises(DataError, match=message) as caught:
        step.check(schema)
    assert caught.value.remedy and caught.value.where


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prepare.Standardize([]), "no name"),
        (lambda: prepare.Standardize(["a", "a"]), "'a' stands twice"),
        (lambda: prepare.FillMissing("a", "meen"), "did you mean 'mean'"),
        (lambda: prepare.ClipOutliers("a", "zscor"), "did you mean 'zscore'"),
        (lambda: prepare.ClipOutliers("a", "quantile", 0.6), "limit is 0.6"),
        (lambda: prepare.DateFeatures("a", ["mnth"]), "did you mean 'month'"),
        (lambda: prepare.DateFeatures("a", cyclic=["year"]), "'year'"),
        (lambda: prepare.Field("int46"), "did you mean 'int64'"),
        (lambda: prepare.MinMaxScale("a", 1, 1), "low is 1"),
        (lambda: prepare.HashCategories("a", 1), "buckets is 1"),
        (lambda: prepare.Sample(True), "share is True"),
    ],
)
def test_a_wrong_argument_is_an_error_when_the_step_is_made(make, message):
    with pytest.raises(DataError, match=message):
        make()


# Missing values.


def test_nan_and_null_are_both_missing():
    table = numbered({"x": [1.0, NAN, None, 4.0]})
    rows, notes = outcome(prepare.DropMissing("x"), table)
    assert rows["x"].to_list() == [1.0, 4.0]
    assert notes["before"].to_list() == ["NaN", None]
    rows, _ = outcome(prepare.MarkMissing("x"), table)
    assert rows["x_missing"].to_list() == [False, True, True, False]
    rows, notes = outcome(prepare.FillMissing("x", "mean"), table)
    assert rows["x"].to_list() == [1.0, 2.5, 2.5, 4.0]
    assert notes["after"].to_list() == ["2.5", "2.5"]
    assert set(notes["action"]) == {"changed"}
    rows, _ = outcome(prepare.FillWith("x", 0), table)
    assert rows["x"].to_list() == [1.0, 0.0, 0.0, 4.0]
    rows, _ = outcome(prepare.Standardize("x"), table)
    assert rows["x"].to_list() == [-1.0, None, None, 1.0]


def test_a_fill_comes_from_training_rows_alone():
    table = numbered({"x": [1.0, 3.0, None], "lepton.split": ["train", "test", "test"]})
    rows, _ = outcome(prepare.FillMissing("x", "mean"), table)
    assert rows["x"].to_list() == [1.0, 3.0, 1.0]


def test_the_most_frequent_value_of_each_type_is_the_least_of_several():
    table = numbered(
        {
            "word": ["b", "a", None, "a", "b"],
            "yes": [True, True, None, False, None],
            "day": [
                datetime.date(2020, 1, 2),
                None,
                None,
                datetime.date(2020, 1, 1),
                None,
            ],
            "price": pl.Series(["1.50", "1.5", "2", None, None]).cast(pl.Decimal(9, 2)),
        }
    )
    names = ["word", "yes", "day", "price"]
    rows, _ = outcome(prepare.FillMissing(names, "most_frequent"), table)
    assert rows["word"][2] == "a"
    assert rows["yes"][2] is True
    assert rows["day"][1] == datetime.date(2020, 1, 1)
    assert str(rows["price"][3]) == "1.50"


# Outliers.


def test_a_note_on_an_outlier_says_value_and_limit():
    table = numbered({"fare": [1.0, 2.0, 3.0, 4.0, 512.3292, None]})
    rows, notes = outcome(prepare.ClipOutliers("fare"), table)
    assert rows["fare"].to_list() == [1.0, 2.0, 3.0, 4.0, 7.0, None]
    assert notes.select("reason", "before", "after").row(0) == (
        "outlier: 512.3292 is above 7 (iqr, limit 1.5)",
        "512.3292",
        "7.0",
    )
    rows, notes = outcome(prepare.FlagOutliers("fare"), table)
    assert rows["fare_outlier"].to_list() == [False] * 4 + [True, False]
    assert notes["action"].to_list() == ["flagged"]
    rows, notes = outcome(prepare.DropOutliers("fare"), table)
    assert len(rows) == 5 and notes[ROW].to_list() == [4]


# Categories.


def test_codes_are_by_frequency_and_zero_is_rare_or_unseen():
    train = numbered({"c": ["b", "b", "a", "a", "a", None, "rare"]})
    table = numbered({"c": ["a", "b", "rare", "new", None]})
    rows, _ = outcome(prepare.Vocabulary("c"), table, train)
    assert rows["c"].to_list() == [1, 2, 4, 0, 3]
    rows, _ = outcome(prepare.Vocabulary("c", least=2), table, train)
    assert rows["c"].to_list() == [1, 2, 0, 0, 0]
    rows, _ = outcome(prepare.Vocabulary("c", most=1), table, train)
    assert rows["c"].to_list() == [1, 0, 0, 0, 0]
    rows, _ = outcome(prepare.OneHot("c", least=2), table, train)
    assert rows["c"].to_list()[1:3] == [[0, 0, 1], [1, 0, 0]]


def test_categories_are_told_apart_by_their_spelling_whatever_the_type():
    train = numbered({"c": ["7", "8", "8"]})
    table = numbered({"c": [7, 8, 9]})
    step = prepare.Vocabulary("c")
    rows = step.run(table.lazy(), fitted(step, [train])).table.collect()
    assert rows["c"].to_list() == [2, 1, 0]
    hashed = prepare.HashCategories("c", 1000)
    texts, _ = outcome(hashed, numbered({"c": ["7", "8", "9"]}))
    assert outcome(hashed, table)[0]["c"].to_list() == texts["c"].to_list()


@given(st.lists(st.text(max_size=6) | st.none(), max_size=30), st.integers(2, 50))
@settings(max_examples=25, deadline=None)
def test_hashed_categories_are_in_range_and_only_missing_is_zero(values, buckets):
    table = numbered({"c": values}, c=pl.String)
    codes, _ = outcome(prepare.HashCategories("c", buckets), table)
    for value, code in zip(values, codes["c"], strict=True):
        assert (code == 0) == (value is None)
        assert code < buckets


def test_classes_are_in_order_and_an_unknown_one_is_a_dropped_row():
    train = numbered({"y": ["10", "9", "9"]})
    table = numbered({"y": ["9", "10", "11", None]})
    rows, notes = outcome(prepare.Classes("y"), table, train)
    assert rows["y"].to_list() == [0, 1]
    assert notes["reason"].to_list() == [
        "11 is no class of the training split ('9', '10')",
        "missing",
    ]
    with pytest.raises(DataError, match="has one value, 'a'"):
        outcome(prepare.Classes("y"), numbered({"y": ["a", "a", None]}))


# Dates.


def test_dates_have_the_parts_of_the_standard_library():
    moments = [
        datetime.datetime(1999, 12, 31, 23, 59, 58),
        datetime.datetime(2024, 2, 29, 12),
        None,
    ]
    table = numbered({"t": moments})
    parts = ["year", "month", "day", "day_of_week", "day_of_year", "hour", "second"]
    step = prepare.DateFeatures("t", parts, ["hour"], since="2000-01-01")
    rows, _ = outcome(step, table)
    first = moments[0]
    found = [rows[f"t_{part}"][0] for part in parts]
    assert found == [1999, 12, 31, first.isoweekday(), 365, 23, 58]
    assert rows["t_hour_cos"].to_list() == pytest.approx(
        [math.cos(23 * math.pi / 12), -1, None]
    )
    assert rows["t_elapsed"].to_list() == [pytest.approx(-2 / 86400), 8825.5, None]


def test_a_date_with_a_zone_has_its_local_parts_and_true_distances():
    moment = datetime.datetime(2024, 7, 1, 23, tzinfo=datetime.UTC)
    table = numbered({"t": [moment]}).with_columns(
        pl.col("t").dt.convert_time_zone("Europe/Berlin")
    )
    step = prepare.DateFeatures("t", ["day", "hour"], since="2024-07-01T00:00+00:00")
    rows, _ = outcome(step, table)
    assert rows.select("t_day", "t_hour").row(0) == (2, 1)
    assert rows["t_elapsed"].item() == pytest.approx(23 / 24)


# Interpolation.


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 30),
            st.sampled_from("ab"),
            st.none() | st.integers(-50, 50).map(float),
        ),
        max_size=25,
        unique_by=lambda row: row[:2],
    )
)
@settings(max_examples=30, deadline=None)
def test_interpolation_within_groups_is_that_of_polars(rows):
    table = numbered(
        pl.DataFrame(rows, schema=["t", "g", "x"], orient="row"), x=pl.Float64
    )
    table = table.with_columns(pl.col("t").cast(pl.Int64), pl.col("x").cast(pl.Float64))
    step = prepare.Interpolate("x", order="t", group="g")
    found, _ = outcome(step, table)
    ordered = table.sort("t")
    expected = ordered.with_columns(pl.col("x").interpolate_by("t").over("g")).sort(ROW)
    for value, other in zip(found["x"], expected["x"], strict=True):
        assert value == (None if other is None else pytest.approx(other, abs=1e-9))


def test_interpolation_is_by_time_and_notes_what_it_filled():
    days = [datetime.date(2020, 1, day) for day in (1, 2, 5, 9)]
    table = numbered({"t": days, "x": [0.0, None, 8.0, None]})
    rows, notes = outcome(prepare.Interpolate("x", order="t"), table)
    assert rows["x"].to_list() == [0.0, 2.0, 8.0, None]
    assert notes.select(ROW, "after").rows() == [(1, "2.0")]
    rows, _ = outcome(prepare.Interpolate("x", order="t", ends="nearest"), table)
    assert rows["x"].to_list() == [0.0, 2.0, 8.0, 8.0]


# Schema.

TEXTS = numbered(
    {
        "n": ["1", " 2", "3.7", "x", None],
        "yes": ["Yes", "0", "maybe", "t", None],
        "day": ["2020-02-29", "2021-02-29", "2020-01-01", "1.2.2020", None],
        "city": ["Rome", "Oslo", "Rome", "Paris", None],
    }
)


def test_cells_that_argue_against_the_schema_become_missing_with_a_note():
    fields = {
        "n": "int64",
        "yes": "boolean",
        "day": "date",
        "city": prepare.Field("text", allowed=["Rome", "Oslo"]),
    }
    rows, notes = outcome(prepare.CheckSchema(fields, otherwise="missing"), TEXTS)
    assert rows["n"].to_list() == [1, 2, None, None, None]
    assert rows["yes"].to_list() == [True, False, None, True, None]
    assert rows["day"].is_null().to_list() == [False, True, False, True, True]
    assert rows["city"].to_list() == ["Rome", "Oslo", "Rome", None, None]
    assert sorted(notes["reason"]) == [
        "1.2.2020 is no date",
        "2021-02-29 is no date",
        "3.7 is no int64",
        "Paris is none of 'Rome', 'Oslo'",
        "maybe is no boolean",
        "x is no int64",
    ]


def test_rows_that_argue_against_the_schema_are_dropped_and_counted():
    step = prepare.CheckSchema(
        {"n": prepare.Field("float64", least=1, most=3, missing=False)},
        unexpected="drop",
        otherwise="drop",
    )
    rows, notes = outcome(step, TEXTS)
    assert rows["n"].to_list() == [1.0, 2.0]
    assert rows.columns == ["n", SOURCE, ROW]
    assert notes["reason"].to_list() == [
        "3.7 is above 3",
        "x is no float64",
        "missing, which it must not be",
    ]


def test_by_default_a_bad_cell_is_an_error_that_names_its_row():
    step = prepare.CheckSchema({"n": "float64"})
    with pytest.raises(
        DataError, match=r"x is no float64; 1 such(.|\n)*row 3 of source 0"
    ):
        step.run(TEXTS.lazy(), None).table.collect()


@pytest.mark.parametrize(
    ("values", "before", "after", "expected"),
    [
        ([1.0, 2.5, NAN, 1e300], pl.Float64, "int64", [1, None, None, None]),
        ([1, 127, 128, -129], pl.Int64, "int8", [1, 127, None, None]),
        ([0, 1, 2], pl.Int64, "boolean", [False, True, None]),
        ([True, None], pl.Boolean, "float32", [1.0, None]),
        ([1, None], pl.Int64, "text", ["1", None]),
        ([None, None], pl.Null, "int32", [None, None]),
        (["1e3", " inf", "1,5"], pl.String, "float64", [1000.0, math.inf, None]),
        (["9007199254740993"], pl.String, "int64", [9007199254740993]),
    ],
)
def test_casts_lose_nothing_silently(values, before, after, expected):
    table = numbered({"x": values}, x=before)
    step = prepare.CheckSchema({"x": after}, otherwise="missing")
    rows, notes = outcome(step, table)
    assert rows["x"].to_list() == expected
    lost = sum(
        new is None and old is not None and old == old
        for old, new in zip(values, expected, strict=True)
    )
    assert len(notes) == lost


def test_schema_drift_is_an_error_that_names_the_nearest_column():
    step = prepare.CheckSchema({"age": "int64"}, unexpected="error")
    with pytest.raises(DataError, match="'agee' is not declared; did you mean 'age'"):
        step.check(pl.Schema({"age": pl.Int64, "agee": pl.Int64}))
    optional = prepare.CheckSchema({"y": prepare.Field("text", optional=True)})
    rows, _ = outcome(optional, numbered({"x": [1]}))
    assert rows["y"].to_list() == [None]


def test_dates_in_another_form_are_read_as_declared():
    table = numbered({"d": ["31.01.2020", "2020-01-31"]})
    field = prepare.Field("date", form="%d.%m.%Y")
    rows, notes = outcome(prepare.CheckSchema({"d": field}, otherwise="missing"), table)
    assert rows["d"].to_list() == [datetime.date(2020, 1, 31), None]
    assert len(notes) == 1
