"""The gradient of a value that is taken apart.

JAX pads the gradient of each slice with zeros, and adds them all up. Where the slices
lie side by side and fill the whole, that is their concatenation:

    >>> import jax, jax.numpy as jnp
    >>> def parts(x):
    ...     return (2 * x[:2]).sum() + (3 * x[2:]).sum()
    >>> program = jax.make_jaxpr(jax.grad(parts))(jnp.ones(5))
    >>> "pad" in str(program), "pad" in str(rewrite(program))
    (True, False)

It is the same to the bit, but for the sign of a zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import lax

from lepton_jax.compat import ClosedJaxpr, Literal
from lepton_jax.planner.rewrite.program import (
    Env,
    Replaced,
    Uses,
    bind,
    is_zero,
    operands_of,
    read,
    retraced,
    shape_of_result,
)

SUMS = ("add_any", "add")


class _Part(NamedTuple):
    """An array that lies along one dim of a whole.

    Attributes:
      variable: the array.
      dim: the dim.
      start, stop: its place.
    """

    variable: Any
    dim: int
    start: int
    stop: int


def is_candidate(eqn: Any) -> bool:
    """Whether an operation is one that the pass may write anew."""
    return eqn.primitive.name == "pad"


def rewrite(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a flat program in which sums of padded parts are concatenations."""
    uses = Uses(program.jaxpr)

    def rule(eqn: Any, env: Env) -> Replaced:
        name = eqn.primitive.name
        if name == "scan":
            body = rewrite(eqn.params["jaxpr"])
            operands = operands_of(eqn, env)
            return bind(eqn, operands, jaxpr=body)
        if name not in SUMS:
            return None
        shape = shape_of_result(eqn)
        parts = _side_by_side(_parts(eqn, uses), shape)
        if not parts:
            return None
        arrays = [read(env, part.variable) for part in parts]
        return [lax.concatenate(arrays, parts[0].dim)]

    return retraced(program, rule)


# ---- internals ----


def _parts(eqn: Any, uses: Uses) -> list[_Part]:
    """Return the padded parts that a sum adds up; none if it adds anything else."""
    parts: list[_Part] = []
    for variable in eqn.invars:
        inner = uses.made_by(variable, "pad", *SUMS)
        if inner is None:
            return []
        if inner.primitive.name in SUMS:
            more = _parts(inner, uses)
        else:
            more = _padded(inner, uses)
        if not more:
            return []
        parts += more
    return parts


def _padded(eqn: Any, uses: Uses) -> list[_Part]:
    """Return what a pad with zeros, along one dim, holds; nothing for another pad."""
    operand, filler = eqn.invars
    config = eqn.params["padding_config"]
    if isinstance(operand, Literal) or not is_zero(filler, uses):
        return []
    dims = []
    for dim, (low, high, inner) in enumerate(config):
        if low < 0 or high < 0 or inner:
            return []
        if low or high:
            dims.append(dim)
    if len(dims) != 1:
        return []
    [dim] = dims
    low, _, _ = config[dim]
    start = int(low)
    stop = start + operand.aval.shape[dim]
    return [_Part(operand, dim, start, stop)]


def _side_by_side(parts: list[_Part], shape: tuple[int, ...]) -> list[_Part]:
    """Return parts in their order, if they fill a shape and none covers another."""
    dims = {part.dim for part in parts}
    if len(dims) != 1:
        return []
    [dim] = dims
    parts = sorted(parts, key=lambda part: part.start)
    end = 0
    for part in parts:
        if part.start != end:
            return []
        end = part.stop
    return parts if end == shape[dim] else []
