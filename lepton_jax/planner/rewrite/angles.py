"""Sines and cosines of few angles that many entries are multiplied with.

Rotary positions have an angle for each position and pair, and all heads of all rows
are turned by it. XLA's CPU backend computes sine and cosine anew for each entry, as
part of the multiplication, and an `optimization_barrier` between them does not hold it
back. It does not compute products so: a product with the identity is a table that is
made once.

    >>> import jax, jax.numpy as jnp
    >>> def turned(x):
    ...     return x * jnp.cos(jnp.arange(3.0))
    >>> program = jax.make_jaxpr(turned)(jnp.ones((8, 3)))
    >>> "dot_general" in str(program), "dot_general" in str(rewrite(program))
    (False, True)

It is the same to the bit, as long as the angles of a row are finite.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from lepton_jax.compat import ClosedJaxpr
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
# Operations between the function and what it is multiplied with.
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
# How often an angle is used from which on a table is worth it; assumption.
MANY = 4
# The most columns of a table: the identity has as many, and rows as well.
WIDEST = 256


def is_candidate(eqn: Any) -> bool:
    """Whether an operation is one that the pass may write anew."""
    return eqn.primitive.name in FUNCTIONS


def rewrite(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a flat program in which such functions are tables."""
    uses = Uses(program.jaxpr)

    def rule(eqn: Any, env: Env) -> Replaced:
        operands = operands_of(eqn, env)
        if eqn.primitive.name == "scan":
            return bind(eqn, operands, jaxpr=rewrite(eqn.params["jaxpr"]))
        if not is_candidate(eqn) or not _is_for_table(eqn, uses):
            return None
        [values] = bind(eqn, operands)
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
    own = variable.aval.size
    most = own
    for user in uses.users(variable):
        name = user.primitive.name
        if name not in MOVES | ARITHMETIC:
            continue
        [result] = user.outvars
        if name in MOVES or result.aval.size == own:
            most = max(most, _most_entries(result, uses))
        most = max(most, result.aval.size)
    return most


def _table(values: jax.Array) -> jax.Array:
    """Return an array as a product, which XLA computes before what follows."""
    width = values.shape[-1]
    identity = np.eye(width, dtype=np.float32)
    highest = jax.lax.Precision.HIGHEST
    product = jax.lax.dot(values.reshape(-1, width), identity, precision=highest)
    return product.reshape(values.shape)
