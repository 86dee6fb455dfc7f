"""The form of a policy, and how several become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Policy(NamedTuple):
    """One measured signal's consequence.

    Attributes:
      init: () to the policy's state, a pytree of arrays.
      update: (signals, state) to the state after the step; `signals` maps names to float32 scalars: "loss", and each
        of the recipe's metrics, as measured with the parameters before the update.
    """

    init: Callable[[], Any]
    update: Callable[[Mapping[str, Any], Any], Any]


def chain(*policies: Policy) -> Policy:
    """Policies applied in order to the same signals; with none of them the state is an empty tuple."""

    def update(signals: Mapping[str, Any], state: tuple) -> tuple:
        return tuple(p.update(signals, s) for p, s in zip(policies, state, strict=True))

    return Policy(lambda: tuple(p.init() for p in policies), update)
