"""Every optimizer of Optax's does what it does in a loop written by hand.

This holds for rates, masks, and the weights to evaluate with.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, traverse_util

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.controller.knobs import neutral
from lepton_jax.step import optimizers

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 24
STEPS = 21
SCHEDULE = optax.warmup_cosine_decay_schedule(0.01, 0.1, 4, 18)
RATE = 0.05


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(12, 8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        hidden = linen.relu(linen.Dense(8, name="first")(x))
        return linen.Dense(3, name="last")(hidden)


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def sometimes_nan(outputs, targets):
    """A finite loss, whose gradient is NaN where a sample of it is above 2.6."""
    losses = cross_entropy(outputs, targets)
    far = losses > 2.6
    return losses + jnp.where(far, jnp.sqrt(jnp.where(far, 0 * losses, 1.0)), 0.0)


def halves(params):
    return {"first": "slow", "last": "fast"}


def by_name(params):
    """True for kernels."""
    return traverse_util.path_aware_map(lambda path, x: path[-1] == "kernel", params)


def unless_large(rate):
    """A wrapper that Optax doesn't have, with no state of its own."""
    inner = optax.adam(rate)

    def update(updates, state, params=None):
        def skip():
            return jax.tree.map(jnp.zeros_like, updates), state

        large = optax.tree.norm(updates) > 1.0
        return jax.lax.cond(large, skip, lambda: inner.update(updates, state, params))

    return optax.GradientTransformation(inner.init, update)


# functions of the rate, in forms that Optax itself takes a schedule in
WRAPPED = {
    "MultiSteps of sgd": lambda r: optax.MultiSteps(optax.sgd(r), 4),
    "MultiSteps of adam": (
        lambda r: optax.MultiSteps(optax.adam(r), 4).gradient_transformation()
    ),
    "MultiSteps that skips": lambda r: optax.MultiSteps(
        optax.sgd(r, momentum=0.9), 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "apply_if_finite": lambda r: optax.apply_if_finite(optax.adam(r), 50),
    "lookahead": lambda r: optax.lookahead(optax.sgd(r), 5, 0.5),
    "schedule_free_sgd": lambda r: optax.contrib.schedule_free_sgd(r),
    "partition": lambda r: optax.partition(
        {"slow": optax.MultiSteps(optax.adam(r), 2), "fast": optax.sgd(r)}, halves
    ),
    "nested chain": lambda r: optax.chain(
        optax.clip(0.5),
        optax.chain(
            optax.scale_by_adam(),
            optax.chain(optax.apply_if_finite(optax.scale_by_learning_rate(r), 9)),
        ),
    ),
}
MORE = {
    "lookahead that resets": lambda r: optax.lookahead(
        optax.sgd(r), 3, 0.5, reset_state=True
    ),
    "conditionally_mask": lambda r: optax.conditionally_mask(
        optax.adam(r), lambda n: n % 3 == 0
    ),
    "conditionally_transform": lambda r: optax.chain(
        optax.scale_by_adam(),
        optax.conditionally_transform(optax.scale_by_learning_rate(r), lambda n: n > 2),
    ),
    "schedule_free_adamw": lambda r: optax.contrib.schedule_free_adamw(r),
    "schedule_free of a chain": lambda r: optax.contrib.schedule_free(
        optax.chain(optax.clip(1.0), optax.sgd(r)), r, b1=0.8
    ),
    "inject_hyperparams": lambda r: optax.inject_hyperparams(optax.adamw)(
        learning_rate=r, weight_decay=0.01
    ),
    "injected in MultiSteps": lambda r: optax.MultiSteps(
        optax.inject_hyperparams(optax.sgd)(learning_rate=r, momentum=0.9), 2
    ),
    "sam": lambda r: optax.contrib.sam(
        optax.sgd(r), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    ),
    "mechanize": lambda r: optax.contrib.mechanize(optax.adam(r)),
    "prodigy": lambda r: optax.contrib.prodigy(r),
    "named_chain": lambda r: optax.named_chain(
        ("accumulate", optax.apply_every(3)),
        ("adam", optax.apply_if_finite(optax.adam(r), 3)),
    ),
    "of one's own": unless_large,
}


def never(knobs):
    """A policy that may move knobs, and leaves everything alone."""

    def update(signals, state):
        return {
            k: jnp.where(signals["finite"] >= 0, neutral(k), 2.0) for k in knobs
        }, state

    return controllers.Policy("never", lambda: (), update, ("finite",), tuple(knobs))


def trained(data, optimizer, rate=SCHEDULE, steps=STEPS, model=Net, **fields):
    fields = {
        "loss": cross_entropy,
        "devices": 1,
        "batch_size": BATCH,
        "shuffle": False,
    } | fields
    trainer = lepton.Trainer(
        model=model, optimizer=optimizer, learning_rate=rate, **fields
    )
    return trainer, trainer.fit(data, steps=steps)


def by_hand(
    data, optimizer, *, loss=cross_entropy, clip_norm=None, steps=STEPS, looks=False
):
    """Train in a plain loop.

    Returns:
      Losses, the parameters that were trained, and the optimizer's state.
    """
    graph, params, rest = nnx.split(Net(nnx.Rngs(jax.random.key(0))), nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    if looks:
        params = optax.LookaheadParams.init_synced(params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        def loss_of(trained):
            module = nnx.merge(graph, trained, rest, copy=True)
            return loss(module(x), y).mean()

        value, gradients = jax.value_and_grad(loss_of)(params.fast if looks else params)
        if clip_norm is not None:
            clip = optax.clip_by_global_norm(clip_norm)
            gradients, _ = clip.update(gradients, optax.EmptyState())
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for index in range(steps):
        rows = np.arange(index * BATCH, (index + 1) * BATCH) % len(data[0])
        params, state, value = step(params, state, data[0][rows], data[1][rows])
        losses.append(value)
    return np.array(losses), params, state


def fast(params):
    return params.fast if isinstance(params, optax.LookaheadParams) else params


# XLA of jax 0.12 fuses some of these steps otherwise than the loop by hand, so they
# agree to the last rounding there, and not to the bit.
ROUNDED = jax.__version_info__ >= (0, 11)


def equal(found, expected):
    if ROUNDED:
        np.testing.assert_allclose(found, expected, rtol=3e-6, atol=2e-8)
    else:
        np.testing.assert_array_equal(found, expected)


def same(found, expected):
    jax.tree.map(equal, found, expected)


# ---- rates ----


@pytest.mark.parametrize("name", WRAPPED)
def test_a_schedule_is_read_where_plain_optax_reads_it_to_the_bit(name, blobs):
    loss = (
        sometimes_nan
        if name in ("MultiSteps that skips", "apply_if_finite")
        else cross_entropy
    )
    policies = never(["learning_rate", "skip"])
    for clip_norm, controller in ((None, ()), (0.2, policies)):
        optimizer = WRAPPED[name](SCHEDULE)
        looks = name == "lookahead"
        losses, params, _ = by_hand(
            blobs, optimizer, loss=loss, clip_norm=clip_norm, looks=looks
        )
        trainer, history = trained(
            blobs, WRAPPED[name], loss=loss, clip_norm=clip_norm, controller=controller
        )
        equal(history["loss"], losses)
        if clip_norm and name in ROUNDED:
            last = partial(np.testing.assert_allclose, rtol=2.5e-7, atol=1e-8)
            jax.tree.map(last, trainer.state.params, fast(params))
        else:
            same(trainer.state.params, fast(params))


# with clipping, whose threshold is a knob, XLA rounds the mean of accumulated gradients
# otherwise in one or two entries: of the first in jax 0.10, of the second in jax 0.12;
# so it does where the rate is a plain number
ROUNDED = {"MultiSteps of sgd", "MultiSteps of adam"}


CONSTANT = {
    "adafactor": lambda r: optax.MultiSteps(
        optax.adafactor(r, min_dim_size_to_factor=4), 2
    ),
    "fromage": lambda r: optax.apply_if_finite(optax.fromage(r), 3),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_schedule_that_is_always_the_same_is_joined_with_other_constants_as_in_optax(
    name, blobs
):
    same_rate = optax.constant_schedule(RATE)
    losses, params, _ = by_hand(blobs, CONSTANT[name](same_rate))
    trainer, history = trained(
        blobs, CONSTANT[name], same_rate, controller=never(["learning_rate"])
    )

    equal(history["loss"], losses)
    same(trainer.state.params, params)


def test_gradients_that_are_nan_leave_the_schedule_where_it_is(blobs):
    trainer, history = trained(blobs, WRAPPED["apply_if_finite"], loss=sometimes_nan)
    refused = int(trainer.state.optimizer.total_notfinite)

    assert 0 < refused < STEPS
    assert history["learning_rate"][-1] == np.float32(SCHEDULE(STEPS - 1 - refused))


def test_the_rates_of_four_accumulated_steps_are_the_schedules_first_four(blobs):
    falling = optax.linear_schedule(0.05, 0.0, 4)
    trainer, history = trained(
        blobs, lambda r: optax.MultiSteps(optax.sgd(r), 4), falling, steps=16
    )

    np.testing.assert_array_equal(
        history["learning_rate"],
        np.repeat(np.float32([0.05, 0.0375, 0.025, 0.0125]), 4),
    )

    _, params, _ = by_hand(blobs, optax.MultiSteps(optax.sgd(falling), 4), steps=16)

    same(trainer.state.params, params)


def test_a_scaled_rate_stays_a_schedule(blobs):
    def scaled(rate):
        adamw = optax.adamw(10 * rate / 4 + 1e-3, weight_decay=rate)
        return optax.MultiSteps(adamw, 4)

    plain = optax.MultiSteps(
        optax.adamw(lambda n: 10 * SCHEDULE(n) / 4 + 1e-3, weight_decay=SCHEDULE), 4
    )
    _, params, _ = by_hand(blobs, plain)
    trainer, _ = trained(blobs, scaled)

    same(trainer.state.params, params)


def recipe(optimizer, rate=SCHEDULE, **fields):
    return lepton.Recipe(
        model=Net, loss=cross_entropy, optimizer=optimizer, learning_rate=rate, **fields
    )


def some_params():
    numbers = np.random.default_rng(3).normal(size=23).astype(np.float32)
    return {
        "first": {"kernel": numbers[:12].reshape(4, 3), "bias": numbers[12:15]},
        "last": {"kernel": numbers[15:21].reshape(3, 2), "bias": numbers[21:]},
    }


def resting(optimizer, state, params, updates):
    """The knobs that stand in an update that nobody interferes with."""
    rate = optimizer.scheduled(state, params, updates)
    return {"learning_rate": rate, optimizers.SCHEDULED: rate}


@pytest.mark.parametrize("name", MORE)
def test_other_wrappers_read_their_own_count_too(name):
    params = some_params()
    ours = optimizers.build(recipe(MORE[name]))
    plain = MORE[name](SCHEDULE)
    looks = "lookahead" in name
    mine = params
    state = ours.init(params)
    theirs = optax.LookaheadParams.init_synced(params) if looks else params
    plain_state = plain.init(theirs)

    @jax.jit
    def our_step(gradients, state, params, updates):
        knobs = resting(ours, state, params, updates)
        return ours.update(lambda: gradients, state, params, knobs, jnp.float32(1))

    @jax.jit
    def plain_step(gradients, state, params):
        updates, state = plain.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(9):
        noise = np.random.default_rng(index).normal(size=23)
        gradients = jax.tree.map(
            lambda p, n=noise: np.float32(p * 0.1 + n[: p.size].reshape(p.shape) / 4),
            params,
        )
        mine, state = our_step(gradients, state, mine, jnp.int32(index))
        theirs, plain_state = plain_step(gradients, plain_state, theirs)
        same(mine, fast(theirs))


ORDINARY = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "adafactor": optax.adafactor,
    "rmsprop": optax.rmsprop,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "fromage": optax.fromage,
    "nadamw": optax.nadamw,
    "yogi": optax.yogi,
    "muon": optax.contrib.muon,
    "adopt": optax.contrib.adopt,
    "chain": lambda r: optax.chain(optax.clip(1.0), optax.chain(optax.sgd(r))),
    "masked": lambda r: optax.masked(optax.adam(r), by_name),
    "labels": lambda r: optax.partition(
        {"slow": optax.adam(r), "fast": optax.sgd(2 * r)}, halves
    ),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_optimizers_keep_the_state_that_checkpoints_have(name):
    params = some_params()
    expected = jax.eval_shape(ORDINARY[name](0.0).init, params)
    found = jax.eval_shape(optimizers.build(recipe(ORDINARY[name])).init, params)

    assert jax.tree.structure(found) == jax.tree.structure(expected)


def scaling(factor):
    def update(signals, state):
        return {"learning_rate": jnp.float32(factor)}, state

    return controllers.Policy("scaling", lambda: (), update, (), ("learning_rate",))


@pytest.mark.parametrize(
    "name", ["MultiSteps of adam", "lookahead", "schedule_free_sgd"]
)
def test_what_a_policy_makes_of_the_rate_is_what_the_optimizer_reads(name, blobs):
    looks = name == "lookahead"
    _, params, _ = by_hand(
        blobs, WRAPPED[name](lambda n: 0.25 * SCHEDULE(n)), looks=looks
    )
    trainer, history = trained(blobs, WRAPPED[name], controller=scaling(0.25))

    same(trainer.state.params, fast(params))

    _, plain = trained(blobs, WRAPPED[name])

    np.testing.assert_array_equal(
        history["learning_rate"], np.float32(0.25) * plain["learning_rate"]
    )


@pytest.mark.parametrize("name", ["MultiSteps of sgd", "schedule_free_sgd"])
def test_a_rate_that_a_person_sets_takes_the_schedules_place(name, blobs):
    trainer, _ = trained(blobs, WRAPPED[name], steps=8)
    trainer.state = controllers.set_base(trainer.state, learning_rate=0.02)
    history = trainer.fit(steps=8, train=blobs)

    np.testing.assert_array_equal(history["learning_rate"], np.float32(0.02))

    _, params, _ = by_hand(
        blobs,
        WRAPPED[name](lambda n: jnp.where(n < LATER[name], SCHEDULE(n), 0.02)),
        steps=16,
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
        trainer.state.params,
        params,
    )


# the optimizer's own count when eight steps are done; schedule-free's averaging counts
# from 1
LATER = {"MultiSteps of sgd": 2, "schedule_free_sgd": 8}


def test_a_resumed_run_reads_on_where_it_was(blobs, tmp_path):
    make = WRAPPED["MultiSteps of adam"]
    whole, _ = trained(blobs, make, steps=14)
    half, _ = trained(blobs, make, steps=6)
    folder = half.save(tmp_path / "half")
    rest = lepton.Trainer(
        model=Net,
        loss=cross_entropy,
        devices=1,
        batch_size=BATCH,
        shuffle=False,
        optimizer=make,
        learning_rate=SCHEDULE,
        train=blobs,
    ).load(folder)
    rest.fit(steps=8)

    same(rest.state.params, whole.state.params)
    same(rest.state.optimizer, whole.state.optimizer)


def test_a_rate_kept_in_the_state_follows_policies_too(blobs):
    def make(rate):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)

    _, params, _ = by_hand(blobs, optax.sgd(0.25 * RATE))
    trainer, _ = trained(blobs, make, RATE, controller=scaling(0.25))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, trainer.state.params, params)


FIXED = {
    "in the state": (
        lambda r: optax.inject_hyperparams(optax.sgd)(learning_rate=r),
        RATE,
    ),
    "looked at": (lambda r: optax.sgd(max(r, 1e-3)), RATE),
    "finished": (optax.sgd(RATE), None),
}


def test_clipping_under_accumulation_is_optax_to_the_bit(blobs):
    _, params, _ = by_hand(blobs, WRAPPED["MultiSteps of sgd"](SCHEDULE), clip_norm=0.2)
    trainer, _ = trained(blobs, WRAPPED["MultiSteps of sgd"], clip_norm=0.2)

    same(trainer.state.params, params)


@pytest.mark.parametrize("name", FIXED)
def test_a_rate_that_is_fixed_is_plain_optax_to_the_bit_while_it_rests(name, blobs):
    make, rate = FIXED[name]
    losses, params, _ = by_hand(blobs, make if rate is None else make(rate))
    trainer, history = trained(blobs, make, rate, controller=never(["learning_rate"]))

    equal(history["loss"], losses)
    same(trainer.state.params, params)


def test_sam_and_others_that_take_no_loss_are_not_given_it(blobs):
    _, params, _ = by_hand(blobs, MORE["sam"](RATE))
    trainer, _ = trained(blobs, MORE["sam"], RATE)

    same(trainer.state.params, params)


# ---- masks and labels ----

MASKED = {
    "by name": lambda r: optax.adamw(r, weight_decay=0.1, mask=by_name),
    "by dims": lambda r: optax.chain(
        optax.add_decayed_weights(
            0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
        optax.sgd(r),
    ),
    "by path": lambda r: optax.masked(
        optax.lion(r),
        lambda p: jax.tree_util.tree_map_with_path(
            lambda path, x: path[-1].key == "bias", p
        ),
    ),
    "a tree": lambda r: optax.adamw(
        r,
        weight_decay=0.1,
        mask={"first": {"kernel": True, "bias": False}, "last": False},
    ),
    "labels": lambda r: optax.multi_transform(
        {"slow": optax.sgd(r), "fast": optax.adam(r)}, halves
    ),
    "a tree of labels": lambda r: optax.partition(
        {"a": optax.adam(r), "b": optax.set_to_zero()},
        {"first": {"kernel": "b", "bias": "a"}, "last": "a"},
    ),
    "frozen": lambda r: optax.chain(
        optax.adam(r), optax.freeze({"first": True, "last": False})
    ),
    "selected": lambda r: optax.selective_transform(
        optax.adam(r), freeze_mask={"first": True, "last": False}
    ),
}


@pytest.mark.usefixtures("usual_compilation")
@pytest.mark.parametrize("name", MASKED)
def test_masks_and_labels_are_given_the_models_own_names(name, blobs):
    losses, params, _ = by_hand(blobs, MASKED[name](RATE))
    trainer, history = trained(blobs, MASKED[name], RATE)

    equal(history["loss"], losses)
    same(trainer.state.params, params)


def test_a_frozen_half_of_a_linen_model_stays_as_it_was_made(blobs):
    trainer, _ = trained(blobs, MASKED["a tree of labels"], SCHEDULE, model=LinenNet())
    start = trainer.program.init(0).params

    same(trainer.state.params["first"]["kernel"], start["first"]["kernel"])
    assert not np.array_equal(
        trainer.state.params["first"]["bias"], start["first"]["bias"]
    )


def test_adaptive_is_tried_on_the_models_own_names(blobs):
    def make(rate):
        parts = {"slow": optax.set_to_zero(), "fast": optax.adam(rate)}
        return optax.partition(parts, halves)

    trainer, history = trained(blobs, make, 1.0, controller=controllers.adaptive())
    start = trainer.program.init(0).params

    same(trainer.state.params["first"], start["first"])
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("rate", [RATE, SCHEDULE])
def test_a_mask_that_matches_nothing_names_the_parameters(rate, blobs):
    def misspelt(params):
        return traverse_util.path_aware_map(
            lambda path, x: path[-1] == "kernal", params
        )

    def wrapped(rate):
        chain = optax.chain(optax.clip(1.0), optax.adamw(rate, mask=misspelt))
        return optax.MultiSteps(chain, 2)

    with pytest.raises(lepton.RecipeError, match="matches no parameter") as error:
        trained(blobs, wrapped, rate)

    assert "test_optimizers.py:" in error.value.where
    assert "first/kernel" in error.value.remedy

    # said on purpose
    trained(blobs, lambda r: optax.lars(r, weight_decay_mask=False), rate, steps=1)


# ---- weights to evaluate with ----


def loss_with(params, data):
    graph, _, rest = nnx.split(Net(nnx.Rngs(jax.random.key(0))), nnx.Param, ...)
    return float(cross_entropy(nnx.merge(graph, params, rest)(data[0]), data[1]).mean())


def averaged(state, params):
    return optax.contrib.schedule_free_eval_params(state, params)


def cached(state, params):
    return state.cache if state.steps_since_sync else params


def partly(state, params):
    inner = state.inner_states["slow"].inner_state
    return {
        **params,
        "first": averaged(inner._replace(z=inner.z["first"]), params["first"]),
    }


BETTER = {
    "schedule_free_adamw": (optax.contrib.schedule_free_adamw, averaged),
    "schedule_free_sgd in MultiSteps": (
        lambda r: optax.MultiSteps(optax.contrib.schedule_free_sgd(r), 2),
        lambda state, params: averaged(state.inner_opt_state, params),
    ),
    "schedule_free_adamw in a chain": (
        lambda r: optax.chain(optax.clip(1.0), optax.contrib.schedule_free_adamw(r)),
        lambda state, params: averaged(state[1], params),
    ),
    "one half": (
        lambda r: optax.partition(
            {"slow": optax.contrib.schedule_free_sgd(r), "fast": optax.sgd(r)}, halves
        ),
        partly,
    ),
    "lookahead": (WRAPPED["lookahead"], lambda state, params: params.slow),
    "sam": (MORE["sam"], cached),
}


@pytest.mark.parametrize(
    ("name", "devices"),
    [*((name, 1) for name in BETTER), ("one half", 8), ("lookahead", 8)],
)
def test_the_weights_that_are_for_evaluation_are_evaluated_and_served(
    name, devices, blobs, tmp_path
):
    make, chosen = BETTER[name]
    test = (blobs[0][:48], blobs[1][:48])
    trainer, history = trained(
        blobs, make, RATE, test=test, evaluate_every=STEPS, devices=devices
    )
    losses, params, state = by_hand(blobs, make(RATE), looks=name == "lookahead")
    weights = chosen(state, params)
    expected = loss_with(weights, test)

    assert abs(expected - loss_with(fast(params), test)) > 1e-3

    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

    close(history["loss"], losses)
    close(history.evaluations[-1][1]["loss"], expected)
    close(trainer.evaluate(test).loss, expected)

    if devices == 1:
        same(trainer.state.params, fast(params))

    loaded = lepton.Trainer(
        model=Net,
        loss=cross_entropy,
        devices=devices,
        batch_size=BATCH,
        optimizer=make,
        learning_rate=RATE,
        decode=lambda outputs: outputs,
    ).load(trainer.save(tmp_path / "model"))
    graph, _, rest = nnx.split(Net(nnx.Rngs(jax.random.key(0))), nnx.Param, ...)

    close(loaded.predict(test[0]), nnx.merge(graph, weights, rest)(test[0]))


def test_of_several_optimizers_the_one_at_work_says_which_weights(blobs):
    both = controllers.switchable(
        optax.contrib.schedule_free_sgd, partial(optax.sgd, momentum=0.0), carry=False
    )
    trainer, _ = trained(
        blobs, both, RATE, controller=controllers.switch_optimizer(at=0.5), steps=8
    )
    state = trainer.state

    assert int(state.optimizer["index"]) == 1
    same(controllers.select_weights(state)[0], state.params)

    first, _ = trained(blobs, both, RATE, steps=8)
    expected = averaged(first.state.optimizer["each"][0], first.state.params)
    found, _ = controllers.select_weights(first.state)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, expected
    )


def test_a_recipe_may_say_which_weights_and_training_does_not_notice(blobs):
    test = (blobs[0][:48], blobs[1][:48])

    def halved(state, params):
        return jax.tree.map(lambda x, moment: x / 2 + 0 * moment, params, state[0].mu)

    for policies in ((), (controllers.averaging(0.9),)):
        plain, _ = trained(blobs, optax.adam, RATE, controller=policies)
        ours, _ = trained(
            blobs,
            optax.adam,
            RATE,
            evaluate_params=halved,
            controller=policies,
            test=test,
            evaluate_every=5,
        )
        same(ours.state.params, plain.state.params)
        expected = loss_with(jax.tree.map(lambda x: x / 2, ours.state.params), test)
        assert ours.evaluate(test).loss == pytest.approx(expected, rel=1e-5)
