"""What is exported gives the trainer's outputs in the target's own runtime."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax.cli import export as command
from lepton_jax.errors import CheckpointError, ModelError, SettingError
from lepton_jax.ship import export
from lepton_jax.ship.export import (
    Options,
    inlined,
    lowering,
    onnx,
    parity,
    probing,
    replay,
)
from tests.ship import artifacts

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 21
OPAQUE = ("stablehlo", "iree", "savedmodel")  # that need no code of the model's
PROGRAMS = [name for name, target in export.TARGETS.items() if target.is_program]


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def needs(target: str) -> pytest.MarkDecorator:
    made_by = export.TARGETS[target].modules
    missing = [name for name in made_by if not has(name.partition(".")[0])]
    extra = export.TARGETS[target].extra
    return pytest.mark.skipif(bool(missing), reason=f"needs the extra {extra}")


@pytest.fixture(scope="module")
def trainer(quick_compilation, tmp_path_factory) -> lepton.Trainer:
    return artifacts.people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def artifact(trainer) -> lepton.Artifact:
    return lepton.Artifact.of(trainer, rows=ROWS)


@pytest.fixture(scope="module")
def source(artifact, trainer) -> export.Source:
    return export.live_source(artifact, trainer)


@pytest.fixture(scope="module")
def numbers(quick_compilation) -> lepton.Recipe:
    return artifacts.numbers().recipe


# ---- parity ----


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=needs(name)) for name in PROGRAMS]
)
def test_raw_rows_get_the_trainers_outputs_in_each_runtime(
    artifact, source, target, tmp_path
):
    fixed = None if export.TARGETS[target].has_any_batch else 8
    told = export.export(
        artifact, target, tmp_path / "out", source=source, options=Options(fixed)
    )
    assert told is not None and told.passes, str(told)
    assert told.are_raw and told.rows == len(artifact.stored)
    trainers, targets = told.metrics["accuracy"]
    assert trainers == targets
    written = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert written["passes"] and written["departs"] == "none"


@pytest.mark.parametrize("target", [pytest.param(n, marks=needs(n)) for n in OPAQUE])
def test_an_artifact_alone_is_exported_without_the_models_code(
    artifact, target, tmp_path
):
    place = artifact.save(tmp_path / "people.zip")
    opened = lepton.Artifact.open(place)
    told = export.export(opened, target, tmp_path / "out", options=Options(4))
    assert told is not None and told.passes, str(told)


def test_the_weights_are_the_same_to_the_bit_for_other_readers(artifact, tmp_path):
    told = export.export(artifact, "safetensors", tmp_path / "out")
    assert told is not None and told.passes and told.difference == 0
    found = replay.weights_of(tmp_path / "out")
    assert all(
        found[path].tobytes() == array.tobytes()
        for path, array in artifact.weights.items()
    )


def test_a_model_that_departs_is_told_with_its_first_wrong_layer(
    artifact, source, tmp_path, monkeypatch
):
    target = export.TARGETS["stablehlo"]
    write = type(target).write

    def spoil(self, given, folder, options):
        paths = sorted(p for p in given.weights if p.endswith("kernel"))
        wrong = {paths[-1]: given.weights[paths[-1]] + np.float32(0.01)}
        write(self, replace(given, weights=given.weights | wrong), folder, options)

    def here(folder, inputs, python=None):
        return replay.replay(folder, dict(inputs))

    monkeypatch.setattr(type(target), "write", spoil)
    monkeypatch.setattr(parity, "replayed", here)  # quicker than two more processes
    told = export.export(artifact, "stablehlo", tmp_path / "out", source=source)
    assert told is not None and not told.passes
    layers = [tensor.name for tensor in probing.layers_of(source, 1).outputs]
    products = [name for name in layers if "dot_general" in name]
    assert told.departs.startswith(products[-1]), (told.departs, layers)


def test_layers_are_named_by_the_users_line(source):
    layers = probing.layers_of(source, 2)
    names = [tensor.name for tensor in layers.outputs]
    assert any("dot_general" in name and ".py:" in name for name in names), names
    assert names == sorted(names)


@settings(max_examples=100, deadline=None)
@given(
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    gap=st.floats(0, 1),
    place=st.integers(0, 11),
)
def test_a_difference_is_relative_to_the_largest_value_or_to_one(scale, gap, place):
    expected = np.linspace(-1, 1, 12).reshape(4, 3) * scale
    found = expected.copy()
    found.flat[place] += gap
    difference = probing.scaled_difference(expected, found)
    assert difference == pytest.approx(gap / max(1, scale), abs=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_equals_itself_alone(value):
    expected = np.array([1.0, value])
    assert probing.scaled_difference(expected, expected) == 0
    assert probing.scaled_difference(expected, np.array([1.0, 2.0])) == np.inf


def test_a_label_that_differs_does_not_pass():
    expected = {"outputs": np.zeros((3, 2)), "prediction": np.array([0, 1, 1])}
    found = expected | {"prediction": np.array([0, 1, 0])}
    told = parity.compared("onnx", expected, found)
    assert told.labels == 1 and not told.passes


# ---- what can't be ----


class Meeting(nnx.Module):
    """Centers a batch: what a sample gets depends on the others."""

    def __init__(self, rngs: nnx.Rngs):
        self.out = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(x - x.mean(axis=0))


@pytest.fixture(scope="module")
def meeting(numbers) -> lepton.Artifact:
    recipe = numbers.with_(model=Meeting)
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit()
    artifact = lepton.Artifact.of(trainer, rows=50)
    expected = trainer.predict(recipe.test.inputs[:50], decode=lambda x: x)
    found = artifact.run(recipe.test.inputs[:50])["outputs"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    return artifact


@pytest.mark.skipif(not has("iree"), reason="needs the extra edge")
def test_a_fixed_batch_is_refused_where_samples_meet(meeting, tmp_path):
    with pytest.raises(ModelError, match="depends on its batch"):
        export.export(meeting, "iree", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_names_the_nearest(artifact, tmp_path):
    with pytest.raises(SettingError, match="did you mean 'onnx'"):
        export.export(artifact, "onx", tmp_path / "out")


@pytest.mark.parametrize("target", ["onnx", "litert", "iree", "savedmodel"])
def test_a_missing_extra_is_named_before_work_starts(
    artifact, target, tmp_path, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as raised:
        export.export(artifact, target, tmp_path / "out")
    assert f"lepton-jax[{export.TARGETS[target].extra}]" in raised.value.remedy
    assert not (tmp_path / "out").exists()


class Careful(nnx.Module):
    """Has a stream of random numbers, and draws none outside of training."""

    def __init__(self, rngs: nnx.Rngs):
        self.out = nnx.Linear(12, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, rngs: nnx.Rngs):
        return self.out(self.dropout(x))


def test_what_no_output_depends_on_is_not_exported(numbers):
    recipe = numbers.with_(model=Careful)
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit(steps=1)
    source = export.live_source(lepton.Artifact.of(trainer, rows=3), trainer)
    program = lowering.traced(source, list(source.shapes(2).values()))
    names = {eqn.primitive.name for eqn, _ in inlined.equations(program)}
    assert "dot_general" in names
    assert not any(name.startswith("random") for name in names)


def test_outputs_that_are_the_predictions_are_one_value_with_one_name(numbers):
    recipe = numbers.with_(decode=lambda outputs: outputs)
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit(steps=1)
    source = export.live_source(lepton.Artifact.of(trainer, rows=3), trainer)
    assert [tensor.name for tensor in source.outputs] == ["outputs", "prediction"]
    kept, aliases = onnx._without_twins(source)
    assert [tensor.name for tensor in kept.outputs] == ["outputs"]
    assert aliases == {"outputs": "outputs", "prediction": "outputs"}


@needs("onnx")
def test_onnx_names_an_operation_that_it_has_no_rule_for(numbers, tmp_path):
    recipe = numbers.with_(model=partial(Odd, 12))
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit(steps=1)
    artifact = lepton.Artifact.of(trainer, rows=3)
    odd = export.live_source(artifact, trainer)
    with pytest.raises(ModelError, match=r"no rule for random_\w+ \(.*test_export.py"):
        export.export(artifact, "onnx", tmp_path / "out", source=odd)


class Odd(nnx.Module):
    """Draws random numbers, which few runtimes can."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(x + jax.random.normal(jax.random.key(0), (12,)))


def test_something_else_in_the_place_is_left_alone(artifact, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="something else"):
        export.export(artifact, "stablehlo", tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_without_rows_nothing_is_written_unless_a_person_says_so(
    model, tmp_path, capsys
):
    arguments = [str(model), "--to", "stablehlo", "-o", str(tmp_path / "out")]
    assert command.main(arguments) == 2
    assert "--no-replay" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command.main([*arguments, "--no-replay"]) == 0
    assert (tmp_path / "out" / "program.stablehlo").exists()


def test_a_runtime_that_is_not_there_is_said_with_the_option(artifact, tmp_path):
    export.export(artifact, "stablehlo", tmp_path / "out", replays=False)
    with pytest.raises(ModelError, match="can't be run") as raised:
        parity.replayed(
            tmp_path / "out", artifact.stored.inputs, python="/nowhere/python"
        )
    assert "--python" in raised.value.remedy


# ---- the command ----


@pytest.fixture(scope="module")
def model(trainer, tmp_path_factory) -> Path:
    return trainer.save(tmp_path_factory.mktemp("model") / "people")


def test_the_command_exports_a_saved_model_and_an_artifact_of_it(
    model, tmp_path, capsys
):
    place = tmp_path / "people.zip"
    assert command.main([str(model), "-o", str(place), "--name", "sick"]) == 0
    told = capsys.readouterr().out
    assert "sick version 1" in told and "it opens with that version at any time" in told
    assert "no rows are stored" in told, "a saved model has no data"

    arguments = [str(place), "--to", "safetensors", "-o", str(tmp_path / "w"), "--json"]
    assert command.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["parity"]["passes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no run, no saved model and no artifact"),
        (["{model}", "--to", "onxn"], "did you mean 'onnx'"),
        (["{model}", "--to", "iree", "--batch", "any"], "no dynamic batch"),
        (["{model}", "--batch", "0"], "--batch is '0'"),
        (["{model}", "--rows", "many"], "--rows"),
    ],
)
def test_mistakes_of_the_command_have_a_remedy(model, arguments, message, capsys):
    words = [word.format(model=model) for word in arguments]
    assert command.main(words) == 2
    told = capsys.readouterr().err
    assert message in told and "remedy" in told and "Traceback" not in told


def test_a_run_is_exported_again_from_checkpoint_and_recipe(tmp_path, capsys):
    recipe = tmp_path / "small.py"
    recipe.write_text(RECIPE)
    from lepton_jax.cli import launch

    run = tmp_path / "run"
    options = ["--width", "5", "--run-dir", str(run), "--baseline-seconds", "0"]
    assert launch.main([str(recipe), *options]) == 0
    capsys.readouterr()
    for _ in range(2):
        assert command.main([str(run), "-o", str(tmp_path / "small.lepton")]) == 0
        assert "equal to the trainer within 1e-05" in capsys.readouterr().out
    artifact = lepton.Artifact.open(tmp_path / "small.lepton")
    assert artifact.manifest.recipe["settings"] == {"width": 5}
    assert artifact.manifest.recipe["run"] == str(run)
    assert artifact.stored.held_out and artifact.manifest.metrics
    recipe.unlink()
    assert command.main([str(run)]) == 2
    assert "--recipe RECIPE.py" in capsys.readouterr().err


RECIPE = '''
from functools import partial
import numpy as np, optax
import lepton_jax as lepton

def recipe(width: int = 4) -> lepton.Recipe:
    """A small one."""
    x = np.eye(8, dtype=np.float32)
    y = np.arange(8, dtype=np.int32) % 2
    return lepton.Recipe(
        model=partial(lepton.models.MLP, (8, width, 2)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd,
        learning_rate=0.1,
        train=(x, y),
        test=(x, y),
        steps=2,
        batch_size=4,
    )
'''
