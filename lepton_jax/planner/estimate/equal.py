"""Operations that XLA's CPU backend merges, so that they run once.

`jax.checkpoint` puts a barrier before what is computed again. The CPU backend of jaxlib
0.10 removes the barriers and then merges equal operations. Take h = tanh(x @ w), kept
nowhere, in a network without loops:

    h  = tanh(x @ w)            # the forward pass
    x' = barrier(x)             # the same as x
    h' = tanh(x' @ w)           # the same as h: merged

The product runs once, and the memory isn't saved either. What is recomputed in the loop
of a backward pass isn't merged with another loop's.

Constants are the exception. Before the barriers go, what is computed from a constant
is simplified, such as `x + 0` for a state that begins with zeros; behind a barrier
nobody sees the zeros. The two then differ, and so does all that is computed from them.
Found in compiled programs: a deep equilibrium model, temporal convolutions.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from lepton_jax.planner.program.graph import BARRIER, Operation, Region, Value
from lepton_jax.planner.program.rules import ELEMENTWISE

# Operations whose result is their operand.
PASSING = {BARRIER, "name", "copy"}
SPREADING = {"broadcast_in_dim", "iota"}


def repeated(region: Region) -> set[int]:
    """Return the operations that equal an earlier one of their region.

    Args:
      region: a program; the bodies of its loops are looked at each by itself.

    Returns:
      The index of the first result of each.
    """
    found: set[int] = set()
    numbers = _constants(region)
    known: dict[Hashable, list[int]] = {}
    fixed = set(numbers)  # values that are computed from constants alone
    hidden: set[int] = set()  # those of them that come out of a barrier
    for op in region.operations:
        for inner in op.regions:
            found |= repeated(inner)
        if op.name in PASSING:
            for given, value in zip(op.inputs, op.outputs, strict=True):
                if given is not None:
                    numbers[value.index] = _number(numbers, given)
                    if given.index in fixed | hidden:
                        hidden.add(value.index)
            continue
        if op.regions or not op.outputs:
            continue
        inputs = [value.index for value in op.inputs if value is not None]
        elementwise = op.name in ELEMENTWISE
        if elementwise and not hidden.isdisjoint(inputs):
            continue
        if (elementwise or op.name in SPREADING) and fixed.issuperset(inputs):
            fixed.add(op.outputs[0].index)

        key = _key(op, numbers)
        equal = known.setdefault(key, [_number(numbers, v) for v in op.outputs])
        if equal[0] != op.outputs[0].index:
            found.add(op.outputs[0].index)
        for value, number in zip(op.outputs, equal, strict=True):
            numbers[value.index] = number
    return found


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
