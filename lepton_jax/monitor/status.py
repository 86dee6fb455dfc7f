"""How a run stands, from what it leaves in its folder: as plain data, and as metrics
for Prometheus. Asks nothing of the run.

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lepton_jax.errors import DataError
from lepton_jax.monitor.events import FILE, _decode

LATELY = 60.0  # seconds over which rates are taken
STALE = 30.0  # seconds; hosts.json is written each second
WINDOWS = 4096  # windows of steps that are kept apart
# bytes
CHUNK = 1 << 20
HEAD = 64
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
# one of them is in each run folder
MARKS = ("recipe.json", FILE, "hosts.json", "control", "checkpoints")


def status(
    folder: str | Path,
    hosts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How the run in a folder stands; see `Watch.status`.

    Raises:
      DataError: there is no run in it.
    """
    return Watch(folder).status(hosts)


class Watch:
    """Looks at a run folder again and again, and reads each event once.

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
        """How the run stands now.

        *Goodput* is the time of the steps that count over the time since the run's
        first start, up to now or to its end. A step's time is its share in the window
        in which it was reported, without compilation of the train step, evaluations and
        saves. Waiting for data is part of it, for the devices may compute meanwhile;
        its share stands beside it. A step counts unless a restart or a rollback went
        back before it. All starts of the folder are one run, and the time between them
        is part of the whole.

        Args:
          hosts: what is known of the hosts, as in hosts.json; None: what hosts.json
            says.

        Returns:
          Plain data, None where something is not known; times in seconds, sizes in
          bytes:
          "state": one of STATES; "gone": the process has ended without a word;
          "step", "until", "record" (the last step's), "loss", "evaluation" ({"step",
          "metrics"}), "checkpoint" (a step); "steps_per_second", "samples_per_second",
          "data_share": over the last minute of training;
          "starts": how often training began; "restarts": those after a failure;
            "restarts_left"; "rollbacks"; "recoveries":
          as in hosts.json, without stacks;
          "goodput", and "seconds": {"wall", "steps" (that count), "undone", "data"
            (part of both), "compile" (of the train
          step), "evaluation", "save", "other"};
          "memory": {"planned": for each device, by what lies there; "host", "device":
            the most of any host};
          "refused_connections": callers at the coordinator's port without proof of the
            run's token, as in hosts.json;
          "hosts": by number, as in hosts.json; "slowest": {"host", "why"} or None, as
            `launch.supervise.record.slowest` finds it;
          "event_age": since the last event; "eta": until the last step, with
            evaluations and saves, as long as nothing fails.

        Raises:
          DataError: there is no run in the folder.
        """
        if not any((self.folder / name).exists() for name in MARKS):
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
        told = _json(self.folder / "hosts.json") or {}
        if (
            _number(told.get("time")) is None
            or told["time"] < past.last - STALE
            or (told.get("state") == "over" and told["time"] < past.began)
        ):
            told = {}  # of an earlier start
        state = _state(
            past,
            told,
            _held(self.folder),
            now,
        )
        at_work = state in AT_WORK
        until = now if at_work else max(past.last, past.first or 0.0)
        hosts = _hosts(told) if hosts is None else dict(hosts)
        rate, samples, share = past.rates()
        seconds = past.seconds(
            max(0.0, until - past.first) if past.first is not None else 0.0
        )
        left = max(0, (past.until or 0) - past.step)
        pause = (
            (seconds["evaluation"] + seconds["save"]) / seconds["steps"]
            if seconds["steps"]
            else 0.0
        )
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
            "steps_per_second": rate,
            "samples_per_second": samples,
            "data_share": share,
            "eta": (
                left / rate * (1 + pause)
                if rate and at_work and past.until is not None
                else None
            ),
            "event_age": max(0.0, now - past.last) if past.first is not None else None,
            "starts": past.starts,
            "restarts": max(past.restarts, _whole(told.get("restarts")) or 0),
            "restarts_left": _whole(told.get("restarts_left")),
            "rollbacks": past.rollbacks,
            "recoveries": [
                {k: v for k, v in each.items() if k != "stack"}
                for each in told.get("recoveries") or ()
                if isinstance(each, dict)
            ],
            "goodput": seconds["steps"] / seconds["wall"] if seconds["wall"] else None,
            "seconds": seconds,
            "memory": {
                "planned": _planned(self.folder),
                **{
                    name: max(
                        (
                            each[key]
                            for each in hosts.values()
                            if _number(each.get(key)) is not None
                        ),
                        default=None,
                    )
                    for name, key in (("host", "memory"), ("device", "device_memory"))
                },
            },
            "refused_connections": _whole(told.get("refused_connections")),
            "hosts": hosts,
            "slowest": told.get("slowest") if at_work else None,
            "devices": past.start.get("devices"),
            "device_kind": past.start.get("device_kind"),
            "version": past.start.get("version"),
            "damaged_lines": self._damaged,
        }

    def _catch_up(self) -> None:
        """Take in the events that are new; a last line that is not whole yet is left
        for later.
        """
        try:
            with (self.folder / FILE).open("rb") as file:
                head = file.read(HEAD)
                # another run's
                if (
                    not head.startswith(self._head)
                    or os.fstat(file.fileno()).st_size < self._read
                ):
                    self._forget()
                self._head = head
                file.seek(self._read)
                torn = b""
                while chunk := file.read(CHUNK):
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


class History:
    """What the events of a run add up to, in a size that does not grow with it."""

    def __init__(self) -> None:
        self.first: float | None = None  # time of the first event
        self.began = self.last = 0.0  # time of the last start, and of the last event
        self.start: dict[str, Any] = {}
        self.step = 0
        self.until: int | None = None
        self.starts = self.restarts = self.rollbacks = 0
        self.ended: str | None = None
        self.reason: str | None = None
        self.record: dict[str, Any] = {}
        self.evaluation: dict[str, Any] | None = None
        # first and last step, seconds, seconds of waiting for data
        self._windows: list[tuple[int, int, float, float]] = []
        # time, steps, seconds, waiting, samples
        self._lately: list[tuple[float, int, float, float, float]] = []
        self._spent = dict.fromkeys(
            ("undone", "data", "compile", "evaluation", "save"), 0.0
        )
        self._compiling = 0.0  # seconds that the next window holds

    def add(self, event: Mapping[str, Any]) -> None:
        """One event; fields that are missing or ill-typed are passed over."""
        self.first = event["time"] if self.first is None else self.first
        self.last = max(self.last, event["time"])
        handle = getattr(self, f"_on_{event['kind']}", None)
        if handle is not None:
            handle(event)

    def _on_start(self, event: Mapping[str, Any]) -> None:
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

    def _on_compile(self, event: Mapping[str, Any]) -> None:
        if event.get("program") == "train":
            self._compiling += _number(event.get("seconds")) or 0.0

    def _on_steps(self, event: Mapping[str, Any]) -> None:
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
        seconds -= compiling
        self._windows.append(
            (
                first,
                last,
                seconds,
                wait,
            )
        )
        if len(self._windows) > WINDOWS:
            self._windows = [
                *_merged(self._windows[: WINDOWS // 2]),
                *self._windows[WINDOWS // 2 :],
            ]
        self._lately.append(
            (
                event["time"],
                last - first + 1,
                seconds,
                wait,
                _number(event.get("samples")) or 0.0,
            )
        )
        self._lately = [
            each for each in self._lately if each[0] >= event["time"] - LATELY
        ]
        self.step = last
        records = event.get("records")
        if isinstance(records, dict):
            self.record = {
                name: values[-1]
                for name, values in records.items()
                if isinstance(values, list) and values
            }

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        self._spent["evaluation"] += _number(event.get("seconds")) or 0.0
        if isinstance(event.get("metrics"), dict):
            self.evaluation = {
                "step": _whole(event.get("step")),
                "metrics": event["metrics"],
            }

    def _on_save(self, event: Mapping[str, Any]) -> None:
        self._spent["save"] += _number(event.get("seconds")) or 0.0

    def _on_rollback(self, event: Mapping[str, Any]) -> None:
        self.rollbacks += 1
        self._back(_whole(event.get("to")) or 0)

    def _on_end(self, event: Mapping[str, Any]) -> None:
        self.ended = str(event.get("status") or "finished")
        self.reason = None if event.get("reason") is None else str(event["reason"])

    def _back(self, step: int) -> None:
        """The run stands after this step: the later ones don't count."""
        kept = []
        for first, last, seconds, wait in self._windows:
            count = last - first + 1
            stay = max(0, min(last, step) - first + 1)
            self._spent["undone"] += seconds * (count - stay) / count
            if stay:
                kept.append(
                    (
                        first,
                        first + stay - 1,
                        seconds * stay / count,
                        wait * stay / count,
                    )
                )
        self._windows = kept
        self.step = step
        if self.evaluation is not None and (self.evaluation["step"] or 0) > step:
            self.evaluation = None

    def rates(self) -> tuple[float | None, float | None, float | None]:
        """Steps a second, samples a second and the share of time that waits for data,
        over the last minute of training.
        """
        if not self._lately:
            return None, None, None
        _, steps, seconds, wait, samples = (
            sum(column) for column in zip(*self._lately, strict=True)
        )
        return (
            (
                steps / seconds,
                samples / seconds,
                min(1.0, wait / seconds),
            )
            if seconds > 0
            else (None, None, None)
        )

    def seconds(self, wall: float) -> dict[str, float]:
        """What so many seconds went to."""
        counted = sum(seconds for _, _, seconds, _ in self._windows)
        apart = counted + sum(
            spent for name, spent in self._spent.items() if name != "data"
        )
        return {
            "wall": wall,
            "steps": counted,
            **self._spent,
            "other": max(0.0, wall - apart),
        }


def _merged(
    windows: list[tuple[int, int, float, float]],
) -> Iterator[tuple[int, int, float, float]]:
    """Pairs of neighbours as one."""
    for left, right in zip(windows[::2], windows[1::2], strict=True):
        yield left[0], right[1], left[2] + right[2], left[3] + right[3]


def _state(
    past: History,
    told: Mapping[str, Any],
    held: bool | None,
    now: float,
) -> str:
    """See STATES: what the supervisors say, unless they say no more; else the last
    event, and whether a process is at work.
    """
    if told and told.get("state") != "over" and now - told["time"] < STALE:
        state = str(told.get("state"))
        if state == "running" and (past.starts == 0 or past.ended):
            return "starting"
        return state if state in STATES else "running"
    if past.ended is not None:
        return past.ended if past.ended in STATES else "failed"
    if told.get("state") == "over":
        return {0: "finished", 130: "interrupted"}.get(
            _whole(told.get("exit_code")) or 0, "failed"
        )
    if held is False or told:
        return "gone"
    return "running" if past.starts else "starting"


def _held(folder: Path) -> bool | None:
    """Whether a process on this machine is at work in the folder, by its lock on
    control/run.json; None: it can't be known.
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
        return False if (_json(path) or {}).get("host") == platform.node() else None
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(file)


def _hosts(told: Mapping[str, Any]) -> dict[str, Any]:
    found = told.get("hosts")
    return (
        {str(host): each for host, each in found.items() if isinstance(each, dict)}
        if isinstance(found, dict)
        else {}
    )


def _checkpoint(folder: Path) -> int | None:
    """The last committed step; a checkpoint that is being written has another kind of
    name.
    """
    try:
        return max(
            (
                int(each.name)
                for each in (folder / "checkpoints").iterdir()
                if re.fullmatch(r"[0-9]+", each.name)
            ),
            default=None,
        )
    except OSError:
        return None


def _planned(folder: Path) -> dict[str, float] | None:
    """What the plan says that lies on each device."""
    found = (_json(folder / "plan.json") or {}).get("bytes_per_device")
    return (
        {name: size for name, size in found.items() if _number(size) is not None}
        if isinstance(found, dict)
        else None
    )


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no readable one, be it that it is being
    written.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _number(value: Any) -> float | None:
    return (
        value
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        else None
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ---- Prometheus ----


class _Metrics:
    """Families of samples in the text exposition format, version 0.0.4."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(
        self,
        name: str,
        kind: str,
        help: str,
        *samples: tuple[Any, dict[str, Any]],
    ) -> None:
        """A family; samples without a value are left out, and the family with them if
        none is left.
        """
        known = [
            (value, labels)
            for value, labels in samples
            if isinstance(value, int | float)
        ]
        if known:
            self.lines += [
                f"# HELP lepton_{name} {help}",
                f"# TYPE lepton_{name} {kind}",
            ]
            self.lines += [
                f"lepton_{name}{_labels(labels)} {_value(value)}"
                for value, labels in known
            ]


def prometheus(status: Mapping[str, Any]) -> str:
    """What `status` gives as metrics, in Prometheus' text exposition format 0.0.4; what
    is not known is left out.

    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    out = _Metrics()
    one: dict[str, str] = {}
    add = out.add
    seconds = status["seconds"]
    memory = status["memory"]
    add(
        "run_info",
        "gauge",
        "Always 1; what the run is.",
        (
            1,
            {
                name: status[name]
                for name in ("name", "folder", "version", "device_kind")
            },
        ),
    )
    add(
        "run_state",
        "gauge",
        "1 for the state that the run is in.",
        *((int(status["state"] == state), {"state": state}) for state in STATES),
    )
    add(
        "step",
        "gauge",
        "Last step known to be done; a restart or a rollback takes it back.",
        (status["step"], one),
    )
    add(
        "target_step",
        "gauge",
        "Step to reach.",
        (status["until"], one),
    )
    add(
        "checkpoint_step",
        "gauge",
        "Step of the last committed checkpoint.",
        (status["checkpoint"], one),
    )
    add(
        "devices",
        "gauge",
        "Devices that the run trains on.",
        (status["devices"], one),
    )
    add(
        "steps_per_second",
        "gauge",
        "Over the last minute of training.",
        (status["steps_per_second"], one),
    )
    add(
        "samples_per_second",
        "gauge",
        "Over the last minute of training.",
        (status["samples_per_second"], one),
    )
    add(
        "data_wait_ratio",
        "gauge",
        "Share of the last minute of training in which host 0 waited for data.",
        (status["data_share"], one),
    )
    add(
        "loss",
        "gauge",
        "Of the last step.",
        (status["loss"], one),
    )
    add(
        "record",
        "gauge",
        "What the last step recorded.",
        *((x, {"name": name}) for name, x in status["record"].items()),
    )
    evaluation = status["evaluation"] or {"step": None, "metrics": {}}
    add(
        "evaluation",
        "gauge",
        "Of the last evaluation.",
        *((x, {"metric": name}) for name, x in evaluation["metrics"].items()),
    )
    add(
        "evaluation_step",
        "gauge",
        "Step of the last evaluation.",
        (evaluation["step"], one),
    )
    add(
        "starts_total",
        "counter",
        "How often training began in this folder.",
        (status["starts"], one),
    )
    add(
        "restarts_total",
        "counter",
        "How often it began again after a failure.",
        (status["restarts"], one),
    )
    add(
        "restarts_left",
        "gauge",
        "Failures that are still survived.",
        (status["restarts_left"], one),
    )
    add(
        "refused_connections_total",
        "counter",
        "Callers at the coordinator's port without proof of the run's token.",
        (status["refused_connections"], one),
    )
    add(
        "rollbacks_total",
        "counter",
        "How often a policy went back to a checkpoint.",
        (status["rollbacks"], one),
    )
    last = status["recoveries"][-1] if status["recoveries"] else {}
    add(
        "last_recovery_seconds",
        "gauge",
        "From noticing the last failure until all hosts had trained a step again.",
        (last.get("seconds_to_stepped"), one),
    )
    add(
        "goodput_ratio",
        "gauge",
        "Time of the steps that count over the time since the first start.",
        (status["goodput"], one),
    )
    add(
        "spent_seconds",
        "gauge",
        "What the time since the first start went to; steps count, undone ones do not,"
        " and waiting for data is part of both.",
        *((x, {"on": name}) for name, x in seconds.items() if name != "wall"),
    )
    add(
        "wall_seconds",
        "gauge",
        "Time since the first start.",
        (seconds["wall"], one),
    )
    add(
        "eta_seconds",
        "gauge",
        "Until the last step, as long as nothing fails.",
        (status["eta"], one),
    )
    add(
        "event_age_seconds",
        "gauge",
        "Time since the run last wrote an event.",
        (status["event_age"], one),
    )
    add(
        "planned_memory_bytes",
        "gauge",
        "What the plan says that lies on each device.",
        *((x, {"what": name}) for name, x in (memory["planned"] or {}).items()),
    )
    add(
        "damaged_lines_total",
        "counter",
        "Lines of events.jsonl that can't be read.",
        (status["damaged_lines"], one),
    )
    _by_host(out, status)
    return "\n".join(out.lines) + "\n"


def _by_host(out: _Metrics, status: Mapping[str, Any]) -> None:
    hosts = status["hosts"].items()
    slow = (status["slowest"] or {}).get("host")

    def add(
        name: str,
        help: str,
        key: str,
    ) -> None:
        out.add(
            f"host_{name}",
            "gauge",
            help,
            *((each.get(key), {"host": host}) for host, each in hosts),
        )

    out.add(
        "host_up",
        "gauge",
        "1 where a worker runs.",
        *(
            (int(each.get("state") == "running"), {"host": host})
            for host, each in hosts
        ),
    )
    out.add(
        "host_phase",
        "gauge",
        "Always 1; the phase that the host is in.",
        *(
            (1, {"host": host, "phase": each["phase"]})
            for host, each in hosts
            if "phase" in each
        ),
    )
    add("step", "Last step that was handed to the devices.", "step")
    add("phase_seconds", "Time without any change.", "seconds_in_it")
    add(
        "phase_limit_seconds",
        "Time without any change after which the host counts as stuck.",
        "limit",
    )
    add("silent_seconds", "Time since its worker's last line.", "seconds_silent")
    add(
        "data_wait_ratio",
        "Share of the last minute in which it waited for data.",
        "data_share",
    )
    add("memory_bytes", "Of its process, resident.", "memory")
    add(
        "device_memory_bytes",
        "In use on that of its devices that has the most.",
        "device_memory",
    )
    out.add(
        "host_spent_seconds",
        "gauge",
        "Time in a phase since its process began.",
        *(
            (x, {"host": host, "phase": name})
            for host, each in hosts
            for name, x in (each.get("seconds") or {}).items()
        ),
    )
    out.add(
        "host_slowest",
        "gauge",
        "1 for the host that the others wait for.",
        *((int(host == str(slow)), {"host": host}) for host, _ in hosts),
    )


def _labels(labels: Mapping[str, Any]) -> str:
    pairs = [
        f'{name}="{_escaped(value)}"'
        for name, value in labels.items()
        if value is not None
    ]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(value: Any) -> str:
    text = str(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return text.encode("utf-8", "replace").decode()


def _value(value: float) -> str:
    if math.isfinite(value):
        return repr(value) if isinstance(value, float) else str(int(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
