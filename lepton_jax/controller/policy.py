"""The form of a policy, and how several become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lepton_jax.errors import RecipeError


class Policy(NamedTuple):
    """One rule from what is measured to what is done about it: two pure functions.

    Attributes:
      name: as the journal calls it.
      init: () to the policy's state, a pytree of scalars.
      update: (signals, state) to (moves, state). `signals` maps names to float32
        scalars, measured after the gradient and before the update that the moves
        decide; `moves` maps each name in `moves` to a contribution, float32: what it
        means is the knob's `combine` (see `KNOBS`). A name that is left out is left
        alone.
      watches: the signals that it reads (see `SIGNALS`); the first four stand in the
        journal beside its moves.
      moves: the knobs that it may move.
      limits: what the host keeps to: "rollbacks" at most, "rate" factor of the learning
        rate at each (see rollback.py), "patience" steps for which the run was lost
        before it asks; "jumps" maps a step to the position at which the data goes on
        after it.
      absolute: its contributions are the knobs' values themselves, whatever else
        contributes; NaN leaves a knob alone.
      check: (recipe, its `Optimizer`), raises a RecipeError for one that it can't
        drive.
    """

    name: str
    init: Callable[[], Any]
    update: Callable[[Mapping[str, Any], Any], tuple[Mapping[str, Any], Any]]
    watches: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()
    limits: Mapping[str, Any] = {}
    absolute: bool = False
    check: Callable[[Any, Any], None] = lambda recipe, optimizer: None


def chain(*policies: Any) -> tuple[Policy, ...]:
    """Policies, and chains of them, as one chain: each sees the same signals; their
    moves combine as each knob says.
    """
    found: list[Policy] = []
    for policy in policies:
        found += [policy] if isinstance(policy, Policy) else chain(*policy)
    return tuple(found)


def checked(
    policy: str,
    lowest: float,
    highest: float,
    *,
    whole: bool = False,
    **given: Any,
) -> None:
    """Raises a RecipeError for an argument of a policy that is no number from `lowest`
    to `highest`.

    Args:
      policy: the function's name.
      whole: whether it must be a whole number.
      given: the arguments by name; None stands for "not given" and passes.
    """
    for name, value in given.items():
        number = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (not whole or value == int(value))
        )
        if value is not None and not (number and lowest <= value <= highest):
            kind = "a whole number" if whole else "a number"
            raise RecipeError(
                f"{name} is {value!r}",
                where=f"controllers.{policy}",
                remedy=f"give {kind} "
                + (
                    f"of at least {lowest:g}"
                    if math.isinf(highest)
                    else f"from {lowest:g} to {highest:g}"
                ),
            )


def falls(signal: str) -> bool:
    """Whether less of a signal is better: of losses, errors, norms and perplexities; of
    other metrics more is.
    """
    return any(
        word in signal for word in ("loss", "error", "perplexity", "mse", "mae", "norm")
    )
