"""Faults in the first steps: what is done about them, and that nothing else is."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax import controllers

STEPS = 100
# of the runs
ROWS = 25
RUN = 300
SHARES = 10  # inputs of the regression


def followed(policy=None, **series):
    """Return where a policy skips and begins anew, over series of signals."""
    policy = policy or controllers.first_steps()
    usual = {"input_rms": 1.0, "gradient_norm": 1.0, "loss": 1.0}
    usual = {name: np.full(STEPS, x) for name, x in usual.items()}
    columns = usual | {name: np.asarray(x, float) for name, x in series.items()}
    update = jax.jit(policy.update)
    state = policy.init()
    skips = []
    restarts = []
    for step in range(STEPS):
        signals = {name: jnp.float32(columns[name][step]) for name in policy.watches}
        moves, state = update(signals, state)
        skips += [step] if moves["skip"] else []
        restarts += [step] if moves["restart"] else []
    return skips, restarts


def noisy(scale=0.02, seed=0):
    return np.exp(scale * np.random.default_rng(seed).normal(size=STEPS))


def with_span(values, first, last, factor):
    values = np.array(values)
    values[first:last] *= factor
    return values


@pytest.mark.parametrize("factor", [50, 1.3, 0.7])
@pytest.mark.parametrize("faulty", [1, 3, 10, 20])
def test_a_run_begins_anew_once_the_first_batches_were_of_another_size(factor, faulty):
    factor = factor if faulty > 2 else 50
    skips, restarts = followed(input_rms=with_span(noisy(), 0, faulty, factor))

    assert len(restarts) == 1
    assert faulty < restarts[0] < faulty + 6
    assert set(skips) == set(range(faulty, restarts[0] + 1)), "held back until then"


@pytest.mark.parametrize("first", [26, 40])
def test_a_burst_among_the_first_steps_is_held_back_and_costs_no_more(first):
    skips, restarts = followed(input_rms=with_span(noisy(), first, first + 20, 1.5))

    assert restarts == []
    assert skips == list(range(first, first + 20))


def test_a_burst_after_few_steps_is_taken_back_when_the_right_batches_return():
    _, restarts = followed(input_rms=with_span(noisy(), 8, 28, 1.5))

    assert restarts == [12, 32]


def test_wrong_targets_show_by_a_fall_of_gradient_and_loss():
    bad = with_span(noisy(0.2), 0, 20, 30)
    skips, restarts = followed(gradient_norm=bad, loss=with_span(noisy(0.1), 0, 20, 8))

    assert restarts == [24]
    assert skips == list(range(20, 25))


def test_after_batches_that_are_not_finite_the_run_begins_with_the_first_that_is():
    loss = np.where(np.arange(STEPS) < 20, np.nan, 1.0)
    assert followed(loss=loss, gradient_norm=loss) == ([], [20])
    single = np.where(np.arange(STEPS) == 1, np.nan, 1.0)
    assert followed(loss=single, gradient_norm=single) == ([], [])


@pytest.mark.parametrize("seed", range(5))
def test_steep_and_noisy_beginnings_are_no_faults(seed):
    steps = np.arange(STEPS)
    random = np.random.default_rng(seed)
    heavy = np.exp(random.normal(size=STEPS))  # inputs of a tiny batch
    for fall in (5, 20, 80):
        curve = 1000 * np.exp(-fall * steps / STEPS) + 0.1
        noise = np.exp(0.5 * random.normal(size=STEPS))
        found = followed(input_rms=heavy, loss=curve * noise, gradient_norm=curve)
        assert found[1] == []


def test_it_begins_anew_only_so_often_and_only_at_first():
    swinging = np.where(np.arange(STEPS) // 10 % 2, 1.0, 3.0)
    _, restarts = followed(controllers.first_steps(restarts=2), input_rms=swinging)
    assert len(restarts) == 2
    late = np.where(np.arange(STEPS) < 70, 1.0, 3.0)
    assert followed(controllers.first_steps(window=60), input_rms=late) == ([], [])


@pytest.mark.parametrize("options", [{"window": 0}, {"restarts": -1}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(lepton.RecipeError, match=next(iter(options))):
        controllers.first_steps(**options)


# ---- in a run under `adaptive()` ----


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(SHARES, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        return self.out(x)


@cache
def samples():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(ROWS * RUN + 500, SHARES)).astype(np.float32)
    noise = random.normal(size=(len(inputs), 1))
    weights = np.arange(1, SHARES + 1)[:, None] / SHARES
    return inputs, (inputs @ weights + 0.5 * noise).astype(np.float32)


def spoiled(fault, first):
    """Return the training samples with a fault in 20 batches from a step on."""
    inputs, targets = (part[: ROWS * RUN].copy() for part in samples())
    span = slice(first * ROWS, (first + 20) * ROWS)
    random = np.random.default_rng(1)
    if fault == "burst":
        inputs[span] = 50 * random.normal(size=inputs[span].shape)
    if fault == "nan":
        inputs[span] = np.nan
    if fault == "targets":
        targets[span] = 100 * random.permutation(targets[span])
    return inputs, targets


@cache
def final(fault, first):
    """Return the loss on the test samples, and the history, of a run with a fault."""
    trainer = lepton.Trainer(
        model=Linear,
        loss=lepton.losses.squared_error,
        optimizer=optax.adamw,
        learning_rate=1e-3,
        batch_size=ROWS,
        steps=RUN,
        shuffle=False,
        devices=1,
        steps_per_call=20,
        controller=controllers.adaptive(),
        train=spoiled(fault, first),
    )
    history = trainer.fit()
    test = tuple(part[ROWS * RUN :] for part in samples())
    return trainer.evaluate(test)[0], history


def acting(history, knob):
    names = [name for name in history.names if name.endswith(f":{knob}")]
    return np.flatnonzero(sum(history[name] for name in names))


@pytest.mark.usefixtures("quick_compilation_here")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fault", ["burst", "nan", "targets"])
@pytest.mark.parametrize("first", [0, 120, RUN - 20])
def test_a_fault_costs_at_most_two_per_cent_and_is_named(fault, first):
    clean, undisturbed = final("none", 0)
    loss, history = final(fault, first)

    for knob in ("skip", "restart", "rollback"):
        assert not len(acting(undisturbed, knob)), "nothing is wrong there"
    assert loss < 1.02 * clean
    if first:
        assert first in acting(history, "skip")
        assert not len(acting(history, "restart"))
    else:
        assert 20 <= acting(history, "restart")[0] < 26
        assert "begun anew" in str(history.notices[0])
