"""The steps at which a run evaluates, saves and reports."""

from __future__ import annotations

import math
from collections.abc import Collection

from lepton_jax.recipe import Recipe

# Seconds between two reports if the recipe doesn't say (assumption: a person who
# watches sees them as steady).
LOG_SECONDS = 0.25


class Cadence:
    """The steps at which something is due.

    With `evaluate_every=4`, `save_every=6` and 10 steps, evaluations are due after
    steps 4 and 8, saves after step 6, and a call of the devices ends at each of 4, 6,
    8 and 10.
    Without these fields both are due at an epoch's end: after the first step that has
    consumed its last sample.

    Args:
      recipe: says how often.
      epoch: samples in an epoch of the training data; None: it has no epochs.
      until: the last step.
      stops: other steps at which a call has to end.
    """

    def __init__(
        self,
        recipe: Recipe,
        epoch: int | None,
        until: int,
        stops: Collection[int] = (),
    ):
        self.recipe = recipe
        self.epoch = epoch
        self.until = until
        self._stops = frozenset(stops)

    def evaluates(
        self,
        step: int,
        consumed: int,
    ) -> bool:
        """Whether an evaluation is due after a step, `consumed` samples in all."""
        return self._is_due(self.recipe.evaluate_every, step, consumed)

    def saves(
        self,
        step: int,
        consumed: int,
    ) -> bool:
        """Whether a save is due after a step, `consumed` samples in all."""
        every = self.recipe.save_every or self.recipe.evaluate_every
        return self._is_due(every, step, consumed)

    def reports(
        self,
        step: int,
        seconds: float,
    ) -> bool:
        """Whether a report is due after a step, `seconds` after the one before."""
        if self.recipe.log_every:
            return step % self.recipe.log_every == 0
        return seconds >= LOG_SECONDS

    def next_stop(
        self,
        step: int,
        consumed: int,
    ) -> int:
        """Return the first step after this one at which something may be due."""
        recipe = self.recipe
        stops = [self.until]
        stops += [stop for stop in self._stops if stop > step]
        for every in (recipe.evaluate_every, recipe.save_every, recipe.log_every):
            if every:
                stops.append((step // every + 1) * every)

        counts_steps = recipe.evaluate_every and recipe.save_every
        if self.epoch is not None and not counts_steps:
            left = self.epoch - consumed % self.epoch
            stops.append(step + math.ceil(left / recipe.batch_size))
        return min(stops)

    def _is_due(
        self,
        every: int | None,
        step: int,
        consumed: int,
    ) -> bool:
        if every:
            return step % every == 0
        if self.epoch is None:
            return False
        before = consumed - self.recipe.batch_size
        return consumed // self.epoch > before // self.epoch
