"""A learning rate's schedule as an optimizer reads it, and at which count it does so.

Optax's wrappers count for themselves: under `optax.MultiSteps(optax.sgd(schedule), 4)`
the inner count moves once in four steps. So a schedule can't always be read at
Lepton's own count of updates. Where the two counts certainly agree, the optimizer is
made from a plain number; where they may differ, it is made from a `Scheduled`:

>>> halved = Scheduled(lambda count: 0.1 * count) / 2
>>> halved(3)
0.15000000000000002

`Readings` finds the counts in the traced update. Each call of the schedule marks the
count that it is given; the mark is then traced back to a leaf of the optimizer's state.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from jax.ad_checkpoint import checkpoint_name

from lepton_jax.compat import ClosedJaxpr, Literal

# name of the operation that marks a count
MARK = "lepton_schedule_count"

# states of Optax whose count begins at 0, and whose own update adds 1 to it; by name,
# since two of them are not public
COUNTED = ("ScaleByScheduleState", "WeightDecaySchedule")

# states whose count reads the rate of the updates themselves
SCALING = ("ScaleByScheduleState", "WrappedScheduleState")

# wrappers of Optax that leave out, or repeat, updates of the optimizer inside of them
SKIPPING = (
    optax.ApplyIfFiniteState,
    optax.ConditionallyMaskState,
    optax.ConditionallyTransformState,
    optax.MultiStepsState,
    optax.contrib.SAMState,
)


class Scheduled:
    """A schedule that can stand where a number is expected, as long as it is scaled.

    `lambda rate: optax.sgd(10 * rate)` works on it as it does on a number: the
    result is a schedule again. It is read at whatever count the optimizer gives.

    Args:
      read: the count, an int32 scalar, to the rate.
    """

    def __init__(self, read: Callable[[Any], Any]):
        self._read = read

    def __call__(self, count: Any) -> Any:
        return self._read(count)

    def _with(
        self,
        operation: Callable[[Any, Any], Any],
        other: Any,
        swapped: bool,
    ) -> Any:
        if not isinstance(other, Scheduled) and not _is_number(other):
            return NotImplemented

        def read(count: Any) -> Any:
            mine = self(count)
            theirs = other(count) if isinstance(other, Scheduled) else other
            return operation(theirs, mine) if swapped else operation(mine, theirs)

        return Scheduled(read)

    def __neg__(self) -> Scheduled:
        return Scheduled(lambda count: -self(count))

    def __pos__(self) -> Scheduled:
        return self

    def __mul__(self, other: Any) -> Any:
        return self._with(operator.mul, other, swapped=False)

    def __rmul__(self, other: Any) -> Any:
        return self._with(operator.mul, other, swapped=True)

    def __truediv__(self, other: Any) -> Any:
        return self._with(operator.truediv, other, swapped=False)

    def __rtruediv__(self, other: Any) -> Any:
        return self._with(operator.truediv, other, swapped=True)

    def __add__(self, other: Any) -> Any:
        return self._with(operator.add, other, swapped=False)

    def __radd__(self, other: Any) -> Any:
        return self._with(operator.add, other, swapped=True)

    def __sub__(self, other: Any) -> Any:
        return self._with(operator.sub, other, swapped=False)

    def __rsub__(self, other: Any) -> Any:
        return self._with(operator.sub, other, swapped=True)

    def __pow__(self, other: Any) -> Any:
        return self._with(operator.pow, other, swapped=False)


def _is_number(value: Any) -> bool:
    """Whether a value is a scalar; arrays and a gradient's tracers are not."""
    if isinstance(value, jax.core.Tracer):
        return False
    return isinstance(value, int | float) or getattr(value, "shape", None) == ()


class Reading(NamedTuple):
    """One place at which an optimizer reads the schedule.

    Attributes:
      leaf: index of the count among the leaves of the optimizer's state; None where the
        schedule is read at something else.
      plain: whether the count is certainly Lepton's: 0 at first, 1 more in each update.
      scales: whether the rate that is read scales the updates.
    """

    leaf: int | None
    plain: bool
    scales: bool


class Readings:
    """Records at which counts an optimizer reads a schedule.

    Usage: make the optimizer from `schedule`, trace its update with `jax.make_jaxpr`,
    then ask for `of`.

    Args:
      rate: the recipe's schedule.
    """

    def __init__(self, rate: Callable[[Any], Any]):
        self._rate = rate
        self._calls = 0
        self.schedule = Scheduled(self._read)

    def _read(self, count: Any) -> Any:
        self._calls += 1
        if isinstance(count, jax.core.Tracer):
            count = checkpoint_name(count, MARK)
        return self._rate(count)

    def of(
        self,
        program: ClosedJaxpr,
        state: Any,
        after: int,
    ) -> list[Reading]:
        """List where the traced update reads the schedule.

        Args:
          program: the update's jaxpr. Its first inputs are the leaves of the state, its
            last outputs the leaves of the state after it.
          state: the state, as shapes.
          after: index of the first of those outputs.
        """
        jaxpr = program.jaxpr
        owners = _owners(state)
        leaves = dict(
            zip(
                jaxpr.invars,
                range(len(owners)),
                strict=False,
            )
        )
        marks = list(_marks(jaxpr, leaves))

        unknown = Reading(leaf=None, plain=False, scales=False)
        readings = []
        for leaf in dict.fromkeys(marks):
            if leaf is None:
                readings.append(unknown)
                continue
            # a count that anything else decides upon may stand still, or begin anew
            deciding = inputs_of(jaxpr, jaxpr.outvars[after + leaf])
            alone = deciding == {jaxpr.invars[leaf]}
            owner = owners[leaf].__name__
            plain = alone and owner in COUNTED
            readings.append(Reading(leaf, plain, scales=owner in SCALING))

        if self._calls > len(marks):  # at a number, or at a count that was not traced
            readings.append(unknown)
        return readings


def skips(
    program: ClosedJaxpr,
    state: Any,
    rate: int,
) -> bool:
    """Whether a wrapper decides in which updates a rate is used.

    Args:
      program: the jaxpr of an update that is made from a number.
      state: the optimizer's state.
      rate: index of the rate among the jaxpr's inputs.
    """
    if any(isinstance(node, SKIPPING) for node in nodes(state)):
        return True

    jaxpr = program.jaxpr
    reached = {jaxpr.invars[rate]}
    for eqn in jaxpr.eqns:
        used = {v for v in eqn.invars if not isinstance(v, Literal)}
        if not used & reached:
            continue
        if eqn.primitive.name == "cond":
            return True
        reached |= set(eqn.outvars)
    return False


def nodes(state: Any) -> Iterator[Any]:
    """Yield the named tuples in an optimizer's state, outer ones first."""
    if hasattr(state, "_fields"):
        yield state
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, tuple | list):
        for part in state:
            yield from nodes(part)


def _owners(state: Any) -> list[type]:
    """Return, for each leaf of a state, the type of the named tuple around it."""
    owners: list[type] = []

    def visit(part: Any, owner: type) -> None:
        if hasattr(part, "_fields"):
            owner = type(part)
        for child in jax.tree.leaves(part, is_leaf=lambda x: x is not part):
            if child is part:
                owners.append(owner)
            else:
                visit(child, owner)

    visit(state, tuple)
    return owners


def _marks(
    jaxpr: Any,
    leaves: dict[Any, int],
) -> Iterator[int | None]:
    """Yield the leaf of the state behind each count at which the schedule was read.

    Args:
      jaxpr: a traced update.
      leaves: variables of the jaxpr that are leaves of the state, and their indices.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and eqn.params["name"] == MARK:
            variable = eqn.invars[0]
            yield None if isinstance(variable, Literal) else leaves.get(variable)
            continue

        operands = eqn.invars[1:] if eqn.primitive.name == "cond" else eqn.invars
        for inner in _inner(eqn):
            yield from _marks(inner, _passed(inner, operands, leaves))


def _passed(
    inner: Any,
    operands: list[Any],
    leaves: dict[Any, int],
) -> dict[Any, int]:
    """Return the inputs of an inner jaxpr that are leaves of the state."""
    if len(inner.invars) != len(operands):
        return {}
    passed = {}
    for variable, operand in zip(inner.invars, operands, strict=True):
        if not isinstance(operand, Literal) and operand in leaves:
            passed[variable] = leaves[operand]
    return passed


def _inner(eqn: Any) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def inputs_of(
    jaxpr: Any,
    result: Any,
) -> set[Any]:
    """Find the inputs of a jaxpr on which one of its results may depend."""
    needed = set() if isinstance(result, Literal) else {result}
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return needed.intersection(jaxpr.invars)
