"""The knobs: the dynamic values of a train step, which policies may move.

The value of a knob in a step is its base (the recipe's value, or one that a person has
set since) combined with the contributions of all policies in that step. Nothing is
remembered but the bases and the policies' own states, so the order of policies matters
only where several set the same knob.

>>> float(combined("learning_rate", 0.1, [0.5, 2.0, 0.5]))  # factors multiply
0.05000000074505806
>>> float(combined("clip_norm", 1.0, [3.0, 0.7]))  # the least counts
0.699999988079071
>>> float(combined("accumulate", 1.0, [4.0, math.nan]))  # NaN leaves it alone
4.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.errors import RecipeError, SettingError, nearest


class Knob(NamedTuple):
    """A dynamic value of the train step.

    Attributes:
      combine: how contributions combine with the base. "multiply": they are factors of
        it. "least": the smallest of them and the base counts. "set": the last
        contribution that is no NaN counts, else the base. "any": whether one of them is
        not zero; there is no base.
      lowest: the lowest value that a person may set.
      highest: the highest value that a person may set.
      meaning: the meaning in one line.
    """

    combine: str
    lowest: float
    highest: float
    meaning: str


KNOBS = {
    "learning_rate": Knob(
        "multiply",
        0,
        math.inf,
        "what `Recipe.optimizer` is given; of a finished transformation a factor "
        "of its updates",
    ),
    "weight_decay": Knob(
        "multiply", 0, math.inf, "the optimizer's argument of this name"
    ),
    "b1": Knob(
        "set", 0, 1, "the optimizer's argument of this name: decay of the first moment"
    ),
    "b2": Knob(
        "set", 0, 1, "the optimizer's argument of this name: decay of the second moment"
    ),
    "momentum": Knob("set", 0, 1, "the optimizer's argument of this name"),
    "clip_norm": Knob("least", 0, math.inf, "greatest global norm of the gradient"),
    "accumulate": Knob(
        "set",
        1,
        2**20,
        "batches per update, whose mean gradient is applied at the last of them",
    ),
    "optimizer": Knob(
        "set", 0, 15, "which of the recipe's `switchable` optimizers is at work"
    ),
    "dropout": Knob("multiply", 0, math.inf, "factor of the rate of each nnx.Dropout"),
    "loss_scale": Knob(
        "set",
        2.0**-14,
        2.0**24,
        "factor of the loss before its gradient is taken (float16)",
    ),
    "loss_limit": Knob(
        "least",
        -math.inf,
        math.inf,
        "a sample whose loss is l counts sigmoid(loss_limit - l) times in the gradient",
    ),
    "loss_mark": Knob(
        "set",
        -math.inf,
        math.inf,
        "where the signals mark_weight and mark_weight_square are measured",
    ),
    "averaging_decay": Knob(
        "set",
        0,
        1,
        "decay of the moving average of the parameters, which is what is evaluated and "
        "served; with 0 the average is the parameters",
    ),
    "interpolation": Knob(
        "set",
        0,
        0.99,
        "share of the average in the parameters that the gradient is taken at; the "
        "rest is of those that the optimizer moves",
    ),
    "gradient_weight": Knob(
        "set",
        0,
        math.inf,
        "weight of the next step's gradient in the sum behind the signal "
        "gradient_sum_norm",
    ),
    "skip": Knob("any", 0, 0, "this update is not applied"),
    "anchor": Knob(
        "any",
        0,
        0,
        "the anchor becomes a copy of parameters, variables and optimizer state",
    ),
    "restore": Knob(
        "any",
        0,
        0,
        "parameters, variables and optimizer state become those of the anchor",
    ),
    "keep_average": Knob(
        "any",
        0,
        0,
        "a copy of the average is kept, as it was before this step",
    ),
    "serve_kept": Knob(
        "any",
        0,
        0,
        "the average becomes the copy of it that was kept last",
    ),
    "notice": Knob(
        "any",
        0,
        0,
        "the policy can't be good here: the contribution is the number of the sentence "
        "in `Policy.notices` that a person is told",
    ),
    "restart": Knob(
        "any",
        0,
        0,
        "the run begins anew from the anchor with the data that follows: optimizer "
        "state, moving means, progress and the other policies, too",
    ),
    "stop": Knob("any", 0, 0, "the run ends with this step"),
    "rollback": Knob("any", 0, 0, "the run goes back to its last good checkpoint"),
}
# knobs that only take whole numbers
WHOLE = ("accumulate", "optimizer")
# (value so far, contribution) to the value
COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "multiply": lambda value, c: value * c,
    "least": jnp.minimum,
    "set": lambda value, c: jnp.where(jnp.isnan(c), value, c),
    "any": lambda value, c: jnp.maximum(value, (c != 0) * 1.0),
}
NEUTRAL = {
    "multiply": 1.0,
    "least": math.inf,
    "set": math.nan,
    "any": 0.0,
}


def neutral(name: str) -> float:
    """Return the contribution that leaves a knob alone."""
    return NEUTRAL[KNOBS[name].combine]


def known(name: str, where: str) -> str:
    """Return `name` if there is such a knob.

    Args:
      name: the name of a knob.
      where: the place that names it, for the error.

    Raises:
      RecipeError: there is no such knob.
    """
    if name not in KNOBS:
        raise RecipeError(
            f"there is no knob {name!r}{nearest(str(name), KNOBS)}",
            where=where,
            remedy=f"the knobs are {', '.join(KNOBS)}",
        )
    return name


def combined(
    name: str,
    base: Any,
    contributions: Iterable[Any],
    absolute: Iterable[Any] = (),
) -> Any:
    """Return the value of a knob in a step, float32.

    Args:
      name: the name of the knob.
      base: its base.
      contributions: contributions that combine with the base.
      absolute: values in place of all that; the last one that is no NaN counts.
    """
    value = jnp.asarray(base, jnp.float32)
    combine = COMBINE[KNOBS[name].combine]
    for contribution in contributions:
        value = combine(value, jnp.asarray(contribution, jnp.float32))
    for contribution in absolute:
        is_neutral = jnp.isnan(contribution)
        value = jnp.where(
            is_neutral,
            value,
            jnp.asarray(contribution, jnp.float32),
        )
    return value


def settable(
    name: str,
    text: str,
    present: Mapping[str, Any],
) -> float:
    """Check the value that a person asks for, and return it.

    Args:
      name: the name of the knob.
      text: the value.
      present: the knobs of this run.

    Raises:
      SettingError: there is no such knob, this run does not have it, the value is no
        number, or it is out of range.
    """
    if name not in KNOBS or KNOBS[name].combine == "any":
        usable = [n for n, knob in KNOBS.items() if knob.combine != "any"]
        raise SettingError(
            f"there is no knob {name!r} to set{nearest(name, usable)}",
            where=name,
            remedy=f"this run can set {', '.join(present) or 'none'}",
        )
    if name not in present:
        raise SettingError(
            f"{name} is not one of this run's knobs",
            where=name,
            remedy=(
                f"start the run with controller=(controllers.adjustable({name!r}),);"
                f" this one can set {', '.join(present) or 'none'}"
            ),
        )
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not _is_allowed(name, value):
        knob = KNOBS[name]
        kind = "a whole number" if name in WHOLE else "a number"
        upper = f" to {knob.highest:g}" if math.isfinite(knob.highest) else ""
        raise SettingError(
            f"{name} can't be {text!r}",
            where=name,
            remedy=f"give {kind} from {knob.lowest:g}{upper}",
        )
    return value


def _is_allowed(name: str, value: float) -> bool:
    knob = KNOBS[name]
    if math.isinf(value) or not knob.lowest <= value <= knob.highest:
        return False
    return name not in WHOLE or value.is_integer()
