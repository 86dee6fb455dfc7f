"""Bytes of files, unpacked, that are read by range and never wait for anybody.

Paths that a reader must not open are refused here: a FIFO or a device would block, or
never end.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import hashlib
import io
import lzma
import os
import stat
import threading
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from lepton_jax.errors import DataError

BLOCK = 2**22  # bytes read at once; assumption: large enough to be quick

# First bytes of packed files (RFC 1952; APPNOTE.TXT 4.3.7; bzip2 and xz formats).
GZIP = b"\x1f\x8b"
BZIP2 = b"BZh"
XZ = b"\xfd7zXZ\x00"
ZIP = b"PK\x03\x04"
EMPTY_ZIP = b"PK\x05\x06"

# A file that changed this recently may change again without another time stamp.
# Assumption: coarser than the clock of any file system (2 s on FAT).
RECENT_S = 2.0

STREAMS_KEPT = 4  # open streams of packed files in a process; assumption

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO, which may wait forever"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_REMEDIES = {
    errno.ENOENT: ("there is no such file", "check the path"),
    errno.ENOTDIR: ("there is no such file", "check the path"),
    errno.EACCES: ("this user may not read the file", "change its rights (chmod)"),
    errno.ELOOP: ("the links in the path run in a circle", "correct the links"),
    errno.ENAMETOOLONG: ("the path is too long", "check the path"),
}
_UNPACKING = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


class Stamp(NamedTuple):
    """The state of a file by which a change is noticed.

    Attributes:
      size: bytes.
      modified: when it was last written, nanoseconds.
      inode: its number on its disk.
      settled: whether the time is old enough to be trusted.
    """

    size: int
    modified: int
    inode: int
    settled: bool

    def is_sure(self, now: Stamp) -> bool:
        """Whether the file is surely unchanged in its state `now`."""
        return self.settled and now[:3] == self[:3]


def stamp(path: str | Path) -> Stamp:
    """Return a regular file's state.

    Raises:
      DataError: there is no such file, or it is none that can be read to an end.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise DataError(
                f"expected a file, found {name}",
                where=path,
                remedy="give the path of a regular file",
            )
    age = time.time() - status.st_mtime
    return Stamp(
        status.st_size,
        status.st_mtime_ns,
        status.st_ino,
        settled=age > RECENT_S,
    )


def unreadable(path: object, error: Exception) -> DataError:
    """Return the error for a file that the system does not let us read."""
    code = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or error
    what, remedy = _REMEDIES.get(
        code or 0,
        (
            f"the file can't be read: {reason}",
            "check the path and the disk",
        ),
    )
    return DataError(what, where=path, remedy=remedy)


def digest(*parts: bytes | memoryview) -> str:
    """Return a hash of bytes, hexadecimal."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


@dataclass(frozen=True)
class Stored:
    """Bytes in a file, or of an entry of an archive in it, as they are unpacked.

    Attributes:
      path: the file.
      entry: name of the entry; "" for the file itself.
      offset: where the entry begins in the unpacked file, for a tar archive; -1 for an
        entry of a ZIP archive.
      size: bytes of the entry; -1: as many as there are.
    """

    path: str
    entry: str = ""
    offset: int = -1
    size: int = -1

    def __str__(self) -> str:
        return f"{self.path}:{self.entry}" if self.entry else self.path

    @property
    def name(self) -> str:
        """The last part of its name, without the ending of a packed file."""
        base = os.path.basename(self.entry or self.path)
        for ending in (".gz", ".bz2", ".xz"):
            base = base.removesuffix(ending)
        return base

    def stamp(self) -> Stamp:
        """Return the state of the file."""
        return stamp(self.path)

    def read(
        self,
        start: int,
        length: int,
    ) -> bytes:
        """Return bytes `start` to `start + length`, fewer at the end.

        A packed file is unpacked from its beginning, unless the last reading stopped
        before `start`.

        Raises:
          DataError: the file is damaged or can't be read.
        """
        if self.offset >= 0:
            length = max(0, min(length, self.size - start))
            return self._read_part(start, length)
        stream = _stream_at(self, start)
        try:
            data = _read_fully(stream, length)
        except _UNPACKING as error:
            stream.close()
            raise damaged(self, error) from error
        _give_back(
            self,
            stream,
            start + len(data),
            is_done=len(data) < length,
        )
        return data

    def _read_part(self, start: int, length: int) -> bytes:
        data = Stored(self.path).read(self.offset + start, length)
        if len(data) < length:
            raise DataError(
                "the archive is cut short",
                where=self,
                remedy="download or pack the file again",
            )
        return data

    def whole(self, most: int) -> bytes:
        """Return all bytes.

        Raises:
          DataError: they are more than `most`.
        """
        data = self.read(0, most + 1)
        if len(data) > most:
            raise DataError(
                f"the file has more than {most:,} bytes, which are read at once",
                where=self,
                remedy="divide it into smaller files",
            )
        return data

    def blocks(self, length: int = BLOCK) -> Iterator[bytes]:
        """Yield all bytes in blocks."""
        start = 0
        while block := self.read(start, length):
            yield block
            start += len(block)


def damaged(place: object, error: Exception) -> DataError:
    """Return the error for packed bytes that can't be unpacked."""
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(place, error)
    return DataError(
        f"the packed data are damaged: {error}",
        where=place,
        remedy="download or pack the file again",
    )


# ---- internals ----

# Streams that are open between two readings, by what they read, with their position.
# They belong to the process: a reader that is pickled takes none along.
_kept: OrderedDict[tuple[Stored, Stamp], tuple[BinaryIO, int]] = OrderedDict()
_archives: OrderedDict[tuple[str, tuple[int, ...]], zipfile.ZipFile] = OrderedDict()
_lock = threading.Lock()


def _key(stored: Stored) -> tuple[Stored, Stamp]:
    now = stored.stamp()
    return stored, now._replace(settled=True)


def _stream_at(stored: Stored, start: int) -> BinaryIO:
    """Return an open stream at a position."""
    with _lock:
        kept = _kept.pop(_key(stored), None)
    if kept is not None:
        stream, position = kept
        if position <= start:
            return _skip(stored, stream, start - position)
        stream.close()
    stream = open_stored(stored)
    if stream.seekable() and not _is_packed(stream):
        stream.seek(start)
        return stream
    return _skip(stored, stream, start)


def _is_packed(stream: BinaryIO) -> bool:
    return not isinstance(stream, io.BufferedReader)


def _skip(
    stored: Stored,
    stream: BinaryIO,
    count: int,
) -> BinaryIO:
    try:
        while count > 0:
            skipped = len(stream.read(min(count, BLOCK)))
            if not skipped:
                break
            count -= skipped
    except _UNPACKING as error:
        stream.close()
        raise damaged(stored, error) from error
    return stream


def _read_fully(stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) in (0, length):
        return data
    parts = [data]
    missing = length - len(data)
    while missing > 0 and (more := stream.read(missing)):
        parts.append(more)
        missing -= len(more)
    return b"".join(parts)


def _give_back(
    stored: Stored,
    stream: BinaryIO,
    position: int,
    is_done: bool,
) -> None:
    """Keep a packed stream open for the next reading."""
    if is_done or not _is_packed(stream):
        stream.close()
        return
    surplus = []
    with _lock:
        surplus.append(_kept.pop(_key(stored), None))
        _kept[_key(stored)] = (stream, position)
        while len(_kept) > STREAMS_KEPT:
            _, oldest = _kept.popitem(last=False)
            surplus.append(oldest)
    for kept in surplus:
        if kept is not None:
            kept[0].close()


def open_stored(stored: Stored) -> BinaryIO:
    """Open stored bytes from their beginning.

    Raises:
      DataError: they can't be read.
    """
    stamp(stored.path)
    try:
        if stored.entry:
            return _open_entry(stored)
        return _unpacked(open(stored.path, "rb"))
    except (*_UNPACKING, KeyError, RuntimeError, NotImplementedError) as error:
        raise damaged(stored, error) from error


def _unpacked(file: BinaryIO) -> BinaryIO:
    """Return a stream that unpacks a file, if its first bytes say that it is packed."""
    first = file.read(len(XZ))
    file.seek(0)
    if first.startswith(GZIP):
        return cast("BinaryIO", _Closing(gzip.GzipFile(fileobj=file), file))
    if first.startswith(BZIP2):
        return cast("BinaryIO", _Closing(bz2.BZ2File(file), file))
    if first.startswith(XZ):
        return cast("BinaryIO", _Closing(lzma.LZMAFile(file), file))
    return file


def _open_entry(stored: Stored) -> BinaryIO:
    entry = zip_archive(stored.path).open(stored.entry)
    return cast("BinaryIO", _Closing(entry))


def zip_archive(path: str) -> zipfile.ZipFile:
    """Return an open ZIP archive; its directory is read once."""
    key = (path, stamp(path)[:3])
    with _lock:
        archive = _archives.pop(key, None) or zipfile.ZipFile(path)
        _archives[key] = archive
        while len(_archives) > STREAMS_KEPT:
            # Entries that are still being read hold the file open themselves.
            _archives.popitem(last=False)
    return archive


class _Closing:
    """A packed stream that closes the file below it, too."""

    def __init__(self, stream: object, *others: object):
        self.stream = cast("BinaryIO", stream)
        self.others = others

    def read(self, count: int = -1) -> bytes:
        return self.stream.read(count)

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        for each in (self.stream, *self.others):
            with contextlib.suppress(OSError, EOFError, zlib.error):
                cast("BinaryIO", each).close()
