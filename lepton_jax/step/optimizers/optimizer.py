"""An optimizer as a train step applies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# the name, among an update's knobs, of the schedule's value behind the knob
# learning_rate; NaN where a person has set the rate
SCHEDULED = "scheduled_rate"
# knobs that form moments: `1 - b1` of a traced float32 is not that of a Python float
FORMING = ("b1", "b2", "momentum")


class Optimizer(NamedTuple):
    """An Optax transformation whose hyperparameters are given anew at each update.

    Attributes:
      base: the knobs that it has, with the recipe's values; a learning rate that is a
        schedule is NaN there.
      init: params to its state.
      update: (gradients, state, params, knobs, value) to (params, state) after the
        update. `gradients` is a function that returns them, so that XLA may fuse their
        computation with the update. `knobs` maps names to float32 scalars: the learning
        rate must be there if the base has it and it is not 1; others only where they
        may differ from the base. Where the learning rate is a schedule, `SCHEDULED` is
        there too. `value` is the loss. With `finish`, a function of the parameters
        before and after an update, the parameters returned are its result: so it is no
        pass of its own.
      scheduled: (state, params, updates) to the schedule's rate for the next update,
        float32; read at the optimizer's own count where it has one, else at `updates`,
        Lepton's.
      trials: functions of this optimizer and of small parameters with the model's own
        names and numbers of dims. `init` calls them, and each raises a RecipeError if
        it can't drive the optimizer.
    """

    base: dict[str, float]
    init: Callable[[Any], Any]
    update: Callable[..., Any]
    scheduled: Callable[[Any, Any, Any], Any]
    trials: list[Callable[[Optimizer, Any], None]]


def unchanged(before: Any, after: Any) -> Any:
    """Return the parameters after an update as they are."""
    return after
