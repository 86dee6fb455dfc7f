"""What a contestant of `tools.bench controller` is, and those under a controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.compat import eagerly
from lepton_jax.controller.knobs import neutral
from lepton_jax.planner import trace
from lepton_jax.train.recovery import GROWS_WITHIN

# By this knob a policy tells a person that it can't be good on a task.
NOTICE = "notice"
# By these knobs a policy claims that something is wrong with the data or the rate.
ALARMS = ("skip", "rollback", "restart", "restore", "loss_limit")


class Signals(NamedTuple):
    """Scalars that a contestant sees in addition to the gradients.

    Attributes:
      step: from 0.
      loss: of the batch.
      measured: means of what the forward pass measures by its knobs.
      evaluation_loss: on the validation set, at the last evaluation; NaN before.
      evaluations: so far.
      raised: the factor by which a person raises the learning rate before this step.
    """

    step: Any
    loss: Any
    measured: Mapping[str, Any]
    evaluation_loss: Any
    evaluations: Any
    raised: Any


class Said(NamedTuple):
    """Notice and alarm of a controller in one step, float32 ().

    Attributes:
      notice: above 0 where it can't be good on the task.
      alarm: 1 where a policy moves one of `ALARMS`.
    """

    notice: Any
    alarm: Any


NOTHING = Said(jnp.float32(0), jnp.float32(0))


class Contestant(NamedTuple):
    """A way to train.

    Attributes:
      init: (params, variables) to its state.
      update: (signals, gradients, (params, variables) before the step, variables after
        its forward pass, state) to (params, variables, state, `Said`).
      evaluated: (params, variables, state) to the (params, variables) that are
        evaluated.
      knobs: its state to the knobs of the forward pass.
      limits: how often and how it may go back, as in `Policy.limits`.
    """

    init: Callable[[Any, Any], Any]
    update: Callable[..., tuple[Any, Any, Any, Said]]
    evaluated: Callable[[Any, Any, Any], tuple[Any, Any]] = (
        lambda params, variables, state: (params, variables)
    )
    knobs: Callable[[Any], Mapping[str, Any]] = lambda state: {}
    limits: Mapping[str, Any] = {}


Maker = Callable[[lepton.Recipe, Any], Contestant]


# ---- the controller ----


class Driven(NamedTuple):
    """The state of a contestant under a controller: the optimizer's and its own."""

    optimizer: Any
    controller: Any


class Served(NamedTuple):
    """The part of a state that `controllers.select_weights` reads."""

    params: Any
    variables: Any
    optimizer: Any
    controller: Any


def adaptive(recipe: lepton.Recipe, rate: Any) -> Contestant:
    """The task's optimizer under `controllers.adaptive()`."""
    return controlled(recipe, rate, controllers.adaptive())


def _at_work(recipe: lepton.Recipe) -> controllers.Controller:
    """Return the recipe's policies as a trainer has them: a trace sets their stride."""
    samples = (recipe.train.inputs, recipe.train.targets)
    inputs, targets = jax.tree.map(_one, samples)
    return eagerly(lambda: trace(recipe, inputs, targets).controller)


def _one(samples: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of a batch of one of some samples."""
    return jax.ShapeDtypeStruct((1, *samples.shape[1:]), samples.dtype)


def controlled(recipe: lepton.Recipe, rate: Any, policies: Any) -> Contestant:
    """The task's optimizer under some policies, as in a train step of `Trainer`.

    Args:
      recipe: of the task.
      rate: the base of the learning rate.
      policies: as in `Recipe.controller`.

    Raises:
      RecipeError: the policies can't drive the optimizer.
    """
    assert recipe.steps is not None
    controller = _at_work(recipe.with_(controller=policies))
    known = {"steps": jnp.float32(recipe.steps)}

    def init(params: Any, variables: Any) -> Any:
        optimizer, state = controller.init(params, variables)
        base = state.base | {"learning_rate": jnp.asarray(rate, jnp.float32)}
        return Driven(optimizer, state._replace(base=base))

    def update(
        signals: Signals,
        gradients: Any,
        before: Any,
        after: Any,
        state: Any,
    ) -> tuple[Any, Any, Any, Said]:
        params, variables = before
        held = state.controller
        pieces = controllers.Pieces(params, variables, state.optimizer)
        base = held.base | {
            "learning_rate": signals.raised * held.base["learning_rate"]
        }
        held = held._replace(fed=_fed(held.fed, known, signals), base=base)
        values = {"loss": signals.loss, **signals.measured}
        pieces, held, record = controller.update(
            signals.step, held, pieces, after, gradients, values
        )
        said = _said(controller, record)
        return pieces.params, pieces.variables, Driven(pieces.optimizer, held), said

    def evaluated(
        params: Any,
        variables: Any,
        state: Any,
    ) -> tuple[Any, Any]:
        return controllers.select_weights(Served(params, variables, *state))

    def knobs(state: Any) -> Any:
        return controller.forward_knobs(state.controller)

    return Contestant(init, update, evaluated, knobs, controller.limits)


def _fed(
    fed: Mapping[str, Any], known: Mapping[str, Any], signals: Signals
) -> dict[str, Any]:
    """Return the values that a host feeds to a controller, brought up to date."""
    news = {
        **known,
        "evaluation_loss": signals.evaluation_loss,
        "evaluations": signals.evaluations,
    }
    return {name: news.get(name, value) for name, value in fed.items()}


def _said(controller: controllers.Controller, record: Mapping[str, Any]) -> Said:
    """Return what a step's record says to a person."""
    notices = [value for name, value in record.items() if name.split(":")[-1] == NOTICE]
    alarm = jnp.bool_(False)
    for index, knob in controller.moves:
        if knob in ALARMS:
            name = controller.policies[index].name
            alarm |= record[f"{name}:{knob}"] != neutral(knob)
    notice = jnp.asarray([0.0, *notices], jnp.float32).max()
    return Said(notice, alarm.astype(jnp.float32))


# ---- rollbacks ----


def has_halted(state: Any) -> bool:
    """Whether a contestant's state says that the run has to go back."""
    return isinstance(state, Driven) and bool(state.controller.halted)


def sent_back(state: Driven, count: int, steps: int, limits: Mapping[str, Any]) -> Any:
    """Return an earlier state that goes on after a rollback, as `Trainer` does it.

    Args:
      state: the contestant's, at an evaluation.
      count: rollbacks before this one.
      steps: that were taken in vain.
      limits: the controller's.
    """
    factor = float(limits.get("rate", 1.0))
    lower = factor ** (count + 1)
    later = factor**count
    growth = (later - lower) / max(1, steps // GROWS_WITHIN)
    rate = jnp.asarray([lower, later, growth], jnp.float32)
    return state._replace(controller=state.controller._replace(rate=rate))
