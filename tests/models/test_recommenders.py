"""The recommendation models next to their formulas, written with NumPy."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_jax import models

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUMBERS = jnp.array([[0.5, jnp.nan], [-1.0, 2.0], [jnp.nan, jnp.nan]])
CATEGORIES = jnp.array([[0, 3], [2, 1], [1, 0]])
SIZES = (3, 4)


def marked(numbers):
    return np.concatenate([np.nan_to_num(numbers), np.isnan(numbers)], axis=1)


def noisy(model, scale=0.5):
    """Draw every parameter, so that none is zero by chance of its start."""
    state = nnx.state(model, nnx.Param)
    leaves, form = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        scale * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(form, drawn))
    return model


def test_a_rating_is_the_biases_and_the_product_of_each_member():
    model = models.MatrixFactorization(
        4,
        5,
        dim=3,
        sessions=6,
        members=2,
        center=3.5,
        rngs=nnx.Rngs(0),
    )
    noisy(model)
    user = jnp.array([3, 0])
    item = jnp.array([1, 4])
    session = jnp.array([5, 2])
    rating = model(user, item, session)
    assert rating.shape == (2, 2)
    for row, member in itertools.product(range(2), range(2)):
        part = slice(3 * member, 3 * member + 3)
        left = model.user_vectors.embedding[...][user[row]][part]
        right = model.item_vectors.embedding[...][item[row]][part]
        biases = (
            model.user_biases.embedding[...][user[row], 0]
            + model.item_biases.embedding[...][item[row], 0]
            + model.session_biases.embedding[...][session[row], 0]
        )
        assert rating[row, member] == pytest.approx(
            float(3.5 + biases + left @ right), rel=1e-4
        )
    with pytest.raises(ValueError, match="sessions"):
        model(user, item)
    model.eval()
    np.testing.assert_allclose(model(user, item, session), rating.mean(1), rtol=1e-6)


def test_without_dims_the_biases_alone_are_left():
    model = models.MatrixFactorization(4, 5, dim=0, center=2.0, rngs=nnx.Rngs(0))
    assert model(jnp.array([1]), jnp.array([2])).tolist() == [[2.0]]


def test_a_factorization_machine_sums_the_products_of_all_pairs_of_features():
    model = noisy(models.FactorizationMachine(2, SIZES, dim=3, rngs=nnx.Rngs(0)))
    starts = np.array([0, 3])
    linear = model.linear.embed.embedding[...][:, 0]
    table = model.fields.embed.embedding[...]
    expected = []
    for numbers, categories in zip(marked(NUMBERS), CATEGORIES, strict=True):
        rows = categories + starts
        features = [*table[rows], *(numbers[:, None] * model.vectors[...])]
        products = sum(a @ b for a, b in itertools.combinations(features, 2))
        weights = linear[rows].sum() + numbers @ model.weights[...]
        expected.append(float(model.bias[...] + weights + products))
    np.testing.assert_allclose(model(NUMBERS, CATEGORIES), expected, rtol=1e-4)


def test_a_cross_layer_multiplies_its_linear_part_with_the_inputs():
    model = noisy(models.DCN(2, SIZES, dim=2, crosses=2, hidden=(4,), rngs=nnx.Rngs(0)))
    table = model.fields.embed.embedding[...]
    vectors = table[CATEGORIES + jnp.array([0, 3])].reshape(3, -1)
    inputs = jnp.concatenate([marked(NUMBERS), vectors], axis=1)
    x = inputs
    for cross in model.crosses:
        x = inputs * (x @ cross.up.kernel[...] + cross.up.bias[...]) + x
    np.testing.assert_allclose(
        model(NUMBERS, CATEGORIES), model.mlp(x)[:, 0], rtol=1e-4
    )


def test_dlrm_feeds_the_products_of_each_two_vectors():
    model = noisy(models.DLRM(2, SIZES, dim=2, bottom=(3,), top=(4,), rngs=nnx.Rngs(0)))
    table = model.fields.embed.embedding[...]
    dense = nnx.relu(model.bottom(jnp.asarray(marked(NUMBERS), jnp.float32)))
    first = table[CATEGORIES[:, 0]]
    second = table[CATEGORIES[:, 1] + 3]
    pairs = itertools.combinations([dense, first, second], 2)
    products = [(a * b).sum(1, keepdims=True) for a, b in pairs]
    inputs = jnp.concatenate([dense, *products], axis=1)
    np.testing.assert_allclose(
        model(NUMBERS, CATEGORIES), model.top(inputs)[:, 0], rtol=1e-4
    )


@pytest.mark.parametrize(
    "make", [models.DLRM, models.DCN, models.FactorizationMachine, models.WideDeep]
)
@pytest.mark.parametrize("blocks", ["numbers", "categories", "one category"])
def test_click_models_take_one_block_alone_and_say_so_if_it_is_missing(make, blocks):
    sizes = {"numbers": (), "categories": SIZES, "one category": (5,)}[blocks]
    model = make(0 if sizes else 2, sizes, dim=2, rngs=nnx.Rngs(0))
    given = (
        {"categories": CATEGORIES[:, : len(sizes)]} if sizes else {"numbers": NUMBERS}
    )
    logits = model(**given)
    assert logits.shape == (3,)
    assert jnp.isfinite(logits).all()
    with pytest.raises(ValueError, match="blocks"):
        model(NUMBERS, CATEGORIES)


# ---- rankings ----

USERS = jnp.array([1, 0, 1])
HISTORY = jnp.array([[2, 0, -1], [-1, -1, -1], [4, -1, -1]])
ITEMS = jnp.array([3, 3, 0])


def retrieval(**settings):
    given = {
        "dim": 4,
        "history": 3,
        "counts": (2, 1, 1, 2, 1, 0),
        "features": ((0, 1), (1,), (), (2, 0), (1,), (2,)),
        "rngs": nnx.Rngs(0, negatives=1),
    }
    return noisy(models.Retrieval(2, 6, **given | settings))


def test_a_ranking_scores_every_item_and_hides_the_used_ones():
    model = retrieval(used=((5,), (0, 3)), deterministic=True)
    scores = model(USERS, HISTORY)
    assert scores.shape == (3, 6)
    hidden = [[0, 3], [5], [0, 3]]
    for row, items in enumerate(hidden):
        assert np.flatnonzero(scores[row] < -1e8).tolist() == items

    recency = np.exp(model.recency[...])
    table = model.history.embedding[...]
    weights = recency[:2] / recency[:2].sum()
    first = model.users.embedding[...][1] + weights @ table[jnp.array([2, 0])]
    features = model.features.embedding[...]
    item = model.items.embedding[...][4] + features[1]
    bias = model.biases.embedding[...][4, 0]
    assert scores[0, 4] == pytest.approx(float(first @ item + bias), rel=1e-4)
    # nobody has used item 5: it has its features alone
    assert scores[0, 5] == pytest.approx(float(first @ features[2]), rel=1e-4)


def test_all_items_that_were_used_are_negatives_but_ones_own():
    model = retrieval(negatives="all")
    out = model(USERS, HISTORY, ITEMS)
    model.eval()
    scores = model(USERS, HISTORY)
    np.testing.assert_allclose(out["own"], scores[jnp.arange(3), ITEMS], rtol=1e-5)
    for row, own in enumerate(ITEMS.tolist()):
        left_out = np.flatnonzero(out["others"][row] < -1e8).tolist()
        assert left_out == sorted({own, 5})


def test_scores_of_a_batch_are_lowered_by_how_often_an_item_turns_up():
    model = retrieval(negatives="in_batch")
    out = model(USERS, HISTORY, ITEMS)
    model.eval()
    scores = model(USERS, HISTORY)[:, ITEMS] - jnp.log(jnp.array([2, 2, 2]) / 7)
    np.testing.assert_allclose(out["own"], jnp.diagonal(scores), rtol=1e-5)
    # rows 0 and 1 have the same item, which is no negative of either
    assert (out["others"][:2, :2] < -1e8).all()
    np.testing.assert_allclose(out["others"][2, :2], scores[2, :2], rtol=1e-5)


def test_drawn_negatives_estimate_the_sum_over_all():
    full = retrieval(negatives="all")
    drawn = retrieval(negatives="sampled", samples=20_000)
    total, estimate = (
        jnp.exp(model(USERS, HISTORY, ITEMS)["others"]).sum(1)
        for model in (full, drawn)
    )
    np.testing.assert_allclose(estimate, total, rtol=0.05)


def test_each_call_draws_other_negatives():
    model = retrieval(negatives="sampled", samples=64)
    one, two = (model(USERS, HISTORY, ITEMS)["others"] for _ in range(2))
    assert not jnp.array_equal(one, two)


def test_cosines_lie_within_the_temperature():
    model = retrieval(
        cosine=True, temperature=0.5, popularity=False, deterministic=True
    )
    assert jnp.abs(model(USERS, HISTORY)).max() <= 2.001


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": "none"}, "negatives"),
        ({"counts": (1,)}, "1 counts for 6 items"),
        ({"features": ((1,),)}, "1 features for 6 items"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        retrieval(**settings)


def test_an_ensemble_gives_each_copys_outputs_in_training_and_then_their_mean():
    make = partial(models.FactorizationMachine, 0, SIZES, dim=2, scale=1.0)
    model = models.Ensemble(make, 3, rngs=nnx.Rngs(0))
    apart = model(categories=CATEGORIES)
    assert apart.shape == (3, 3)
    assert not jnp.allclose(apart[:, 0], apart[:, 1]), "copies differ"
    graph, state = nnx.split(model.copies)
    second = nnx.merge(graph, jax.tree.map(lambda x: x[1], state))
    expected = second(categories=CATEGORIES)
    np.testing.assert_allclose(apart[:, 1], expected, rtol=1e-6)
    model.eval()
    np.testing.assert_allclose(model(categories=CATEGORIES), apart.mean(1), rtol=1e-5)
