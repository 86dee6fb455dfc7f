"""Mixtures that drop no token: how they run where tokens and experts are split.

The mixture of the zoo (`models.moe.chosen_experts`) sorts the tokens of the whole batch
by their expert. On several devices each sorts those that it has. It is found in a
program as the call of a part that is, operation by operation, what the zoo's function
traces for the same shapes; in its place stands an operation with a rule (see `rule`):

  tokens    are split: each device has all experts, or gathers them
  experts   are split: each device sees all tokens of the devices that share the
            experts, and computes what its own add; what comes out is summed. Nothing
            is dropped, however unevenly the tokens choose.
  hidden    units are split: what comes out is summed

    >>> import jax, jax.numpy as jnp
    >>> shapes = [(4, 8), (4, 2), (4, 2), (3, 8, 6), (3, 8, 6), (3, 6, 8)]
    >>> x, choice, *rest = (jnp.zeros(shape) for shape in shapes)
    >>> def mixture(*arrays):
    ...     return moe.chosen_experts(*arrays)
    >>> arrays = (x, choice.astype(int), *rest)
    >>> has_mixture(jax.make_jaxpr(mixture)(*arrays).jaxpr)
    True
    >>> program = jax.make_jaxpr(ruled(mixture))(*arrays)
    >>> "own_operation" in str(program)
    True
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compat import ClosedJaxpr, Jaxpr
from lepton_jax.models import moe
from lepton_jax.planner.rewrite.own import shape_of
from lepton_jax.planner.rewrite.program import (
    CALLS,
    NAMED_PARTS,
    Env,
    alike,
    bind,
    equations,
    operands_of,
    retraced,
    run,
)
from lepton_jax.planner.rewrite.rule import rule

# Rows and columns of a tile of the kernel. Assumption: three tiles of it take 3 MB in
# float32, which fits into the vector memory of every TPU of the catalogue.
TILE = 512
LEAST_TILE = 128  # rows: a lane of a TPU

NAME = "chosen_experts"  # of the part in a program

DIMS = (
    "... dim, ... chosen, ... chosen,"
    " experts dim hidden, experts dim hidden, experts hidden dim, experts -> ... dim"
)


# What is there at once in the backward pass, of a device's tokens and experts: gathered
# tokens, rows of hidden units (slopes of gate and up, and their product), and rows of
# tokens (sorted inputs, sorted slopes once with the gates and once without, what comes
# out of the experts, and two slopes of the inputs). Seen in what libtpu 0.0.42 holds of
# 9 programs (`planner-memory --half tuning --dropless --early`). Where rows of hidden
# units take more than 2 GB, XLA fuses less and holds four of them, and two of tokens.
WORKSPACE = ", ".join(["... dim"] + 3 * ["... chosen hidden"] + 6 * ["... chosen dim"])


@rule(DIMS, whole="dim chosen", summed="experts hidden", workspace=WORKSPACE)
def mixture(
    x: jax.Array,
    choices: jax.Array,
    gates: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    numbers: jax.Array,
    platform: str = "",
) -> jax.Array:
    """Return what a device's experts add to its tokens; see `grouped_experts`."""
    product = partial(_product, platform)
    return moe.grouped_experts(x, choices, gates, gate, up, down, numbers, product)


def ruled(function: Callable) -> Callable:
    """Return a function whose mixtures are operations with a rule.

    Args:
      function: of arrays in pytrees.
    """

    def replaced(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = run(_replaced(program), jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return replaced


def has_mixture(jaxpr: Jaxpr) -> bool:
    """Whether a program has a mixture that drops no token."""
    return any(map(_is_mixture, equations(jaxpr)))


# ---- internals ----


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(platform: str, rows: Any, kernels: Any, sizes: Any) -> jax.Array:
    """Return a grouped product.

    On TPUs its gradient by the kernels is the kernel of JAX (`megablox`): libtpu 0.0.42
    makes a dense product of it, over all rows for each group.
    """
    return jax.lax.ragged_dot(rows, kernels, sizes)


def _kept(platform: str, *arrays: Any) -> tuple[jax.Array, Any]:
    return jax.lax.ragged_dot(*arrays), arrays


def _pulled(platform: str, kept: Any, slope: Any) -> tuple[Any, Any, None]:
    rows, kernels, sizes = kept
    of_rows = jax.lax.ragged_dot(slope, kernels.swapaxes(1, 2), sizes)
    if platform in ("tpu", "interpreted"):
        of_kernels = _of_kernels(platform, rows, slope, sizes)
        return of_rows, of_kernels.astype(kernels.dtype), None
    product = partial(_with_kernels, rows, sizes)
    (of_kernels,) = jax.linear_transpose(product, kernels)(slope)
    return of_rows, of_kernels, None


def _with_kernels(rows: Any, sizes: Any, kernels: Any) -> jax.Array:
    return jax.lax.ragged_dot(rows, kernels, sizes)


_product.defvjp(_kept, _pulled)


def _of_kernels(platform: str, rows: Any, slope: Any, sizes: Any) -> jax.Array:
    """Return the sum over each group's rows, (groups, k, n), by the kernel for TPUs."""
    # only here: importing it takes time, and a backend without TPUs needs it never
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    count = rows.shape[0]
    tile = min(TILE, -(-count // LEAST_TILE) * LEAST_TILE)
    missing = -count % tile
    rows, slope = (jnp.pad(x, ((0, missing), (0, 0))) for x in (rows, slope))
    tiles = (tile, min(TILE, rows.shape[1]), min(TILE, slope.shape[1]))
    is_interpreted = platform == "interpreted"
    return tgmm(rows.T, slope, sizes, jnp.float32, tiles, interpret=is_interpreted)


def _replaced(program: ClosedJaxpr) -> ClosedJaxpr:
    return retraced(program, _with_rule)


def _with_rule(eqn: Any, env: Env) -> list[Any] | None:
    name = eqn.primitive.name
    operands = operands_of(eqn, env)
    if _is_mixture(eqn):
        numbers = jnp.arange(operands[3].shape[0])
        return [mixture(*operands, numbers)]
    if name == "scan":
        return bind(eqn, operands, jaxpr=_replaced(eqn.params["jaxpr"]))
    if name in NAMED_PARTS and has_mixture(_part(eqn).jaxpr):
        return run(_part(eqn), operands, _with_rule)
    return None


def _part(eqn: Any) -> ClosedJaxpr:
    inner = eqn.params[CALLS[eqn.primitive.name]]
    return ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner


def _is_mixture(eqn: Any) -> bool:
    if eqn.primitive.name not in NAMED_PARTS or eqn.params.get("name") != NAME:
        return False
    shapes = tuple(shape_of(variable.aval) for variable in eqn.invars)
    return alike(_part(eqn).jaxpr, _known(shapes))


@functools.lru_cache(maxsize=16)
def _known(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Jaxpr:
    """Return the program of the zoo's mixture for arrays of some shapes."""
    program = jax.make_jaxpr(moe.chosen_experts)(*shapes)
    return _part(program.jaxpr.eqns[0]).jaxpr
