"""The rivals of `tools.bench controller`: usual ways to train a task.

Each is a function of a recipe and a setting, which is its learning rate or what takes
its place, and which is tuned by the validation loss; see `tuned`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import optax

import lepton_jax as lepton
from tools.bench.controller_contestant import (
    NOTHING,
    Contestant,
    Maker,
    Said,
    Signals,
    controlled,
)

__all__ = ["REFERENCE", "RIVALS", "controlled", "tuned"]

WARM_UP = 0.1  # of the steps, for those contestants that have one
PRODIGY_COEFFICIENTS = (0.1, 0.3, 1.0, 3.0, 10.0)
# Third-decades above a rate of 1: the grid that a search begins with, every decade.
COARSE = (-12, -9, -6, -3, 0)
NEAR = (-2, -1, 1, 2)  # third-decades around the best rate that are tried
FARTHEST = 12  # third-decades beyond the coarse grid that a search may go


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


# ---- tuning ----


def tuned(
    name: str,
    first_loss: Callable[[float], float],
    mean_loss: Callable[[float], float],
) -> float:
    """Return the setting of a rival with the least mean validation loss.

    Prodigy's is one of its coefficients. Of the others it is a rate. One seed finds the
    decade; all seeds decide among third-decades, until two to either side of the best
    one are known.

    Args:
      name: of `RIVALS`.
      first_loss: a setting to the loss of its run with the first seed, infinite if it
        diverges.
      mean_loss: the same with the mean of all seeds.
    """
    if name == "prodigy":
        return min(PRODIGY_COEFFICIENTS, key=mean_loss)
    lowest = COARSE[0] - FARTHEST
    highest = COARSE[-1] + FARTHEST

    def descended(
        best: int, loss: Callable[[int], float], around: Sequence[int]
    ) -> int:
        """Go to better neighbours until there is none."""
        while True:
            tried = [best, *(best + away for away in around)]
            better = min((x for x in tried if lowest <= x <= highest), key=loss)
            if better == best:
                return best
            best = better

    @cache
    def first(third: int) -> float:
        return first_loss(rate_of(third))

    @cache
    def mean(third: int) -> float:
        return mean_loss(rate_of(third))

    decade = descended(min(COARSE, key=first), first, (-3, 3))
    return rate_of(descended(decade, mean, NEAR))


def rate_of(third: int) -> float:
    """Return a rate by its number of third-decades above 1, to six digits."""
    return float(f"{10.0 ** (third / 3):.6g}")
