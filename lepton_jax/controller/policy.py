"""The form of a policy, and how several become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lepton_jax.errors import RecipeError

# parts of names; a signal whose name holds one of them is better when it is lower
LOWER_IS_BETTER = (
    *("loss", "error", "perplexity", "mse", "mae", "norm"),
    *("brier", "pinball", "deviance"),
)


class Notice(NamedTuple):
    """A reason why a policy can't be good, in words, for the person whose run it is.

    Attributes:
      what: what is wrong, in one plain sentence without a full stop.
      remedy: what to do about it, as an imperative.
    """

    what: str
    remedy: str


class Policy(NamedTuple):
    """One rule from signals to knobs: two pure functions.

    Attributes:
      name: the policy's name in the journal.
      init: () to the policy's state, a pytree of scalars.
      update: (signals, state) to (moves, state). `signals` maps names to float32
        scalars, measured after the gradient and before the update that the moves
        decide. `moves` maps names in `moves` to contributions, float32; the knob's
        `combine` says what a contribution means (see `KNOBS`). A knob that is left out
        is left alone.
      watches: the signals that it reads (see `SIGNALS`); the journal shows the first
        four next to its moves.
      moves: the knobs that it may move.
      limits: bounds that the host keeps. "rollbacks": their greatest number; "rate":
        factor of the learning rate at each of them (see train/recovery.py);
        "patience": steps for which the run was lost before the policy asks for one;
        "jumps": a step to the position at which the data goes on after it.
      absolute: whether its contributions are the values of the knobs themselves,
        whatever else contributes; NaN leaves a knob alone.
      notices: what the policy can say by the knob `notice`: the contribution is the
        number of the sentence, from 1. One step is enough to say it.
      fitted: (recipe, its `Optimizer`, this policy); returns the policy, or policies,
        in its place. It is for a policy that has other rules for other optimizers.
      check: (recipe, its `Optimizer`); raises a RecipeError for a recipe that the
        policy can't drive.
    """

    name: str
    init: Callable[[], Any]
    update: Callable[[Mapping[str, Any], Any], tuple[Mapping[str, Any], Any]]
    watches: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()
    limits: Mapping[str, Any] = {}
    absolute: bool = False
    notices: tuple[Notice, ...] = ()
    fitted: Callable[[Any, Any, Any], Any] = lambda recipe, optimizer, policy: policy
    check: Callable[[Any, Any], None] = lambda recipe, optimizer: None


def chain(*policies: Any) -> tuple[Policy, ...]:
    """Join policies, and chains of them, into one chain.

    Each policy sees the same signals. The moves of several combine as each knob says.
    """
    chained: list[Policy] = []
    for policy in policies:
        chained += [policy] if isinstance(policy, Policy) else chain(*policy)
    return tuple(chained)


def check_range(
    policy: str,
    lowest: float,
    highest: float,
    *,
    whole: bool = False,
    **arguments: Any,
) -> None:
    """Check that arguments of a policy are numbers within a range.

    Args:
      policy: the name of the policy's function.
      lowest: the least number that is allowed.
      highest: the greatest number that is allowed.
      whole: whether the arguments must be whole numbers.
      **arguments: the arguments by name; None stands for "not given" and passes.

    Raises:
      RecipeError: an argument is no number, or out of range.
    """
    for name, value in arguments.items():
        if value is None or _is_within(value, lowest, highest, whole):
            continue
        kind = "a whole number" if whole else "a number"
        bounds = f"from {lowest:g} to {highest:g}"
        if math.isinf(highest):
            bounds = f"of at least {lowest:g}"
        raise RecipeError(
            f"{name} is {value!r}",
            where=f"controllers.{policy}",
            remedy=f"give {kind} {bounds}",
        )


def _is_within(
    value: Any,
    lowest: float,
    highest: float,
    whole: bool,
) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if whole and value != int(value):
        return False
    return lowest <= value <= highest


def is_better_lower(signal: str) -> bool:
    """Whether a lower value of a signal is better.

    It is for losses, errors, norms and perplexities. For other metrics a higher value
    is better.
    """
    return any(part in signal for part in LOWER_IS_BETTER)
