"""Where a step is short, what costs a pass over the parameters is not done in each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lepton_jax import Recipe, controllers
from lepton_jax.controller import Controller, Pieces
from lepton_jax.controller.signals import EARLY

STEPS = 100


def watching(*signals):
    return controllers.Policy(
        "watching", lambda: (), lambda seen, state: ({}, state), signals
    )


def run(policies, stride, steps=STEPS, total=None):
    """Return parameters, averages and records of updates by -1 and a growing bit."""
    recipe = Recipe(
        model=dict,
        loss=optax.squared_error,
        optimizer=optax.sgd,
        learning_rate=0.1,
        controller=policies,
    )
    controller = Controller(recipe)
    controller.stride = stride
    params = {"x": jnp.zeros(2)}
    optimizer, state = controller.init(params, {})
    if total:
        state = state._replace(fed=state.fed | {"steps": jnp.float32(total)})
    pieces = Pieces(params, {}, optimizer)

    @jax.jit
    def update(step, state, pieces):
        gradient = {"x": jnp.full(2, 1 + step / 10)}
        values = {"loss": jnp.float32(1)}
        return controller.update(step, state, pieces, {}, gradient, values)

    seen = []
    for step in range(steps):
        pieces, state, record = update(jnp.int32(step), state, pieces)
        average = state.average[0]["x"][0] if state.average else 0
        seen.append((pieces.params["x"][0], average, record))
    x, averages, records = zip(*seen, strict=True)
    return np.array(x), np.array(averages), records


def test_an_average_that_is_moved_rarely_is_as_old():
    stride = 4
    policies = (controllers.averaging(decay=0.9),)
    _, each, _ = run(policies, 1)
    x, rare, _ = run(policies, stride)
    early = EARLY * stride
    np.testing.assert_array_equal(rare[:early], each[:early])
    moved = np.flatnonzero(np.diff(rare[early:]))
    assert (np.diff(moved) == stride).all()
    # over a stride it is as far behind as the other is, to half a step
    cycle = slice(STEPS - 4 * stride, STEPS)
    step = np.abs(np.diff(x)).max()
    assert abs((rare[cycle] - each[cycle]).mean()) < step / 2


def test_the_last_step_of_a_run_moves_the_average():
    policies = (controllers.averaging(share=0.3),)
    _, rare, _ = run(policies, 4, steps=STEPS - 2, total=STEPS - 2)
    assert (STEPS - 3) % 4
    assert rare[-1] != rare[-2]


def test_a_decay_of_0_keeps_the_average_at_the_parameters():
    x, averages, _ = run((controllers.adjustable("averaging_decay"),), 4)
    np.testing.assert_array_equal(averages, x)


def test_an_updates_norm_is_that_of_the_last_one_measured():
    x, _, records = run((watching("update_norm"),), 4)
    norms = np.array([record["update_norm"] for record in records])
    sizes = np.abs(np.diff(x, prepend=0)) * 2**0.5
    last = [max(step - 1, 0) // 4 * 4 for step in range(EARLY * 4 + 1, STEPS)]
    np.testing.assert_allclose(norms[EARLY * 4 + 1 :], sizes[last], rtol=1e-3)


@pytest.mark.parametrize("stride", [1, 4])
def test_a_gradient_of_weight_0_is_not_added_and_its_signals_are_unknown(stride):
    def alternate(seen, state):
        return {"gradient_weight": state % 2}, state + 1

    policy = controllers.Policy(
        "alternating",
        lambda: jnp.float32(0),
        alternate,
        ("gradient_sum_norm", "gradient_dot_distance"),
        ("gradient_weight",),
    )
    _, _, records = run((policy,), stride, steps=5)
    total = 0.0
    # the weight of a step is that given in the step before it
    for step, record in enumerate(records):
        counts = step == 0 or step % 2 == 0
        assert np.isnan(record["gradient_sum_norm"]) != counts
        assert np.isnan(record["gradient_dot_distance"]) != counts
        if counts:
            total = 0.9995 * total + 2 * (1 + step / 10)
            assert record["gradient_sum_norm"] == pytest.approx(total, rel=1e-4)
