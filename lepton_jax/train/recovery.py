"""When a run must stop or go back, and to where: the host's part.

What a run has gone back from is part of each later checkpoint. Until there is one it
stands in `rollback.json`, so that a run that is killed in between neither repeats the
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

FILE = "rollback.json"
WEIGHT = "weight"  # record of a loss that gives weights: their sum over the batch
# Steps in a row that float16 may lose to overflows of the forward pass (assumption: odd
# batches come alone).
MOST_LOST = 3


class Halt(NamedTuple):
    """Why a run does not simply go on.

    Attributes:
      step: the last one that counts.
      knob: "stop" or "rollback", which a policy asked for; None: a number is not finite
        and nobody refused the update.
      policy: that asked.
      why: in words.
    """

    step: int
    knob: str | None
    policy: str | None
    why: str


def find_halt(
    rows: np.ndarray,
    names: Sequence[str],
    controller: Controller,
    done: int,
    lost: int = 0,
) -> Halt | None:
    """Find the first of some steps that halts the run.

    Args:
      rows: records, float32 (steps, names).
      names: of the columns.
      controller: whose policies asked.
      done: steps before these.
      lost: steps up to `done`, without a gap, whose losses were not finite.
    """
    columns = {name: rows[:, i] for i, name in enumerate(names)}
    bad = _not_finite(columns, controller)
    if "loss_scale" in columns:
        # A single batch whose forward pass overflows float16 is skipped, as is usual.
        # The loss is measured before it is scaled: no smaller scale would help several.
        bad &= _in_a_row(bad, lost) >= MOST_LOST
    stop, back = (
        columns.get(knob, np.zeros(len(rows))) > 0 for knob in ("stop", "rollback")
    )
    if not (bad | stop | back).any():
        return None
    row = int(np.argmax(bad | stop | back))
    step = done + row + 1
    if bad[row]:
        return Halt(step, None, None, f"the loss of step {step} is {rows[row, 0]}")
    knob = "rollback" if back[row] else "stop"
    policy = next(
        controller.policies[p]
        for p, k in controller.moves
        if k == knob and columns[f"{controller.policies[p].name}:{k}"][row] != 0
    )
    seen = ", ".join(
        f"{name} is {columns[name][row]:.6g}"
        for name in policy.watches[:SHOWN]
        if name in columns
    )
    return Halt(step, knob, policy.name, seen or "it said so")


def lost_at_the_end(
    rows: np.ndarray,
    names: Sequence[str],
    controller: Controller,
    lost: int,
) -> int:
    """Count the last steps, without a gap, whose losses are not finite.

    Args:
      rows, names, controller: as of `find_halt`.
      lost: the count before these steps.
    """
    columns = {name: rows[:, i] for i, name in enumerate(names)}
    if not len(rows) or "loss_scale" not in columns:
        return 0
    return int(_in_a_row(_not_finite(columns, controller), lost)[-1])


def _not_finite(
    columns: Mapping[str, np.ndarray], controller: Controller
) -> np.ndarray:
    """Steps whose loss is not finite, and that no policy has seen to."""
    bad = ~np.isfinite(columns["loss"])
    if WEIGHT in columns:
        bad &= columns[WEIGHT] != 0  # else it is a mean of nothing
    for p, knob in controller.moves:
        policy = controller.policies[p].name
        # the scale of the loss is moved for its gradients: it does not help the loss
        if knob in ("skip", "restore", "rollback") and policy != "loss_scaling":
            bad &= columns[f"{policy}:{knob}"] == 0
    return bad


def _in_a_row(bad: np.ndarray, before: int) -> np.ndarray:
    """For each step the number of bad ones up to it, without a gap."""
    counts = []
    for one in bad:
        before = before + 1 if one else 0
        counts.append(before)
    return np.array(counts, int)


class Rollbacks:
    """How often a run went back, and where it goes next.

    Args:
      limits: of the policies: "rollbacks" at most (0: none), "rate" factor of the
        learning rate at each (1), "patience" steps for which the run was lost before a
        policy asks (0): what was saved in them is no good.
      kept: of the checkpoint that the run goes on from.

    Attributes:
      slow: arguments of `with_rate_factor` after the last rollback. Number k lowers the
        learning rate by rate**k, and lets it grow to rate**(k - 1) within a quarter of
        the way back: where the data was at fault, which is skipped, that costs next to nothing;
        a rate that was at fault is lowered for good the next time.
      tried: what was done so far, in words.
    """

    def __init__(
        self,
        limits: Mapping[str, Any],
        kept: Mapping[str, Any] | None = None,
    ):
        kept = kept or {}
        self.most = int(limits.get("rollbacks", 0))
        self._factor = float(limits.get("rate", 1.0))
        self._patience = int(limits.get("patience", 0))
        self.count = kept.get("count", 0)
        self.slow = (1.0, 1.0, 1)
        self._used = list(kept.get("used", []))
        self.tried = list(kept.get("tried", []))

    @property
    def kept(self) -> dict[str, Any]:
        """Plain data for a checkpoint's record."""
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
        back to before; the oldest for want of others.

        Args:
          checkpoints: of the run.
          read: a step to its state.
          halt: why the run goes back.
          on_damaged: told of each step that can't be read, and why.

        Returns:
          The step and its state.

        Raises:
          CheckpointError: none of them can be read.
        """
        checkpoints.close()  # a save that is on its way counts
        committed = checkpoints.steps()
        before = halt.step - (self._patience if halt.knob else 0)
        targets = (
            sorted(
                {step for step in committed if step <= before} - set(self._used),
                reverse=True,
            )
            or committed[:1]
        )
        for to in targets:
            try:
                state = read(to)
            except Damaged as error:
                on_damaged(to, error.reason)
                continue
            self.slow = (
                self._factor ** (self.count + 1),
                self._factor**self.count,
                max(1, (halt.step - to) // 4),
            )
            self.count += 1
            self._used = [*(step for step in self._used if step < to), to]
            self.tried.append(
                f"at step {halt.step} ({halt.why}) back to step {to}, learning rate"
                f" times {self.slow[0]:g}"
            )
            return to, state
        raise CheckpointError(
            f"the run can't go back at step {halt.step} ({halt.why}): none of its"
            " checkpoints can be read",
            where=checkpoints.folder,
            remedy="start it anew, or mend the folder and go on with --resume",
        )


def remember(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add what a rollback left, with its step as "to", to the run's file; it is on the
    disk when this returns.

    Raises:
      CheckpointError: it can't be written.
    """
    path = folder / FILE
    part = folder / f"{FILE}.part"
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
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """A checkpoint's record as it stands after the rollbacks to it that it does not
    know of.
    """
    count = (record.get("rollbacks") or {}).get("count", 0)
    later = [
        entry
        for entry in _entries(folder / FILE)
        if entry["to"] == step and entry["rollbacks"]["count"] > count
    ]
    return {**record, **later[-1]} if later else dict(record)


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
