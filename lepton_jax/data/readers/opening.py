"""`reader_of`: the reader of whatever a person gives."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lepton_jax.data.readers.counted import CountedReader
from lepton_jax.data.readers.delimited import CsvReader
from lepton_jax.data.readers.dialect import CsvSettings
from lepton_jax.data.readers.files import Stored, unreadable
from lepton_jax.data.readers.many import ManyReader
from lepton_jax.data.readers.memory import is_memory, reader_of_memory
from lepton_jax.data.readers.parquet import ParquetReader
from lepton_jax.data.readers.reader import Reader
from lepton_jax.errors import DataError, nearest

FIRST = 2**12  # bytes by which a format is recognised; assumption


class Format(NamedTuple):
    """A format of files.

    Attributes:
      endings: of names of such files.
      settings: names of the arguments that its reader has.
      open: makes the reader of a file.
    """

    endings: tuple[str, ...]
    settings: tuple[str, ...]
    open: Callable[[Stored, dict[str, Any]], CountedReader]


def reader_of(anything: Any, **dialect: Any) -> Reader:
    """Return the reader of a file, of several, or of a table in memory.

    Args:
      anything: a path, a glob such as "part-*.csv", a folder, a list of paths; NumPy
        arrays or a dict of them, a list of dicts, a pandas or Polars frame, an Arrow
        table, a Hugging Face `Dataset`, torch tensors; or a reader, which is returned.
      **dialect: what overrides that which is found out.
        `format`: "csv", "parquet", ...; `drift`: what happens if files of one source
        have different columns, "error" or "union"; for text also the fields of
        `CsvSettings`.

    Raises:
      DataError: nothing can be read there, or a setting is unknown.
    """
    if isinstance(anything, Reader):
        _check_settings(dialect, (), "a reader")
        return anything
    if _is_path(anything):
        paths = paths_of(os.fspath(anything))
        return reader_of_files(str(anything), paths, dialect)
    if _is_paths(anything):
        paths = [path for each in anything for path in paths_of(os.fspath(each))]
        return reader_of_files(f"{len(paths)} files", paths, dialect)
    _check_settings(dialect, ("name",), "a table in memory")
    return reader_of_memory(anything, **dialect)


def paths_of(path: str) -> list[Stored]:
    """Return the files that a path, a glob or a folder stands for, in order of names.

    Raises:
      DataError: there is none.
    """
    if os.path.isdir(path):
        return files_below(path)
    if os.path.lexists(path) or not glob.has_magic(path):
        return [Stored(path)]
    found = [each for each in glob.glob(path, recursive=True) if os.path.isfile(each)]
    if not found:
        raise DataError(
            "no file matches",
            where=path,
            remedy="check the path and its wildcards",
        )
    return [Stored(each) for each in sorted(found)]


def files_below(folder: str) -> list[Stored]:
    """Return the files below a folder; hidden ones do not count.

    Links to folders are not followed: they may run in a circle.
    """
    found = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(place, name)
            if not name.startswith((".", "_")) and os.path.isfile(path):
                found.append(Stored(path))
    if not found:
        raise DataError(
            "the folder has no files",
            where=folder,
            remedy="give a folder with files of data",
        )
    return found


def reader_of_files(
    name: str,
    files: Sequence[Stored],
    dialect: Mapping[str, Any],
) -> Reader:
    """Return the reader of files that are one source."""
    settings = dict(dialect)
    drift = settings.pop("drift", "error")
    form = settings.pop("format", None)
    readers = [reader_of_file(file, form, settings) for file in files]
    if len(readers) == 1:
        return readers[0]
    return ManyReader(name, readers, drift)


def reader_of_file(
    file: Stored,
    form: str | None,
    settings: dict[str, Any],
) -> CountedReader:
    """Return the reader of one file."""
    form = form or format_of(file)
    if form not in FORMATS:
        raise DataError(
            f"format is {form!r}{nearest(str(form), FORMATS)}",
            where=file,
            remedy=f"use one of {', '.join(FORMATS)}",
        )
    known = FORMATS[form]
    _check_settings(settings, known.settings, f"a {form} file")
    return known.open(file, settings)


def format_of(file: Stored) -> str:
    """Return the name of a file's format, by its first bytes and its name.

    Raises:
      DataError: it is of no format that is read.
    """
    first = file.read(0, FIRST)
    if first.startswith(b"PAR1"):
        return "parquet"
    ending = Path(file.name).suffix.lower()
    for name, form in FORMATS.items():
        if ending in form.endings:
            return name
    return "csv"


# ---- internals ----


def _open_csv(file: Stored, settings: dict[str, Any]) -> CountedReader:
    return CsvReader(file, CsvSettings(**settings))


def _open_parquet(file: Stored, settings: dict[str, Any]) -> CountedReader:
    return ParquetReader(file)


_CSV_SETTINGS = tuple(field.name for field in dataclasses.fields(CsvSettings))

FORMATS = {
    "csv": Format((".csv", ".tsv", ".tab"), _CSV_SETTINGS, _open_csv),
    "parquet": Format((".parquet", ".pq"), (), _open_parquet),
}


def _is_path(anything: Any) -> bool:
    return isinstance(anything, str | os.PathLike)


def _is_paths(anything: Any) -> bool:
    if is_memory(anything) or not isinstance(anything, list | tuple) or not anything:
        return False
    return all(map(_is_path, anything))


def _check_settings(
    given: Mapping[str, Any],
    known: Sequence[str],
    what: str,
) -> None:
    for name in given:
        if name not in known:
            raise DataError(
                f"there is no setting {name!r} of {what}{nearest(name, known)}",
                where=name,
                remedy=f"use some of {', '.join(known)}" if known else "leave it out",
            )


def _raise(error: OSError) -> None:
    raise unreadable(error.filename, error) from error
