"""Channels: the dims of a model's weights that can only be cut together.

The columns of one weight are the rows of the next. Which dims belong together is read
off the traced program. Each dim of each value has a label; an operation says which of
its labels are the same one:

    h = relu(x @ a + b)     x (batch, 4)   a (4, 16)   b (16)
    y = h @ c               h (batch, 16)  c (16, 3)

    x @ a  contracts:     x.1 = a.0          h.1 = a.1
    + b    adds:          h.1 = b.0
    h @ c  contracts:     h.1 = c.0          y.1 = c.1

The label of a.1, b.0 and c.0 is neither one of the inputs nor of the outputs: 16
channels, of which any can be cut if their entries go in all three.

A flattened picture (batch, 7 * 7 * 64) has a dim of three labels, so that a channel of
the convolution before is known to be each 64th row of the product after it (Fang et al.
2023, "DepGraph: Towards Any Structural Pruning", does so by the layers of a graph).

What an operation does that is not known here fixes the labels that it touches: they
are not cut. So does a sum over them, such as that of a layer norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from lepton_jax.compat import Literal
from lepton_jax.planner.program.rules import ELEMENTWISE, REDUCTIONS
from lepton_jax.ship.programs import called_jaxpr
from lepton_jax.ship.shrink.calls import called
from lepton_jax.ship.shrink.packed import name_of

Dim = tuple[int, ...]  # labels, outermost first
Dims = list[Dim]  # of a value
Operands = list[Dims]

# Operations that take dims out of their operand.
REDUCED = frozenset(("argmax", "argmin", *REDUCTIONS))


@dataclass(frozen=True)
class Place:
    """A dim of a weight that has channels.

    Attributes:
      path: of the weight.
      dim: of it.
      outer: entries of the dim's labels outside of the channels: the dim is
        (outer, channels, inner).
      inner: entries of those inside of them.
    """

    path: str
    dim: int
    outer: int
    inner: int


@dataclass(frozen=True)
class Channels:
    """Channels that can be cut.

    Attributes:
      name: of the first weight that makes them.
      size: how many there are.
      places: the dims that have them.
    """

    name: str
    size: int
    places: tuple[Place, ...]


def channels_of(
    module: nnx.Module,
    inputs: Any,
) -> list[Channels]:
    """Return the channels of a module that can be cut, in the order of its weights.

    Args:
      module: in evaluation.
      inputs: a batch of it.
    """
    graph, state = nnx.split(module)
    paths = [name_of(path) for path, _ in nnx.to_flat_state(state)]

    def call(
        state: Any,
        inputs: Any,
    ) -> Any:
        merged = nnx.merge(graph, state, copy=True)
        return called(merged, inputs)

    program = jax.make_jaxpr(call)(state, inputs).jaxpr
    labels = Labels()
    reader = Reader(labels)
    shapes = [x.aval.shape for x in program.invars]
    arguments = [labels.of(shape) for shape in shapes]
    weights = arguments[: len(paths)]
    for dims in arguments[len(paths) :]:
        labels.fix(dims)
    outputs = reader.read(program, arguments, [])
    for dims in outputs:
        labels.fix(dims)
    pairs = zip(paths, weights, strict=True)
    dims_of = dict(pairs)
    return _collected(labels, dims_of)


def _collected(
    labels: Labels,
    weights: Mapping[str, Sequence[Dim]],
) -> list[Channels]:
    places: dict[int, list[Place]] = {}
    for path, dims in weights.items():
        for number, dim in enumerate(dims):
            resolved = labels.resolved(dim)
            extents = [labels.sizes[label] for label in resolved]
            for at, label in enumerate(resolved):
                outer = math.prod(extents[:at])
                inner = math.prod(extents[at + 1 :])
                place = Place(path, number, outer, inner)
                places.setdefault(label, []).append(place)
    found = []
    for label, own in places.items():
        if label in labels.fixed or len(own) == 1:
            continue
        size = labels.sizes[label]
        found.append(Channels(_name(own), size, tuple(own)))
    return found


def _name(places: Sequence[Place]) -> str:
    """Return the path of the layer whose outputs the channels are."""
    last_dims = [place for place in places if place.inner == 1]
    makers = [place for place in last_dims if place.dim]
    path = (makers or places)[0].path
    layer, _, _ = path.rpartition("/")
    return layer or path


# ---- labels ----


class Labels:
    """Labels of dims, some of which are the same, and some of which consist of others.

    Attributes:
      sizes: extent of each label.
      fixed: labels that can't be cut.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.fixed: set[int] = set()
        self._same: list[int] = []
        self._parts: dict[int, Dim] = {}

    def new(
        self,
        size: int,
        fixed: bool = False,
    ) -> Dim:
        """Return a dim with a label of its own; one of extent 1 has none."""
        if size == 1:
            return ()
        label = len(self.sizes)
        self.sizes.append(size)
        self._same.append(label)
        if fixed:
            self.fixed.add(label)
        return (label,)

    def of(
        self,
        shape: Iterable[int],
        fixed: bool = False,
    ) -> Dims:
        """Return dims of a shape with labels of their own."""
        return [self.new(size, fixed) for size in shape]

    def resolved(self, dim: Dim) -> Dim:
        """Return the labels that stand for a dim's, parts in place of wholes."""
        found: list[int] = []
        for label in dim:
            root = self._root(label)
            parts = self._parts.get(root)
            if parts is None:
                found.append(root)
            else:
                found += self.resolved(parts)
        return tuple(found)

    def fix(
        self,
        dims: Iterable[Dim],
    ) -> None:
        """Say that dims can't be cut."""
        for dim in dims:
            self.fixed.update(self.resolved(dim))

    def unite(
        self,
        one: Dim,
        other: Dim,
    ) -> None:
        """Say that two dims of the same extent are the same one."""
        left = list(self.resolved(one))
        right = list(self.resolved(other))
        while left and right:
            a = left.pop(0)
            b = right.pop(0)
            if self.sizes[a] < self.sizes[b]:
                a, b = b, a
                left, right = right, left
            larger = self.sizes[a]
            smaller = self.sizes[b]
            if larger % smaller:
                self.fix([(a, b, *left, *right)])
                return
            if larger > smaller:
                a, rest = self.split(a, smaller)
                left.insert(0, rest)
            self._join(a, b)

    def split(
        self,
        label: int,
        outer: int,
        fixed: bool = False,
    ) -> tuple[int, int]:
        """Split a label into two, of which the first has the extent `outer`.

        Args:
          label: to split.
          outer: extent of the first.
          fixed: whether the two can't be cut, as where a model's code says by a number
            how it is split, into heads for example.
        """
        is_fixed = fixed or label in self.fixed
        inner = self.sizes[label] // outer
        first = self.new(outer, is_fixed)
        second = self.new(inner, is_fixed)
        self._parts[label] = first + second
        return first[0], second[0]

    def _join(
        self,
        a: int,
        b: int,
    ) -> None:
        a = self._root(a)
        b = self._root(b)
        if a == b:
            return
        self._same[b] = a
        if b in self.fixed:
            self.fixed.add(a)

    def _root(self, label: int) -> int:
        while self._same[label] != label:
            label = self._same[label]
        return label

    def reshaped(
        self,
        dims: Sequence[Dim],
        shape: Sequence[int],
    ) -> Dims:
        """Return the dims of a value after a reshape."""
        left: list[int] = []
        for dim in dims:
            left += self.resolved(dim)
        made = []
        for extent in shape:
            own: list[int] = []
            missing = extent
            while missing > 1:
                label = left.pop(0)
                size = self.sizes[label]
                if size > missing and size % missing == 0:
                    label, rest = self.split(label, missing, fixed=True)
                    left.insert(0, rest)
                elif missing % size:
                    self.fix([*dims, tuple(left), tuple(own)])
                    return self.of(shape, fixed=True)
                missing //= self.sizes[label]
                own.append(label)
            made.append(tuple(own))
        return made


# ---- operations ----


class Reader:
    """A reader of programs: it follows labels through each operation.

    Args:
      labels: to which it adds what it finds.
    """

    def __init__(self, labels: Labels):
        self.labels = labels

    def read(
        self,
        program: Any,
        given: Sequence[Dims],
        constants: Sequence[Any],
    ) -> Operands:
        """Follow a program.

        Args:
          program: a jaxpr.
          given: dims of its inputs.
          constants: its constants, whose dims can't be cut.

        Returns:
          The dims of its outputs.
        """
        known: dict[Any, Dims] = {}
        known.update(zip(program.invars, given, strict=True))
        for constant in program.constvars:
            shape = constant.aval.shape
            known[constant] = self._fixed(shape)

        def look_up(x: Any) -> Dims:
            if not isinstance(x, Literal):
                return known[x]
            return self._fixed(np.shape(x.val))

        for eqn in program.eqns:
            dims = [look_up(x) for x in eqn.invars]
            made = self._followed(eqn, dims)
            known.update(zip(eqn.outvars, made, strict=True))
        return [look_up(x) for x in program.outvars]

    def _fixed(self, shape: Iterable[int]) -> Dims:
        """Return dims of a shape that can't be cut."""
        return self.labels.of(shape, fixed=True)

    def _fix_some(self, dims: Dims, places: Iterable[int]) -> None:
        """Say that some dims of a value can't be cut."""
        self.labels.fix(dims[at] for at in places)

    def _followed(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Operands:
        name = eqn.primitive.name
        inner = called_jaxpr(eqn)
        if inner is not None:
            program, constants = inner
            if len(program.invars) == len(dims):
                return self.read(program, dims, constants)
        if name in ELEMENTWISE:
            return [self._elementwise(eqn, dims) for _ in eqn.outvars]
        if name in REDUCED:
            return [self._reduced(eqn, dims[0])]
        method = getattr(self, f"_{name}", None)
        if method is not None:
            return [method(eqn, dims)]
        if name.startswith("reduce_window"):
            return [self._windowed(eqn, dims[0]) for _ in eqn.outvars]
        return self._unknown(eqn, dims)

    def _unknown(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Operands:
        for own in dims:
            self.labels.fix(own)
        return [self._fixed(x.aval.shape) for x in eqn.outvars]

    def _elementwise(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        """Unite the dims of the operands; one of extent 1 is stretched."""
        made: Dims = []
        arrays = [own for own in dims if own]
        for at, extent in enumerate(_shape(eqn.outvars)):
            alike = [own[at] for own in arrays if own[at]]
            if not alike:
                alike = [self.labels.new(extent)]
            first, *others = alike
            for other in others:
                self.labels.unite(first, other)
            made.append(first)
        return made

    def _reduced(
        self,
        eqn: Any,
        dims: Dims,
    ) -> Dims:
        axes = eqn.params["axes"]
        self._fix_some(dims, axes)
        return _others(dims, axes)

    def _broadcast_in_dim(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        made = self.labels.of(eqn.params["shape"])
        places = eqn.params["broadcast_dimensions"]
        for at, dim in zip(places, dims[0], strict=True):
            if dim:
                made[at] = dim
        return made

    def _reshape(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        shape = _shape(eqn.outvars)
        return self.labels.reshaped(dims[0], shape)

    def _squeeze(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        return _others(dims[0], eqn.params["dimensions"])

    def _transpose(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        [before] = dims
        order = eqn.params["permutation"]
        return [before[at] for at in order]

    def _dot_general(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        left, right = dims[:2]
        contracted, batched = eqn.params["dimension_numbers"]
        of_left = (*contracted[0], *batched[0])
        of_right = (*contracted[1], *batched[1])
        pairs = zip(of_left, of_right, strict=True)
        for a, b in pairs:
            self.labels.unite(left[a], right[b])
        made = [left[at] for at in batched[0]]
        made += _others(left, of_left)
        made += _others(right, of_right)
        return made

    def _conv_general_dilated(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        left, right = dims
        shape = _shape(eqn.outvars)
        numbers = eqn.params["dimension_numbers"]
        is_grouped = (
            eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1
        )
        batch, features, *places = numbers.lhs_spec
        outputs, inputs, *window = numbers.rhs_spec
        self._fix_some(left, places)
        self._fix_some(right, window)
        if is_grouped:
            self._fix_some(left, [features])
            self._fix_some(right, [inputs, outputs])
        else:
            self.labels.unite(left[features], right[inputs])
        made = self._fixed(shape)
        made[numbers.out_spec[0]] = left[batch]
        made[numbers.out_spec[1]] = right[outputs]
        return made

    def _windowed(
        self,
        eqn: Any,
        dims: Dims,
    ) -> Dims:
        """Follow a pooling: dims that its window does not reach over stay."""
        window = eqn.params["window_dimensions"]
        return self._where_unchanged(eqn, dims, window, 1)

    def _slice(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        pairs = zip(_shape(eqn.invars), _shape(eqn.outvars), strict=True)
        changed = [int(before != after) for before, after in pairs]
        operand = dims[0]
        return self._where_unchanged(eqn, operand, changed, 0)

    def _pad(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        config = eqn.params["padding_config"]
        padding = [int(any(own)) for own in config]
        operand = dims[0]
        return self._where_unchanged(eqn, operand, padding, 0)

    def _rev(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        reversed_dims = eqn.params["dimensions"]
        places = range(len(dims[0]))
        changed = [int(at in reversed_dims) for at in places]
        return self._where_unchanged(eqn, dims[0], changed, 0)

    def _concatenate(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        joined = eqn.params["dimension"]
        first, *others = dims
        for own in others:
            pairs = zip(first, own, strict=True)
            for at, (a, b) in enumerate(pairs):
                if at != joined:
                    self.labels.unite(a, b)
        self.labels.fix(own[joined] for own in dims)
        extent = _shape(eqn.outvars)[joined]
        made = list(first)
        made[joined] = self.labels.new(extent, fixed=True)
        return made

    def _gather(
        self,
        eqn: Any,
        dims: Operands,
    ) -> Dims:
        """Follow a look-up: whole rows of a table keep their dims."""
        table, indices = dims
        numbers = eqn.params["dimension_numbers"]
        sizes = eqn.params["slice_sizes"]
        shape = _shape(eqn.invars)
        made = self._fixed(_shape(eqn.outvars))
        if numbers.operand_batching_dims:
            self.labels.fix([*table, *indices])
            return made
        gone = numbers.collapsed_slice_dims
        kept = _others(range(len(shape)), gone)
        self._fix_some(table, gone)
        for at, dim in zip(numbers.offset_dims, kept, strict=True):
            if sizes[dim] == shape[dim]:
                made[at] = table[dim]
            else:
                self.labels.fix([table[dim]])
        batch = _others(range(len(made)), numbers.offset_dims)
        pairs = zip(batch, indices, strict=False)
        for at, own in pairs:
            made[at] = own
        return made

    def _where_unchanged(
        self,
        eqn: Any,
        dims: Dims,
        values: Sequence[int],
        same: int,
    ) -> Dims:
        """Return a value's dims where an operation leaves them, else fixed ones."""
        made = self._fixed(_shape(eqn.outvars))
        for at, value in enumerate(values):
            if value == same:
                made[at] = dims[at]
            else:
                self.labels.fix([dims[at]])
        return made


def _shape(variables: Sequence[Any]) -> tuple[int, ...]:
    """Return the shape of the first of an equation's operands or results."""
    return variables[0].aval.shape


def _others(values: Sequence[Any], places: Iterable[int]) -> list[Any]:
    """Return the values that are not at some places."""
    gone = set(places)
    return [value for at, value in enumerate(values) if at not in gone]
