"""The changes that micro-batches make to what a train step computes.

Sums over samples stay what they are. Two things do not:

- what samples of a batch compute together, such as the statistics of batch norm and
  losses over pairs of samples: they see fewer samples at a time;
- variables that each call of the model updates: they are updated more often.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.planner.program.graph import Value
from lepton_jax.planner.program.interaction import where_samples_of_a_step_meet
from lepton_jax.planner.program.trace import Trace
from lepton_jax.trees import by_path

# Variables that a message names. Assumption: more do not help to find the layer.
MOST_NAMED = 3


class MicroBatches:
    """Whether micro-batches change the model, and how.

    Args:
      trace: of the recipe.

    Attributes:
      meets: "mean at file.py:12 (function)" where samples meet; None where they do not.
      written: paths of the variables that a train step changes, random streams apart.
    """

    def __init__(self, trace: Trace):
        """Look for what would change."""
        self.batch_size = trace.recipe.batch_size
        self.meets = where_samples_of_a_step_meet(trace)
        self.written = _updated_variables(trace)

    @property
    def change(self) -> bool:
        """Whether micro-batches change anything but the order of sums."""
        return self.meets is not None or bool(self.written)

    @property
    def why(self) -> str:
        """The reasons, in a few words."""
        reasons = []
        if self.meets is not None:
            reasons.append(f"samples of a batch meet in {self.meets}")
        if self.written:
            named = ", ".join(self.written[:MOST_NAMED])
            rest = len(self.written) - MOST_NAMED
            more = f" and {rest} more" if rest > 0 else ""
            reasons.append(f"each call updates the variables {named}{more}")
        return "; ".join(reasons)

    def note(self, parts: int) -> str:
        """Return a plan's note on micro-batches that nobody asked for.

        Args:
          parts: the number of micro-batches.
        """
        rows = self.batch_size // parts
        return (
            f"the {parts} micro-batches, which the planner chose, change the model:"
            f" {self.why}. It now sees {rows} samples at a time instead of"
            f" {self.batch_size}. A batch_size of {rows} has the same memory without"
            f" them; micro_batches={parts} in the recipe says that this is meant"
        )

    def note_in_flight(self, parts: int) -> str:
        """Return a plan's note on the micro-batches of a pipeline.

        Args:
          parts: the number of micro-batches.
        """
        rows = self.batch_size // parts
        return (
            f"{self.why}: where that is in the layers of the pipeline, they now see"
            f" {rows} samples at a time instead of {self.batch_size}"
        )


def _updated_variables(trace: Trace) -> list[str]:
    """List the paths of the variables that a train step changes."""
    variables = by_path(trace.state.variables)
    if not variables:
        return []

    graph = trace.gradient("none")
    first = len(jax.tree.leaves(trace.state.params))
    before = graph.main.inputs[first : first + len(variables)]
    after = graph.main.results[-len(variables) :]
    updated = []
    pairs = zip(variables, before, after, strict=True)
    for path, old, new in pairs:
        unchanged = isinstance(new, Value) and new.index == old.index
        if not unchanged and not _is_random_stream(variables[path]):
            updated.append(path)
    return updated


def _is_random_stream(leaf: Any) -> bool:
    """Whether a variable is a random stream's key, or the count of its draws."""
    dtype = leaf.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    return leaf.shape == () and jnp.issubdtype(dtype, jnp.unsignedinteger)
