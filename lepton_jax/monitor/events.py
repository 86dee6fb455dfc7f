"""The journal of a run: one JSON line per event, in `events.jsonl`.

A line is `{"time": unix seconds, "kind": ..., ...}`. JSON has no word for a float that
is not finite, so such a float is written as the string "NaN", "Infinity" or
"-Infinity", and those strings are read back as floats.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lepton_jax.errors import DataError, LeptonError, writing_remedy

FILE = "events.jsonl"

Event = dict[str, Any]  # one line of a journal: "time", "kind", and fields of the kind

TAIL_BYTES = 1 << 16  # of a file that are read at once to find its last line
_WORDS = {
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}


class Sink(Protocol):
    """Something that wants to hear of events as they happen."""

    def event(self, event: Event) -> None:
        """Take one event: plain Python values, floats that may be non-finite."""
        ...

    def close(self) -> None:
        """Write out what is held back; a further fit begins with another `start`."""
        ...


class Lines:
    """A file of events to which whole lines are appended.

    Each is one write to the operating system. A killed process loses at most the line
    that it was writing; opening the file again repairs that line.

    Args:
      path: the file; its folder is made if missing.

    Raises:
      LeptonError: the file can't be opened, or (from `append` and `cut`) written.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._file = os.open(self.path, flags, 0o644)
            _repair(self._file)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise self._failed(error) from error

    def append(self, line: bytes) -> None:
        """Add a line of `encode`. The file keeps only whole lines."""
        try:
            _append(self._file, line)
        except OSError as error:
            raise self._failed(error) from error

    def cut(self, keep: int) -> list[bytes]:
        """Take away all lines but the first `keep`, and return them."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        try:
            if len(lines) > keep:
                os.ftruncate(self._file, sum(map(len, lines[:keep])))
        except OSError as error:
            raise self._failed(error) from error
        return lines[keep:]

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _failed(self, error: OSError | ValueError) -> LeptonError:
        reason = getattr(error, "strerror", None) or error
        return LeptonError(
            f"the journal of the run can't be written: {reason}",
            where=self.path,
            remedy=(
                f"{writing_remedy(error)}, or name another run folder; "
                "then start again: the run goes on from its last checkpoint"
            ),
        )


class Monitor:
    """The journal `folder/events.jsonl`, and the sinks that hear its events.

    Several threads may use it at a time.

    Args:
      folder: of the run, made if missing. None: no file.
      sinks: hear each event, in this order, after it is written.

    Raises:
      LeptonError: the file can't be opened, or (from `event`) written.
    """

    def __init__(
        self,
        folder: Path | None,
        sinks: Sequence[Sink] = (),
    ):
        self.path = None if folder is None else Path(folder) / FILE
        self._sinks = tuple(sinks)
        self._lock = threading.RLock()
        self._closed = False
        self._file = None if self.path is None else Lines(self.path)

    def event(self, kind: str, **fields: Any) -> None:
        """Record one event.

        Args:
          kind: of the event.
          **fields: its further fields. Arrays and NumPy scalars become lists and
            numbers; float32 values stay exact.

        Raises:
          LeptonError: the line could not be written (the disk is full, say). The file
            keeps only whole lines.
        """
        event = {
            "time": time.time(),
            "kind": kind,
            **plain(fields),
        }
        line = encode(event)
        with self._lock:
            assert not self._closed, "an event after close()"
            if self._file is not None:
                self._file.append(line)
            for sink in self._sinks:
                sink.event(event)

    def close(self) -> None:
        """Close the file and the sinks; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._file is not None:
                self._file.close()
            for sink in self._sinks:
                sink.close()


def read_events(
    path: Path,
    name: str = FILE,
) -> list[Event]:
    """Read all events of a journal, oldest first.

    A last line that a killed process left torn is skipped.

    Args:
      path: the file, or the run folder that holds it.
      name: name of the file in a run folder.

    Raises:
      DataError: the file is missing, or a line other than a torn last one is damaged.
    """
    path = Path(path)
    path = path / name if path.is_dir() else path
    events = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                event = _decode(line)
                if event is not None:
                    events.append(event)
                elif line.endswith(b"\n"):
                    raise DataError(
                        f"an event is damaged: {line[:60]!r}",
                        where=f"{path}, line {number}",
                        remedy="delete that line, or restore the file from a copy",
                    )
    except OSError as error:
        raise DataError(
            f"the events of the run can't be read: {error.strerror or error}",
            where=path,
            remedy=f"name a run folder: one that holds {name}",
        ) from error
    return events


def encode(event: Mapping[str, Any]) -> bytes:
    """Return one event as a line of standard JSON."""
    dumps = partial(
        json.dumps,
        allow_nan=False,
        separators=(",", ":"),
    )
    try:
        text = dumps(event)
    # a float that is not finite: rare, so only then is the event walked through
    except ValueError:
        text = dumps(_named(event))
    return text.encode() + b"\n"


def _append(file: int, line: bytes) -> None:
    """Write the whole line, or leave the file as it was."""
    written = 0
    try:
        written = os.write(file, line)
        while written < len(line):
            written += os.write(file, line[written:])
    except OSError:
        # if the disk refuses even that, the next opening repairs the line
        with contextlib.suppress(OSError):
            if written:
                os.ftruncate(file, os.fstat(file).st_size - written)
        raise


def _repair(file: int) -> None:
    """Make the file end with a whole line.

    A torn last line is taken away; one that lacks only its newline gets it.
    """
    size = os.fstat(file).st_size
    tail = b""
    start = size
    while start and b"\n" not in tail:
        chunk = min(start, TAIL_BYTES)
        start -= chunk
        tail = os.pread(file, chunk, start) + tail
    tail = tail[tail.rfind(b"\n") + 1 :]
    if not tail:
        return
    if _decode(tail) is None:
        os.ftruncate(file, size - len(tail))
    else:
        _append(file, b"\n")


def _decode(line: bytes) -> Event | None:
    """Return the event in a line; None if it is damaged."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    has_words = b'NaN"' in line or b'Infinity"' in line
    return _floats(event) if has_words else event


def plain(value: Any) -> Any:
    """Return a value in JSON's types, with the floats as they are."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        # bfloat16 and its like, which NumPy knows only as raw bytes, are exact in
        # float64.
        if array.dtype.kind == "V":
            array = array.astype(np.float64)
        return plain(array.tolist())
    return str(value)


def _named(value: Any) -> Any:
    """Replace floats that are not finite by their words."""
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list) else value


def _floats(value: Any) -> Any:
    """Replace the words of floats that are not finite by these floats."""
    if isinstance(value, str):
        return _WORDS.get(value, value)
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else value
