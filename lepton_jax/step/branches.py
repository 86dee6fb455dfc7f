"""Work that a step does or leaves, and how a CPU is given it.

A conditional in XLA gives its results new buffers on the CPU: where nothing is done,
trees are copied, and where something is, they are not updated in place. A loop that is
run once or never has neither fault. On other devices, which would ask the loop's
condition twice, it is a conditional.

>>> [float(once(jnp.bool_(due), lambda x: 2 * x, jnp.float32(3))) for due in (0, 1)]
[3.0, 6.0]

The decisions of a step are a few hundred operations on scalars. XLA makes a kernel of
each on the CPU, and some 0.3 us to start it is all that it costs: more than a tenth of
a small model's step. `as_one_kernel` makes one of them all.

>>> float(as_one_kernel(lambda x, y: jnp.sqrt(x) + y, jnp.float32(9), jnp.float32(1)))
4.0
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import jaxpr_as_fun, jaxprs_in_params

# XLA's own attributes of a call (jax 0.10.2): it stays a call, and a CPU compiles it as
# one kernel. XLA sets the second one itself where it moves small loops into calls. One
# that does not know them makes a call as any other.
ONE_KERNEL = {"inlineable": "false", "xla_cpu_small_call": "true"}
# values of at most this many entries are in such a kernel; assumption
SMALL = 64
# the operations that may be in it: those on single entries, and sums. Others may be
# calls of a library, which such a kernel can't make
NAMES = """
abs add and broadcast_in_dim ceil clamp concatenate convert_element_type copy
cos div eq exp exp2 expand_dims expm1 floor ge gt integer_pow iota is_finite jit
le log log1p logistic lt max min mul ne neg nextafter not or pjit pow reduce_and
reduce_max reduce_min reduce_or reduce_sum rem reshape round rsqrt select_n sign
sin slice sqrt square squeeze stack stop_gradient sub tan tanh unstack xor
"""
SCALAR = frozenset(NAMES.split())


def once(
    condition: Any,
    step: Callable[[Any], Any],
    carry: Any,
) -> Any:
    """Return `step(carry)` where a condition holds, else `carry`, a pytree."""

    def as_loop(condition: Any, carry: Any) -> Any:
        def body(state: tuple[Any, Any]) -> tuple[Any, Any]:
            return jnp.bool_(False), step(state[1])

        _, after = jax.lax.while_loop(lambda s: s[0], body, (condition, carry))
        return after

    def as_conditional(condition: Any, carry: Any) -> Any:
        return jax.lax.cond(
            condition,
            step,
            lambda x: x,
            carry,
        )

    return jax.lax.platform_dependent(
        condition,
        carry,
        cpu=as_loop,
        default=as_conditional,
    )


def either(
    condition: Any,
    first: Callable[[Any], Any],
    second: Callable[[Any], Any],
    carry: Any,
) -> Any:
    """Return `first(carry)` where a condition holds, else `second(carry)`."""

    def as_loops(condition: Any, carry: Any) -> Any:
        carry = once(condition, first, carry)
        return once(~condition, second, carry)

    def as_conditional(condition: Any, carry: Any) -> Any:
        return jax.lax.cond(condition, first, second, carry)

    return jax.lax.platform_dependent(
        condition,
        carry,
        cpu=as_loops,
        default=as_conditional,
    )


def as_one_kernel(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, on a CPU by one kernel if it may be.

    Args:
      function: of pytrees of scalars or small arrays.
      *arguments: they.
    """
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(tree, leaves))

    traced, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    program = jaxpr_as_fun(traced)
    small = all(shape.size <= SMALL for shape in traced.in_avals)
    if small and _is_scalar_work(traced.jaxpr):
        program = _called_on_cpu(program, traced.in_avals)
    return jax.tree.unflatten(jax.tree.structure(shapes), program(*leaves))


# ---- internals ----


def _called_on_cpu(program: Callable[..., Any], shapes: Any) -> Callable[..., Any]:
    """Return a function that is one kernel on a CPU.

    It is given one array of each type, which is cheaper than hundreds of scalars, and
    returns a part of each, since XLA crashes where such a call has an argument that is
    not used after all (jaxlib 0.10.2).
    """

    def unpacked(*packed: Any) -> Any:
        # the attributes are those of the call, not of the operations in it
        with set_xla_metadata(**dict.fromkeys(ONE_KERNEL)):
            results = program(*_unpacked(packed, shapes))
            return results, [x[:1] for x in packed]

    called = jax.jit(unpacked)

    def on_cpu(*leaves: Any) -> Any:
        packed = _packed(leaves)
        with set_xla_metadata(**ONE_KERNEL):
            return called(*packed)[0]

    return partial(jax.lax.platform_dependent, cpu=on_cpu, default=program)


def _packed(leaves: tuple[Any, ...]) -> list[Any]:
    """Return the entries of small arrays, in one array of each type."""
    entries: dict[Any, list[Any]] = {}
    for leaf in leaves:
        array = jnp.asarray(leaf)
        entries.setdefault(array.dtype, []).append(array.ravel())
    return [jnp.concatenate(own) for own in entries.values()]


def _unpacked(packed: tuple[Any, ...], shapes: Any) -> list[Any]:
    """Return the arrays that were `_packed`."""
    rest = {array.dtype: array for array in packed}
    leaves = []
    for shape in shapes:
        array = rest[shape.dtype]
        leaves.append(array[: shape.size].reshape(shape.shape))
        rest[shape.dtype] = array[shape.size :]
    return leaves


def _is_scalar_work(jaxpr: Any) -> bool:
    """Whether all operations are of `SCALAR`, on small values."""
    for equation in jaxpr.eqns:
        if equation.primitive.name not in SCALAR:
            return False
        if any(x.aval.size > SMALL for x in equation.outvars):
            return False
        for inner in jaxprs_in_params(equation.params):
            if not _is_scalar_work(inner):
                return False
    return True
