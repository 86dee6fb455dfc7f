"""Raw row in, prediction out: a saved model prepares rows as training did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import optax
import polars as pl
import pytest

import lepton_jax as lepton
from lepton_jax.data.prepare import Preparation, prepare
from lepton_jax.data.prepare.serving import Serving
from lepton_jax.data.prepare.steps.categories import Classes, Vocabulary
from lepton_jax.data.prepare.steps.missing import FillMissing
from lepton_jax.data.prepare.steps.model_inputs import AsFloats, TrimEnd
from lepton_jax.data.prepare.steps.scaling import Standardize
from lepton_jax.data.prepare.steps.splitting import Split
from lepton_jax.errors import CheckpointError, DataError, LeptonError, ModelError
from tests.data.preparing import Memory

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 300
INPUTS = {"numbers": ["age", "hours"], "categories": ["job"]}


@pytest.fixture(scope="module")
def people() -> pl.DataFrame:
    """People of whom the older ones with some jobs are sick."""
    draw = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "age": draw.integers(17, 90, ROWS),
            "hours": [None if i % 11 == 0 else i % 50 for i in range(ROWS)],
            "job": draw.choice(["clerk", "smith", "cook"], ROWS),
            "note": [f"person {i}" for i in range(ROWS)],
        }
    )
    is_sick = (pl.col("age") > 40) & (pl.col("job") != "clerk")
    sick = pl.when(is_sick).then(pl.lit("yes.")).otherwise(pl.lit("no"))
    return table.with_columns(sick.alias("sick"))


@pytest.fixture(scope="module")
def serving(people, tmp_path_factory) -> Serving:
    preparation = Preparation(
        {"people": Memory(people)},
        [
            Split(test=0.2),
            TrimEnd("sick", "."),
            FillMissing("hours", by="median"),
            Standardize(["age", "hours"]),
            AsFloats(["age", "hours"]),
            Vocabulary("job"),
            Classes("sick"),
        ],
        inputs=["age", "hours", "job"],
        target="sick",
    )
    return Serving(prepare(preparation, tmp_path_factory.mktemp("prepared")), INPUTS)


def recipe(serving: Serving, **fields) -> lepton.Recipe:
    model = partial(
        lepton.models.TabularMLP,
        2,
        edges=((-1.0, 0.0, 1.0),) * 2,
        sizes=(4,),
        hidden=(16,),
    )
    given = {
        "model": model,
        "loss": lepton.losses.cross_entropy,
        "metrics": {"accuracy": lepton.metrics.accuracy},
        "optimizer": optax.adamw,
        "learning_rate": 1e-2,
        "train": serving.split(),
        "test": serving.split("test"),
        "epochs": 10,
        "batch_size": 32,
        "preparation": serving,
    }
    return lepton.Recipe(**(given | fields))


@pytest.fixture(scope="module")
def trainer(serving) -> lepton.Trainer:
    trainer = lepton.Trainer(recipe(serving), devices=1)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def saved(trainer, tmp_path_factory) -> Path:
    return trainer.save(tmp_path_factory.mktemp("saved") / "model")


def logits(outputs):
    return outputs


def test_the_inputs_of_raw_rows_are_those_of_training_to_the_bit(serving, people):
    rows = {
        name: serving.prepared.table(name, traced=True)["lepton.row"].to_list()
        for name in ("train", "test")
    }
    whole = serving.arrays(people.drop("sick"))
    for name, numbers in rows.items():
        samples = serving.split(name).inputs
        for key, values in samples.items():
            np.testing.assert_array_equal(whole[key][numbers], values)
    one_by_one = [serving.arrays(row) for row in people.head(20).to_dicts()]
    for key in INPUTS:
        single = np.concatenate([arrays[key] for arrays in one_by_one])
        np.testing.assert_array_equal(single, whole[key][:20])


def test_all_forms_of_raw_rows_give_the_same_prediction(trainer, people):
    rows = people.drop("sick").head(8)
    expected = trainer.predict(rows, decode=logits)
    forms = [
        rows.to_dicts(),
        rows.to_dict(as_series=False),
        rows.to_pandas(),
        rows.to_arrow(),
        rows.lazy(),
        rows.select("job", "hours", "age"),
        rows.to_pandas().astype({"age": float}),
    ]
    for form in forms:
        np.testing.assert_array_equal(trainer.predict(form, decode=logits), expected)
    first = trainer.predict(rows.row(0, named=True), decode=logits)
    assert first.shape == (1, 2)


def test_arrays_are_still_taken_as_arrays(trainer, serving):
    samples = serving.split("test")
    assert trainer.predict(samples.inputs).shape == (len(samples),)


def test_predictions_have_the_targets_own_words(trainer, people):
    words = trainer.predict(people, words=True)
    right = people["sick"].str.strip_chars_end(".").to_list()
    assert set(words) == {"yes", "no"}
    assert np.mean(np.array(words) == np.array(right)) > 0.9
    assert trainer.evaluate(people).accuracy > 0.9


OPENING = """
import sys, json, numpy as np, polars as pl, lepton_jax as lepton
trainer = lepton.Trainer.open(sys.argv[1], devices=1)
rows = pl.read_parquet(sys.argv[2])
outputs = trainer.predict(rows.to_dicts(), decode=lambda outputs: outputs)
np.save(sys.argv[3], outputs)
print(json.dumps(trainer.predict(rows, words=True)))
"""


def test_a_fresh_process_without_the_recipe_predicts_the_same_bits(
    trainer, saved, people, tmp_path
):
    rows = people.drop("sick").head(200)
    rows.write_parquet(tmp_path / "rows.parquet")
    out = tmp_path / "outputs.npy"
    done = subprocess.run(
        [sys.executable, "-c", OPENING, saved, tmp_path / "rows.parquet", out],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(lepton.__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(out), trainer.predict(rows, decode=logits))
    assert json.loads(done.stdout) == trainer.predict(rows, words=True)


def test_what_is_saved_holds_no_samples_and_no_pickle(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    own = {path.suffix for path in files if "checkpoints" not in path.parts}
    assert own == {".json", ".arrow"}
    profile = json.loads((saved / "preparation" / "profile.json").read_text())
    assert profile["columns"]["age"]["counts"]


def test_a_model_goes_on_with_the_preparation_that_it_was_saved_with(
    saved, serving, people
):
    bare = lepton.Trainer(recipe(serving, preparation=None), devices=1).load(saved)
    assert bare.predict(people.head(3), words=True)


class Averaged(lepton.models.TabularMLP):
    """A model of a person's own."""


def test_a_model_of_ones_own_is_asked_for_and_its_preparation_is_not(
    serving, people, tmp_path
):
    own = partial(Averaged, 2, edges=((-1.0, 1.0),) * 2, sizes=(4,), hidden=(4,))
    trainer = lepton.Trainer(recipe(serving, model=own), devices=1)
    trainer.fit(steps=1)
    folder = trainer.save(tmp_path / "model")
    with pytest.raises(ModelError, match=r"model \(.*Averaged\)") as caught:
        lepton.Trainer.open(folder)
    assert "Trainer.open(folder, model=...)" in caught.value.remedy
    opened = lepton.Trainer.open(folder, devices=1, model=own)
    rows = people.head(9)
    np.testing.assert_array_equal(
        opened.predict(rows, decode=logits), trainer.predict(rows, decode=logits)
    )


def test_other_weights_than_the_trained_ones_are_opened_too(serving, people, tmp_path):
    averaging = optax.contrib.schedule_free_adamw
    trainer = lepton.Trainer(recipe(serving, optimizer=averaging), devices=1)
    trainer.fit(steps=9)
    folder = trainer.save(tmp_path / "model")
    opened = lepton.Trainer.open(folder, devices=1)
    rows = people.head(9)
    np.testing.assert_array_equal(
        opened.predict(rows, decode=logits), trainer.predict(rows, decode=logits)
    )


@pytest.mark.parametrize(
    ("rows", "what", "remedy"),
    [
        ({"age": 50, "hours": 3}, "job", "age, hours, job"),
        ([{"age": 50, "hours": 3, "jop": "cook"}], "did you mean 'jop'", "job"),
        ({"age": "fifty", "hours": 3, "job": "cook"}, "'fifty'", "value"),
        ({"age": 5.5, "hours": 3, "job": "cook"}, "5.5", "value"),
        (pl.DataFrame(), "no row", "dict"),
        ([{"age": 1}, 7], "", ""),
    ],
)
def test_rows_that_can_not_be_prepared_are_named(trainer, rows, what, remedy):
    with pytest.raises(LeptonError) as caught:
        trainer.predict(rows)
    assert what in str(caught.value)
    assert remedy in caught.value.remedy


def test_an_unknown_category_and_a_missing_number_are_treated_as_configured(
    trainer, serving
):
    row = {"age": 50, "hours": None, "job": "pilot"}
    assert serving.arrays(row)["categories"].tolist() == [[0]]
    assert trainer.predict(row, words=True)[0] in ("yes", "no")


def test_a_label_that_is_no_class_is_named(trainer, people):
    rows = people.head(3).with_columns(pl.lit("maybe").alias("sick"))
    with pytest.raises(DataError, match="maybe is no class of the training split"):
        trainer.evaluate(rows)
    assert len(trainer.predict(rows)) == 3, "a label does not matter there"


def test_a_model_without_a_preparation_says_so(serving, people):
    bare = lepton.Trainer(recipe(serving, preparation=None), devices=1)
    bare.fit(steps=1)
    with pytest.raises(DataError, match="raw rows") as caught:
        bare.predict(people)
    assert "Recipe.preparation" in caught.value.remedy


def test_a_damaged_folder_is_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no saved model"):
        lepton.Trainer.open(tmp_path)
    (saved / "preparation" / "serving.json").write_text("{")
    with pytest.raises(DataError, match="can't be read"):
        _ = lepton.Trainer.open(saved).preparation
