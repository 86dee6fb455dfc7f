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
    Replaced,
    Uses,
    bind,
    constants_of,
    opened,
    operands_of,
    read,
    read_all,
    retraced,
    run,
    trace,
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
        arrays = read_all(env, [self.query, self.key, self.value])
        segments = None
        if self.segments is not None:
            segments = read(env, self.segments)
        return [*arrays, segments]

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
        program, shapes = trace(function, *args)
        program = _replaced(program, kernel, constants_of(program))
        leaves = jax.tree.leaves(args)
        results = run(program, leaves)
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
    known = constants_of(program)
    return list(_find_all(program.jaxpr, known))


# ---- internals ----


def _find_all(jaxpr: Jaxpr, known: Known) -> Iterator[Found | Written]:
    yield from find(jaxpr, known)
    eqn: Any
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            inside = _known_inside(eqn, known)
            body = eqn.params["jaxpr"].jaxpr
            yield from _find_all(body, inside)


def _known_inside(eqn: Any, known: Known) -> dict[Any, Any]:
    """Return the variables of a loop's body whose arrays are known."""
    consts, _ = scan_counts(eqn)
    body = eqn.params["jaxpr"]
    inside = constants_of(body)
    pairs = zip(eqn.invars[:consts], body.jaxpr.invars, strict=False)
    for outer, inner in pairs:
        if not isinstance(outer, Literal) and outer in known:
            inside[inner] = known[outer]
    return inside


def _replaced(program: ClosedJaxpr, kernel: str, known: Known) -> ClosedJaxpr:
    found_at: dict[Any, Found | Written] = {}
    for found in find(program.jaxpr, known):
        found_at[found.result] = found

    def rule(eqn: Any, env: Env) -> Replaced:
        if eqn.primitive.name == "scan":
            inside = _known_inside(eqn, known)
            body = _replaced(eqn.params["jaxpr"], kernel, inside)
            operands = operands_of(eqn, env)
            return bind(eqn, operands, jaxpr=body)
        if not eqn.outvars:
            return None
        found = found_at.get(eqn.outvars[0])
        if found is None or not _takes(kernel, found):
            return None

        *arrays, segments = found.operands(env)
        how = found.how(kernel)
        out = attend(*arrays, how, segments)
        return [found.placed(out)]

    return retraced(program, rule)


def _takes(kernel: str, found: Found | Written) -> bool:
    """Whether a kernel computes attention of these lengths."""
    if not kernel.startswith("splash"):
        return True
    _, queries, *_ = found.shape
    return splash.takes(queries, found.keys, found.causal)


def _attention(result: Any, uses: Uses, known: Known) -> Found | None:
    """Return the attention that a variable holds; None: it holds something else."""
    product = uses.maker.get(result)
    while product is not None and product.primitive.name in MOVES:
        product = uses.made_by(product.invars[0], "dot_general", *MOVES)
    if product is None or len(result.aval.shape) != 4:
        return None
    query = result.aval
    for operand in product.invars:
        value = operand.aval
        if len(value.shape) != 4 or value.dtype != query.dtype:
            continue
        for kind in KINDS:
            pattern = _pattern(query.shape, value.shape, str(value.dtype), kind)
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
    other_batch, keys, key_heads, other_width = key
    if batch != other_batch or width != other_width:
        return None
    if heads % key_heads:
        return None
    has_own_mask = kind.windowed or kind.segmented
    if has_own_mask and length != keys:
        return None

    def attends(query: Any, key: Any, value: Any, *segments: Any) -> Any:
        mask = None
        for own in segments:
            of_queries = own[:, None, :, None]
            mask = of_queries == own[:, None, None, :]
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=kind.causal,
            scale=ANY_SCALE,
            local_window_size=(ANY_BEHIND, ANY_AHEAD) if kind.windowed else None,
        )

    shapes = (query, key, key)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    if kind.segmented:
        segments = jax.ShapeDtypeStruct((batch, length), "int32")
        arrays.append(segments)
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
        self.consts = constants_of(pattern)
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
        if isinstance(theirs, Literal):
            return None
        if mine.aval.shape != theirs.aval.shape:
            return None

        self.bound[mine] = theirs
        if mine in self.inputs:
            is_same = mine.aval.dtype == theirs.aval.dtype
            return [] if is_same else None
        if mine in self.consts:
            return [] if self._is_constant(mine, theirs) else None
        eqn = self.makers.get(mine)
        other = self.uses.maker.get(theirs)
        if eqn is None or other is None:
            return None
        if not _alike(eqn, other):
            return None
        return list(zip(eqn.invars, other.invars, strict=True))

    def _is_constant(self, mine: Any, theirs: Any) -> bool:
        """Whether a variable is known to hold a constant of the pattern."""
        known = self.known.get(theirs)
        if known is None:
            return False
        return np.array_equal(self.consts[mine], known)

    def _is_number(self, mine: Any, theirs: Any) -> bool:
        if not isinstance(theirs, Literal):
            return False
        if np.ndim(mine.val) == 0:
            number = float(mine.val)
            if np.isclose(number, ANY_SCALE, rtol=1e-6, atol=0):
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
    if eqn.primitive is not other.primitive:
        return False
    if len(eqn.invars) != len(other.invars):
        return False
    if eqn.params.keys() != other.params.keys():
        return False

    for name, own in eqn.params.items():
        if name in PLACES:
            continue
        theirs = other.params[name]
        is_same = own is theirs or str(own) == str(theirs)
        if not is_same:
            return False
    mine = eqn.outvars[0].aval
    return mine.dtype == other.outvars[0].aval.dtype
