"""`reader_of`: the reader of whatever a person gives."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from lepton_jax.data.readers.archives import entries_of, is_archive
from lepton_jax.data.readers.arrow import ArrowReader
from lepton_jax.data.readers.counted import CountedReader
from lepton_jax.data.readers.delimited import SAMPLE, CsvReader
from lepton_jax.data.readers.dialect import CsvSettings
from lepton_jax.data.readers.entries import FilesReader, entries_below, labelled
from lepton_jax.data.readers.files import Stored, unreadable
from lepton_jax.data.readers.formats import FIRST, format_of
from lepton_jax.data.readers.idx import readers_of_idx, with_labels
from lepton_jax.data.readers.json_lines import JsonLinesReader
from lepton_jax.data.readers.many import ManyReader
from lepton_jax.data.readers.memory import is_memory, reader_of_memory
from lepton_jax.data.readers.numpy_files import reader_of_npy, reader_of_npz
from lepton_jax.data.readers.parquet import ParquetReader
from lepton_jax.data.readers.reader import ROW, Reader
from lepton_jax.data.readers.text import TextReader
from lepton_jax.errors import DataError, nearest

# Files that lie next to data and are none, by the beginnings of their names.
ABOUT = (
    "readme",
    "license",
    "licence",
    "copying",
    "_",
    ".",
    "thumbs.db",
    "desktop.ini",
)


class Given(NamedTuple):
    """The files of one source, all of one format.

    Attributes:
      name: what messages call them.
      files: in their order.
      folder: that all of them are below; "" if there is none.
      settings: what somebody has set.
    """

    name: str
    files: Sequence[Stored]
    folder: str
    settings: dict[str, Any]


class Format(NamedTuple):
    """A format of files.

    Attributes:
      settings: names of the arguments that its reader has.
      open: makes the readers of files: one, or one a file.
    """

    settings: tuple[str, ...]
    open: Callable[[Given], Sequence[CountedReader]]


def reader_of(anything: Any, **dialect: Any) -> Reader:
    """Return the reader of a file, of several, or of a table in memory.

    Args:
      anything: a path, a glob such as "part-*.csv", a folder, a ZIP or tar archive, a
        list of paths; NumPy arrays or a dict of them, a list of dicts, a pandas or
        Polars frame, an Arrow table, a Hugging Face `Dataset`, torch tensors; or a
        reader, which is returned.
      **dialect: what overrides that which is found out.
        `format`: "csv", "jsonl", "parquet", "arrow", "images", "text", "idx" or
        "numpy"; `drift`: what happens if files of one source have different columns,
        "error" or "union"; for CSV the fields of `CsvSettings`; for JSON lines `types`,
        `missing`, `bad_rows`, `encoding`, `longest_row`; for text `rows` ("line" or
        "file"), `encoding`, `bad_rows`, `longest_row`; for images `labels`, a table of
        files and labels in any form that is read, and `file_column`.

    Raises:
      DataError: nothing can be read there, or a setting is unknown.
    """
    if isinstance(anything, Reader):
        _check_settings(dialect, (), "a reader")
        return anything
    if _is_path(anything):
        path = os.path.expanduser(os.fspath(anything))
        folder = path if os.path.isdir(path) else ""
        return _reader_of_files(path, paths_of(path), folder, dialect)
    if _is_paths(anything):
        paths = [
            path
            for each in anything
            for path in paths_of(os.path.expanduser(os.fspath(each)))
        ]
        return _reader_of_files(f"{len(paths)} files", paths, "", dialect)
    _check_settings(dialect, ("name",), "a table in memory")
    return reader_of_memory(anything, **dialect)


def paths_of(path: str) -> list[Stored]:
    """Return the files that a path, a glob or a folder stands for, in order of names.

    Raises:
      DataError: there is none.
    """
    if "\0" in path:
        raise DataError(
            "the path has a zero byte",
            where=repr(path),
            remedy="check the path",
        )
    if os.path.isdir(path):
        return files_below(path)
    if os.path.lexists(path) or not glob.has_magic(path):
        return [Stored(path)]
    found = [
        each
        for each in glob.glob(
            path,
            recursive=True,
        )
        if os.path.isfile(each)
    ]
    if not found:
        raise DataError(
            "no file matches",
            where=path,
            remedy="check the path and its wildcards",
        )
    return [Stored(each) for each in sorted(found)]


def files_below(folder: str) -> list[Stored]:
    """Return the files below a folder, without hidden ones, README and LICENSE.

    Links to folders are not followed: they may run in a circle.

    Raises:
      DataError: there is none, or the folder can't be read.
    """
    found = []
    for place, folders, files in os.walk(
        folder,
        onerror=_raise,
    ):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [
            os.path.join(
                place,
                name,
            )
            for name in sorted(files)
        ]
        found += [Stored(path) for path in paths if _is_data(path)]
    if not found:
        raise DataError(
            "the folder has no files of data",
            where=folder,
            remedy="give a folder with files of data",
        )
    return found


# ---- files ----


def _reader_of_files(
    name: str,
    files: Sequence[Stored],
    folder: str,
    dialect: Mapping[str, Any],
) -> Reader:
    """Return the reader of files that are one source."""
    settings = dict(dialect)
    drift = settings.pop("drift", "error")
    form = settings.pop("format", None)
    name = os.path.basename(os.path.normpath(name)) or name
    files = _unpacked(files)
    if form is None and _is_npz(files):
        form = "npz"
    if form is None:
        form, files = _common_format(files, name)
    if form not in FORMATS:
        raise DataError(
            f"format is {form!r}{nearest(str(form), FORMATS)}",
            where=name,
            remedy=f"use one of {', '.join(FORMATS)}",
        )
    if len(files) > 1:
        files = [
            file
            for file in files
            if _is_of(
                file,
                form,
            )
        ] or files
    known = FORMATS[form]
    _check_settings(settings, known.settings, f"a {form} file")
    readers = known.open(
        Given(
            name,
            files,
            folder,
            settings,
        )
    )
    if len(readers) == 1:
        return readers[0]
    return ManyReader(name, readers, drift)


def _unpacked(files: Sequence[Stored]) -> list[Stored]:
    """Return files with the entries of archives in place of these."""
    found = []
    for file in files:
        first = file.read(0, FIRST)
        if not is_archive(file, first):
            found.append(file)
            continue
        entries = entries_of(file, first)
        if any(entry.entry == "[Content_Types].xml" for entry in entries):
            raise DataError(
                "the file is an Office document, such as an .xlsx workbook",
                where=file,
                remedy="export the table as a CSV file",
            )
        about = [entry for entry in entries if _is_about(entry.entry)]
        found += [entry for entry in entries if entry not in about] or about
    return found


def _is_npz(files: Sequence[Stored]) -> bool:
    """Whether files are the entries of one archive of NumPy's."""
    one = {file.path for file in files}
    return len(one) == 1 and all(file.entry.endswith(".npy") for file in files)


def _common_format(
    files: Sequence[Stored],
    name: str,
) -> tuple[str, Sequence[Stored]]:
    """Return the one format of files, and these.

    A table next to images is that of their labels, if somebody has set so; it is not
    taken for one here.

    Raises:
      DataError: they are of several formats.
    """
    formats = [format_of(file) for file in files]
    counts = Counter(formats)
    if len(counts) > 1:
        shown = ", ".join(f"{count} {form}" for form, count in counts.most_common())
        remedy = "give the files of one format by a glob, or set `format`"
        if "images" in counts:
            remedy += "; of a table of labels format='images' and `labels` to its path"
        raise DataError(
            f"the files are of several formats: {shown}",
            where=f"{name}: {files[0]}, ...",
            remedy=remedy,
        )
    return formats[0], files


def _is_of(file: Stored, form: str) -> bool:
    """Whether a file is of a format; others next to it are left out if it is set."""
    try:
        return format_of(file) == form
    except DataError:
        return False


def _is_data(path: str) -> bool:
    return os.path.isfile(path) and not _is_about(path)


def _is_about(path: str) -> bool:
    return Path(path).name.lower().startswith(ABOUT)


# ---- formats ----


def _open_csv(given: Given) -> list[CountedReader]:
    settings = CsvSettings(**given.settings)
    return [
        CsvReader(
            file,
            settings,
        )
        for file in given.files
    ]


def _open_json_lines(given: Given) -> list[CountedReader]:
    return [
        JsonLinesReader(
            file,
            **given.settings,
        )
        for file in given.files
    ]


def _open_parquet(given: Given) -> list[CountedReader]:
    return [ParquetReader(file) for file in given.files]


def _open_arrow(given: Given) -> list[CountedReader]:
    return [ArrowReader(file) for file in given.files]


def _open_text(given: Given) -> list[CountedReader]:
    settings = dict(given.settings)
    several = len(given.files) > 1
    rows = settings.pop("rows", "file" if several else "line")
    if rows not in ("line", "file"):
        raise DataError(
            f"rows is {rows!r}",
            where="rows",
            remedy="use 'line' or 'file'",
        )
    if rows == "line":
        return [
            TextReader(
                file,
                **settings,
                file=file.name if several else None,
            )
            for file in given.files
        ]
    settings.pop("longest_row", None)
    entries = entries_below(given.files, given.folder)
    return [
        FilesReader(
            given.name,
            entries,
            text=True,
            **settings,
        )
    ]


def _open_images(given: Given) -> list[CountedReader]:
    entries = entries_below(given.files, given.folder)
    labels = given.settings.get("labels")
    if labels is None:
        return [FilesReader(given.name, entries)]
    reader = reader_of(labels)
    parts = [reader.read(piece).table for piece in reader.pieces(SAMPLE)]
    if not parts:
        raise DataError(
            "the table of labels has no rows",
            where=reader.name,
            remedy="give it a row for each image",
        )
    chosen, table = labelled(
        entries,
        pl.concat(parts).drop(ROW),
        given.settings.get("file_column"),
        reader.name,
    )
    return [
        FilesReader(
            given.name,
            chosen,
            table=table,
        )
    ]


def _open_idx(given: Given) -> Sequence[CountedReader]:
    files = given.files
    if len(files) == 1:
        files = with_labels(files[0])
    return readers_of_idx(files)


def _open_numpy(given: Given) -> list[CountedReader]:
    return [reader_of_npy(file) for file in given.files]


def _open_npz(given: Given) -> list[CountedReader]:
    return [reader_of_npz(given.files)]


_CSV = tuple(field.name for field in dataclasses.fields(CsvSettings))
_JSON = ("types", "missing", "bad_rows", "encoding", "longest_row")
_TEXT = ("rows", "encoding", "bad_rows", "longest_row")

FORMATS = {
    "arrow": Format((), _open_arrow),
    "csv": Format(_CSV, _open_csv),
    "idx": Format((), _open_idx),
    "images": Format(("labels", "file_column"), _open_images),
    "jsonl": Format(_JSON, _open_json_lines),
    "npz": Format((), _open_npz),
    "numpy": Format((), _open_numpy),
    "parquet": Format((), _open_parquet),
    "text": Format(_TEXT, _open_text),
}


# ---- what is given ----


def _is_path(anything: Any) -> bool:
    return isinstance(anything, str | os.PathLike)


def _is_paths(anything: Any) -> bool:
    if (
        is_memory(anything)
        or not isinstance(
            anything,
            list | tuple,
        )
        or not anything
    ):
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
