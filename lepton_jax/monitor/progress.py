"""A run on the terminal: one headline, one live line, one closing table."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lepton_jax.monitor.events import Event

# Assumptions: as often as a log should grow, and as an eye sees.
PLAIN_SECONDS = 2.0  # between lines on a stream that is no terminal
LIVE_SECONDS = 0.05  # between redraws of the live line

# Assumptions: widths at which a bar says something.
LONGEST_BAR = 24
SHORTEST_BAR = 6
NARROWEST = 20  # columns of a terminal
USUAL_WIDTH = 80  # columns of a terminal that does not say how wide it is
WINDOWS = 20  # over which rates are taken

# Share of the time waiting for data from which on the line says so: the bar that the
# feed is to keep (docs/data.md).
SHOWN_WAIT = 0.01

# Of the status in the closing table; every other one is red.
STATE_COLOURS = {"finished": "green", "interrupted": "yellow"}


class _Window(NamedTuple):
    """Some steps that were reported together."""

    steps: int
    seconds: float
    samples: int
    waited: float  # seconds


class _Segment(NamedTuple):
    """A part of the live line; the greatest rank goes first when room is short."""

    rank: int
    text: str


class Progress:
    """The display of a run on a stream.

    On a terminal it is a live line; elsewhere plain lines, at most one in 2 s and one
    for each evaluation. It draws only when an event arrives (a thread would steal time
    from the training), and falls silent when the stream is closed. It honours
    `NO_COLOR` and `TERM=dumb`.

    Args:
      stream: where to write.
      folder: the run's folder, for the closing table; else the `folder` of the start or
        end event, if any.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        folder: Path | None = None,
    ):
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._live = _is_terminal(self._stream)
        self._colour = self._live and not os.environ.get("NO_COLOR")
        self._unicode = "utf" in (getattr(self._stream, "encoding", None) or "").lower()
        self._folder = None if folder is None else str(folder)
        self._start: dict[str, Any] = {}
        self._step = 0
        self._shown = -math.inf
        self._drawn = False
        self._windows: deque[_Window] = deque(maxlen=WINDOWS)
        self._seconds = 0.0
        self._waited = 0.0
        self._feed: dict[str, float] = {}
        self._train: dict[str, float] = {}
        self._last: dict[str, Any] = {}
        self._evaluations: list[tuple[int, dict[str, Any]]] = []
        self._compilations: dict[str, int] = {}
        self._noticed: list[str] = []

    def event(self, event: Event) -> None:
        """Show one event."""
        handle = getattr(self, f"_on_{event.get('kind')}", None)
        if handle is not None and self._stream is not None:
            handle(event)

    def close(self) -> None:
        """End the live line."""
        if self._drawn:
            self._write("\n")
            self._drawn = False

    def _on_start(self, event: Event) -> None:
        self._start = event
        self._step = event.get("step") or 0
        self._folder = self._folder or event.get("folder")
        parts = []
        if event.get("parameters") is not None:
            parts.append(f"{event['parameters']:,} parameters")
        if event.get("devices"):
            device = event.get("device_kind") or event.get("platform") or "device"
            parts.append(f"{event['devices']} x {device}")
        if event.get("steps"):
            parts.append(f"{event['steps']:,} steps")
        if event.get("batch_size"):
            parts.append(f"batch {event['batch_size']:,}")
        if self._step:
            parts.append(f"resumed at step {self._step:,}")
        name = self._paint(event.get("name") or "run", "1")
        self._line(f"{name}  {self._dot().join(parts)}")
        for row in event.get("parts") or []:
            self._line(f"  {_part_in_words(row)}")

    def _on_compile(self, event: Event) -> None:
        program = str(event.get("program") or "a program")
        self._compilations[program] = self._compilations.get(program, 0) + 1
        if (event.get("count") or 1) > 1:
            text = f"compiled {program} again (time {event['count']})"
            if event.get("seconds") is not None:
                text += f" in {duration(event['seconds'])}"
            if event.get("changed"):
                text += f": {event['changed']}"
            self._notice(text)

    def _on_steps(self, event: Event) -> None:
        last = event.get("last")
        if last is None:
            return

        seconds = event.get("seconds") or 0.0
        steps = last - (event.get("first") or last) + 1
        self._windows.append(
            _Window(
                steps,
                seconds,
                event.get("samples") or 0,
                event.get("data_wait") or 0.0,
            )
        )
        self._seconds += seconds
        self._waited += event.get("data_wait") or 0.0
        self._feed = event.get("feed") or self._feed
        self._step = last
        for name, values in (event.get("records") or {}).items():
            if values and _is_number(values[-1]):
                self._train[name] = values[-1]

        now = time.monotonic()
        pause = LIVE_SECONDS if self._live else PLAIN_SECONDS
        is_last = last == self._start.get("steps")
        if now - self._shown < pause and not is_last:
            return
        self._shown = now
        if self._live:
            self._redraw()
        else:
            self._line("  ".join(segment.text for segment in self._segments()))

    def _on_evaluation(self, event: Event) -> None:
        self._last = dict(event.get("metrics") or {})
        self._evaluations.append((event.get("step") or self._step, self._last))
        if self._live:
            self._redraw()
            return

        text = f"evaluation at step {event.get('step', '?')}  {_values(self._last)}"
        if event.get("seconds") is not None:
            text += f"  ({duration(event['seconds'])})"
        self._line(text)

    def _on_damaged(self, event: Event) -> None:
        reason = f": {event['reason']}" if event.get("reason") else ""
        self._notice(
            f"checkpoint of step {event.get('step', '?')} is damaged and was passed"
            f" over{reason}"
        )

    def _on_warning(self, event: Event) -> None:
        self._notice(str(event.get("text", "")))

    def _on_notice(self, event: Event) -> None:
        text = str(event.get("text", ""))
        self._noticed.append(text)
        # what the run itself finds at its end stands below the closing table
        if event.get("policy") != "run":
            self._notice(text)

    def _on_rollback(self, event: Event) -> None:
        self._notice(
            f"rolled back from step {event.get('step', '?')} to {event.get('to', '?')}:"
            f" {event.get('why', '')}"
        )
        self._step = event.get("to") or self._step

    def _on_baseline(self, event: Event) -> None:
        for line in baseline_lines(event):
            self._line(line)

    def _on_control(self, event: Event) -> None:
        refused = "" if event.get("ok") else f"{event.get('do')} refused: "
        self._notice(f"{event.get('who', '?')}: {refused}{event.get('text', '')}")

    def _on_skipped(self, event: Event) -> None:
        self._notice("skipped " + described(event))

    def _on_end(self, event: Event) -> None:
        self._close_with_table(event)
        for text in self._noticed:
            self._notice(text)
        self._noticed = []

    def _close_with_table(self, event: Event) -> None:
        rows = self._summary(event)
        status = rows.pop("status")
        name = self._start.get("name") or "run"
        if self._live:
            state = event.get("status") or ""
            self._line(
                self._table(
                    name,
                    status,
                    STATE_COLOURS.get(state, "red"),
                    rows,
                )
            )
            return
        width = max(map(len, rows), default=0)
        lines = [f"{name}: {status}\n"]
        lines += [f"  {key:<{width}}  {value}\n" for key, value in rows.items()]
        self._write("".join(lines))

    def _table(
        self,
        name: str,
        status: str,
        colour: str,
        rows: dict[str, str],
    ) -> str:
        """Return the closing table for a terminal."""
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.ROUNDED if self._unicode else box.ASCII,
            show_header=False,
            title_justify="left",
            title=Text.assemble(
                (name, "bold"),
                "  ",
                (status, colour),
            ),
        )
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(Text(key), Text(value))
        # Rich ends the process on a broken pipe, so it draws into memory and the
        # writing is ours.
        page = io.StringIO()
        console = Console(
            file=page,
            force_terminal=True,
            no_color=not self._colour,
            width=self._width(),
            legacy_windows=False,
            color_system="standard" if self._colour else None,
        )
        console.print(table)
        return page.getvalue().rstrip("\n")

    def _summary(self, event: Event) -> dict[str, str]:
        """Return the rows of the closing table, in order, and its status."""
        step = event.get("step", self._step)
        steps = self._start.get("steps") or event.get("steps")
        rows = {"status": event.get("status") or "ended", "steps": str(step)}
        if event.get("reason"):
            rows["status"] += f": {event['reason']}"
        if step is not None and steps:
            rows["steps"] = f"{step:,} of {steps:,}"
        if event.get("seconds") is not None:
            rows["time"] = duration(event["seconds"])
        if event.get("samples_per_second") is not None:
            rows["samples/s"] = number(event["samples_per_second"])
        programs = ", ".join(
            f"{count} {program}" for program, count in self._compilations.items()
        )
        rows["compilations"] = programs or str(event.get("compilations", 0))
        if "loss" in self._train:
            rows["train loss"] = number(self._train["loss"])
        metrics = event.get("metrics") or self._last
        if metrics:
            rows["evaluation"] = _values(metrics)
        best = best_evaluation(self._evaluations, self._start)
        if best:
            at = f"at step {best.step:,}"
            rows["best"] = f"{best.metric} {number(best.value)} {at}"
        rows |= self._feed_rows()
        folder = event.get("folder") or self._folder
        if folder:
            rows["folder"] = str(folder)
        return rows

    def _feed_rows(self) -> dict[str, str]:
        """Return the rows of the closing table that are about the data."""
        rows = {}
        if self._seconds:
            rows["data wait"] = f"{100 * self._waited / self._seconds:.1f} %"
        if self._feed.get("padding") is not None:
            rows["padding"] = f"{100 * self._feed['padding']:.1f} %"
        return rows

    def _segments(self) -> list[_Segment]:
        """Return the parts of the line, in order."""
        steps = self._start.get("steps")
        of_steps = f"/{steps:,}" if steps else ""
        segments = [_Segment(0, f"step {self._step:,}{of_steps}")]
        segments += self._epoch_segment()
        segments += self._rate_segments()
        if "loss" in self._train:
            segments.append(_Segment(1, f"loss {number(self._train['loss'])}"))

        others = [k for k in self._train if k not in ("loss", "learning_rate")]
        for name in self._start.get("metrics") or others:
            if self._train.get(name) is not None:
                segments.append(_Segment(3, f"{name} {number(self._train[name])}"))
        if self._live and self._last:
            segments.append(_Segment(5, f"evaluation {_values(self._last)}"))
        return segments

    def _epoch_segment(self) -> list[_Segment]:
        steps = self._start.get("steps")
        batch_size = self._start.get("batch_size")
        epoch_samples = self._start.get("samples_per_epoch")
        if not batch_size or not epoch_samples:
            return []

        epoch = math.ceil(self._step * batch_size / epoch_samples) or 1
        if not steps:
            return [_Segment(6, f"epoch {epoch:,}")]
        # the last batch may be filled up from an epoch that does not count
        epochs = max(1, math.ceil((steps - 1) * batch_size / epoch_samples))
        return [_Segment(6, f"epoch {min(epoch, epochs):,}/{epochs:,}")]

    def _rate_segments(self) -> list[_Segment]:
        count = sum(window.steps for window in self._windows)
        seconds = sum(window.seconds for window in self._windows)
        samples = sum(window.samples for window in self._windows)
        if not count or not seconds:
            return []

        rate = f"{number(count / seconds, 3)} steps/s"
        if samples:
            rate = f"{number(samples / seconds, 3)} samples/s"
        segments = [_Segment(4, rate)]
        waited = sum(window.waited for window in self._windows) / seconds
        if waited > SHOWN_WAIT:
            segments.append(_Segment(2, f"waits for data {100 * waited:.0f} %"))
        steps = self._start.get("steps")
        if steps and steps > self._step:
            left = duration((steps - self._step) * seconds / count)
            segments.append(_Segment(2, f"ETA {left}"))
        return segments

    def _redraw(self) -> None:
        room = self._width() - 1
        segments = self._segments()

        def text() -> str:
            return self._dot().join(segment.text for segment in segments)

        while len(segments) > 1 and len(text()) > room:
            segments.remove(max(segments, key=lambda segment: segment.rank))
        line = text()[:room]
        length = min(LONGEST_BAR, room - len(line) - 2)
        if self._start.get("steps") and length >= SHORTEST_BAR:
            line = f"{self._bar(length)}  {line}"
        self._drawn = True
        self._write(f"\r{line}\x1b[K")

    def _bar(self, length: int) -> str:
        done = min(length, length * self._step // self._start["steps"])
        full = "#"
        empty = "-"
        if self._unicode:
            full = "━"
            empty = "━" if self._colour else "─"
        left = length - done
        return self._paint(full * done, "36") + self._paint(empty * left, "2")

    def _notice(self, text: str) -> None:
        self._line(self._paint("!", "33") + " " + text)
        if self._live and self._windows:
            self._redraw()

    def _line(self, text: str) -> None:
        """Write a line that stays, above the live one."""
        erase = "\r\x1b[K" if self._drawn else ""
        self._write(f"{erase}{text}\n")
        self._drawn = False

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        # the reader has gone (a closed pipe or terminal); the run goes on
        except (OSError, ValueError):
            self._stream = None

    def _paint(
        self,
        text: str,
        code: str,
    ) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text else text

    def _dot(self) -> str:
        return " · " if self._unicode else " | "

    def _width(self) -> int:
        stream: Any = self._stream
        try:
            size = os.get_terminal_size(stream.fileno())
        except (AttributeError, OSError, ValueError):
            return USUAL_WIDTH
        return max(NARROWEST, size.columns or USUAL_WIDTH)


class Best(NamedTuple):
    """The best evaluation of a run."""

    step: int
    metric: str
    value: float


def best_evaluation(
    evaluations: list[tuple[int, dict[str, Any]]],
    start: dict[str, Any],
) -> Best | None:
    """Return the best evaluation, by the run's `best`; None if there is none.

    Args:
      evaluations: (step, metrics).
      start: the start event. Its `best`, or that of its settings, names the metric:
        "accuracy", or "-loss" if the lowest is the best. Without it, the lowest loss is
        the best.
    """
    rule = start.get("best") or (start.get("settings") or {}).get("best")
    rule = rule if isinstance(rule, str) else "-loss"
    name = rule.removeprefix("-")
    sign = -1 if rule.startswith("-") else 1
    ranked = [
        (sign * metrics[name], -step)
        for step, metrics in evaluations
        if _is_number(metrics.get(name)) and math.isfinite(metrics[name])
    ]
    if not ranked:
        return None
    value, negative_step = max(ranked)  # the earlier of equals
    return Best(-negative_step, name, sign * value)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with some significant digits: 0.01235, 12,346, 1.235e-09."""
    if value is None:
        return "none"
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.12f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """Return a time as text: 340 ms, 4.21 s, 3 min 20 s, 2 h 05 min, 3 d 04 h."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 9.995 else f"{seconds:.2f} s"
    minutes = round(seconds) // 60
    hours = round(seconds / 60) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02} s"
    if hours < 48:
        return f"{hours} h {round(seconds / 60) % 60:02} min"
    return f"{hours // 24} d {hours % 24:02} h"


def baseline_lines(event: Event) -> list[str]:
    """Return an event "baseline" as sentences, one for each metric."""
    if event.get("failed"):
        return [f"no baseline: {event.get('name')}: {event['failed']}"]
    return [str(one.get("text")) for one in event.get("compared") or ()]


def described(event: Event) -> str:
    """Return an event's own fields as text: `step 12, reason: rows too short`."""
    fields = [(key, event[key]) for key in event if key not in ("time", "kind")]
    return ", ".join(_field(key, value) for key, value in fields)


def _part_in_words(row: dict[str, Any]) -> str:
    """Describe a part of the parameters: "head/*: 2 arrays, 130 numbers"."""
    text = f"{row['pattern']}: {row['parameters']} arrays, {row['entries']:,} numbers"
    if row["frozen"]:
        text += ", frozen"
    if row["left"]:
        text += f"; {row['left']} more that it matches belong to an earlier pattern"
    return text


def _field(key: str, value: Any) -> str:
    if key == "text":
        return str(value)
    return f"{key} {value}" if isinstance(value, int) else f"{key}: {value}"


def _values(metrics: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_value(value)}" for name, value in metrics.items())


def _value(value: Any) -> str:
    return number(value) if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_terminal(stream: Any) -> bool:
    try:
        is_a_tty = stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False
    return bool(is_a_tty) and os.environ.get("TERM") not in ("dumb", "", None)
