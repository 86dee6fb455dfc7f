"""Explanations: what they promise, held against models whose answer is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax.cli import main
from lepton_jax.ship import Artifact, explain
from lepton_jax.ship.explain.occlusion import parts_of
from tests.ship import artifacts

pytest.importorskip("safetensors", reason="needs the extra ship")
pytest.importorskip("flatbuffers", reason="needs the extra ship")
pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 4


class Linear(nnx.Module):
    """A model of which every share is known: weight times input."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.asarray([[2.0, 0.0], [-1.0, 3.0], [0.0, 1.0]]))

    def __call__(self, x):
        return x @ self.kernel.get_value()


class Words(nnx.Module):
    """A small encoder with two layers of attention, without Lepton's own."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(30, 8, rngs=rngs)
        attention = [
            nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs) for _ in range(2)
        ]
        self.layers = nnx.List(attention)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.out(jnp.tanh(x).mean(axis=1))


def trainer_of(model, inputs, classes, preprocess=None):
    draw = np.random.default_rng(1)
    labels = draw.integers(0, classes, len(inputs)).astype(np.int32)
    trainer = lepton.Trainer(
        model=model,
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.sgd(0.1),
        train=(inputs, labels),
        test=(inputs, labels),
        preprocess=preprocess,
        batch_size=4,
        devices=1,
    )
    trainer.evaluate()
    return trainer


@pytest.fixture(scope="module")
def linear(quick_compilation):
    draw = np.random.default_rng(0)
    return trainer_of(Linear, draw.normal(size=(16, 3)).astype(np.float32), 2)


@pytest.fixture(scope="module")
def numbers(quick_compilation):
    return artifacts.numbers()


@pytest.fixture(scope="module")
def words(quick_compilation):
    draw = np.random.default_rng(0)
    return trainer_of(Words, draw.integers(1, 30, (16, 6)).astype(np.int32), 3)


@pytest.fixture(scope="module")
def pictures(quick_compilation):
    draw = np.random.default_rng(0)
    made = draw.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)

    def model(rngs):
        return lepton.models.CNN(2, size=(8, 8, 1), widths=(4,), dense=0, rngs=rngs)

    return trainer_of(model, made, 2, preprocess=lambda x: x / 255.0)


def rows_of(trainer):
    return trainer.recipe.test.inputs[:ROWS]


# ---- integrated gradients ----


def test_the_shares_of_a_linear_model_are_weight_times_input(linear):
    rows = rows_of(linear)
    found = explain.integrated_gradients(
        linear, rows, target=1, baseline={"inputs": np.zeros(3)}
    )
    expected = rows * np.asarray([0.0, 3.0, 1.0])
    np.testing.assert_allclose(found.values["inputs"], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["numbers", "words", "pictures"])
def test_shares_add_up_to_the_difference_of_outputs(name, request):
    trainer = request.getfixturevalue(name)
    rows = rows_of(trainer)
    found = explain.integrated_gradients(trainer, rows)
    assert found.values["inputs"].shape == rows.shape
    outputs = trainer.predict(rows, decode=lambda x: x)
    np.testing.assert_allclose(found.outputs, outputs.max(axis=1), atol=1e-4)
    difference = np.abs(found.outputs - found.baseline)
    assert (found.gap <= 0.01 * np.maximum(1, difference)).all()
    assert difference.max() > 0.01  # or there would be nothing to add up to


def test_an_input_that_the_model_does_not_read_has_no_share(linear):
    # sensitivity(b) of Sundararajan et al. 2017: a dummy gets nothing
    found = explain.integrated_gradients(linear, rows_of(linear), target=0)
    assert (found.values["inputs"][:, 2] == 0).all()


def test_two_programs_of_one_function_have_the_same_shares(numbers):
    # implementation invariance: the same function, written in another way
    class Doubled(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            return (self.inner(2 * x / 2) * 4) / 4

    other = numbers.with_module(Doubled(numbers.module()))
    rows = rows_of(numbers)
    one = explain.integrated_gradients(numbers, rows).values["inputs"]
    two = explain.integrated_gradients(other, rows).values["inputs"]
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_more_points_are_taken_where_the_shares_do_not_add_up():
    class Steep(nnx.Module):
        def __init__(self, rngs):
            self.factor = nnx.Param(jnp.asarray(40.0))

        def __call__(self, x):
            y = jnp.tanh(self.factor.get_value() * (x - 0.77)).sum(axis=1)
            return jnp.stack([y, -y], axis=1)

    inputs = np.ones((8, 3), np.float32)
    trainer = trainer_of(Steep, inputs, 2)
    found = explain.integrated_gradients(
        trainer, inputs[:2], target=0, baseline={"inputs": np.zeros(3)}, steps=2
    )
    assert found.steps > 2 and found.gap.max() < 0.1


def test_a_linen_module_is_explained_as_well():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(30, 4)(tokens).sum(axis=1)
            return linen.Dense(2)(x)

    tokens = np.random.default_rng(0).integers(0, 30, (8, 5)).astype(np.int32)
    found = explain.integrated_gradients(trainer_of(Net(), tokens, 2), tokens[:2])
    # the model is linear in what it looked up, so two points are enough
    assert found.values["inputs"].shape == (2, 5) and found.gap.max() < 1e-4


# ---- occlusion ----


def test_occlusion_of_a_linear_model_is_the_difference_from_the_mean(linear):
    rows = rows_of(linear)
    found = explain.occlusion(linear, rows, target=1)
    mean = linear.recipe.train.inputs.mean(axis=0)
    expected = (rows - mean) * np.asarray([0.0, 3.0, 1.0])
    np.testing.assert_allclose(found.values["inputs"], expected, atol=1e-4)


def test_an_artifact_is_explained_as_the_trainer_it_was_made_of(pictures):
    rows = rows_of(pictures)
    artifact = Artifact.of(pictures, rows=8)
    one = explain.occlusion(pictures, rows, patch=4)
    two = explain.occlusion(artifact, rows, patch=4)
    np.testing.assert_allclose(one.values["inputs"], two.values["inputs"], atol=1e-5)
    # a square shares its fall among its pixels
    square = one.values["inputs"][0, :4, :4, 0]
    assert (square == square[0, 0]).all()


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 30), width=st.integers(1, 30), patch=st.integers(1, 9))
def test_each_pixel_is_hidden_once(height, width, patch):
    count = np.zeros((height, width))
    for part in parts_of((height, width, 3), patch):
        count[part] += 1
    assert (count == 1).all()


# ---- attention ----


def test_roll_out_is_the_product_of_the_layers_with_half_of_each_token(words):
    rows = rows_of(words)
    found = explain.attention_rollout(words, rows)
    assert len(found.layers) == 2
    for weights in found.layers:
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    first, second = (layer / 2 + np.eye(6) / 2 for layer in found.layers)
    np.testing.assert_allclose(found.flow, second @ first, atol=1e-5)
    np.testing.assert_allclose(found.tokens.sum(axis=1), 1, atol=1e-5)


def test_the_attention_that_is_seen_is_the_one_that_is_computed(words):
    rows = rows_of(words)
    module = words.module()
    x = module.embed(rows)
    layer = module.layers[0]
    logits = jnp.einsum("bqhd,bkhd->bhqk", layer.query(x), layer.key(x)) / 2
    expected = jax.nn.softmax(logits).mean(axis=1)
    found = explain.attention_rollout(words, rows)
    np.testing.assert_allclose(found.layers[0], expected, atol=1e-5)


# ---- permutation, neighbours ----


def test_only_columns_that_the_model_reads_are_important():
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(400, 3)).astype(np.float32)
    labels = (inputs @ np.asarray([[2.0, 0.0], [-1.0, 3.0], [0.0, 1.0]])).argmax(1)
    trainer = trainer_of(Linear, inputs, 2)
    found = explain.permutation_importance(trainer, (inputs, labels))
    by_name = {one.column: one.mean for one in found}
    assert found[0].column == "inputs[1]"  # 4 apart, where the others are 2 and 1
    assert by_name["inputs[1]"] > by_name["inputs[0]"] > by_name["inputs[2]"] > 0


def test_a_training_row_is_its_own_nearest_example(numbers):
    train = numbers.recipe.train
    near = explain.nearest_examples(numbers, train.inputs[:5], count=3)
    np.testing.assert_allclose(near.likeness[:, 0], 1, atol=1e-5)
    own = [5 * [0], *near.numbers.T][1]
    alike = near.likeness[:, 0] - near.likeness[:, 1] < 1e-6
    assert ((own == np.arange(5)) | alike).all()
    np.testing.assert_array_equal(near.targets[:, 0], train.targets[own])


def test_neighbours_are_those_of_the_features_before_the_last_layer(numbers):
    module = numbers.module()
    train = numbers.recipe.train.inputs
    hidden = np.asarray(nnx.relu(module.layers[0](train)))
    hidden = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    expected = np.sort(hidden[:3] @ hidden.T, axis=1)[:, ::-1][:, :4]
    near = explain.nearest_examples(numbers, train[:3], count=4)
    np.testing.assert_allclose(near.likeness, expected, atol=1e-5)


# ---- as data, and in the report ----


@pytest.mark.parametrize("method", explain.METHODS)
def test_each_explanation_is_plain_data(words, method):
    answer = explain.explain(words, rows_of(words), method)
    assert json.loads(json.dumps(answer))["method"] == method


def test_rows_of_a_preparation_are_explained_by_their_columns(tmp_path):
    trainer = artifacts.people(tmp_path)
    row = {"age": 70, "hours": None, "job": "smith"}
    answer = explain.explain(trainer, row, "integrated_gradients")
    assert answer["columns"] == {"numbers": ["age", "hours"], "categories": ["job"]}
    shares = answer["attributions"]
    total = np.sum(shares["numbers"]) + np.sum(shares["categories"])
    difference = answer["output"][0] - answer["baseline"][0]
    assert total == pytest.approx(difference, abs=0.02)


def test_the_report_shows_what_speaks_for_a_prediction(pictures, tmp_path):
    fitted = lepton.Trainer(pictures.recipe.with_(steps=2), run_dir=tmp_path, devices=1)
    fitted.fit()
    page = explain.write_explanations(fitted, tmp_path, rows=2).read_text()
    assert page.count('alt="its shares"') == 2
    assert page.count('alt="a training row"') == 6


def test_a_heat_map_is_red_where_a_pixel_speaks_for_the_output():
    shares = np.zeros((4, 4))
    shares[0, 0] = 1.0
    shares[3, 3] = -1.0
    drawn = explain.heat_map(np.zeros((4, 4)), shares).astype(int)
    assert drawn[0, 0, 0] > drawn[0, 0, 2] and drawn[3, 3, 2] > drawn[3, 3, 0]
    assert (drawn[1, 1] == 255).all()


# ---- mistakes ----


def test_mistakes_are_errors_with_a_remedy(linear, pictures, tmp_path, capsys):
    rows = rows_of(linear)
    artifact = Artifact.of(linear, rows=4)
    for error, make in (
        (lepton.SettingError, lambda: explain.explain(linear, rows, "occlusoin")),
        (
            lepton.SettingError,
            lambda: explain.explain(linear, rows, "nearest_examples", target=1),
        ),
        (lepton.DataError, lambda: explain.occlusion(linear, rows, target=2)),
        (lepton.DataError, lambda: explain.occlusion(linear, rows[:, :2])),
        (lepton.ModelError, lambda: explain.integrated_gradients(artifact, rows)),
        (lepton.ModelError, lambda: explain.attention_rollout(linear, rows)),
        (lepton.DataError, lambda: explain.permutation_importance(pictures)),
    ):
        with pytest.raises(error) as caught:
            make()
        assert caught.value.remedy
    assert main(["explain", str(tmp_path)]) == 2
    assert "remedy" in capsys.readouterr().err
