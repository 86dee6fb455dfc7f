"""Splits, samples, hashes and expressions."""

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings

from lepton_jax import DataError
from lepton_jax.data import prepare
from lepton_jax.data.prepare.conformance import fitted
from lepton_jax.data.prepare.step import SPLIT
from lepton_jax.data.prepare.steps import hashing
from lepton_jax.data.prepare.steps.expressions import Expression
from lepton_jax.data.readers.reader import ROW, SOURCE


def numbered(table, source=0):
    return table.with_columns(
        pl.lit(source, dtype=pl.UInt32).alias(SOURCE),
        pl.int_range(pl.len(), dtype=pl.UInt64).alias(ROW),
    )


def outcome(step, table):
    step.check(table.schema)
    result = step.run(table.lazy(), fitted(step, [table[:3], table[3:]]))
    notes = None if result.notes is None else result.notes.collect()
    return result.table.collect(), notes


def sizes(table):
    counts = table[SPLIT].value_counts()
    return dict(counts.rows())


# Hashes.


def test_hashes_are_those_of_the_published_algorithms():
    # The first numbers of SplitMix64 from 0 and of 1234567, as in Vigna's splitmix64.c.
    assert hashing.of_number(0) == 0xE220A8397B1DCDAF
    assert hashing.of_number(1234567) == 6457827717110365317


def test_hashes_stay_as_they_were():
    rows = numbered(pl.DataFrame({"x": ["a", None, "ä"]}), source=2)
    found = rows.select(
        row=hashing.of_row(7),
        value=hashing.of_values(["x"], rows.schema, 7),
    )
    assert found["row"].to_list() == ROW_HASHES
    assert found["value"].to_list() == VALUE_HASHES


@given(seed=st.integers(), row=st.integers(0, 2**40), source=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_hashes_of_rows_are_those_of_plain_integers(seed, row, source):
    table = pl.DataFrame({SOURCE: [source], ROW: [row]})
    inner = hashing.of_number(hashing.of_number(seed) + source)
    expected = hashing.of_number(inner + row)
    assert table.select(hashing.of_row(seed)).item() == expected


def test_hashes_of_neighbouring_rows_and_seeds_are_even_and_unrelated():
    table = numbered(pl.DataFrame({"x": range(40_000)}))
    first = table.select(hashing.of_row(0)).to_series().to_numpy() / 2**64
    second = table.select(hashing.of_row(1)).to_series().to_numpy() / 2**64
    counts = np.histogram(first, bins=20, range=(0, 1))[0]
    # Four standard deviations of a count of 2,000.
    assert np.abs(counts - 2000).max() < 4 * np.sqrt(2000 * 0.95)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(40_000)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 4 / np.sqrt(40_000)


# Splits.


@pytest.mark.parametrize("count", [1, 2, 10, 891, 5000])
def test_random_shares_are_exact(count):
    table = numbered(pl.DataFrame({"x": range(count)}))
    split, _ = outcome(prepare.Split(test=0.2, validation=0.1), table)
    found = sizes(split)
    assert found.get("test", 0) == round(0.2 * count)
    assert found.get("validation", 0) == round(0.1 * count)


def test_a_stratified_split_has_each_class_in_its_share():
    classes = ["rare"] * 7 + ["common"] * 93 + [None] * 11
    table = numbered(pl.DataFrame({"y": classes}))
    step = prepare.Split(test=0.25, validation=0.25, stratify="y")
    split, _ = outcome(step, table)
    counts = dict(split.filter(pl.col(SPLIT) == "test")["y"].value_counts().rows())
    assert sum(counts.values()) == round(0.25 * 111)
    for name, total in {"rare": 7, "common": 93, None: 11}.items():
        assert abs(counts[name] - 0.25 * total) < 1


def test_another_seed_makes_another_split_and_the_same_one_the_same():
    table = numbered(pl.DataFrame({"x": range(100)}))
    splits = [outcome(prepare.Split(test=0.5, seed=s), table)[0] for s in (0, 0, 1)]
    assert splits[0].equals(splits[1])
    assert not splits[0].equals(splits[2])


@given(groups=st.lists(st.integers(0, 8) | st.none(), min_size=40, max_size=60))
@settings(max_examples=20, deadline=None)
def test_no_group_is_in_two_splits(groups):
    table = numbered(pl.DataFrame({"g": groups}, schema={"g": pl.Int64}))
    step = prepare.SplitByGroup(test=0.3, validation=0.2, group="g")
    if table["g"].n_unique() < 3:
        with pytest.raises(DataError, match="fewer than splits"):
            outcome(step, table)
        return
    split, _ = outcome(step, table)
    assert split.group_by("g").agg(pl.col(SPLIT).n_unique())[SPLIT].max() == 1
    assert set(split[SPLIT]) >= {"test"}


def test_the_latest_rows_are_the_test_and_rows_of_one_time_stay_together():
    days = ["2020-01-01", "2020-01-03", "2020-01-02", "2020-01-03", None]
    column = pl.Series(days).str.to_date()
    table = numbered(pl.DataFrame({"day": column}))
    step = prepare.SplitByTime(test=0.25, validation=0.25, column="day")
    split, notes = outcome(step, table)
    expected = ["train", "test", "validation", "test", "train"]
    assert split[SPLIT].to_list() == expected
    assert notes.select("action", ROW).rows() == [("flagged", 4)]
    at = prepare.SplitAt("day", test="2020-01-03", validation="2020-01-02")
    assert outcome(at, table)[0][SPLIT].to_list() == expected


def test_a_split_by_hash_moves_no_row_when_rows_come():
    table = numbered(pl.DataFrame({"user": [f"u{n}" for n in range(3000)]}))
    step = prepare.SplitByHash(test=0.2, columns="user")
    small, _ = outcome(step, table.head(500))
    large, _ = outcome(step, table.reverse())
    joined = small.join(large, on="user", suffix="_later")
    assert (joined[SPLIT] == joined[f"{SPLIT}_later"]).all()
    assert abs(sizes(large)["test"] - 600) < 3 * np.sqrt(3000 * 0.16)


def test_files_of_training_and_of_test_keep_their_roles():
    parts = [numbered(pl.DataFrame({"x": [1, 2]}), source) for source in range(3)]
    step = prepare.SplitBySource(test=[2], validation=[1])
    split, _ = outcome(step, pl.concat(parts))
    assert split[SPLIT].to_list() == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2


def test_rows_are_split_once():
    table = numbered(pl.DataFrame({"x": [1]})).with_columns(pl.lit("a").alias(SPLIT))
    with pytest.raises(DataError, match=r"'lepton.split' already"):
        prepare.Split(test=0.5).check(table.schema)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prepare.Split(), "both 0"),
        (lambda: prepare.Split(test=0.7, validation=0.4), "validation is 0.4"),
        (lambda: prepare.Split(test="a"), "test is 'a'"),
        (lambda: prepare.SplitByGroup(test=0.5), "no name in group"),
        (lambda: prepare.SplitBySource([1], [1]), "source 1 is both"),
        (lambda: prepare.SplitAt("x", test="soon"), "'soon' is no date"),
        (lambda: prepare.SplitAt("x", test=1, validation=2), "begins at 2"),
    ],
)
def test_an_impossible_split_is_an_error(make, message):
    with pytest.raises(DataError, match=message):
        make()


# Samples.


def classes(split=True):
    table = numbered(pl.DataFrame({"y": ["a"] * 900 + ["b"] * 90 + ["c"] * 10}))
    rows = pl.int_range(pl.len()) % 5 == 0
    if split:
        test = pl.when(rows).then(pl.lit("test")).otherwise(pl.lit("train"))
        table = table.with_columns(test.alias(SPLIT))
    return table


def in_split(table, name):
    return table.filter(pl.col(SPLIT) == name)


def fitted_outcome(step, table):
    result = step.run(table.lazy(), fitted(step, [in_split(table, "train")]))
    return result.table.collect(), result.notes.collect()


@pytest.mark.parametrize(
    "step",
    [
        prepare.Sample(0.3),
        prepare.Undersample("y"),
        prepare.Oversample("y"),
        prepare.DropOutliers("row", by="quantile", limit=0.4),
    ],
    ids=str,
)
def test_only_training_rows_are_chosen(step):
    table = classes().with_columns(pl.col(ROW).alias("row"))
    chosen, notes = fitted_outcome(step, table)
    assert in_split(chosen, "test").equals(in_split(table, "test"))
    assert len(in_split(chosen, "train")) != len(in_split(table, "train"))
    assert len(notes)


def test_undersampling_makes_classes_about_as_large_as_the_smallest():
    chosen, notes = fitted_outcome(prepare.Undersample("y", ratio=5), classes())
    counts = dict(in_split(chosen, "train")["y"].value_counts().rows())
    assert counts["c"] == 8
    assert all(abs(counts[name] - 40) < 25 for name in "ab")
    assert notes["reason"].str.starts_with("undersampled").all()


def test_oversampling_makes_classes_about_as_large_as_the_largest():
    chosen, notes = fitted_outcome(prepare.Oversample("y"), classes())
    counts = dict(in_split(chosen, "train")["y"].value_counts().rows())
    assert counts == {"a": 720, "b": 720, "c": 720}
    assert set(notes["reason"]) == {
        "oversampled: stands here 10 times",
        "oversampled: stands here 90 times",
    }
    # The copies follow their row.
    rows = chosen[ROW].to_list()
    assert rows == sorted(rows)


# Selections and expressions.

TABLE = numbered(
    pl.DataFrame(
        {
            "age": [17.0, 18.0, None, float("nan"), 60.0],
            "sex": ["f", "m", "f", None, "x"],
            "capital gain": [0, 7, 3, 3, 49],
        }
    )
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("age >= 18", [False, True, None, None, True]),
        ("16 < age < 20", [True, True, None, None, False]),
        ('sex in ("f", "m")', [True, True, True, None, False]),
        ('sex not in ["x"]', [True, True, True, None, False]),
        ("known(age)", [True, True, False, False, True]),
        ("not known(age) or age > 50", [False, False, True, True, True]),
        ('col("capital gain") / 49', [0.0, 7 / 49, 3 / 49, 3 / 49, 1.0]),
        ('col("capital gain") // 2 % 3', [0, 0, 1, 1, 0]),
        (
            "age / 0 if age > 17 else None",
            [None, float("inf"), None, None, float("inf")],
        ),
        ("first_known(age, -1)", [17.0, 18.0, -1.0, -1.0, 60.0]),
        ('upper(sex) + "!"', ["F!", "M!", "F!", None, "X!"]),
        ('integer(text(col("capital gain"))) ** 2', [0, 49, 9, 9, 2401]),
        ('max(col("capital gain"), 5)', [5, 7, 5, 5, 49]),
        ('age - 1 if sex == "f" else 0', [16.0, 0.0, None, 0.0, 0.0]),
        ("True", [True] * 5),
    ],
)
def test_expressions_mean_what_they_say(text, expected):
    step = prepare.Derive("new", text)
    derived, _ = outcome(step, TABLE)
    values = derived["new"].to_list()
    assert values == expected or values * 5 == expected
    assert derived.schema == step.check(TABLE.schema)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age >=", "can't be parsed"),
        ("sum(age)", "unknown function 'sum'"),
        ("lgo(age)", "did you mean 'log'"),
        ("agee > 3", "no column 'agee'; did you mean 'age'"),
        ("age + sex > 3", "does not fit the columns' types"),
        ('sex > 3 or sex == "a"', "does not fit the columns' types"),
        ("age.real", "not supported"),
        ("[a for a in age]", "not supported"),
        ("(lambda: 1)()", "not supported"),
        ('__import__("os")', "unknown function"),
        ("f'{age}'", "not supported"),
        ("age is None", "not supported"),
        ("1j + age", "constant 1j"),
        ("abs(age, 2)", "abs 2 arguments"),
        ("col(age)", r"has 'col\(age\)'"),
        ("-" * 500 + "age", "deep|parsed"),
        ("age + " * 3000 + "1", "too long"),
    ],
)
def test_an_expression_that_is_none_is_an_error(text, message):
    with pytest.raises(DataError, match=message):
        prepare.Filter(text).check(TABLE.schema)


pieces_of_text = st.sampled_from(
    [
        "age",
        "sex",
        "col",
        "(",
        ")",
        '"',
        "+",
        " and ",
        "<",
        "1",
        "[",
        "if",
        ",",
        "\0",
        ".",
    ]
)


@given(text=st.lists(pieces_of_text, max_size=9).map("".join) | st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_text_makes_an_expression_fail_otherwise_than_with_an_error(text):
    try:
        Expression(None, text).type_on(TABLE.schema)
    except DataError as error:
        assert error.remedy


def test_a_filter_drops_rows_whose_cells_are_missing_and_says_so():
    kept, notes = outcome(prepare.Filter("age >= 18"), TABLE)
    assert kept["age"].to_list() == [18.0, 60.0]
    assert notes.select("reason", "column", "before").rows() == [
        ("not so: age >= 18", "age", "17.0"),
        ("not known, as a cell is missing: age >= 18", "age", None),
        ("not known, as a cell is missing: age >= 18", "age", "NaN"),
    ]
    with pytest.raises(DataError, match="not true or false, but Float64"):
        prepare.Filter("age + 1").check(TABLE.schema)


def test_selections_keep_what_goes_with_each_row():
    selected, _ = outcome(prepare.Select(["sex", "age"]), TABLE)
    assert selected.columns == [SOURCE, ROW, "sex", "age"]
    renamed, _ = outcome(prepare.Rename({"sex": "age", "age": "sex"}), TABLE)
    assert renamed["sex"].to_list()[:2] == [17.0, 18.0]
    for make in (
        lambda: prepare.Drop([ROW]),
        lambda: prepare.Derive(SOURCE, "1"),
        lambda: prepare.Rename({"age": ROW}),
    ):
        with pytest.raises(DataError, match="goes with each row"):
            make()


def test_a_row_comes_out_the_same_alone_as_among_others():
    rng = np.random.default_rng(0)
    table = numbered(pl.DataFrame({"x": rng.normal(size=300), "n": range(300)}))
    steps = [
        prepare.Standardize(["x", "n"]),
        prepare.MinMaxScale(["x", "n"], -1, 3),
        prepare.RobustScale(["x", "n"]),
        prepare.QuantileScale(["x", "n"], onto="normal"),
        prepare.LogScale(["x", "n"], negative="mirror"),
        prepare.Derive("q", "(x + n / 7) / 0.3 + log(n + 1) * x"),
    ]
    for step in steps:
        state = fitted(step, [table])
        among = step.run(table.lazy(), state).table.collect()
        for row in range(0, 300, 60):
            alone = step.run(table[row : row + 1].lazy(), state).table.collect()
            assert alone.equals(among[row : row + 1]), step


# Frozen: a split or a bucket that was made with an older version must not move.
ROW_HASHES = [6915753714881978185, 14350760763201712555, 13267515497689588758]
VALUE_HASHES = [4097470798601056591, 7174006946614125428, 3453158133154847471]
