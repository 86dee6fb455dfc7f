"""The knobs: what policies may move while a run goes on, and how the moves of several
combine.

A knob's value in a step is its base (what the recipe says, or a person set since)
combined with what each policy contributes in that step. Nothing is remembered but bases
and the policies' own states, so that composition has an order only where policies set
the same knob.
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
      combine: "multiply" (contributions are factors of the base), "least" (the smallest
        of them and the base), "set" (the last contribution that is no NaN, else the
        base), "any" (whether one of them is not zero; it has no base).
      lowest, highest: what a person may set it to.
      meaning: in a line.
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
    "stop": Knob("any", 0, 0, "the run ends with this step"),
    "rollback": Knob("any", 0, 0, "the run goes back to its last good checkpoint"),
}
WHOLE = ("accumulate", "optimizer")
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
    """The contribution of a policy that leaves a knob alone."""
    return NEUTRAL[KNOBS[name].combine]


def known(name: str, where: str) -> str:
    """`name`, if there is such a knob."""
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
    """A knob's value in a step, float32: the last of `absolute` that is no NaN, else
    base and contributions as they combine.
    """
    value = jnp.asarray(base, jnp.float32)
    for contribution in contributions:
        contribution = jnp.asarray(contribution, jnp.float32)
        value = COMBINE[KNOBS[name].combine](value, contribution)
    for contribution in absolute:
        value = jnp.where(
            jnp.isnan(contribution),
            value,
            jnp.asarray(contribution, jnp.float32),
        )
    return value


def settable(
    name: str,
    text: str,
    present: Mapping[str, Any],
) -> float:
    """The value that a person asks for, checked.

    Raises:
      SettingError: no such knob, not one of this run's, no number, or out of range.
    """
    if name not in KNOBS or KNOBS[name].combine == "any":
        usable = [n for n, k in KNOBS.items() if k.combine != "any"]
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
    knob = KNOBS[name]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    uneven = name in WHOLE and not value.is_integer()
    if not knob.lowest <= value <= knob.highest or math.isinf(value) or uneven:
        raise SettingError(
            f"{name} can't be {text!r}",
            where=name,
            remedy=(
                f"give a {'whole ' if name in WHOLE else ''}number from {knob.lowest:g}"
            )
            + (f" to {knob.highest:g}" if math.isfinite(knob.highest) else ""),
        )
    return value
