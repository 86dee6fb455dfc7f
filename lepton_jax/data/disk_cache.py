"""Copies of files on a local disk, by their content, up to a number of bytes.

Several processes may share a folder. A copy is written next to its place and renamed,
so nobody sees half of one; a lock on the folder keeps two from copying the same file,
and from removing old ones at the same time. A copy's time is that of its last use.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lepton_jax.errors import DataError, writing_remedy

Result = TypeVar("Result")

LOCKS = 64  # files copied at a time; assumption: more than a machine's readers
# After which a file that is being copied counts as left by a process that was killed.
# Assumption: no copy takes an hour.
STALE_SECONDS = 3600
TRIES = 3  # to use a copy that another process removes; assumption: two would do

# Ends of names in the folder.
COPY = ".copy"
PART = ".part"
LOCK = ".lock"


class DiskCache:
    """A folder of copies.

    Args:
      folder: on a fast local disk; it is made.
      size: bytes at most. A file that alone is larger is not copied.

    Raises:
      DataError: the folder can't be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        size: float,
    ):
        self.folder = Path(folder)
        self.size = int(size)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def __repr__(self) -> str:
        return f"DiskCache({str(self.folder)!r}, size={self.size})"

    def copied(
        self,
        source: Path,
        digest: str,
        read: Callable[[Path], Result],
    ) -> Result:
        """Read a file's copy, which is made first if there is none.

        Args:
          source: the file.
          digest: of its content.
          read: reads a file at a path.

        Raises:
          DataError: the copy can't be written.
        """
        for _ in range(TRIES):
            copy = self._copy(source, digest)
            try:
                return read(copy)
            except FileNotFoundError:
                continue  # another process made room for its own
        return read(source)

    def _copy(
        self,
        source: Path,
        digest: str,
    ) -> Path:
        copy = self.folder / f"{digest}{COPY}"
        if _used(copy):
            return copy
        size = source.stat().st_size
        if size > self.size:
            return source

        number = int(hashlib.sha256(digest.encode()).hexdigest(), 16) % LOCKS
        with self._locked(f"file-{number}"):
            if not _used(copy):
                self._write(source, copy, size)
        return copy

    def _write(
        self,
        source: Path,
        copy: Path,
        size: int,
    ) -> None:
        with open(source, "rb") as original:
            try:
                part = self._reserved(size)
                try:
                    with open(part, "r+b") as file:
                        shutil.copyfileobj(original, file)
                    os.replace(part, copy)
                except BaseException:
                    os.unlink(part)
                    raise
            except OSError as error:
                raise _unwritable(self.folder, error) from error

    def _reserved(self, size: int) -> str:
        """Return a file of this size, so that all processes together keep the limit."""
        with self._locked("folder"):
            self._make_room(size)
            handle, part = tempfile.mkstemp(PART, dir=self.folder)
            os.truncate(handle, size)
            os.close(handle)
        return part

    def _make_room(self, size: int) -> None:
        """Remove the copies used longest ago until `size` bytes more fit."""
        copies = []
        for file in [*self.folder.glob(f"*{COPY}"), *self.folder.glob(f"*{PART}")]:
            try:
                status = file.stat()
            except FileNotFoundError:
                continue  # finished, and renamed
            copies.append((status.st_mtime_ns, status.st_size, file))

        total = sum(held for _, held, _ in copies)
        stale = time.time_ns() - STALE_SECONDS * 10**9
        for used, held, file in sorted(copies):
            if total + size <= self.size:
                return
            if file.suffix == COPY or used < stale:
                file.unlink(missing_ok=True)
                total -= held

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        path = self.folder / f"{name}{LOCK}"
        try:
            path.touch()
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file unlocks it


def _used(copy: Path) -> bool:
    """Whether there is a copy; its time becomes now."""
    try:
        os.utime(copy)
    except FileNotFoundError:
        return False
    return True


def _unwritable(
    folder: Path,
    error: OSError,
) -> DataError:
    return DataError(
        f"the cache can't be written: {error.strerror or error}",
        where=folder,
        remedy=writing_remedy(error),
    )
