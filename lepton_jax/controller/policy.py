"""The form of a policy, and how several become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Policy(NamedTuple):
    """One rule from what is measured to what is done about it: two pure functions.

    Attributes:
      name: as the journal calls it.
      init: () to the policy's state, a pytree of scalars.
      update: (signals, state) to (moves, state). `signals` maps names to float32 scalars, measured after the gradient and
        before the update that the moves decide; `moves` maps each name in `moves` to a contribution, float32: what it
        means is the knob's `combine` (see `KNOBS`). A name that is left out is left alone.
      watches: the signals that it reads (see `SIGNALS`); the first four stand in the journal beside its moves.
      moves: the knobs that it may move.
      limits: what the host keeps to: "rollbacks" at most, "rate" factor of the learning rate after each.
    """

    name: str
    init: Callable[[], Any]
    update: Callable[[Mapping[str, Any], Any], tuple[Mapping[str, Any], Any]]
    watches: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()
    limits: Mapping[str, float] = {}  # noqa: RUF012  (a NamedTuple's default is never written to)


def chain(*policies: Any) -> tuple[Policy, ...]:
    """Policies, and chains of them, as one chain: each sees the same signals; their moves combine as each knob says."""
    found: list[Policy] = []
    for policy in policies:
        found += [policy] if isinstance(policy, Policy) else chain(*policy)
    return tuple(found)
