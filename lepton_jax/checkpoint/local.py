"""The fast tier of checkpoints: each host keeps its own devices' newest states.

They lie on a disk (or in the memory) of the host's own. They cost a copy from the
devices and a write that nothing waits for, so they can be made every few seconds; but a
machine that is lost takes its part along, and another layout needs other parts. So they
stand next to the durable checkpoints, never in their place: a run goes on from one only
if all hosts can read their parts of it and it is newer than the newest durable one.

A file is a line of JSON and then the bytes of the arrays; it runs no code, and every
part has its checksum:

    {"body": JSON text of the header, "crc32": of that text}
    bytes of part after part

    header: {"step", "record", "parts": {path: [part, ...]}}
    part:   {"bounds", "dtype", "at": behind the first line, "bytes", "crc32"}
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from lepton_jax.checkpoint.keys import as_stored, as_wanted, stored_shape
from lepton_jax.errors import CheckpointError, LeptonError, writing_remedy
from lepton_jax.hosts import agreement
from lepton_jax.trees import by_path, with_leaves

# Bytes that a name in a folder may have on Linux, less those of the checksum.
LONGEST = 255 - len("-01234567")
# Files that stay: the newest one may be half written on some hosts when one of them
# dies.
KEPT = 2
# (first, behind the last) of each dim of a part of an array.
Bounds = tuple[tuple[int, int], ...]


class LocalCheckpoints:
    """This host's files in a folder of its own.

    Args:
      folder: on this machine; several hosts on one machine may share it.
      run: folder of the run that they belong to.
      every: seconds between two of them.

    Raises:
      CheckpointError: the folder can't be made.
    """

    def __init__(
        self,
        folder: Path,
        run: Path,
        every: float = 60.0,
    ):
        self.every = every
        path = Path(run).resolve()
        # The name is for people, the checksum tells runs of one name apart.
        encoded = os.fsencode(Path(run).name)
        name = encoded[:LONGEST].decode(errors="ignore")
        checksum = zlib.crc32(os.fsencode(path))
        own = f"{name}-{checksum:08x}"
        place = Path(folder).absolute()
        self.folder = place / own / f"host{agreement.host()}"
        self._writer: threading.Thread | None = None
        self._fault: Exception | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                "the folder for local checkpoints can't be made:"
                f" {error.strerror or error}",
                where=folder,
                remedy=(
                    f"{writing_remedy(error)}, name another by --local-dir, or leave"
                    " it out"
                ),
            ) from error

    def save(
        self,
        step: int,
        state: Any,
        record: dict[str, Any],
    ) -> bool:
        """Copy this host's part of a state, and begin to write it.

        Args:
          step: of the state.
          state: of arrays; it may be donated once this returns.
          record: plain data next to it.

        Returns:
          Whether it is being written; False while the one before still is.

        Raises:
          LeptonError: the one before could not be written. That is raised once, and
            this one is not tried.
        """
        if self._writer is not None and self._writer.is_alive():
            return False
        self._tell()
        leaves = by_path(state)
        parts = {path: _parts(leaf) for path, leaf in leaves.items()}
        self._writer = threading.Thread(
            target=self._write,
            args=(step, parts, record),
            daemon=True,
        )
        self._writer.start()
        return True

    def wait(self) -> None:
        """Return when what was saved is on the disk."""
        if self._writer is not None:
            self._writer.join()
        self._tell()

    def newest(
        self,
        after: int,
        template: Any,
        on_damaged: Callable[[int, str], None],
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Read the newest step of which every host can read its part.

        Args:
          after: the step has to be later than this.
          template: of shapes with shardings, which say what a host's part is.
          on_damaged: called with a newer step that is damaged, and where.

        Returns:
          Step, state, record; None if there is none.
        """
        needed = _needed(template)

        def fitting() -> list[int]:
            return [
                step
                for step in self._steps()
                if step > after and self._fits(step, needed)
            ]

        everywhere = set.intersection(*map(set, agreement.every(fitting)))
        for step in sorted(everywhere, reverse=True):
            content = _read(self._path(step), whole=True)
            is_intact = content is not None
            intact = agreement.every(partial(bool, is_intact))
            if content is not None and all(intact):
                return step, _state(content, template), content.record
            on_damaged(step, f"the local checkpoint of host {intact.index(False)}")
        return None

    def forget(self, after: int) -> None:
        """Delete steps later than this one: the run has left them."""
        if self._writer is not None:
            self._writer.join()
        for step in self._steps():
            if step > after:
                self._path(step).unlink(missing_ok=True)

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()]
        matches = [re.fullmatch(r"(\d+)\.state", name) for name in names]
        return sorted(int(match[1]) for match in matches if match)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step}.state"

    def _fits(
        self,
        step: int,
        needed: dict[str, Any],
    ) -> bool:
        content = _read(self._path(step), whole=False)
        if content is None:
            return False
        return {path: set(parts) for path, parts in content.parts.items()} == needed

    def _write(
        self,
        step: int,
        parts: dict[str, dict],
        record: dict[str, Any],
    ) -> None:
        listed, blocks = _listed(parts)
        header = {"step": step, "record": record, "parts": listed}
        part = self.folder / f"{step}.part"
        try:
            body = json.dumps(header)
            sealed = {"body": body, "crc32": zlib.crc32(body.encode())}
            with part.open("wb") as file:
                line = json.dumps(sealed).encode()
                file.write(line + b"\n")
                file.writelines(blocks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._path(step))
            for old in self._steps()[:-KEPT]:
                self._path(old).unlink(missing_ok=True)
        # The latter two: the record is no plain data.
        except (OSError, TypeError, ValueError) as error:
            self._fault = error
            part.unlink(missing_ok=True)

    def _tell(self) -> None:
        fault = self._fault
        self._fault = None
        if fault is not None:
            reason = getattr(fault, "strerror", None) or fault
            raise LeptonError(
                f"a local checkpoint can't be written: {reason}",
                where=self.folder,
                remedy=f"{writing_remedy(fault)}; the durable checkpoints go on",
            )


class NoLocalCheckpoints(LocalCheckpoints):
    """The fast tier of a run that has none."""

    def __init__(self) -> None:
        self.every = math.inf

    def newest(
        self,
        after: int,
        template: Any,
        on_damaged: Callable[[int, str], None],
    ) -> None:
        return None

    def forget(self, after: int) -> None:
        pass


class _File(NamedTuple):
    """A file's record, and its arrays (or their sizes) by path and bounds."""

    record: dict[str, Any]
    parts: dict[str, dict[Bounds, Any]]


def _listed(
    parts: dict[str, dict[Bounds, np.ndarray]],
) -> tuple[dict[str, list[dict[str, Any]]], list[bytes]]:
    """Return where each part of an array is in a file, and the bytes of all parts."""
    listed: dict[str, list[dict[str, Any]]] = {}
    blocks = []
    at = 0
    for path, arrays in parts.items():
        listed[path] = []
        for bounds, array in arrays.items():
            data = array.tobytes()
            listed[path].append(
                {
                    "bounds": bounds,
                    "dtype": str(array.dtype),
                    "at": at,
                    "bytes": len(data),
                    "crc32": zlib.crc32(data),
                }
            )
            blocks.append(data)
            at += len(data)
    return listed, blocks


def _read(
    path: Path,
    whole: bool,
) -> _File | None:
    """Read a file; None if it is not intact.

    Args:
      path: of the file.
      whole: whether its arrays are read; else their sizes alone.
    """
    try:
        with path.open("rb") as file:
            sealed = json.loads(file.readline())
            if zlib.crc32(sealed["body"].encode()) != sealed["crc32"]:
                return None
            header = json.loads(sealed["body"])
            first = file.tell()
            end = file.seek(0, os.SEEK_END)
            parts: dict[str, dict[Bounds, Any]] = {}
            for name, listed in header["parts"].items():
                parts[name] = {}
                for entry in listed:
                    start = first + entry["at"]
                    if start + entry["bytes"] > end:
                        return None
                    bounds = tuple(map(tuple, entry["bounds"]))
                    part = entry["bytes"]
                    if whole:
                        part = _read_part(file, start, bounds, entry)
                        if part is None:
                            return None
                    parts[name][bounds] = part
            return _File(header["record"], parts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_part(
    file: BinaryIO,
    start: int,
    bounds: Bounds,
    entry: dict[str, Any],
) -> np.ndarray | None:
    """Read one part of an array; None if it is not intact."""
    file.seek(start)
    data = file.read(entry["bytes"])
    if zlib.crc32(data) != entry["crc32"]:
        return None
    shape = [high - low for low, high in bounds]
    return np.frombuffer(data, jax.numpy.dtype(entry["dtype"])).reshape(shape)


def _state(content: _File, template: Any) -> Any:
    """Return the arrays of a file as a state whose leaves lie as the template's."""
    leaves = []
    for path, leaf in by_path(template).items():
        shape = stored_shape(leaf)
        array = _assembled(shape, leaf.sharding, content.parts[path])
        leaves.append(as_wanted(array, leaf))
    return with_leaves(template, leaves)


def _parts(leaf: jax.Array) -> dict[Bounds, np.ndarray]:
    """Return copies of the different parts of an array that this host's devices hold.

    They are copies because the state is donated to the next step.
    """
    array = as_stored(leaf)
    parts: dict[Bounds, np.ndarray] = {}
    for shard in array.addressable_shards:
        bounds = _bounds(shard.index, array.shape)
        if bounds not in parts:
            parts[bounds] = np.array(shard.data)
    return parts


def _assembled(
    shape: tuple[int, ...],
    sharding: Any,
    parts: dict[Bounds, Any],
) -> jax.Array:
    return jax.make_array_from_callback(
        shape,
        sharding,
        lambda index: parts[_bounds(index, shape)],
    )


def _needed(template: Any) -> dict[str, set[Bounds]]:
    """Return the parts of each array that this host's devices need."""
    needed = {}
    for path, leaf in by_path(template).items():
        shape = stored_shape(leaf)
        places = leaf.sharding.addressable_devices_indices_map(shape)
        needed[path] = {_bounds(index, shape) for index in places.values()}
    return needed


def _bounds(
    index: Any,
    shape: tuple[int, ...],
) -> Bounds:
    """Return the bounds of a part of an array.

    >>> _bounds((slice(2, 4),), (8, 3))
    ((2, 4), (0, 3))
    """
    slices = list(index or ())
    slices += [slice(None)] * (len(shape) - len(slices))
    bounds = []
    for part, size in zip(slices, shape, strict=True):
        first, stop, _ = part.indices(size)
        bounds.append((first, stop))
    return tuple(bounds)
