"""Micro-batches that the planner picks by itself.

It picks none where they change the model, or says so.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.planner import planning

ROWS = 16384
WIDTH = 64
LAYERS = 8


class Deep(nnx.Module):
    """A tower of layers, with a normalization before each."""

    def __init__(self, normal, rngs):
        self.layers = nnx.List(
            [nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)]
        )
        self.normals = nnx.List([normal(rngs) for _ in range(LAYERS)])
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        for layer, normal in zip(self.layers, self.normals, strict=True):
            x = x + jnp.tanh(jnp.sin(jnp.tanh(layer(normal(x)))))
        return self.drop(x)


class Counter(nnx.Module):
    def __init__(self, rngs):
        self.calls = nnx.BatchStat(jnp.int32(0))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return x


def batch_norm(rngs):
    return nnx.BatchNorm(WIDTH, rngs=rngs)


def layer_norm(rngs):
    return nnx.LayerNorm(WIDTH, rngs=rngs)


def centred(rngs):
    return lambda x: x - x.mean(0)


def contrastive(outputs, targets):
    scores = outputs @ outputs.T
    return optax.softmax_cross_entropy_with_integer_labels(
        scores, jnp.arange(len(scores))
    )


@functools.cache
def traced(
    normal,
    loss=lepton.losses.cross_entropy,
    **fields,
):
    recipe = lepton.Recipe(
        model=functools.partial(Deep, normal),
        loss=loss,
        optimizer=optax.sgd(0.1),
        batch_size=ROWS,
        **fields,
    )
    row = jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)
    return lepton.trace(
        recipe,
        row,
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def on(memory):
    """Return a device with some bytes of memory."""
    whole = lepton.topology("h200:1")
    return dataclasses.replace(
        whole,
        chip=dataclasses.replace(whole.chip, memory=memory),
    )


def most(trace, parts, *policies):
    """Return the bytes within which the leanest plan surely fits."""
    whole = lepton.topology("h200:1")
    return min(
        planning.plan(trace, whole, remat=remat, micro_batches=parts).peak_bound
        for remat in policies
    )


def test_rematerialization_goes_before_micro_batches_that_change_batch_norm():
    trace = traced(batch_norm)
    lean = most(trace, 1, "dots", "full")
    assert most(trace, 8, "none") < lean < most(trace, 1, "none")
    plan = planning.plan(trace, on(lean * 1.02))
    assert plan.micro_batches == 1
    assert plan.remat != "none"
    assert not plan.notes


@pytest.mark.parametrize(
    ("normal", "loss", "says"),
    [
        (
            batch_norm,
            lepton.losses.cross_entropy,
            ["normalization.py", "normals/0/mean", "samples of a batch meet"],
        ),
        (
            centred,
            lepton.losses.cross_entropy,
            ["test_micro_batches.py", "(centred"],
        ),
        (layer_norm, contrastive, ["test_micro_batches.py", "(contrastive)"]),
        (Counter, lepton.losses.cross_entropy, ["normals/0/calls"]),
    ],
    ids=["batch norm", "a mean of the batch", "a loss over pairs", "a counter"],
)
def test_micro_batches_that_change_the_model_are_said_with_the_line(normal, loss, says):
    trace = traced(normal, loss)
    plan = planning.plan(trace, on(most(trace, 8, "none", "dots", "full") * 1.02))
    assert plan.micro_batches > 1
    (note,) = plan.notes
    assert f"{plan.micro_batches} micro-batches" in note
    assert f"{ROWS // plan.micro_batches} samples at a time" in note
    assert all(words in note for words in says)
    assert "rngs" not in note
    assert note.split()[0] in str(plan)
    assert "change the model" in str(plan).replace("\n", " ")


def test_micro_batches_that_are_asked_for_or_change_nothing_are_not_worth_a_word():
    trace = traced(layer_norm)
    plan = planning.plan(trace, on(most(trace, 8, "none", "dots", "full") * 1.02))
    assert plan.micro_batches > 1
    assert not plan.notes
    asked = planning.plan(
        traced(batch_norm, micro_batches=8), lepton.topology("h200:1")
    )
    assert asked.micro_batches == 8
    assert not asked.notes
    assert not planning.plan(
        traced(batch_norm), lepton.topology("h200:1"), micro_batches=4
    ).notes
