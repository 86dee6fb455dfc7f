"""Losses whose logits never exist whole, against the plain losses."""

from __future__ import annotations

import doctest
import functools
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import lepton_jax as lepton
from lepton_jax import losses, models
from lepton_jax.planner import Plan
from lepton_jax.planner.program import named
from lepton_jax.planner.rewrite import forms, head, rows
from lepton_jax.planner.search import build
from lepton_jax.train.program import Program

RTOL = 1e-5  # of losses and gradients in float32
WIDTH = 12
VOCAB = 50


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.mark.parametrize("module", (head, rows), ids=lambda m: m.__name__)
def test_the_examples_of_pieces_hold(module):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


# ---- losses ----


def plain(logits, labels):
    return losses.cross_entropy(logits, labels).mean()


def padded(logits, labels):
    values, weights = losses.padded_cross_entropy(
        logits, jnp.where(labels % 3 == 0, -1, labels)
    )
    return (values * weights).sum() / weights.sum()


def weighted(logits, labels):
    each = tuple(1.0 + 0.1 * i for i in range(VOCAB))
    values, weights = losses.weighted_cross_entropy(
        logits, labels, weights=each, smoothing=0.1
    )
    return (values * weights).sum() / weights.sum()


def capped(logits, labels):
    return plain(30 * jnp.tanh(logits / 30), labels)


def with_z_loss(logits, labels):
    z = jax.nn.logsumexp(logits, axis=-1)
    return plain(logits, labels) + 1e-2 * (z**2).mean()


def one_hot(logits, labels):
    shares = jax.nn.one_hot(labels, VOCAB)
    return -(shares * jax.nn.log_softmax(logits)).sum(-1).mean()


def flattened(logits, labels):
    return plain(logits.reshape(-1, VOCAB), labels.reshape(-1))


def biased(logits, labels):
    return plain(logits + jnp.linspace(-1, 1, VOCAB), labels)


def masked_vocabulary(logits, labels):
    is_real = jnp.arange(VOCAB) < VOCAB - 3
    return plain(jnp.where(is_real, logits, -1e9), labels % (VOCAB - 3))


def focal(logits, labels):
    """Weigh each token by a share that depends on its own loss."""
    each = losses.cross_entropy(logits, labels)
    return (each * (1 - jnp.exp(-each)) ** 2).mean()


LOSSES = [
    plain,
    padded,
    weighted,
    capped,
    with_z_loss,
    one_hot,
    flattened,
    biased,
    masked_vocabulary,
    focal,
]


def network(loss, dtype=jnp.float32, tied=False):
    def run(params, x, labels):
        hidden = jnp.tanh(x @ params["in"]).astype(dtype)
        kernel = params["out"].astype(dtype)
        logits = hidden @ (kernel.T if tied else kernel)
        logits = logits.astype(jnp.float32)
        hits = (logits.argmax(-1) == labels).sum()
        return loss(logits, labels), (hits, losses.cross_entropy(logits, labels).sum())

    return run


def arguments(shape=(4, 6), tied=False, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    kernel = jax.random.normal(keys[1], (WIDTH, VOCAB))
    params = {
        "in": jax.random.normal(keys[0], (WIDTH, WIDTH)),
        "out": kernel.T if tied else kernel,
    }
    x = jax.random.normal(keys[2], (*shape, WIDTH))
    return params, x, jax.random.randint(keys[3], shape, 0, VOCAB)


def gradients(function, args):
    return jax.jit(jax.value_and_grad(function, has_aux=True))(*args)


def assert_close(left, right, rtol=RTOL):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for a, b in pairs:
        scale = float(jnp.abs(a).max()) + 1e-30
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)


def has_whole_logits(function, args):
    """Whether the gradient's program has an array of all tokens and words."""
    *shape, _ = args[1].shape
    text = str(jax.make_jaxpr(jax.grad(function, has_aux=True))(*args))
    wide = ",".join(map(str, [*shape, VOCAB]))
    flat = f"{np.prod(shape)},{VOCAB}"
    return f"[{wide}]" in text or f"[{flat}]" in text


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_loss_in_pieces_has_the_same_value_and_gradient(loss):
    args = arguments()
    function = network(loss)
    shorter = head.in_pieces(function, 2)

    assert_close(gradients(function, args), gradients(shorter, args))
    assert has_whole_logits(function, args)
    assert not has_whole_logits(shorter, args)


@settings(max_examples=4, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    pieces=st.integers(2, 5),
    tied=st.booleans(),
)
def test_odd_shapes_change_nothing(shape, pieces, tied):
    args = arguments(shape, tied)
    function = network(plain, tied=tied)
    shorter = head.in_pieces(function, pieces)

    assert_close(gradients(function, args), gradients(shorter, args))


def test_samples_are_divided_where_the_length_is_a_prime():
    args = arguments((4, 7))

    assert not has_whole_logits(head.in_pieces(network(plain), 2), args)


def test_no_product_is_computed_twice():
    args = arguments()
    shorter = jax.grad(head.in_pieces(network(plain), 2), has_aux=True)
    whole = jax.grad(network(plain), has_aux=True)

    def products(function):
        return str(jax.make_jaxpr(function)(*args)).count("dot_general[")

    assert products(shorter) == products(whole)


def test_bfloat16_differs_within_its_rounding():
    args = arguments()
    function = network(plain, jnp.bfloat16)
    shorter = head.in_pieces(function, 3)

    assert_close(gradients(function, args), gradients(shorter, args), 2**-7)


def test_float16_keeps_the_loss_scale():
    """Gradients of a mean over many tokens are below float16's least number."""
    args = arguments((8, 6))

    def scaled(scale, params, *batch):
        value, more = network(plain, jnp.float16)(params, *batch)
        return 1e-4 * scale * value, more

    scale = jnp.float32(2**12)
    function = partial(scaled, scale)
    found = gradients(head.in_pieces(function, 2), args)

    assert_close(gradients(function, args), found, 2**-8)


def test_logits_that_are_needed_whole_stay_whole():
    def over_tokens(logits, labels):
        return plain(logits - logits.mean((0, 1)), labels)

    def returned(params, x, labels):
        logits = x @ params["out"]
        return plain(logits, labels), logits

    args = arguments()
    for function in (network(over_tokens), returned):
        shorter = head.in_pieces(function, 2)

        assert_close(gradients(function, args), gradients(shorter, args))
        assert has_whole_logits(shorter, args)


def test_a_derivative_of_the_users_own_is_kept():
    @jax.custom_vjp
    def halved(x):
        return x

    halved.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))

    def function(params, x, labels):
        logits = x @ params["out"]
        return plain(logits, labels) + halved(params["in"]).sum(), ()

    args = arguments()
    shorter = head.in_pieces(function, 2)

    assert_close(gradients(function, args), gradients(shorter, args))
    assert not has_whole_logits(shorter, args)


# ---- in a plan ----

BATCH = 16
LENGTH = 8
STEPS = 2


@pytest.fixture
def few_logits(monkeypatch):
    """Let logits count as large from a few bytes on, and split small arrays."""
    monkeypatch.setattr(forms, "MOST_LOGITS", 2**9)
    monkeypatch.setattr(forms, "LEAST_TOKENS", 1)
    monkeypatch.setattr(named, "SMALL", 0)


def language(**more):
    arguments = {"vocab": 64, "dim": 16, "layers": 1, "heads": 2, "tied": True}
    changes = {key: more.pop(key) for key in arguments.keys() & more.keys()}
    recipe = lepton.Recipe(
        model=partial(models.TransformerLM, **arguments | changes),
        loss=losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.sgd(0.5),
        batch_size=BATCH,
        clip_norm=1.0,
        steps_per_call=1,
        **more,
    )
    return lepton.trace(recipe, *(x[0] for x in batches()))


def batches():
    shape = (STEPS, BATCH, LENGTH + 1)
    x = np.random.default_rng(0).integers(0, 64, shape, dtype=np.int32)
    return x[..., :-1], x[..., 1:]


def trained(trace, plan):
    """Return loss and accuracy of each step under a plan."""
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    state = program.init(0)
    records = []
    for step in range(STEPS):
        batch = jax.tree.map(lambda x, step=step: x[step], batches())
        batch = jax.device_put(batch, program.block_sharding)
        state, values = program.train(state, batch, 0, 1)
        records.append(np.array(values[0, :2]))
    return np.array(records)


@functools.cache
def plain_records():
    """Return loss and accuracy on one device, with all logits at once."""
    trace = language()
    return trained(trace, on_one_device(trace))


def on_one_device(trace):
    assignment = build.by_hand(trace, (1,), {}, 0)
    return build.fixed(trace, lepton.topology("cpu:1"), assignment)


def evaluated(trace, plan):
    """Return the sums of a batch of which the last rows are padding."""
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    batch = jax.tree.map(lambda x: x[0], batches())
    batch = jax.device_put(batch, program.batch_sharding)
    return program.evaluate(None, program.init(0), batch, BATCH - 3)


def test_an_evaluation_in_pieces_measures_the_same(few_logits):
    trace = language()
    plan = lepton.plan(trace, lepton.topology("cpu:8"), mesh={"data": 2, "tensor": 4})

    known = evaluated(trace, on_one_device(trace))
    found = evaluated(trace, plan)

    assert plan.loss_pieces > 1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=RTOL), known, found)


@pytest.mark.parametrize(
    ("mesh", "asked"),
    [
        ({"data": 8}, {}),
        ({"tensor": 8}, {"pins": {"**/embedding": P("tensor")}}),
        (
            {"data": 2, "tensor": 4},
            {"pins": {"**/embedding": P("tensor")}, "micro_batches": 2},
        ),
        ({"fsdp": 8}, {"remat": "full", "pins": {"**/kernel": P("fsdp")}}),
    ],
    ids=["data", "vocabulary", "both", "fsdp"],
)
def test_pieces_on_eight_devices_train_as_the_plain_loss(few_logits, mesh, asked):
    trace = language()
    plan = lepton.plan(trace, lepton.topology("cpu:8"), mesh=mesh, **asked)

    assert plan.loss_pieces > 1
    np.testing.assert_allclose(trained(trace, plan), plain_records(), rtol=RTOL)


def test_a_plan_says_how_the_loss_is_computed_and_keeps_it(few_logits):
    plan = lepton.plan(language(), lepton.topology("cpu:2"))

    assert f"loss in {plan.loss_pieces} pieces" in str(plan)
    assert Plan.from_json(plan.to_json()).forms == plan.forms


def test_small_logits_stay_whole():
    plan = lepton.plan(language(), lepton.topology("cpu:2"))

    assert plan.loss_pieces == 1
    assert "pieces" not in str(plan)


def test_a_plan_of_an_older_version_has_whole_logits():
    plan = lepton.plan(language(), lepton.topology("cpu:2"))
    saved = json.loads(plan.to_json())
    del saved["loss_pieces"]

    assert Plan.from_json(json.dumps(saved)).loss_pieces == 1


def test_eight_billion_parameters_hold_fewer_logits():
    arguments = models.transformer_size("8b") | {"loop": "scan", "layers": 2}
    token = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    recipe = lepton.Recipe(
        model=partial(models.TransformerLM, **arguments),
        loss=losses.cross_entropy,
        optimizer=optax.adamw(1e-4),
        batch_size=512,
        precision="bfloat16",
    )
    trace = lepton.trace(recipe, token, token)
    asked = {"mesh": {"fsdp": 8}, "remat": "full", "micro_batches": 8}
    pieces = lepton.plan(trace, lepton.topology("v5p:2x2x2"), **asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "MOST_LOGITS", math.inf)
        whole = lepton.plan(trace, lepton.topology("v5p:2x2x2"), **asked)

    assert pieces.loss_pieces == 4
    assert pieces.peak < 0.9 * whole.peak
    # each piece waits for a part of its gather of the head
    assert pieces.step_seconds < 1.1 * whole.step_seconds
