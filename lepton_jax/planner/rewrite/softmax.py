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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, scan_counts
from lepton_jax.planner.rewrite import splash, written
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
from lepton_jax.planner.rewrite.written import Written
from lepton_jax.trees import with_leaves

# Numbers that nobody uses: where the pattern has one, the program has its own.
ANY_SCALE = 0.12345679
ANY_BEHIND = 1_000_000_007
ANY_AHEAD = 1_000_000_009

# Options that say where a result lies: a program that is traced for a mesh has others.
PLACES = ("sharding", "out_sharding")

# Operations between the products' result and attention's.
MOVES = ("reshape", "transpose")


class Kind(NamedTuple):
    """A kind of attention that is looked for.

    Attributes:
      causal: as in `attention.How`.
      windowed: whether a query sees keys up to some distance.
      segmented: whether it sees those of its own segment.
    """

    causal: bool
    windowed: bool
    segmented: bool


KINDS = (
    Kind(True, False, False),
    Kind(False, False, False),
    Kind(True, False, True),
    Kind(False, False, True),
    Kind(True, True, False),
    Kind(True, True, True),
)


class Found(NamedTuple):
    """Attention in a program.

    Attributes:
      result: the variable that holds it.
      product: the variable that holds the product of shares and values.
      query, key, value: variables.
      segments: a variable, or None.
      causal, scale, behind: as in `attention.How`.
    """

    result: Any
    product: Any
    query: Any
    key: Any
    value: Any
    segments: Any
    causal: bool
    scale: float
    behind: int | None

    def how(self, kernel: str) -> How:
        """Return how a kernel computes it."""
        return How(self.causal, self.scale, kernel, self.behind)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, length, heads and width."""
        return self.query.aval.shape

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.key.aval.shape[1]

    def operands(self, env: Env) -> list[Any]:
        """Return query, key, value and segments."""
        segments = None if self.segments is None else read(env, self.segments)
        arrays = (self.query, self.key, self.value)
        return [*(read(env, variable) for variable in arrays), segments]

    def placed(self, out: Any) -> Any:
        """Return attention as the program has it."""
        return out


# Variables whose arrays are known while a program is traced.
Known = Mapping[Any, Any]


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
        program = opened(program)
        known = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        program = _replaced(program, kernel, known)
        results = run(program, jax.tree.leaves(args))
        return with_leaves(shapes, results)

    return faster


def find(jaxpr: Jaxpr, known: Known | None = None) -> Iterator[Found | Written]:
    """Iterate over the attention in a program, its calls opened, loops left out."""
    uses = Uses(jaxpr)
    products = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reshape":
            found = _attention(eqn.outvars[0], uses, known or {})
            if found is not None:
                products.add(found.product)
                yield found
    for by_hand in written.find(jaxpr, known or {}):
        if by_hand.result not in products:
            yield by_hand


def find_all(program: ClosedJaxpr) -> list[Found | Written]:
    """Return the attention in a program and its loops, its calls opened."""
    known = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    return list(_find_all(program.jaxpr, known))


# ---- internals ----


def _find_all(jaxpr: Jaxpr, known: Known) -> Iterator[Found | Written]:
    yield from find(jaxpr, known)
    eqn: Any
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield from _find_all(eqn.params["jaxpr"].jaxpr, _known_inside(eqn, known))


def _known_inside(eqn: Any, known: Known) -> dict[Any, Any]:
    """Return the variables of a loop's body whose arrays are known."""
    consts, _ = scan_counts(eqn)
    body = eqn.params["jaxpr"]
    inside = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    for outer, inner in zip(eqn.invars[:consts], body.jaxpr.invars, strict=False):
        if not isinstance(outer, Literal) and outer in known:
            inside[inner] = known[outer]
    return inside


def _replaced(program: ClosedJaxpr, kernel: str, known: Known) -> ClosedJaxpr:
    found_at = {found.result: found for found in find(program.jaxpr, known)}

    def rule(eqn: Any, env: Env) -> list[Any] | None:
        if eqn.primitive.name == "scan":
            inside = _known_inside(eqn, known)
            body = _replaced(eqn.params["jaxpr"], kernel, inside)
            return bind(eqn, operands_of(eqn, env), jaxpr=body)
        found = found_at.get(eqn.outvars[0]) if eqn.outvars else None
        if found is None or not _takes(kernel, found):
            return None
        *arrays, segments = found.operands(env)
        return [found.placed(attend(*arrays, found.how(kernel), segments))]

    return retraced(program, rule)


def _takes(kernel: str, found: Found | Written) -> bool:
    """Whether a kernel computes attention of these lengths."""
    if not kernel.startswith("splash"):
        return True
    return splash.takes(found.shape[1], found.keys, found.causal)


def _attention(result: Any, uses: Uses, known: Known) -> Found | None:
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
        for kind in KINDS:
            pattern = _pattern(result.aval.shape, shape, str(value.aval.dtype), kind)
            if pattern is None:
                continue
            match = _Match(pattern, uses, known)
            if match.holds(result) and match.ahead >= 0:
                return match.found(result, product.outvars[0], kind)
    return None


@functools.lru_cache(maxsize=64)
def _pattern(
    query: tuple[int, ...],
    key: tuple[int, ...],
    dtype: str,
    kind: Kind,
) -> ClosedJaxpr | None:
    """Return the program of attention; None: there is none of these shapes."""
    batch, length, heads, width = query
    if (batch, width) != (key[0], key[3]) or heads % key[2]:
        return None
    if length != key[1] and (kind.windowed or kind.segmented):
        return None

    def attends(query: Any, key: Any, value: Any, *segments: Any) -> Any:
        mask = None
        for own in segments:
            mask = own[:, None, :, None] == own[:, None, None, :]
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=kind.causal,
            scale=ANY_SCALE,
            local_window_size=(ANY_BEHIND, ANY_AHEAD) if kind.windowed else None,
        )

    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (query, key, key)]
    if kind.segmented:
        arrays.append(jax.ShapeDtypeStruct((batch, length), "int32"))
    return opened(jax.make_jaxpr(attends)(*arrays))


class _Match:
    """Compares a program with a pattern, from a result back.

    Attributes:
      bound: variable of the pattern to that of the program.
      scale, behind, ahead: the program's own numbers.
    """

    def __init__(self, pattern: ClosedJaxpr, uses: Uses, known: Known):
        self.pattern = pattern
        self.uses = uses
        self.known = known
        self.makers = Uses(pattern.jaxpr).maker
        self.inputs = set(pattern.jaxpr.invars)
        pairs = zip(pattern.jaxpr.constvars, pattern.consts, strict=True)
        self.consts = dict(pairs)
        self.bound: dict[Any, Any] = {}
        self.scale = 1.0
        self.behind: int | None = None
        self.ahead = 0

    def holds(self, result: Any) -> bool:
        """Whether a variable of the program holds what the pattern computes."""
        pending = [(self.pattern.jaxpr.outvars[0], result)]
        while pending:
            mine, theirs = pending.pop()
            if not isinstance(mine, Literal) and mine in self.bound:
                if self.bound[mine] is not theirs:
                    return False
                continue
            operands = self._operands(mine, theirs)
            if operands is None:
                return False
            pending += operands
        return True

    def found(self, result: Any, product: Any, kind: Kind) -> Found:
        """Return what was found."""
        arrays = [self.bound[v] for v in self.pattern.jaxpr.invars]
        query, key, value, *segments = arrays
        return Found(
            result,
            product,
            query,
            key,
            value,
            segments[0] if segments else None,
            kind.causal,
            self.scale,
            self.behind,
        )

    def _operands(self, mine: Any, theirs: Any) -> list[tuple[Any, Any]] | None:
        """Return the pairs that must be alike if these two are; None: they are not."""
        if isinstance(mine, Literal):
            return [] if self._is_number(mine, theirs) else None
        if isinstance(theirs, Literal) or mine.aval.shape != theirs.aval.shape:
            return None
        self.bound[mine] = theirs
        if mine in self.inputs:
            return [] if mine.aval.dtype == theirs.aval.dtype else None
        if mine in self.consts:
            known = self.known.get(theirs)
            is_known = known is not None and np.array_equal(self.consts[mine], known)
            return [] if is_known else None
        eqn = self.makers.get(mine)
        other = self.uses.maker.get(theirs)
        if eqn is None or other is None or not _alike(eqn, other):
            return None
        return list(zip(eqn.invars, other.invars, strict=True))

    def _is_number(self, mine: Any, theirs: Any) -> bool:
        if not isinstance(theirs, Literal):
            return False
        if np.ndim(mine.val) == 0:
            if np.isclose(float(mine.val), ANY_SCALE, 1e-6, 0):
                self.scale = float(theirs.val)
                return True
            if mine.val == ANY_BEHIND:
                self.behind = int(theirs.val)
                return True
            if mine.val == ANY_AHEAD:
                self.ahead = int(theirs.val)
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
