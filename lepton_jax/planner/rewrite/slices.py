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
    Uses,
    bind,
    is_zero,
    operands_of,
    read,
    retraced,
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

    def rule(eqn: Any, env: Env) -> list[Any] | None:
        name = eqn.primitive.name
        if name == "scan":
            body = rewrite(eqn.params["jaxpr"])
            return bind(eqn, operands_of(eqn, env), jaxpr=body)
        if name not in SUMS:
            return None
        parts = _side_by_side(_parts(eqn, uses), eqn.outvars[0].aval.shape)
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
    dims = [dim for dim, (low, high, _) in enumerate(config) if low or high]
    plain = all(low >= 0 and high >= 0 and not inner for low, high, inner in config)
    if isinstance(operand, Literal) or len(dims) != 1 or not plain:
        return []
    if not is_zero(filler, uses):
        return []
    dim = dims[0]
    start = int(config[dim][0])
    return [_Part(operand, dim, start, start + operand.aval.shape[dim])]


def _side_by_side(parts: list[_Part], shape: tuple[int, ...]) -> list[_Part]:
    """Return parts in their order, if they fill a shape and none covers another."""
    if not parts or len({part.dim for part in parts}) != 1:
        return []
    parts = sorted(parts, key=lambda part: part.start)
    end = 0
    for part in parts:
        if part.start != end:
            return []
        end = part.stop
    return parts if end == shape[parts[0].dim] else []
