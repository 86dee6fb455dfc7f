"""A run on the terminal: one headline, one live line, one closing table."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

PLAIN_SECONDS = 2.0  # between lines on a stream that is no terminal
LIVE_SECONDS = 0.05  # between redraws of the live line


class Progress:
    """Shows a run on `stream`: a live line on a terminal; elsewhere plain lines, at
    most one in 2 s and one per evaluation. Draws only when an event arrives (a thread
    would steal time from the training), and falls silent when the stream is closed.
    Honours `NO_COLOR` and `TERM=dumb`.

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
        # steps, seconds, samples
        self._windows: deque[tuple[int, float, int]] = deque(maxlen=20)
        self._seconds = self._waited = 0.0
        self._train: dict[str, float] = {}
        self._last: dict[str, Any] = {}
        self._evaluations: list[tuple[int, dict[str, Any]]] = []
        self._compilations: dict[str, int] = {}

    def event(self, event: dict[str, Any]) -> None:
        handle = getattr(self, f"_on_{event.get('kind')}", None)
        if handle is not None and self._stream is not None:
            handle(event)

    def close(self) -> None:
        if self._drawn:
            self._write("\n")
            self._drawn = False

    def _on_start(self, event: dict[str, Any]) -> None:
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
        name = event.get("name") or "run"
        self._line(
            (self._paint(name, "1") if self._colour else name)
            + "  "
            + self._dot().join(parts)
        )

    def _on_compile(self, event: dict[str, Any]) -> None:
        program = str(event.get("program") or "a program")
        self._compilations[program] = self._compilations.get(program, 0) + 1
        if (event.get("count") or 1) > 1:
            text = f"compiled {program} again (time {event['count']})"
            seconds = (
                f" in {duration(event['seconds'])}"
                if event.get("seconds") is not None
                else ""
            )
            self._notice(
                text
                + seconds
                + (f": {event['changed']}" if event.get("changed") else "")
            )

    def _on_steps(self, event: dict[str, Any]) -> None:
        last = event.get("last")
        if last is None:
            return
        seconds = event.get("seconds") or 0.0
        count = last - (event.get("first") or last) + 1
        self._windows.append(
            (
                count,
                seconds,
                event.get("samples") or 0,
            )
        )
        self._seconds = self._seconds + seconds
        self._waited = self._waited + (event.get("data_wait") or 0.0)
        self._step = last
        self._train.update(
            {
                k: v[-1]
                for k, v in (event.get("records") or {}).items()
                if v and _is_number(v[-1])
            }
        )
        now = time.monotonic()
        if now - self._shown < (
            LIVE_SECONDS if self._live else PLAIN_SECONDS
        ) and last != self._start.get("steps"):
            return
        self._shown = now
        if self._live:
            self._redraw()
        else:
            self._line("  ".join(text for _, text in self._segments()))

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        self._last = dict(event.get("metrics") or {})
        self._evaluations.append((event.get("step") or self._step, self._last))
        if self._live:
            self._redraw()
        else:
            seconds = (
                f"  ({duration(event['seconds'])})"
                if event.get("seconds") is not None
                else ""
            )
            self._line(
                f"evaluation at step {event.get('step', '?')} "
                f" {_values(self._last)}{seconds}"
            )

    def _on_damaged(self, event: dict[str, Any]) -> None:
        reason = f": {event['reason']}" if event.get("reason") else ""
        self._notice(
            f"checkpoint of step {event.get('step', '?')} is damaged and was passed"
            f" over{reason}"
        )

    def _on_warning(self, event: dict[str, Any]) -> None:
        self._notice(str(event.get("text", "")))

    def _on_rollback(self, event: dict[str, Any]) -> None:
        self._notice(
            f"rolled back from step {event.get('step', '?')} to {event.get('to', '?')}:"
            f" {event.get('why', '')}"
        )
        self._step = event.get("to") or self._step

    def _on_control(self, event: dict[str, Any]) -> None:
        refused = "" if event.get("ok") else f"{event.get('do')} refused: "
        self._notice(f"{event.get('who', '?')}: {refused}{event.get('text', '')}")

    def _on_skipped(self, event: dict[str, Any]) -> None:
        self._notice("skipped " + described(event))

    def _on_end(self, event: dict[str, Any]) -> None:
        rows = self._summary(event)
        status = rows.pop("status")
        name = self._start.get("name") or "run"
        if not self._live:
            width = max(map(len, rows), default=0)
            lines = [
                f"{name}: {status}",
                *(f"  {key:<{width}}  {value}" for key, value in rows.items()),
            ]
            self._write("".join(f"{line}\n" for line in lines))
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        colour = {"finished": "green", "interrupted": "yellow"}.get(
            event.get("status") or "", "red"
        )
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
        Console(
            file=page,
            force_terminal=True,
            no_color=not self._colour,
            width=self._width(),
            legacy_windows=False,
            color_system="standard" if self._colour else None,
        ).print(table)
        self._line(page.getvalue().rstrip("\n"))

    def _summary(self, event: dict[str, Any]) -> dict[str, str]:
        """The rows of the closing table, in order."""
        step = event.get("step", self._step)
        steps = self._start.get("steps") or event.get("steps")
        rows = {
            "status": (
                (event.get("status") or "ended")
                + (f": {event['reason']}" if event.get("reason") else "")
            ),
            "steps": (
                f"{step:,} of {steps:,}" if step is not None and steps else str(step)
            ),
        }
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
            rows["best"] = f"{best[1]} {number(best[2])} at step {best[0]:,}"
        if self._seconds:
            rows["data wait"] = f"{100 * self._waited / self._seconds:.1f} %"
        folder = event.get("folder") or self._folder
        return rows | ({"folder": str(folder)} if folder else {})

    def _segments(self) -> list[tuple[int, str]]:
        """What the line says, in order, each with its rank: the greatest goes first
        when the line is too long.
        """
        steps = self._start.get("steps")
        parts = []
        parts.append((0, f"step {self._step:,}" + (f"/{steps:,}" if steps else "")))
        size = self._start.get("batch_size")
        epoch = self._start.get("samples_per_epoch")
        if size and epoch:
            # the last batch may be filled up from an epoch that does not count
            total = max(1, math.ceil((steps - 1) * size / epoch)) if steps else None
            now = min(math.ceil(self._step * size / epoch) or 1, total or sys.maxsize)
            parts.append((6, f"epoch {now:,}" + (f"/{total:,}" if total else "")))
        count, seconds, samples = (
            (sum(column) for column in zip(*self._windows, strict=True))
            if self._windows
            else (0, 0, 0)
        )
        if count and seconds:
            rate = (
                f"{number(samples / seconds, 3)} samples/s"
                if samples
                else f"{number(count / seconds, 3)} steps/s"
            )
            parts.append((4, rate))
            if steps and steps > self._step:
                parts.append(
                    (2, f"ETA {duration((steps - self._step) * seconds / count)}")
                )
        if "loss" in self._train:
            parts.append((1, f"loss {number(self._train['loss'])}"))
        names = self._start.get("metrics") or [
            k for k in self._train if k not in ("loss", "learning_rate")
        ]
        parts += [
            (3, f"{name} {number(self._train[name])}")
            for name in names
            if self._train.get(name) is not None
        ]
        if self._live and self._last:
            parts.append((5, f"evaluation {_values(self._last)}"))
        return parts

    def _redraw(self) -> None:
        room = self._width() - 1
        parts = self._segments()

        def text() -> str:
            return self._dot().join(part for _, part in parts)

        while len(parts) > 1 and len(text()) > room:
            parts.remove(max(parts, key=lambda part: part[0]))
        line = text()[:room]
        steps = self._start.get("steps")
        length = min(24, room - len(line) - 2)
        if steps and length >= 6:
            done = min(length, length * self._step // steps)
            full, empty = (
                ("━", "━" if self._colour else "─") if self._unicode else ("#", "-")
            )
            line = (
                self._paint(full * done, "36")
                + self._paint(empty * (length - done), "2")
                + "  "
                + line
            )
        self._drawn = True
        self._write(f"\r{line}\x1b[K")

    def _notice(self, text: str) -> None:
        self._line(self._paint("!", "33") + " " + text)
        if self._live and self._windows:
            self._redraw()

    def _line(self, text: str) -> None:
        """A line that stays, above the live one."""
        self._write(("\r\x1b[K" if self._drawn else "") + text + "\n")
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
        try:
            return max(20, os.get_terminal_size(self._stream.fileno()).columns or 80)  # type: ignore[union-attr]
        except (AttributeError, OSError, ValueError):
            return 80


def best_evaluation(
    evaluations: list[tuple[int, dict[str, Any]]], start: dict[str, Any]
) -> tuple[int, str, float] | None:
    """(step, metric, value) of the best evaluation, by the run's `best` ("accuracy";
    "-loss" for lowest first).

    Without a `best` in the start event or its settings, the lowest loss is the best.
    """
    rule = start.get("best") or (start.get("settings") or {}).get("best")
    rule = rule if isinstance(rule, str) else "-loss"
    name = rule.removeprefix("-")
    sign = -1 if rule.startswith("-") else 1
    found = [
        (sign * metrics[name], -step)
        for step, metrics in evaluations
        if _is_number(metrics.get(name)) and math.isfinite(metrics[name])
    ]
    if not found:
        return None
    value, step = max(found)
    return -step, name, sign * value


def number(value: float | None, digits: int = 4) -> str:
    """`value` to so many significant digits: 0.01235, 12,346, 1.235e-09."""
    if value is None or not math.isfinite(value):
        return "none" if value is None else str(value)
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{float(f'{value:.{digits}g}'):.12f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """340 ms, 4.21 s, 3 min 20 s, 2 h 05 min, 3 d 04 h."""
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


def described(event: dict[str, Any]) -> str:
    """An event's own fields, as text: `step 12, reason: rows too short`."""
    return ", ".join(
        (
            str(value)
            if key == "text"
            else f"{key} {value}"
            if isinstance(value, int)
            else f"{key}: {value}"
        )
        for key, value in event.items()
        if key not in ("time", "kind")
    )


def _values(metrics: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {number(value) if _is_number(value) else value}"
        for name, value in metrics.items()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream is not None and stream.isatty()) and os.environ.get(
            "TERM"
        ) not in ("dumb", "", None)
    except (AttributeError, ValueError):
        return False
