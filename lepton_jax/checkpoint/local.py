"""The fast tier of checkpoints: each host keeps the newest states of its own devices on
a disk (or in the memory) of its own.

They cost a copy from the devices and a write that nobody waits for, so they can be made
every few seconds; but a machine that is lost takes its part along, and another layout
needs other parts. So they stand beside the durable checkpoints, never in their place: a
run goes on from one only if all hosts can read their parts of it and it is newer than
the newest durable one.

A file is a line of JSON and then the bytes of the arrays; it runs no code, and every
part has its checksum.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.errors import CheckpointError, LeptonError, writing_remedy
from lepton_jax.hosts import agreement
from lepton_jax.trees import by_path

# bytes that a name in a folder may have, less those of the checksum
LONGEST = 255 - len("-01234567")
KEPT = 2  # the newest one may be half written on some hosts when one of them dies


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
        # the name is for people, the checksum tells runs of one name apart
        name = os.fsencode(Path(run).name)[:LONGEST].decode(errors="ignore")
        mark = f"{name}-{zlib.crc32(os.fsencode(path)):08x}"
        self.folder = Path(folder).absolute() / mark / f"host{agreement.host()}"
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
        """Copy this host's part of a state, and begin to write it; False where the one
        before is still being written.

        Raises:
          LeptonError: the one before could not be written. It is told once, and this
            one is not tried.
        """
        if self._writer is not None and self._writer.is_alive():
            return False
        self._tell()
        parts = {path: _parts(leaf) for path, leaf in by_path(state).items()}
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
        """(step, state, record) of the newest step, later than `after`, of which every
        host can read its part as the template's shardings want it; None if there is
        none. What a host finds damaged is reported.
        """
        needed = _needed(template)
        fitting = agreement.every(
            lambda: [
                step
                for step in self._steps()
                if step > after and self._fits(step, needed)
            ]
        )
        for step in sorted(set.intersection(*map(set, fitting)), reverse=True):
            read = _read(self._path(step), whole=True)
            bad = [
                host
                for host, intact in enumerate(agreement.every(lambda: read is not None))  # noqa: B023
                if not intact
            ]
            if not bad:
                assert read is not None
                return step, _state(read, template), read.record
            on_damaged(step, f"the local checkpoint of host {bad[0]}")
        return None

    def forget(self, after: int) -> None:
        """Delete steps later than this one: the run has left them."""
        if self._writer is not None:
            self._writer.join()
        for step in self._steps():
            if step > after:
                self._path(step).unlink(missing_ok=True)

    def _steps(self) -> list[int]:
        found = (
            re.fullmatch(r"(\d+)\.state", path.name) for path in self.folder.iterdir()
        )
        return sorted(int(match[1]) for match in found if match)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step}.state"

    def _fits(
        self,
        step: int,
        needed: dict[str, Any],
    ) -> bool:
        read = _read(self._path(step), whole=False)
        return (
            read is not None
            and {path: set(parts) for path, parts in read.parts.items()} == needed
        )

    def _write(
        self,
        step: int,
        parts: dict[str, dict],
        record: dict[str, Any],
    ) -> None:
        header: dict[str, Any] = {
            "step": step,
            "record": record,
            "parts": {},
        }
        blocks = []
        at = 0
        for path, found in parts.items():
            listed = header["parts"][path] = []
            for bounds, array in found.items():
                data = array.tobytes()
                listed.append(
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
        part = self.folder / f"{step}.part"
        try:
            body = json.dumps(header)
            with part.open("wb") as file:
                file.write(
                    json.dumps(
                        {"body": body, "crc32": zlib.crc32(body.encode())}
                    ).encode()
                    + b"\n"
                )
                file.writelines(blocks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._path(step))
            for old in self._steps()[:-KEPT]:
                self._path(old).unlink(missing_ok=True)
        # the latter two: the record is no plain data
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
    record: dict[str, Any]
    parts: dict[str, dict[tuple, Any]]


def _read(path: Path, whole: bool) -> _File | None:
    """A file's record, and its arrays by bounds (their sizes alone if not `whole`);
    None if it is not intact.
    """
    try:
        with path.open("rb") as file:
            sealed = json.loads(file.readline())
            if zlib.crc32(sealed["body"].encode()) != sealed["crc32"]:
                return None
            header = json.loads(sealed["body"])
            first = file.tell()
            end = file.seek(0, os.SEEK_END)
            parts: dict[str, dict[tuple, Any]] = {}
            for name, listed in header["parts"].items():
                parts[name] = {}
                for one in listed:
                    bounds = tuple(map(tuple, one["bounds"]))
                    if first + one["at"] + one["bytes"] > end:
                        return None
                    if whole:
                        file.seek(first + one["at"])
                        data = file.read(one["bytes"])
                        if zlib.crc32(data) != one["crc32"]:
                            return None
                        shape = [high - low for low, high in bounds]
                        parts[name][bounds] = np.frombuffer(
                            data, jax.numpy.dtype(one["dtype"])
                        ).reshape(shape)
                    else:
                        parts[name][bounds] = one["bytes"]
            return _File(header["record"], parts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _state(read: _File, template: Any) -> Any:
    """The arrays of a file as a state whose leaves lie as the template's."""
    leaves = []
    for path, leaf in by_path(template).items():
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        shape = (
            jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape
        )
        array = _assembled(
            shape,
            leaf.sharding,
            read.parts[path],
        )
        if is_key:
            array = jax.device_put(
                jax.random.wrap_key_data(array, impl=leaf.dtype._impl), leaf.sharding
            )
        leaves.append(array)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _parts(leaf: jax.Array) -> dict[tuple, np.ndarray]:
    """Copies of the different parts of an array that this host's devices hold, by their
    bounds.
    """
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    parts: dict[tuple, np.ndarray] = {}
    for shard in leaf.addressable_shards:
        bounds = _bounds(shard.index, leaf.shape)
        if bounds not in parts:
            # the state is donated to the next step
            parts[bounds] = np.array(shard.data)
    return parts


def _assembled(
    shape: tuple[int, ...],
    sharding: Any,
    parts: dict[tuple, Any],
) -> jax.Array:
    return jax.make_array_from_callback(
        shape,
        sharding,
        lambda index: parts[_bounds(index, shape)],
    )


def _needed(template: Any) -> dict[str, set[tuple]]:
    needed = {}
    for path, leaf in by_path(template).items():
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        shape = (
            jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape
        )
        places = leaf.sharding.addressable_devices_indices_map(shape).values()
        needed[path] = {_bounds(index, shape) for index in places}
    return needed


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    full = (*(index or ()), *[slice(None)] * (len(shape) - len(index or ())))
    return tuple(part.indices(size)[:2] for part, size in zip(full, shape, strict=True))
