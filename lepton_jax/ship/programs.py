"""Programs as jaxprs: what explanations and pruning look for in a traced model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lepton_jax.compat import ClosedJaxpr, Jaxpr

LOOPS = ("scan", "while")


def inner_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """Yield the jaxprs that an equation runs: those of jitted functions, loops."""
    for value in eqn.params.values():
        candidates = value if isinstance(value, tuple | list) else (value,)
        for candidate in candidates:
            if isinstance(candidate, ClosedJaxpr):
                yield candidate.jaxpr
            elif isinstance(candidate, Jaxpr):
                yield candidate


def called_jaxpr(eqn: Any) -> Any:
    """Return the jaxpr that an equation calls once, with its own inputs; else None.

    That is one of a `jax.jit`, a custom derivative or a checkpoint, but no loop and no
    branch.

    Returns:
      (jaxpr, constants), or None.
    """
    if eqn.primitive.name in (*LOOPS, "cond"):
        return None
    for name in ("jaxpr", "call_jaxpr"):
        inner = eqn.params.get(name)
        if isinstance(inner, ClosedJaxpr):
            return inner.jaxpr, inner.consts
        if isinstance(inner, Jaxpr):
            return inner, []
    return None
