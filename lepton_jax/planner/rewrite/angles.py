"""Sines and cosines of few angles that many entries are multiplied with.

Rotary positions have an angle for each position and pair, and all heads of all rows
are turned by it. XLA's CPU backend computes sine and cosine anew for each entry, as
part of the multiplication; it takes an `optimization_barrier` out before that. A matrix
product is always made by itself, so a product with the identity is a table.

    >>> import jax, jax.numpy as jnp
    >>> def turned(x):
    ...     return x * jnp.cos(jnp.arange(3.0))
    >>> program = jax.make_jaxpr(turned)(jnp.ones((8, 3)))
    >>> "dot_general" in str(program), "dot_general" in str(rewrite(program))
    (False, True)

The table holds the same values to the bit, as long as all angles of a row are finite.
What is computed with them may be rounded otherwise: XLA fuses it otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from lepton_jax.compat import ClosedJaxpr, Literal
from lepton_jax.planner.rewrite.program import (
    Env,
    Replaced,
    Uses,
    bind,
    operands_of,
    retraced,
    shape_of_result,
)

FUNCTIONS = ("sin", "cos")
# Operations that may stand between the function and the arithmetic that uses it.
MOVES = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "gather",
    "neg",
    "reshape",
    "squeeze",
    "tile",
}
ARITHMETIC = {"add", "div", "mul", "sub"}
# How often an angle is used from which on there is a table, and its most columns. Of
# rotary positions for two heads, tables of 32, 64 and 256 columns take .47, .63 and .93
# of the time, for one head .88, 1.01 and 1.57 (one CPU core, jax 0.10.2).
MANY = 2
WIDEST = 256


def is_candidate(eqn: Any) -> bool:
    """Whether an operation is one that the pass may write anew."""
    return eqn.primitive.name in FUNCTIONS


def rewrite(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a flat program in which such functions are tables."""
    uses = Uses(program.jaxpr)

    def rule(eqn: Any, env: Env) -> Replaced:
        if eqn.primitive.name == "scan":
            body = rewrite(eqn.params["jaxpr"])
            return bind(eqn, operands_of(eqn, env), jaxpr=body)
        if not is_candidate(eqn) or not _is_for_table(eqn, uses):
            return None
        [values] = bind(eqn, operands_of(eqn, env))
        return [_table(values)]

    return retraced(program, rule)


# ---- internals ----


def _is_for_table(eqn: Any, uses: Uses) -> bool:
    shape = shape_of_result(eqn)
    if not shape or not 1 < shape[-1] <= WIDEST:
        return False
    [result] = eqn.outvars
    if result.aval.dtype != np.float32:
        return False
    return _most_entries(result, uses) >= MANY * math.prod(shape)


def _most_entries(variable: Any, uses: Uses) -> int:
    """Return the entries of the largest array that XLA would compute a value in."""
    sizes = [variable.aval.size]
    for user in uses.users(variable):
        name = user.primitive.name
        if name in MOVES or _scales(user):
            [result] = user.outvars
            sizes.append(_most_entries(result, uses))
        elif name in ARITHMETIC:
            [result] = user.outvars
            sizes.append(result.aval.size)
    return max(sizes)


def _scales(eqn: Any) -> bool:
    """Whether an operation multiplies by a number, such as an amplitude."""
    has_number = any(isinstance(operand, Literal) for operand in eqn.invars)
    return eqn.primitive.name == "mul" and has_number


def _table(values: jax.Array) -> jax.Array:
    """Return an array as a product, which XLA computes before what follows."""
    width = values.shape[-1]
    identity = np.eye(width, dtype=np.float32)
    highest = jax.lax.Precision.HIGHEST
    product = jax.lax.dot(values.reshape(-1, width), identity, precision=highest)
    return product.reshape(values.shape)
