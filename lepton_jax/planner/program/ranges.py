"""Which whole numbers a model and its loss can take from the data, read off the
program.

Each integer leaf of the samples is followed to where it becomes an index, as long as
its values stay what they are:

    tokens (8, 6) -- slice --> (8, 5) -- reshape --> (40,) -- gather in (50, 16): 0 to 49

jnp's indexing counts negative indices from the end: i -> select_n(i < 0, i, i + 50).
That is looked through. Indices that the person's code computes, clamps or replaces have
no bound of their own, and nothing is claimed. Where the code compares the leaf with a
number, such as `labels >= 0` or `labels != -100`, it has plans for the values on that
side, and they are let through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from lepton_jax.compat import ClosedJaxpr, Literal, scan_counts, source_line
from lepton_jax.data import Limit
from lepton_jax.errors import of_a_library
from lepton_jax.planner.program.graph import CALLS
from lepton_jax.planner.program.trace import Trace
from lepton_jax.step.training_loss import ARGUMENTS, argument_paths
from lepton_jax.trees import by_path

# Above so many elements of a batch the places are not followed one by one, and a slice
# of the leaf loses its bound. 16 MiB of int32; assumption.
MOST_PLACES = 2**22

UNCHANGED = {
    "copy",
    "copy_p",
    "convert_element_type",
    "name",
    "optimization_barrier",
    "sharding_constraint",
    "stop_gradient",
}
COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
MIRRORED = {
    "lt": "gt",
    "le": "ge",
    "gt": "lt",
    "ge": "le",
    "eq": "eq",
    "ne": "ne",
}
OTHER = -1  # a place that holds no value of the leaf


@dataclass(frozen=True, eq=False)
class Followed:
    """An array whose values are those of a leaf.

    Attributes:
      leaf: its path.
      places: for each element, its place in the flattened batch; `OTHER` where it is
        not the leaf's. Of a bag: the places that its values may come from, in any
        shape.
      bag: whether nothing is known of which element is which.
      wrapped: the size by which negative values were counted from the end.
    """

    leaf: str
    places: np.ndarray
    bag: bool = False
    wrapped: int | None = None


@dataclass(frozen=True, eq=False)
class Shifted:
    """A followed array plus a constant."""

    source: Followed
    by: int


@dataclass(eq=False)
class Compared:
    """A followed array compared with a constant; `own` if the person's code did it."""

    source: Followed
    name: str
    number: float
    own: bool = True


@dataclass(frozen=True)
class Constant:
    number: Any


@dataclass(frozen=True)
class Counter:
    """0, 1, ..., size - 1 along one dim."""

    size: int
    dim: int


@dataclass(frozen=True)
class Parameter:
    path: str


@dataclass(frozen=True, eq=False)
class Columns:
    """Index vectors, by their components."""

    parts: tuple[Any, ...]


def limits(trace: Trace) -> list[Limit]:
    """The ranges of the integer leaves of a recipe's samples that its program sets.

    Args:
      trace: of the recipe; preprocessing, model, loss and metrics are followed.
    """
    if trace.jaxpr is None:
        return []
    state = trace.state
    arguments = (
        state.params,
        state.variables,
        state.key,
        trace.inputs,
        trace.targets,
    )
    paths = argument_paths(ARGUMENTS, arguments)
    facts = []
    for path, leaf in zip(paths, jax.tree.leaves(arguments), strict=True):
        facts.append(_entering(path, leaf))

    samples = by_path({"inputs": trace.inputs, "targets": trace.targets})
    search = _Search({path: math.prod(x.shape[1:]) for path, x in samples.items()})
    search.follow(
        trace.jaxpr.jaxpr,
        facts,
        trace.jaxpr.consts,
        (),
    )
    return search.limits()


def _entering(path: str, leaf: Any) -> Any:
    """Knowledge of an argument."""
    if path.startswith("params"):
        return Parameter(path.removeprefix("params/"))
    if not path.startswith(("inputs", "targets")) or leaf.dtype.kind not in "iu":
        return None
    if math.prod(leaf.shape) > MOST_PLACES:
        sample = np.arange(
            math.prod(leaf.shape[1:]),
            dtype=np.int32,
        )
        return Followed(path, sample, bag=True)
    places = np.arange(
        math.prod(leaf.shape),
        dtype=np.int32,
    )
    return Followed(path, places.reshape(leaf.shape))


class _Search:
    """Follows the leaves through a program and collects what bounds them."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes  # values of a sample in each leaf
        self.found: list[Limit] = []
        self.compared: list[Compared] = []
        self._certain = True  # whether what is looked at runs in every step

    def limits(self) -> list[Limit]:
        """The limits found, less what the person's code looks out for itself."""
        best: dict[tuple, Limit] = {}
        for limit in self.found:
            key = (limit.path, limit.columns, limit.negative)
            if key not in best or limit.size < best[key].size:
                best[key] = limit
        return [self._spared(limit) for limit in best.values()]

    def _spared(self, limit: Limit) -> Limit:
        for seen in self.compared:
            if not seen.own or seen.source.leaf != limit.path:
                continue
            # Written as a bound: "< c" and ">= c" part the numbers before c from the
            # rest.
            first = seen.number + (seen.name in ("le", "gt"))
            if seen.name in ("eq", "ne"):
                if seen.number.is_integer():
                    limit = replace(
                        limit,
                        spared=(*limit.spared, int(seen.number)),
                    )
            elif first == 0:
                limit = replace(limit, negative=True)
            elif first == limit.size:
                limit = replace(limit, beyond=True)
        return limit

    # ---- the walk ----

    def follow(
        self,
        jaxpr: Any,
        facts: Iterable[Any],
        consts: Iterable[Any],
        callers: tuple,
    ) -> list[Any]:
        """Look at all equations of a jaxpr; returns what is known of its results."""
        env: dict[Any, Any] = dict(
            zip(
                jaxpr.invars,
                facts,
                strict=True,
            )
        )
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = Constant(const) if np.ndim(const) == 0 else None

        def known(var: Any) -> Any:
            if isinstance(var, Literal):
                return Constant(var.val) if np.ndim(var.val) == 0 else None
            return env.get(var)

        for eqn in jaxpr.eqns:
            results = self._equation(
                eqn,
                [known(v) for v in eqn.invars],
                callers,
            )
            env.update(
                zip(
                    eqn.outvars,
                    results,
                    strict=True,
                )
            )
        return [known(v) for v in jaxpr.outvars]

    def _equation(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> list[Any]:
        name = eqn.primitive.name
        nothing = [None] * len(eqn.outvars)
        if all(fact is None for fact in facts) and name != "iota":
            return nothing
        if name in CALLS and CALLS[name] in eqn.params:
            inner = eqn.params[CALLS[name]]
            closed = isinstance(inner, ClosedJaxpr)
            jaxpr = inner.jaxpr if closed else inner
            if len(jaxpr.invars) != len(facts):
                return nothing
            consts = inner.consts if closed else ()
            return self.follow(
                jaxpr,
                facts,
                consts,
                (*callers, eqn),
            )
        if name == "scan":
            return self._scan(eqn, facts, callers)
        if name == "cond":
            self._cond(eqn, facts, callers)
            return nothing
        if name == "gather":
            self._gather(eqn, facts, callers)
            return nothing
        if name == "dynamic_slice":
            self._dynamic_slice(eqn, facts, callers)
            return nothing
        if name == "split" and isinstance(facts[0], Followed):
            return self._split(eqn, facts[0])
        if len(eqn.outvars) != 1 and name != "optimization_barrier":
            return nothing
        if name == "optimization_barrier":
            return facts
        return [self._result(name, eqn, facts, callers)]

    def _result(
        self,
        name: str,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> Any:
        """Knowledge of the one result of an operation."""
        first = facts[0] if facts else None
        if name == "iota":
            dim = eqn.params["dimension"]
            return Counter(eqn.params["shape"][dim], dim)
        if name in COMPARISONS:
            return self._comparison(name, eqn, facts, callers)
        if name == "add":
            return _shifted(facts)
        if name == "select_n":
            return self._select(facts)
        if name == "concatenate":
            return _concatenated(eqn, facts)
        if name == "pad" and isinstance(first, Followed):
            return _padded(eqn, first)
        if isinstance(first, Constant) and name in ("broadcast_in_dim", *UNCHANGED):
            return first
        if isinstance(first, Parameter) and name in UNCHANGED:
            return first
        if isinstance(first, Counter):
            return _moved_counter(name, eqn, first)
        if not isinstance(first, Followed):
            return None
        if name == "convert_element_type" and eqn.params["new_dtype"] == np.bool_:
            return None
        places = _moved(name, eqn, first)
        return None if places is None else replace(first, places=places)

    # ---- operations ----

    def _comparison(
        self,
        name: str,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> Any:
        pair = _with_constant(facts)
        if pair is not None:
            source, number = pair
            if source.wrapped is not None:
                return None
            mirrored = isinstance(facts[0], Constant)
            seen = Compared(
                source,
                MIRRORED[name] if mirrored else name,
                float(number),
            )
            self.compared.append(seen)
            return seen
        kinds = {type(fact): fact for fact in facts}
        if name == "eq" and kinds.keys() == {Followed, Counter}:
            self._one_hot(
                eqn,
                kinds[Followed],
                kinds[Counter],
                callers,
            )
        return None

    def _one_hot(
        self,
        eqn: Any,
        source: Followed,
        counter: Counter,
        callers: tuple,
    ) -> None:
        """A leaf set against 0, 1, ...: each of its values is one column."""
        if source.wrapped is not None:
            return
        if not source.bag:
            along = np.take(
                source.places,
                [0],
                axis=counter.dim,
            )
            if not (source.places == along).all():  # set against its own positions
                return
        # Negative values are a common way to say "no class", which gives zeros.
        self._limit(
            eqn,
            source,
            source.places,
            counter.size,
            None,
            callers,
            True,
        )

    def _select(self, facts: list[Any]) -> Any:
        """jnp's own i -> i < 0 ? i + size : i."""
        if len(facts) != 3:
            return None
        seen, plain, shifted = facts
        if not isinstance(seen, Compared) or not isinstance(shifted, Shifted):
            return None
        if not isinstance(plain, Followed) or (seen.name, seen.number) != ("lt", 0):
            return None
        if not plain.leaf == seen.source.leaf == shifted.source.leaf:
            return None
        if not np.array_equal(plain.places, shifted.source.places):
            return None
        seen.own = False
        return replace(plain, wrapped=shifted.by)

    def _gather(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> None:
        """A lookup: each component of its index vectors has the range of a dim."""
        operand, indices = facts[:2]
        if _chosen_mode(eqn):
            return
        shape = eqn.invars[0].aval.shape
        sizes = eqn.params["slice_sizes"]
        dims = eqn.params["dimension_numbers"].start_index_map
        for number, dim in enumerate(dims):
            part = _component(indices, number, len(dims))
            if part is None:
                continue
            size = shape[dim] - sizes[dim] + 1
            if part.wrapped in (None, size):
                table = operand.path if isinstance(operand, Parameter) else None
                self._limit(
                    eqn,
                    part,
                    part.places,
                    size,
                    table,
                    callers,
                    False,
                )

    def _dynamic_slice(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> None:
        """How jnp's indexing by one number looks it up, in a loop over samples."""
        shape = eqn.invars[0].aval.shape
        sizes = eqn.params["slice_sizes"]
        table = facts[0].path if isinstance(facts[0], Parameter) else None
        for dim, start in enumerate(facts[1:]):
            one = sizes[dim] == 1 and isinstance(start, Followed)
            if one and start.wrapped == shape[dim]:
                places = start.places
                size = shape[dim]
                self._limit(
                    eqn,
                    start,
                    places,
                    size,
                    table,
                    callers,
                    False,
                )

    def _limit(
        self,
        eqn: Any,
        source: Followed,
        places: np.ndarray,
        size: int,
        table: str | None,
        callers: tuple,
        negative: bool,
    ) -> None:
        if not self._certain:
            return
        used = places[places != OTHER]
        used = np.unique(used % self._sizes[source.leaf])
        if not used.size:
            return
        line = source_line(eqn, callers)
        line = "" if of_a_library(line) else f" ({line})"
        if table is not None:
            why = f"the model looks them up in {table!r}, which has {size} rows"
            remedy = f"fix the values, or give {table!r} more rows"
        elif source.leaf.startswith("targets"):
            why = f"there are {size} classes{line}"
            remedy = "fix the labels, or give the model more outputs"
            if not negative:
                remedy += (
                    "; for labels that do not count, let the loss return a pair "
                    "(values, labels >= 0)"
                )
        else:
            why = f"they choose one of {size}{line}"
            remedy = "fix the values, or make room for them in the model"
        whole = len(used) == self._sizes[source.leaf]
        columns = None if whole else tuple(used.tolist())
        self.found.append(
            Limit(
                source.leaf,
                size,
                why,
                remedy,
                columns,
                negative,
            )
        )

    def _scan(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> list[Any]:
        consts, carried = scan_counts(eqn)
        inner = list(facts)
        for number, fact in enumerate(facts):
            if consts <= number < consts + carried:
                inner[number] = None
            elif number >= consts + carried:
                inner[number] = _any_of(fact)
        body = eqn.params["jaxpr"]
        results = self.follow(
            body.jaxpr,
            inner,
            body.consts,
            (*callers, eqn),
        )
        stacked = [x if isinstance(x, Followed) and x.bag else None for x in results]
        return [None] * carried + stacked[carried:]

    def _cond(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> None:
        """Branches may not run; what they compare is still the person's plan."""
        before = self._certain
        self._certain = False
        for branch in eqn.params["branches"]:
            self.follow(
                branch.jaxpr,
                facts[1:],
                branch.consts,
                (*callers, eqn),
            )
        self._certain = before

    def _split(
        self,
        eqn: Any,
        source: Followed,
    ) -> list[Any]:
        if source.bag:
            return [None] * len(eqn.outvars)
        ends = np.cumsum(eqn.params["sizes"])[:-1]
        parts = np.split(
            source.places,
            ends,
            axis=eqn.params["axis"],
        )
        return [replace(source, places=part) for part in parts]


# ---- internals ----


def _chosen_mode(eqn: Any) -> bool:
    """Whether the person's code says what a lookup out of range gives."""
    p = eqn.params
    mode = str(p["mode"])
    if mode.endswith("CLIP"):
        # jnp's x[i] under vmap is a slice, which clips without having been asked to
        sliced = not p["dimension_numbers"].collapsed_slice_dims
        return not (sliced and p["unique_indices"] and p["indices_are_sorted"])
    fill = p["fill_value"]
    if not mode.endswith("FILL_OR_DROP") or fill is None:
        return False
    dtype = eqn.invars[0].aval.dtype
    if np.issubdtype(dtype, np.signedinteger):
        return bool(fill != np.iinfo(dtype).min)
    if np.issubdtype(dtype, np.unsignedinteger):
        return bool(fill != np.iinfo(dtype).max)
    return not np.isnan(fill)


def _with_constant(facts: list[Any]) -> tuple[Followed, Any] | None:
    """The followed one and the constant of two operands."""
    kinds = {type(fact): fact for fact in facts}
    if len(facts) != 2 or kinds.keys() != {Followed, Constant}:
        return None
    return kinds[Followed], kinds[Constant].number


def _shifted(facts: list[Any]) -> Shifted | None:
    pair = _with_constant(facts)
    if pair is None or pair[0].wrapped is not None:
        return None
    whole = float(pair[1]).is_integer()
    return Shifted(pair[0], int(pair[1])) if whole else None


def _any_of(fact: Any) -> Any:
    """Knowledge of one step's part of an array that a loop runs along."""
    if not isinstance(fact, Followed):
        return None
    return replace(
        fact,
        places=np.unique(fact.places),
        bag=True,
    )


def _component(
    indices: Any,
    number: int,
    count: int,
) -> Followed | None:
    """One component of index vectors, which lie along the last dim."""
    if isinstance(indices, Columns):
        part = indices.parts[number] if len(indices.parts) == count else None
        return part if isinstance(part, Followed) else None
    if not isinstance(indices, Followed):
        return None
    if count == 1:
        return indices
    if indices.bag:
        return None
    return replace(indices, places=indices.places[..., number])


def _moved(
    name: str,
    eqn: Any,
    source: Followed,
) -> np.ndarray | None:
    """The places after an operation that only moves values, or None if it is
    another.
    """
    p = eqn.params
    shape = eqn.outvars[0].aval.shape
    if name in UNCHANGED:
        return source.places
    if source.bag:
        kept = {"reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose"}
        return source.places if name in kept else None
    if name in ("reshape", "squeeze", "expand_dims"):
        reordered = name == "reshape" and p["dimensions"] is not None
        return None if reordered else source.places.reshape(shape)
    if name == "transpose":
        return source.places.transpose(p["permutation"])
    if name == "broadcast_in_dim":
        between = [1] * len(shape)
        for dim, target in enumerate(p["broadcast_dimensions"]):
            between[target] = source.places.shape[dim]
        return np.broadcast_to(source.places.reshape(between), shape)
    if name == "slice":
        strides = p["strides"] or (1,) * len(shape)
        bounds = zip(
            p["start_indices"],
            p["limit_indices"],
            strides,
            strict=True,
        )
        return source.places[tuple(slice(*bound) for bound in bounds)]
    if name == "rev":
        return np.flip(source.places, p["dimensions"])
    return None


def _moved_counter(
    name: str,
    eqn: Any,
    counter: Counter,
) -> Counter | None:
    """A counter after an operation that only moves it."""
    shape = eqn.outvars[0].aval.shape
    if name in UNCHANGED:
        return counter
    if name == "broadcast_in_dim":
        return Counter(counter.size, eqn.params["broadcast_dimensions"][counter.dim])
    if name in ("reshape", "squeeze", "expand_dims"):
        long = [dim for dim, extent in enumerate(shape) if extent != 1]
        return Counter(counter.size, long[0]) if len(long) == 1 else None
    return None


def _concatenated(eqn: Any, facts: list[Any]) -> Any:
    """Index vectors from their components, or a leaf with other values around it."""
    dim = eqn.params["dimension"]
    shapes = [v.aval.shape for v in eqn.invars]
    if dim == len(shapes[0]) - 1 and all(shape[dim] == 1 for shape in shapes):
        return Columns(tuple(facts))
    first = next((fact for fact in facts if isinstance(fact, Followed)), None)
    if first is None:
        return None

    parts = []
    for fact, shape in zip(facts, shapes, strict=True):
        same = isinstance(fact, Followed) and not fact.bag and fact.leaf == first.leaf
        if same and fact.wrapped == first.wrapped:
            parts.append(fact.places)
        else:
            parts.append(np.full(shape, OTHER, np.int32))
    if first.bag:
        return None
    return replace(first, places=np.concatenate(parts, axis=dim))


def _padded(eqn: Any, source: Followed) -> Followed | None:
    """A leaf moved along, such as the tokens before the next ones."""
    config = eqn.params["padding_config"]
    if source.bag or any(between for _, _, between in config):
        return None
    more = [(max(low, 0), max(high, 0)) for low, high, _ in config]
    places = np.pad(
        source.places,
        more,
        constant_values=OTHER,
    )
    kept = []
    for (low, high, _), extent in zip(config, places.shape, strict=True):
        kept.append(slice(max(-low, 0), extent - max(-high, 0)))
    return replace(source, places=places[tuple(kept)])
