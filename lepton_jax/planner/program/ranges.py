"""The whole numbers that a model and its loss can take from the data.

They are read off the program. Each integer leaf of the samples is followed to where it
becomes an index, as long as its values stay what they are:

    >>> import jax, jax.numpy as jnp
    >>> def embed(tokens, table):
    ...     return table[tokens[:, :5].reshape(-1)]
    >>> tokens = jax.ShapeDtypeStruct((8, 6), jnp.int32)
    >>> table = jax.ShapeDtypeStruct((50, 16), jnp.float32)
    >>> program = jax.make_jaxpr(embed)(tokens, table)

The slice and the reshape move the tokens, each of which then chooses one of 50 rows.
The last column is not looked at:

    >>> facts = [_known_of_argument("inputs", tokens), Parameter("embed")]
    >>> search = _Search({"inputs": 6})
    >>> _ = search.follow(program.jaxpr, facts, program.consts, ())
    >>> limit, = search.limits()
    >>> limit.size, limit.columns
    (50, (0, 1, 2, 3, 4))

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

from lepton_jax.compat import Literal, scan_counts, source_line
from lepton_jax.data import Limit
from lepton_jax.errors import of_a_library
from lepton_jax.planner.program.graph import CALLS, opened
from lepton_jax.planner.program.trace import Trace
from lepton_jax.step.training_loss import ARGUMENTS, argument_paths
from lepton_jax.trees import by_path

# Elements of a batch above which the places are not followed one by one, so that a
# slice of the leaf loses its bound. 16 MiB of int32; assumption.
MOST_PLACES = 2**22

# Primitives that leave the values of their first operand where and what they are.
UNCHANGED = {
    "copy",
    "copy_p",
    "convert_element_type",
    "layout_constraint",
    "name",
    "optimization_barrier",
    "sharding_constraint",
    "stop_gradient",
}

# Primitives that move all values, and keep what they are.
MOVING = {"reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose"}

# Each comparison, and the one that means the same with its operands exchanged.
MIRRORED = {
    "lt": "gt",
    "le": "ge",
    "gt": "lt",
    "ge": "le",
    "eq": "eq",
    "ne": "ne",
}

OTHER = -1  # a place that holds no value of the leaf


# ---- what is known of a value ----


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
    """A scalar that the program holds."""

    number: Any


@dataclass(frozen=True)
class Counter:
    """The numbers 0, 1, ..., size - 1 along one dim."""

    size: int
    dim: int


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model."""

    path: str


@dataclass(frozen=True, eq=False)
class Columns:
    """Index vectors, by their components."""

    parts: tuple[Any, ...]


def limits(trace: Trace) -> list[Limit]:
    """Return the ranges that a recipe's program sets for its samples' integer leaves.

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
    leaves = jax.tree.leaves(arguments)
    facts = list(map(_known_of_argument, paths, leaves))

    sizes = {}
    samples = by_path({"inputs": trace.inputs, "targets": trace.targets})
    for path, leaf in samples.items():
        sizes[path] = math.prod(leaf.shape[1:])
    search = _Search(sizes)
    program = trace.jaxpr
    search.follow(program.jaxpr, facts, program.consts, ())
    return search.limits()


def _known_of_argument(path: str, leaf: Any) -> Any:
    if path.startswith("params"):
        return Parameter(path.removeprefix("params/"))
    if not path.startswith(("inputs", "targets")) or leaf.dtype.kind not in "iu":
        return None
    count = math.prod(leaf.shape)
    if count > MOST_PLACES:
        of_a_sample = math.prod(leaf.shape[1:])
        places = np.arange(of_a_sample, dtype=np.int32)
        return Followed(path, places, bag=True)
    places = np.arange(count, dtype=np.int32)
    return Followed(path, places.reshape(leaf.shape))


# ---- the search ----


@dataclass(frozen=True)
class _Use:
    """A place in the program where values of a leaf must be below a size.

    Attributes:
      eqn: the equation.
      callers: the calls around it.
      source: the leaf and the places whose values are used.
      size: the values must be below it.
      table: path of the parameter that they are looked up in, if it is one.
      negative: whether negative values are meant too.
    """

    eqn: Any
    callers: tuple
    source: Followed
    size: int
    table: str | None = None
    negative: bool = False


class _Search:
    """Follows the leaves through a program and collects what bounds them.

    Args:
      sizes: the number of values in a sample of each leaf.
    """

    def __init__(
        self,
        sizes: dict[str, int],
    ) -> None:
        self._sizes = sizes
        self._limits: list[Limit] = []
        self._compared: list[Compared] = []
        self._certain = True  # whether the equations looked at run in every step

    def limits(self) -> list[Limit]:
        """Return the lowest limits, less what the person's code looks out for."""
        lowest: dict[tuple, Limit] = {}
        for limit in self._limits:
            key = (limit.path, limit.columns, limit.negative)
            if key not in lowest or limit.size < lowest[key].size:
                lowest[key] = limit
        return [self._spare(limit) for limit in lowest.values()]

    def _spare(self, limit: Limit) -> Limit:
        """Let values through for which the person's code has plans."""
        for comparison in self._compared:
            if not comparison.own or comparison.source.leaf != limit.path:
                continue
            number = comparison.number
            if comparison.name in ("eq", "ne"):
                if number.is_integer():
                    spared = (*limit.spared, int(number))
                    limit = replace(limit, spared=spared)
                continue
            # "< c" and ">= c" part the numbers before c from the rest; "<= c" and
            # "> c" part those before c + 1
            bound = number + (comparison.name in ("le", "gt"))
            if bound == 0:
                limit = replace(limit, negative=True)
            elif bound == limit.size:
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
        """Look at all equations of a jaxpr.

        Args:
          jaxpr: the jaxpr.
          facts: what is known of its inputs.
          consts: its constants.
          callers: the calls around it.

        Returns:
          What is known of its results.
        """
        env: dict[Any, Any] = dict(
            zip(
                jaxpr.invars,
                facts,
                strict=True,
            )
        )
        pairs = zip(jaxpr.constvars, consts, strict=True)
        for variable, const in pairs:
            env[variable] = _known_of_constant(const)

        def known(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return _known_of_constant(atom.val)
            return env.get(atom)

        for eqn in jaxpr.eqns:
            operands = [known(atom) for atom in eqn.invars]
            results = self._equation(eqn, operands, callers)
            env.update(zip(eqn.outvars, results, strict=True))
        return [known(atom) for atom in jaxpr.outvars]

    def _equation(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> list[Any]:
        """Return what is known of an equation's results."""
        name = eqn.primitive.name
        nothing = [None] * len(eqn.outvars)
        if all(fact is None for fact in facts) and name != "iota":
            return nothing
        if name in CALLS and CALLS[name] in eqn.params:
            return self._call(eqn, facts, callers)
        if name == "scan":
            return self._scan(eqn, facts, callers)
        if name == "split" and isinstance(facts[0], Followed):
            return _split(eqn, facts[0])
        if name == "optimization_barrier":
            return facts

        look = {
            "cond": self._cond,
            "gather": self._gather,
            "dynamic_slice": self._dynamic_slice,
        }.get(name)
        if look is not None:
            look(eqn, facts, callers)
            return nothing
        if len(eqn.outvars) != 1:
            return nothing
        return [self._result(eqn, facts, callers)]

    def _result(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> Any:
        """Return what is known of the one result of an operation."""
        name = eqn.primitive.name
        if name == "iota":
            dim = eqn.params["dimension"]
            return Counter(eqn.params["shape"][dim], dim)
        if name in MIRRORED:
            return self._comparison(eqn, facts, callers)
        if name == "add":
            return _shifted(facts)
        if name == "select_n":
            return _selected(facts)
        if name == "concatenate":
            return _concatenated(eqn, facts)
        return _known_after(eqn, facts[0])

    # ---- calls, loops and branches ----

    def _call(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> list[Any]:
        parameter = CALLS[eqn.primitive.name]
        jaxpr, consts = opened(eqn.params[parameter])
        if len(jaxpr.invars) != len(facts):
            return [None] * len(eqn.outvars)
        return self.follow(
            jaxpr,
            facts,
            consts,
            (*callers, eqn),
        )

    def _scan(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> list[Any]:
        consts, carried = scan_counts(eqn)
        sliced = facts[consts + carried :]
        inside = [
            *facts[:consts],
            *[None] * carried,
            *map(_known_of_slice, sliced),
        ]
        body = eqn.params["jaxpr"]
        callers = (*callers, eqn)
        results = self.follow(
            body.jaxpr,
            inside,
            body.consts,
            callers,
        )

        # a bag stays one when it is stacked; of others the places would have to be
        outside: list[Any] = [None] * carried
        for fact in results[carried:]:
            is_bag = isinstance(fact, Followed) and fact.bag
            outside.append(fact if is_bag else None)
        return outside

    def _cond(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> None:
        """Look at branches, which may not run.

        They set no limits, but what they compare is still the person's plan.
        """
        before = self._certain
        self._certain = False
        callers = (*callers, eqn)
        for branch in eqn.params["branches"]:
            self.follow(
                branch.jaxpr,
                facts[1:],
                branch.consts,
                callers,
            )
        self._certain = before

    # ---- comparisons ----

    def _comparison(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> Compared | None:
        name = eqn.primitive.name
        pair = _with_constant(facts)
        if pair is not None:
            source, number = pair
            if source.wrapped is not None:
                return None
            if isinstance(facts[0], Constant):
                name = MIRRORED[name]
            comparison = Compared(source, name, float(number))
            self._compared.append(comparison)
            return comparison

        kinds = {type(fact): fact for fact in facts}
        if name == "eq" and kinds.keys() == {Followed, Counter}:
            source = kinds[Followed]
            if _makes_one_hot(source, kinds[Counter]):
                size = kinds[Counter].size
                # negative values are a common way to say "no class": they give zeros
                use = _Use(eqn, callers, source, size, negative=True)
                self._limit(use)
        return None

    # ---- lookups ----

    def _gather(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> None:
        """Limit each component of a lookup's index vectors by the dim that it is in."""
        if _chosen_mode(eqn):
            return
        operand, indices = facts[:2]
        table = operand.path if isinstance(operand, Parameter) else None
        shape = eqn.invars[0].aval.shape
        sizes = eqn.params["slice_sizes"]
        dims = eqn.params["dimension_numbers"].start_index_map
        for number, dim in enumerate(dims):
            part = _component(indices, number, len(dims))
            if part is None:
                continue
            size = shape[dim] - sizes[dim] + 1
            if part.wrapped in (None, size):
                self._limit(_Use(eqn, callers, part, size, table))

    def _dynamic_slice(
        self,
        eqn: Any,
        facts: list[Any],
        callers: tuple,
    ) -> None:
        """Limit the number by which jnp's indexing looks up, in a loop over samples."""
        operand, *starts = facts
        table = operand.path if isinstance(operand, Parameter) else None
        shape = eqn.invars[0].aval.shape
        sizes = eqn.params["slice_sizes"]
        for dim, start in enumerate(starts):
            if sizes[dim] != 1 or not isinstance(start, Followed):
                continue
            if start.wrapped == shape[dim]:
                self._limit(
                    _Use(
                        eqn,
                        callers,
                        start,
                        shape[dim],
                        table,
                    )
                )

    # ---- limits ----

    def _limit(self, use: _Use) -> None:
        """Note the limit that a use sets, unless the use may not run."""
        if not self._certain:
            return
        leaf = use.source.leaf
        places = use.source.places
        values_of_a_sample = self._sizes[leaf]
        columns = np.unique(places[places != OTHER] % values_of_a_sample)
        if not columns.size:
            return
        why, remedy = _explained(use)
        whole = len(columns) == values_of_a_sample
        self._limits.append(
            Limit(
                leaf,
                use.size,
                why,
                remedy,
                None if whole else tuple(columns.tolist()),
                use.negative,
            )
        )


def _explained(
    use: _Use,
) -> tuple[str, str]:
    """Return why the values of a use are limited, and what to do about others."""
    if use.table is not None:
        return (
            f"the model looks them up in {use.table!r}, which has {use.size} rows",
            f"fix the values, or give {use.table!r} more rows",
        )

    line = source_line(use.eqn, use.callers)
    where = "" if of_a_library(line) else f" ({line})"
    if use.source.leaf.startswith("targets"):
        remedy = "fix the labels, or give the model more outputs"
        if not use.negative:
            remedy += (
                "; for labels that do not count, let the loss return a pair "
                "(values, labels >= 0)"
            )
        return f"there are {use.size} classes{where}", remedy
    return (
        f"they choose one of {use.size}{where}",
        "fix the values, or make room for them in the model",
    )


# ---- operations ----


def _known_of_constant(const: Any) -> Constant | None:
    return Constant(const) if np.ndim(const) == 0 else None


def _known_of_slice(fact: Any) -> Any:
    """Return what is known of one step's part of an array that a loop runs along."""
    if not isinstance(fact, Followed):
        return None
    places = np.unique(fact.places)
    return replace(fact, places=places, bag=True)


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

    # jnp's own fill values: the least, the largest, or NaN
    dtype = eqn.invars[0].aval.dtype
    if np.issubdtype(dtype, np.signedinteger):
        return bool(fill != np.iinfo(dtype).min)
    if np.issubdtype(dtype, np.unsignedinteger):
        return bool(fill != np.iinfo(dtype).max)
    return not np.isnan(fill)


def _with_constant(
    facts: list[Any],
) -> tuple[Followed, Any] | None:
    """Return the followed one and the constant of two operands."""
    kinds = {type(fact): fact for fact in facts}
    if len(facts) != 2 or kinds.keys() != {Followed, Constant}:
        return None
    return kinds[Followed], kinds[Constant].number


def _shifted(
    facts: list[Any],
) -> Shifted | None:
    pair = _with_constant(facts)
    if pair is None:
        return None
    source, number = pair
    if source.wrapped is not None or not float(number).is_integer():
        return None
    return Shifted(source, int(number))


def _selected(
    facts: list[Any],
) -> Followed | None:
    """Look through jnp's own i -> i < 0 ? i + size : i."""
    if len(facts) != 3:
        return None
    comparison, plain, shifted = facts
    if not isinstance(comparison, Compared) or not isinstance(plain, Followed):
        return None
    if not isinstance(shifted, Shifted):
        return None
    if (comparison.name, comparison.number) != ("lt", 0):
        return None
    if not plain.leaf == comparison.source.leaf == shifted.source.leaf:
        return None
    if not np.array_equal(plain.places, shifted.source.places):
        return None
    comparison.own = False
    return replace(plain, wrapped=shifted.by)


def _makes_one_hot(source: Followed, counter: Counter) -> bool:
    """Whether a leaf set against 0, 1, ... makes each of its values a column."""
    if source.wrapped is not None:
        return False
    if source.bag:
        return True
    # a leaf that differs along the counter is set against its own positions
    along = np.take(
        source.places,
        [0],
        axis=counter.dim,
    )
    return bool((source.places == along).all())


def _component(
    indices: Any,
    number: int,
    count: int,
) -> Followed | None:
    """Return one component of index vectors, which lie along the last dim."""
    if isinstance(indices, Columns):
        if len(indices.parts) != count:
            return None
        part = indices.parts[number]
        return part if isinstance(part, Followed) else None
    if not isinstance(indices, Followed):
        return None
    if count == 1:
        return indices
    if indices.bag:
        return None
    return replace(indices, places=indices.places[..., number])


def _split(
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


def _concatenated(
    eqn: Any,
    facts: list[Any],
) -> Any:
    """Return index vectors from their components, or a leaf among other values."""
    dim = eqn.params["dimension"]
    shapes = [atom.aval.shape for atom in eqn.invars]
    last = len(shapes[0]) - 1
    if dim == last and all(shape[dim] == 1 for shape in shapes):
        return Columns(tuple(facts))
    first = next((fact for fact in facts if isinstance(fact, Followed)), None)
    if first is None or first.bag:
        return None

    parts = []
    for fact, shape in zip(facts, shapes, strict=True):
        if _goes_with(fact, first):
            parts.append(fact.places)
        else:
            parts.append(np.full(shape, OTHER, np.int32))
    return replace(first, places=np.concatenate(parts, axis=dim))


def _goes_with(fact: Any, first: Followed) -> bool:
    """Whether a fact is of the same leaf as another one, and its places are known."""
    if not isinstance(fact, Followed) or fact.bag:
        return False
    return fact.leaf == first.leaf and fact.wrapped == first.wrapped


# ---- operations that only move values ----


def _known_after(eqn: Any, fact: Any) -> Any:
    """Return what is known of a moved, padded or cast value."""
    name = eqn.primitive.name
    if isinstance(fact, Constant):
        moved = name in UNCHANGED or name == "broadcast_in_dim"
        return fact if moved else None
    if isinstance(fact, Parameter):
        return fact if name in UNCHANGED else None
    if isinstance(fact, Counter):
        return _moved_counter(eqn, fact)
    if not isinstance(fact, Followed):
        return None
    if name == "pad":
        return _padded(eqn, fact)
    if name == "convert_element_type" and eqn.params["new_dtype"] == np.bool_:
        return None
    move = _moved_bag if fact.bag else _moved
    places = move(eqn, fact.places)
    return None if places is None else replace(fact, places=places)


def _moved_bag(
    eqn: Any,
    places: np.ndarray,
) -> np.ndarray | None:
    """Return the places of a bag after an operation (see `_moved`)."""
    name = eqn.primitive.name
    return places if name in UNCHANGED or name in MOVING else None


def _moved(
    eqn: Any,
    places: np.ndarray,
) -> np.ndarray | None:
    """Return the places after an operation; None if it does more than move values."""
    name = eqn.primitive.name
    p = eqn.params
    shape = eqn.outvars[0].aval.shape
    if name in UNCHANGED:
        return places
    if name == "reshape" and p["dimensions"] is not None:
        return None
    if name in ("reshape", "squeeze", "expand_dims"):
        return places.reshape(shape)
    if name == "transpose":
        return places.transpose(p["permutation"])
    if name == "broadcast_in_dim":
        between = [1] * len(shape)
        for dim, target in enumerate(p["broadcast_dimensions"]):
            between[target] = places.shape[dim]
        return np.broadcast_to(places.reshape(between), shape)
    if name == "slice":
        strides = p["strides"] or (1,) * len(shape)
        bounds = zip(
            p["start_indices"],
            p["limit_indices"],
            strides,
            strict=True,
        )
        return places[tuple(slice(*bound) for bound in bounds)]
    if name == "rev":
        return np.flip(places, p["dimensions"])
    return None


def _moved_counter(
    eqn: Any,
    counter: Counter,
) -> Counter | None:
    """Return a counter after an operation; None if it does more than move it."""
    name = eqn.primitive.name
    shape = eqn.outvars[0].aval.shape
    if name in UNCHANGED:
        return counter
    if name == "broadcast_in_dim":
        dim = eqn.params["broadcast_dimensions"][counter.dim]
        return Counter(counter.size, dim)
    if name in ("reshape", "squeeze", "expand_dims"):
        long = [dim for dim, extent in enumerate(shape) if extent != 1]
        if len(long) == 1:
            return Counter(counter.size, long[0])
    return None


def _padded(
    eqn: Any,
    source: Followed,
) -> Followed | None:
    """Return a leaf moved along, such as the tokens before the next ones."""
    config = eqn.params["padding_config"]
    if source.bag or any(between for _, _, between in config):
        return None
    places = source.places
    for dim, (low, high, _) in enumerate(config):
        added = [(0, 0)] * len(config)
        added[dim] = (max(low, 0), max(high, 0))
        places = np.pad(places, added, constant_values=OTHER)
        # negative padding cuts off
        first = max(-low, 0)
        last = places.shape[dim] - max(-high, 0)
        places = np.take(
            places,
            range(first, last),
            axis=dim,
        )
    return replace(source, places=places)
