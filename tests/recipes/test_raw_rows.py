"""The recipes on raw files: what is counted, and what a saved model predicts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from recipes import (
    click_through,
    csv_mlp,
    image_classifier,
    lm,
    mnist_mlp,
    text_classifier,
    two_tower,
)
from tools import raw_rows

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
has_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")


def manifest(recipe) -> dict:
    return recipe.preparation.prepared.manifest


def missing(recipe) -> dict[str, int]:
    """Missing cells of each column that has some, of all sources."""
    counts: dict[str, int] = {}
    for source in manifest(recipe)["sources"]:
        for column in source["columns"]:
            if column["missing"]:
                before = counts.get(column["name"], 0)
                counts[column["name"]] = before + column["missing"]
    return counts


def rows(recipe) -> dict[str, int]:
    return {name: split["rows"] for name, split in manifest(recipe)["splits"].items()}


@has_data
def test_adult_is_counted_exactly(capsys):
    recipe = csv_mlp.recipe(
        data=DATA / "adult" / "adult.data.gz",
        test=DATA / "adult" / "adult.test.gz",
        test_skip=1,
        label="column_15",
        label_end=".",
    )
    assert rows(recipe) == {"train": 32_561, "test": 16_281}
    assert missing(recipe) == {
        "column_2": 1836 + 963,
        "column_7": 1843 + 966,
        "column_14": 583 + 274,
    }
    said = capsys.readouterr().err
    assert "train: 24 duplicate rows" in said
    assert "test: 5 duplicate rows" in said
    assert recipe.preparation.words == ("<=50K", ">50K")
    words = [recipe.preparation.decode([label])[0] for label in (0, 1)]
    assert words == ["<=50K", ">50K"]


@has_data
def test_titanic_is_counted_exactly():
    recipe = csv_mlp.recipe(
        data=DATA / "titanic" / "titanic.csv",
        label="Survived",
        ignore="PassengerId,Name,Ticket",
    )
    assert missing(recipe) == {"Age": 177, "Cabin": 687, "Embarked": 2}
    assert sum(rows(recipe).values()) == 891


@has_data
def test_criteo_and_movielens_are_counted_exactly():
    clicks = click_through.recipe(
        data=DATA / "criteo_sample" / "train.tiny.csv",
        label="Label",
        ignore="Id",
    )
    assert sum(rows(clicks).values()) == 1999
    share = sum(missing(clicks).values()) / (1999 * 39)
    assert share == pytest.approx(0.14, abs=0.01)
    ratings = two_tower.recipe(data=DATA / "movielens_latest_small" / "ratings.csv")
    assert sum(rows(ratings).values()) == 100_004
    model = ratings.model.keywords
    assert model["users"] == 671 + 1
    assert model["items"] <= 9066 + 1, "those of the training ratings"


@has_data
def test_texts_and_images_are_counted_exactly():
    pytest.importorskip("PIL", reason="pip install 'lepton-jax[image]'")
    texts = text_classifier.recipe(
        data=DATA / "rt_polarity" / "sentence_polarity.zip",
    )
    assert sum(rows(texts).values()) == 2 * 5331
    assert len(texts.preparation.words) == 2
    images = image_classifier.recipe(
        data=DATA / "cats_dogs_subset" / "cats_dogs_600.tar",
        size=16,
    )
    assert rows(images) == {"train": 480, "test": 120}
    assert images.preparation.words == ("cat", "dog")
    story = lm.recipe(text=DATA / "tinyshakespeare" / "input.txt")
    assert story.model.keywords["vocab"] == 65


@has_data
@pytest.mark.slow
def test_mnist_is_counted_exactly():
    digits = mnist_mlp.recipe(data=DATA / "mnist")
    assert rows(digits) == {"train": 60_000, "test": 10_000}


def test_raw_rows_of_a_table_in_a_fresh_process_get_the_trainers_bits(tmp_path):
    with open(tmp_path / "people.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["age", "pay", "since", "job", "rich"])
        for i in range(90):
            pay = "n/a" if i % 9 == 0 else f"1.{100 + i},5"
            day = f"2021-0{1 + i % 9}-11"
            rich = ["no", "yes"][i % 3 > 1]
            writer.writerow([20 + i % 50, pay, day, f"job {i % 4}", rich])
    case = raw_rows.Case("csv_mlp", "people.csv", {"label": "rich"})
    assert "72 raw rows" in raw_rows.check(case, tmp_path)
    recipe = csv_mlp.recipe(data=tmp_path / "people.csv", label="rich")
    assert recipe.preparation.words == ("no", "yes"), "the file's own words"
    row = {"age": 30, "pay": None, "since": "2021-03-11", "job": "job 9"}
    inputs = recipe.preparation.arrays(row)
    assert inputs["categories"].tolist() == [[0]]


@has_data
@pytest.mark.slow
@pytest.mark.parametrize("case", raw_rows.CASES, ids=lambda case: case.recipe)
def test_raw_rows_of_each_recipe_get_the_trainers_bits(case):
    assert "outputs equal" in raw_rows.check(case, DATA)
