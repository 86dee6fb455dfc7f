from __future__ import annotations

import datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import applied, cut, fitted, rows

from lepton_jax.data.prepare import Leak, Leaks, leaks, leaks_of
from lepton_jax.data.prepare.dependence import (
    codes_of,
    entropy,
    information,
    share_of_target,
)
from lepton_jax.data.prepare.step import SPLIT
from lepton_jax.errors import DataError


def split_rows(columns: dict, split: list[str]) -> pl.DataFrame:
    return rows({**columns, SPLIT: split})


def found(step: Leaks, table: pl.DataFrame) -> list[Leak]:
    return leaks_of(fitted(step, [table]))


def of_kind(step: Leaks, table: pl.DataFrame, kind: str) -> list[Leak]:
    return [leak for leak in found(step, table) if leak.kind == kind]


TWO = ["train", "train", "test", "test"]


def test_rows_that_are_equal_in_the_inputs_across_splits_are_found():
    table = split_rows({"x": [1, 2, 2, 3], "y": [0, 1, 0, 1]}, TWO)
    (leak,) = found(Leaks(target="y"), table)
    assert leak.kind == "duplicates"
    assert leak.count == 1 and leak.share == 0.5
    assert leak.examples == ("0:1 and 0:2",)
    assert found(Leaks(), table) == []  # the targets differ
    assert len(found(Leaks(inputs=["y"]), table)) == 1


def test_equal_rows_within_a_split_are_no_leak():
    table = split_rows({"x": [1, 1, 2, 2]}, TWO)
    assert found(Leaks(), table) == []


def test_each_pair_of_splits_is_compared():
    table = split_rows({"x": [1, 1, 1]}, ["validation", "train", "test"])
    whats = [leak.what for leak in found(Leaks(), table)]
    assert [what.partition(" in the")[0] for what in whats] == [
        "rows of 'test' equal rows of 'train'",
        "rows of 'validation' equal rows of 'train'",
        "rows of 'validation' equal rows of 'test'",
    ]


def test_texts_that_are_alike_across_splits_are_found():
    text = "the quick brown fox jumps over the lazy dog and runs into the wood"
    texts = [text, "something else altogether, which is longer", text + "!", text + "?"]
    table = split_rows({"text": texts}, TWO)
    (leak,) = found(Leaks(near="text"), table)
    assert leak.kind == "near_duplicates" and leak.column == "text"
    assert leak.examples == ("0:0 and 0:2", "0:0 and 0:3")


def test_groups_on_both_sides_are_counted_and_missing_ones_are_none():
    table = split_rows(
        {"who": ["a", None, "a", None, "a", "b"], "x": range(6)},
        ["train", "train", "test", "test", "test", "test"],
    )
    (leak,) = found(Leaks(group="who"), table)
    assert leak.kind == "groups"
    assert leak.count == 1 and leak.share == 0.5
    assert leak.examples == ("0:0 and 0:2",)


@pytest.mark.parametrize("kind", ["date", "number"])
def test_training_rows_after_the_first_of_another_split_are_found(kind):
    day = datetime.date(2026, 1, 1)
    days = [day + datetime.timedelta(days=n) for n in (0, 5, 3, 9)]
    when = days if kind == "date" else [0.0, 5.0, 3.0, 9.0]
    table = split_rows({"when": when}, TWO)
    (leak,) = found(Leaks(time="when"), table)
    assert leak.kind == "time" and leak.examples == ("0:1",)
    in_order = split_rows({"when": sorted(when)}, TWO)
    assert found(Leaks(time="when"), in_order) == []


def labelled(count: int, classes: int = 2) -> dict:
    """Return columns of all sorts next to a label."""
    random = np.random.default_rng(0)
    label = random.integers(0, classes, count)
    noise = random.normal(size=count)
    flipped = np.where(random.random(count) < 0.2, 1 - label, label)
    return {
        "label": label,
        "copy": [f"class {number}" for number in label],
        "score": label * 10.0 + noise,
        "twice": label * 2,
        "hint": flipped,
        "noise": noise,
        "many": random.integers(0, count // 4, count).astype(str),
        "id": [f"id-{number}" for number in range(count)],
        "constant": ["c"] * count,
        "gaps": [None if number else "there" for number in label],
    }


@pytest.mark.parametrize("count", [60, 1000])
def test_columns_that_give_the_target_away_are_found_and_no_others(count):
    table = split_rows(labelled(count), ["train"] * count)
    leaks = of_kind(Leaks(target="label"), table, "target")
    names = {leak.column for leak in leaks}
    assert names == {"copy", "score", "twice", "gaps"}
    assert all(leak.share > 0.9 for leak in leaks)


def test_a_target_that_is_a_number_is_binned():
    random = np.random.default_rng(1)
    price = random.normal(size=2000)
    columns = {
        "price": price,
        "cents": price * 100,
        "other": price + 2 * random.normal(size=2000),
    }
    table = split_rows(columns, ["train"] * 2000)
    leaks = of_kind(Leaks(target="price"), table, "target")
    assert [leak.column for leak in leaks] == ["cents"]


def test_the_targets_dependence_is_that_of_the_training_split():
    columns = labelled(400)
    columns = {"label": columns["label"], "copy": columns["copy"]}
    columns["copy"] = columns["copy"][:200] + ["?"] * 200
    table = split_rows(columns, ["train"] * 200 + ["test"] * 200)
    assert len(of_kind(Leaks(target="label"), table, "target")) == 1


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("duplicates", Leaks(inputs=["x"], error=["duplicates"])),
        ("groups", Leaks(group="x", error=["groups", "time"])),
        ("target", Leaks(target="y", error=["target"])),
    ],
)
def test_a_kind_that_is_named_is_an_error_with_examples_and_a_remedy(kind, step):
    count = 100
    columns = {"x": [n % 2 for n in range(count)], "y": [n % 2 for n in range(count)]}
    table = split_rows(columns, ["train"] * 60 + ["test"] * 40)
    with pytest.raises(DataError) as caught:
        fitted(step, [table])
    assert caught.value.where == f"Leaks: {kind}"
    assert f"take {kind!r} out of Leaks.error" in caught.value.remedy


def test_the_rows_go_through_unchanged():
    table = split_rows({"x": [1, 2, 2, 3]}, TWO)
    kept, notes = applied(Leaks(), table)
    assert kept.equals(table) and notes is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 100), max_size=4),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_pieces_in_any_order_and_grouping_give_the_same_alarms(bounds, seed, random):
    count = 40
    columns = labelled(count)
    chosen = np.random.default_rng(seed).choice(["train", "test"], count)
    table = split_rows(columns, list(chosen))
    step = Leaks(
        target="label",
        inputs=["twice", "copy"],
        near="copy",
        group="many",
        time="noise",
    )
    whole = fitted(step, [table])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaks, "SAMPLE", 10)
        sampled = fitted(step, [table])
        partials = [
            step.partial(piece.lazy()).collect() for piece in cut(table, bounds)
        ]
        random.shuffle(partials)
        merged = step.merge([step.merge(partials[:2]), *partials[2:]])
        assert step.finish(merged).equals(sampled)
    assert fitted(step, cut(table, bounds)).equals(whole)


def test_wrong_arguments_are_errors():
    split = rows({"x": [1], SPLIT: ["train"]}).schema
    with pytest.raises(DataError, match="no splits"):
        Leaks().check(rows({"x": [1]}).schema)
    with pytest.raises(DataError, match="did you mean 'groups'"):
        Leaks(error=["group"]).check(split)
    for step in (Leaks(target="z"), Leaks(near="x"), Leaks(inputs=["z"])):
        with pytest.raises(DataError):
            step.check(split)


def test_information_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra recipes")
    random = np.random.default_rng(3)
    one = random.integers(0, 5, 500)
    other = (one + random.integers(0, 3, 500)) % 4
    expected = metrics.mutual_info_score(one, other) / np.log(2)
    assert information(one, other) == pytest.approx(expected, abs=1e-12)
    assert entropy(one) == pytest.approx(information(one, one), abs=1e-12)
    adjusted = metrics.adjusted_mutual_info_score(one, other, average_method="min")
    assert share_of_target(one, other) == pytest.approx(adjusted, abs=0.05)


def test_numbers_are_binned_into_equal_parts_and_missing_ones_apart():
    values = [*range(100), None]
    codes = codes_of(values, bins=4)
    assert np.bincount(codes).tolist() == [25, 25, 25, 25, 1]
    assert codes_of([1.0, 2.0, None, 1.0], bins=4).tolist() == [0, 1, 2, 0]
    assert codes_of(["a", None, ""], bins=4).tolist() == [2, 0, 1]
