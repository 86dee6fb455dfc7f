"""What was decided in a run, by policies, by a person and by the host, as lines of
`controller.jsonl`.

A decision is a step in which a policy's contribution to a knob differs from the step
before, or in which it asks for a skip, a stop and the like. The journal is derived from
the steps' records, so it costs the devices nothing. Its lines, by kind:

- "start": a fit began after "step"; the signals "watched" and the knobs that may be
  "moved".
- "decision": in "step" a "policy" moved a "knob" "from" one effective value "to"
  another; its "contribution", and the first four of the "signals" that it watches.
  Where no policy did, "policy" is "schedule", "live" (a person), "recipe" or
  "rollback".
- "motion": the same in each of the steps from "step" to "last"; "values" are the
  effective ones of each.
- "live": a person's request, applied after "step": "request", "settings", "who", "pid".
- "recipe": from "step" on the bases of the knobs in "settings" are what the recipe says
  now, and not what the checkpoint had; NaN: the learning rate follows its schedule.
- "rollback": after "step" the run went back "to" a step; "position" is where the data
  goes on. Lines of steps later than that are of what is undone; `in_effect` leaves them
  out.

Values are float32, exact: replay.py makes the same run from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lepton_jax.controller.core import Controller, ControllerState
from lepton_jax.controller.knobs import KNOBS
from lepton_jax.monitor import Lines, encode, plain, read_events

FILE = "controller.jsonl"
SHOWN = 4  # signals beside a decision
RECIPE = "recipe"  # who decided, where the recipe says otherwise than the checkpoint


class Journal:
    """Derives the lines of a run from its records and appends them to its file.

    Args:
      folder: of the run. None: nothing is written.
      controller: whose decisions these are.
      records: names of the columns of a record.
      step, until: steps done, and at the end.
      keep: lines of an older file that belong to this run's past; None: those of steps
        up to `step`.

    Attributes:
      lines: in the file so far.
      undone: lines that were cut off, each of them a person's request that is no longer
        in effect.
    """

    def __init__(
        self,
        folder: Path | None,
        controller: Controller,
        records: list[str],
        step: int,
        until: int,
        keep: int | None = None,
    ):
        self.controller = controller
        self.until = until
        self.lines = 0
        self._columns = {name: i for i, name in enumerate(records)}
        self._path = None if folder is None else Path(folder) / FILE
        self._step = step
        self._file: Lines | None = None
        self._rows: list[np.ndarray] = []
        self._base: dict[str, float] = {}
        self._last: dict[str, float] = {}
        # after which step, knob, base, who
        self._asked: list[tuple[int, str, float, dict[str, Any]]] = []
        self.undone = self._cut(keep)
        self._first = step
        self._announced = False
        if controller.policies:
            self._announce()

    def begin(
        self,
        state: Any,
        step: int,
    ) -> None:
        """Decisions from here on are what differs from this state's. It waits for the
        devices.
        """
        held = state.controller
        self._step = step
        self._rows = []
        # a rollback undoes the others
        self._asked = [asked for asked in self._asked if asked[0] <= step]
        if not isinstance(held, ControllerState):
            self._columns = {}
            return
        knobs, base, contributions = jax.device_get(
            (held.knobs, held.base, held.contributions)
        )
        self._base = {name: float(x) for name, x in base.items()}
        names = [
            f"{self.controller.policies[p].name}:{k}" for p, k in self.controller.moves
        ]
        self._last = {name: float(x) for name, x in knobs.items()} | dict(
            zip(names, map(float, contributions), strict=True)
        )

    def add(self, rows: np.ndarray) -> None:
        """The records of the next steps, (steps, records), to be written by the next
        `flush`.
        """
        self._rows.append(rows)

    def flush(self) -> None:
        """Write what was decided in the steps added so far."""
        if not self._rows or not self._columns:
            return
        rows = np.concatenate(self._rows)
        self._rows = []
        lines = sorted(
            [*self._by_policies(rows), *self._by_nobody(rows)],
            key=lambda line: line["step"],
        )
        self._step += len(rows)
        self._last = {name: float(rows[-1, self._columns[name]]) for name in self._last}
        self._base |= {
            knob: value for after, knob, value, _ in self._asked if after < self._step
        }
        self._asked = [asked for asked in self._asked if asked[0] >= self._step]
        for line in lines:
            self._write(line)

    def requested(
        self,
        step: int,
        request: str,
        who: dict[str, Any],
        settings: dict[str, float],
    ) -> None:
        """A person's request, applied after `step`."""
        self._asked += [(step, knob, value, who) for knob, value in settings.items()]
        self._write(
            {
                "kind": "live",
                "step": step,
                "request": request,
                **({"settings": settings} if settings else {}),
                **who,
            }
        )

    def given(
        self,
        step: int,
        settings: Mapping[str, float],
    ) -> None:
        """The recipe's own values take effect after `step`, in place of the
        checkpoint's.
        """
        for knob, value in settings.items():
            self._asked.append(
                (
                    step,
                    knob,
                    value,
                    {"who": RECIPE},
                )
            )
        self._write(
            {
                "kind": "recipe",
                "step": step,
                "settings": dict(settings),
            }
        )

    def rolled_back(self, **fields: Any) -> None:
        """What is undone is flushed before."""
        self.flush()
        self._write({"kind": "rollback", **fields})

    def movers(self, knob: str) -> list[str]:
        """The policies that contribute to a knob, as of the last step that was
        flushed.
        """
        found = [
            self.controller.policies[p] for p, k in self.controller.moves if k == knob
        ]
        idle = {"multiply": 1.0, "least": np.inf, "any": 0.0}.get(
            KNOBS[knob].combine, np.nan
        )
        last = {p.name: self._last[f"{p.name}:{knob}"] for p in found}
        return [
            name
            for name, contribution in last.items()
            if contribution != idle and not np.isnan(contribution)
        ]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # ---- what is a decision ----

    def _series(
        self,
        name: str,
        rows: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """A column, and the same a step before."""
        values = rows[:, self._columns[name]]
        return values, np.concatenate(
            [np.asarray([self._last[name]], np.float32), values[:-1]]
        )

    def _by_policies(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        for p, knob in self.controller.moves:
            policy = self.controller.policies[p]
            values, _ = self._series(f"{policy.name}:{knob}", rows)
            for first, last in _runs(self._moved(policy.name, knob, rows)):
                row = rows[last]
                signals = {
                    name: self._signal(name, row, last)
                    for name in policy.watches[:SHOWN]
                }
                yield self._line(
                    policy.name,
                    knob,
                    rows,
                    first,
                    last,
                    contribution=float(values[last]),
                    signals=signals,
                )

    def _by_nobody(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        for knob in self._base:
            moved = _differ(*self._series(knob, rows))
            for p, k in self.controller.moves:
                moved &= (k != knob) | ~self._moved(
                    self.controller.policies[p].name, k, rows
                )
            parts: list[tuple[int, float, dict[str, Any]]] = [
                (
                    0,
                    self._base[knob],
                    {},
                )
            ]
            parts += [
                (after - self._step, value, who)
                for after, name, value, who in self._asked
                if name == knob
            ]
            for (start, base, who), stop in zip(
                parts,
                [*(start for start, *_ in parts[1:]), len(rows)],
                strict=True,
            ):
                inside = (np.arange(len(rows)) >= start) & (np.arange(len(rows)) < stop)
                slowed = (
                    not who
                    and knob == "learning_rate"
                    and "rate" in self.controller.limits
                )
                by = "schedule" if np.isnan(base) else "rollback" if slowed else "live"
                more = who
                if who.get("who") == RECIPE:
                    by = by if np.isnan(base) else RECIPE
                    more = {}
                for first, last in _runs(moved & inside):
                    yield self._line(
                        by,
                        knob,
                        rows,
                        first,
                        last,
                        **more,
                    )

    def _moved(
        self,
        policy: str,
        knob: str,
        rows: np.ndarray,
    ) -> np.ndarray:
        """In which steps a policy decided something about a knob: (steps,) bool."""
        values, before = self._series(f"{policy}:{knob}", rows)
        return (
            np.nan_to_num(values) != 0
            if KNOBS[knob].combine == "any"
            else _differ(values, before)
        )

    def _line(
        self,
        policy: str,
        knob: str,
        rows: np.ndarray,
        first: int,
        last: int,
        **more: Any,
    ) -> dict[str, Any]:
        values, before = self._series(knob, rows)
        several = (
            {"last": self._step + last + 1, "values": values[first : last + 1].tolist()}
            if last > first
            else {}
        )
        return {
            "kind": "motion" if several else "decision",
            "step": self._step + first + 1,
            "policy": policy,
            "knob": knob,
            "from": float(before[first]),
            "to": float(values[last]),
            **several,
            **more,
        }

    def _signal(
        self,
        name: str,
        row: np.ndarray,
        index: int,
    ) -> float:
        if name in self._columns:
            return float(row[self._columns[name]])
        step = self._step + index
        progress = float(np.float32((step + 1) / max(self.until, 1)))
        return {
            "step": step,
            "progress": progress,
            "batch_size": self.controller.recipe.batch_size,
        }[name]

    # ---- the file ----

    def _cut(self, keep: int | None) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        self._file, old = Lines(self._path), read_events(self._path)
        if keep is None:
            keep = next(
                (i for i, line in enumerate(old) if line["step"] > self._step), len(old)
            )
        self.lines, cut = min(keep, len(old)), self._file.cut(keep)
        for line in old[:keep]:
            # its effect is not written yet
            if line["kind"] == "live" and line["step"] == self._step:
                who: dict[str, Any] = {k: line[k] for k in ("who", "pid") if k in line}
                self._asked += [
                    (self._step, knob, value, who)
                    for knob, value in line.get("settings", {}).items()
                ]
        if cut:
            aside = Lines(self._path.parent / "set_aside" / FILE)
            for text in cut:
                aside.append(text)
            aside.close()
        return [line for line in old[keep:] if line["kind"] == "live"]

    def _announce(self) -> None:
        self._announced = True
        policies = self.controller.policies
        watched = dict.fromkeys(name for p in policies for name in p.watches)
        moved = dict.fromkeys(knob for p in policies for knob in p.moves)
        self._write(
            {
                "kind": "start",
                "step": self._first,
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
    """The lines of a journal, oldest first.

    Args:
      path: the file, or the run folder that holds it.

    Raises:
      DataError: there is none, or it is damaged.
    """
    return read_events(Path(path), FILE)


def knobs_set_live(folder: Path) -> set[str]:
    """Names of the knobs that somebody has set while the run of a folder went on."""
    if not (folder / FILE).is_file():
        return set()
    lines = in_effect(read_journal(folder))
    return {
        knob
        for line in lines
        if line["kind"] == "live"
        for knob in line.get("settings", {})
    }


def in_effect(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without those that a rollback has undone; the rollbacks themselves
    stay.
    """
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["kind"] == "rollback":
            kept = [cut for cut in (_up_to(old, line["to"]) for old in kept) if cut]
        kept.append(line)
    return kept


def _up_to(line: dict[str, Any], step: int) -> dict[str, Any] | None:
    """What of a line is of steps up to `step`."""
    if line["kind"] == "rollback":
        return line if line["to"] <= step else None
    if line["step"] > step:
        return None
    if line.get("last", 0) > step:
        values = line["values"][: step - line["step"] + 1]
        return {
            **line,
            "last": step,
            "values": values,
            "to": values[-1],
        }
    return line


def _differ(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left != right) & ~(np.isnan(left) & np.isnan(right))


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of consecutive Trues."""
    edges = np.flatnonzero(
        np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
    )
    return zip(
        edges[::2].tolist(),
        (edges[1::2] - 1).tolist(),
        strict=True,
    )
