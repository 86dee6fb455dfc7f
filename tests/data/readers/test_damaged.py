"""Damaged and unusual inputs: right data, an error with a remedy, or counted rows.

Each case makes its input in an empty folder, and says what must come of it. None may
hang, and none may lose a row that is good.
"""

import gzip
import io
import json
import os
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from lepton_jax import DataError
from lepton_jax.data.readers import ROW, reader_of

SIZE = 2**20
LONGEST_S = 30  # that one case may take on a busy machine

# ---- how a case is written ----


@dataclass(frozen=True)
class Case:
    """An input and what must come of it.

    Attributes:
      make: writes the input into a folder; returns what `reader_of` takes.
      rows: of the first column, if there is data.
      refused: how many rows are refused and cells changed.
      error: words of the error, if there is one.
      where: words of its place.
      dialect: arguments of `reader_of`.
      column: the column that `rows` is of; None: the first.
    """

    make: Callable[[Path], Any]
    rows: list[Any] | None = None
    refused: int = 0
    error: str = ""
    where: str = ""
    dialect: dict[str, Any] = field(default_factory=dict)
    column: str | None = None


def text(content, name="table.csv"):
    def make(folder):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        return folder / name

    return make


def bad(content, fault, line, kept=None, column=None, name="table.csv", **dialect):
    """Two cases: the row is an error, and it is refused while the others stay."""
    place = f"line {line}"
    make = text(content, name)
    yield Case(make, error=fault, where=place, dialect=dialect)
    refuse = {**dialect, "bad_rows": "refuse"}
    yield Case(make, rows=kept, refused=1, dialect=refuse, column=column)


REFUSE = {"bad_rows": "refuse"}
CASES: dict[str, Case] = {}


def add(name, *cases):
    for number, case in enumerate(cases):
        suffix = ", refused" if number else ""
        CASES[name + suffix] = case


# ---- rows and quotes ----

add("a short row", *bad("a,b\n1,x\n2\n3,z\n", "expected 2 cells, found 1", 3, [1, 3]))
add(
    "a long row", *bad("a,b\n1,x\n2,y,?\n3,z\n", "expected 2 cells, found 3", 3, [1, 3])
)
add(
    "a short and a long row cancel out",
    Case(text("a,b\n1\n2,y,?\n3,z\n4,w\n5,v\n"), [3, 4, 5], 2, dialect=REFUSE),
)
add("a quote is not closed", *bad('a,b\n1,"x\n2,y\n3,z\n', "a quote", 2, [2, 3]))
add(
    "a quote is not closed before others",
    *bad('a,b\n1,"x\n2,"y"\n3,"z"\n', "a quote", 2, [2, 3]),
)
add("text after a quote", *bad('a,b\n1,"x"!\n2,y\n', "a quote", 2, [2]))
add("a quote at the very end", *bad('a,b\n1,x\n2,"', "a quote", 3, [1]))
add("an inch sign", Case(text('a,b\na 5" pipe,1\na hose,2\n'), ['a 5" pipe', "a hose"]))
add("a doubled quote", Case(text('a,b\n"say ""hi""",1\n'), ['say "hi"']))
add("a backslashed quote", Case(text('a,b\n"say \\"hi\\"",1\n'), ['say "hi"']))
add("a backslash before a doubled quote", Case(text('a,b\n"x\\""y",1\n'), ['x\\"y']))
add("a newline in quotes", Case(text('a,b\n"x\ny",1\nz,2\n'), ["x\ny", "z"]))
add("a delimiter in quotes", Case(text('a,b\n"x,y",1\n'), ["x,y"]))
add("quotes around nothing", Case(text('a,b\n"",1\n"x",2\n'), [None, "x"]))
add("a quote of another kind", Case(text("a,b\n\u201cx\u201d,1\n"), ["\u201cx\u201d"]))
add("an apostrophe", Case(text("a,b\nO'Hara,1\nD'Arcy,2\n"), ["O'Hara", "D'Arcy"]))
add("quotes mean nothing", Case(text('a,b\n"x,1\n'), ['"x'], dialect={"quote": ""}))
add("spaces before a quote", Case(text('a, b\n1, "x, y"\n'), ["x, y"], column="b"))
add("one column", Case(text("a\n1\n2\n"), [1, 2]))
add("one column without a header", Case(text("1\n2\n"), [1, 2]))
add("trailing delimiters", Case(text("a,b,\n1,x,\n2,y,\n"), [1, 2]))
add(
    "a trailing delimiter with a cell behind it",
    Case(
        text("a,b,\n1,x,\n2,y,\n" + "3,z,\n" * 200 + "4,w,surplus\n"),
        [1, 2] + [3] * 200,
        1,
        dialect=REFUSE,
    ),
)
add("row names", Case(text("a,b\nr1,1,x\nr2,2,y\n"), error="expected 3 cells"))
add("rows of nothing", Case(text("a,b\n,\n1,x\n,\n"), [None, 1, None]))
add("lines of spaces", *bad("a,b\n1,x\n   \n2,y\n", "expected 2 cells", 3, [1, 2]))
add(
    "5,000 columns",
    Case(
        text(",".join(f"c{i}" for i in range(5000)) + "\n" + ",".join(["1"] * 5000)),
        [1],
    ),
)
add("a header alone", Case(text("a,b\n"), []))
add("a header without an end", Case(text("a,b"), []))
add("an empty file", Case(text(""), error="the file is empty"))
add("a file of spaces", Case(text(" \n\n"), error="the file is empty"))
add("a file of a mark", Case(text("\ufeff"), error="the file is empty"))
add("names that are there twice", Case(text("a,a\n1,2\n"), [2], column="a_2"))
add("an empty name", Case(text("a,\n1,2\n3,4\n"), [2, 4], column="column_2"))
add("a name that is kept", Case(text("lepton.row,b\n1,x\n"), error="begins with"))
add(
    "lines above the header",
    Case(text("made by a tool\na,b\n1,x\n2,y\n"), error="skip"),
)
add(
    "lines above the header that are skipped",
    Case(text("made by a tool\na,b\n1,x\n2,y\n"), [1, 2], dialect={"skip": 1}),
)
add(
    "more lines skipped than there are",
    Case(text("a\n1\n"), error="empty", dialect={"skip": 9}),
)
add(
    "a repeated header",
    Case(text("a,b\n1,x\na,b\n2,y\n" + "3,z\n" * 20), [1, None, 2] + [3] * 20, 1),
)

add("a header with an open quote", Case(text('a,"b\n1,x\n2,y\n'), error="not CSV"))

# ---- ends of lines ----

add("ends of Windows", Case(text("a,b\r\n1,x\r\n2,y\r\n"), ["x", "y"], column="b"))
add("ends of an old Mac", Case(text("a,b\r1,x\r2,y\r"), ["x", "y"], column="b"))
add(
    "ends of three kinds",
    Case(text("a,b\n1,x\r\n2,y\r3,z\n"), ["x", "y", "z"], column="b"),
)
add("a return in quotes", Case(text('a,b\r\n"x\ry",1\r\n'), ["x\ry"]))
add("empty lines", Case(text("\n\na,b\n\n1,x\n\r\n2,y\n\n\n"), [1, 2]))
add("two returns", Case(text("a,b\r\r\n1,x\r\r\n2,y\r\r\n"), ["x", "y"], column="b"))
add(
    "the end of a DOS file",
    Case(text("a,b\n1,x\n2,y\n\x1a"), [1, 2], 1, dialect=REFUSE),
)

# ---- characters ----

add("Latin-1", Case(text("a,b\ncaf\xe9,1\n".encode("latin-1")), ["caf\xe9"]))
add(
    "Windows' quotes",
    Case(text("a,b\n\u201cx\u201d,1\n".encode("cp1252")), ["\u201cx\u201d"]),
)
add(
    "two encodings",
    *bad(
        b"a,b\nna\xc3\xafve,1\ncaf\xe9,2\nx,3\n",
        "0xe9 is not UTF-8",
        3,
        ["na\xefve", "x"],
    ),
)
add("a zero byte", *bad(b"a,b\nx,1\ny\0,2\nz,3\n", "zero bytes", 3, ["x", "z"]))
add("a mark in the middle", Case(text("\ufeffa,b\n1,x\n\ufeff2,y\n"), [1, 2]))
add("UTF-16", Case(text("a,b\n\xe9,1\n".encode("utf-16")), ["\xe9"]))
add("UTF-16 without a mark", Case(text("a,b\nabc,1\n".encode("utf-16-le")), ["abc"]))
add("UTF-32", Case(text("a,b\n\xe9,1\n".encode("utf-32")), ["\xe9"]))
add(
    "UTF-16 that is cut",
    Case(text("a,b\nx,1\n".encode("utf-16")[:-1]), error="cut short"),
)
add(
    "a pair of surrogates",
    Case(text("a,b\n\U0001f600,1\n".encode("utf-16")), ["\U0001f600"]),
)
add(
    "an encoding that is none",
    Case(text("a\n1\n"), error="no encoding", dialect={"encoding": "utf-99"}),
)
add("random bytes", Case(text(bytes(range(256)) * 9, "table.bin"), error="no format"))
add(
    "random bytes as CSV",
    Case(text(b"\x01\x80\xff\0" * 99), error="", where="table.csv"),
)

# ---- cells ----

add("numbers beyond 64 bits", Case(text(f"a,b\n{10**30},1\n2,2\n"), [str(10**30), "2"]))
add("unsigned numbers", Case(text(f"a,b\n{2**64 - 1},1\n"), [2**64 - 1]))
add("numbers with zeros in front", Case(text("a,b\n007,1\n010,2\n"), ["007", "010"]))
add("infinity", Case(text("a,b\ninf,1\n-inf,2\n1.5,3\n"), [np.inf, -np.inf, 1.5]))
add(
    "words for nothing",
    Case(text("a,b\nNaN,1\nN/A,2\n#N/A,3\nNone,4\n1.5,5\n"), [None] * 4 + [1.5]),
)
add("all cells missing", Case(text("a,b\nNA,1\n,2\n"), [None, None]))
add("an exponent too large", Case(text("a,b\n1e999,1\n2.5,2\n"), [np.inf, 2.5]))
add(
    "a word among numbers",
    Case(text("a,b\n" + "1,x\n" * 20 + "oops,x\n"), [1] * 20 + [None], 1),
)
add(
    "many words among numbers",
    Case(
        text("a;b\n1;x\n2;x\n3;x\n4;x\nlow;x\nhigh;x\n"),
        error="is no number",
        where="line 7",
    ),
)
add(
    "thousands or decimals",
    Case(text("a;b\n1,234;x\n5,678;x\n"), error="may be", where="line 2"),
)
add(
    "days or months",
    Case(text("a,b\n1/2/2024,x\n3/4/2024,x\n"), error="may be", where="line 2"),
)
add(
    "a date that is none",
    Case(text("a,b\n" + "2024-01-31,x\n" * 20 + "2024-02-31,x\n"), None, 1),
)
add(
    "a type that does not fit",
    Case(text("a,b\n1,x\n300,y\n"), [1, None], 1, dialect={"types": {"a": "Int8"}}),
)
add(
    "a type of no column",
    Case(
        text("a,b\n1,x\n"),
        error="did you mean 'b'",
        dialect={"types": {"bb": "String"}},
    ),
)

# ---- long and many ----


def sparse(size, head=b"a,b\n", name="table.csv"):
    """A file with a hole of zero bytes: as long as the system likes, quick to write."""

    def make(folder):
        with open(folder / name, "wb") as file:
            file.write(head)
            file.truncate(size)
        return folder / name

    return make


def long_line(folder):
    path = folder / "long.csv.gz"
    block = gzip.compress(b"y" * 2**20)
    head = gzip.compress(b"a,b\n1,x\n2,")
    path.write_bytes(head + block * 1024 + gzip.compress(b"\n3,z\n"))
    return path


add(
    "a line of 1 GB, packed",
    Case(long_line, error="more than", where="line 3", dialect={"longest_row": 2**22}),
)
add(
    "a hole of 1 GB",
    Case(
        sparse(2**30), error="more than", where="line 2", dialect={"longest_row": 2**22}
    ),
)
add(
    "a quote open for 8 MB",
    Case(
        text('a,b\n1,"x\n' + "2,y\n" * 2**21),
        error="more than",
        where="line 2",
        dialect={"longest_row": 2**20},
    ),
)
add(
    "a quote open for 8 MB, refused",
    Case(
        text('a,b\n1,"x\n' + "2,y\n" * 2**17),
        [2] * 2**17,
        1,
        dialect={"longest_row": 2**16, "bad_rows": "refuse"},
    ),
)


# ---- files that are none ----


def fifo(folder):
    os.mkfifo(folder / "pipe.csv")
    return folder / "pipe.csv"


def loop(folder):
    (folder / "one.csv").symlink_to(folder / "two.csv")
    (folder / "two.csv").symlink_to(folder / "one.csv")
    return folder / "one.csv"


def dangling(folder):
    (folder / "one.csv").symlink_to(folder / "none.csv")
    return folder / "one.csv"


def folder_in_a_circle(folder):
    (folder / "inner").mkdir()
    (folder / "inner" / "table.csv").write_text("a,b\n1,x\n")
    (folder / "inner" / "outer").symlink_to(folder)
    return folder


def fifo_in_folder(folder):
    (folder / "table.csv").write_text("a,b\n1,x\n")
    os.mkfifo(folder / "pipe.csv")
    return folder


def closed(folder):
    path = text("a,b\n1,x\n")(folder)
    path.chmod(0)
    return path


def empty_folder(folder):
    (folder / "table.csv").mkdir()
    return folder / "table.csv"


add("no file", Case(lambda folder: folder / "none.csv", error="no such file"))
add("no match", Case(lambda folder: folder / "*.csv", error="no file matches"))
add("a FIFO", Case(fifo, error="a FIFO"))
add("a FIFO in a folder", Case(fifo_in_folder, [1]))
add("a device", Case(lambda folder: "/dev/zero", error="a device"))
add("links in a circle", Case(loop, error="run in a circle"))
add("a link to nothing", Case(dangling, error="no such file"))
add("a folder in a circle", Case(folder_in_a_circle, [1]))
add("an empty folder", Case(empty_folder, error="no files"))
add(
    "a path through a file",
    Case(lambda folder: text("a\n1\n")(folder) / "x", error="no such file"),
)
add("a name too long", Case(lambda folder: folder / ("x" * 300), error="too long"))
add(
    "a zero byte in the path",
    Case(lambda folder: str(folder) + "/\0.csv", error="zero byte"),
)
if os.geteuid():
    add("no right to read", Case(closed, error="may not read"))

# ---- packed ----


def zipped(entries, name="data.zip"):
    def make(folder):
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, content in entries:
                archive.writestr(entry, content)
        return folder / name

    return make


def tarred(entries, name="data.tar", link=None):
    def make(folder):
        mode = "w:gz" if name.endswith("gz") else "w"
        with tarfile.open(folder / name, mode) as archive:
            for entry, content in entries:
                info = tarfile.TarInfo(entry)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            if link:
                info = tarfile.TarInfo("link.csv")
                info.type = tarfile.SYMTYPE
                info.linkname = link
                archive.addfile(info)
        return folder / name

    return make


def cut(make, share):
    """The input of another case, cut short."""

    def shorter(folder):
        path = Path(make(folder))
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return shorter


ROWS = "a,b\n" + "".join(f"{i},word {i * i}\n" for i in range(5000))
GZIP = text(gzip.compress(ROWS.encode()), "table.csv.gz")
BOMB = zipped([("table.csv", b"a,b\n" + b"0" * (2**26 + 2**20))])
add("gzip", Case(GZIP, list(range(5000))))
add("gzip under another name", Case(text(gzip.compress(b"a,b\n1,x\n")), [1]))
add("gzip that is cut", Case(cut(GZIP, 0.7), error="packed data are damaged"))
add(
    "gzip with a wrong byte",
    Case(
        text(gzip.compress(ROWS.encode()).replace(b"\x08", b"\x09", 1), "t.csv.gz"),
        error="damaged",
    ),
)
add(
    "two gzip files in one",
    Case(
        text(gzip.compress(b"a,b\n1,x\n") + gzip.compress(b"2,y\n"), "t.csv.gz"), [1, 2]
    ),
)
add(
    "gzip with rubbish behind it",
    Case(text(gzip.compress(b"a,b\n1,x\n") + b"rubbish", "t.csv.gz"), error="damaged"),
)
add("ZIP", Case(zipped([("one.csv", "a,b\n1,x\n"), ("two.csv", "a,b\n2,y\n")]), [1, 2]))
add("ZIP that is cut", Case(cut(zipped([("one.csv", ROWS)]), 0.6), error="damaged"))
add("ZIP of nothing", Case(zipped([]), error="no files"))
add(
    "ZIP that reaches out",
    Case(zipped([("../../etc/x.csv", "a\n1\n")]), error="reaches outside"),
)
add(
    "ZIP from the root",
    Case(zipped([("/etc/x.csv", "a\n1\n")]), error="reaches outside"),
)
add("ZIP to a drive", Case(zipped([("C:\\x.csv", "a\n1\n")]), error="reaches outside"))
add("ZIP bomb", Case(BOMB, error="unpacks"))
add(
    "a workbook",
    Case(
        zipped([("[Content_Types].xml", "<x/>"), ("xl/a.xml", "<x/>")], "t.xlsx"),
        error="xlsx",
    ),
)
add(
    "tar",
    Case(tarred([("one.csv", b"a,b\n1,x\n"), ("two.csv", b"a,b\n2,y\n")]), [1, 2]),
)
add(
    "tar.gz",
    Case(
        tarred([("one.csv", b"a,b\n1,x\n"), ("two.csv", b"a,b\n2,y\n")], "t.tar.gz"),
        [1, 2],
    ),
)
add("tar that is cut", Case(cut(tarred([("one.csv", ROWS.encode())]), 0.5), error=""))
add(
    "tar that reaches out",
    Case(tarred([("../x.csv", b"a\n1\n")]), error="reaches outside"),
)
add(
    "tar with a link",
    Case(tarred([("one.csv", b"a,b\n1,x\n")], link="/etc/passwd"), error="a link"),
)
add(
    "files of two formats",
    Case(
        zipped([("one.csv", "a\n1\n"), ("two.jsonl", '{"a": 1}\n')]),
        error="several formats",
    ),
)

# ---- JSON lines ----

json_ = lambda content: text(content, "table.jsonl")  # noqa: E731
add("JSON lines", Case(json_('{"a": 1}\n{"a": 2}\n'), [1, 2]))
add(
    "JSON with a broken line",
    *bad('{"a": 1}\n{"a": \n{"a": 3}\n', "not JSON", 2, [1, 3], name="t.jsonl"),
)
add(
    "JSON that is cut",
    *bad('{"a": 1}\n{"a": 2}\n{"a"', "not JSON", 3, [1, 2], name="t.jsonl"),
)
add(
    "JSON with a list",
    *bad('{"a": 1}\n[1]\n{"a": 3}\n', "no JSON object", 2, [1, 3], name="t.jsonl"),
)
add(
    "JSON with a field twice",
    *bad('{"a": 1}\n{"a": 2, "a": 3}\n', "twice", 2, [1], name="t.jsonl"),
)
add(
    "JSON with two rows in a line",
    *bad('{"a": 1}\n{"a": 2} {"a": 3}\n', "not JSON", 2, [1], name="t.jsonl"),
)
add(
    "JSON of whole numbers and others",
    Case(json_('{"a": 1}\n{"a": 2.5}\n'), [1.0, 2.5]),
)
add(
    "JSON of numbers and words",
    Case(json_('{"a": 1}\n{"a": "x"}\n'), error="several kinds"),
)
add(
    "JSON with a rare word",
    Case(json_('{"a": 1}\n' * 20 + '{"a": "x"}\n'), [1] * 20 + [None], 1),
)
add(
    "JSON with a word for nothing",
    Case(json_('{"a": 1}\n' * 2 + '{"a": "N/A"}\n'), [1, 1, None]),
)
add(
    "JSON without some fields",
    Case(json_('{"a": 1}\n{"b": "x"}\n\n{"a": 3}\n'), [1, None, 3]),
)
add(
    "JSON with nested values",
    Case(
        json_('{"a": {"x": 1, "y": [1, 2]}}\n{"a": null}\n{"a": {"y": []}}\n'),
        [{"x": 1, "y": [1, 2]}, None, {"x": None, "y": []}],
    ),
)
add(
    "JSON of an array",
    Case(json_('[\n{"a": 1}\n]\n'), error="no line is a JSON object"),
)
add("JSON with NaN", Case(json_('{"a": NaN}\n{"a": 1.5}\n'), [None, 1.5]))
add(
    "JSON beyond 64 bits",
    Case(json_(f'{{"a": {10**30}}}\n{{"a": 1}}\n'), [str(10**30), "1"]),
)
add(
    "JSON nested 100,000 deep",
    *bad('{"a": 1}\n{"a": ' + "[" * 10**5 + "\n", "not JSON", 2, [1], name="t.jsonl"),
)
add("JSON that is empty", Case(json_(""), error="empty"))
add(
    "JSON with bytes that are no text",
    *bad(
        b'{"a": "\xc3\xa9"}\n{"a": "\xff"}\n', "not JSON", 2, ["\xe9"], name="t.jsonl"
    ),
)

# ---- files with types ----

FRAME = pl.DataFrame({"a": range(1000), "b": ["word"] * 1000})


def parquet(folder, frame=FRAME, name="table.parquet"):
    frame.write_parquet(folder / name, row_group_size=100)
    return folder / name


def arrow(folder):
    FRAME.write_ipc(folder / "table.arrow")
    return folder / "table.arrow"


def stream(folder):
    path = folder / "table.arrows"
    table = FRAME.to_arrow()
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        for batch in table.to_batches(100):
            out.write_batch(batch)
    return path


def npy(array, name="array.npy"):
    def make(folder):
        np.save(folder / name, array, allow_pickle=True)
        return folder / name

    return make


def idx(shape, content, name="x-idx1-ubyte"):
    head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return text(head + content, name)


def overwritten(make, place, data):
    def changed(folder):
        path = Path(make(folder))
        content = bytearray(path.read_bytes())
        content[place : place + len(data)] = data
        path.write_bytes(bytes(content))
        return path

    return changed


add("Parquet", Case(parquet, list(range(1000))))
add("Parquet that is cut", Case(cut(parquet, 0.6), error="Parquet file can't be read"))
add(
    "Parquet that is text",
    Case(text("a,b\n1,x\n", "t.parquet"), error="Parquet file can't be read"),
)
add(
    "Parquet with rubbish in a page",
    Case(overwritten(parquet, 20, b"\xff" * 99), error="Parquet file can't be read"),
)
add("Parquet without rows", Case(lambda folder: parquet(folder, FRAME.head(0)), []))
add(
    "Parquet named CSV",
    Case(lambda folder: parquet(folder, name="table.csv"), list(range(1000))),
)
add("Arrow", Case(arrow, list(range(1000))))
add("Arrow that is cut", Case(cut(arrow, 0.5), error="Arrow file can't be read"))
add("an Arrow stream", Case(stream, list(range(1000))))
add(
    "an Arrow stream that is cut",
    Case(cut(stream, 0.5), error="Arrow file can't be read"),
)
add("an array", Case(npy(np.arange(5)), [0, 1, 2, 3, 4]))
add("an array that is cut", Case(cut(npy(np.arange(500)), 0.5), error="cut short"))
add("an array of objects", Case(npy(np.array([{}, 1], object)), error="Python objects"))
add("an array of no dims", Case(npy(np.array(3)), error="no rows"))
add(
    "an array whose header is rubbish",
    Case(overwritten(npy(np.arange(5)), 12, b"\xff" * 40), error="header"),
)
add("idx", Case(idx([3], b"\1\2\3"), [1, 2, 3]))
add("idx that is cut", Case(idx([3], b"\1\2"), error="cut short"))
add(
    "idx that is too long", Case(idx([3], b"\1\2\3\4"), error="followed by other bytes")
)
add("idx with a header of nonsense", Case(idx([2**32 - 1] * 4, b""), error="header"))
add(
    "idx of a type that is none",
    Case(text(b"\0\0\1\1\0\0\0\1\1", "x-idx1-ubyte"), error="idx header"),
)
add("a pickle", Case(text(b"\x80\x04K\1.", "table.pkl"), error="runs code"))
add(
    "a file packed by zstd",
    Case(text(b"\x28\xb5\x2f\xfd\0\0", "table.csv"), error="zstd"),
)

# ---- several files ----


def files(*contents):
    def make(folder):
        for number, content in enumerate(contents):
            (folder / f"part{number}.csv").write_text(content)
        return folder

    return make


DRIFT = files("a,b\n1,x\n", "a,c\n2,y\n")
add("files that go together", Case(files("a,b\n1,x\n", "a,b\n2,y\n"), [1, 2]))
add("a column that a file lacks", Case(DRIFT, error="no column 'b'", where="part1.csv"))
add(
    "a column that a file lacks, united",
    Case(DRIFT, ["x", None], column="b", dialect={"drift": "union"}),
)
add(
    "types that are wider in a file",
    Case(files("a,b\n1,x\n", "a,b\n2.5,y\n"), [1.0, 2.5]),
)
add(
    "one file is empty", Case(files("a,b\n1,x\n", ""), error="empty", where="part1.csv")
)
add("one file has no rows", Case(files("a,b\n1,x\n", "a,b\n"), [1]))
add("one file has another delimiter", Case(files("a,b\n1,x\n", "a;b\n2;y\n"), [1, 2]))


def typed_drift(folder):
    parquet(folder, pl.DataFrame({"a": [1]}), "one.parquet")
    parquet(folder, pl.DataFrame({"a": ["x"]}), "two.parquet")
    return folder


add(
    "types that differ",
    Case(typed_drift, error="column 'a' is String", where="two.parquet"),
)
add(
    "types that differ, united",
    Case(typed_drift, ["1", "x"], dialect={"drift": "union"}),
)

# ---- text and labels ----

add("lines of text", Case(text("one\n\nthree", "book.txt"), ["one", "", "three"]))
add(
    "text with a wrong byte",
    *bad(
        b"na\xc3\xafve\ncaf\xe9\nx\n",
        "not UTF-8",
        2,
        ["na\xefve", "x"],
        name="book.txt",
    ),
)
add(
    "a folder of texts",
    Case(
        zipped([("pos/1.txt", "good"), ("neg/1.txt", "bad")]),
        ["bad", "good"],
        column="text",
    ),
)


def labels(table):
    def make(folder):
        (folder / "one.png").write_bytes(b"\x89PNG1")
        (folder / "two.png").write_bytes(b"\x89PNG2")
        (folder.parent / f"{folder.name}.csv").write_text(table)
        return folder

    return make


def labelled(make):
    """A folder of images with its table of labels, which lies next to it."""

    def given(folder):
        return Given(make(folder), {"labels": folder.parent / f"{folder.name}.csv"})

    return given


@dataclass(frozen=True)
class Given:
    """An input with arguments that depend on its folder."""

    anything: Any
    dialect: dict[str, Any]


add(
    "images and labels",
    Case(labelled(labels("file,y\ntwo.png,1\none.png,0\n")), ["two.png", "one.png"]),
)
add(
    "a label without its image",
    Case(
        labelled(labels("file,y\ntwo.png,1\nten.png,0\n")),
        error="no file 'ten.png'",
        where="row 1",
    ),
)
add(
    "labels without a column of files",
    Case(labelled(labels("which,y\ntwo.png,1\n")), error="no column 'file_name'"),
)


def table_within(folder):
    labels("")(folder)
    table = folder / "labels.csv"
    table.write_text("file,y\ntwo.png,1\none.png,0\n")
    return Given(folder, {"format": "images", "labels": table})


add("images with their table in the folder", Case(table_within, ["two.png", "one.png"]))
add(
    "images and a table",
    Case(lambda folder: table_within(folder).anything, error="several"),
)

# ---- memory ----

add(
    "Python objects",
    Case(lambda folder: pl.DataFrame({"a": [object()]}), error="Python objects"),
)

add(
    "a dict of different lengths",
    Case(lambda folder: {"a": [1], "b": [1, 2]}, error="different numbers of rows"),
)
add("a number", Case(lambda folder: 3, error="can't read rows from int"))
add("no rows", Case(lambda folder: [], error="no rows"))
add("mixed values", Case(lambda folder: {"a": [1, "x"]}, error="is no table"))
add("complex numbers", Case(lambda folder: np.zeros(3, complex), error="is no column"))


# ---- the tests ----


def outcome(anything, dialect, size=SIZE):
    """The rows of a source, and the count of what was refused or changed."""
    reader = reader_of(anything, **dialect)
    columns = reader.columns()
    read = [reader.read(piece) for piece in reader.pieces(size)]
    empty = pl.DataFrame(schema={column.name: column.type for column in columns})
    table = pl.concat([empty, *(each.table.drop(ROW) for each in read)])
    return table, sum(each.refused.height for each in read)


@pytest.mark.parametrize("name", CASES)
def test_each_input_gives_right_data_an_error_or_counted_rows(name, tmp_path):
    case = CASES[name]
    folder = tmp_path / "input"
    folder.mkdir()
    given = case.make(folder)
    dialect = case.dialect
    if isinstance(given, Given):
        dialect = {**dialect, **given.dialect}
        given = given.anything
    start = time.monotonic()
    if case.rows is None and not case.refused:
        with pytest.raises(DataError) as caught:
            outcome(given, dialect)
        assert case.error in str(caught.value)
        assert caught.value.remedy
        assert caught.value.where
        assert case.where in caught.value.where
    else:
        table, refused = outcome(given, dialect)
        assert refused == case.refused
        if case.rows is not None:
            column = case.column or table.columns[0]
            assert table[column].to_list() == case.rows
    assert time.monotonic() - start < LONGEST_S


def test_the_cases_are_many():
    assert len(CASES) >= 120


# ---- files that change ----


def changing(tmp_path, rows=50_000):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n" + "".join(f"{i},x\n" for i in range(rows)))
    return path


def test_a_file_that_grows_after_it_was_divided_is_read_as_it_was(tmp_path):
    path = changing(tmp_path)
    reader = reader_of(path)
    pieces = reader.pieces(2**16)
    with open(path, "a") as file:
        file.write("1,y\n" * 1000)
    rows = [reader.read(piece).table for piece in pieces]
    assert pl.concat(rows)["a"].to_list() == list(range(50_000))


def test_a_file_that_shrinks_or_changes_after_it_was_divided_is_an_error(tmp_path):
    path = changing(tmp_path)
    reader = reader_of(path)
    pieces = reader.pieces(2**16)
    content = path.read_bytes()
    for changed in (content[:1000], content.replace(b"49999", b"59999")):
        path.write_bytes(changed)
        with pytest.raises(DataError, match="changed") as caught:
            reader.read(pieces[-1])
        assert caught.value.remedy


def test_a_file_that_grows_while_it_is_divided_is_an_error(tmp_path, monkeypatch):
    path = changing(tmp_path)
    reader = reader_of(path)
    reader.columns()
    read = type(reader.stored).read

    def growing(stored, start, length):
        with open(path, "a") as file:
            file.write("1,y\n")
        return read(stored, start, length)

    monkeypatch.setattr(type(reader.stored), "read", growing)
    with pytest.raises(DataError, match="changed while it was read"):
        reader.pieces(2**16)


def test_json_values_survive_whatever_they_are(tmp_path):
    rows = [
        {"a": [1, 2.5], "b": {"x": "y"}, "c": True},
        {"a": [], "b": None, "c": None},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table, refused = outcome(path, {})
    assert refused == 0
    assert table.to_dicts() == rows
