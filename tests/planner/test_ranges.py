"""The whole numbers that a program takes, by programs whose ranges are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lepton_jax import Recipe, models, trace
from lepton_jax.losses import binary_cross_entropy, cross_entropy, squared_error
from lepton_jax.planner import limits

ROWS = 8
Y = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
X = jax.ShapeDtypeStruct((ROWS, 4), jnp.float32)
IDS = jax.ShapeDtypeStruct((ROWS, 6), jnp.int32)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Tokens(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(50, 4, rngs=rngs)
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(self.table(x).mean(1))


class Shifted(Tokens):
    """The tokens before the next ones, with a first one in front."""

    def __call__(self, x):
        before = jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]
        return self.layer(self.table(before)).mean(1)


class Columns(nnx.Module):
    """A table of its own for each column but the last, whose ids are kept in range."""

    def __init__(self, rngs: nnx.Rngs):
        self.tables = nnx.List([nnx.Embed(n, 4, rngs=rngs) for n in (50, 7)])
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        first, second = (table(x[:, i]) for i, table in enumerate(self.tables))
        last = self.tables[1](jnp.clip(x[:, 5], 0, 6))
        return self.layer(first + second + last)


class Looping(Tokens):
    """Looks up one token after the other."""

    def __call__(self, x):
        def step(carry, ids):
            return carry + self.table.embedding[...][ids], None

        return self.layer(jax.lax.scan(step, jnp.zeros((ROWS, 4)), x.T)[0])


class Spelling(Tokens):
    """Ids made in another way than they come."""

    def __call__(self, x):
        return self.layer(self.table(x % 50).mean(1) + self.table(x[:, 0] // 2))


def limits_of(
    model=Net,
    inputs=X,
    targets=Y,
    loss=cross_entropy,
    **fields,
):
    recipe = Recipe(
        model=model,
        loss=loss,
        optimizer=optax.sgd(0.1),
        batch_size=ROWS,
        **fields,
    )
    return limits(trace(recipe, inputs, targets))


def sizes(limits, path="targets"):
    return [(limit.size, limit.columns) for limit in limits if limit.path == path]


LOSSES = {
    "itself": cross_entropy,
    "scaled": lambda o, t: 0.5 * cross_entropy(o, t) + 1e-4 * (o**2).mean(-1),
    "its mean": lambda o, t: cross_entropy(o, t).mean(),
    "under remat": lambda o, t: jax.checkpoint(cross_entropy)(o, t),
    "jitted": jax.jit(lambda o, t: cross_entropy(o, t)),
    "by hand": lambda o, t: -jax.nn.log_softmax(o)[jnp.arange(len(t)), t],
    "one by one": lambda o, t: jax.vmap(lambda a, b: -jax.nn.log_softmax(a)[b])(o, t),
    "in a loop": lambda o, t: jax.lax.map(
        lambda p: -jax.nn.log_softmax(p[0])[p[1]], (o, t)
    ),
    "of columns": lambda o, t: (
        -jnp.take_along_axis(
            jax.nn.log_softmax(o),
            t.reshape(-1, 1).astype(jnp.int16),
            axis=-1,
        )[:, 0]
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_labels_are_classes_whatever_wraps_the_loss(name):
    (limit,) = limits_of(loss=LOSSES[name])
    assert (limit.path, limit.size, limit.columns) == ("targets", 3, None)
    assert not limit.negative
    assert not limit.beyond
    assert "3 classes" in limit.why


ONE_HOT = {
    "one_hot": lambda o, t: optax.softmax_cross_entropy(o, jax.nn.one_hot(t, 3)),
    "by hand": lambda o, t: (
        -((t[:, None] == jnp.arange(3)) * jax.nn.log_softmax(o)).sum(-1)
    ),
    "smoothed": lambda o, t: optax.softmax_cross_entropy(
        o, optax.smooth_labels(jax.nn.one_hot(t, 3), 0.1)
    ),
}


@pytest.mark.parametrize("name", ONE_HOT)
def test_one_hot_takes_negative_labels_for_none(name):
    (limit,) = limits_of(loss=ONE_HOT[name])
    assert (limit.size, limit.negative, limit.beyond) == (3, True, False)


UNBOUND = {
    "replaced": lambda o, t: cross_entropy(o, jnp.where(t < 0, 0, t)),
    "clamped": lambda o, t: cross_entropy(o, jnp.clip(t, 0, 2)),
    "at least": lambda o, t: cross_entropy(o, jnp.maximum(t, 0)),
    "computed": lambda o, t: cross_entropy(o, t - 1),
    "remainder": lambda o, t: cross_entropy(o, t % 3),
    "clipped": lambda o, t: jnp.take_along_axis(o, t[:, None], 1, mode="clip")[:, 0],
    "filled": lambda o, t: o.T.at[t].get(mode="fill", fill_value=0).sum(1),
    "a number among numbers": lambda o, t: jnp.where(
        t.astype(jnp.float32) == jnp.inf,
        0,
        o[:, 0] + jnp.minimum(t + jnp.nan, jnp.inf),
    ),
    "counted": lambda o, t: jnp.square(o[:, 0] - t),
    "in one branch": lambda o, t: jax.lax.cond(
        o.sum() > 0,
        lambda: cross_entropy(o, t),
        lambda: o[:, 0],
    ),
    "wrapped by hand": lambda o, t: cross_entropy(o, jnp.where(t < 0, t + 3, t)),
    "set against positions": lambda o, t: (t == jnp.arange(8)) * o[:, 0],
    "lengths": lambda o, t: (t[:, None] > jnp.arange(3)) @ jnp.ones(3) * o[:, 0],
}


@pytest.mark.parametrize("name", UNBOUND)
def test_what_the_code_changes_itself_has_no_bound(name):
    assert limits_of(loss=UNBOUND[name]) == []


LOOKED_OUT_FOR = {
    "weights": (
        lambda o, t: (cross_entropy(o, t), t >= 0),
        True,
        (),
    ),
    "where": (
        lambda o, t: jnp.where(
            t > -1,
            cross_entropy(o, t),
            0,
        ),
        True,
        (),
    ),
    "zero first": (
        lambda o, t: jnp.where(
            ~(t >= 0),
            0,
            cross_entropy(o, t),
        ),
        True,
        (),
    ),
    "one value": (
        lambda o, t: jnp.where(
            t != -100,
            cross_entropy(o, t),
            0,
        ),
        False,
        (-100,),
    ),
    "padding": (
        lambda o, t: (cross_entropy(o, t), t != 0),
        False,
        (0,),
    ),
    "not these": (
        lambda o, t: (cross_entropy(o, t), t > 0),
        False,
        (),
    ),
}


@pytest.mark.parametrize("name", LOOKED_OUT_FOR)
def test_values_that_the_code_looks_out_for_are_let_through(name):
    loss, negative, spared = LOOKED_OUT_FOR[name]
    (limit,) = limits_of(loss=loss)
    assert (limit.size, limit.negative, limit.spared) == (3, negative, spared)


def test_token_ids_have_the_range_of_the_table():
    for model in (Tokens, Looping):
        inputs = [x for x in limits_of(model, IDS) if x.path == "inputs"]
        assert sizes(inputs, "inputs") == [(50, None)]
        assert "'table/embedding', which has 50 rows" in inputs[0].why
    assert sizes(limits_of(Shifted, IDS), "inputs") == [(50, (0, 1, 2, 3, 4))]
    assert sizes(limits_of(Columns, IDS), "inputs") == [(50, (0,)), (7, (1,))]
    assert sizes(limits_of(Spelling, IDS), "inputs") == []


def test_preprocessing_is_followed():
    bytes_ = jax.ShapeDtypeStruct((ROWS, 6), jnp.uint8)
    through = limits_of(
        Tokens,
        bytes_,
        preprocess=lambda x: x.astype(jnp.int32)[:, ::-1],
    )
    assert sizes(through, "inputs") == [(50, None)]
    assert sizes(limits_of(Tokens, bytes_, preprocess=lambda x: x // 6), "inputs") == []
    pixels = jax.ShapeDtypeStruct((ROWS, 4), jnp.uint8)
    assert sizes(limits_of(Net, pixels, preprocess=lambda x: x / 255), "inputs") == []


def test_the_zoo_has_the_ranges_of_its_tables():
    lm = limits_of(
        lambda rngs: models.TransformerLM(
            11,
            dim=16,
            layers=2,
            heads=4,
            loop="scan",
            rngs=rngs,
        ),
        IDS,
        IDS,
    )
    assert sizes(lm, "inputs") == sizes(lm) == [(11, None)]
    towers = limits_of(
        lambda rngs: models.TwoTower(
            7,
            5,
            dim=4,
            hidden=(6,),
            width=3,
            rngs=rngs,
        ),
        {"user": Y, "item": Y},
        jax.ShapeDtypeStruct((ROWS,), jnp.float32),
        squared_error,
    )
    assert sizes(towers, "inputs/user") == [(7, None)]
    assert sizes(towers, "inputs/item") == [(5, None)]


def test_a_binary_loss_bounds_nothing():
    def logit(rngs):
        return models.Logistic(4, rngs=rngs)

    assert limits_of(logit, loss=binary_cross_entropy) == []


def test_limits_find_what_breaks_them():
    def weighted(outputs, targets):
        return cross_entropy(outputs, targets), targets >= 0

    (limit,) = limits_of(loss=weighted)
    assert limit.broken(np.array([-1, 0, 2])) is None
    broken = limit.broken(np.array([-1, 3, 2]))
    np.testing.assert_array_equal(broken[:, 0], [0, 1, 0])

    first, _, _ = limits_of(Columns, IDS)
    rows = np.full((2, 6), 60)
    rows[:, 0] = 3, 50
    np.testing.assert_array_equal(first.broken(rows)[:, 0], [False, True])
