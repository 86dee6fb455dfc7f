"""An artifact predicts what the trainer predicts, and nothing in it runs code."""

from __future__ import annotations

import json
import pickletools
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax.data import Limit
from lepton_jax.errors import CheckpointError, DataError, ModelError
from lepton_jax.ship.artifact import tensors, tracing
from lepton_jax.ship.artifact.compiled import batches
from lepton_jax.ship.artifact.manifest import Manifest
from tests.ship import artifacts

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 40


@pytest.fixture(scope="module")
def people(quick_compilation, tmp_path_factory) -> lepton.Trainer:
    return artifacts.people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def made(people) -> lepton.Artifact:
    return lepton.Artifact.of(people, rows=ROWS)


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory) -> Path:
    return made.save(tmp_path_factory.mktemp("saved") / "people.lepton")


@pytest.fixture(scope="module")
def opened(saved) -> lepton.Artifact:
    return lepton.Artifact.open(saved)


@pytest.fixture(scope="module")
def numbers(quick_compilation) -> lepton.Trainer:
    return artifacts.numbers()


@pytest.fixture(scope="module")
def of_numbers(numbers) -> lepton.Artifact:
    return lepton.Artifact.of(numbers, rows=ROWS)


# ---- what it predicts ----


def test_stored_raw_rows_get_the_trainers_own_outputs(opened):
    stored = opened.stored
    assert stored.rows["hours"].is_null().any(), "a row with a missing value"
    assert not stored.rows["job"].is_in(["clerk", "smith", "cook"]).all(), (
        "an unseen one"
    )
    outputs = opened.run(opened.prepare(stored.rows))
    np.testing.assert_allclose(
        outputs["outputs"], stored.outputs["outputs"], rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(outputs["prediction"], stored.outputs["prediction"])


def test_a_row_as_a_dict_gets_a_word(opened, people):
    row = {"age": 77, "hours": None, "job": "smith"}
    assert opened.predict(row, words=True) == people.predict(row, words=True)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 100, 128, 129, 300])
def test_any_number_of_rows_is_predicted_as_the_trainer_does(of_numbers, numbers, rows):
    inputs = np.random.default_rng(rows).normal(size=(rows, 12)).astype(np.float32)
    found = of_numbers.predict(inputs)
    assert found.shape == (rows,)
    if rows:
        np.testing.assert_array_equal(found, numbers.predict(inputs))


def test_broken_pictures_are_refused_as_the_trainer_refuses_them(tmp_path):
    trainer = artifacts.pictures(tmp_path)
    artifact = lepton.Artifact.of(trainer, rows=24)
    place = artifact.save(tmp_path / "pictures.zip")
    opened = lepton.Artifact.open(place)
    assert [column.name for column in opened.columns] == ["bytes"]
    refused = opened.stored.refused
    assert refused.height >= 2, "an empty file, and the beginning of one"
    for number in range(refused.height):
        with pytest.raises(DataError):
            opened.predict(refused.slice(number, 1))
    good = opened.stored.rows["bytes"].drop_nulls().to_list()[0]
    assert opened.predict([{"bytes": good}], words=True)[0] in ("bright", "dark")


def test_a_nan_that_a_label_would_hide_is_an_error(of_numbers):
    inputs = np.zeros((3, 12), np.float32)
    inputs[1, 4] = np.nan
    with pytest.raises(DataError, match="NaN for 1 rows"):
        of_numbers.predict(inputs)
    assert np.isnan(of_numbers.run(inputs)["outputs"][1]).all()


def test_its_metrics_are_those_of_the_recipe(made, people):
    held_out = made.stored.held_out
    test = people.recipe.test
    assert held_out == ROWS - ROWS // 4
    loss, accuracy = people.evaluate(
        (
            {name: leaf[:held_out] for name, leaf in made.stored.inputs.items()},
            made.stored.targets["targets"],
        )
    )
    measured = made.measure(made.stored.outputs)
    assert measured["accuracy"] == pytest.approx(accuracy)
    assert measured["loss"] == pytest.approx(loss, rel=1e-5)
    assert made.manifest.metrics["accuracy"] == pytest.approx(people.evaluate(test)[1])


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(0, 1000), ladder=st.sets(st.integers(1, 64), min_size=1))
def test_batches_hold_each_row_once_and_none_is_larger_than_the_ladder(rows, ladder):
    parts = batches(rows, sorted(ladder))
    assert sum(count for count, _ in parts) == rows
    assert all(0 < count <= size and size in ladder for count, size in parts)


# ---- how it is opened ----


def test_it_opens_without_the_recipe_the_model_and_this_process(
    saved, opened, tmp_path
):
    code = (
        "import sys, numpy as np, lepton_jax as lepton\n"
        "artifact = lepton.Artifact.open(sys.argv[1])\n"
        "rows = artifact.stored.rows\n"
        "np.save(sys.argv[2], artifact.run(artifact.prepare(rows))['outputs'])\n"
        "assert not {'tests', 'recipes'} & set(sys.modules)\n"
    )
    out = tmp_path / "outputs.npy"
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved), str(out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        np.load(out), opened.stored.outputs["outputs"], rtol=0, atol=1e-6
    )


def test_no_file_of_it_is_a_pickle(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {"manifest.json", "program.stablehlo", "weights.safetensors"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        assert not _is_pickle(content), path
        assert b"\x80\x04\x95" not in content[:64], path


def test_its_programs_do_not_tell_where_they_were_made(made):
    home = str(Path(lepton.__file__).parents[1]).encode()
    for program in (*made._programs.values(), made._measure):
        assert b".py" in program, "errors still name the line"
        assert home not in program and b"site-packages" not in program


def test_a_zip_file_and_a_folder_hold_the_same(made, opened, tmp_path):
    place = made.save(tmp_path / "people.zip")
    packed = lepton.Artifact.open(place)
    for path, array in opened.weights.items():
        assert packed.weights[path].tobytes() == array.tobytes()
    assert packed.manifest.files == opened.manifest.files
    assert packed.manifest.signature == opened.manifest.signature


def test_a_byte_that_has_changed_is_found(saved, made, tmp_path):
    place = made.save(tmp_path / "copy")
    weights = place / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights.safetensors is not as it was"):
        lepton.Artifact.open(place)
    (place / "program.stablehlo").unlink()
    with pytest.raises(CheckpointError, match=r"program.stablehlo is missing"):
        lepton.Artifact.open(place)


def test_a_zip_file_that_leads_out_of_its_folder_is_refused(tmp_path):
    place = tmp_path / "evil.zip"
    with zipfile.ZipFile(place, "w") as file:
        file.writestr("../evil.txt", "out")
        file.writestr("manifest.json", "{}")
    with pytest.raises(CheckpointError, match="leads out"):
        lepton.Artifact.open(place)
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 99}'])
def test_a_manifest_that_is_none_is_an_error_of_ours(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        lepton.Artifact.open(tmp_path)


def test_a_newer_format_is_refused_by_name(made, tmp_path):
    place = made.save(tmp_path / "newer")
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        lepton.Artifact.open(place)


def test_what_stands_in_the_place_is_left_alone_unless_it_is_an_artifact(
    made, tmp_path
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="something else"):
        made.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    made.save(tmp_path / "again")
    made.save(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "mine"]


def test_a_program_of_a_jax_that_is_gone_says_what_to_do(made, monkeypatch):
    old = lepton.Artifact(_parts(made, programs={-1: made._programs[-1][:200]}))
    with pytest.raises(CheckpointError, match="lepton export RUN") as raised:
        old.run(old.stored.inputs)
    assert made.manifest.made["expires"] in str(raised.value)


# ---- what it takes ----


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((3, 11), np.float32), r"inputs is float32\[3, 11\]"),
        (np.zeros((3, 12), complex), "complex128"),
        ({"pixels": np.zeros((3, 12), np.float32)}, "no input 'pixels'"),
        (np.float32(3), "inputs is float32"),
        (np.array([["a"] * 12]), "inputs is"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(of_numbers, inputs, message):
    with pytest.raises(DataError, match=message):
        of_numbers.run(inputs)


def test_arrays_that_differ_in_their_rows_are_refused(opened):
    inputs = {name: leaf[:3] for name, leaf in opened.stored.inputs.items()}
    name = next(iter(inputs))
    with pytest.raises(DataError, match="differ in their rows"):
        opened.run(inputs | {name: inputs[name][:2]})


def test_a_number_beyond_its_table_is_refused_as_in_training(made):
    limit = Limit("inputs/categories", 4, "the table has 4 rows", "look at the data")
    manifest = replace(made.manifest, limits=(asdict(limit),))
    read = Manifest.from_json(manifest.to_json())
    artifact = lepton.Artifact(_parts(made, manifest=read))
    inputs = {name: leaf[:3].copy() for name, leaf in made.stored.inputs.items()}
    assert len(artifact.predict(inputs)) == 3
    inputs["categories"][1] = 99
    with pytest.raises(DataError, match=r"sample 1: 99"):
        artifact.run(inputs)


def test_raw_rows_without_a_needed_column_are_refused(opened):
    with pytest.raises(DataError, match="'job' is missing"):
        opened.predict([{"age": 30, "hours": 3.0}])


def test_raw_rows_are_refused_where_there_is_no_preparation(of_numbers):
    with pytest.raises(DataError, match="arrays alone"):
        of_numbers.prepare([{"age": 3}])


def test_a_trainer_without_a_model_has_no_artifact(numbers):
    with pytest.raises(ModelError, match="no model yet"):
        lepton.Artifact.of(lepton.Trainer(numbers.recipe))


# ---- what it says ----


def test_columns_tell_a_client_what_to_ask_for(opened):
    columns = {column.name: column for column in opened.columns}
    assert {name: column.kind for name, column in columns.items()} == {
        "age": "number",
        "hours": "number",
        "job": "category",
    }
    assert set(columns["job"].values) == {"clerk", "smith", "cook"}
    assert columns["age"].example is not None
    assert opened.manifest.labels == ("no", "yes")


def test_the_training_histograms_travel_with_it(opened, people):
    training = people.preparation.training_profile()
    assert opened.profile.columns.keys() == training.columns.keys()
    assert opened.profile.rows == training.rows


def test_the_manifest_reads_back_as_it_was_written(opened):
    assert Manifest.from_json(opened.manifest.to_json()) == opened.manifest


def test_weights_that_no_output_needs_stay_behind(of_numbers):
    assert all(path.startswith("params/") for path in of_numbers.weights), (
        "no dropout key"
    )


@pytest.mark.parametrize("kind", ["int4", "uint4", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 2)])
def test_arrays_of_every_type_come_back_to_the_bit(tmp_path, kind, shape):
    dtype = np.dtype(getattr(ml_dtypes, kind))
    values = np.random.default_rng(0).integers(0, 8, shape)
    array = (values - (8 if kind == "int4" else 0)).astype(dtype)
    tensors.write_tensors(tmp_path / "a.safetensors", {"a/b": array, "c": np.arange(3)})
    found = tensors.read_tensors(tmp_path / "a.safetensors")
    assert found["a/b"].dtype == dtype
    assert found["a/b"].shape == array.shape
    assert found["a/b"].tobytes() == array.tobytes()
    np.testing.assert_array_equal(found["c"], np.arange(3))


def test_four_bit_weights_take_half_a_byte(tmp_path):
    array = np.zeros(10_000, ml_dtypes.int4)
    tensors.write_tensors(tmp_path / "a.safetensors", {"a": array})
    assert (tmp_path / "a.safetensors").stat().st_size < 5_400


def test_a_missing_library_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(lepton.LeptonError, match=r"lepton-jax\[ship\]"):
        tensors.write_tensors(tmp_path / "a", {})


# ---- helpers ----


def _parts(artifact, **changes):
    from lepton_jax.ship.artifact.making import Parts

    parts = Parts(
        artifact.manifest,
        artifact._programs,
        artifact._measure,
        artifact.weights,
        artifact.serving,
        artifact.profile,
        artifact.stored,
    )
    return parts._replace(**changes)


def _is_pickle(content: bytes) -> bool:
    try:
        list(pickletools.genops(content))
    except Exception:
        return False
    return True


class Counted(nnx.Module):
    """Needs its rows as a number, so that it has no program for any batch size."""

    def __init__(self, rngs: nnx.Rngs):
        self.out = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        assert int(x.shape[0]) > 0
        return self.out(x)


def test_a_model_for_fixed_batches_alone_has_programs_of_some_sizes(numbers, tmp_path):
    trainer = lepton.Trainer(
        numbers.recipe.with_(model=Counted, batch_size=4), devices=1
    )
    trainer.fit(steps=1)
    artifact = lepton.Artifact.of(trainer, rows=5)
    assert any("batch sizes" in note for note in artifact.manifest.notes)
    opened = lepton.Artifact.open(artifact.save(tmp_path / "counted"))
    assert opened.sizes == (1, 4, 8, 64)
    inputs = numbers.recipe.test.inputs[:7]
    np.testing.assert_array_equal(opened.predict(inputs), trainer.predict(inputs))
    with pytest.raises(ModelError, match="batches of 5 rows"):
        opened.compiled(5)


def test_a_model_that_one_platform_lacks_is_made_for_the_others(numbers, monkeypatch):
    exported = tracing.exported

    def lacking(model, size=None, platforms=tracing.PLATFORMS):
        if "tpu" in platforms:
            raise NotImplementedError("no rule for tpu")
        return exported(model, size, platforms)

    monkeypatch.setattr(tracing, "exported", lacking)
    artifact = lepton.Artifact.of(numbers, rows=3)
    assert artifact.manifest.made["platforms"] == ["cpu", "cuda"]
    assert any("no program for tpu" in note for note in artifact.manifest.notes)
    assert artifact.sizes[-1] == 128, "any batch size"
