"""The status of a run as plain data, from the files in its folder.

Nothing is asked of the run itself.

    from lepton_jax.monitor.status import status
    status("runs/digits_cnn-20260101-120000")["goodput"]
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lepton_jax.errors import DataError
from lepton_jax.monitor.events import FILE, Event, _decode

LATELY = 60.0  # seconds over which rates are taken; assumption

# Seconds after which hosts.json counts as old. Assumption: it is written each second,
# and a busy disk may hold it up.
STALE = 30.0

WINDOWS = 4096  # of steps that are kept apart; assumption: half a megabyte

SECONDS_OF_AN_HOUR = 3600

CHUNK_BYTES = 1 << 20  # that are read at once

# The first bytes of a run's events, which tell them from another run's: they hold the
# time of the first start.
HEAD_BYTES = 64

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells count

STATES = (
    "meeting",
    "starting",
    "running",
    "stopping",
    "ending",
    "waiting",
    "finished",
    "interrupted",
    "diverged",
    "failed",
    "gone",
)
AT_WORK = STATES[:6]

# Files and folders of a run, of which every run folder has at least one.
TRACES = ("recipe.json", FILE, "hosts.json", "control", "checkpoints")


def status(
    folder: str | Path,
    hosts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the status of the run in a folder; see `Watch.status`.

    Raises:
      DataError: there is no run in it.
    """
    return Watch(folder).status(hosts)


class Watch:
    """A look at a run folder that can be repeated, and reads each event once.

    Args:
      folder: of a run; it need not be there yet.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._forget()

    def _forget(self) -> None:
        self._read = 0
        self._damaged = 0
        self._head = b""
        self.history = History()

    def status(
        self,
        hosts: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the status of the run now.

        *Goodput* is the time of the steps that count over the time since the run's
        first start, up to now or to its end. A step's time is its share in the window
        in which it was reported, without compilation of the train step, evaluations and
        saves. Waiting for data is part of it, for the devices may compute meanwhile;
        its share is given, too. A step counts unless a restart or a rollback went
        back before it. All starts of the folder are one run, and the time between them
        is part of the whole.

        Args:
          hosts: the hosts' rows, as in hosts.json; None: those of hosts.json.

        Returns:
          Plain data, None if something is not known; times in seconds, sizes in bytes:

          - "state": one of STATES; "gone": the process has ended without a word;
          - "step", "until", "record" (of the last step), "loss", "evaluation" ({"step",
            "metrics"}), "checkpoint" (a step);
          - "steps_per_second", "samples_per_second", "data_share": over the last minute
            of training;
          - "starts": how often training began; "restarts": those after a failure;
            "restarts_left"; "rollbacks"; "recoveries": as in hosts.json, without
            stacks;
          - "goodput", and "seconds": {"wall", "steps" (that count), "undone", "data"
            (part of both), "compile" (of the train step), "evaluation", "save",
            "other"};
          - "cost": {"per_hour", "so_far"}, US dollars at the list price of the plan's
            devices; None where that is not known;
          - "memory": {"planned": for each device, by what lies there; "host", "device":
            the most of any host};
          - "refused_connections": callers at the coordinator's port without proof of
            the run's token, as in hosts.json;
          - "hosts": by number, as in hosts.json; "slowest": {"host", "why"} or None, as
            `launch.supervise.record.slowest` finds it;
          - "event_age": since the last event; "eta": until the last step, with
            evaluations and saves, as long as nothing fails.

        Raises:
          DataError: there is no run in the folder.
        """
        if not any((self.folder / name).exists() for name in TRACES):
            raise DataError(
                "there is no run in this folder",
                where=self.folder,
                remedy=(
                    "name the folder of a run: it holds recipe.json and events.jsonl"
                ),
            )
        self._catch_up()
        now = time.time()
        past = self.history
        hosts_file = self._hosts_file()
        state = _state(past, hosts_file, _held(self.folder), now)
        at_work = state in AT_WORK
        hosts = _rows(hosts_file) if hosts is None else dict(hosts)

        rates = past.rates()
        seconds = past.seconds(past.wall_seconds(now, at_work))
        goodput = seconds["steps"] / seconds["wall"] if seconds["wall"] else None
        eta = past.seconds_left(rates.steps, seconds) if at_work else None
        event_age = None if past.first is None else max(0.0, now - past.last)
        return {
            "name": past.start.get("name") or self.folder.resolve().name,
            "folder": str(self.folder.resolve()),
            "time": now,
            "state": state,
            "reason": past.reason,
            "step": past.step,
            "until": past.until,
            "record": past.record,
            "loss": past.record.get("loss"),
            "evaluation": past.evaluation,
            "checkpoint": _checkpoint(self.folder),
            "steps_per_second": rates.steps,
            "samples_per_second": rates.samples,
            "data_share": rates.data_share,
            "eta": eta,
            "event_age": event_age,
            "starts": past.starts,
            "restarts": max(past.restarts, _whole(hosts_file.get("restarts")) or 0),
            "restarts_left": _whole(hosts_file.get("restarts_left")),
            "rollbacks": past.rollbacks,
            "recoveries": _recoveries(hosts_file),
            "goodput": goodput,
            "seconds": seconds,
            "cost": _cost(past.start.get("price_per_hour"), seconds["wall"]),
            "memory": {
                "planned": _planned(self.folder),
                "host": _most(hosts, "memory"),
                "device": _most(hosts, "device_memory"),
            },
            "refused_connections": _whole(hosts_file.get("refused_connections")),
            "hosts": hosts,
            "slowest": hosts_file.get("slowest") if at_work else None,
            "devices": past.start.get("devices"),
            "device_kind": past.start.get("device_kind"),
            "version": past.start.get("version"),
            "damaged_lines": self._damaged,
        }

    def _hosts_file(self) -> dict[str, Any]:
        """Return hosts.json; {} if it is absent, or of an earlier start."""
        hosts_file = _json(self.folder / "hosts.json") or {}
        past = self.history
        if _number(hosts_file.get("time")) is None:
            return {}
        is_old = hosts_file["time"] < past.last - STALE
        was_over_before = (
            hosts_file.get("state") == "over" and hosts_file["time"] < past.began
        )
        return {} if is_old or was_over_before else hosts_file

    def _catch_up(self) -> None:
        """Take in the events that are new.

        A last line that is not whole yet is left for later.
        """
        try:
            with (self.folder / FILE).open("rb") as file:
                head = file.read(HEAD_BYTES)
                size = os.fstat(file.fileno()).st_size
                is_another_runs = not head.startswith(self._head) or size < self._read
                if is_another_runs:
                    self._forget()
                self._head = head

                file.seek(self._read)
                torn = b""
                while chunk := file.read(CHUNK_BYTES):
                    *lines, torn = (torn + chunk).split(b"\n")
                    for line in lines:
                        self._read += len(line) + 1
                        self._take(line)
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            raise DataError(
                f"the events of the run can't be read: {error.strerror or error}",
                where=self.folder / FILE,
                remedy="ask as a user who may read the run folder",
            ) from error

    def _take(self, line: bytes) -> None:
        event = _decode(line)
        if event is None or _number(event.get("time")) is None:
            self._damaged += 1
        else:
            self.history.add(event)


def _cost(price: Any, seconds: float) -> dict[str, float] | None:
    price = _number(price)
    if not price:
        return None
    return {"per_hour": price, "so_far": price * seconds / SECONDS_OF_AN_HOUR}


class Window(NamedTuple):
    """Some steps that were reported together, and the seconds that they took."""

    first: int
    last: int
    seconds: float
    data_wait: float

    @property
    def steps(self) -> int:
        """The count of steps."""
        return self.last - self.first + 1


class Recent(NamedTuple):
    """A window of the last minute, by the time at which it was reported."""

    time: float
    steps: int
    seconds: float
    data_wait: float
    samples: float


class Rates(NamedTuple):
    """Rates over the last minute of training; None if they are not known.

    Attributes:
      steps: per second.
      samples: per second.
      data_share: share of the time that waits for data, 0 to 1.
    """

    steps: float | None = None
    samples: float | None = None
    data_share: float | None = None


class History:
    """The sum of a run's events, in a size that does not grow with it.

    Attributes:
      first: time of the first event; None: there is none yet.
      began: time of the last start.
      last: time of the last event.
      start: the last start event.
      step: the last step done.
      until: the step to reach.
      starts: how often training began; restarts: how often after a failure.
      rollbacks: how often a policy went back.
      ended: how the last start ended; None: it did not.
      reason: why.
      record: of the last step.
      evaluation: the last one.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.began = 0.0
        self.last = 0.0
        self.start: dict[str, Any] = {}
        self.step = 0
        self.until: int | None = None
        self.starts = 0
        self.restarts = 0
        self.rollbacks = 0
        self.ended: str | None = None
        self.reason: str | None = None
        self.record: dict[str, Any] = {}
        self.evaluation: dict[str, Any] | None = None
        self._windows: list[Window] = []
        self._lately: list[Recent] = []
        activities = ("undone", "data", "compile", "evaluation", "save")
        self._spent = dict.fromkeys(activities, 0.0)
        self._compiling = 0.0  # seconds that the next window holds

    def add(self, event: Event) -> None:
        """Take in one event; fields that are missing or ill-typed are passed over."""
        self.first = event["time"] if self.first is None else self.first
        self.last = max(self.last, event["time"])
        handle = getattr(self, f"_on_{event['kind']}", None)
        if handle is not None:
            handle(event)

    def _on_start(self, event: Event) -> None:
        if self.starts and self.ended not in ("finished", "interrupted"):
            self.restarts += 1
        self.starts += 1
        self.start = dict(event)
        self.began = event["time"]
        self.ended = None
        self.reason = None
        self.until = _whole(event.get("steps"))
        self._lately = []
        self._compiling = 0.0
        self._back(_whole(event.get("step")) or 0)

    def _on_compile(self, event: Event) -> None:
        if event.get("program") == "train":
            self._compiling += _number(event.get("seconds")) or 0.0

    def _on_steps(self, event: Event) -> None:
        first = _whole(event.get("first"))
        last = _whole(event.get("last"))
        if first is None or last is None or last < first:
            return
        seconds = _number(event.get("seconds")) or 0.0
        wait = _number(event.get("data_wait")) or 0.0
        compiling = min(self._compiling, seconds)
        self._compiling = 0.0
        self._spent["compile"] += compiling
        self._spent["data"] += wait

        window = Window(first, last, seconds - compiling, wait)
        self._add_window(window)
        samples = _number(event.get("samples")) or 0.0
        recent = Recent(
            event["time"],
            window.steps,
            window.seconds,
            wait,
            samples,
        )
        since = event["time"] - LATELY
        self._lately = [each for each in [*self._lately, recent] if each.time >= since]

        self.step = last
        records = event.get("records")
        if isinstance(records, dict):
            self.record = {
                name: values[-1]
                for name, values in records.items()
                if isinstance(values, list) and values
            }

    def _add_window(self, window: Window) -> None:
        self._windows.append(window)
        if len(self._windows) > WINDOWS:
            older = self._windows[: WINDOWS // 2]
            newer = self._windows[WINDOWS // 2 :]
            self._windows = [*_merged(older), *newer]

    def _on_evaluation(self, event: Event) -> None:
        self._spent["evaluation"] += _number(event.get("seconds")) or 0.0
        if isinstance(event.get("metrics"), dict):
            self.evaluation = {
                "step": _whole(event.get("step")),
                "metrics": event["metrics"],
            }

    def _on_save(self, event: Event) -> None:
        self._spent["save"] += _number(event.get("seconds")) or 0.0

    def _on_rollback(self, event: Event) -> None:
        self.rollbacks += 1
        self._back(_whole(event.get("to")) or 0)

    def _on_end(self, event: Event) -> None:
        self.ended = str(event.get("status") or "finished")
        self.reason = None if event.get("reason") is None else str(event["reason"])

    def _back(self, step: int) -> None:
        """Go back to after a step: the later ones don't count."""
        windows = []
        for first, last, seconds, wait in self._windows:
            steps = last - first + 1
            stay = max(0, min(last, step) - first + 1)
            self._spent["undone"] += seconds * (steps - stay) / steps
            if stay:
                windows.append(
                    Window(
                        first,
                        first + stay - 1,
                        seconds * stay / steps,
                        wait * stay / steps,
                    )
                )
        self._windows = windows
        self.step = step
        if self.evaluation is not None and (self.evaluation["step"] or 0) > step:
            self.evaluation = None

    def rates(self) -> Rates:
        """Return the rates over the last minute of training."""
        seconds = sum(recent.seconds for recent in self._lately)
        if seconds <= 0:
            return Rates()
        steps = sum(recent.steps for recent in self._lately)
        samples = sum(recent.samples for recent in self._lately)
        wait = sum(recent.data_wait for recent in self._lately)
        return Rates(
            steps / seconds,
            samples / seconds,
            min(1.0, wait / seconds),
        )

    def wall_seconds(
        self,
        now: float,
        at_work: bool,
    ) -> float:
        """Return the seconds from the first event to now, or to the last event."""
        if self.first is None:
            return 0.0
        until = now if at_work else max(self.last, self.first)
        return max(0.0, until - self.first)

    def seconds(self, wall: float) -> dict[str, float]:
        """Return the activities that `wall` seconds went to."""
        steps = sum(window.seconds for window in self._windows)
        spent = [spent for name, spent in self._spent.items() if name != "data"]
        other = max(0.0, wall - (steps + sum(spent)))
        return {
            "wall": wall,
            "steps": steps,
            **self._spent,
            "other": other,
        }

    def seconds_left(
        self,
        steps_per_second: float | None,
        seconds: Mapping[str, float],
    ) -> float | None:
        """Return the seconds until the last step, as long as nothing fails.

        Args:
          steps_per_second: the rate; None: not known.
          seconds: of activities so far: evaluations and saves go on taking their share.
        """
        if not steps_per_second or self.until is None:
            return None
        pauses = 0.0
        if seconds["steps"]:
            pauses = (seconds["evaluation"] + seconds["save"]) / seconds["steps"]
        steps = max(0, self.until - self.step)
        return steps / steps_per_second * (1 + pauses)


def _merged(windows: list[Window]) -> Iterable[Window]:
    """Merge pairs of neighbours."""
    pairs = zip(
        windows[::2],
        windows[1::2],
        strict=True,
    )
    for left, right in pairs:
        yield Window(
            left.first,
            right.last,
            left.seconds + right.seconds,
            left.data_wait + right.data_wait,
        )


def _state(
    past: History,
    hosts_file: Mapping[str, Any],
    held: bool | None,
    now: float,
) -> str:
    """Return one of STATES.

    The supervisors know it while they write hosts.json; else it follows from the last
    event, and from whether a process is at work.

    Args:
      past: the run's events.
      hosts_file: hosts.json; {}: none.
      held: whether a process holds the run's lock; None: not known.
      now: the time.
    """
    is_fresh = hosts_file and now - hosts_file["time"] < STALE
    if is_fresh and hosts_file.get("state") != "over":
        state = str(hosts_file.get("state"))
        if state == "running" and (past.starts == 0 or past.ended):
            return "starting"
        return state if state in STATES else "running"
    if past.ended is not None:
        return past.ended if past.ended in STATES else "failed"
    if hosts_file.get("state") == "over":
        by_code = {0: "finished", INTERRUPTED_EXIT_CODE: "interrupted"}
        return by_code.get(_whole(hosts_file.get("exit_code")) or 0, "failed")
    if held is False or hosts_file:
        return "gone"
    return "running" if past.starts else "starting"


def _held(folder: Path) -> bool | None:
    """Whether a process on this machine is at work in the folder; None: not known.

    A process at work holds a lock on control/run.json.
    """
    path = folder / "control" / "run.json"
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:  # of another user's
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        host = (_json(path) or {}).get("host")
        return False if host == platform.node() else None
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(file)


def _rows(hosts_file: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of each host in hosts.json."""
    hosts = hosts_file.get("hosts")
    if not isinstance(hosts, dict):
        return {}
    return {str(host): row for host, row in hosts.items() if isinstance(row, dict)}


def _recoveries(hosts_file: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the recoveries in hosts.json, without stacks."""
    recoveries = []
    for recovery in hosts_file.get("recoveries") or ():
        if isinstance(recovery, dict):
            short = {key: value for key, value in recovery.items() if key != "stack"}
            recoveries.append(short)
    return recoveries


def _most(hosts: Mapping[str, Any], key: str) -> float | None:
    values = [_number(row.get(key)) for row in hosts.values()]
    known = [value for value in values if value is not None]
    return max(known, default=None)


def _checkpoint(folder: Path) -> int | None:
    """Return the last committed step.

    A checkpoint that is being written has a name that is no number.
    """
    try:
        names = [path.name for path in (folder / "checkpoints").iterdir()]
    except OSError:
        return None
    steps = [int(name) for name in names if re.fullmatch(r"[0-9]+", name)]
    return max(steps, default=None)


def _planned(folder: Path) -> dict[str, float] | None:
    """Return the bytes that the plan puts on each device, by what they hold."""
    sizes = (_json(folder / "plan.json") or {}).get("bytes_per_device")
    if not isinstance(sizes, dict):
        return None
    return {name: size for name, size in sizes.items() if _number(size) is not None}


def _json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file; None if it is absent, or can't be read.

    A file that is being written can't be read for a moment.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
