"""A loss that is not finite: its cause is named, and is not always the rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.errors import DivergedError
from lepton_jax.losses import cross_entropy
from lepton_jax.monitor import read_events

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 48
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
Y = (np.arange(ROWS) % 3).astype(np.int32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Attention(nnx.Module):
    """One head over four tokens of one number; `mask` says which of them count."""

    def __init__(self, rngs):
        self.query = nnx.Linear(1, 8, rngs=rngs)
        self.key = nnx.Linear(1, 8, rngs=rngs)
        self.out = nnx.Linear(1, 3, rngs=rngs)

    def __call__(self, x, mask):
        x = x[..., None]
        scores = self.query(x) @ self.key(x).mT
        weights = jax.nn.softmax(
            jnp.where(
                mask[:, None],
                scores,
                -jnp.inf,
            )
        )
        return self.out(weights @ x)[:, 0]


class Dividing(Net):
    def __call__(self, x):
        return self.layer(x / x[:, :1])


class Rooted(Net):
    """The root of a norm: finite at zero, its gradient is not."""

    def __call__(self, x):
        y = self.layer(x)
        return y * jnp.sqrt((y**2).sum(-1, keepdims=True))


class Looping(Net):
    def __call__(self, x):
        def body(carry, _):
            return jnp.log(carry), None

        deep, _ = jax.lax.scan(
            body,
            jnp.full_like(x, 2.0),
            None,
            length=3,
        )
        return self.layer(x * deep)


def trainer(run_dir=None, **changes) -> lepton.Trainer:
    fields = {
        "model": Net,
        "loss": cross_entropy,
        "optimizer": optax.sgd,
        "learning_rate": 0.1,
        "train": (X, Y),
        "batch_size": 16,
        "steps": 3,
        "shuffle": False,
    }
    return lepton.Trainer(
        devices=1,
        run_dir=run_dir,
        **fields | changes,
    )


def diverged(**changes) -> DivergedError:
    with pytest.raises(DivergedError) as caught:
        trainer(**changes).fit()
    return caught.value


def test_a_fully_masked_row_of_attention_is_named_with_its_operation():
    mask = np.ones((ROWS, 4), bool)
    mask[[19, 26]] = False
    error = diverged(
        model=Attention,
        train=({"x": X, "mask": mask}, Y),
    )
    assert error.where.startswith("step 2")
    assert "the loss of step 2 is nan" in error.what
    assert "nan first comes out of 'sub' at" in error.what
    assert "test_diagnosis.py" in error.what
    assert "Attention.__call__" in error.what
    assert "samples 0:19, 0:26" in error.what
    assert "mask without a single True" in error.remedy
    assert "learning rate" not in error.remedy


def test_a_division_by_zero_is_named():
    inputs = X.copy()
    inputs[40, 0] = 0
    error = diverged(model=Dividing, train=(inputs, Y))
    assert "the loss of step 3 is nan" in error.what
    assert "'div' at" in error.what
    assert "Dividing.__call__" in error.what
    assert "samples 0:40" in error.what
    assert "learning rate" not in error.remedy


def test_a_gradient_that_is_not_finite_is_found_in_the_backward_pass(tmp_path):
    inputs = X.copy()
    inputs[5] = 0
    error = diverged(
        model=Rooted,
        train=(inputs, Y),
        run_dir=tmp_path / "run",
        save_every=1,
    )
    assert "the update of step 1 made parameters that are not finite" in error.what
    assert "Rooted.__call__" in error.what
    assert "samples 0:5" in error.what


def test_data_that_is_not_finite_is_told_as_such():
    inputs = X.copy()
    inputs[33, 2] = np.inf
    error = diverged(train=(inputs, Y))
    assert "inputs of the batch are not finite themselves" in error.what
    assert "samples 0:33" in error.what
    assert "fix or leave out" in error.remedy


def test_features_beyond_float16_are_not_a_finished_run():
    inputs = X.copy()
    inputs[:, 1] = 70_000.0
    error = diverged(
        train=(inputs, Y),
        precision="float16",
        steps=5,
    )
    assert error.where.startswith("step 3")
    assert "65504" in error.remedy
    assert "inf first comes out of 'convert_element_type'" in error.what


def test_a_short_float16_run_does_not_end_in_the_middle_of_it():
    inputs = X.copy()
    inputs[:, 1] = 70_000.0
    error = diverged(
        train=(inputs, Y),
        precision="float16",
        steps=2,
    )
    assert "the last 2 losses are not finite" in error.what
    assert "65504" in error.remedy


def test_one_odd_batch_is_skipped_in_float16():
    inputs = X.copy()
    inputs[17, 1] = 70_000.0
    history = trainer(train=(inputs, Y), precision="float16").fit()
    assert np.isfinite(history["loss"]).tolist() == [True, False, True]
    assert history["skip"].tolist() == [0, 1, 0]


def test_a_rate_that_is_too_high_is_blamed_still(tmp_path):
    def squared(outputs, targets):
        return (outputs[:, 0] - targets) ** 2

    error = diverged(
        loss=squared,
        train=(X, Y.astype(np.float32)),
        learning_rate=1e12,
        steps=40,
        run_dir=tmp_path / "run",
        save_every=1,
    )
    assert "with the parameters of the seed, so the parameters have grown" in error.what
    assert "with those of step" in error.what
    assert "first comes out of" in error.what
    assert error.remedy.startswith("lower the learning rate, or set clip_norm")


def test_the_parameters_are_blamed_where_the_batch_is_sound():
    error = diverged(learning_rate=1e38, optimizer=optax.sgd)
    assert "with the parameters of the seed, so the parameters have grown" in error.what
    assert error.remedy.startswith("lower the learning rate, or set clip_norm")


def test_a_loop_is_looked_into():
    error = diverged(model=Looping)
    assert "'log' at" in error.what
    assert "Looping.__call__" in error.what


# ---- a batch without weight ----


def weighted(outputs, targets):
    values = cross_entropy(outputs, targets["label"])
    return values, targets["weight"]


def weights_of(*steps: int) -> np.ndarray:
    weight = np.ones(ROWS, np.float32)
    for step in steps:
        weight[16 * (step - 1) : 16 * step] = 0
    return weight


@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adamw])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_batch_without_weight_is_no_step(optimizer, clip, tmp_path):
    targets = {"label": Y, "weight": weights_of(2)}
    whole = trainer(
        run_dir=tmp_path / "run",
        loss=weighted,
        train=(X, targets),
        optimizer=optimizer,
        clip_norm=clip,
        save_every=1,
    )
    history = whole.fit()
    assert history.status == "finished"
    assert whole.step == 3
    assert history["weight"].tolist() == [16, 0, 16]
    assert np.isfinite(history["loss"]).tolist() == [True, False, True]

    # the same without the batch that counts for nothing
    rows = np.r_[0:16, 32:48]
    fewer = {"label": Y[rows], "weight": np.ones(32, np.float32)}
    without = trainer(
        loss=weighted,
        train=(X[rows], fewer),
        optimizer=optimizer,
        clip_norm=clip,
        steps=2,
    )
    without.fit()
    for a, b in zip(
        jax.tree.leaves((whole.state.params, whole.state.optimizer)),
        jax.tree.leaves((without.state.params, without.state.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    (event,) = [e for e in read_events(tmp_path / "run") if e["kind"] == "skipped"]
    assert event["step"] == 2
    assert "weights of the batch are 0" in event["reason"]


def test_a_batch_without_weight_is_no_step_under_policies_and_micro_batches():
    targets = {"label": Y, "weight": weights_of(2)}
    run = trainer(
        loss=weighted,
        train=(X, targets),
        micro_batches=2,
        controller=lepton.controllers.adaptive(),
        optimizer=optax.adamw,
    )
    history = run.fit()
    assert history.status == "finished"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.state.params))
    assert int(run.state.controller.updates) == 2


def test_a_weighted_loss_is_the_plain_loop_to_the_bit():
    targets = {
        "label": Y,
        "weight": np.linspace(
            0.5,
            2,
            ROWS,
            dtype=np.float32,
        ),
    }
    run = trainer(
        loss=weighted,
        train=(X, targets),
        optimizer=optax.adam,
    )
    program = run._ready((X[:1], jax.tree.map(lambda x: x[:1], targets)))
    params = program.init(0).params
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, label, weight):
        def loss(params):
            layer = params["layer"]
            values = cross_entropy(x @ layer["kernel"] + layer["bias"], label)
            return (values * weight).sum() / weight.sum()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    expected = []
    for start in (0, 16, 32):
        rows = slice(start, start + 16)
        batch = X[rows], Y[rows], targets["weight"][rows]
        params, state, value = step(params, state, *batch)
        expected.append(value)
    history = run.fit()
    np.testing.assert_array_equal(history["loss"], np.array(expected))
    for a, b in zip(
        jax.tree.leaves(run.state.params),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
