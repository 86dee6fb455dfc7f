"""Operations that XLA's CPU backend merges, so that they run once.

`jax.checkpoint` puts a barrier before what is computed again. The CPU backend of jaxlib
0.10 removes the barriers and then merges equal operations. Take h = tanh(x @ w), kept
nowhere, in a network without loops:

    h  = tanh(x @ w)            # the forward pass
    x' = barrier(x)             # the same as x
    h' = tanh(x' @ w)           # the same as h: merged

The product runs once, and the memory isn't saved either. What is recomputed in the loop
of a backward pass isn't merged with another loop's.

There are two exceptions, found in compiled programs of MLP-Mixers, temporal
convolutions, ResNets and deep equilibrium models. Before the barriers go, what is
computed from a constant is simplified, such as `x + 0` for a state that begins with
zeros; behind a barrier nobody sees the zeros. And what a reduction gives is broadcast,
as in a normalization or a softmax; XLA moves that by who else reads it. The two then
differ, and so does all that is computed from them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from lepton_jax.planner.program.graph import BARRIER, Operation, Region, Value
from lepton_jax.planner.program.rules import ELEMENTWISE, REDUCTIONS

# Operations whose result is their operand.
PASSING = {BARRIER, "name", "copy", "layout_constraint"}
SPREADING = {"broadcast_in_dim", "iota"}
BROADCASTS = {"broadcast_in_dim", "expand_dims", "reshape"}


def repeated(region: Region) -> set[int]:
    """Return the operations that equal an earlier one of their region.

    Args:
      region: a program; the bodies of its loops are looked at each by itself.

    Returns:
      The index of the first result of each.
    """
    numbering = _Numbering(region)
    found: set[int] = set()
    for op in region.operations:
        for inner in op.regions:
            found |= repeated(inner)
        if not op.regions and op.outputs and numbering.repeats(op):
            found.add(op.outputs[0].index)
    return found


class _Numbering:
    """Gives equal values of a region one number: the index of the first of them."""

    def __init__(self, region: Region):
        self._numbers = _constants(region)
        self._known: dict[Hashable, list[int]] = {}
        # Values that are computed from constants alone, and those of them that come
        # out of a barrier.
        self._fixed = set(self._numbers)
        self._hidden: set[int] = set()
        # Results of reductions, before they are broadcast.
        self._reduced: set[int] = set()

    def repeats(self, op: Operation) -> bool:
        """Number the results of an operation; return whether it equals another."""
        if op.name in PASSING:
            self._pass_on(op)
            return False
        if self._differs(op):
            return False
        self._classify(op)
        key = _key(op, self._numbers)
        own = [value.index for value in op.outputs]
        equal = self._known.setdefault(key, own)
        self._numbers.update(zip(own, equal, strict=True))
        return equal is not own

    def _pass_on(self, op: Operation) -> None:
        for given, value in zip(op.inputs, op.outputs, strict=True):
            if given is None:
                continue
            self._numbers[value.index] = _number(self._numbers, given)
            if given.index in self._fixed | self._hidden:
                self._hidden.add(value.index)
            if given.index in self._reduced:
                self._reduced.add(value.index)

    def _differs(self, op: Operation) -> bool:
        """Whether XLA writes an operation in another form after a barrier."""
        if op.name in ELEMENTWISE:
            return _reads(op, self._hidden)
        return op.name in BROADCASTS and _reads(op, self._reduced)

    def _classify(self, op: Operation) -> None:
        inputs = [value for value in op.inputs if value is not None]
        result = op.outputs[0]
        elementwise = op.name in ELEMENTWISE
        spreads = elementwise or op.name in SPREADING
        if spreads and all(value.index in self._fixed for value in inputs):
            self._fixed.add(result.index)
        if op.name in REDUCTIONS or (elementwise and _reads(op, self._reduced)):
            self._reduced.add(result.index)


def _constants(region: Region) -> dict[int, int]:
    """Return the first of the scalar constants that are equal, for each of them."""
    numbers: dict[int, int] = {}
    first: dict[Hashable, int] = {}
    for value, const in zip(region.constants, region.consts, strict=True):
        if not value.shape:
            key = (str(value.dtype), str(const))
            numbers[value.index] = first.setdefault(key, value.index)
    return numbers


def _number(
    numbers: dict[int, int],
    value: Value,
) -> int:
    """Return the first value that equals this one."""
    return numbers.get(value.index, value.index)


def _key(
    op: Operation,
    numbers: dict[int, int],
) -> Hashable:
    """Return what equal operations have in common."""
    inputs: list[Hashable] = []
    for given, value in zip(op.eqn.invars, op.inputs, strict=True):
        if value is None:
            inputs.append(("literal", _hashable(given.val), str(given.aval)))
        else:
            inputs.append(_number(numbers, value))
    params = [(name, _hashable(param)) for name, param in op.params.items()]
    return op.name, tuple(inputs), tuple(params)


def _hashable(thing: Any) -> Hashable:
    """Return a thing, or its identity if it can't be a key."""
    try:
        hash(thing)
    except TypeError:
        return id(thing)
    return thing


def _reads(
    op: Operation,
    values: set[int],
) -> bool:
    return any(value is not None and value.index in values for value in op.inputs)
