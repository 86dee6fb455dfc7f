"""Pruning: channels that are really gone, and zeros that stay zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax.ship import Artifact, shrink
from lepton_jax.ship.shrink import cutting
from lepton_jax.ship.shrink.calls import called
from lepton_jax.ship.shrink.channels import channels_of
from lepton_jax.ship.shrink.cutting import without, zeroed
from tests.ship import shrinking

pytest.importorskip("safetensors", reason="needs the extra ship")
pytest.importorskip("flatbuffers", reason="needs the extra ship")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(quick_compilation):
    return shrinking.trained()


MODELS = {
    "mlp": (lambda: lepton.models.MLP((6, 8, 4, 3), rngs=nnx.Rngs(0)), (3, 6)),
    "cnn": (
        lambda: lepton.models.CNN(
            3,
            size=(6, 6, 1),
            widths=(4, 6),
            dense=8,
            batch_norm=True,
            rngs=nnx.Rngs(0),
        ),
        (3, 6, 6, 1),
    ),
}


def groups_of(name):
    make, shape = MODELS[name]
    module = make()
    module.eval()
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    return module, inputs, channels_of(module, inputs)


# ---- which channels belong together ----


def test_the_columns_of_a_layer_belong_to_the_rows_of_the_next():
    _, _, groups = groups_of("mlp")
    first, second = groups
    assert (first.name, first.size) == ("layers/0", 8)
    places = {(place.path, place.dim) for place in first.places}
    assert places == {
        ("layers/0/kernel", 1),
        ("layers/0/bias", 0),
        ("layers/1/kernel", 0),
    }
    assert (second.name, second.size) == ("layers/1", 4)


def test_a_flattened_picture_has_its_channels_in_every_so_many_rows():
    _, _, groups = groups_of("cnn")
    last = next(group for group in groups if group.name == "convs/1")
    dense = next(place for place in last.places if place.path == "dense/kernel")
    assert (dense.outer, dense.inner) == (9, 1)  # 3 x 3 pixels of 6 channels


def test_channels_that_a_norm_or_the_heads_of_an_attention_mix_are_not_cut():
    model = lepton.models.TextEncoder(3, 20, dim=8, heads=2, layers=1, rngs=nnx.Rngs(0))
    model.eval()
    groups = channels_of(model, jnp.ones((2, 5), jnp.int32))
    assert [group.name for group in groups] == ["layers/0/up"]


@settings(deadline=None, max_examples=3)
@given(data=st.data(), name=st.sampled_from(sorted(MODELS)))
def test_whatever_channels_go_the_rest_computes_as_with_zeros_in_their_place(
    data, name
):
    module, inputs, groups = groups_of(name)
    kept = {
        group.name: np.sort(
            data.draw(
                st.lists(
                    st.integers(0, group.size - 1),
                    min_size=1,
                    max_size=group.size,
                    unique=True,
                )
            )
        )
        for group in groups
    }
    smaller = without(module, groups, kept)
    expected = called(zeroed(module, groups, kept), inputs)
    np.testing.assert_allclose(called(smaller, inputs), expected, atol=1e-5)
    sizes = {
        "/".join(map(str, path)): variable.get_value().shape
        for path, variable in nnx.to_flat_state(nnx.state(smaller))
    }
    first = groups[0]
    for place in first.places:
        extent = sizes[place.path][place.dim]
        others = place.outer * place.inner
        if sum(p.path == place.path and p.dim == place.dim for p in first.places) == 1:
            assert extent == others * len(kept[first.name])


# ---- cutting a trained model ----


def test_half_of_the_channels_are_gone_and_training_brings_the_metric_back(
    trained, tmp_path
):
    small = shrink.cut(trained, 0.5, learning_rate=1e-2)
    assert small.state.params["layers"][0]["kernel"].shape == (12, 32)
    module = small.module()
    assert (module.layers[0].out_features, module.layers[1].in_features) == (32, 32)
    before = small.evaluate(trained.recipe.test)[0]
    small.fit(steps=40)
    assert small.evaluate(trained.recipe.test)[0] < before
    Artifact.of(small, rows=10).save(tmp_path / "small.lepton")
    opened = Artifact.open(tmp_path / "small.lepton")
    assert opened.weights["params/layers/0/kernel"].shape == (12, 32)


def test_the_channels_that_the_loss_needs_stay():
    # of 8 hidden units 4 do the work, and 4 have no way to the outputs
    model = lepton.models.MLP((4, 8, 2), rngs=nnx.Rngs(0))
    dead = [1, 2, 5, 6]
    kernel = model.layers[1].kernel
    kernel.set_value(kernel.get_value().at[jnp.asarray(dead)].set(0.0))
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(64, 4)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(np.int32)
    trainer = lepton.Trainer(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        train=(inputs, labels),
        test=(inputs, labels),
        batch_size=32,
        devices=1,
    )
    whole = trainer.evaluate()
    small = shrink.cut(trainer, 0.5)
    np.testing.assert_allclose(small.evaluate(), whole, rtol=1e-5)


def test_a_model_that_knows_its_sizes_is_refused_with_the_groups_named():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 8, rngs=rngs)
            self.down = nnx.Linear(8, 2, rngs=rngs)
            self.scale = 1 / 8

        def __call__(self, x):
            hidden = self.up(x)
            return self.down(hidden) * (hidden.shape[1] * self.scale)

    inputs = np.ones((8, 4), np.float32)
    trainer = lepton.Trainer(
        model=Net,
        loss=optax.squared_error,
        optimizer=optax.sgd(0.1),
        train=(inputs, np.ones((8, 2), np.float32)),
        batch_size=8,
        devices=1,
    )
    trainer.evaluate(trainer.recipe.train)
    with pytest.raises(lepton.ModelError, match="something else") as caught:
        shrink.cut(trainer, 0.5)
    assert "up" in caught.value.remedy


def test_a_group_that_is_slower_when_it_is_cut_is_left_whole(trained, monkeypatch):
    # in turns: all cut, then each group left whole
    monkeypatch.setattr(cutting, "latencies_of", lambda models, rows: [1.0, 0.5, 1.4])
    assert shrink.quicker(trained, 0.5) == ["layers/1"]
    monkeypatch.setattr(cutting, "latencies_of", lambda models, rows: [1.0, 1.0, 0.95])
    assert shrink.quicker(trained, 0.5) == ["layers/0", "layers/1"]


# ---- zeros while it trains ----


def fitted(prune, steps=30, **changes):
    return shrinking.trained(
        steps, optimizer=shrink.pruning(optax.adamw, prune), **changes
    )


def test_the_share_of_zeros_is_exactly_the_schedules():
    share = shrink.rising(0.75, end=20)
    trainer = fitted(shrink.magnitude(share, every=5))
    assert shrink.zeros(trainer) == {f"layers/{at}/kernel": 0.75 for at in range(3)}
    bias = np.asarray(trainer.state.params["layers"][0]["bias"])
    assert (bias != 0).mean() > 0.5


def test_the_largest_numbers_stay_and_zeros_stay_zero():
    transformation = shrink.magnitude(0.5, every=1)
    params = {"kernel": jnp.asarray([[1.0, -4.0], [0.5, 3.0]])}
    state = transformation.init(params)
    for _ in range(3):
        updates = {"kernel": jnp.full((2, 2), 0.25)}
        updates, state = transformation.update(updates, state, params)
        params = optax.apply_updates(params, updates)
    assert params["kernel"].tolist() == [[0.0, -3.25], [0.0, 3.75]]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), shape=st.sampled_from([(8, 3), (3, 3, 4, 5)]))
def test_of_each_four_inputs_of_an_output_two_stay(seed, shape):
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    transformation = shrink.n_of_m(2, 4)
    params = {"kernel": jnp.asarray(weight)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transformation.update(zero, transformation.init(params), params)
    made = np.asarray(optax.apply_updates(params, updates)["kernel"])
    by_output = np.moveaxis(made, -2, -1).reshape(-1, 4)
    whole = np.moveaxis(weight, -2, -1).reshape(-1, 4)
    assert ((by_output != 0).sum(axis=1) == 2).all()
    smallest_kept = np.where(by_output != 0, np.abs(whole), np.inf).min(axis=1)
    largest_gone = np.where(by_output == 0, np.abs(whole), 0).max(axis=1)
    assert (smallest_kept >= largest_gone).all()


def test_channels_that_were_trained_to_zero_are_cut_without_a_change(trained):
    groups = shrink.channels(trained)
    pruned = fitted(shrink.channels_off(groups, 0.5, every=10))
    small = shrink.cut(pruned, 0.5)
    np.testing.assert_allclose(small.evaluate(), pruned.evaluate(), rtol=1e-4)


def test_a_saved_run_names_its_pruning(tmp_path):
    trainer = fitted(shrink.magnitude(0.5), steps=2)
    trainer.save(tmp_path / "saved")
    opened = lepton.Trainer.open(tmp_path / "saved")
    test = trainer.recipe.test
    np.testing.assert_array_equal(
        opened.predict(test.inputs), trainer.predict(test.inputs)
    )


def test_mistakes_are_errors_with_a_remedy(trained):
    for make in (
        lambda: shrink.rising(1.0, end=3),
        lambda: shrink.rising(0.5, begin=3, end=3),
        lambda: shrink.magnitude(-0.1),
        lambda: shrink.n_of_m(4, 4),
        lambda: shrink.cut(trained, 1.0),
        lambda: shrink.cut(trained, only=["convs/*"]),
    ):
        with pytest.raises(lepton.SettingError):
            make()
