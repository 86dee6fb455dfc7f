"""Optimizers by part of the parameters, and parts that stay as they are."""

import fnmatch
import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import lepton_jax as lepton
from lepton_jax import controllers, optimizers
from lepton_jax.monitor import Progress
from lepton_jax.trees import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE = 0.05
by_part = optimizers.by_part


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(12, 8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def make(blobs, optimizer, devices=1, **fields):
    defaults = {
        "model": Net,
        "loss": lepton.losses.cross_entropy,
        "train": blobs,
        "batch_size": 24,
        "steps": 6,
    }
    return lepton.Trainer(devices=devices, optimizer=optimizer, **defaults | fields)


def fitted(*arguments, **fields):
    trainer = make(*arguments, **fields)
    trainer.fit()
    return trainer


def params_of(trainer):
    return jax.device_get(by_path(trainer.state.params))


def assert_same(left, right):
    left, right = params_of(left), params_of(right)
    for path, x in left.items():
        np.testing.assert_array_equal(x, right[path], path)


def as_partition(rate):
    def labels(params):
        return {"first": "slow", "last": {"bias": "fast", "kernel": "slow"}}

    return optax.partition({"slow": optax.adamw(rate), "fast": optax.sgd(rate)}, labels)


@pytest.mark.parametrize("rate", [RATE, optax.cosine_decay_schedule(RATE, 6)])
def test_parts_are_what_optax_partition_does_to_the_bit(blobs, rate):
    parts = by_part({"last/bias": optax.sgd}, default=optax.adamw)
    ours = fitted(blobs, parts, learning_rate=rate)
    assert_same(ours, fitted(blobs, as_partition, learning_rate=rate))


def test_finished_optimizers_have_their_own_rates(blobs):
    both = {"first/*": optax.adam(0.01), "last/*": optax.sgd(0.1)}
    labels = {"first": "a", "last": "b"}
    by_hand = optax.partition({"a": optax.adam(0.01), "b": optax.sgd(0.1)}, labels)
    assert_same(fitted(blobs, by_part(both)), fitted(blobs, by_hand))


def test_the_first_pattern_counts_and_the_run_says_so(blobs):
    stream = io.StringIO()
    parts = by_part({"last/bias": optax.sgd, "last/*": optax.adam}, default="frozen")
    trainer = make(blobs, parts, learning_rate=RATE, sinks=[Progress(stream)])
    trainer.fit()
    said = stream.getvalue()
    assert "last/bias: 1 arrays, 3 numbers\n" in said
    assert "last/*: 1 arrays, 24 numbers; 1 more" in said
    assert "default: 2 arrays, 104 numbers, frozen" in said


PIECES = st.sampled_from(["first", "last", "*", "f*", "kernel", "bias", "?ast"])
PATTERNS = st.lists(
    st.lists(PIECES, min_size=1, max_size=2).map("/".join),
    min_size=1,
    max_size=4,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(PATTERNS)
def test_each_parameter_is_in_the_first_part_that_matches_it(patterns):
    names = ["first/kernel", "first/bias", "last/kernel", "last/bias"]
    params = {
        top: dict.fromkeys(("kernel", "bias"), np.ones(2)) for top in ("first", "last")
    }
    parts = by_part(dict.fromkeys(patterns, optax.sgd(0.1)), default=optax.adam(0.1))
    expected = {
        name: next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
        for name in names
    }
    labels = by_path(parts.labels(params))
    for name, pattern in expected.items():
        part = next(part for part in parts.parts if part.pattern == pattern)
        assert labels[name] == part.label
    assert sum(row["parameters"] for row in parts.table(params)) == 4
    if set(patterns) <= set(expected.values()):
        parts.check(params)
    else:
        with pytest.raises(lepton.RecipeError, match="matches"):
            parts.check(params)


def test_parts_can_be_switched_and_may_stand_in_a_chain(blobs):
    frozen = by_part({"first/*": "frozen"}, default=optax.adam)
    other = by_part({"first/*": "frozen"}, default=optax.sgd)
    switched = fitted(
        blobs,
        controllers.switchable(frozen, other),
        learning_rate=RATE,
        controller=controllers.switch_optimizer(at=0.5),
    )
    chained = fitted(
        blobs,
        lambda rate: optax.chain(optax.clip(1.0), frozen(rate)),
        learning_rate=RATE,
    )
    start = jax.device_get(by_path(switched.program.init(0).params))
    for trainer in (switched, chained):
        now = params_of(trainer)
        np.testing.assert_array_equal(now["first/kernel"], start["first/kernel"])
        assert not np.array_equal(now["last/kernel"], start["last/kernel"])


# ---- frozen parts ----


@pytest.mark.parametrize("devices, micro_batches", [(1, None), (8, None), (1, 3)])
def test_a_frozen_part_stays_as_it_is_and_has_no_state(blobs, devices, micro_batches):
    trainer = make(
        blobs,
        by_part({"first/*": "frozen"}, default=optax.adamw),
        devices=devices,
        learning_rate=RATE,
        clip_norm=0.5,
        micro_batches=micro_batches,
    )
    trainer.fit(steps=1)
    before = params_of(trainer)
    trainer.fit(steps=5)
    after = params_of(trainer)
    for path, x in after.items():
        same = np.array_equal(x.view(np.uint32), before[path].view(np.uint32))
        assert same == path.startswith("first/")
    state = by_path(trainer.state.optimizer)
    assert any("last/kernel" in path for path in state)
    assert not any("first" in path for path in state if "last" not in path)


def test_the_state_of_a_part_lies_as_its_parameters_do(blobs):
    parts = by_part({"last/*": optax.sgd}, default=optax.adamw)
    trainer = make(blobs, parts, devices=8, learning_rate=RATE)
    pins = {"first/kernel": PartitionSpec(None, "fsdp")}
    plan = trainer.plan(mesh={"fsdp": 8}, pins=pins)
    trainer = make(blobs, parts, devices=8, learning_rate=RATE, plan=plan)
    trainer.fit(steps=1)
    wanted = PartitionSpec(None, "fsdp")
    moments = {
        path: x.sharding.spec
        for path, x in by_path(trainer.state.optimizer).items()
        if path.endswith("first/kernel")
    }
    assert len(moments) == 2 and set(moments.values()) == {wanted}


def test_minus_zero_stays_minus_zero(blobs):
    trainer = make(
        blobs, by_part({"first/*": "frozen"}, default=optax.adam), learning_rate=RATE
    )
    trainer.fit(steps=1)
    state = trainer.state
    bias = jnp.full_like(state.params["first"]["bias"], -0.0)
    state.params["first"]["bias"] = bias
    trainer.fit(steps=2)
    assert np.signbit(trainer.state.params["first"]["bias"]).all()


def test_nothing_is_computed_backwards_for_a_frozen_part(blobs):
    """The products of the backward pass through the first layer are gone."""

    def products(optimizer):
        trainer = make(blobs, optimizer, learning_rate=RATE)
        trainer.plan()
        gradient = trainer.trace.gradient("none")
        return sum(op.name == "dot_general" for op in gradient.operations())

    frozen = products(by_part({"first/*": "frozen"}, default=optax.adam))
    whole = products(optax.adam)
    # the first kernel's gradient, and that of the hidden values
    assert frozen == whole - 2


def test_a_frozen_part_counts_for_no_gradient_norm(blobs):
    watching = controllers.clip_by_history()

    def norm_of(default, **parts):
        optimizer = by_part(parts, default)
        trainer = make(blobs, optimizer, learning_rate=RATE, controller=watching)
        return trainer.fit(steps=1)["gradient_norm"][0]

    half = norm_of(optax.sgd, **{"first/*": "frozen"})
    rest = norm_of(optax.sgd, **{"last/*": "frozen"})
    whole = norm_of(optax.sgd)
    np.testing.assert_allclose(half**2 + rest**2, whole**2, rtol=1e-5)


@pytest.mark.parametrize(
    "policies",
    [
        controllers.adaptive,
        controllers.averaging,
        lambda: (controllers.warmup(), controllers.decay(0.5), controllers.guard()),
    ],
    ids=["adaptive", "averaging", "classic"],
)
def test_policies_move_the_trained_part_alone(blobs, policies):
    parts = by_part({"first/*": "frozen"}, default=optax.adamw)
    trainer = make(
        blobs, parts, learning_rate=RATE, controller=policies(), test=blobs, steps=8
    )
    trainer.fit(steps=1)
    before = params_of(trainer)
    trainer.fit(steps=7)
    after = params_of(trainer)
    served = controllers.select_weights(trainer.state, trainer.recipe)[0]
    for name in ("kernel", "bias"):
        path = f"first/{name}"
        np.testing.assert_array_equal(before[path], after[path])
        np.testing.assert_array_equal(before[path], served["first"][name])
    assert not np.array_equal(before["last/kernel"], after["last/kernel"])


def test_one_trained_part_like_adam_is_adam_for_the_policies(blobs):
    parts = by_part({"first/*": "frozen"}, default=optax.adamw)
    trainer = make(
        blobs, parts, learning_rate=RATE, controller=controllers.adaptive(), steps=1
    )
    trainer.plan()
    names = [policy.name for policy in trainer.trace.controller.policies]
    assert "schedule_free" in names and "averaging" not in names


def test_a_knob_is_there_where_all_parts_have_it_alike(blobs):
    decayed = partial(optax.adamw, weight_decay=0.3)

    def knobs(*makers):
        parts = by_part({"first/*": makers[0]}, default=makers[1])
        return set(optimizers.build(make(blobs, parts, learning_rate=1).recipe).base)

    assert knobs(optax.adamw, optax.adamw) >= {"weight_decay", "b1", "b2"}
    assert knobs(optax.adamw, decayed) == {"learning_rate", "b1", "b2"}
    assert knobs(optax.adamw, optax.sgd) == {"learning_rate"}


# ---- going on ----


def test_stopped_and_loaded_it_goes_on_to_the_same_bits(blobs, tmp_path):
    parts = by_part(
        {"last/bias": optax.sgd, "first/bias": "frozen"}, default=optax.adam
    )
    whole = fitted(blobs, parts, learning_rate=RATE)
    half = make(blobs, parts, learning_rate=RATE)
    half.fit(steps=3)
    half.save(tmp_path / "half")
    again = make(blobs, parts, learning_rate=RATE).load(tmp_path / "half")
    again.fit()
    assert_same(again, whole)


def test_moments_are_found_again_where_a_part_is_frozen_later(blobs, tmp_path):
    before = make(
        blobs, by_part({"first/*": optax.adam}, default=optax.adam), learning_rate=RATE
    )
    before.fit(steps=3)
    before.save(tmp_path / "saved")
    frozen = by_part({"first/*": "frozen"}, default=optax.adam)
    with pytest.warns(UserWarning, match="left behind"):
        after = make(blobs, frozen, learning_rate=RATE).load(tmp_path / "saved")
    was = by_path(before.state.optimizer)
    now = by_path(after.state.optimizer)
    assert now
    for path, x in now.items():
        np.testing.assert_array_equal(x, was[path])


# ---- two players ----


class Players(nnx.Module):
    """A toy GAN: numbers around 2 with a spread of 0.5."""

    def __init__(self, rngs):
        self.generator = nnx.Linear(1, 1, rngs=rngs)
        self.critic = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, noise, real):
        fake = self.generator(noise)
        graph, weights = nnx.split(self.critic)
        fixed = nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, weights))

        def judged(critic, x):
            return critic(jnp.concatenate([x, x**2], axis=-1))[:, 0]

        return {
            "fools": judged(fixed, fake),
            "real": judged(self.critic, real),
            "fake": judged(self.critic, jax.lax.stop_gradient(fake)),
        }


def both_losses(outputs, targets):
    softplus = jax.nn.softplus
    critic = softplus(-outputs["real"]) + softplus(outputs["fake"])
    return critic + softplus(-outputs["fools"])


def test_two_players_learn_as_in_a_loop_with_two_optimizers():
    rng = np.random.default_rng(0)
    real = (2 + 0.5 * rng.normal(size=(512, 1))).astype(np.float32)
    noise = rng.normal(size=(512, 1)).astype(np.float32)
    data = ({"noise": noise, "real": real}, np.zeros(512, np.float32))
    rates = {"generator": 0.01, "critic": 0.04}

    def adam(factor):
        return lambda rate: optax.adam(factor * rate, b1=0.5)

    trainer = make(
        data,
        by_part({"generator/*": adam(1), "critic/*": adam(4)}),
        model=Players,
        loss=both_losses,
        learning_rate=0.01,
        batch_size=128,
        shuffle=False,
        steps=8,
    )
    assert trainer.fit().compilations == 1

    graph, params = nnx.split(Players(nnx.Rngs(jax.random.key(0))))
    params = nnx.to_pure_dict(params)
    optimizers_by_hand = {name: optax.adam(r, b1=0.5) for name, r in rates.items()}
    states = {n: o.init(params[n]) for n, o in optimizers_by_hand.items()}

    def loss(own, name, params, noise, real):
        made = nnx.merge(graph, nnx.State(params | {name: own}))
        outputs = made(noise, real)
        if name == "generator":
            return nnx.softplus(-outputs["fools"]).mean()
        return (nnx.softplus(-outputs["real"]) + nnx.softplus(outputs["fake"])).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for step in range(8):
        rows = slice(128 * (step % 4), 128 * (step % 4 + 1))
        batch = (noise[rows], real[rows])
        gradients = {n: gradient(params[n], n, params, *batch) for n in rates}
        for name, optimizer in optimizers_by_hand.items():
            updates, states[name] = optimizer.update(gradients[name], states[name])
            params = params | {name: optax.apply_updates(params[name], updates)}
    for path, x in params_of(trainer).items():
        np.testing.assert_allclose(x, by_path(params)[path], rtol=2e-5, err_msg=path)


# ---- mistakes ----


@pytest.mark.parametrize(
    "parts, default, said",
    [
        ({"frist/*": optax.adam}, optax.sgd, "did you mean 'first/\\*'"),
        ({"first/*": optax.adam}, None, "no pattern matches last/bias, last/kernel"),
        ({"last/*": optax.adam, "last/bias": optax.sgd}, "frozen", "takes before it"),
        ({"*": "frozen"}, optax.sgd, "every parameter is frozen"),
    ],
)
def test_patterns_that_do_not_fit_the_model_are_errors(blobs, parts, default, said):
    trainer = make(blobs, by_part(parts, default), learning_rate=RATE)
    with pytest.raises(lepton.RecipeError, match=said):
        trainer.fit()


@pytest.mark.parametrize(
    "parts, default, said",
    [
        ({"first/*": "forzen"}, optax.sgd, "did you mean 'frozen'"),
        ({"first/*": 0.1}, optax.sgd, "is a float"),
        ({"first/*": "frozen"}, None, "every part is frozen"),
        ({}, None, "there are no parts"),
        ([optax.sgd], None, "the parts are"),
    ],
)
def test_what_is_no_optimizer_is_an_error_at_once(parts, default, said):
    with pytest.raises(lepton.RecipeError, match=said):
        by_part(parts, default)


def test_functions_of_the_rate_need_one(blobs):
    with pytest.raises(lepton.RecipeError, match="no learning rate"):
        make(blobs, by_part({"first/*": optax.adam}, "frozen")).fit()
