"""Turns of the while loops of a compiled module.

XLA mostly writes their number next to the loop (`known_trip_count`). If not, it is read
from the counter. A loop carries a tuple, say (i, x), from turn to turn. Its condition
compares `i < 7`, its body gives `(i + 2, ...)`, and it starts at `(0, ...)`, so it
turns 4 times. To see this, scalars are followed through the text:

- an int where the text gives a constant;
- `Carried(0, 2)` for "element 0 of the carry, plus 2";
- a list of such for a tuple, `CARRY` for the whole carry;
- None for anything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lepton_jax.verify.hlo_text import Computation, Instruction

# Instructions whose result is their first operand, for the purpose of reading.
PASSING = (
    "get-tuple-element",
    "bitcast",
    "copy",
    "reshape",
    "transpose",
    "convert",
    "copy-start",
    "copy-done",
    "opt-barrier",
    "optimization-barrier",
)
CARRY = "carry"
# The direction of a comparison whose sides are swapped.
SWAPPED = {
    "LT": "GT",
    "LE": "GE",
    "GT": "LT",
    "GE": "LE",
}


class Carried(NamedTuple):
    """An element of a loop's carry, plus an offset."""

    element: int
    offset: int


class Comparison(NamedTuple):
    """The two values that a condition compares, and the direction, such as "LT"."""

    left: Any
    right: Any
    direction: str


class Loops:
    """Counts the turns of while loops.

    Attributes:
      unknown: loops whose number of turns was asked for and not found.
    """

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations
        self.unknown: set[str] = set()

    def turns(
        self,
        name: str,
        loop: Instruction,
    ) -> int | None:
        """Return the turns of a while loop; None if the text doesn't tell.

        Args:
          name: the computation in which the loop stands.
          loop: the loop.
        """
        known = re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        turns = self._counted(name, loop)
        if turns is None:
            self.unknown.add(loop.name)
        return turns

    def _counted(
        self,
        name: str,
        loop: Instruction,
    ) -> int | None:
        """Count the turns of a loop that compares a counter with a constant.

        Each turn has to add a constant to the counter.
        """
        called = dict(loop.called())
        body = called["body"]
        comparison = self._compared(called["condition"], {0: CARRY})
        start = self._value(
            name,
            loop.operands[0],
            {},
        )
        after = self._value(
            body,
            self.computations[body].root,
            {0: CARRY},
        )
        if comparison is None:
            return None
        if not isinstance(start, list) or not isinstance(after, list):
            return None

        counter, limit, direction = _counter_first(comparison)
        limit = _constant(limit, start, after)
        if not isinstance(counter, Carried) or limit is None:
            return None
        first = start[counter.element]
        then = after[counter.element]
        if not isinstance(first, int) or not isinstance(then, Carried):
            return None
        if then.element != counter.element or not then.offset:
            return None
        return _turns(limit - first - counter.offset, then.offset, direction)

    def _compared(
        self,
        name: str,
        given: Mapping[int, Any],
    ) -> Comparison | None:
        """Return what a condition compares, given the values of its parameters."""
        computation = self.computations[name]
        root = computation.instructions[computation.root]
        if root.opcode not in ("compare", "fusion", "call"):
            return None
        operands = [self._value(name, operand, given) for operand in root.operands]
        if root.opcode == "compare":
            left, right = operands
            return Comparison(left, right, root.get("direction"))
        (_, callee), *_ = root.called()
        return self._compared(callee, dict(enumerate(operands)))

    def _value(
        self,
        computation: str,
        name: str,
        given: Mapping[int, Any],
    ) -> Any:
        """Return the value of an instruction as far as the text tells it."""
        instruction = self.computations[computation].instructions[name]
        opcode = instruction.opcode
        scalar = "[]" in instruction.shape or instruction.shape.startswith("(")
        if not scalar:
            # To look further takes a time that doubles with each operation.
            return None
        if opcode == "parameter":
            return given.get(int(instruction.literal))
        if opcode == "constant":
            number = re.fullmatch(r"-?\d+", instruction.literal)
            return int(number[0]) if number else None
        if opcode == "get-tuple-element":
            whole = self._value(computation, instruction.operands[0], given)
            return _element(whole, int(instruction.get("index")))
        if opcode in PASSING:
            return self._value(computation, instruction.operands[0], given)
        if opcode in ("tuple", "add", "subtract", "fusion", "call"):
            return self._combined(computation, instruction, given)
        return None

    def _combined(
        self,
        computation: str,
        instruction: Instruction,
        given: Mapping[int, Any],
    ) -> Any:
        """Return the value of an instruction that depends on all its operands."""
        operands = [
            self._value(computation, operand, given) for operand in instruction.operands
        ]
        if instruction.opcode == "tuple":
            return operands
        if instruction.opcode in ("fusion", "call"):
            callee = self.computations[instruction.called()[0][1]]
            parameters = dict(enumerate(operands))
            return self._value(callee.name, callee.root, parameters)
        left, right = operands
        sign = 1 if instruction.opcode == "add" else -1
        return _sum(left, right, sign)


def _element(whole: Any, index: int) -> Any:
    if whole == CARRY:
        return Carried(index, 0)
    return whole[index] if isinstance(whole, list) else None


def _sum(
    left: Any,
    right: Any,
    sign: int,
) -> Any:
    """Return left + sign * right, if at most one of them is of the carry."""
    if isinstance(left, int) and isinstance(right, Carried) and sign > 0:
        left, right = right, left
    if not isinstance(right, int):
        return None
    if isinstance(left, Carried):
        return Carried(left.element, left.offset + sign * right)
    return left + sign * right if isinstance(left, int) else None


def _counter_first(comparison: Comparison) -> Comparison:
    left, right, direction = comparison
    if isinstance(right, Carried) and not isinstance(left, Carried):
        return Comparison(right, left, SWAPPED.get(direction, direction))
    return comparison


def _constant(
    value: Any,
    start: list,
    after: list,
) -> int | None:
    """Return a limit: a constant, or a carried value that no turn changes."""
    if isinstance(value, int):
        return value
    if not isinstance(value, Carried):
        return None
    first = start[value.element]
    unchanged = after[value.element] == Carried(value.element, 0)
    return first + value.offset if unchanged and isinstance(first, int) else None


def _turns(
    distance: int,
    step: int,
    direction: str,
) -> int | None:
    """Return the turns of a counter that goes a distance in steps.

    >>> _turns(7, 2, "LT"), _turns(-7, -2, "GE"), _turns(7, 2, "GT")
    (4, 4, None)
    """
    directions = ("LT", "LE", "NE") if step > 0 else ("GT", "GE", "NE")
    if direction not in directions:
        return None
    if step < 0:
        distance = -distance
    if direction in ("LE", "GE"):
        distance += 1
    return max(0, -(-distance // abs(step)))
