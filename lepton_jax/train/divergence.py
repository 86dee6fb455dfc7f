"""The error of a run that diverged: what happened, where, why, and what to do.

The step's update has been made when the host reads its loss, so the parameters that it
began with are gone. Two other sets of parameters tell the causes apart:

    the same batch, with ...     its loss is    then at fault is
    the parameters of the seed   not finite     the batch: any parameters show it
    the parameters of the seed   finite         the parameters, grown too large
    the last checkpoint's        not finite     the operation that is named
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.data import Arrays
from lepton_jax.errors import DivergedError, LeptonError
from lepton_jax.train.diagnosis import Finding, described, diagnose
from lepton_jax.train.program import Program
from lepton_jax.train.recovery import Halt, Rollbacks
from lepton_jax.train.restore import Reader
from lepton_jax.train.supply import Supply


class Cause(NamedTuple):
    """Why numbers are not finite, and what a person can do about it."""

    what: str
    remedy: str


class Divergence:
    """Explains why a run can't go on.

    Args:
      program: of the run.
      supply: its data; the position stands after the step that halted the run.
      checkpoints: of the run.
      reader: reads them.
      folder: of the run; None: it has none.
    """

    def __init__(
        self,
        program: Program,
        supply: Supply,
        checkpoints: Checkpoints,
        reader: Reader,
        folder: Path | None,
    ):
        self.program = program
        self._supply = supply
        self._checkpoints = checkpoints
        self._reader = reader
        self._folder = folder

    def error(
        self,
        halt: Halt,
        rollbacks: Rollbacks,
        is_last: bool,
    ) -> DivergedError:
        """Return the error for a person.

        Args:
          halt: why the run can't go on.
          rollbacks: what was tried before.
          is_last: whether the data's position is the one after the halting step.
        """
        self._checkpoints.wait()
        saved = self._checkpoints.steps()

        what = halt.why
        cause = None
        if halt.knob is not None:
            what = f"{halt.policy} gave up at step {halt.step}: {halt.why}"
        elif is_last:
            cause = self._cause(halt.step)
        if rollbacks.tried:
            tried = "; ".join(rollbacks.tried)
            what += f" after {rollbacks.count} rollbacks: {tried}"

        remedy = "lower the learning rate, set clip_norm, or fix the data"
        if cause is not None:
            what += f": {cause.what}"
            remedy = cause.remedy
        if rollbacks.most and not self._folder:
            remedy = (
                f"a run that is to go back to a checkpoint needs a run_dir; {remedy}"
            )
        last = "no checkpoint was committed"
        if saved:
            last = f"step {saved[-1]} is the last committed checkpoint"
        return DivergedError(
            what,
            where=f"step {halt.step}{_bad_samples_in_words(self._supply.train)}",
            remedy=f"{remedy}; {last}",
        )

    def _cause(self, step: int) -> Cause | None:
        """Compute the step's batch once more, to find the cause; None: not found."""
        batch = self._supply.read_again()
        if batch is None:
            return None
        names = self._supply.names()
        seed = self.program.recipe.seed
        try:
            state = self.program.init(seed)
            finding = diagnose(self.program, state, batch)
            if not finding.is_of_the_batch:
                return self._cause_in_parameters(step, batch, finding.loss)
        except (LeptonError, JaxRuntimeError, MemoryError):
            # There may be no memory for it: then the loss alone is reported.
            return None
        return Cause(described(finding, names), self._remedy(finding))

    def _remedy(self, finding: Finding) -> str:
        if finding.inputs:
            return "fix or leave out these samples"
        if self.program.recipe.precision == "float16":
            return (
                "scale the inputs or the activations to within 65504, the largest"
                ' float16, or use precision="bfloat16"'
            )
        return (
            "guard that operation against what these samples bring (a zero to"
            " divide by, a mask without a single True), or leave the samples out"
        )

    def _cause_in_parameters(
        self,
        step: int,
        batch: tuple[Any, Any],
        loss: float,
    ) -> Cause:
        """Return the cause where the batch is sound.

        Args:
          step: that halted the run.
          batch: of that step.
          loss: of the batch with the parameters of the seed.
        """
        what = (
            f"the same batch has a loss of {loss:.4g} with the parameters of the seed,"
            " so the parameters have grown too large"
        )
        steps = self._checkpoints.steps()
        earlier = [saved for saved in steps if saved < step]
        if earlier:
            last = earlier[-1]
            restored = self._reader.read(self._checkpoints, last)
            finding = diagnose(self.program, restored.state, batch)
            if finding.origins:
                what += f"; with those of step {last} {finding.origins[0]}"
        return Cause(what, "lower the learning rate, or set clip_norm")


def _bad_samples_in_words(train: Any) -> str:
    """Name the samples that hold a number which isn't finite, if the data is arrays."""
    if not isinstance(train, Arrays):
        return ""
    samples = (train.inputs, train.targets)
    for leaf in jax.tree.leaves(samples):
        if not np.issubdtype(leaf.dtype, np.floating):
            continue
        by_row = leaf.reshape(len(leaf), -1)
        is_finite = np.isfinite(by_row).all(axis=1)
        rows = np.flatnonzero(~is_finite)
        if len(rows):
            return (
                "; the training data itself has a number that isn't finite in"
                f" {len(rows)} samples, first in {rows[0]}"
            )
    return ""
