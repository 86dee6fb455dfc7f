"""Whether an update has another constant factor next to the learning rate.

XLA joins constant factors, but not traced ones. So an update whose gradient is scaled
by a constant before it is scaled by the rate (Muon), or after it (Adafactor), is
rounded otherwise when the rate is traced. An example: in the first of these updates the
rate meets no other factor, in the second it meets 0.5.

>>> import jax.numpy as jnp
>>> def plain(rate, gradient):
...     return -rate * gradient
>>> def halved(rate, gradient):
...     return rate * (0.5 * gradient)
>>> for update in (plain, halved):
...     jaxpr = jax.make_jaxpr(update)(1.0, jnp.ones(3)).jaxpr
...     print(followed(jaxpr, [RATE, OTHER]))
(['update'], False)
(['update'], True)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# kinds of values in an update
CONSTANT = "constant"
RATE = "rate"  # the rate alone
SCALED = "scaled"  # its last factor is a constant
UPDATE = "update"  # times the rate
OTHER = ""

# primitives that leave a factor in its place
MOVES = (
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "convert_element_type",
    "squeeze",
    "neg",
)
PRODUCTS = ("mul", "div")


def has_another_factor(
    updates: Callable[[Any, Any], Any],
    params: Any,
) -> bool:
    """Whether an update has another constant factor than the rate.

    Args:
      updates: (rate, params) to the first updates.
      params: parameters, as shapes.
    """
    rate = jax.ShapeDtypeStruct((), "float32")
    jaxpr = jax.make_jaxpr(updates)(rate, params).jaxpr
    kinds = [RATE] + [OTHER] * (len(jaxpr.invars) - 1)
    _, meets = followed(jaxpr, kinds)
    return meets


def followed(
    jaxpr: Any,
    kinds: list[str],
) -> tuple[list[str], bool]:
    """Follow the rate through a jaxpr.

    Args:
      jaxpr: a jaxpr.
      kinds: the kinds of its arguments.

    Returns:
      The kinds of its results, and whether the rate meets another constant factor.
    """
    known = dict(zip(jaxpr.invars, kinds, strict=True))

    def kind_of(variable: Any) -> str:
        return CONSTANT if _is_literal(variable) else known.get(variable, CONSTANT)

    meets = False
    for eqn in jaxpr.eqns:
        given = [kind_of(v) for v in eqn.invars]
        inner = _called(eqn)
        if inner is not None:
            results, inside = followed(inner, given)
            meets |= inside
            known.update(zip(eqn.outvars, results, strict=True))
            continue
        meets |= _meets(eqn, set(given))
        known.update(dict.fromkeys(eqn.outvars, _result(eqn, set(given))))
    return [kind_of(v) for v in jaxpr.outvars], meets


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def _called(eqn: Any) -> Any:
    """Return the jaxpr that an equation calls with its own arguments, or None."""
    for value in eqn.params.values():
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            inner = getattr(value, "jaxpr", value)
            same_inputs = len(inner.invars) == len(eqn.invars)
            same_outputs = len(inner.outvars) == len(eqn.outvars)
            return inner if same_inputs and same_outputs else None
    return None


def _meets(
    eqn: Any,
    kinds: set[str],
) -> bool:
    """Whether the rate meets another constant factor in an equation."""
    if eqn.primitive.name not in PRODUCTS:
        return False
    if {RATE, SCALED} <= kinds:
        return True
    return UPDATE in kinds and not any(_is_literal(v) for v in eqn.invars)


def _result(
    eqn: Any,
    kinds: set[str],
) -> str:
    """Return the kind of an equation's results."""
    name = eqn.primitive.name
    if kinds <= {CONSTANT}:
        return CONSTANT
    if kinds <= {CONSTANT, RATE}:
        return RATE
    if kinds & {RATE, UPDATE}:
        return UPDATE
    if name in PRODUCTS and CONSTANT in kinds:
        return SCALED
    if name in MOVES and SCALED in kinds:
        return SCALED
    return OTHER
