"""Embeddings of which a step touches only some rows.

An embedding is a parameter that the training loss uses only to look up rows. Take one
of 8 rows, and a batch that looks up the rows 5, 2 and 5:

1. `looked_up` computes the batch's ids from the loss, without the table: [5, 2, 5].
2. `touched` makes each of them one slot, in order: [2, 5, 8]. There are as many slots
   as a batch can look up, so that shapes are fixed; 8, which is no row, is a free one.
3. `Rows.taken` gathers these rows of the table and of the optimizer's state. A step
   sees them in place of the whole: a table (3, dim), with gradients and moments alike.
4. `compacted` is the training loss on this small table. Each lookup looks its id up
   among the slots: [5, 2, 5] becomes [1, 0, 1].
5. `Rows.put` scatters the rows after the step back into the table, which XLA does in
   place.

So all that a step does by parameters (clipping, signals, the optimizer, a cast to
bfloat16) costs by the rows that are touched. Gradients of other rows are 0, which makes
norms of gradients exact.
"""

from lepton_jax.step.embeddings.compact import cast_late, compacted, looked_up
from lepton_jax.step.embeddings.rows import Rows, rowwise_arrays, touched
from lepton_jax.step.embeddings.tables import (
    NO_TABLES,
    Table,
    Tables,
    followed,
    slots_for,
)
from lepton_jax.step.embeddings.trial import Verdict, tried
from lepton_jax.step.embeddings.uses import Use, uses

__all__ = [
    "NO_TABLES",
    "Rows",
    "Table",
    "Tables",
    "Use",
    "Verdict",
    "cast_late",
    "compacted",
    "followed",
    "looked_up",
    "rowwise_arrays",
    "slots_for",
    "touched",
    "tried",
    "uses",
]
