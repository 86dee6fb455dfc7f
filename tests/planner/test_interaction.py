"""Where samples of a batch meet, by programs that are known to mix them or not to."""

import jax
import jax.numpy as jnp
import optax
import pytest

from lepton_jax import Recipe, models, trace
from lepton_jax.losses import cross_entropy
from lepton_jax.planner.program.interaction import (
    is_mean_of_samples,
    where_samples_of_a_step_meet,
    where_they_meet,
)
from lepton_jax.step.module import forward

X = jax.ShapeDtypeStruct((8, 4), jnp.float32)
Y = jax.ShapeDtypeStruct((8,), jnp.int32)

APART = {
    "loss": lambda x, y: cross_entropy(x, y),
    "norm of each": lambda x, y: (
        x
        / jnp.linalg.norm(
            x,
            axis=1,
            keepdims=True,
        )
    ),
    "reshape and back": lambda x, y: x.reshape(-1).reshape(8, 2, 2) * y[:, None, None],
    "sort of each": lambda x, y: jnp.sort(x, axis=1),
    "matmul": lambda x, y: x @ jnp.ones((4, 3)),
    "scan over features": lambda x, y: (
        jax.lax.scan(lambda c, r: (c + r, c), jnp.zeros(8), x.T)[1].T
    ),
    "vmap": lambda x, y: jax.vmap(lambda row, i: row[i])(x, y),
    "remat": lambda x, y: jax.checkpoint(lambda x: jnp.sin(x).sum(1))(x),
    "one hot": lambda x, y: jax.nn.one_hot(y, 4) * x,
    "repeated": lambda x, y: jnp.repeat(x, 2, axis=0).reshape(8, 2, 4),
}

MEET = {
    "mean over the batch": lambda x, y: x - x.mean(0),
    "pairs": lambda x, y: x @ x.T,
    "outer product": lambda x, y: x[:, None] * x[None],
    "sort of the batch": lambda x, y: jnp.sort(x, axis=0),
    "reversed": lambda x, y: x[::-1],
    "rolled": lambda x, y: jnp.roll(x, 1, axis=0),
    "shifted": lambda x, y: jax.lax.pad(
        x,
        0.0,
        ((1, -1, 0), (0, 0, 0)),
    ),
    "other rows": lambda x, y: x[jnp.arange(8)[::-1]],
    "the first row": lambda x, y: x - x[:1],
    "groups": lambda x, y: x.reshape(2, 4, 4).sum(1),
    "reshape to mixed rows": lambda x, y: x.reshape(4, 8) * 2,
    "transposed rows": lambda x, y: x.T.reshape(8, 4),
    "loop over the batch": lambda x, y: jax.lax.scan(
        lambda c, r: (c + r, c),
        jnp.zeros(4),
        x,
    )[1],
    "places at experts": lambda x, y: jnp.cumsum(
        jax.nn.one_hot(y, 3),
        axis=0,
    ),
    "segments": lambda x, y: jax.ops.segment_sum(x, y, 3),
    "a branch by all": lambda x, y: jax.lax.cond(
        x.sum() > 0,
        lambda x: x,
        lambda x: -x,
        x,
    ),
    "a loop until all are": lambda x, y: jax.lax.while_loop(
        lambda x: x.max() > 1,
        lambda x: x / 2,
        x,
    ),
    "a callback": lambda x, y: jax.pure_callback(lambda x: x, X, x),
    "mean of losses": lambda x, y: cross_entropy(x, y).mean(),
    "variance": lambda x, y: jnp.var(x),
    "square of a mean": lambda x, y: (x.mean(0) ** 2).sum(),
    "weighted mean": lambda x, y: (x * (y > 0)[:, None]).sum() / (y > 0).sum(),
}


@pytest.mark.parametrize("name", APART)
def test_samples_that_stay_apart_are_said_to(name):
    assert where_they_meet(APART[name], (), (X, Y)) is None


@pytest.mark.parametrize("name", MEET)
def test_an_operation_at_which_samples_meet_is_named(name):
    assert "test_interaction.py" in where_they_meet(MEET[name], (), (X, Y))


def test_a_mean_at_the_end_is_no_meeting_where_means_are_wanted():
    def meet(function):
        return where_they_meet(function, (), (X, Y), means=True) is not None

    assert not meet(lambda x, y: cross_entropy(x, y).mean())
    assert meet(lambda x, y: cross_entropy(x - x.mean(0), y).mean())
    assert meet(lambda x, y: jnp.var(x))


def test_two_inputs_that_are_batches_meet_in_their_product():
    assert "dot_general" in where_they_meet(lambda x, y: x @ y.T, (), (X, X))


ZOO = {
    "MLP": (
        lambda rngs: models.MLP(
            (12, 8, 3),
            dropout=0.5,
            rngs=rngs,
        ),
        (8, 12),
        None,
    ),
    "CNN": (
        lambda rngs: models.CNN(
            3,
            size=(8, 8, 1),
            batch_norm=True,
            rngs=rngs,
        ),
        (8, 8, 8, 1),
        "reduce_sum",
    ),
    "LSTM": (
        lambda rngs: models.LSTM(
            11,
            3,
            dim=4,
            hidden=8,
            rngs=rngs,
        ),
        (8, 6),
        None,
    ),
    "transformer": (
        lambda rngs: models.TransformerLM(
            11,
            dim=16,
            layers=2,
            heads=4,
            kv_heads=2,
            loop="scan",
            rngs=rngs,
        ),
        (8, 6),
        None,
    ),
    "experts, whose places are those of one sequence": (
        lambda rngs: models.MoELM(
            11,
            dim=16,
            layers=1,
            heads=2,
            experts=4,
            rngs=rngs,
        ),
        (8, 6),
        None,
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_keeps_samples_apart_but_for_batch_norm_in_training(name):
    model, shape, meeting = ZOO[name]
    kind = jnp.int32 if shape == (8, 6) else jnp.float32
    targets = shape if shape == (8, 6) and name != "LSTM" else shape[:1]
    recipe = Recipe(
        model=model,
        loss=cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=8,
    )
    traced = trace(
        recipe,
        jax.ShapeDtypeStruct(shape, kind),
        jax.ShapeDtypeStruct(targets, jnp.int32),
    )

    where = where_samples_of_a_step_meet(traced)
    if meeting is None:
        assert where is None
    else:
        assert meeting in where

    def evaluated(params, variables, inputs):
        outputs, _ = forward(
            recipe, traced.functional, params, variables, inputs, None, False
        )
        return outputs

    state = (traced.state.params, traced.state.variables)
    assert where_they_meet(evaluated, state, (traced.inputs,)) is None


def batches(rows):
    outputs = jax.ShapeDtypeStruct((rows, 3), jnp.float32)
    return outputs, jax.ShapeDtypeStruct((rows,), jnp.int32)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            lambda o, t: cross_entropy(o, t).mean(),
            True,
        ),
        (
            lambda o, t: (o.argmax(-1) == t).mean(),
            True,
        ),
        (
            lambda o, t: 1 - (o.argmax(-1) == t).sum() / len(t),
            True,
        ),
        (
            lambda o, t: cross_entropy(o, t).mean() + 0.1 * (o**2).mean(),
            True,
        ),
        (
            lambda o, t: o.mean(0).sum(),
            True,
        ),
        (
            lambda o, t: cross_entropy(o, t).sum(),
            False,
        ),
        (
            lambda o, t: jnp.exp(cross_entropy(o, t).mean()),
            False,
        ),
        (
            lambda o, t: jnp.var(o),
            False,
        ),
        (
            lambda o, t: (cross_entropy(o, t) * (t > 0)).sum() / (t > 0).sum(),
            False,
        ),
        (
            lambda o, t: cross_entropy(o @ o.T, jnp.arange(len(t))).mean(),
            False,
        ),
    ],
)
def test_a_scalar_is_known_to_be_a_mean_of_samples(function, expected):
    def scalar(outputs, targets):
        return jnp.asarray(function(outputs, targets))

    assert is_mean_of_samples(scalar, [batches(8), batches(16)]) is expected
