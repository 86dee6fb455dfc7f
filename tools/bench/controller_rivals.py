"""The contestants of `tools.bench controller`: ways to train a task.

Each is a function of a recipe and a setting, which is its learning rate or what takes
its place, and which is tuned by the validation loss; see `SETTINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.controller.knobs import neutral

WARM_UP = 0.1  # of the steps, for those contestants that have one
# A policy that tells a person that it can't be good on a task does it in a column
# POLICY:notice of the record, which is above 0 from then on.
NOTICE = "notice"
# The policies that say that something is wrong with the data.
ALARMS = ("guard", "label_noise")
PRODIGY_COEFFICIENTS = (0.1, 0.3, 1.0, 3.0, 10.0)
# How many third-decades a rate lies above 1: the coarse grid that a search begins with.
COARSE = (-12, -9, -6, -3, 0)
FARTHEST = 12  # third-decades beyond the coarse grid's ends that a search may go


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
    """What a controller says in a step, float32 ().

    Attributes:
      notice: above 0 where it can't be good on the task.
      alarm: 1 where a policy of `ALARMS` contributes something.
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
    """

    init: Callable[[Any, Any], Any]
    update: Callable[..., tuple[Any, Any, Any, Said]]
    evaluated: Callable[[Any, Any, Any], tuple[Any, Any]] = (
        lambda params, variables, state: (params, variables)
    )
    knobs: Callable[[Any], Mapping[str, Any]] = lambda state: {}


Maker = Callable[[lepton.Recipe, Any], Contestant]


# ---- the controller ----


class Served(NamedTuple):
    """The part of a state that `controllers.select_weights` reads."""

    params: Any
    variables: Any
    controller: Any


def adaptive(recipe: lepton.Recipe, rate: Any) -> Contestant:
    """The task's optimizer under `controllers.adaptive()`."""
    return controlled(recipe, rate, controllers.adaptive())


def controlled(recipe: lepton.Recipe, rate: Any, policies: Any) -> Contestant:
    """The task's optimizer under some policies, as in a train step of `Trainer`.

    A halt is not acted on: no checkpoint is there to go back to.

    Args:
      recipe: of the task.
      rate: the base of the learning rate.
      policies: as in `Recipe.controller`.

    Raises:
      RecipeError: the policies can't drive the optimizer.
    """
    assert recipe.steps is not None
    controller = controllers.Controller(recipe.with_(controller=policies))
    known = {"steps": jnp.float32(recipe.steps)}

    def init(params: Any, variables: Any) -> Any:
        optimizer, state = controller.init(params, variables)
        return optimizer, state._replace(
            base=state.base | {"learning_rate": jnp.asarray(rate, jnp.float32)}
        )

    def update(
        signals: Signals,
        gradients: Any,
        before: Any,
        after: Any,
        state: Any,
    ) -> tuple[Any, Any, Any, Said]:
        params, variables = before
        optimizer, held = state
        pieces = controllers.Pieces(params, variables, optimizer)
        base = dict(held.base)
        base["learning_rate"] = signals.raised * base["learning_rate"]
        held = held._replace(fed=_fed(held.fed, known, signals), base=base)
        values = {"loss": signals.loss, **signals.measured}
        pieces, held, record = controller.update(
            signals.step, held, pieces, after, gradients, values
        )
        said = _said(controller, record)
        return pieces.params, pieces.variables, (pieces.optimizer, held), said

    def evaluated(
        params: Any,
        variables: Any,
        state: Any,
    ) -> tuple[Any, Any]:
        return controllers.select_weights(Served(params, variables, state[1]))

    return Contestant(
        init, update, evaluated, lambda state: controller.forward_knobs(state[1])
    )


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
        name = controller.policies[index].name
        # a mark is a measurement: only a limit, a skip and the like claim something
        if name in ALARMS and knob != "loss_mark":
            alarm |= record[f"{name}:{knob}"] != neutral(knob)
    notice = jnp.asarray([0.0, *notices], jnp.float32).max()
    return Said(notice, alarm.astype(jnp.float32))


# ---- the rivals ----


def _plain(
    optimizer: optax.GradientTransformation, averaged: bool = False
) -> Contestant:
    """Return an Optax transformation as a contestant; it gets the loss as `value`.

    Args:
      optimizer: the transformation.
      averaged: whether it is evaluated at schedule-free's averages.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        signals: Signals,
        gradients: Any,
        before: Any,
        after: Any,
        state: Any,
    ) -> tuple[Any, Any, Any, Said]:
        updates, state = optimizer.update(
            gradients, state, before[0], value=signals.loss
        )
        return optax.apply_updates(before[0], updates), after, state, NOTHING

    def init(params: Any, variables: Any) -> Any:
        return optimizer.init(params)

    def at_averages(
        params: Any,
        variables: Any,
        state: Any,
    ) -> tuple[Any, Any]:
        return optax.contrib.schedule_free_eval_params(state, params), variables

    contestant = Contestant(init, update)
    return contestant._replace(evaluated=at_averages) if averaged else contestant


def constant(recipe: lepton.Recipe, rate: Any) -> Contestant:
    """The task's optimizer at one rate."""
    return _plain(recipe.optimizer(rate))


def cosine(recipe: lepton.Recipe, rate: Any) -> Contestant:
    """Linear warm-up to the rate, then a cosine to 0."""
    assert recipe.steps is not None
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, _warm_up(recipe), recipe.steps)
    return _plain(recipe.optimizer(lambda count: rate * shape(count)))


def plateau(recipe: lepton.Recipe, rate: Any) -> Contestant:
    """Optax's reduction on a plateau, on means of the training loss."""
    every = recipe.evaluate_every or 1
    reduce = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=3, rtol=1e-3, accumulation_size=every
    )
    return _plain(optax.chain(recipe.optimizer(rate), reduce))


def schedule_free(recipe: lepton.Recipe, rate: Any) -> Contestant:
    """Schedule-free with a warm-up, evaluated at its averages.

    It is `optax.contrib.schedule_free_adamw`, or for other optimizers than AdamW
    `optax.contrib.schedule_free` around them.
    """
    if recipe.optimizer.func is optax.adamw:
        optimizer = optax.contrib.schedule_free_adamw(
            rate,
            warmup_steps=_warm_up(recipe),
            **recipe.optimizer.keywords,
        )
        return _plain(optimizer, averaged=True)

    shape = optax.warmup_constant_schedule(0.0, 1.0, _warm_up(recipe))

    def warmed(count: Any) -> Any:
        return rate * shape(count)

    around = optax.contrib.schedule_free(recipe.optimizer(warmed), warmed)
    return _plain(around, averaged=True)


def prodigy(recipe: lepton.Recipe, coefficient: Any) -> Contestant:
    """Prodigy with its documented schedule, and a factor of its estimate."""
    assert recipe.steps is not None
    options = recipe.optimizer.keywords
    schedule = optax.linear_schedule(1.0, 0.0, recipe.steps)
    return _plain(
        optax.contrib.prodigy(
            schedule,
            betas=(0.9, options.get("b2", 0.999)),
            estim_lr_coef=coefficient,
            weight_decay=options.get("weight_decay", 0.0),
        )
    )


def _warm_up(recipe: lepton.Recipe) -> int:
    """Return the steps of a warm-up."""
    return round((recipe.steps or 0) * WARM_UP)


REFERENCE = "cosine"
RIVALS: dict[str, Maker] = {
    "cosine": cosine,
    "constant": constant,
    "plateau": plateau,
    "schedule-free": schedule_free,
    "prodigy": prodigy,
}
CONTESTANTS: dict[str, Maker] = {"adaptive": adaptive, **RIVALS}


# ---- tuning ----


def tuned(name: str, validation_loss: Callable[[float], float]) -> float:
    """Return the setting of a rival with the least validation loss.

    Prodigy's is one of its coefficients. Of the others it is a rate: the best of a grid
    of third-decades, which a search refines and extends until both neighbours of the
    best one are known.

    Args:
      name: of `RIVALS`.
      validation_loss: a setting to the mean loss of its runs, infinite if one diverges.
    """
    if name == "prodigy":
        return min(PRODIGY_COEFFICIENTS, key=validation_loss)
    known: dict[int, float] = {}

    def loss(third: int) -> float:
        if third not in known:
            known[third] = validation_loss(rate_of(third))
        return known[third]

    best = min(COARSE, key=loss)
    while True:
        around = [best + away for away in (-3, -2, -1, 1, 2, 3)]
        lowest = COARSE[0] - FARTHEST
        highest = COARSE[-1] + FARTHEST
        # the far ones tell whether the loss has another valley nearby
        around = [third for third in around if lowest <= third <= highest]
        better = min(around, key=loss)
        if loss(better) >= loss(best):
            return rate_of(best)
        best = better


def rate_of(third: int) -> float:
    """Return a rate by its number of third-decades above 1, to six digits."""
    return float(f"{10.0 ** (third / 3):.6g}")
