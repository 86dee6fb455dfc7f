"""The differences that micro-batches make to what a train step computes."""

from __future__ import annotations

from typing import Any

import jax

from lepton_jax.planner.program.graph import Value
from lepton_jax.planner.program.interaction import where_samples_of_a_step_meet
from lepton_jax.planner.program.trace import Trace
from lepton_jax.trees import by_path

SHOWN = 3  # variables that are named


class Batches:
    """Whether micro-batches change the model, and how.

    They do not change sums over samples. They do change what samples of a batch compute
    together, such as the statistics of batch norm and losses over pairs of samples, and
    variables that each call updates.

    Args:
      trace: of the recipe.

    Attributes:
      meets: "mean at file.py:12 (function)" where samples meet; None where they do not.
      written: paths of the variables that a train step changes, random streams apart.
    """

    def __init__(self, trace: Trace):
        self.batch_size = trace.recipe.batch_size
        self.meets = where_samples_of_a_step_meet(trace)
        self.written = _written(trace)

    @property
    def change(self) -> bool:
        """Whether micro-batches change anything but the order of sums."""
        return self.meets is not None or bool(self.written)

    @property
    def why(self) -> str:
        """The reasons, in a few words."""
        found = []
        if self.meets is not None:
            found.append(f"samples of a batch meet in {self.meets}")
        if self.written:
            shown = ", ".join(self.written[:SHOWN])
            rest = len(self.written) - SHOWN
            more = f" and {rest} more" if rest > 0 else ""
            found.append(f"each call updates the variables {shown}{more}")
        return "; ".join(found)

    def note(self, parts: int) -> str:
        """A note for a plan with so many micro-batches, which nobody asked for."""
        rows = self.batch_size // parts
        return (
            f"the {parts} micro-batches, which the planner chose, change the model:"
            f" {self.why}. It now sees {rows} samples at a time instead of"
            f" {self.batch_size}. A batch_size of {rows} has the same memory without"
            f" them; micro_batches={parts} in the recipe says that this is meant"
        )


def _written(trace: Trace) -> list[str]:
    graph = trace.gradient("none")
    variables = by_path(trace.state.variables)
    if not variables:
        return []
    first = len(jax.tree.leaves(trace.state.params))
    before = graph.main.inputs[first : first + len(variables)]
    after = graph.main.results[-len(variables) :]
    found = []
    for (path, leaf), old, new in zip(variables.items(), before, after, strict=True):
        same = isinstance(new, Value) and new.index == old.index
        if not same and not _random(leaf):
            found.append(path)
    return found


def _random(leaf: Any) -> bool:
    """Whether a variable is a random stream's: its key, or how often it was drawn
    from.
    """
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return True
    return leaf.shape == () and jax.dtypes.issubdtype(
        leaf.dtype, jax.numpy.unsignedinteger
    )
