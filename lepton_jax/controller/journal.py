"""The journal: the decisions of a run, as lines of `controller.jsonl`.

Policies decide, and so do a person and the host. A decision is a step in which a
policy's contribution to a knob differs from the step before, or in which the policy
asks for a skip, a stop and the like. The journal is derived from the steps' records, so
it costs the devices nothing. Its lines, by kind:

- "start": a fit began after "step"; the signals "watched" and the knobs that may be
  "moved". The "budget" that policies look at begins after the first of two steps and
  ends with the second.
- "decision": in "step" a "policy" moved a "knob" "from" one effective value "to"
  another; its "contribution", and the first four of the "signals" that it watches.
  Where no policy did, "policy" is "schedule", "live" (a person), "recipe" or
  "rollback".
- "motion": the same in each of the steps from "step" to "last"; "values" are the
  effective ones of each.
- "notice": the run itself has found at its end, in "step", that it may be worse than
  it could be: "what", "remedy" and the "signals" that led to it. Where a policy says so
  the line is a decision about the knob "notice", with "what" and "remedy".
- "live": a person's request, applied after "step": "request", "settings", "who", "pid".
- "recipe": from "step" on the bases of the knobs in "settings" are the recipe's present
  values, not those of the checkpoint; NaN: the learning rate follows its schedule.
- "rollback": after "step" the run went back "to" a step; "position" is where the data
  goes on. Lines of later steps are undone by it; `in_effect` leaves them out.

Values are float32, exact: replay.py makes the same run from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.controller.core import Controller
from lepton_jax.controller.knobs import KNOBS
from lepton_jax.controller.policy import Notice
from lepton_jax.controller.state import ControllerState
from lepton_jax.monitor import Lines, encode, plain, read_events

FILE = "controller.jsonl"
# signals next to a decision
SHOWN = 4
# the decider, where the recipe says otherwise than the checkpoint
RECIPE = "recipe"


class _Request(NamedTuple):
    """A base of a knob that a person or the recipe has set.

    Attributes:
      after: the step after which it takes effect.
      knob: the name of the knob.
      base: its base from then on.
      who: fields of the line about the person, or "who": `RECIPE`.
    """

    after: int
    knob: str
    base: float
    who: dict[str, Any]


class Journal:
    """The decisions of a run, derived from its records and appended to its file.

    Args:
      folder: the run's folder. None: nothing is written.
      controller: the controller that decides.
      records: names of the columns of a record.
      step: steps done.
      begun: steps before the budget.
      until: steps at its end.
      keep: number of lines of an older file that belong to this run's past; None: those
        of steps up to `step`.

    Attributes:
      lines: number of lines in the file so far.
      undone: lines that were cut off and are a person's requests, which are no longer
        in effect.
    """

    def __init__(
        self,
        folder: Path | None,
        controller: Controller,
        records: list[str],
        step: int,
        begun: int,
        until: int,
        keep: int | None = None,
    ):
        self.controller = controller
        self.until = until
        self._begun = begun
        self.lines = 0
        self._columns = {name: i for i, name in enumerate(records)}
        self._path = None if folder is None else Path(folder) / FILE
        self._step = step
        self._file: Lines | None = None
        self._rows: list[np.ndarray] = []
        self._base: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._requests: list[_Request] = []
        self.undone = self._open(keep)
        self._first = step
        self._announced = False
        if controller.policies:
            self._announce()

    def begin(
        self,
        state: Any,
        step: int,
    ) -> None:
        """Start from a state: decisions are differences from it.

        It waits for the devices.
        """
        controller_state = state.controller
        self._step = step
        self._rows = []
        # a rollback undoes the others
        self._requests = [r for r in self._requests if r.after <= step]
        if not isinstance(controller_state, ControllerState):
            self._columns = {}
            return
        knobs, base, contributions = jax.device_get(
            (
                controller_state.knobs,
                controller_state.base,
                controller_state.contributions,
            )
        )
        self._begun = int(np.asarray(controller_state.fed["begun"]))
        self._base = {name: float(x) for name, x in base.items()}
        self._last = {name: float(x) for name, x in knobs.items()}
        moves = zip(self.controller.moves, contributions, strict=True)
        for (index, knob), contribution in moves:
            policy = self.controller.policies[index].name
            self._last[_column(policy, knob)] = float(contribution)

    def add(self, rows: np.ndarray) -> None:
        """Add the records of the next steps, to be written by the next `flush`.

        Args:
          rows: (steps, records).
        """
        self._rows.append(rows)

    def flush(self) -> None:
        """Write the decisions of the steps added so far."""
        if not self._rows or not self._columns:
            return
        rows = np.concatenate(self._rows)
        self._rows = []
        lines = [*self._by_policies(rows), *self._by_others(rows)]
        lines.sort(key=lambda line: line["step"])

        self._begun = self._begun_before(rows, len(rows))
        self._step += len(rows)
        last = rows[-1]
        self._last = {name: float(last[self._columns[name]]) for name in self._last}
        for request in self._requests:
            if request.after < self._step:
                self._base[request.knob] = request.base
        self._requests = [r for r in self._requests if r.after >= self._step]
        for line in lines:
            self._write(line)

    def requested(
        self,
        step: int,
        request: str,
        who: dict[str, Any],
        settings: dict[str, float],
    ) -> None:
        """Write a person's request.

        Args:
          step: the step after which it is applied.
          request: its kind.
          who: fields of the line about the person.
          settings: bases that are set, by knob.
        """
        self._ask(step, settings, who)
        line = {"kind": "live", "step": step, "request": request}
        if settings:
            line["settings"] = settings
        self._write(line | who)

    def given(
        self,
        step: int,
        settings: Mapping[str, float],
    ) -> None:
        """Write that the recipe's own values replace those of the checkpoint.

        Args:
          step: the step after which they take effect.
          settings: bases by knob.
        """
        self._ask(step, settings, {"who": RECIPE})
        self._write(
            {
                "kind": "recipe",
                "step": step,
                "settings": dict(settings),
            }
        )

    def rolled_back(self, **fields: Any) -> None:
        """Write a rollback, after the decisions that it undoes."""
        self.flush()
        self._write({"kind": "rollback", **fields})

    def noticed(self, **fields: Any) -> None:
        """Write what the run has noticed at its end."""
        self.flush()
        self._write({"kind": "notice", **fields})

    def movers(self, knob: str) -> list[str]:
        """List the policies that contribute to a knob in the last step flushed."""
        idle = {"multiply": 1.0, "least": np.inf, "any": 0.0}.get(
            KNOBS[knob].combine, np.nan
        )
        movers = []
        for index, moved in self.controller.moves:
            policy = self.controller.policies[index].name
            if moved != knob:
                continue
            contribution = self._last[_column(policy, knob)]
            if contribution != idle and not np.isnan(contribution):
                movers.append(policy)
        return movers

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _ask(
        self,
        step: int,
        settings: Mapping[str, float],
        who: Any,
    ) -> None:
        for knob, base in settings.items():
            self._requests.append(_Request(step, knob, base, who))

    # ---- which steps are decisions ----

    def _series(
        self,
        name: str,
        rows: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a column, and the same a step before."""
        values = rows[:, self._columns[name]]
        before = np.asarray([self._last[name]], np.float32)
        return values, np.concatenate([before, values[:-1]])

    def _by_policies(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        for index, knob in self.controller.moves:
            policy = self.controller.policies[index]
            values, _ = self._series(_column(policy.name, knob), rows)
            for first, last in _runs(self._moved(policy.name, knob, rows)):
                signals = {
                    name: self._signal(name, rows, last)
                    for name in policy.watches[:SHOWN]
                }
                line = self._line(
                    policy.name,
                    knob,
                    rows,
                    first,
                    last,
                )
                line["contribution"] = float(values[last])
                if knob == "notice" and policy.notices:
                    line |= _said(policy.notices, values[first])
                line["signals"] = signals
                yield line

    def _by_others(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yield the changes of knobs that no policy decided."""
        steps = np.arange(len(rows))
        for knob in self._base:
            moved = self._moved_by_others(knob, rows)
            spans = self._spans(knob)
            stops = [*(span.after for span in spans[1:]), len(rows)]
            for span, stop in zip(spans, stops, strict=True):
                inside = (steps >= span.after) & (steps < stop)
                decider, who = self._decider(span)
                for first, last in _runs(moved & inside):
                    yield self._line(decider, knob, rows, first, last) | who

    def _moved_by_others(
        self,
        knob: str,
        rows: np.ndarray,
    ) -> np.ndarray:
        """Return the steps in which a knob moved, but by no policy: (steps,) bool."""
        moved = _differ(*self._series(knob, rows))
        for index, own in self.controller.moves:
            if own == knob:
                policy = self.controller.policies[index].name
                moved &= ~self._moved(policy, knob, rows)
        return moved

    def _spans(self, knob: str) -> list[_Request]:
        """Return the bases of a knob; `after` is the first row under each."""
        spans = [
            _Request(
                0,
                knob,
                self._base[knob],
                {},
            )
        ]
        for request in self._requests:
            if request.knob == knob:
                spans.append(request._replace(after=request.after - self._step))
        return spans

    def _decider(self, span: _Request) -> tuple[str, dict[str, Any]]:
        """Return who moves a knob in a span, and fields about the person."""
        who = {} if span.who.get("who") == RECIPE else span.who
        if np.isnan(span.base):
            return "schedule", who
        if span.who.get("who") == RECIPE:
            return RECIPE, who
        limited = span.knob == "learning_rate" and "rate" in self.controller.limits
        if limited and not span.who:
            return "rollback", who
        return "live", who

    def _moved(
        self,
        policy: str,
        knob: str,
        rows: np.ndarray,
    ) -> np.ndarray:
        """Return the steps in which a policy decided about a knob: (steps,) bool."""
        values, before = self._series(_column(policy, knob), rows)
        if KNOBS[knob].combine == "any":
            return np.nan_to_num(values) != 0
        return _differ(values, before)

    def _line(
        self,
        policy: str,
        knob: str,
        rows: np.ndarray,
        first: int,
        last: int,
    ) -> dict[str, Any]:
        """Return the line of a decision, or of a motion over several rows."""
        values, before = self._series(knob, rows)
        line: dict[str, Any] = {
            "kind": "motion" if last > first else "decision",
            "step": self._step + first + 1,
            "policy": policy,
            "knob": knob,
            "from": float(before[first]),
            "to": float(values[last]),
        }
        if last > first:
            line["last"] = self._step + last + 1
            line["values"] = values[first : last + 1].tolist()
        return line

    def _signal(
        self,
        name: str,
        rows: np.ndarray,
        index: int,
    ) -> float:
        if name in self._columns:
            return float(rows[index, self._columns[name]])
        begun = self._begun_before(rows, index)
        step = self._step + index - begun
        progress = np.float32((step + 1) / max(self.until - begun, 1))
        unrecorded = {
            "step": step,
            "progress": float(progress),
            "batch_size": self.controller.recipe.batch_size,
        }
        return unrecorded[name]

    def _begun_before(
        self,
        rows: np.ndarray,
        index: int,
    ) -> int:
        """Return the step after which the run began anew for the last time."""
        if "restart" not in self._columns:
            return self._begun
        restarts = np.flatnonzero(rows[:index, self._columns["restart"]])
        return self._step + int(restarts[-1]) + 1 if len(restarts) else self._begun

    # ---- the file ----

    def _open(self, keep: int | None) -> list[dict[str, Any]]:
        """Open an older file, if there is one, and cut it to this run's past.

        Returns:
          The lines that were cut off and are a person's requests.
        """
        if self._path is None or not self._path.exists():
            return []
        self._file = Lines(self._path)
        old = read_events(self._path)
        if keep is None:
            later = (i for i, line in enumerate(old) if line["step"] > self._step)
            keep = next(later, len(old))
        self.lines = min(keep, len(old))
        cut = self._file.cut(keep)

        for line in old[:keep]:
            # the effect of such a request is not written yet
            if line["kind"] == "live" and line["step"] == self._step:
                who = {name: line[name] for name in ("who", "pid") if name in line}
                self._ask(
                    self._step,
                    line.get("settings", {}),
                    who,
                )
        if cut:
            self._set_aside(cut)
        return [line for line in old[keep:] if line["kind"] == "live"]

    def _set_aside(self, texts: Iterable[Any]) -> None:
        assert self._path is not None
        aside = Lines(self._path.parent / "set_aside" / FILE)
        for text in texts:
            aside.append(text)
        aside.close()

    def _announce(self) -> None:
        self._announced = True
        policies = self.controller.policies
        watched = dict.fromkeys(name for p in policies for name in p.watches)
        moved = dict.fromkeys(knob for p in policies for knob in p.moves)
        self._write(
            {
                "kind": "start",
                "step": self._first,
                "budget": [self._begun, self.until],
                "policies": [p.name for p in policies],
                "watched": list(watched),
                "moved": list(moved),
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        if not self._announced:
            self._announce()
        self._file = self._file or Lines(self._path)
        self._file.append(encode(plain(line)))
        self.lines += 1


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a journal, oldest first.

    Args:
      path: the file, or the run folder that holds it.

    Raises:
      DataError: there is none, or it is damaged.
    """
    return read_events(Path(path), FILE)


def knobs_set_live(folder: Path) -> set[str]:
    """Return the knobs that somebody has set while the run of a folder went on."""
    if not (folder / FILE).is_file():
        return set()
    knobs: set[str] = set()
    for line in in_effect(read_journal(folder)):
        if line["kind"] == "live":
            knobs.update(line.get("settings", {}))
    return knobs


def in_effect(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without those that a rollback has undone.

    The rollbacks themselves stay. Example:

      >>> lines = [
      ...     {"kind": "decision", "step": 5, "knob": "skip", "to": 1.0},
      ...     {"kind": "decision", "step": 9, "knob": "skip", "to": 1.0},
      ...     {"kind": "rollback", "step": 12, "to": 8},
      ... ]
      >>> [(line["kind"], line["step"]) for line in in_effect(lines)]
      [('decision', 5), ('rollback', 12)]
    """
    effective: list[dict[str, Any]] = []
    for line in lines:
        if line["kind"] == "rollback":
            shortened = [_up_to(old, line["to"]) for old in effective]
            effective = [old for old in shortened if old is not None]
        effective.append(line)
    return effective


def _up_to(
    line: dict[str, Any],
    step: int,
) -> dict[str, Any] | None:
    """Return the part of a line that is of steps up to `step`."""
    if line["kind"] == "rollback":
        return line if line["to"] <= step else None
    if line["step"] > step:
        return None
    if line.get("last", 0) <= step:
        return line
    values = line["values"][: step - line["step"] + 1]
    return {
        **line,
        "last": step,
        "values": values,
        "to": values[-1],
    }


def _said(
    notices: tuple[Notice, ...],
    number: float,
) -> dict[str, str]:
    """Return the sentence that a contribution to the knob `notice` stands for."""
    return notices[min(int(number), len(notices)) - 1]._asdict()


def _column(policy: str, knob: str) -> str:
    """Name of the column that holds a policy's contributions to a knob."""
    return f"{policy}:{knob}"


def _differ(
    left: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:
    return (left != right) & ~(np.isnan(left) & np.isnan(right))


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return (first, last) of each run of consecutive Trues."""
    padded = np.concatenate([[False], mask, [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(padded))
    firsts = edges[::2]
    lasts = edges[1::2] - 1
    return zip(
        firsts.tolist(),
        lasts.tolist(),
        strict=True,
    )
