"""The raw rows of a split, read again for a baseline or a report."""

from functools import partial

import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax.baselines import Baseline, Samples
from lepton_jax.data.readers import reader_of
from lepton_jax.errors import DataError

pl = pytest.importorskip("polars", reason="pip install 'lepton-jax[data]'")
prepare = pytest.importorskip("lepton_jax.data.prepare")

ROWS = 120


def people(first):
    numbers = np.arange(first, first + ROWS)
    ages = [None if i % 10 == 3 else float(i) for i in numbers]
    words = ["yes" if i % 3 else "no" for i in numbers]
    return pl.DataFrame({"name": [f"n{i}" for i in numbers], "age": ages, "y": words})


@pytest.fixture
def serving(tmp_path):
    preparation = prepare.Preparation(
        {"one": people(0), "two": people(ROWS)},
        [
            prepare.DropMissing("age"),
            prepare.Split(test=0.3, stratify="y"),
            prepare.Standardize("age"),
            prepare.AsFloats("age"),
            prepare.Classes("y"),
        ],
        inputs=["age"],
        target="y",
    )
    return prepare.Serving(prepare.prepare(preparation, tmp_path / "made"), ["age"])


def test_the_raw_rows_of_a_split_stand_in_its_order(serving):
    test = serving.split("test")
    raw = serving.raw_rows(test)
    assert raw.columns == ["name", "age", "y"] and raw.height == len(test)
    # the prepared age rises with the raw one, whatever it was standardized by
    assert (np.argsort(test.inputs[:, 0]) == raw["age"].arg_sort().to_numpy()).all()
    words = [serving.words[number] for number in test.targets]
    assert raw["y"].to_list() == words
    some = serving.raw_rows(test, np.array([5, 2]))
    assert some["name"].to_list() == raw["name"].gather([5, 2]).to_list()


def test_arrays_of_another_origin_and_opened_folders_have_none(serving, tmp_path):
    assert serving.raw_rows(lepton.data.Arrays(np.zeros(3))) is None
    opened = prepare.open_prepared(tmp_path / "made")
    assert opened.raw_rows("test") is None


def test_a_baseline_sees_the_raw_rows_and_is_told_where_there_are_none(serving):
    seen = {}

    def looks(train: Samples, test: Samples) -> Baseline:
        seen["train"] = train.raw()["name"].to_list()
        seen["test"] = test.raw(np.array([1]))["y"].to_list()
        return Baseline("looks", "", values={"accuracy": np.ones(len(test))})

    recipe = lepton.Recipe(
        model=partial(lepton.models.MLP, (1, 2)),
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.sgd(0.1),
        train=serving.split("train"),
        test=serving.split("test"),
        preparation=serving,
        baseline=looks,
        steps=1,
        batch_size=8,
    )
    trainer = lepton.Trainer(recipe)
    (comparison,) = trainer.baseline()
    assert not comparison.failed
    assert len(seen["train"]) == len(recipe.train)
    assert seen["test"] == [serving.words[recipe.test.targets[1]]]
    plain = Samples(np.zeros(2), np.zeros(2), 2)
    with pytest.raises(DataError, match="not known"):
        plain.raw()


def test_a_source_that_is_gone_is_an_error_that_says_so(tmp_path):
    path = tmp_path / "people.csv"
    people(0).write_csv(path)
    preparation = prepare.Preparation(
        {"people": reader_of(path)},
        [prepare.Split(test=0.3), prepare.AsFloats("age"), prepare.Classes("y")],
        inputs=["age"],
        target="y",
    )
    made = prepare.prepare(preparation, tmp_path / "made")
    assert made.raw_rows("test").height == round(0.3 * ROWS)
    path.unlink()
    with pytest.raises(DataError):
        made.raw_rows("test")
