"""The models for tables, against their formulas computed row by row in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_jax import models

pytestmark = pytest.mark.usefixtures("quick_compilation")

EDGES = ((0.0, 1.0, 3.0, 7.0), (10.0, 20.0))
SIZES = (4, 3)
NUMBERS = np.array([[0.5, 12.0], [np.nan, 25.0], [6.0, np.nan]], np.float32)
CATEGORIES = np.array([[1, 2], [0, 1], [3, 0]], np.int32)
TRAINED = ("linear", "piecewise", "periodic")


def front(**settings):
    return {"edges": EDGES, "sizes": SIZES, "embedding": 2, **settings}


def relu(x):
    return np.maximum(x, 0)


def features_of(model):
    return np.asarray(model.front(NUMBERS, CATEGORIES))


def ranks():
    """The numbers' positions among their edges, with mean 0 and variance 1."""
    first = [0.5 / 3, np.nan, (2 + 3 / 4) / 3]
    second = [0.2, 1.5, np.nan]
    return np.sqrt(12) * (np.stack([first, second], axis=1) - 0.5)


# ---- the front ----


@pytest.mark.parametrize("kind", TRAINED)
def test_a_missing_number_has_a_vector_of_its_own(kind):
    model = models.TabularFront(**front(kind=kind, number_width=3), rngs=nnx.Rngs(0))
    model.numbers.missing[...] = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    numbers, _ = model.blocks(NUMBERS, CATEGORIES)
    assert numbers[1, 0].tolist() == [1, 2, 3]
    assert numbers[2, 1].tolist() == [4, 5, 6]
    assert not np.isin(np.asarray(numbers[0]), range(1, 7)).any()


def test_piecewise_features_begin_as_linear_ones():
    model = models.TabularFront(
        **front(kind="piecewise", number_width=3, activation=False),
        rngs=nnx.Rngs(0),
    )
    part = model.numbers
    wanted = part.weight[...] * ranks()[..., None] + part.bias[...]
    numbers, _ = model.blocks(NUMBERS, CATEGORIES)
    known = ~np.isnan(NUMBERS)
    np.testing.assert_allclose(numbers[known], np.asarray(wanted)[known], rtol=1e-5)


def test_the_pieces_of_a_number_are_added_as_far_as_it_reaches():
    model = models.TabularFront(
        **front(kind="piecewise", number_width=1, activation=False),
        rngs=nnx.Rngs(0),
    )
    before = model.blocks(NUMBERS, CATEGORIES)[0]
    pieces = jnp.zeros((2, 3, 1)).at[0].set(jnp.array([[1.0], [10.0], [100.0]]))
    model.numbers.pieces[...] = pieces
    after = model.blocks(NUMBERS, CATEGORIES)[0]
    # 0.5 is half of the first bin; 6 is three quarters of the third
    np.testing.assert_allclose((after - before)[:, 0, 0], [0.5, 0, 86], rtol=1e-4)


def test_periodic_features_are_those_of_the_paper():
    model = models.TabularFront(
        **front(kind="periodic", number_width=5),
        rngs=nnx.Rngs(0),
    )
    part = model.numbers
    angle = 2 * np.pi * np.asarray(part.frequencies[...]) * ranks()[..., None]
    waves = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    wanted = relu(waves @ np.asarray(part.shared.kernel) + np.asarray(part.shared.bias))
    numbers, _ = model.blocks(NUMBERS, CATEGORIES)
    known = ~np.isnan(NUMBERS)
    np.testing.assert_allclose(numbers[known], wanted[known], rtol=1e-4, atol=1e-5)


def test_kinds_and_blocks_that_can_not_be_are_named():
    with pytest.raises(ValueError, match="no kind of numbers"):
        models.TabularFront(**front(kind="spline"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a table needs numbers"):
        models.TabularFront(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the same blocks"):
        models.TabularFront(**front(), rngs=nnx.Rngs(0))(NUMBERS)


# ---- TabM ----


def tabm(kind, outputs=3, **settings):
    return models.TabM(
        outputs,
        members=4,
        kind=kind,
        hidden=(6, 5),
        front=front(kind="piecewise", number_width=3),
        rngs=nnx.Rngs(1),
        **settings,
    )


@pytest.mark.parametrize("kind", ["mini", "full"])
def test_all_members_at_once_are_what_each_is_by_itself(kind):
    model = tabm(kind)
    if kind == "full":
        for number, adapters in enumerate(model.adapters):
            key = jax.random.key(number)
            adapters.after[...] = jax.random.normal(key, adapters.after.shape)
            adapters.bias[...] = jax.random.normal(key, adapters.bias.shape)
    model.train()
    outputs = np.asarray(model(NUMBERS, CATEGORIES))
    assert outputs.shape == (3, 4, 3)

    features = features_of(model)
    for member in range(4):
        x = features * np.asarray(model.adapter[member])
        for layer, adapters in zip(model.layers, model.adapters, strict=True):
            if adapters is not None and adapters.before is not None:
                x = x * np.asarray(adapters.before[member])
            x = x @ np.asarray(layer.kernel) + np.asarray(layer.bias)
            if adapters is not None:
                x = x * np.asarray(adapters.after[member])
                x = x + np.asarray(adapters.bias[member])
            x = relu(x)
        x = x @ np.asarray(model.last.kernel[member])
        np.testing.assert_allclose(outputs[:, member], x, rtol=1e-4, atol=1e-5)


def test_outside_of_training_probabilities_are_averaged():
    model = tabm("mini")
    model.train()
    members = np.asarray(model(NUMBERS, CATEGORIES))
    model.eval()
    whole = np.asarray(model(NUMBERS, CATEGORIES))
    shares = np.exp(members) / np.exp(members).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(whole), shares.mean(1), rtol=1e-5)


def test_several_labels_have_probabilities_of_their_own():
    outputs = jax.random.normal(jax.random.key(0), (2, 5, 7))
    merged = np.exp(models.mean_of_probabilities(outputs, classes=(3, 4)))
    np.testing.assert_allclose(merged[:, :3].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(merged[:, 3:].sum(-1), 1, rtol=1e-5)


def test_rates_are_averaged_as_rates_and_quantities_in_their_unit():
    outputs = np.log(np.array([[1.0, 3.0]]))
    np.testing.assert_allclose(models.mean_of_rates(outputs), np.log([2.0]), rtol=1e-6)
    model = tabm(
        "mini",
        outputs=2,
        merge=models.mean_of_outputs,
        center=(100.0, -5.0),
        spread=(10.0, 0.0),
    )
    model.eval()
    given = np.asarray(model(NUMBERS, CATEGORIES))
    assert given.shape == (3, 2)
    assert (given[:, 1] == -5).all()
    assert (abs(given[:, 0] - 100) < 100).all()


def test_members_begin_apart_and_a_column_keeps_its_direction():
    adapter = np.asarray(tabm("mini").adapter[...])
    assert len({tuple(row) for row in adapter.round(4).tolist()}) == 4
    first = adapter[:, :3]  # of the first number's features
    assert (first == first[:, :1]).all()


def test_an_ensemble_needs_members():
    with pytest.raises(ValueError, match="at least 1"):
        models.TabM(2, members=0, front=front(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no kind of TabM"):
        models.TabM(2, kind="packed", front=front(), rngs=nnx.Rngs(0))


# ---- the others ----


def test_a_residual_block_adds_to_what_it_is_given():
    model = models.TabularResNet(
        3,
        width=6,
        inner=8,
        blocks=2,
        dropout=0.0,
        front=front(),
        rngs=nnx.Rngs(0),
    )
    model.eval()
    for block in model.blocks:
        block.narrow.kernel[...] = jnp.zeros((8, 6))
    x = features_of(model) @ np.asarray(model.first.kernel)
    scale = 1 / np.sqrt(1 + model.norm.epsilon)  # of running statistics 0 and 1
    wanted = relu(x * scale) @ np.asarray(model.last.kernel)
    np.testing.assert_allclose(model(NUMBERS, CATEGORIES), wanted, rtol=1e-4, atol=1e-5)


def test_a_transformer_tells_columns_apart():
    model = models.FTTransformer(
        None,
        width=8,
        heads=2,
        blocks=2,
        front={"sizes": (4, 4)},
        rngs=nnx.Rngs(0),
    )
    model.eval()
    table = model.front.embed.embedding
    table[...] = jnp.concatenate([table[:4], table[:4]])
    there, back = model(categories=np.array([[1, 2], [2, 1]], np.int32))
    assert there != back
    model.own[...] = jnp.zeros((3, 8))
    there, back = model(categories=np.array([[1, 2], [2, 1]], np.int32))
    assert float(there) == pytest.approx(float(back), rel=1e-4), (
        "without their own vectors"
    )


def test_a_code_is_no_token():
    with pytest.raises(ValueError, match="no token"):
        models.FTTransformer(2, front=front(kind="codes"), rngs=nnx.Rngs(0))
