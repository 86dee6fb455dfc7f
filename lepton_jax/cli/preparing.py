"""How a preparation shows itself on the terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, TextIO

from lepton_jax.data.prepare import Prepared, Progress

MOST_REASONS = 5  # of a step that the summary lists


class Bar:
    """A bar for each pass: on a terminal one that moves, elsewhere a line at its end.

    Args:
      stream: where it is drawn.
    """

    def __init__(self, stream: TextIO = sys.stderr):
        self._stream = stream
        self._live: Any = None
        self._task: Any = None
        self._pass = 0

    def __enter__(self) -> Bar:
        if self._stream.isatty():
            self._live = _live(self._stream)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show how far a pass is."""
        name = f"pass {progress.number} of {progress.passes}: {progress.doing}"
        if self._live is None:
            if progress.done == progress.total and self._pass != progress.number:
                self._pass = progress.number
                print(name, file=self._stream, flush=True)
            return
        if self._pass != progress.number:
            self._pass = progress.number
            self._task = self._live.add_task(name, total=progress.total)
        self._live.update(self._task, completed=progress.done)


def _live(stream: TextIO) -> Any:
    """Return a bar of Rich's."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Live

    return Live(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(file=stream),
    )


def summary(prepared: Prepared) -> str:
    """Return what came out of a preparation, as lines of text."""
    manifest = prepared.manifest
    lines = []
    for source in manifest["sources"]:
        refused = f", {source['refused']:,} unreadable" if source["refused"] else ""
        lines.append(f"{source['name']}: {source['rows']:,} rows{refused}")
        lines += _doubts(source)
    lines.append("")
    for step in manifest["steps"]:
        lines += _step(step)
    lines.append("")
    for name, split in manifest["splits"].items():
        lines.append(f"{name}: {split['rows']:,} rows, {split['bytes'] / 1e6:,.1f} MB")
    lines.append(f"in {prepared.folder}")
    return "\n".join(lines)


def _doubts(source: dict[str, Any]) -> list[str]:
    """Return a line for each column with missing cells, or cells against its type."""
    lines = []
    for column in source["columns"]:
        parts = []
        if column["missing"]:
            parts.append(f"{column['missing']:,} missing")
        if column["against"]:
            examples = ", ".join(map(repr, column["examples"]))
            parts.append(f"{column['against']:,} are no {column['type']}: {examples}")
        if parts:
            lines.append(f"  {column['name']}: {'; '.join(parts)}")
    return lines


def _step(step: dict[str, Any]) -> list[str]:
    name = step["arguments"]["step"]
    lines = [f"{name}: {step['in']:,} -> {step['out']:,} rows"]
    reasons = sorted(step["reasons"], key=_most_first)
    for reason in reasons[:MOST_REASONS]:
        lines.append(f"  {reason['action']} {reason['rows']:,}: {reason['reason']}")
    left = len(reasons) - MOST_REASONS
    if left > 0:
        lines.append(f"  and {left:,} other reasons")
    return lines


def _most_first(reason: dict[str, Any]) -> int:
    return -reason["rows"]
