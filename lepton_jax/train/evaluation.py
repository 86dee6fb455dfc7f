"""Loss and metrics of a state over a whole data set."""

from __future__ import annotations

from typing import Any

from lepton_jax.data import epoch_samples, one_pass
from lepton_jax.step.state import State
from lepton_jax.train.program import Program


def evaluate(
    program: Program,
    state: State,
    test: Any,
) -> dict[str, float]:
    """Return loss and metrics over a data set, every sample counted once.

    Where samples of a batch can meet, the last batch runs at its own size; otherwise it
    is filled up, and its filling masked.

    Raises:
      DataError: no sample has weight, or a metric of the whole set would gather too
        much.
    """
    size = program.recipe.batch_size
    samples = epoch_samples(test)
    assert samples is not None
    program.evaluation.check(samples)

    sums = None
    parts = []
    fill = samples % size == 0 or program.evaluation.meeting is None
    batches = one_pass(
        test,
        size,
        program.sharding_of,
        fill,
        program.limits,
    )
    for batch, rows in batches:
        sums, part = program.evaluate_and_keep(sums, state, batch, rows)
        if part is not None:
            parts.append(program.evaluation.real(part, rows))
    return program.metrics(sums, parts)
