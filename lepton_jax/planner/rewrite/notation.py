"""Dims of an operation's arrays by name, as `lepton.planner.rule` takes them.

    >>> shape = parse("... length width, width -> ... length width")
    >>> shape.inputs
    (('...', 'length', 'width'), ('width',))
    >>> expanded(shape, [3, 1]).results
    (('...0', 'length', 'width'),)

A dim with a name is the same thing in each array that has the name; `_` is a dim of
which nothing is said. `...` stands for any number of leading dims.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from lepton_jax.errors import ModelError

ANY = "..."  # leading dims, as many as there are
UNNAMED = "_"

Names = tuple[str, ...]


class Notation(NamedTuple):
    """Names of the dims of each operand and of each result."""

    inputs: tuple[Names, ...]
    results: tuple[Names, ...]

    @property
    def names(self) -> set[str]:
        """All names but `_`."""
        arrays = (*self.inputs, *self.results)
        return {name for own in arrays for name in own} - {UNNAMED}


def parse(text: str) -> Notation:
    """Return what a text such as "batch width, width -> batch width" says.

    Raises:
      ModelError: it has no arrow, or a dim's name is no word.
    """
    inputs, arrow, results = text.partition("->")
    if not arrow:
        raise _fault(text, "it has no ->", "write 'operands -> results'")
    return Notation(arrays_of(inputs), arrays_of(results))


def arrays_of(text: str) -> tuple[Names, ...]:
    """Return the names of each array's dims; arrays are divided by commas.

    Raises:
      ModelError: a dim's name is no word, or an array has one twice.
    """
    arrays = [tuple(part.split()) for part in text.split(",")]
    for own in arrays:
        for place, name in enumerate(own):
            leads = name == ANY and place == 0
            if not leads and not re.fullmatch(r"[A-Za-z_]\w*", name):
                remedy = "names are words with blanks between; ... stands first"
                raise _fault(text, f"{name!r} is no name", remedy)
            if name != UNNAMED and name in own[:place]:
                remedy = "give each dim of an array a name of its own"
                raise _fault(text, f"{name!r} stands twice in one array", remedy)
    return tuple(arrays)


def expanded(notation: Notation, ranks: Sequence[int]) -> Notation:
    """Return a notation whose `...` is replaced by a name for each dim.

    Args:
      notation: of an operation.
      ranks: of its operands; they decide how many dims `...` is.

    Raises:
      ModelError: an operand has too few or too many dims, or there are too few or
        too many operands.
    """
    if len(ranks) != len(notation.inputs):
        raise _misfit(f"{len(notation.inputs)} operands are named, {len(ranks)} given")
    leading = 0
    for own, rank in zip(notation.inputs, ranks, strict=True):
        if own[:1] == (ANY,):
            leading = max(leading, rank - len(own) + 1)
    more = tuple(f"{ANY}{number}" for number in range(leading))

    inputs = [_with_leading(own, more) for own in notation.inputs]
    for own, rank in zip(inputs, ranks, strict=True):
        if len(own) != rank:
            raise _misfit(f"an array of {rank} dims is named {' '.join(own)!r}")
    results = [_with_leading(own, more) for own in notation.results]
    return Notation(tuple(inputs), tuple(results))


# ---- internals ----


def _with_leading(own: Names, more: Names) -> Names:
    return (*more, *own[1:]) if own[:1] == (ANY,) else own


def _misfit(what: str) -> ModelError:
    remedy = "name each dim of each operand and result, in their order"
    return ModelError(what, where="lepton.planner.rule", remedy=remedy)


def _fault(text: str, what: str, remedy: str) -> ModelError:
    return ModelError(f"{text!r}: {what}", where="lepton.planner.rule", remedy=remedy)
