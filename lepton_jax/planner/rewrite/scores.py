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
from lepton_jax.planner.rewrite.program import Uses

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
        return None if isinstance(variable, Literal) else self.uses.maker.get(variable)

    def number(self, variable: Any) -> float | None:
        """Return the number that an array holds everywhere; None: it is not known."""
        if isinstance(variable, Literal):
            return float(variable.val) if np.ndim(variable.val) == 0 else None
        if variable in self.known:
            array = np.asarray(self.known[variable])
            return float(array.item()) if array.size == 1 else None
        eqn = self.maker(variable)
        if eqn is None:
            return None
        name = eqn.primitive.name
        if name == "broadcast_in_dim":
            return self.number(eqn.invars[0])
        if variable.aval.shape or eqn.primitive.multiple_results:
            return None
        numbers = [self.number(operand) for operand in eqn.invars]
        if None in numbers or not numbers:
            return None
        return _computed(eqn, numbers)

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
            variable = None if step is None else step(self, eqn, axes)
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
        shape = getattr(variable.aval, "shape", ())
        labels: Labels = tuple(
            str(axis) if n > 1 else None for axis, n in zip(axes, shape, strict=True)
        )
        while True:
            eqn = self.maker(variable)
            if eqn is None:
                return None
            own = eqn.primitive.name
            if own == name:
                break
            if own in UNCHANGED or own == "convert_element_type":
                variable = eqn.invars[0]
                continue
            if own == "max":  # with -inf, as `jax.nn.softmax` has it
                numbers = [self.number(operand) for operand in eqn.invars]
                if -math.inf not in numbers:
                    return None
                variable = eqn.invars[1 - numbers.index(-math.inf)]
                continue
            moved = masks.moved_labels(eqn, labels)
            if moved is None:
                return None
            labels = moved
            variable = eqn.invars[0]
        source = eqn.invars[0]
        over = eqn.params["axes"]
        if len(over) != 1 or axes[over[0]] != self.keys:
            return None
        kept = [axis for dim, axis in enumerate(axes) if dim != over[0]]
        pairs = zip(kept, labels, eqn.outvars[0].aval.shape, strict=True)
        if any(n > 1 and label != str(axis) for axis, label, n in pairs):
            return None
        return source


def _computed(eqn: Any, numbers: list[Any]) -> float | None:
    with jax.ensure_compile_time_eval():
        operands = []
        for number, operand in zip(numbers, eqn.invars, strict=True):
            operands.append(jnp.asarray(number, operand.aval.dtype))
        return float(eqn.primitive.bind(*operands, **eqn.params))


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
    number = walk.number(right)
    variable = left
    if number is None and eqn.primitive.name == "mul":
        number = walk.number(left)
        variable = right
    if number is None or number == 0 or not math.isfinite(number):
        return None
    factor = 1 / number if eqn.primitive.name == "div" else number
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
    for fill, scores, seen in ((off, on, True), (on, off, False)):
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
    for bias, scores in (eqn.invars, eqn.invars[::-1]):
        labels = tuple(KEY if axis == walk.keys else QUERY for axis in axes)
        if masks.expression(bias, labels, walk.uses, walk.known) is not None:
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
