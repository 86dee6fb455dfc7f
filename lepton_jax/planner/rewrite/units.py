"""Dims of extent 1 in arrays of many dims.

XLA's CPU backend (jaxlib 0.10) writes loops over five dims and more that take several
times as long: the gradient of a softmax over (1, 8, 4, 256, 256) took 8.7 ms of a core,
and 3.3 ms over (8, 4, 256, 256) (AMD EPYC). `jax.nn.dot_product_attention` has such a
dim. Here elementwise operations, reductions and broadcasts leave them out:

    >>> import jax, jax.numpy as jnp
    >>> program = jax.make_jaxpr(lambda x: jnp.exp(x))(jnp.ones((1, 2, 3, 4, 5)))
    >>> [tuple(e.outvars[0].aval.shape) for e in rewrite(program).eqns]
    [(2, 3, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)]

It keeps every bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_jax.compat import ClosedJaxpr
from lepton_jax.planner.rewrite.program import (
    Env,
    Replaced,
    bind,
    operands_of,
    retraced,
    shape_of_operand,
    shape_of_result,
)

# Dims from which on loops are slow: four are fast, five are not (see above).
SLOW_RANK = 5

ELEMENTWISE = {
    "abs",
    "add",
    "add_any",
    "and",
    "convert_element_type",
    "div",
    "eq",
    "erf",
    "exp",
    "exp2",
    "expm1",
    "ge",
    "gt",
    "integer_pow",
    "is_finite",
    "le",
    "log",
    "log1p",
    "logistic",
    "lt",
    "max",
    "min",
    "mul",
    "ne",
    "neg",
    "not",
    "or",
    "pow",
    "rsqrt",
    "select_n",
    "sign",
    "sqrt",
    "square",
    "stop_gradient",
    "sub",
    "tanh",
}
REDUCTIONS = {"reduce_max", "reduce_min", "reduce_sum"}


def is_candidate(eqn: Any) -> bool:
    """Whether an operation is one that the pass may write anew."""
    name = eqn.primitive.name
    if name in REDUCTIONS:
        return bool(_units(shape_of_operand(eqn)))
    if name in ELEMENTWISE or name == "broadcast_in_dim":
        return bool(_units(shape_of_result(eqn)))
    return False


def rewrite(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a flat program whose arrays of many dims have none of extent 1."""

    def rule(eqn: Any, env: Env) -> Replaced:
        name = eqn.primitive.name
        if name == "scan":
            body = rewrite(eqn.params["jaxpr"])
            operands = operands_of(eqn, env)
            return bind(eqn, operands, jaxpr=body)
        if name in ELEMENTWISE:
            return _elementwise(eqn, env)
        if name in REDUCTIONS:
            return _reduction(eqn, env)
        if name == "broadcast_in_dim":
            return _broadcast(eqn, env)
        return None

    return retraced(program, rule)


# ---- internals ----


def _units(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the dims of extent 1 of an array of many dims."""
    if len(shape) < SLOW_RANK:
        return ()
    return tuple(dim for dim, size in enumerate(shape) if size == 1)


def _others(shape: Sequence[int], units: Sequence[int]) -> list[int]:
    """Return the dims that are longer."""
    return [dim for dim in range(len(shape)) if dim not in units]


def _elementwise(eqn: Any, env: Env) -> Replaced:
    shape = shape_of_result(eqn)
    units = _units(shape)
    if not units:
        return None

    def squeezed(x: Any) -> Any:
        has_all = jnp.ndim(x) == len(shape)
        return lax.squeeze(x, units) if has_all else x

    operands = [squeezed(x) for x in operands_of(eqn, env)]
    [result] = bind(eqn, operands)
    return [lax.expand_dims(result, units)]


def _reduction(eqn: Any, env: Env) -> Replaced:
    shape = shape_of_operand(eqn)
    units = _units(shape)
    if not units:
        return None
    [operand] = operands_of(eqn, env)
    x: jax.Array = lax.squeeze(operand, units)
    reduced = eqn.params["axes"]
    dims = _others(shape, units)
    axes = [place for place, dim in enumerate(dims) if dim in reduced]
    if axes:
        [x] = bind(eqn, [x], axes=tuple(axes))
    return [x.reshape(shape_of_result(eqn))]


def _broadcast(eqn: Any, env: Env) -> Replaced:
    shape = eqn.params["shape"]
    units = _units(shape)
    if not units or len(eqn.invars) > 1:
        return None
    [x] = operands_of(eqn, env)
    target = eqn.params["broadcast_dimensions"]
    places = {dim: place for place, dim in enumerate(target)}
    dims = _others(shape, units)
    used = [dim for dim in dims if dim in places]
    before = jnp.shape(x)
    x = jnp.reshape(x, [before[places[dim]] for dim in used])
    y = bind(
        eqn,
        [x],
        shape=tuple(shape[dim] for dim in dims),
        broadcast_dimensions=tuple(dims.index(dim) for dim in used),
    )[0]
    return [lax.expand_dims(y, units)]
