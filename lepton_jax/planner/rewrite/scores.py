"""The scores of attention, followed from their shares back to their product.

The shares are a softmax over the keys. Scores are scaled, capped (c * tanh(s / c)),
hidden by masks or by a bias of very low numbers, cast and transposed. Anything else
ends the walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.compat import Literal
from lepton_jax.planner.rewrite import masks
from lepton_jax.planner.rewrite.masks import HIDDEN, KEY, QUERY, UNCHANGED, Labels
from lepton_jax.planner.rewrite.program import Uses, shape_of_result

Known = Mapping[Any, Any]

# An axis of the scores, numbered as the dims of the shares in the second product.
Axis = int
Axes = tuple[Axis, ...]


@dataclass
class Walk:
    """The way from the shares back to the first product.

    Attributes:
      uses, known: of the program.
      keys: the axis of the keys.
      later: what happens to a score after the operation that is looked at.
      factor: by which scores are multiplied after the cap, or in all.
      inner: by which they are multiplied before the cap; None: there is no cap.
      masks: variables that hide scores, with the axes of their dims, and whether keys
        are seen where they are true.
      biases: variables that are added to scores, with the axes of their dims.
    """

    uses: Uses
    known: Known
    keys: Axis
    later: list[Callable[[float], float]] = field(default_factory=list)
    factor: float = 1.0
    inner: float | None = None
    masks: list[tuple[Any, Axes, bool]] = field(default_factory=list)
    biases: list[tuple[Any, Axes]] = field(default_factory=list)

    def maker(self, variable: Any) -> Any:
        """Return the equation that makes a variable; None: there is none."""
        if isinstance(variable, Literal):
            return None
        return self.uses.maker.get(variable)

    def number(self, variable: Any) -> float | None:
        """Return the number that an array holds everywhere; None: it is not known."""
        if isinstance(variable, Literal):
            is_scalar = np.ndim(variable.val) == 0
            return float(variable.val) if is_scalar else None
        if variable in self.known:
            array = np.asarray(self.known[variable])
            is_one = array.size == 1
            return float(array.item()) if is_one else None
        eqn = self.maker(variable)
        if eqn is None:
            return None
        name = eqn.primitive.name
        if name == "broadcast_in_dim":
            return self.number(eqn.invars[0])
        if variable.aval.shape or eqn.primitive.multiple_results:
            return None
        numbers = self.numbers(eqn)
        if None in numbers or not numbers:
            return None
        return _computed(eqn, numbers)

    def numbers(self, eqn: Any) -> list[float | None]:
        """Return the numbers that an equation's operands hold, see `number`."""
        return [self.number(operand) for operand in eqn.invars]

    def expression(self, variable: Any, labels: Labels) -> Any:
        """Return what computes a variable from positions, as `masks.expression`."""
        return masks.expression(variable, labels, self.uses, self.known)

    def hides(self, fill: float) -> bool:
        """Whether a score that is replaced by a number counts for nothing."""
        for change in reversed(self.later):
            fill = change(fill)
        return fill <= HIDDEN

    def scores(self, variable: Any, axes: Axes) -> tuple[Any, Axes] | None:
        """Follow scores back to their product; return it and its result's axes."""
        while True:
            eqn = self.maker(variable)
            if eqn is None:
                return None
            name = eqn.primitive.name
            if name == "dot_general":
                return eqn, axes
            if name == "transpose":
                axes = _before(axes, eqn.params["permutation"])
                variable = eqn.invars[0]
                continue
            step = STEPS.get(name)
            if step is None:
                return None
            variable = step(self, eqn, axes)
            if variable is None:
                return None

    def shares(self, variable: Any, axes: Axes) -> tuple[Any, Axes] | None:
        """Follow shares back to the scores of their softmax."""
        variable, axes = self._uncast(variable, axes)
        eqn = self.maker(variable)
        if eqn is None or eqn.primitive.name != "div":
            return None
        top, bottom = eqn.invars
        exponential = self.maker(top)
        if not is_of(exponential, "exp"):
            return None
        if self._reduced(bottom, "reduce_sum", axes) is not top:
            return None
        shifted = self.maker(exponential.invars[0])
        if not is_of(shifted, "sub"):
            return None
        scores, highest = shifted.invars
        if self._reduced(highest, "reduce_max", axes) is not scores:
            return None
        return scores, axes

    def _uncast(self, variable: Any, axes: Axes) -> tuple[Any, Axes]:
        """Go back over casts and transpositions."""
        while True:
            eqn = self.maker(variable)
            if is_of(eqn, "convert_element_type", *UNCHANGED):
                variable = eqn.invars[0]
            elif is_of(eqn, "transpose"):
                axes = _before(axes, eqn.params["permutation"])
                variable = eqn.invars[0]
            else:
                return variable, axes

    def _reduced(self, variable: Any, name: str, axes: Axes) -> Any:
        """Return the variable whose reduction over the keys is broadcast here."""
        labels = _labels(axes, getattr(variable.aval, "shape", ()))
        eqn = self.maker(variable)
        while not is_of(eqn, name):
            if eqn is None:
                return None
            before = self._before_broadcast(eqn, labels)
            if before is None:
                return None
            variable, labels = before
            eqn = self.maker(variable)

        over = eqn.params["axes"]
        if len(over) != 1 or axes[over[0]] != self.keys:
            return None
        kept = [axis for axis in axes if axis != self.keys]
        shape = shape_of_result(eqn)
        expected = _labels(kept, shape)
        if expected != _labels_where_long(labels, shape):
            return None
        return eqn.invars[0]

    def _before_broadcast(self, eqn: Any, labels: Labels) -> tuple[Any, Labels] | None:
        """Go back over an operation that only hands a reduction on."""
        name = eqn.primitive.name
        if name in UNCHANGED or name == "convert_element_type":
            return eqn.invars[0], labels
        if name == "max":  # with -inf, as `jax.nn.softmax` has it
            numbers = self.numbers(eqn)
            if -math.inf not in numbers:
                return None
            place = numbers.index(-math.inf)
            return eqn.invars[1 - place], labels
        moved = masks.moved_labels(eqn, labels)
        if moved is None:
            return None
        return eqn.invars[0], moved


def _labels(axes: Sequence[Axis], shape: Sequence[int]) -> Labels:
    """Return axes as labels of an array's dims; those of extent 1 have none."""
    names = [str(axis) for axis in axes]
    return _labels_where_long(names, shape)


def _labels_where_long(labels: Sequence[str | None], shape: Sequence[int]) -> Labels:
    pairs = zip(labels, shape, strict=True)
    return tuple(label if extent > 1 else None for label, extent in pairs)


def _computed(eqn: Any, numbers: list[Any]) -> float | None:
    with jax.ensure_compile_time_eval():
        operands = []
        for number, operand in zip(numbers, eqn.invars, strict=True):
            dtype = operand.aval.dtype
            operands.append(jnp.asarray(number, dtype))
        result = eqn.primitive.bind(*operands, **eqn.params)
        return float(result)


def is_of(eqn: Any, *names: str) -> bool:
    """Whether an equation is there, and of one of some operations."""
    return eqn is not None and eqn.primitive.name in names


def _before(axes: Axes, permutation: Sequence[int]) -> Axes:
    """Return the axes of an array's dims from those of its transposition."""
    before = [0] * len(axes)
    for place, dim in enumerate(permutation):
        before[dim] = axes[place]
    return tuple(before)


# ---- internals: what is done to scores ----


def _cast(walk: Walk, eqn: Any, axes: Axes) -> Any:
    return eqn.invars[0]


def _scaled(walk: Walk, eqn: Any, axes: Axes) -> Any:
    """Follow a product with a number, or a quotient by one."""
    left, right = eqn.invars
    is_quotient = eqn.primitive.name == "div"
    number = walk.number(right)
    variable = left
    if number is None and not is_quotient:
        number = walk.number(left)
        variable = right
    if not number or not math.isfinite(number):
        return None
    factor = 1 / number if is_quotient else number
    if walk.inner is None:
        walk.factor *= factor
    else:
        walk.inner *= factor
    walk.later.append(lambda score: score * factor)
    return variable


def _capped(walk: Walk, eqn: Any, axes: Axes) -> Any:
    if walk.inner is not None:
        return None
    walk.inner = 1.0
    walk.later.append(math.tanh)
    return eqn.invars[0]


def _masked(walk: Walk, eqn: Any, axes: Axes) -> Any:
    """Follow a choice between a score and a number that hides it."""
    if len(eqn.invars) != 3:
        return None
    which, off, on = eqn.invars
    hidden_where_false = (off, on, True)
    hidden_where_true = (on, off, False)
    for fill, scores, seen in (hidden_where_false, hidden_where_true):
        number = walk.number(fill)
        if number is None or not which.aval.shape:
            continue
        if walk.hides(number):
            walk.masks.append((which, axes, seen))
            return scores
    return None


def _biased(walk: Walk, eqn: Any, axes: Axes) -> Any:
    """Follow a sum with a mask of zeros and very low numbers."""
    if walk.later:  # what it adds would change
        return None
    labels = tuple(KEY if axis == walk.keys else QUERY for axis in axes)
    left, right = eqn.invars
    for bias, scores in ((left, right), (right, left)):
        if walk.expression(bias, labels) is not None:
            walk.biases.append((bias, axes))
            return scores
    return None


STEPS: dict[str, Callable[[Walk, Any, Axes], Any]] = {
    **dict.fromkeys((*UNCHANGED, "convert_element_type"), _cast),
    "add": _biased,
    "div": _scaled,
    "mul": _scaled,
    "select_n": _masked,
    "tanh": _capped,
}
