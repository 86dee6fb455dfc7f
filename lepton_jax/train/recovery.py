"""Stops and rollbacks of a run: the host's part.

The compiled step makes no update once a policy has asked for a stop or a rollback; the
host finds that out when it reads the step's record, up to a few calls later:

    step       31   32   33   34   35   36
    record     ok   ok  rollback  -    -   -       handed over before 33 was read
    host reads ................^ Halt(step=33): 34 to 36 count for nothing

What a run has gone back from is part of each later checkpoint. Until there is one it is
kept in `rollback.json`, so that a run that is killed in between neither repeats the
fault nor forgets the count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.checkpoint.durable import Checkpoints, Damaged
from lepton_jax.controller.core import Controller
from lepton_jax.controller.journal import SHOWN
from lepton_jax.errors import CheckpointError, writing_remedy
from lepton_jax.train.run_record import RunRecord

FILE = "rollback.json"
# The record of a loss that gives weights: their sum over the batch.
WEIGHT = "weight"
# Steps in a row that float16 may lose to overflows of the forward pass (assumption: odd
# batches come alone).
MOST_LOST = 3
# Share of the way back in which the learning rate grows again, as a divisor
# (assumption).
GROWS_WITHIN = 4
# Knobs by which a policy has dealt with a loss that is not finite.
REFUSALS = ("skip", "restore", "rollback")


class Halt(NamedTuple):
    """Why a run does not simply go on.

    Attributes:
      step: the last one that counts.
      knob: "stop" or "rollback", which a policy asked for; None: a number is not finite
        and no policy refused the update.
      policy: the one that asked.
      why: in words.
    """

    step: int
    knob: str | None
    policy: str | None
    why: str


class HaltWatch:
    """Looks through the records of a run for the step that halts it.

    Args:
      names: of the values in a record.
      controller: its policies ask for stops and rollbacks.

    Attributes:
      lost: steps up to the last one looked at, without a gap, whose losses were not
        finite and which float16 skipped.
    """

    def __init__(
        self,
        names: Sequence[str],
        controller: Controller,
    ):
        self._names = list(names)
        self._controller = controller
        self.lost = 0

    def look(
        self,
        rows: np.ndarray,
        done: int,
    ) -> Halt | None:
        """Find the first of the next steps that halts the run.

        Args:
          rows: their records, float32 (steps, names).
          done: steps before these.
        """
        columns = dict(
            zip(
                self._names,
                rows.T,
                strict=True,
            )
        )
        bad = self._not_finite(columns)
        if "loss_scale" in columns:
            # A single batch whose forward pass overflows float16 is skipped, as is
            # usual. The loss is measured before it is scaled, so no smaller scale would
            # help if there are several.
            lost = _in_a_row(bad, self.lost)
            self.lost = int(lost[-1]) if len(lost) else 0
            bad &= lost >= MOST_LOST
        stops = self._asked("stop", columns)
        rollbacks = self._asked("rollback", columns)
        halts = bad | stops | rollbacks
        if not halts.any():
            return None

        row = int(np.argmax(halts))
        step = done + row + 1
        if bad[row]:
            return Halt(step, None, None, f"the loss of step {step} is {rows[row, 0]}")
        knob = "rollback" if rollbacks[row] else "stop"
        return self._halt_by_policy(step, knob, columns, row)

    def halt_at_the_end(self, step: int) -> Halt:
        """Return the halt of a run that ends with lost steps."""
        losses = f"the last {self.lost} losses are"
        if self.lost == 1:
            losses = "the loss of the last step is"
        why = f"{losses} not finite, and nothing was updated since"
        return Halt(step, None, None, why)

    def _halt_by_policy(
        self,
        step: int,
        knob: str,
        columns: Mapping[str, np.ndarray],
        row: int,
    ) -> Halt:
        policies = self._controller.policies
        policy = next(
            policies[index]
            for index, moved in self._controller.moves
            if moved == knob and columns[f"{policies[index].name}:{moved}"][row] != 0
        )
        signals = [name for name in policy.watches[:SHOWN] if name in columns]
        why = ", ".join(f"{name} is {columns[name][row]:.6g}" for name in signals)
        return Halt(step, knob, policy.name, why or "it said so")

    def _asked(
        self,
        knob: str,
        columns: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """Steps in which a policy asked for a stop or a rollback: bool (steps,)."""
        steps = len(columns["loss"])
        return columns.get(knob, np.zeros(steps)) > 0

    def _not_finite(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Steps whose loss is not finite and no policy has refused: bool (steps,)."""
        bad = ~np.isfinite(columns["loss"])
        if WEIGHT in columns:
            bad &= columns[WEIGHT] != 0  # else it is a mean of nothing
        for index, knob in self._controller.moves:
            policy = self._controller.policies[index].name
            # Loss scaling moves the scale for the gradients: that does not help a loss.
            if knob in REFUSALS and policy != "loss_scaling":
                bad &= columns[f"{policy}:{knob}"] == 0
        return bad


def _in_a_row(
    bad: np.ndarray,
    before: int,
) -> np.ndarray:
    """Count for each step the bad ones up to it, without a gap."""
    counts = []
    for is_bad in bad:
        before = before + 1 if is_bad else 0
        counts.append(before)
    return np.array(counts, int)


class Rollbacks:
    """The rollbacks of a run so far, and the target of the next one.

    Args:
      limits: of the policies: "rollbacks" at most (0: none), "rate" factor of the
        learning rate at each (1), "patience" steps for which the run was lost before a
        policy asks (0): checkpoints from within them are no good.
      past: `to_json` of the checkpoint that the run goes on from.

    Attributes:
      slow: arguments of `with_rate_factor` after the last rollback. Number k lowers the
        learning rate by rate**k, and lets it grow to rate**(k - 1) within a quarter of
        the way back: where the data was at fault, which is skipped, that costs next to
        nothing; a rate that was at fault is lowered for good the next time.
      tried: what was done so far, in words.
    """

    def __init__(
        self,
        limits: Mapping[str, Any],
        past: Mapping[str, Any] | None = None,
    ):
        past = past or {}
        self.most = int(limits.get("rollbacks", 0))
        self._factor = float(limits.get("rate", 1.0))
        self._patience = int(limits.get("patience", 0))
        self.count = past.get("count", 0)
        self.slow = (1.0, 1.0, 1)
        self._used = list(past.get("used", []))
        self.tried = list(past.get("tried", []))

    @property
    def used_up(self) -> bool:
        """Whether the run may not go back again."""
        return self.count >= self.most

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's record."""
        return {
            "count": self.count,
            "used": self._used,
            "tried": self.tried,
        }

    def restore(
        self,
        checkpoints: Checkpoints,
        read: Callable[[int], Any],
        halt: Halt,
        on_damaged: Callable[[int, str], None],
    ) -> tuple[int, Any]:
        """Read the checkpoint to go back to, and count it.

        It is the newest readable one from before the run was lost that was not gone
        back to before; if there is none, the oldest.

        Args:
          checkpoints: of the run.
          read: a step to its state.
          halt: why the run goes back.
          on_damaged: called with each step that can't be read, and why.

        Returns:
          The step and its state.

        Raises:
          CheckpointError: none of them can be read.
        """
        checkpoints.close()  # a save that is on its way counts
        for to in self._targets(checkpoints.steps(), halt):
            try:
                state = read(to)
            except Damaged as error:
                on_damaged(to, error.reason)
                continue
            self._count(to, halt)
            return to, state
        raise CheckpointError(
            f"the run can't go back at step {halt.step} ({halt.why}): none of its"
            " checkpoints can be read",
            where=checkpoints.folder,
            remedy="start it anew, or fix the folder and go on with --resume",
        )

    def _targets(
        self,
        committed: Sequence[int],
        halt: Halt,
    ) -> list[int]:
        """Steps to go back to, the best first."""
        last_good = halt.step - (self._patience if halt.knob else 0)
        good = {step for step in committed if step <= last_good}
        fresh = good - set(self._used)
        return sorted(fresh, reverse=True) or list(committed[:1])

    def _count(
        self,
        to: int,
        halt: Halt,
    ) -> None:
        self.slow = (
            self._factor ** (self.count + 1),
            self._factor**self.count,
            max(1, (halt.step - to) // GROWS_WITHIN),
        )
        self.count += 1
        earlier = [step for step in self._used if step < to]
        self._used = [*earlier, to]
        self.tried.append(
            f"at step {halt.step} ({halt.why}) back to step {to}, learning rate"
            f" times {self.slow[0]:g}"
        )


# ---- rollback.json ----


def remember(
    folder: Path,
    to: int,
    record: RunRecord,
) -> None:
    """Add a rollback to the run's file; it is on the disk when this returns.

    Args:
      folder: of the run.
      to: the step that it went back to.
      record: as the run goes on.

    Raises:
      CheckpointError: it can't be written.
    """
    path = folder / FILE
    part = folder / f"{FILE}.part"
    entry = {
        "to": to,
        "position": record.position.to_json(),
        "slow": record.slow,
        **record.past_to_json(),
    }
    try:
        with part.open("w") as file:
            json.dump([*_entries(path), entry], file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(
            f"the rollback can't be written down: {error.strerror or error}",
            where=path,
            remedy=(
                f"{writing_remedy(error)}; then go on with --resume, or resume() in a"
                " notebook"
            ),
        ) from error


def recalled(
    folder: Path,
    step: int,
    record: RunRecord,
) -> RunRecord:
    """Return a checkpoint's record with the rollbacks to it that it doesn't know of.

    Args:
      folder: of the run.
      step: of the checkpoint.
      record: as the checkpoint holds it.

    Raises:
      CheckpointError: the run's file can't be read.
    """
    count = (record.rollbacks or {}).get("count", 0)
    later = [
        entry
        for entry in _entries(folder / FILE)
        if entry["to"] == step and entry["rollbacks"]["count"] > count
    ]
    if not later:
        return record
    content = {**record.to_json(), **later[-1]}
    return RunRecord.from_json(content)


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"what a rollback left can't be read: {error}",
            where=path,
            remedy=(
                "restore it from a copy, or delete it: the run then goes back once more"
            ),
        ) from error
