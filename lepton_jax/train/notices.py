"""The reasons why a run may be worse than it could be, as a person is told of them.

A policy says so by the knob `notice`; the sentence is one of its `Policy.notices`. What
no policy can see, since it takes the whole curve, is looked for at the end of the run.
An example: the loss of a run of 80 steps falls evenly from 2 to 1. A quarter of what it
fell, it fell in the last quarter of the run, so more steps would lower it further.

>>> losses = 2 - np.arange(80) / 80
>>> print(f"{_late_share(losses):.2f}")
0.26
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.controller.core import Controller
from lepton_jax.controller.journal import SHOWN

KNOB = "notice"
# the decider of those that are found at the end
RUN = "run"
# steps that a run must have before its curve is judged; assumption
LEAST = 40
# last and first steps whose mean loss is compared, as a share of the run; assumption
ENDS = 0.05
# standard errors of a mean loss by which it must have fallen; assumption
ERRORS = 3.0
# share of what the loss fell that may fall to the last quarter of the run: 0.25 for a
# straight line, 0.06 for exp(-3 t / T), 0.09 for 1 / (1 + 9 t / T) ** 0.5; assumption
LATE = 0.15
# the last evaluation's loss above the best one's at which a model overfits; assumption
ABOVE_BEST = 1.1
# evaluations before the last one is compared with them
EVALUATIONS = 4


class Noticed(NamedTuple):
    """One reason, in one sentence, and what to do about it.

    Attributes:
      step: the step at which it was noticed.
      policy: the policy that did, or "run".
      what: what is wrong.
      remedy: what to do.
      signals: the numbers that led to it.
    """

    step: int
    policy: str
    what: str
    remedy: str
    signals: dict[str, float]

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the fields of an event."""
        fields = self._asdict()
        return {**fields, "text": str(self)}


class NoticeWatch:
    """Looks through the records of a run for what its policies notice.

    Args:
      names: of the values in a record.
      controller: its policies.

    Attributes:
      noticed: what was noticed so far, each once.
    """

    def __init__(
        self,
        names: Sequence[str],
        controller: Controller,
    ):
        self.noticed: list[Noticed] = []
        self._columns = {name: index for index, name in enumerate(names)}
        self._policies = [
            controller.policies[index]
            for index, knob in controller.moves
            if knob == KNOB and controller.policies[index].notices
        ]

    def look(
        self,
        rows: np.ndarray,
        done: int,
    ) -> list[Noticed]:
        """Return what is new in the next steps.

        Args:
          rows: their records, float32 (steps, names).
          done: steps before these.
        """
        fresh = []
        for policy in self._policies:
            raised = np.nan_to_num(rows[:, self._columns[f"{policy.name}:{KNOB}"]])
            for row in np.flatnonzero(raised).tolist():
                noticed = self._noticed(policy, int(raised[row]), rows[row], done + row)
                if noticed is not None:
                    fresh.append(noticed)
                    self.noticed.append(noticed)
        return fresh

    def has_said(self, found: Noticed) -> bool:
        """Whether a policy has said the same, up to the first colon."""
        subject = found.what.partition(":")[0]
        return any(n.what.partition(":")[0] == subject for n in self.noticed)

    def forget(self, step: int) -> None:
        """Forget what was noticed after a step, which the run went back to."""
        self.noticed = [n for n in self.noticed if n.step <= step]

    def _noticed(
        self,
        policy: Any,
        number: int,
        row: np.ndarray,
        done: int,
    ) -> Noticed | None:
        """Return a policy's notice of one step; None if it is known."""
        what, remedy = policy.notices[min(number, len(policy.notices)) - 1]
        known = {(n.policy, n.what) for n in self.noticed}
        if (policy.name, what) in known:
            return None
        signals = {
            name: float(row[self._columns[name]])
            for name in policy.watches[:SHOWN]
            if name in self._columns
        }
        return Noticed(done + 1, policy.name, what, remedy, signals)


# ---- at the end of the run ----


def found_at_the_end(
    step: int,
    records: Mapping[str, np.ndarray],
    evaluations: Sequence[tuple[int, Mapping[str, float]]],
    is_whole: bool,
) -> Iterator[Noticed]:
    """Find what the curves of a finished run say against it.

    Args:
      step: its last step.
      records: a value a step, by name.
      evaluations: (step, metrics) of each.
      is_whole: whether the records begin with the run.
    """
    losses = records["loss"]
    losses = losses[np.isfinite(losses)]
    if is_whole and len(losses) >= LEAST:
        yield from _of_losses(step, losses, records.get("loss_blank"))
    yield from _of_evaluations(step, evaluations)


def _of_losses(
    step: int,
    losses: np.ndarray,
    blank: np.ndarray | None,
) -> Iterator[Noticed]:
    first, last = _ends(losses)
    signals = {"loss at first": first, "loss at last": last}
    if blank is not None and np.isfinite(blank).any():
        signals["loss_blank"] = float(np.nanmean(blank[np.isfinite(blank)]))
    level = min(first, signals.get("loss_blank", first))
    if last >= level - _error(losses):
        yield Noticed(
            step,
            RUN,
            "the model has not learned: its training loss is no lower than at first,"
            " or than that of a model whose outputs are all zero",
            "look at the data, the loss and the scale of the inputs",
            signals,
        )
        return
    late = _late_share(losses)
    if late >= LATE:
        yield Noticed(
            step,
            RUN,
            "the training loss was still falling fast when the budget ended",
            "give the run more steps",
            {**signals, "share of the fall in the last quarter": late},
        )


def _length_of_end(losses: np.ndarray) -> int:
    """Return how many losses are an end of the run, the first ones or the last."""
    return max(2, round(ENDS * len(losses)))


def _ends(losses: np.ndarray) -> tuple[float, float]:
    """Return the mean loss of the first and of the last steps."""
    count = _length_of_end(losses)
    return float(np.median(losses[:count])), float(losses[-count:].mean())


def _error(losses: np.ndarray) -> float:
    """Return by how much the means of two ends may differ by chance."""
    later = losses[len(losses) // 2 :]
    count = _length_of_end(losses)
    return float(ERRORS * later.std() / count**0.5)


def _late_share(losses: np.ndarray) -> float:
    """Return the share of the loss's fall that falls to the last quarter of a run."""
    first, last = _ends(losses)
    count = _length_of_end(losses)
    quarter = round(0.75 * len(losses))
    before = losses[quarter - count : quarter + count].mean()
    return float((before - last) / max(first - last, 1e-30))


def _of_evaluations(
    step: int,
    evaluations: Sequence[tuple[int, Mapping[str, float]]],
) -> Iterator[Noticed]:
    losses = [(m["loss"], at) for at, m in evaluations if "loss" in m]
    if len(losses) < EVALUATIONS:
        return
    best, at = min(losses)
    last = losses[-1][0]
    if last > best + (ABOVE_BEST - 1) * abs(best):
        yield Noticed(
            step,
            RUN,
            f"the model overfits: the evaluation's loss was lowest at step {at}",
            'keep that one with Recipe(best="-loss"), or give fewer steps or more data',
            {"evaluation_loss": float(last), "lowest evaluation_loss": float(best)},
        )
