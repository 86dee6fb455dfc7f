"""Each policy, on made-up signals, acts when it should and only then.

It also keeps its bounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax import RecipeError, controllers
from lepton_jax.controller.knobs import KNOBS, neutral


def follow(policy, **signals):
    """Return the contributions of each step, by knob, to a sequence of signals.

    Args:
      policy: the policy.
      signals: sequences, or scalars that hold for all steps.
    """
    steps = max(np.size(x) for x in signals.values())
    rows = {
        n: jnp.asarray(np.broadcast_to(np.asarray(x, np.float32), steps))
        for n, x in signals.items()
    }
    assert set(rows) == set(policy.watches)

    def step(state, row):
        moves, state = policy.update(row, state)
        return state, {
            k: jnp.asarray(moves.get(k, neutral(k)), jnp.float32) for k in policy.moves
        }

    @jax.jit
    def run():
        return jax.lax.scan(step, policy.init(), rows)[1]

    return {knob: np.asarray(x) for knob, x in run().items()}


def noisy(values, seed=0, scale=0.02):
    return np.asarray(values) + scale * np.random.default_rng(seed).normal(
        size=len(values)
    )


# ---- warm-up ----


def test_warmup_ends_early_where_the_gradient_has_settled_else_at_its_bound():
    steps = np.arange(300)
    settled = follow(
        controllers.warmup(200), updates=steps, gradient_norm=1 + np.exp(-steps / 10)
    )["learning_rate"]
    restless = follow(
        controllers.warmup(200), updates=steps, gradient_norm=np.exp(-steps / 10)
    )["learning_rate"]
    linear = np.minimum(0.01 + 0.99 * steps / 200, 1)

    np.testing.assert_allclose(restless, linear, rtol=1e-6)
    assert settled[15] == pytest.approx(linear[15])
    assert settled[80] == 1
    assert (np.diff(settled) >= 0).all()
    assert (settled[1:] / settled[:-1])[25:].max() < 1.1 + 1e-5  # no jump at the end


def test_warmup_goes_by_updates_so_that_skipped_steps_do_not_count():
    rate = follow(controllers.warmup(10, tolerance=None), updates=[0, 1, 1, 1, 2])[
        "learning_rate"
    ]
    np.testing.assert_allclose(rate, [0.01, 0.109, 0.109, 0.109, 0.208], rtol=1e-5)


def test_warmups_bound_is_that_of_untuned_linear_warmup():
    rate = follow(controllers.warmup(b2=0.99, tolerance=None), updates=np.arange(201))[
        "learning_rate"
    ]

    assert rate[100] < 0.51
    assert rate[199] < 1
    assert rate[200] == 1


# ---- plateau ----


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.floats(0.125, 10, width=32), min_size=30, max_size=30),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_plateau_decides_as_optax_does(losses, patience, cooldown):
    policy = controllers.plateau(
        factor=0.5, patience=patience, every=1, rtol=1e-3, cooldown=cooldown, floor=0.05
    )
    theirs = optax.contrib.reduce_on_plateau(
        factor=0.5,
        patience=patience,
        rtol=1e-3,
        atol=0,
        cooldown=cooldown,
        min_scale=0.05,
    )

    def step(state, loss):
        state = theirs.update({}, state, value=loss)[1]
        return state, state.scale

    expected = jax.jit(lambda x: jax.lax.scan(step, theirs.init({}), x)[1])(
        jnp.asarray(losses, jnp.float32)
    )

    np.testing.assert_allclose(
        follow(policy, loss=losses)["learning_rate"], expected, rtol=1e-6
    )


def test_plateau_looks_at_means_and_not_at_what_is_not_finite():
    falling = np.exp(-np.arange(2000) / 1000)
    falling[::7] = np.nan

    policy = controllers.plateau(every=20, patience=3)
    assert (follow(policy, loss=falling)["learning_rate"] == 1).all()

    flat = follow(
        controllers.plateau(every=20, patience=3, floor=0.1), loss=np.ones(2000)
    )["learning_rate"]

    assert flat[20 * 4 - 2] == 1
    assert flat[20 * 4 - 1] == 0.5
    assert flat[-1] == np.float32(0.1)


def test_plateau_counts_each_evaluation_once_and_knows_which_way_is_up():
    evaluations = np.repeat(np.arange(6), 50)
    accuracy = np.repeat([np.nan, 0.5, 0.6, 0.6, 0.6, 0.6], 50)
    rate = follow(
        controllers.plateau("evaluation_accuracy", patience=3),
        evaluations=evaluations,
        evaluation_accuracy=accuracy,
    )

    np.testing.assert_array_equal(
        rate["learning_rate"], np.where(evaluations < 5, 1, 0.5)
    )


# ---- decay ----


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_decay_is_constant_and_then_falls_to_its_floor(shape):
    steps = np.arange(100)
    rate = follow(
        controllers.decay(0.25, shape, floor=0.1),
        step=steps,
        progress=(steps + 1) / 100,
    )["learning_rate"]

    assert (rate[:75] == 1).all()
    assert (np.diff(rate[75:]) < 0).all()
    assert 0.1 < rate[-1] < 0.2


def test_linear_decay_over_the_whole_run_is_optaxs():
    steps = np.arange(50)
    rate = follow(
        controllers.decay(1.0, "linear"), step=steps, progress=(steps + 1) / 50
    )["learning_rate"]

    np.testing.assert_allclose(
        rate, optax.linear_schedule(1.0, 0.0, 50)(steps), rtol=1e-4
    )


def test_decay_does_nothing_where_the_budget_is_not_known():
    moves = follow(controllers.decay(), step=np.arange(50), progress=np.nan)

    assert (moves["learning_rate"] == 1).all()


def test_decay_by_trend_begins_when_the_loss_is_flat_takes_its_share_and_stops():
    steps = np.arange(4000)
    loss = 1 + np.exp(-steps / 300)
    trend = np.gradient(loss)
    moves = follow(
        controllers.decay(0.25, "linear", start="trend", patience=100),
        step=steps,
        progress=np.nan,
        loss_mean=loss,
        loss_trend=trend,
    )
    begun = int(np.argmax(moves["learning_rate"] < 1)) - 1
    ended = int(np.argmax(moves["stop"]))

    # it begins where the loss is flat, and not before
    assert -trend[begun] * 100 < 0.02
    assert 500 < begun < 2500
    assert ended + 1 == pytest.approx(begun / 0.75, abs=2)
    assert moves["learning_rate"][ended] < 0.01

    still = follow(
        controllers.decay(0.25, start="trend", patience=100),
        step=steps,
        progress=np.nan,
        loss_mean=np.exp(-steps / 300),
        loss_trend=-np.exp(-steps / 300) / 300,
    )

    # a third of the loss in each 100 steps
    assert (still["learning_rate"] == 1).all()
    assert not still["stop"].any()


# ---- guard ----


def learning(steps=600, seed=0):
    """Return loss and gradient norm of a run that learns, with noise."""
    rng = np.random.default_rng(seed)
    falling = 2 * np.exp(-np.arange(steps) / 100)
    loss = 0.2 + falling + 0.03 * rng.normal(size=steps)
    return loss, rng.lognormal(0, 0.3, steps)


RATE = {"base_rate": 0.1, "scheduled_rate": 0.0}


def test_guard_lets_an_ordinary_run_be():
    for seed in range(5):
        loss, norms = learning(seed=seed)
        moves = follow(controllers.guard(), loss_kept=loss, gradient_norm=norms, **RATE)
        assert moves["skip"].sum() <= 1
        assert not moves["rollback"].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 50.0])
def test_guard_skips_a_spike_and_no_more(value):
    loss, norms = learning()
    loss[300] = value
    norms[300] = abs(value)
    skipped = follow(controllers.guard(), loss_kept=loss, gradient_norm=norms, **RATE)[
        "skip"
    ]

    assert skipped[300] == 1
    assert skipped[295:310].sum() == 1


def test_guard_skips_all_of_a_burst_and_does_not_go_back():
    loss, norms = learning()
    loss[300:320] += 3
    moves = follow(controllers.guard(), loss_kept=loss, gradient_norm=norms, **RATE)

    assert moves["skip"][300:320].all()
    assert not moves["skip"][321:].any()
    assert not moves["rollback"].any()


def test_guard_takes_a_lasting_change_for_the_new_normal():
    loss, norms = learning()
    loss[300:] += 1
    moves = follow(controllers.guard(), loss_kept=loss, gradient_norm=norms, **RATE)

    assert moves["skip"][300]
    assert not moves["skip"][340:].any()
    assert not moves["rollback"].any()
    assert moves["notice"][325:340].any(), "a person is told that spikes passed"


def test_guard_says_that_spikes_pass_once_its_budget_is_used_up():
    loss, norms = learning()
    loss[300:310] = 50
    moves = follow(
        controllers.guard(budget=3), loss_kept=loss, gradient_norm=norms, **RATE
    )

    np.testing.assert_array_equal(np.flatnonzero(moves["skip"]), [300, 301, 302])
    assert moves["notice"][303]
    assert not moves["notice"][:303].any()


@pytest.mark.parametrize("value", [np.nan, 30.0])
def test_guard_goes_back_when_the_loss_stays_lost(value):
    loss, norms = learning()
    loss[300:] = value
    policy = controllers.guard(patience=20, rollbacks=3, rate=0.3)
    moves = follow(policy, loss_kept=loss, gradient_norm=norms, **RATE)

    assert np.argmax(moves["rollback"]) == 319
    assert policy.limits["rollbacks"] == 3
    assert policy.limits["rate"] == 0.3


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 20), st.integers(20, 200), st.integers(0, 2**31))
def test_guards_budget_is_a_bound(budget, window, seed):
    rng = np.random.default_rng(seed)
    loss = np.where(
        rng.random(600) < 0.3, 1e6 * rng.random(600), 1 + 0.01 * rng.normal(size=600)
    )
    skipped = follow(
        controllers.guard(budget=budget, window=window, patience=1000),
        loss_kept=loss,
        gradient_norm=1.0,
        **RATE,
    )["skip"]
    within = np.convolve(skipped, np.ones(window), "valid")

    # a full bucket, and what drains from it meanwhile
    assert within.max() <= 2 * budget + 1


def test_guard_in_clip_mode_cuts_spikes_to_the_usual_norm_and_skips_the_nonfinite():
    loss, norms = learning()
    norms[300] = 100.0
    norms[400] = np.nan
    moves = follow(
        controllers.guard("clip"), loss_kept=loss, gradient_norm=norms, **RATE
    )

    assert 0.5 < moves["clip_norm"][300] < 2
    assert not moves["skip"][300]
    assert moves["skip"][400]
    assert np.isinf(np.delete(moves["clip_norm"], 300)).mean() > 0.99


def test_guard_holds_a_slip_of_the_rate_back_until_a_lower_one_is_set():
    loss, norms = learning(400)
    rate = np.full(400, 0.1)
    rate[100:200] = 2.0  # twenty times as high is followed
    rate[200:300] = 100.0
    moves = follow(
        controllers.guard(),
        loss_kept=loss,
        gradient_norm=norms,
        base_rate=rate,
        scheduled_rate=0.0,
    )
    np.testing.assert_allclose(moves["learning_rate"][200:300], 2 / 100, rtol=1e-6)
    assert (np.delete(moves["learning_rate"], range(200, 300)) == 1).all()
    assert np.flatnonzero(moves["notice"] == 2).tolist() == [200]
    assert moves["skip"][200]
    assert not moves["skip"][201:].any()


def test_guard_follows_a_schedule_wherever_it_goes_and_falls_back_to_it():
    loss, norms = learning(400)
    schedule = np.where(np.arange(400) % 100 < 50, 1e-6, 1.0)
    set_live = schedule.copy()
    set_live[300:] = 500.0
    moves = follow(
        controllers.guard(),
        loss_kept=loss,
        gradient_norm=norms,
        base_rate=set_live,
        scheduled_rate=schedule,
    )
    used = set_live * moves["learning_rate"]
    np.testing.assert_allclose(used, schedule, rtol=1e-5)
    assert np.flatnonzero(moves["notice"] == 2).tolist() == [300]


# ---- the batch, the optimizer, the average ----


def test_batch_growth_follows_the_noise_scale_in_powers_of_two_up_to_its_bound():
    noise = np.geomspace(16, 4096, 2000)
    policy = controllers.batch_growth(most=20)
    grown = follow(policy, noise_scale=noise, batch_size=32)["accumulate"]

    assert set(np.unique(grown)) == {1, 2, 4, 8, 16}
    assert (np.diff(grown) >= 0).all()
    assert (grown[:-60] <= np.maximum(noise[:-60] / 32, 1)).all()
    assert noise[np.argmax(grown == 4)] < 32 * 4 * 2

    back = np.r_[noise, noise[::-1]]
    fallen = follow(policy, noise_scale=back, batch_size=32)["accumulate"]

    assert fallen[-1] == 1
    assert fallen.max() == 16


def test_batch_growth_has_hysteresis():
    rng = np.random.default_rng(0)
    # within the factor of 4
    noise = 32 * np.exp(rng.uniform(np.log(0.55), np.log(1.9), 3000))
    policy = controllers.batch_growth()
    batches = follow(policy, noise_scale=noise, batch_size=32)["accumulate"]

    assert (batches == 1).all()

    # never for `patience` steps in a row
    spikes = np.where(np.arange(3000) % 40 == 0, 1e6, 32.0)

    batches = follow(policy, noise_scale=spikes, batch_size=32)["accumulate"]
    assert (batches == 1).all()


def test_the_optimizer_is_switched_once_at_its_share_or_when_the_loss_is_flat():
    progress = np.arange(1, 101) / 100
    index = follow(
        controllers.switch_optimizer(1, at=0.6), progress=np.r_[progress, progress]
    )["optimizer"]

    assert np.isnan(index[:60]).all()
    assert (index[60:] == 1).all()

    loss = 1 + np.exp(-np.arange(2000) / 100)
    index = follow(
        controllers.switch_optimizer(2, patience=50),
        loss_mean=loss,
        loss_trend=np.gradient(loss),
    )["optimizer"]
    at = int(np.argmax(~np.isnan(index)))

    assert 200 < at < 800
    assert (index[at:] == 2).all()


def test_averaging_ramps_up_to_its_decay_from_its_start_on():
    updates = np.arange(2000)
    decay = follow(
        controllers.averaging(0.98, start=0.5),
        updates=updates,
        progress=(updates + 1) / 2000,
    )["averaging_decay"]

    assert (decay[:1000] == 0).all()
    assert decay[1000] == np.float32(0.1)
    assert decay[-1] == np.float32(0.98)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_averagings_share_is_the_mean_age_of_what_is_averaged(share):
    decay = follow(controllers.averaging(share=share), updates=np.arange(4000))[
        "averaging_decay"
    ]
    average = 0.0
    for n, d in enumerate(decay.astype(float)):
        average = d * average + (1 - d) * n

    assert (3999 - average) / 4000 == pytest.approx(share, rel=0.02)


# ---- targets, knobs to set, clipping ----


def test_until_stops_at_the_first_target_reached_from_its_own_side():
    accuracy = np.r_[np.nan, 0.5, 0.98, 0.991]
    stop = follow(
        controllers.until(evaluation_accuracy=0.99), evaluation_accuracy=accuracy
    )["stop"]

    np.testing.assert_array_equal(stop, [0, 0, 0, 1])

    stop = follow(
        controllers.until(loss=0.1, seconds=60),
        loss_mean=[3, 1, 0.5, 0.1],
        seconds=[0, 10, 61, 62],
    )["stop"]

    np.testing.assert_array_equal(stop, [0, 0, 1, 1])


def test_adjustable_declares_knobs_and_moves_none():
    policy = controllers.adjustable("learning_rate", "clip_norm")

    assert policy.moves == ("learning_rate", "clip_norm")
    assert policy.update({}, policy.init())[0] == {}

    with pytest.raises(RecipeError, match="clip_norm"):
        controllers.adjustable("clip_nrom")
    with pytest.raises(RecipeError, match="no value to set"):
        controllers.adjustable("skip")


@settings(max_examples=15, deadline=None)
@given(
    st.floats(0.1, 0.9), st.floats(0.2, 1.5), st.floats(-8, 8), st.integers(0, 2**31)
)
def test_clip_by_history_finds_the_quantile_at_any_scale(quantile, spread, place, seed):
    logs = np.random.default_rng(seed).normal(place, spread, 3000)
    limits = follow(controllers.clip_by_history(quantile), gradient_norm=np.exp(logs))[
        "clip_norm"
    ]

    assert np.isinf(limits[:20]).all()

    below = (logs[1000:] <= np.log(limits[1000:])).mean()

    assert below == pytest.approx(quantile, abs=0.06)


def test_clip_by_history_forgets_and_is_not_poisoned():
    norms = np.r_[np.full(500, 1.0), np.full(1500, 10.0)] * np.random.default_rng(
        0
    ).lognormal(0, 0.1, 2000)
    norms[::11] = np.nan
    limits = follow(controllers.clip_by_history(0.5), gradient_norm=norms)["clip_norm"]

    assert limits[499] == pytest.approx(1, rel=0.2)
    assert limits[-1] == pytest.approx(10, rel=0.2)


# ---- all of them ----


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: controllers.warmup(0), "steps"),
        (lambda: controllers.warmup(10.5), "steps"),
        (lambda: controllers.plateau(factor=2), "factor"),
        (lambda: controllers.plateau(patience=0), "patience"),
        (lambda: controllers.decay(0), "share"),
        (lambda: controllers.decay(shape="square"), "linear"),
        (lambda: controllers.decay(start="now"), "budget"),
        (lambda: controllers.guard("drop"), "skip"),
        (lambda: controllers.guard(budget=-1), "budget"),
        (lambda: controllers.batch_growth(most="many"), "most"),
        (lambda: controllers.switch_optimizer(99), "to"),
        (lambda: controllers.switch_optimizer(at="end"), "trend"),
        (lambda: controllers.switch_optimizer(at=2.0), "at"),
        (lambda: controllers.averaging(1.5), "decay"),
        (lambda: controllers.averaging(share=0.9), "share"),
        (lambda: controllers.until(), "target"),
        (lambda: controllers.until(loss=None), "loss"),
        (lambda: controllers.until(loss=np.nan), "loss"),
        (lambda: controllers.clip_by_history(quantile=90), "quantile"),
    ],
)
def test_arguments_that_cannot_be_are_named(make, named):
    with pytest.raises(RecipeError, match=named) as caught:
        make()

    assert caught.value.remedy
    assert "controllers." in caught.value.where


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**31))
def test_no_policy_leaves_a_knobs_range_on_any_signals(seed):
    rng = np.random.default_rng(seed)
    wild = [np.nan, np.inf, -np.inf, 0, 1e38, -1e38, 1.0, 0.3]
    for policy in (
        controllers.plateau(every=2, patience=1),
        controllers.guard("clip", patience=3),
        controllers.batch_growth(patience=1),
        controllers.clip_by_history(least=1),
        controllers.switch_optimizer(patience=2),
        controllers.averaging(share=0.2, start=0.1),
        controllers.warmup(5),
        controllers.decay(),
    ):
        fixed = {"step": np.arange(400), "updates": np.arange(400), "batch_size": 32}
        for knob, values in follow(
            policy, **{n: fixed.get(n, rng.choice(wild, 400)) for n in policy.watches}
        ).items():
            kind = KNOBS[knob]
            usable = values[~np.isnan(values)] if kind.combine == "set" else values
            assert (usable >= kind.lowest).all(), (policy.name, knob)
            assert (
                (usable <= kind.highest).all()
                if kind.combine == "set"
                else not np.isnan(usable).any()
            ), (policy.name, knob)
