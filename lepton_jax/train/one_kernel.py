"""Scalars of a step computed by one kernel, on a CPU.

A controller's policies are over a thousand operations on scalars. XLA's CPU backend
starts each by itself, which takes longer than to compute it, and compiles each by
itself. A call that is marked becomes one kernel instead:

    280 operations                  44 us a step, 3.0 s to compile
    a call of a function of them     1 us a step, 0.5 s to compile

(jax 0.10.2 and 0.12, two CPU cores). The mark is XLA's own: it gives it to small loops.
What such a kernel can't hold ends the process while it is compiled: a library's
function, a random number, an argument that nothing reads. So only operations of `KNOWN`
come into one, and each argument is read.

A loop copies each value that it carries, again one by one. So it carries small values
as one array of 32-bit words:

>>> words = to_words([jnp.float32(0.5), jnp.bool_(True), jnp.arange(2)])
>>> words.tolist()
[1056964608, 1, 0, 1]
>>> [x.tolist() for x in from_words(words, [jnp.float32(0), jnp.bool_(0)])]
[0.5, True]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compat import ClosedJaxpr, marked_as_one_kernel
from lepton_jax.planner.rewrite.program import flat, read_all, run, variables_of

# Operations that a kernel may hold: of the entries at one place, or of their places.
KNOWN = frozenset(
    [
        "abs",
        "add",
        "and",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "div",
        "eq",
        "exp",
        "exp2",
        "expm1",
        "floor",
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
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tanh",
        "xor",
        "broadcast_in_dim",
        "concatenate",
        "reshape",
        "slice",
        "squeeze",
        "stack",
    ]
)
# Types of values that words can hold.
IN_WORDS = ("float32", "int32", "uint32", "bool")
# Entries of a value that is as good as a scalar.
FEW = 64


def as_one_kernel(
    function: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """Return `function(*arguments)`, computed by one kernel if that can be.

    Args:
      function: from trees of scalars, or of arrays of a few entries, to such a tree.
      arguments: its arguments.
    """
    leaves, tree = jax.tree.flatten(arguments)

    def of_leaves(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(tree, leaves))

    traced = jax.make_jaxpr(of_leaves, return_shape=True)
    program, shapes = traced(*leaves)
    program = flat(program)
    if not is_for_one_kernel(program):
        return function(*arguments)
    return jax.tree.unflatten(jax.tree.structure(shapes), _run(program, leaves))


def is_for_one_kernel(program: ClosedJaxpr) -> bool:
    """Whether a program without calls has known operations on few entries alone."""
    return all(
        eqn.primitive.name in KNOWN
        and all(_is_small(variable.aval) for variable in (*eqn.invars, *eqn.outvars))
        for eqn in program.jaxpr.eqns
    )


class InWords:
    """A tree whose small leaves are one array, which a loop carries as one.

    Args:
      tree: the tree; its leaves have shapes and types.
    """

    def __init__(self, tree: Any):
        leaves, self._tree = jax.tree.flatten(tree)
        self._is_small = [_is_small(leaf) for leaf in leaves]
        self._shapes = [x for x, small in self._marked(leaves) if small]

    def packed(self, tree: Any) -> tuple[Any, list[Any]]:
        """Return a tree's small leaves as words, and the others."""
        leaves = jax.tree.leaves(tree)
        small = [x for x, is_small in self._marked(leaves) if is_small]
        others = [x for x, is_small in self._marked(leaves) if not is_small]
        (words,) = _called(lambda values: [to_words(values)], small)
        return words, others

    def unpacked(self, packed: tuple[Any, list[Any]]) -> Any:
        """Return the tree again."""
        words, others = packed
        values = _called(lambda words: from_words(words[0], self._shapes), [words])
        small = iter(values)
        rest = iter(others)
        leaves = [next(small if is_small else rest) for is_small in self._is_small]
        return jax.tree.unflatten(self._tree, leaves)

    def _marked(
        self,
        leaves: Iterable[Any],
    ) -> Iterable[tuple[Any, bool]]:
        return zip(leaves, self._is_small, strict=True)


def to_words(values: Iterable[Any]) -> jax.Array:
    """Return small values as one array, int32 (their entries,)."""
    parts = [jnp.zeros(0, jnp.int32)]
    for x in map(jnp.asarray, values):
        if x.dtype == bool:
            x = x.astype(jnp.int32)
        elif x.dtype != jnp.int32:
            x = jax.lax.bitcast_convert_type(x, jnp.int32)
        parts.append(x.reshape(-1))
    return jnp.concatenate(parts)


def from_words(words: jax.Array, shapes: Iterable[Any]) -> list[jax.Array]:
    """Return values of given shapes and types from an array of `to_words`."""
    values = []
    begin = 0
    for shape in shapes:
        end = begin + math.prod(shape.shape)
        x = words[begin:end].reshape(shape.shape)
        if shape.dtype == bool:
            x = x != 0
        elif shape.dtype != jnp.int32:
            x = jax.lax.bitcast_convert_type(x, shape.dtype)
        values.append(x)
        begin = end
    return values


# ---- internals ----


def _is_small(x: Any) -> bool:
    return str(x.dtype) in IN_WORDS and math.prod(x.shape) <= FEW


def _run(
    program: ClosedJaxpr,
    leaves: list[Any],
) -> list[Any]:
    """Run a program as one kernel, of the values that are read and are made."""
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.invars, leaves, strict=True))
    known |= zip(jaxpr.constvars, program.consts, strict=True)
    read = {v for eqn in jaxpr.eqns for v in variables_of(eqn.invars)}
    taken = [v for v in known if v in read]
    made = {v for eqn in jaxpr.eqns for v in eqn.outvars}
    given = list(dict.fromkeys(v for v in variables_of(jaxpr.outvars) if v in made))
    kernel = ClosedJaxpr(jaxpr.replace(constvars=[], invars=taken, outvars=given), ())

    if given:
        results = _called(partial(run, kernel), [known[v] for v in taken])
        known |= zip(given, results, strict=True)
    return read_all(known, jaxpr.outvars)


def _called(
    function: Callable[..., list],
    values: Sequence[Any],
) -> list[Any]:
    """Run a function as one kernel that reads each of its values."""

    def compute(*values: Any) -> tuple[list[Any], Any]:
        # XLA may find out that a result does not depend on a value after all
        firsts = [jnp.ravel(x)[0] for x in values]
        read = sum(first.astype(jnp.float32) for first in firsts)
        return function(values), read

    call = marked_as_one_kernel(compute)(*values)
    # what is behind a barrier is not left out, though nothing uses it
    return jax.lax.optimization_barrier(call)[0]
