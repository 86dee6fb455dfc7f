"""Training compared with the loop that one writes by hand, to the bit.

Also across devices, steps a call, micro-batches and precisions.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lepton_jax as lepton
from lepton_jax.planner import rewrite

STEPS = 50
BATCH = 24


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(use_running_average=not train)(
            linen.relu(linen.Dense(32)(x))
        )
        return linen.Dense(3)(linen.Dropout(0.2, deterministic=not train)(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(12, 32, rngs=rngs)
        self.last = nnx.Linear(32, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.cells = nnx.RNN(nnx.LSTMCell(3, 8, rngs=rngs))
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.cells(x.reshape(x.shape[0], 4, 3))[:, -1])


def picture_net(rngs):
    return lepton.models.CNN(
        3,
        size=(4, 3, 1),
        widths=(8, 8),
        dense=8,
        batch_norm=True,
        dropout=0.2,
        rngs=rngs,
    )


def language_model(rngs):
    return lepton.models.TransformerLM(
        16,
        dim=16,
        layers=2,
        heads=2,
        rngs=rngs,
    )


def data_for(model, blobs):
    inputs, targets = blobs
    if model is language_model:
        tokens = np.random.default_rng(1).integers(0, 16, (600, 13)).astype(np.int32)
        return tokens[:, :-1], tokens[:, 1:]
    return (inputs.reshape(-1, 4, 3, 1) if model is picture_net else inputs), targets


def trainer(model, **fields):
    fields = {
        "optimizer": optax.adamw(1e-2),
        "batch_size": BATCH,
        "shuffle": False,
        "devices": 1,
        "metrics": {"accuracy": lepton.metrics.accuracy},
    } | fields
    return lepton.Trainer(
        model=model,
        loss=lepton.losses.cross_entropy,
        **fields,
    )


def by_hand(model, inputs, targets):
    """Return losses and final parameters of the loop in Flax's documentation."""
    optimizer = optax.adamw(1e-2)
    graph, params, rest = nnx.split(
        model(nnx.Rngs(0)),
        nnx.Param,
        ...,
    )
    opt_state = optimizer.init(params)

    def loss_of(params, rest, x, y):
        module = nnx.merge(
            graph,
            params,
            rest,
            copy=True,
        )
        module.train()
        loss = optax.softmax_cross_entropy_with_integer_labels(module(x), y).mean()
        return loss, nnx.state(module, nnx.Not(nnx.Param))

    @jax.jit
    def step(params, rest, opt_state, x, y):
        (loss, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            params, rest, x, y
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, loss

    losses = []
    for index in range(STEPS):
        rows = np.arange(index * BATCH, (index + 1) * BATCH) % len(inputs)
        params, rest, opt_state, loss = step(
            params, rest, opt_state, inputs[rows], targets[rows]
        )
        losses.append(loss)
    return np.array(losses), nnx.to_pure_dict(params)


MODELS = (NnxNet, Recurrent, picture_net, language_model)


@pytest.mark.parametrize("model", MODELS)
def test_one_device_is_the_hand_written_loop_to_the_bit(model, blobs):
    inputs, targets = data_for(model, blobs)
    expected, params = by_hand(model, inputs, targets)
    with rewrite.only():
        ours = trainer(model)
        losses = ours.fit((inputs, targets), steps=STEPS)["loss"]
    np.testing.assert_array_equal(losses, expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        ours.state.params,
        params,
    )


# Greatest difference of losses by their size after STEPS steps of AdamW, which divides
# by small gradients: it was 2e-7.
ROUNDING = 2e-6


@pytest.mark.parametrize("model", MODELS)
def test_what_a_cpu_computes_faster_is_that_loop_but_for_rounding(model, blobs):
    inputs, targets = data_for(model, blobs)
    expected, _ = by_hand(model, inputs, targets)
    losses = trainer(model).fit((inputs, targets), steps=STEPS)["loss"]
    if model is NnxNet:  # nothing in it is rewritten
        np.testing.assert_array_equal(losses, expected)
    else:
        np.testing.assert_allclose(losses, expected, rtol=ROUNDING)


def test_linen_is_its_hand_written_loop_to_the_bit(blobs):
    inputs, targets = blobs
    optimizer = optax.adamw(1e-2)
    net = LinenNet()
    variables = net.init(
        jax.random.key(0),
        inputs[:1],
        train=False,
    )
    params = variables["params"]
    stats = variables["batch_stats"]
    opt_state = optimizer.init(params)

    @jax.jit
    def step(
        params,
        stats,
        opt_state,
        index,
        x,
        y,
    ):
        key = jax.random.fold_in(jax.random.key(0), index)

        def loss_of(params):
            outputs, after = net.apply(
                {"params": params, "batch_stats": stats},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"params": key, "dropout": jax.random.fold_in(key, 1)},
            )
            return (
                optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean(),
                after["batch_stats"],
            )

        (loss, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), after, opt_state, loss

    expected = []
    for index in range(STEPS):
        rows = np.arange(index * BATCH, (index + 1) * BATCH) % len(inputs)
        params, stats, opt_state, loss = step(
            params,
            stats,
            opt_state,
            index,
            inputs[rows],
            targets[rows],
        )
        expected.append(loss)
    ours = trainer(LinenNet())
    np.testing.assert_array_equal(
        ours.fit(blobs, steps=STEPS)["loss"], np.array(expected)
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        ours.state.variables["batch_stats"],
        stats,
    )


@pytest.mark.parametrize(
    "model",
    [
        NnxNet,
        LinenNet,
        picture_net,
        language_model,
    ],
)
@pytest.mark.usefixtures("quick_compilation_here")
def test_eight_devices_give_the_losses_of_one(model, blobs):
    data = data_for(model, blobs)
    one = trainer(model).fit(data, steps=STEPS)["loss"]
    eight = trainer(model, devices=8)
    np.testing.assert_allclose(
        eight.fit(data, steps=STEPS)["loss"],
        one,
        rtol=2e-6,
    )
    block = eight.program.block_sharding.shard_shape(
        (1, BATCH) if eight.program.plan.steps_per_call > 1 else (BATCH,)
    )
    assert block[-1] == BATCH // 8


@pytest.mark.usefixtures("quick_compilation_here")
def test_steps_per_call_changes_nothing(blobs):
    runs = [
        trainer(NnxNet, steps_per_call=k, log_every=7).fit(blobs, steps=STEPS)["loss"]
        for k in (1, 4, 50)
    ]
    np.testing.assert_array_equal(runs[1], runs[0])
    np.testing.assert_array_equal(runs[2], runs[0])


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.usefixtures("quick_compilation_here")
def test_micro_batches_give_the_gradient_of_the_whole_batch(devices, blobs):
    model = partial(lepton.models.MLP, (12, 32, 3))
    whole = trainer(model).fit(blobs, steps=STEPS)["loss"]
    np.testing.assert_allclose(
        trainer(model, micro_batches=6, devices=devices).fit(blobs, steps=STEPS)[
            "loss"
        ],
        whole,
        rtol=1e-4,
    )


@pytest.mark.usefixtures("quick_compilation_here")
def test_micro_batches_weigh_their_samples(blobs):
    inputs, targets = blobs
    weights = np.where(np.arange(600) % 5 == 0, 9.0, 0.25).astype(np.float32)

    def weighted(outputs, targets):
        return (
            optax.softmax_cross_entropy_with_integer_labels(outputs, targets["label"]),
            targets["weight"],
        )

    runs = [
        lepton.Trainer(
            model=partial(lepton.models.MLP, (12, 32, 3)),
            loss=weighted,
            optimizer=optax.sgd(0.1),
            batch_size=BATCH,
            micro_batches=m,
            devices=1,
        ).fit((inputs, {"label": targets, "weight": weights}), steps=20)["loss"]
        for m in (1, 4)
    ]
    np.testing.assert_allclose(
        runs[1],
        runs[0],
        rtol=1e-5,
    )


@pytest.mark.usefixtures("quick_compilation_here")
def test_unrolled_micro_batches_are_the_loop(blobs, monkeypatch):
    data = data_for(picture_net, blobs)
    unrolled = trainer(picture_net, micro_batches=3)
    losses = unrolled.fit(data, steps=20)["loss"]
    assert unrolled.program.plan.unroll_micro_batches
    monkeypatch.setattr(
        sys.modules["lepton_jax.planner.estimate.feeding"],
        "slow_loops",
        lambda trace, topology: False,
    )
    looped = trainer(picture_net, micro_batches=3, steps_per_call=1)
    np.testing.assert_allclose(
        looped.fit(data, steps=20)["loss"],
        losses,
        rtol=1e-5,
    )
    assert not looped.program.plan.unroll_micro_batches


@pytest.mark.usefixtures("quick_compilation_here")
def test_clipping_bounds_the_update(blobs):
    run = trainer(
        NnxNet,
        optimizer=optax.sgd(1.0),
        clip_norm=1e-3,
    )
    run.fit(blobs, steps=1)
    start = run.program.init(0).params
    moved = optax.tree.norm(
        jax.tree.map(
            jnp.subtract,
            run.state.params,
            start,
        )
    )
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bfloat16", 0.02), ("float16", 0.01)]
)
@pytest.mark.usefixtures("quick_compilation_here")
def test_low_precision_follows_float32_with_float32_masters(
    precision, tolerance, blobs
):
    full = trainer(NnxNet).fit(blobs, steps=200)["loss"][-20:].mean()
    low = trainer(NnxNet, precision=precision)
    assert abs(low.fit(blobs, steps=200)["loss"][-20:].mean() - full) < tolerance
    assert all(
        x.dtype == jnp.float32
        for x in jax.tree.leaves((low.state.params, low.state.variables["norm"]))
    )
    text = (
        jax.jit(
            lambda s, x: low.program._forward(
                s.params,
                s.variables,
                x,
            )
        )
        .lower(low.state, blobs[0][:4])
        .as_text()
    )
    assert "dot_general" in text
    assert {"bfloat16": "bf16", "float16": "f16"}[precision] in text


@pytest.mark.usefixtures("quick_compilation_here")
def test_float16_skips_overflowing_steps_and_halves_the_scale(blobs):
    inputs, targets = blobs

    def steep(outputs, labels):
        logits = outputs.astype(jnp.float16)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return 1e4 * losses

    run = lepton.Trainer(
        model=NnxNet,
        loss=steep,
        optimizer=optax.sgd(1e-9),
        batch_size=BATCH,
        precision="float16",
        devices=1,
    )
    history = run.fit((inputs, targets), steps=30)
    scale = history["loss_scale"]
    assert scale[-1] < 2**15
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.state.params))
    skipped = int(history["skip"].sum())
    assert skipped == int((np.diff(scale, prepend=2**15) < 0).sum())
    assert int(run.state.variables["drop"]["rngs"]["count"]) == 30 - skipped
