"""The entries of ZIP and tar archives, which are read where they are.

Nothing is ever unpacked to disk. Archives that try to reach outside of themselves, or
that unpack to more than they could hold, are refused.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath

from lepton_jax.data.readers.files import (
    EMPTY_ZIP,
    ZIP,
    Stored,
    damaged,
    open_stored,
    zip_archive,
)
from lepton_jax.errors import DataError

# Limits of what is taken for an archive of data. Assumptions: ten times what the
# largest public data sets of files have.
MOST_ENTRIES = 10_000_000
MOST_BYTES = 2**42  # unpacked

# Bytes that one packed byte of an entry may become, once the entry is large. Deflate
# itself reaches 1,032 (https://zlib.net/zlib_tech.html); text and tables stay below 30.
MOST_RATIO = 200
LARGE = 2**26  # bytes; assumption

_FAULTS = (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error)


def is_archive(file: Stored, first: bytes) -> bool:
    """Whether a file is an archive of files.

    Args:
      file: the file.
      first: its first bytes, unpacked.
    """
    if first.startswith((ZIP, EMPTY_ZIP)):
        return True
    return first[257:262] == b"ustar"


def entries_of(file: Stored, first: bytes) -> list[Stored]:
    """Return the files in an archive, in order of names.

    Raises:
      DataError: the archive is damaged, reaches outside of itself, or is a bomb.
    """
    try:
        if first.startswith((ZIP, EMPTY_ZIP)):
            entries = list(_of_zip(file))
        else:
            entries = list(_of_tar(file))
    except _FAULTS as error:
        raise damaged(file, error) from error
    shown = [entry for entry in entries if not _is_hidden(entry.entry)]
    if not shown:
        raise DataError(
            "the archive has no files",
            where=file,
            remedy="give an archive with files of data",
        )
    _check_twice(shown)
    return sorted(shown, key=_entry)


# ---- internals ----


def _entry(stored: Stored) -> str:
    return stored.entry


def _of_zip(file: Stored) -> Iterator[Stored]:
    total = 0
    archive = zip_archive(file.path)
    if len(archive.infolist()) > MOST_ENTRIES:
        raise _bomb(file, f"has more than {MOST_ENTRIES:,} entries")
    for info in archive.infolist():
        _check_name(info.filename, file)
        if info.is_dir():
            continue
        if info.flag_bits & 1:
            raise DataError(
                f"the entry {info.filename!r} is encrypted",
                where=file,
                remedy="give an archive without a password",
            )
        total += info.file_size
        ratio = info.file_size / max(1, info.compress_size)
        if total > MOST_BYTES or (info.file_size > LARGE and ratio > MOST_RATIO):
            raise _bomb(
                file,
                f"unpacks {info.compress_size:,} bytes of {info.filename!r} to"
                f" {info.file_size:,}",
            )
        yield Stored(
            file.path,
            info.filename,
            size=info.file_size,
        )


def _of_tar(file: Stored) -> Iterator[Stored]:
    total = 0
    with (
        open_stored(file) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        for count, member in enumerate(archive):
            _check_name(member.name, file)
            total += member.size
            if total > MOST_BYTES or count > MOST_ENTRIES:
                raise _bomb(file, f"has {count:,} entries of {total:,} bytes")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise DataError(
                    f"the entry {member.name!r} is a link or a device",
                    where=file,
                    remedy="pack the files themselves (tar --dereference)",
                )
            yield Stored(
                file.path,
                member.name,
                member.offset_data,
                member.size,
            )


def _check_name(name: str, file: Stored) -> None:
    windows = PureWindowsPath(name)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or windows.drive or ".." in parts:
        raise DataError(
            f"the entry {name!r} reaches outside of the archive",
            where=file,
            remedy="do not use this archive unless you trust who made it; pack it anew",
        )


def _check_twice(entries: list[Stored]) -> None:
    names = set()
    for entry in entries:
        if entry.entry in names:
            raise DataError(
                f"the entry {entry.entry!r} is there twice",
                where=entry.path,
                remedy="pack the files anew",
            )
        names.add(entry.entry)


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part.startswith((".", "__MACOSX")) and part != "." for part in parts)


def _bomb(file: Stored, what: str) -> DataError:
    return DataError(
        f"the archive {what}: that is no archive of data",
        where=file,
        remedy=(
            "do not use it unless you trust who made it; if you do, unpack it yourself"
            " and give the folder"
        ),
    )
