"""Attention found in a program, and replaced by a kernel.

What `jax.nn.dot_product_attention` traces is known: it is traced here again, for arrays
of the same shapes, and compared with the program, operation by operation, from the
result back to query, key and value. So nothing is taken for attention that is not, and
another version of JAX brings its own form.

    >>> import jax, jax.numpy as jnp
    >>> def attends(q, k, v):
    ...     return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    >>> x = jnp.ones((1, 6, 2, 4))
    >>> program = opened(jax.make_jaxpr(attends)(x, x, x))
    >>> [(found.causal, round(found.scale, 6)) for found in find(program.jaxpr)]
    [(True, 0.3)]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal
from lepton_jax.planner.rewrite.attention import How, attend
from lepton_jax.planner.rewrite.program import (
    Env,
    Uses,
    bind,
    opened,
    operands_of,
    read,
    retraced,
    run,
)

# A scale that nobody uses: where the pattern has it, the program has its own.
ANY_SCALE = 0.12345679

# Options that say where a result lies: a program that is traced for a mesh has others.
PLACES = ("sharding", "out_sharding")

# Operations between the products' result and attention's.
MOVES = ("reshape", "transpose")


class Found(NamedTuple):
    """Attention in a program.

    Attributes:
      result: the variable that holds it.
      query, key, value: variables.
      causal, scale: as in `attention.How`.
    """

    result: Any
    query: Any
    key: Any
    value: Any
    causal: bool
    scale: float


def fused(function: Callable, kernel: str) -> Callable:
    """Return a function whose attention is computed by a kernel.

    Args:
      function: of arrays in pytrees.
      kernel: see `attention.How`; "": the function stays.
    """
    if not kernel:
        return function

    def faster(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        program = _replaced(opened(program), kernel)
        results = run(program, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return faster


def find(jaxpr: Jaxpr) -> Iterator[Found]:
    """Iterate over the attention in a program, its calls opened, loops left out."""
    uses = Uses(jaxpr)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reshape":
            found = _attention(eqn.outvars[0], uses)
            if found is not None:
                yield found


def find_all(jaxpr: Jaxpr, times: int = 1) -> Iterator[tuple[Found, int]]:
    """Iterate over the attention in a program and its loops, with how often it runs."""
    for found in find(jaxpr):
        yield found, times
    eqn: Any
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            yield from find_all(body, times * eqn.params["length"])


# ---- internals ----


def _replaced(program: ClosedJaxpr, kernel: str) -> ClosedJaxpr:
    known = {found.result: found for found in find(program.jaxpr)}

    def rule(eqn: Any, env: Env) -> list[Any] | None:
        if eqn.primitive.name == "scan":
            body = _replaced(eqn.params["jaxpr"], kernel)
            return bind(eqn, operands_of(eqn, env), jaxpr=body)
        found = known.get(eqn.outvars[0]) if eqn.outvars else None
        if found is None:
            return None
        arrays = [read(env, v) for v in (found.query, found.key, found.value)]
        return [attend(*arrays, How(found.causal, found.scale, kernel))]

    return retraced(program, rule)


def _attention(result: Any, uses: Uses) -> Found | None:
    """Return the attention that a variable holds; None: it holds something else."""
    product = uses.maker.get(result)
    while product is not None and product.primitive.name in MOVES:
        product = uses.made_by(product.invars[0], "dot_general", *MOVES)
    if product is None or len(result.aval.shape) != 4:
        return None
    for value in product.invars:
        shape = value.aval.shape
        if len(shape) != 4 or value.aval.dtype != result.aval.dtype:
            continue
        for causal in (True, False):
            pattern = _pattern(result.aval.shape, shape, str(value.aval.dtype), causal)
            if pattern is None:
                continue
            match = _Match(pattern, uses)
            if match.holds(result):
                query, key, _ = (match.bound[v] for v in pattern.jaxpr.invars)
                return Found(result, query, key, value, causal, match.scale)
    return None


@functools.lru_cache(maxsize=64)
def _pattern(
    query: tuple[int, ...],
    key: tuple[int, ...],
    dtype: str,
    causal: bool,
) -> ClosedJaxpr | None:
    """Return the program of attention; None: there is none of these shapes."""
    batch, _, heads, width = query
    if (batch, width) != (key[0], key[3]) or heads % key[2]:
        return None

    def attends(query: Any, key: Any, value: Any) -> Any:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=causal,
            scale=ANY_SCALE,
        )

    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (query, key, key)]
    return opened(jax.make_jaxpr(attends)(*arrays))


class _Match:
    """Compares a program with a pattern, from a result back.

    Attributes:
      bound: variable of the pattern to that of the program.
      scale: the program's own.
    """

    def __init__(self, pattern: ClosedJaxpr, uses: Uses):
        self.pattern = pattern
        self.uses = uses
        self.makers = Uses(pattern.jaxpr).maker
        self.inputs = set(pattern.jaxpr.invars)
        self.bound: dict[Any, Any] = {}
        self.scale = 1.0

    def holds(self, result: Any) -> bool:
        """Whether a variable of the program holds what the pattern computes."""
        pending = [(self.pattern.jaxpr.outvars[0], result)]
        while pending:
            mine, theirs = pending.pop()
            if isinstance(mine, Literal):
                if not self._is_number(mine, theirs):
                    return False
                continue
            if mine in self.bound:
                if self.bound[mine] is not theirs:
                    return False
                continue
            if isinstance(theirs, Literal) or mine.aval.shape != theirs.aval.shape:
                return False
            self.bound[mine] = theirs
            if mine in self.inputs:
                if mine.aval.dtype != theirs.aval.dtype:
                    return False
                continue
            eqn = self.makers.get(mine)
            other = self.uses.maker.get(theirs)
            if eqn is None or other is None or not _alike(eqn, other):
                return False
            pending += zip(eqn.invars, other.invars, strict=True)
        return True

    def _is_number(self, mine: Any, theirs: Any) -> bool:
        if not isinstance(theirs, Literal):
            return False
        if np.ndim(mine.val) == 0 and np.isclose(float(mine.val), ANY_SCALE, 1e-6, 0):
            self.scale = float(theirs.val)
            return True
        return bool(np.array_equal(mine.val, theirs.val))


def _alike(eqn: Any, other: Any) -> bool:
    """Whether two equations are of one operation, with the same options."""
    if eqn.primitive is not other.primitive or len(eqn.invars) != len(other.invars):
        return False
    if eqn.params.keys() != other.params.keys():
        return False
    for name, own in eqn.params.items():
        if name in PLACES:
            continue
        theirs = other.params[name]
        if own is not theirs and str(own) != str(theirs):
            return False
    return eqn.outvars[0].aval.dtype == other.outvars[0].aval.dtype
