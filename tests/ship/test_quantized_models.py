"""Quantized models: what is stored, what is computed, and what becomes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax.ship import Artifact, shrink
from lepton_jax.ship.shrink import forms, packed, quantization
from tests.ship import shrinking

pytest.importorskip("qwix", reason="needs the extra quant")
pytest.importorskip("safetensors", reason="needs the extra ship")
pytest.importorskip("flatbuffers", reason="needs the extra ship")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(quick_compilation):
    return shrinking.trained()


def images(trainer):
    return trainer.recipe.test.inputs


def outputs(trainer):
    return trainer.predict(images(trainer), decode=lambda x: x)


# ---- forms ----


@settings(deadline=None, max_examples=20)
@given(
    values=st.lists(st.integers(-8, 7), min_size=1, max_size=31),
)
def test_numbers_of_four_bits_come_out_of_their_bytes_as_they_went_in(values):
    array = jnp.asarray(values, jnp.int8)
    pairs = forms.in_pairs(array)
    assert pairs.nbytes == -(-len(values) // 2)
    assert forms.out_of_pairs(pairs, array.shape).tolist() == values


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_stored_to_half_a_step_of_its_own_tile(bits):
    # an independent reference: NumPy, tile by tile
    weight = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    weight[:32] *= 100
    form = forms.by_outputs(weight.shape, bits, group=32)
    arrays = form.pack(weight)
    assert sum(array.nbytes for array in arrays.values()) == form.nbytes
    back = np.asarray(form.unpack(arrays))
    steps = 2 ** (bits - 1) - 0.5
    for tile in (slice(0, 32), slice(32, 64)):
        largest = np.abs(weight[tile]).max(axis=0)
        apart = np.abs(back[tile] - weight[tile])
        inner = np.abs(weight[tile]) <= 0.7 * largest  # what is never cut off
        assert (apart <= largest / steps / 2 * 1.001)[inner].all()


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_stored_in_more_bytes_than_it_had(bits):
    for rows in (257, 20_002, 4096, 86):  # a prime, twice a prime, ...
        for form in (
            forms.by_outputs((rows, 2), bits, group=32),
            forms.by_rows((rows, 67), bits, group=32),
        ):
            assert form.nbytes < 0.4 * 4 * np.prod(form.shape)


def test_constants_that_are_factors_are_stored_small_and_edges_are_not():
    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(32, 32, rngs=rngs)
            self.table = nnx.Variable(rngs.params.normal((64, 32)))
            self.edges = nnx.Variable(jnp.linspace(0, 1e5, 1024).reshape(32, 32))

        def __call__(self, x):
            seen = (x[:, None] > self.edges.get_value()).mean(axis=1)
            return self.layer(x + seen) @ self.table.get_value().T

    module = Scaled(nnx.Rngs(0))
    kind = quantization.KINDS["w8"]
    x = jnp.ones((2, 32))
    constants = quantization.scaling_constants(module, x)
    assert constants == {"table"}
    own = quantization.forms_of(module, kind, constants=constants)
    small = packed.packed(module, own)
    bytes_of = {
        form: sum(x.nbytes for x in jax.tree.leaves(nnx.state(form)))
        for form in (module, small)
    }
    saved = bytes_of[module] - bytes_of[small]
    assert saved > 0.68 * 4 * (64 * 32 + 32 * 32)
    apart = np.abs(small(x) - module(x)).max() / np.abs(module(x)).max()
    assert apart < 0.02


def test_cutting_off_an_outlier_is_only_done_where_it_helps():
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(256, 2)).astype(np.float32)
    form = forms.by_outputs(weight.shape, 4)
    plain = np.abs(weight).max(axis=0) / 7.5
    rounded = np.clip(np.round(weight / plain), -7, 7) * plain
    error = np.sum((np.asarray(form.unpack(form.pack(weight))) - weight) ** 2)
    assert error < np.sum((rounded - weight) ** 2)


def test_the_gradient_passes_through_the_rounding():
    form = forms.by_outputs((8, 2), 4)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), jnp.float32)
    slope = jax.grad(lambda w: jnp.sum(form.rounded(w) * 3))(weight)
    np.testing.assert_allclose(slope, 3)


# ---- models ----


@pytest.mark.parametrize("kind", ["w8", "w8a8", "w4"])
def test_a_quantized_model_predicts_nearly_the_same_with_a_fraction_of_the_bytes(
    trained, kind
):
    small = shrink.quantize(trained, kind)
    before = outputs(trained)
    apart = np.abs(outputs(small) - before).max() / np.abs(before).max()
    assert apart < {"w8": 0.02, "w8a8": 0.04, "w4": 0.25}[kind]
    agrees = small.predict(images(trained)) == trained.predict(images(trained))
    assert agrees.mean() >= (0.95 if kind != "w4" else 0.85)
    assert shrink.size_of(small) < shrink.size_of(trained)


def test_what_is_computed_is_what_the_stored_weights_say(trained):
    small = shrink.quantize(trained, "w8")
    module = trained.module()
    for path, form in quantization.forms_of(module, shrink.KINDS["w8"]).items():
        keys = [int(key) if key.isdigit() else key for key in path.split("/")]
        variable = dict(nnx.to_flat_state(nnx.state(module)))[tuple(keys)]
        variable.set_value(form.unpack(form.pack(variable.get_value())))
        nnx.update(module, nnx.from_flat_state({tuple(keys): variable}))
    np.testing.assert_allclose(outputs(small), module(images(trained)), atol=1e-5)


def test_a_quantized_model_becomes_an_artifact_whose_weights_are_whole_numbers(
    trained, tmp_path
):
    small = shrink.quantize(trained, "w4")
    Artifact.of(small, rows=20).save(tmp_path / "small.lepton")
    opened = Artifact.open(tmp_path / "small.lepton")
    kinds = {array.dtype.name for array in opened.weights.values()}
    assert kinds == {"uint8", "float32"}
    assert opened.size == shrink.size_of(small)
    np.testing.assert_allclose(
        opened.run(images(trained))["outputs"], outputs(small), atol=1e-5
    )


def test_spared_weights_keep_more_bits(trained):
    whole = shrink.size_of(shrink.quantize(trained, "w4"))
    spared = shrink.quantize(trained, "w4", spare=["layers/0/*"])
    values = spared.state.variables["weights"]["layers"]["0"]["kernel"]["values"]
    assert values.dtype == np.int8
    assert shrink.size_of(spared) > whole


def test_training_with_rounded_weights_makes_a_better_model_of_few_bits(trained):
    tuned = shrink.aware(trained, "w4", learning_rate=3e-3)
    assert set(tuned.state.params["layers"]) == set(trained.state.params["layers"])
    test = trained.recipe.test
    before = shrink.quantize(trained, "w4").evaluate(test)[0]
    tuned.fit(steps=30)
    small = shrink.quantize(tuned, "w4")
    assert small.evaluate(test)[0] < before
    # it is trained as what it will be
    np.testing.assert_allclose(outputs(tuned), outputs(small), atol=0.3)


def test_training_in_whole_numbers_goes_on_from_the_weights(trained):
    tuned = shrink.aware(trained, "w8a8")
    assert np.abs(outputs(tuned) - outputs(trained)).max() < 0.2
    before = tuned.evaluate(trained.recipe.test)[0]
    tuned.fit(steps=10)
    assert shrink.quantize(tuned, "w8a8").evaluate()[0] < before + 0.02


def test_weights_that_a_loop_reads_are_left_out_of_whole_number_products():
    model = lepton.models.LSTM(2, 40, dim=16, hidden=16, rngs=nnx.Rngs(0))
    tokens = jnp.ones((2, 5), jnp.int32)
    assert quantization.weights_in_loops(model, tokens) == {"recurrent/kernel"}


def test_a_packed_module_is_called_as_the_one_it_was_made_of():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x, mask, deterministic: bool = True):
            return self.layer(x) * mask

    module = Net(nnx.Rngs(0))
    shapes = quantization.quantizable(module)
    own = {path: forms.by_outputs(shape, 8) for path, shape in shapes.items()}
    small = packed.packed(module, own)
    x = jnp.ones((2, 16))
    mask = jnp.arange(16.0)
    apart = small(x, mask=mask) - module(x, mask=mask)
    assert np.abs(apart).max() < 0.2
    with pytest.raises(TypeError):
        small(x)


# ---- mistakes ----


def test_mistakes_are_errors_with_a_remedy(trained):
    with pytest.raises(lepton.SettingError, match="did you mean 'w8a8'"):
        shrink.quantize(trained, "w8a")
    with pytest.raises(lepton.SettingError, match="layers/0/kernel"):
        shrink.quantize(trained, "w4", spare=["heads/*"])
    small = shrink.quantize(trained, "w8")
    with pytest.raises(lepton.ModelError, match="quantized already"):
        shrink.quantize(small, "w8")


def test_without_its_library_the_extra_is_named(trained, monkeypatch):
    from lepton_jax.ship.shrink import library

    library.qwix.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(lepton.LeptonError, match=r"lepton-jax\[quant\]"):
        shrink.quantize(trained, "w8")
    library.qwix.cache_clear()
