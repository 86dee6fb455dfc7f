"""Folds: each row is the test once, whatever the classes, groups and pieces."""

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stepping import cut, fitted, rows

from lepton_jax.data import prepare
from lepton_jax.data.prepare.step import SPLIT
from lepton_jax.data.prepare.steps import folding
from lepton_jax.data.readers.reader import ROW
from lepton_jax.errors import DataError

VALUES = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=20, max_size=60)


def splits(make, table, folds):
    """The split of each row in each fold: strings (folds, rows)."""
    found = []
    for fold in range(folds):
        step = make(fold)
        state = fitted(step, [table])
        found.append(step.run(table.lazy(), state).table.collect()[SPLIT].to_numpy())
    return np.array(found)


@given(VALUES, st.integers(2, 5), st.sampled_from([0.0, 0.2, 0.4]), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_each_row_is_in_one_test_and_folds_and_classes_are_equal(
    values, folds, validation, seed
):
    table = rows({"y": values})

    def make(fold):
        return prepare.Split(
            validation=validation, stratify="y", seed=seed, folds=folds, fold=fold
        )

    found = splits(make, table, folds)
    is_test = found == "test"
    assert (is_test.sum(axis=0) == 1).all()
    sizes = is_test.sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    for value in set(values):
        of_class = np.array([one == value for one in values])
        counts = is_test[:, of_class].sum(axis=1)
        assert counts.max() - counts.min() <= 1
    validated = (found == "validation").sum(axis=1)
    room = len(values) - sizes
    assert (np.abs(validated - np.minimum(validation * len(values), room)) <= 4).all()
    assert (found == "train").any(axis=1).all()


@given(st.lists(st.integers(0, 12), min_size=30, max_size=80), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_a_group_is_never_torn_and_folds_have_about_as_many_rows(groups, folds):
    assume(len(set(groups)) > 6)
    assume(max(groups.count(group) for group in groups) < 0.3 * len(groups))
    table = rows({"g": groups})

    def make(fold):
        return prepare.SplitByGroup(
            group="g", validation=0.1, folds=folds, fold=fold, seed=1
        )

    found = splits(make, table, folds)
    assert ((found == "test").sum(axis=0) == 1).all()
    for group in set(groups):
        members = found[:, np.array(groups) == group]
        assert (members == members[:, :1]).all()
    largest = max(groups.count(group) for group in set(groups))
    sizes = (found == "test").sum(axis=1)
    assert sizes.max() - sizes.min() <= largest
    assert (found == "train").any(axis=1).all()


@given(VALUES, st.lists(st.integers(0, 60), max_size=3))
@settings(max_examples=20, deadline=None)
def test_folds_do_not_depend_on_how_the_rows_are_read(values, bounds):
    table = rows({"y": values})
    for step in (
        prepare.Split(folds=3, fold=1, stratify="y", validation=0.2),
        prepare.Split(folds=5, fold=4),
    ):
        assert fitted(step, [table]).equals(fitted(step, cut(table, bounds)))


def test_a_split_by_hash_keeps_values_in_their_fold_when_rows_come():
    few = rows({"user": [f"u{i % 200}" for i in range(400)]})
    more = rows({"user": [f"u{i % 300}" for i in range(900)]})
    tests = []
    for fold in range(4):
        step = prepare.SplitByHash(columns="user", folds=4, fold=fold, validation=0.3)
        users = {}
        for name, table in (("few", few), ("more", more)):
            split = step.run(table.lazy(), None).table.collect()
            users[name] = set(split.filter(pl.col(SPLIT) == "test")["user"])
            shares = split[SPLIT].value_counts(normalize=True)
            assert shares.filter(pl.col(SPLIT) == "validation")["proportion"][0] > 0.15
        assert users["few"] == users["more"] & set(few["user"])
        tests.append(users["more"])
    assert set.union(*tests) == set(more["user"])
    assert sum(map(len, tests)) == 300


def test_the_folds_of_a_table_stay_as_they_were():
    # Frozen: a model that was judged on a fold must be judged on it again.
    table = rows({"y": ["a", "b"] * 6})
    split = splits(lambda i: prepare.Split(folds=3, fold=i, stratify="y"), table, 3)
    numbers = [table[ROW].to_numpy()[row == "test"].tolist() for row in split]
    assert numbers == FROZEN


FROZEN = [[1, 4, 7, 8], [0, 5, 6, 11], [2, 3, 9, 10]]


def test_a_run_that_ends_goes_on_at_the_first_row_and_groups_fill_the_smallest_fold():
    assert folding.after(folding.Run(8, 10), 10, 3) == [(10, 10), (0, 3)]
    assert folding.after(folding.Run(0, 5), 6, 9) == [(5, 6), (0, 0)]
    assert folding.of_groups(np.array([5, 3, 2, 2]), 2).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prepare.Split(folds=1), "folds is 1"),
        (lambda: prepare.Split(folds=5, fold=5), "fold is 5 of 5"),
        (lambda: prepare.Split(test=0.2, fold=2), "no folds"),
        (lambda: prepare.Split(test=0.2, folds=5), "both test=0.2 and folds=5"),
        (lambda: prepare.Split(validation=0.8, folds=5), "nothing to train on"),
        (lambda: prepare.SplitByHash(columns="a", folds=2.0), "folds is 2.0"),
        (
            lambda: fitted(prepare.Split(folds=5), [rows({"a": [1, 2]})]),
            "2 rows for 5",
        ),
        (
            lambda: fitted(
                prepare.SplitByGroup(group="a", folds=3), [rows({"a": [1, 1, 2]})]
            ),
            "2 groups for 3",
        ),
    ],
)
def test_impossible_folds_are_an_error(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_a_group_that_is_torn_by_folds_is_an_alarm_and_one_that_is_whole_is_none(
    tmp_path,
):
    table = pl.DataFrame({"g": [i // 3 for i in range(30)], "x": range(30)})
    alarm = prepare.Leaks(inputs=["x"], group="g", error=["groups"])

    def run(split, folder):
        preparation = prepare.Preparation(
            {"table": table}, [split, alarm], inputs=["x"], target="g"
        )
        return prepare.prepare(preparation, tmp_path / folder)

    with pytest.raises(DataError, match="'g'"):
        run(prepare.Split(folds=3, fold=1), "torn")
    whole = run(prepare.SplitByGroup(group="g", folds=3, fold=1), "whole")
    assert not [leak for leak in prepare.leaks_in(whole) if leak.kind == "groups"]
