"""Folds, each of them a run: together, gone on with, and from the command line."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import optax
import pytest
from scipy.stats import t as student

import lepton_jax as lepton
from lepton_jax.baselines import Baseline
from lepton_jax.cli.launch import launch
from lepton_jax.cross_validation import over_folds
from lepton_jax.errors import DataError, RecipeError, SettingError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES = 3
ROWS = 60

RECIPE = '''
from functools import partial

import numpy as np
import optax

import lepton_jax as lepton


def recipe(rows: int = 60, folds: int | None = None, fold: int = 0) -> lepton.Recipe:
    """A few points.

    Args:
      rows: of the data.
      folds: how many.
      fold: which one.
    """
    labels = np.arange(rows) % 3
    points = np.eye(3, dtype=np.float32)[labels]
    points += np.random.default_rng(0).normal(size=points.shape).astype(np.float32)
    data = lepton.data.Arrays(points, labels)
    train, test = data.fold(folds or 4, fold, stratify=True)
    return lepton.Recipe(
        model=partial(lepton.models.MLP, (3, 3)),
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.sgd(0.5),
        train=train,
        test=test,
        steps=20,
        batch_size=15,
    )
'''


def data():
    labels = np.arange(ROWS) % CLASSES
    noise = np.random.default_rng(0).normal(size=(ROWS, CLASSES))
    points = np.eye(CLASSES)[labels] + noise / 2
    return lepton.data.Arrays(points.astype(np.float32), labels)


def first(train, test):
    """A baseline that says the first class."""
    return Baseline("the first class", "", np.eye(CLASSES)[[0] * len(test)])


def recipe(fold, folds=4, **changes):
    train, test = data().fold(folds, fold, stratify=True)
    return lepton.Recipe(
        model=partial(lepton.models.MLP, (CLASSES, CLASSES)),
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.sgd(0.5),
        train=train,
        test=test,
        steps=20,
        batch_size=15,
        baseline=first,
    ).with_(**changes)


def test_arrays_have_each_sample_in_one_test():
    tests = [data().fold(7, fold)[1].inputs for fold in range(7)]
    assert sorted(map(len, tests)) == [8, 8, 8, 9, 9, 9, 9]
    rows = np.concatenate(tests)
    assert (np.unique(rows, axis=0) == np.unique(data().inputs, axis=0)).all()
    even = data().fold(4, 1, stratify=True)[1].targets
    assert np.bincount(even).tolist() == [5, 5, 5]
    with pytest.raises(DataError, match="fold 7 of 7"):
        data().fold(7, 7)


def test_the_interval_over_folds_is_that_of_nadeau_and_bengio():
    values = [0.7, 0.8, 0.9, 0.75]
    one = over_folds("accuracy", values)
    spread = np.std(values, ddof=1)
    assert one.error == pytest.approx(spread / 2)
    width = student.ppf(0.975, 3) * spread * math.sqrt(1 / 4 + 1 / 3)
    assert one.interval.high - one.mean == pytest.approx(width)
    assert math.isnan(over_folds("accuracy", [0.7]).interval.low)


def test_folds_are_put_together_with_their_baselines_and_all_their_rows(tmp_path):
    done = lepton.cross_validate(recipe, 4, run_dir=tmp_path)
    alone = lepton.Trainer(recipe(2))
    alone.fit()
    values = done.metrics["accuracy"].values
    assert values[2] == pytest.approx(alone.evaluate().accuracy)
    with np.load(tmp_path / "predictions.npz") as rows:
        targets = rows["targets"]
        hits = rows["outputs"].argmax(1) == targets
        assert np.bincount(rows["fold"]).tolist() == [15] * 4
    assert done.metrics["accuracy"].pooled.value == pytest.approx(hits.mean())
    (baseline,) = done.baselines
    assert baseline.baseline.mean == pytest.approx(1 / 3)
    assert baseline.verdict == "better"
    right = hits.sum() - (hits & (targets == 0)).sum()
    assert baseline.alone.ours == right
    assert baseline.alone.theirs == ((targets == 0) & ~hits).sum()
    assert "the first class" in str(done) and "mean of 4 folds" in str(done)
    page = (tmp_path / "report.html").read_text()
    assert "4 of 4 folds" in page and "the first class" in page
    assert (tmp_path / "fold_03" / "report.html").is_file()


def test_what_was_stopped_goes_on_and_finished_folds_are_not_trained_again(tmp_path):
    made = []

    def failing(fold):
        made.append(fold)
        if fold == 2:
            raise KeyboardInterrupt
        return recipe(fold, 3)

    with pytest.raises(KeyboardInterrupt):
        lepton.cross_validate(failing, 3, run_dir=tmp_path / "parts")
    content = json.loads((tmp_path / "parts" / "folds.json").read_text())
    assert [one["fold"] for one in content["results"]] == [0, 1]
    # of the third fold there is a run that ended half way
    half = lepton.Trainer(recipe(2, 3, steps=20), run_dir=tmp_path / "parts/fold_02")
    half.fit(steps=10)
    made.clear()

    def counted(fold):
        made.append(fold)
        return recipe(fold, 3)

    done = lepton.cross_validate(counted, 3, run_dir=tmp_path / "parts")
    assert made == [2]
    assert done.finished
    same = lepton.cross_validate(partial(recipe, folds=3), 3)
    assert done.metrics["accuracy"].values == same.metrics["accuracy"].values
    with pytest.raises(DataError, match="holds 3 folds, and 4"):
        lepton.cross_validate(recipe, 4, run_dir=tmp_path / "parts")


def test_a_count_that_is_none_and_a_recipe_without_a_test_are_errors():
    with pytest.raises(RecipeError, match="folds is 1"):
        lepton.cross_validate(recipe, 1)
    with pytest.raises(DataError, match="fold 0 has no test data"):
        lepton.cross_validate(lambda fold: recipe(fold, test=None), 4)


# ---- the command line ----


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "points.py"
    path.write_text(RECIPE)
    return path


def test_the_launcher_runs_all_folds_or_one_and_goes_on(file, tmp_path, capfd):
    folder = tmp_path / "run"
    summary = launch([str(file), "--folds", "3", "--run-dir", str(folder), "--json"])
    assert (summary["status"], summary["folds"]) == ("finished", 3)
    assert "mean of 3 folds" in capfd.readouterr().err
    settings = json.loads((folder / "fold_01" / "recipe.json").read_text())["settings"]
    assert settings == {"folds": 3, "fold": 1}

    content = json.loads((folder / "folds.json").read_text())
    content["results"].pop()
    (folder / "folds.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "fold_02")
    again = launch(["--resume", str(folder)])
    assert again["metrics"] == summary["metrics"]

    one = tmp_path / "one"
    alone = launch([str(file), "--folds=3", "--fold=1", "--run-dir", str(one)])
    assert alone["steps"] == 20
    assert not (one / "folds.json").exists()


def test_a_recipe_without_folds_says_so(file, tmp_path):
    plain = Path(file).with_name("plain.py")
    text = RECIPE.replace(", folds: int | None = None, fold: int = 0", "")
    plain.write_text(text.replace("folds or 4, fold", "4, 0"))
    with pytest.raises(SettingError, match="the recipe has no folds"):
        launch([str(plain), "--folds", "5", "--run-dir", str(tmp_path / "run")])


@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_a_time_that_is_none_is_refused(file, tmp_path, seconds):
    arguments = [str(file), "--baseline-seconds", seconds]
    with pytest.raises(SettingError, match="--baseline-seconds"):
        launch([*arguments, "--run-dir", str(tmp_path / "run")])
