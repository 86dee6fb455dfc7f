"""The recipe for tables on files of a person's own: good ones, and bad ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pytest

import lepton_jax as lepton
from lepton_jax.errors import LeptonError
from recipes import csv_mlp, table

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 80
DRAW = np.random.default_rng(0)
CHANCE = DRAW.random(10_000)
AMOUNT = DRAW.normal(size=10_000).round(4)


def yes_or_no(i):
    return "yes" if CHANCE[i] > 0.5 else "no"


def quantity(i):
    return i * 1.25 + 3


def lines(y, a=lambda i: AMOUNT[i], b=lambda i: "pqr"[i % 3], rows=ROWS):
    return ["a,b,y", *(f"{a(i)},{b(i)},{y(i)}" for i in range(rows))]


@pytest.fixture
def write(tmp_path):
    def write(text, name="t.csv"):
        path = tmp_path / name
        path.write_text("\n".join(text) + "\n")
        return path

    return write


@pytest.fixture
def people(tmp_path):
    """A table with two quantities, two labels with classes, a count and a group."""
    rows = 300
    draw = np.random.default_rng(1)
    age = draw.normal(40, 10, rows).round(1)
    job = draw.choice(["clerk", "cook", "smith"], rows)
    frame = pl.DataFrame(
        {
            "age": age,
            "job": job,
            "pay": 1000 * age + draw.normal(size=rows),
            "share": 0.01 * (job == "cook") + 0.001 * draw.normal(size=rows),
            "happy": np.where(draw.random(rows) > 0.5, "yes", "no"),
            "is cook": np.where(job == "cook", "cook", "other"),
            "calls": draw.poisson(np.exp(0.05 * age - 1)),
            "family": [f"f{i // 3}" for i in range(rows)],
        }
    )
    path = tmp_path / "people.csv"
    frame.write_csv(path)
    return path


INPUTS = ("age", "job")
OTHERS = ("pay", "share", "happy", "is cook", "calls", "family")


def learning(path, label, **settings):
    """The recipe for a label of the people, with the other labels left out."""
    named = {*label.split(","), *settings.get("group", "").split(",")}
    ignore = ",".join(name for name in OTHERS if name not in named)
    small = {"width": 16, "members": 3, "batch_size": 60}
    return table.recipe(data=path, label=label, ignore=ignore, **small, **settings)


# ---- what is learned ----


@pytest.mark.parametrize("model", ["mlp", "resnet", "ft_transformer", "tabm"])
def test_each_model_learns_and_predicts_the_files_own_words(people, model, tmp_path):
    recipe = learning(people, "is cook", model=model, steps=100, learning_rate=0.02)
    trainer = lepton.Trainer(recipe, devices=1)
    history = trainer.fit()
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    trainer.save(tmp_path / "model")
    opened = lepton.Trainer.open(tmp_path / "model")
    row = {"age": 40.0, "job": "cook"}
    assert opened.predict(row, words=True) == ["cook"]
    assert opened.predict({"age": None, "job": "smith"}, words=True) == ["other"]


def test_several_quantities_are_learned_in_units_of_their_own(people):
    recipe = learning(people, "pay,share", steps=150, learning_rate=0.02)
    assert recipe.train.targets.shape[1] == 2
    trainer = lepton.Trainer(recipe, devices=1)
    metrics = trainer.fit().metrics
    spread = recipe.train.targets.std(axis=0)
    assert metrics["rmse_pay"] < 0.5 * spread[0]
    assert metrics["rmse_share"] < 0.5 * spread[1]
    ((pay, share),) = trainer.predict({"age": 50.0, "job": "cook"}, words=True)
    assert pay == pytest.approx(50_000, rel=0.2)
    assert share == pytest.approx(0.01, abs=0.005)
    again = trainer.evaluate(recipe.preparation.samples(people))
    assert again.rmse_pay < 0.5 * spread[0], "raw rows have all targets"


def test_several_labels_with_classes_are_learned_at_once(people):
    recipe = learning(people, "happy,is cook", steps=100, learning_rate=0.02)
    trainer = lepton.Trainer(recipe, devices=1)
    metrics = trainer.fit().metrics
    assert metrics["accuracy_is_cook"] > 0.95
    ((_, second),) = trainer.predict({"age": 50.0, "job": "cook"}, words=True)
    assert second == "cook"


def test_a_count_is_predicted_as_its_rate(people):
    recipe = learning(
        people,
        "calls",
        label_kind="count",
        steps=60,
        learning_rate=0.02,
    )
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit()
    rates = trainer.predict([{"age": age, "job": "cook"} for age in (30.0, 60.0)])
    assert 0 < rates[0] < rates[1]
    assert rates[1] == pytest.approx(np.exp(2), rel=0.4)


def test_rare_classes_count_as_much_as_frequent_ones(write):
    path = write(lines(lambda i: "rare" if i % 10 == 0 else "often"))
    plain = table.recipe(data=path, label="y")
    balanced = table.recipe(data=path, label="y", class_weights="balanced")
    assert "f1" in balanced.metrics
    outputs = np.zeros((10, 2), np.float32)
    targets = np.arange(10) // 9  # nine of class 0, one of class 1
    weights = np.asarray(balanced.loss(outputs, targets)[1])
    assert weights[:9].sum() == pytest.approx(float(weights[9]), rel=0.1)
    assert np.shape(plain.loss(outputs, targets)) == (10,)


def test_frequent_words_of_a_text_are_inputs(write):
    names = ("Ann, Mrs. Lee", "Bo 'Al', mr. Lee", "Cy, Mrs. Ek", "")
    path = write(lines(yes_or_no, b=lambda i: f'"{names[i % 4]}"'))
    recipe = table.recipe(data=path, label="y", words="b")
    assert "categories" not in recipe.train.inputs
    rows = [
        {"a": 1.0, "b": "Di, MRS. Lee", "y": None},
        {"a": 1.0, "b": "Mrs.Lee", "y": None},
        {"a": 1.0, "b": None, "y": None},
    ]
    found = recipe.preparation.arrays(rows)["numbers"]
    # the words with as many rows are in the order of their characters
    assert found[0, 1:].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert found[1, 1:].tolist() == [0] * 8
    assert np.isnan(found[2, 1:]).all(), "what is not known is missing"


# ---- who is held out ----


def test_a_group_is_held_out_as_a_whole_and_is_no_input(people):
    recipe = learning(people, "happy", group="family")
    serving = recipe.preparation
    train = serving.raw_rows(recipe.train)["family"]
    test = serving.raw_rows(recipe.test)["family"]
    assert not set(train) & set(test)
    assert "family" not in serving.needed


def test_each_row_is_tested_in_one_fold(people):
    tested = []
    for fold in range(3):
        recipe = learning(people, "happy", folds=3, fold=fold)
        assert len(recipe.train) + len(recipe.test) == 300
        tested += recipe.preparation.raw_rows(recipe.test)["age"].to_list()
    assert sorted(tested) == sorted(pl.read_csv(people)["age"].to_list())


def test_a_run_that_stops_early_never_looks_at_the_test_rows(people):
    whole = learning(people, "happy")
    recipe = learning(people, "happy", validation=0.2, patience=2)
    seen = recipe.preparation.raw_rows(whole.test)
    assert seen is None, "they are samples of another preparation"
    assert len(recipe.test) == 60
    assert len(recipe.train) == 180
    assert [policy.name for policy in recipe.controller] == ["early_stopping"]
    of_test = whole.preparation.raw_rows(whole.test)["age"].to_list()
    of_validation = recipe.preparation.raw_rows(recipe.test)["age"].to_list()
    assert of_test != of_validation


# ---- csv_mlp ----


def test_csv_mlp_is_the_table_recipe_with_its_own_settings(people):
    ignore = ",".join(OTHERS[:2] + OTHERS[3:])
    recipe = csv_mlp.recipe(data=people, label="happy", ignore=ignore)
    same = table.recipe(
        data=people,
        label="happy",
        ignore=ignore,
        model="mlp",
        batch_size=128,
        epochs=20,
    )
    assert recipe.name == "csv_mlp"
    assert recipe.model.func is lepton.models.TabularMLP
    assert recipe.model.keywords == same.model.keywords
    assert recipe.model.keywords["hidden"] == (256, 128)
    assert (recipe.epochs, recipe.batch_size) == (20, 128)
    steps = np.arange(0, 40, 5)
    rates = [recipe.learning_rate(step) for step in steps]
    np.testing.assert_allclose(rates, [same.learning_rate(step) for step in steps])


# ---- bad files ----


@dataclass
class Case:
    """A file, and what is said of it: an error, or a line on the terminal."""

    name: str
    lines: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    says: str = ""
    rows: int = ROWS
    test: list[str] | None = None


def two_labels(i):
    return f"{AMOUNT[i]},{'pqr'[i % 3]},{quantity(i)},t{i % 2}"


CASES = [
    Case(
        "targets that are missing",
        lines(lambda i: "NaN" if i % 8 == 0 else quantity(i)),
        rows=70,
        says="DropMissing: 80 -> 70 rows",
    ),
    Case(
        "a quantity without end",
        lines(lambda i: "inf" if i == 9 else quantity(i)),
        error="inf in row 9",
    ),
    Case(
        "a quantity that float32 can't hold",
        lines(lambda i: 1e300 * (i - 40)),
        error="which is no quantity",
    ),
    Case("one class", lines(lambda i: "yes"), error="has one value, 'yes'"),
    Case("a missing label", lines(yes_or_no), {"label": "z"}, "no column 'z'"),
    Case(
        "a misspelled label",
        [line.replace(",y", ",income", 1) for line in lines(lambda i: i % 2)],
        {"label": "incom"},
        "did you mean 'income'",
    ),
    Case("no label", lines(yes_or_no), {"label": ""}, "there is no label"),
    Case("the label twice", lines(yes_or_no), {"label": "y,y"}, "named twice"),
    Case("an ignored label", lines(yes_or_no), {"ignore": "y"}, "named twice"),
    Case(
        "a class with one row",
        lines(lambda i: "rare" if i == 5 else yes_or_no(i)),
        says="Classes: 80 -> ",
    ),
    Case(
        "a class for each row",
        lines(lambda i: f"id{i}"),
        error="a class of its own",
    ),
    Case("a constant number", lines(yes_or_no, a=lambda i: 4)),
    Case("a constant category", lines(yes_or_no, b=lambda i: "p")),
    Case(
        "nothing but constants",
        lines(yes_or_no, a=lambda i: 4, b=lambda i: "p"),
        says="rows of 'test' equal rows of 'train'",
    ),
    Case(
        "a column without a value",
        lines(yes_or_no, a=lambda i: ""),
        says="column 'a' is left out: it has no value",
    ),
    Case(
        "no column with a value",
        lines(yes_or_no, a=lambda i: "", b=lambda i: "?"),
        error="no column is left to predict from",
    ),
    Case(
        "a column that gives the label away",
        lines(yes_or_no, b=lambda i: f"is {yes_or_no(i)}"),
        says="'b' gives away 100%",
    ),
    Case(
        "rows on both sides",
        lines(yes_or_no, a=lambda i: i % 4, b=lambda i: "p"),
        says="rows of 'test' equal rows of 'train'",
    ),
    Case(
        "ten thousand categories",
        lines(yes_or_no, b=lambda i: f"c{i}", rows=10_000),
        rows=10_000,
    ),
    Case(
        "numbers with a unit",
        lines(yes_or_no, a=lambda i: f"{i} kg"),
        error="is a number with 'kg'",
    ),
    Case(
        "dates as labels",
        lines(lambda i: f"2021-{1 + i % 12:02d}-{1 + i % 28:02d}"),
        error="the label holds dates",
    ),
    Case(
        "labels of two kinds",
        ["a,b,y,z", *map(two_labels, range(ROWS))],
        {"label": "y,z"},
        "'y' is taken for quantity, 'z' for classes",
    ),
    Case(
        "a text among quantities",
        ["a,b,y,z", *map(two_labels, range(ROWS))],
        {"label": "y,z", "label_kind": "quantity"},
        "the label holds no numbers",
    ),
    Case(
        "negative counts",
        lines(lambda i: i % 5 - 1),
        {"label_kind": "count"},
        "-1 in row 0, which is no count; so do 16 rows",
    ),
    Case(
        "counts with fractions",
        lines(lambda i: i % 5 + 0.5),
        {"label_kind": "count"},
        "which is no count",
    ),
    Case("words of no column", lines(yes_or_no), {"words": "c"}, "no column 'c'"),
    Case("words of the label", lines(yes_or_no), {"words": "y"}, "named twice"),
    Case("words of numbers", lines(yes_or_no), {"words": "a"}),
    Case("no rows", ["a,b,y"], error="no rows"),
    Case("a short row", [*lines(yes_or_no), "1,2"], error="expected 3 cells"),
    Case("an unknown group", lines(yes_or_no), {"group": "g"}, "no column 'g'"),
    Case(
        "one group",
        lines(yes_or_no, b=lambda i: "p"),
        {"group": "b"},
        "fewer than splits",
    ),
    Case("a sixth of five folds", lines(yes_or_no), {"folds": 5, "fold": 5}, "fold is"),
    Case(
        "more folds than rows",
        lines(yes_or_no, rows=4),
        {"folds": 10},
        "4 rows for 10 folds",
    ),
    Case(
        "weights of no classes",
        lines(quantity),
        {"class_weights": "balanced"},
        "has no classes to weigh",
    ),
    Case(
        "stopping by the test rows",
        lines(yes_or_no),
        {"patience": 3},
        "too good",
    ),
    Case(
        "a label that training never showed",
        lines(yes_or_no),
        test=lines(lambda i: "never" if i == 3 else yes_or_no(i)),
        rows=2 * ROWS - 1,
        says="Classes: 160 -> 159 rows",
    ),
    Case(
        "a test table without the label",
        lines(yes_or_no),
        test=[line.rpartition(",")[0] for line in lines(yes_or_no)],
        error="the test table has no label 'y'",
    ),
    Case(
        "a test table with words for numbers",
        lines(yes_or_no),
        test=["a,b,y", *(f"x{line}" for line in lines(yes_or_no)[1:])],
        rows=2 * ROWS,
        says="a: 80 are no Float64",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_bad_table_is_an_error_or_is_counted(case, write, capsys):
    settings = {"label": "y", **case.settings}
    if case.test is not None:
        settings["test"] = write(case.test, "test.csv")
    make = partial(table.recipe, data=write(case.lines), **settings)
    if case.error:
        with pytest.raises(LeptonError) as caught:
            make()
        assert case.error in str(caught.value)
        assert caught.value.remedy
        return
    recipe = make()
    said = capsys.readouterr().err
    assert case.says in said
    if case.name != "a class with one row":
        assert len(recipe.train) + len(recipe.test) == case.rows
