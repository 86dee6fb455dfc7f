"""Masks that only positions decide: what they hide, found in a program.

A mask of attention is computed from positions by comparisons, or is a constant. Its
*expression* is what computes it, with each dim named: "q" for the queries, "k" for the
keys. The expression is evaluated in NumPy, a few rows at a time, and compared with the
masks that a kernel knows.

    >>> import jax, jax.numpy as jnp
    >>> program = jax.make_jaxpr(lambda: jnp.arange(4)[:, None] >= jnp.arange(4))()
    >>> uses = Uses(program.jaxpr)
    >>> seen = expression(program.jaxpr.outvars[0], ("q", "k"), uses, {})
    >>> seen
    ('ge', ('iota', 'q'), ('iota', 'k'))
    >>> shown((seen,), 4, 4)
    Shown(causal=True, behind=None)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.compat import Literal
from lepton_jax.planner.rewrite.program import Uses, shape_of_operand, shape_of_result

# the name of each dim; None: neither queries nor keys
Labels = tuple[str | None, ...]
# ("iota", label), ("number", value), ("array", Constant, labels), (operation, ...)
Expression = tuple[Any, ...]

QUERY = "q"
KEY = "k"

# Scores that are hidden are at most this. Their shares are then zero in float32, where
# exp(-104) is, unless what is seen is nearly as low. Assumption: no score that is meant
# to be seen is below -1e4.
HIDDEN = -1e6

# Entries of a mask that are looked at together, and at most. Of a mask with more, rows
# are looked at that lie evenly between the first and the last. Assumption: 2^31 take
# seconds; a mask of positions that is causal in all these rows is causal.
TOGETHER = 2**22
MOST_LOOKED_AT = 2**31

OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.logical_and,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.logical_not,
    "or": np.logical_or,
    "select_n": lambda which, off, on: np.where(which, on, off),
    "sub": np.subtract,
}
# Operations whose results are no positions, so a narrow dtype holds them.
COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
CHOSEN = (*COMPARISONS, "not", "and", "or", "bool", "select_n")
EXACT = 4  # bytes of a number that holds each position
UNCHANGED = ("copy", "copy_p", "stop_gradient", "optimization_barrier")


class Constant:
    """An array that a program holds; equal to itself alone."""

    def __init__(self, array: np.ndarray):
        self.array = array


class Shown(NamedTuple):
    """The keys that a mask lets queries see.

    Attributes:
      causal: the keys up to their own position; else all of them.
      behind: if causal, how far behind its own position a query sees; None: to the
        first key.
    """

    causal: bool
    behind: int | None


def expression(
    variable: Any,
    labels: Labels,
    uses: Uses,
    known: Mapping[Any, Any],
) -> Expression | None:
    """Return what computes a variable from positions; None: something else does.

    Args:
      variable: of a program without calls.
      labels: of its dims.
      uses: of the program.
      known: variables whose arrays are known.
    """
    if isinstance(variable, Literal):
        return _constant(variable.val, labels)
    if variable in known:
        return _constant(known[variable], labels)
    eqn = uses.maker.get(variable)
    if eqn is None:
        return None
    name = eqn.primitive.name
    if name == "iota":
        return _positions(eqn, labels)
    moved = _only_moved(eqn, labels)
    if moved is not None:
        source = eqn.invars[0]
        inner = expression(source, moved, uses, known)
        if inner is not None and name == "convert_element_type":
            return _cast(inner, eqn.params["new_dtype"])
        return inner
    if name not in OPERATIONS:
        return None
    parts = []
    for operand in eqn.invars:
        own = labels if operand.aval.shape else ()
        part = expression(operand, own, uses, known)
        if part is None:
            return None
        parts.append(part)
    return (name, *parts)


def moved_labels(eqn: Any, labels: Labels) -> Labels | None:
    """Return the labels of an operand that is only moved; None: it is not.

    Args:
      eqn: that makes an array.
      labels: of the array's dims.
    """
    name = eqn.primitive.name
    if name == "transpose":
        moved: list[str | None] = [None] * len(labels)
        for place, dim in enumerate(eqn.params["permutation"]):
            moved[dim] = labels[place]
        return tuple(moved)
    if name not in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
        return None
    source = shape_of_operand(eqn)
    target = shape_of_result(eqn)
    if not source:
        return ()
    if name == "broadcast_in_dim":
        places = eqn.params["broadcast_dimensions"]
        pairs = zip(source, places, strict=True)
        return tuple(labels[p] if n == target[p] else None for n, p in pairs)
    return _reshaped_labels(labels, source, target)


@functools.lru_cache(maxsize=64)
def shown(seen: tuple[Expression, ...], queries: int, keys: int) -> Shown | None:
    """Return what some masks together let queries see; None: what no kernel knows.

    Args:
      seen: expressions that are true where a query sees a key.
      queries: number of queries.
      keys: number of keys.
    """
    try:
        own = np.array([queries - 1])
        [last] = _part(seen, own, keys)
    except (TypeError, ValueError, AttributeError):
        return None
    count = int(last.sum())
    kinds = [Shown(False, None), Shown(True, None)]
    if 0 < count < keys:
        kinds.append(Shown(True, count - 1))
    for kind in kinds:
        if _is_kind(kind, seen, queries, keys):
            return kind
    return None


def seen_where_zero(bias: Expression) -> Expression:
    """Return where an expression that is added to scores shows them."""
    return ("zero or hidden", bias)


# ---- internals ----


def _reshaped_labels(
    labels: Labels, source: Sequence[int], target: Sequence[int]
) -> Labels | None:
    """Return the labels of an array before a reshape.

    Dims of extent 1 come and go; the others must keep their order.
    """
    if _long(source) != _long(target):
        return None
    pairs = zip(labels, target, strict=True)
    rest = iter([label for label, extent in pairs if extent != 1])
    return tuple(None if extent == 1 else next(rest) for extent in source)


def _long(shape: Sequence[int]) -> list[int]:
    return [extent for extent in shape if extent != 1]


def _positions(eqn: Any, labels: Labels) -> Expression | None:
    dim = eqn.params["dimension"]
    label = labels[dim]
    if label is None or not _is_exact(eqn.params["dtype"]):
        return None
    return ("iota", label)


def _only_moved(eqn: Any, labels: Labels) -> Labels | None:
    """Return the labels of an operand that is moved, cast or handed on."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        return labels
    if name in UNCHANGED and len(eqn.invars) == 1:
        return labels
    return moved_labels(eqn, labels)


def _is_exact(dtype: Any) -> bool:
    """Whether positions are the same numbers in a dtype, and so are their differences.

    They are not in bfloat16 above 256, nor in unsigned numbers below zero.
    """
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return True
    return dtype.kind in "if" and dtype.itemsize >= EXACT


def _cast(inner: Expression, dtype: Any) -> Expression | None:
    if np.dtype(dtype).kind == "b":
        return ("bool", inner)
    if _is_exact(dtype) or inner[0] in CHOSEN:
        return inner
    return None


def _constant(array: Any, labels: Labels) -> Expression | None:
    array = np.asarray(array)
    if array.size == 1:
        return ("number", array.item())
    for extent, label in zip(array.shape, labels, strict=True):
        if extent > 1 and label is None:
            return None
    content = array.tobytes()
    constant = _kept(content, str(array.dtype), array.shape)
    return ("array", constant, labels)


@functools.lru_cache(maxsize=16)
def _kept(content: bytes, dtype: str, shape: tuple[int, ...]) -> Constant:
    array = np.frombuffer(content, np.dtype(dtype))
    return Constant(array.reshape(shape))


def _is_kind(
    kind: Shown, seen: tuple[Expression, ...], queries: int, keys: int
) -> bool:
    place = np.arange(keys)[None, :]
    for start, rows in _numbered(seen, queries, keys):
        stop = start + len(rows)
        own = np.arange(start, stop)[:, None]
        expected = np.ones_like(rows)
        if kind.causal:
            expected = place <= own
        if kind.behind is not None:
            expected = expected & (own - place <= kind.behind)
        if not np.array_equal(rows, expected):
            return False
    return True


def _numbered(
    seen: tuple[Expression, ...], queries: int, keys: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield some rows of a mask at a time, and the number of the first."""
    count = max(1, min(queries, TOGETHER // keys))
    starts: Sequence[int] = range(0, queries, count)
    most = max(2, MOST_LOOKED_AT // (count * keys))
    if len(starts) > most:
        places = np.linspace(0, len(starts) - 1, most)
        starts = [starts[place] for place in places.astype(int)]
    for start in starts:
        stop = min(start + count, queries)
        own = np.arange(start, stop)
        yield start, _part(seen, own, keys)


def _part(seen: tuple[Expression, ...], own: np.ndarray, keys: int) -> np.ndarray:
    """Return the rows of a mask for some queries."""
    rows = np.ones((len(own), keys), bool)
    places = np.arange(keys)[None, :]
    for part in seen:
        value = _value(part, own[:, None], places)
        rows &= value.astype(bool)
    return rows


def _value(part: Expression, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Evaluate an expression for some queries and all keys, (queries, keys)."""
    name, *more = part
    if name == "iota":
        return queries if more[0] == QUERY else keys
    if name == "number":
        return np.asarray(more[0])
    if name == "array":
        constant, labels = more
        return _picked(constant.array, labels, queries[:, 0])
    values = [_value(inner, queries, keys) for inner in more]
    if name == "bool":
        return values[0] != 0
    if name == "zero or hidden":
        (bias,) = values
        is_hidden = bias <= HIDDEN
        is_zero = bias == 0
        if not np.all(is_zero | is_hidden):
            raise ValueError
        return is_zero
    return OPERATIONS[name](*values)


def _picked(array: np.ndarray, labels: Labels, queries: np.ndarray) -> np.ndarray:
    """Return the rows of a constant array for some queries, (queries, keys)."""
    pairs = zip(array.shape, labels, strict=True)
    named = [label for extent, label in pairs if extent > 1]
    array = array.squeeze()
    if named == [KEY, QUERY]:
        array = array.T
    if KEY not in named:
        array = array[:, None]
    if QUERY not in named:
        return array[None, :] if array.ndim == 1 else array
    return array[queries]
