"""The controller's part of a run's state, and how the host reads and writes it.

The functions here take a `State` and return one. They run on the host between steps;
nothing in them is compiled into the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from lepton_jax.compat import placed
from lepton_jax.step import optimizers
from lepton_jax.trees import is_inexact

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe


class ControllerState(NamedTuple):
    """The controller's state between steps.

    Attributes:
      base: the knobs as the recipe or a person has set them, float32 (); a learning
        rate that is a schedule is NaN.
      knobs: their values in the last step.
      contributions: the contribution of each (policy, knob) in the last step, float32
        (moves,); () if there are none.
      policies: the state of each policy.
      signals: the moving means.
      fed: the values that the host measured, float32 (); "steps" is the step at which
        the budget ends, 0 if that is not known, and "begun" the one after which it
        began.
      updates: updates of the parameters so far, int32.
      halted: whether a stop or a rollback is asked for; nothing changes until the host
        has dealt with it.
      rate: the factor of the learning rate, the factor to which it grows, and its
        growth in a step, float32 (3,): see `with_rate_factor`.
      accumulated: (mean gradient, batches in it), or ().
      average: the averaged (parameters, variables), or ().
      lag: product of the averaging decays since the average was last moved, float32 ();
        () where there is none.
      kept: the copy of the average that `keep_average` made last; or ().
      anchor: `Pieces`: parameters, and variables and optimizer state where they may be
        restored; or ().
    """

    base: dict[str, Any]
    knobs: dict[str, Any]
    contributions: Any
    policies: tuple
    signals: dict[str, Any]
    fed: dict[str, Any]
    updates: Any
    halted: Any
    rate: Any
    accumulated: Any
    average: Any
    lag: Any
    kept: Any
    anchor: Any


class Pieces(NamedTuple):
    """The parts of a state that an update changes in addition to the controller's."""

    params: Any
    variables: Any
    optimizer: Any


def floats(tree: Any) -> Any:
    """Return the floating-point and complex leaves of a tree, None for the others."""
    return jax.tree.map(lambda x: x if is_inexact(x) else None, tree)


def merged(tree: Any, leaves: Any) -> Any:
    """Return a tree whose leaves are replaced where `leaves`, of `floats`, has one."""
    return jax.tree.map(
        lambda old, new: old if new is None else new,
        tree,
        leaves,
        is_leaf=lambda x: x is None,
    )


def select_weights(
    state: Any,
    recipe: Recipe | None = None,
) -> tuple[Any, Any]:
    """Select the weights to evaluate, predict and serve with.

    Training goes on from the state's own weights.

    Args:
      state: a `State`.
      recipe: its `evaluate_params` says which weights these are. Without it they are
        the averages of a policy that keeps them, else the weights that the optimizer's
        state implies (see `optimizers.evaluated`).

    Returns:
      Parameters and variables, like those of the state.

    Raises:
      RecipeError: `evaluate_params` can't be used.
    """
    given = None if recipe is None else recipe.evaluate_params
    params = state.params
    variables = state.variables
    controller = state.controller
    averaged = isinstance(controller, ControllerState) and controller.average != ()

    if averaged:
        mean_params, mean_variables = controller.average
        variables = merged(variables, mean_variables)
    if averaged and given is None:
        return mean_params, variables
    return optimizers.evaluated(given, state.optimizer, params), variables


def with_measurements(
    state: Any,
    **values: float,
) -> Any:
    """Return a `State` whose controller knows values that the host measured.

    Names that no policy watches are dropped.
    """
    return _with_values(state, "fed", values)


def set_base(
    state: Any,
    **values: float,
) -> Any:
    """Return a `State` whose knobs have other bases."""
    return _with_values(state, "base", values)


def with_rate_factor(
    state: Any,
    factor: float,
    later: float | None = None,
    steps: int = 1,
) -> Any:
    """Return a `State` with a factor of the learning rate.

    Args:
      state: a `State`.
      factor: the factor of the rate's base in the next step.
      later: the factor to which it grows; None: it stays.
      steps: the steps that the growth takes.
    """
    controller = state.controller
    later = factor if later is None else later
    growth = (later - factor) / steps
    numbers = np.array([factor, later, growth], np.float32)
    rate = placed(numbers, controller.rate.sharding)
    return _with_controller(state, controller._replace(rate=rate))


def without_halt(state: Any) -> Any:
    """Return a `State` that goes on after the host dealt with a stop or a rollback."""
    controller = state.controller
    halted = placed(np.bool_(False), controller.halted.sharding)
    return _with_controller(state, controller._replace(halted=halted))


# ---- internals ----


def _with_values(
    state: Any,
    part: str,
    values: Mapping[str, float],
) -> Any:
    """Return a `State` with other scalars in a dict of the controller's state."""
    controller = state.controller
    if not isinstance(controller, ControllerState):
        return state
    old = getattr(controller, part)
    fresh = {
        name: placed(np.float32(value), old[name].sharding)
        for name, value in values.items()
        if name in old
    }
    if not fresh:
        return state
    return _with_controller(state, controller._replace(**{part: old | fresh}))


def _with_controller(state: Any, controller: ControllerState) -> Any:
    return dataclasses.replace(state, controller=controller)
