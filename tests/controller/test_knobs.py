"""Every knob is driven through several values in one run on all devices.

The train step is compiled once.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.controller import Notice
from lepton_jax.controller.knobs import KNOBS, NEUTRAL, combined, neutral

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 32
RATE = 0.01

# contributions by step; a step that is not named has the neutral one
SCHEDULE = {
    "learning_rate": {0: 0, 1: 0, 2: 0, 3: 0, 8: 3, 9: 0.1, 18: 0.5},
    "dropout": {0: 0, 1: 0, 2: 0, 3: 3, 4: 0.5},
    "loss_scale": {1: 8, 2: 1024, 6: 2},
    "weight_decay": {5: 1000, 6: 0, 7: 10},
    "b1": {5: 0.5, 6: 0.99},
    "b2": {6: 0.9, 7: 0.99},
    "momentum": {17: 0.5, 18: 0.0, 19: 0.99},
    "clip_norm": {9: 0.01, 10: 0.1},
    "accumulate": {11: 2, 12: 2, 13: 3, 14: 3, 15: 3},
    "optimizer": {16: 1, 17: 1, 18: 1, 19: 1, 20: 2},
    "averaging_decay": {6: 0.5, 7: 0.9, 8: 0.25},
    "notice": {7: 1},
    "interpolation": {18: 0.8, 22: 0.9},
    "loss_limit": {9: 2.0, 10: 0.5, 12: 1.0},
    "loss_mark": {1: 1.0, 2: 2.0, 12: 0.5},
    "gradient_weight": {4: 0.5, 5: 2},
    "anchor": {9: 1, 20: 1},
    "skip": {8: 1, 18: 1},
    "restore": {10: 1, 22: 1},
    "rollback": {23: 1},
    "stop": {24: 1},
}
# tested where there is something to begin anew, or to serve: test_restart.py,
# test_best_average.py
ONCE = ("restart", "keep_average", "serve_kept")
# of each call: the one after the rollback finds the run halted, and counts for nothing
STEP = [*range(25), 24]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(12, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(x))


def scheduled():
    """Return a policy that moves every knob as the schedule says, and its table."""
    table = {k: np.full(len(STEP), neutral(k), np.float32) for k in KNOBS}
    for knob, values in SCHEDULE.items():
        table[knob][list(values)] = list(values.values())

    def update(signals, state):
        at = signals["step"].astype(jnp.int32)
        return {k: jnp.asarray(x)[at] for k, x in table.items()}, state

    watches = ("step", "gradient_norm", "gradient_sum_norm")
    policy = controllers.Policy(
        "scheduled",
        lambda: (),
        update,
        watches,
        tuple(KNOBS),
        notices=(Notice("a notice for the test", "read on"),),
    )
    return policy, table


@pytest.fixture(scope="module")
def run(blobs):
    """Run all steps.

    Returns:
      The program; the records of each step as dicts; and (params, optimizer,
      controller) before each step and after the last.
    """
    policy, _ = scheduled()
    recipe = lepton.Recipe(
        model=Net,
        loss=lepton.losses.cross_entropy,
        learning_rate=RATE,
        batch_size=ROWS,
        steps_per_call=1,
        optimizer=controllers.switchable(
            optax.adamw, partial(optax.sgd, momentum=0.9), optax.lion
        ),
        controller=policy,
    )
    # the same in each step, so that what differs is due to a knob
    batch = tuple(a[:ROWS] for a in blobs)
    topology, devices = lepton.hardware.here()
    trace = lepton.trace(recipe, *batch)
    program = lepton.Program(trace, lepton.plan(trace, topology), devices)
    state = program.init(0)
    rows = []
    states = []
    block = jax.device_put(batch, program.block_sharding)
    for call in range(len(STEP)):
        states.append(
            jax.device_get(
                jax.tree.map(
                    jnp.copy, (state.params, state.optimizer, state.controller)
                )
            )
        )
        state, records = program.train(state, block, 0, 1)
        rows.append(dict(zip(program.records, np.asarray(records)[0], strict=True)))
        if call == 24:
            state = controllers.without_halt(state)
    states.append(jax.device_get((state.params, state.optimizer, state.controller)))
    return program, rows, states


def test_one_compilation_serves_every_value_of_every_knob(run):
    program, *_ = run

    assert len(jax.devices()) == 8
    assert program.mesh.size == 8
    assert {*SCHEDULE, *ONCE} == set(KNOBS)
    assert [c.count for c in program.compilations if c.program == "train"] == [1]
    assert all(
        len(set(values.values()) | {NEUTRAL[KNOBS[k].combine]}) >= 3
        for k, values in SCHEDULE.items()
        if KNOBS[k].combine != "any"
    )


def test_each_steps_knobs_are_base_and_contributions(run):
    program, rows, _ = run
    _, table = scheduled()
    base = {**program.controller.base, **dict.fromkeys(program.controller.flags, 0.0)}

    assert set(base) == set(KNOBS)

    for step, row in zip(STEP, rows, strict=True):
        for knob in KNOBS:
            np.testing.assert_array_equal(row[f"scheduled:{knob}"], table[knob][step])
            np.testing.assert_array_equal(
                row[knob],
                combined(knob, base[knob], [table[knob][step]]),
                f"{knob} in step {step}",
            )


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)


def plain(row):
    """Steps in which the update is that of this step's gradient alone."""
    return (
        not any(row[k] for k in ("skip", "restore", "restart", "rollback"))
        and not row["interpolation"]
        and row["accumulate"] == 1
    )


ADAMW, SGD, LION = range(3)


def test_learning_rate_weight_decay_and_moments_act_as_optax_says(run):
    _, rows, states = run
    seen = 0
    for row, before, after in zip(rows[:23], states, states[1:], strict=False):
        if not plain(row):
            continue
        seen += 1
        if row["optimizer"] == LION:
            continue
        step_of = adamw_step if row["optimizer"] == ADAMW else sgd_step
        params, optimizer, _ = before
        params_after, optimizer_after, _ = after
        step = step_of(row, optimizer, optimizer_after, flat(params))
        np.testing.assert_allclose(
            flat(params_after) - flat(params),
            -row["learning_rate"] * step,
            rtol=2e-3,
            atol=1e-7,
        )

    assert seen > 12


def gradient_norm(row):
    """Norm of the gradient that enters the optimizer."""
    return min(row["gradient_norm"], row["clip_norm"])


def adamw_step(row, before, after, params):
    """Check how the moments moved; return AdamW's step by them, at a rate of 1."""
    old = before["each"][ADAMW][0]
    new = after["each"][ADAMW][0]
    restarted = before["index"] != ADAMW
    nu = 0 * flat(old.nu) if restarted else flat(old.nu)
    if not restarted:
        entered = (flat(new.mu) - row["b1"] * flat(old.mu)) / (1 - row["b1"])
        size = np.linalg.norm(entered)
        np.testing.assert_allclose(size, gradient_norm(row), rtol=2e-3)
    squares = (flat(new.nu) - row["b2"] * nu) / (1 - row["b2"])
    np.testing.assert_allclose(squares.sum(), gradient_norm(row) ** 2, rtol=2e-2)

    m = flat(new.mu) / (1 - row["b1"] ** new.count)
    v = flat(new.nu) / (1 - row["b2"] ** new.count)
    return m / (np.sqrt(v) + 1e-8) + row["weight_decay"] * params


def sgd_step(row, before, after, params):
    """Check how the momentum moved; return SGD's step by it, at a rate of 1."""
    trace = flat(before["each"][SGD][0].trace)
    step = flat(after["each"][SGD][0].trace)
    if before["index"] == SGD:
        size = np.linalg.norm(step - row["momentum"] * trace)
        np.testing.assert_allclose(size, gradient_norm(row), rtol=2e-3)
    return step


def test_dropout_and_loss_scale_act_in_the_next_step(run):
    _, rows, _ = run
    # the rate is 0 until step 4
    loss = [row["loss"] for row in rows]
    norms = [row["gradient_norm"] for row in rows]

    assert loss[0] != loss[1] == loss[2] == loss[3] != loss[4]
    assert norms[1] == norms[2] == norms[3] != norms[4]  # under scales 1, 8 and 1024


def test_skip_accumulate_anchor_and_restore_decide_what_is_kept(run):
    *_, states = run
    params = [flat(p) for p, _, _ in states]
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(params)]

    assert not any(moved[:4])
    assert all(moved[4:8])
    assert not moved[8]
    assert not moved[18]
    assert moved[11:16] == [False, True, False, False, True]
    # restored to what the anchor of step 9 holds
    np.testing.assert_array_equal(params[11], params[10])
    np.testing.assert_array_equal(params[23], params[21])
    assert not np.array_equal(params[22], params[21])
    assert [int(c.updates) for *_, c in states[11:17]] == [9, 9, 10, 10, 10, 11]


def test_the_optimizer_is_switched_and_the_first_moment_carried(run):
    _, _, states = run

    assert [int(o["index"]) for _, o, _ in states[15:22]] == [0, 0, 1, 1, 1, 1, 2]

    adam = flat(states[16][1]["each"][0][0].mu)
    sgd = flat(states[17][1]["each"][1][0].trace)

    np.testing.assert_allclose(
        np.linalg.norm(sgd - 0.9 * adam), run[1][16]["gradient_norm"], rtol=2e-3
    )


def test_the_average_follows_its_decay(run):
    _, rows, states = run
    for row, (_, _, before), (params, _, after) in zip(
        rows[:8], states, states[1:], strict=False
    ):
        old = flat(before.average[0])
        new = flat(after.average[0])
        # the parameters lie between the fast ones and the average
        share = row["interpolation"]
        now = (flat(params) - share * new) / (1 - share)
        np.testing.assert_allclose(
            new,
            row["averaging_decay"] * old + (1 - row["averaging_decay"]) * now,
            rtol=1e-4,
            atol=1e-6,
        )


def test_nothing_changes_between_a_halt_and_its_release(run):
    _, rows, states = run

    assert rows[23]["rollback"]
    assert rows[25]["stop"]
    assert [bool(c.halted) for *_, c in states[22:]] == [
        False,
        False,
        True,
        False,
        True,
    ]

    held = [flat(p) for p, _, _ in states[23:26]]

    np.testing.assert_array_equal(held[0], held[1])
    np.testing.assert_array_equal(held[1], held[2])
    # the step that stops is still made
    assert not np.array_equal(flat(states[26][0]), held[2])
