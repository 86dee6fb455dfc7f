"""CSV files and their kin: text with one row a record, in the dialects people have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import polars as pl

from lepton_jax.data.readers import records
from lepton_jax.data.readers.counted import CountedReader, check_names, numbered
from lepton_jax.data.readers.dialect import CsvSettings, Dialect, dialect_of
from lepton_jax.data.readers.encoding import Encoding, encoding_of
from lepton_jax.data.readers.files import Stamp, Stored, digest
from lepton_jax.data.readers.inference import Plan, infer
from lepton_jax.data.readers.notes import changed_cells, refused_rows
from lepton_jax.data.readers.reader import ROW, Column, Piece, Rows
from lepton_jax.errors import DataError

# Bytes of a file by which types are inferred: all of a smaller file. Assumption: half a
# second's work, and half a million rows of usual width.
SAMPLE = 2**25
SAMPLE_PARTS = 8  # of a larger file, spread evenly
Types = dict[str, pl.DataType]

HEAD = 2**20  # bytes by which the dialect is found; assumption


@dataclass(frozen=True)
class Head:
    """How a file is read.

    Attributes:
      encoding: of its text.
      dialect: of its rows.
      start: byte of its first row of data.
      stamp: the file's state when this was found out.
    """

    encoding: Encoding
    dialect: Dialect
    start: int
    stamp: Stamp


class Part(NamedTuple):
    """A piece whose hash is still taken; its attributes are those of `Piece`."""

    start: int
    stop: int
    first_row: int
    digest: Future[str]


class Cells(NamedTuple):
    """Some rows as text.

    Attributes:
      table: a column of strings for each name, null where there is nothing.
      numbers: of the rows among the records of their bytes, int64.
      refused: the records that could not be read.
    """

    table: pl.DataFrame
    numbers: np.ndarray
    refused: list[records.Refused]


class CsvReader(CountedReader):
    """A file of delimited text.

    Args:
      stored: the file, or the entry of an archive.
      settings: what overrides that which is found out.
    """

    def __init__(
        self,
        stored: Stored,
        settings: CsvSettings | None = None,
    ):
        self.name = stored.name
        self.stored = stored
        self.settings = settings or CsvSettings()
        self._head: Head | None = None
        self._plans: list[Plan] | None = None
        self._pieces: dict[int, list[Piece]] = {}
        self._count: int | None = None
        # Where pieces begin and end whose quotes were found to be regular.
        self._plain: set[tuple[int, int]] = set()

    def columns(self) -> list[Column]:
        """Return what was inferred of the columns, from at most 32 MiB of the file."""
        return [plan.column for plan in self.plans()]

    def counted_columns(self) -> list[Column]:
        """Return the columns with counts over the whole file, which is read for it."""
        against = dict.fromkeys(self.names(), 0)
        missing = dict.fromkeys(self.names(), 0)
        for piece in self.pieces(SAMPLE):
            rows = self.read(piece)
            cells = rows.refused.filter(pl.col("column").is_not_null())
            counts = cells["column"].value_counts()
            for name, count in counts.iter_rows():
                against[name] += count
            for name in missing:
                missing[name] += rows.table[name].null_count()
        return [
            replace(
                column,
                against=against[column.name],
                missing=missing[column.name] - against[column.name],
            )
            for column in self.columns()
        ]

    def pieces(
        self,
        size: int,
    ) -> list[Piece]:
        if size not in self._pieces:
            # The hash of a part is taken while the next one is read and cut.
            with ThreadPoolExecutor(1) as hashing:
                parts = list(self._scan(size, hashing))
            path = str(self.stored)
            pieces = [
                Piece(path, part.start, part.stop, part.first_row, part.digest.result())
                for part in parts
            ]
            self._pieces = {size: pieces}
        return self._pieces[size]

    def count(self) -> int:
        if self._count is None:
            self.pieces(SAMPLE)
        assert self._count is not None
        return self._count

    def read(self, piece: Piece) -> Rows:
        head = self.head()
        data = self._content(piece)
        utf8 = self._decoded(data, piece.start)
        plans = self.plans()

        is_plain = (piece.start, piece.stop) in self._plain
        table = self._directly(
            utf8,
            head.dialect,
            plans,
            is_plain,
        )
        if table is not None:
            return numbered(table, piece.first_row)
        return self._slowly(utf8, piece, plans)

    def names(self) -> tuple[str, ...]:
        """Return the columns' names."""
        return self.head().dialect.names

    def described(self) -> str:
        """Describe the dialect in words."""
        head = self.head()
        encoding = f"{head.encoding.name}: {head.encoding.reason}"
        return "; ".join([encoding, *head.dialect.reasons])

    def head(self) -> Head:
        """Return how the file is read."""
        if self._head is None:
            self._head = self._found_head()
        return self._head

    def plans(self) -> list[Plan]:
        """Return how each column is read."""
        if self._plans is None:
            self._plans = self._inferred()
        return self._plans

    def with_plans(
        self,
        plans: Sequence[Plan],
    ) -> None:
        """Read the columns as somebody else has planned, for files that go together."""
        self._plans = list(plans)

    # ---- finding out ----

    def _found_head(self) -> Head:
        stamp = self.stored.stamp()
        first = self.stored.read(0, SAMPLE)
        encoding = encoding_of(
            first,
            self.settings.encoding,
            self.stored,
        )
        beginning = first[encoding.mark : encoding.mark + HEAD]
        text = self._decoded(
            beginning,
            encoding.mark,
            encoding,
            is_whole=False,
        )
        if text.startswith(b"PAR1"):
            raise self._other_format("a Parquet file")
        dialect = dialect_of(text, self.settings, self.stored)
        check_names(dialect.names, self.stored)
        start = encoding.mark + encoding.length(
            text,
            dialect.start,
        )
        return Head(encoding, dialect, start, stamp)

    def _other_format(self, kind: str) -> DataError:
        return DataError(
            f"the file is {kind}, not text",
            where=self.stored,
            remedy="give its name the ending of its format",
        )

    def _inferred(self) -> list[Plan]:
        """Return how each column is read, inferred from a sample of rows."""
        return self.plans_of_all([], SAMPLE)

    def plans_of_all(
        self,
        others: Sequence[CsvReader],
        size: int,
    ) -> list[Plan]:
        """Infer how each column is read, in this file and in others with its columns.

        Args:
          others: the other files.
          size: bytes of each file to look at.
        """
        dialect = self.head().dialect
        samples = [
            sample for reader in (self, *others) for sample in reader.samples(size)
        ]
        table = pl.concat([sample.cells.table for sample in samples])

        def locate(row: int) -> str:
            for sample in samples:
                if row < sample.cells.table.height:
                    return sample.place(row)
                row -= sample.cells.table.height
            return str(self.stored)

        plans = infer(
            table,
            self.settings,
            locate,
            dialect.strip,
        )
        seen = next((sample.seen for sample in samples if sample.seen), "")
        return [
            _with_reason(
                plan,
                dialect,
                seen,
            )
            for plan in plans
        ]

    def samples(
        self,
        size: int,
    ) -> list[Sample]:
        """Return rows by which types are inferred."""
        texts, seen = self.sample(size)
        return [
            Sample(
                self,
                start,
                text,
                self.cells(text),
                seen,
            )
            for start, text in texts
        ]

    def sample(
        self,
        size: int,
    ) -> tuple[list[tuple[int, bytes]], str]:
        """Return rows in UTF-8 by which types are inferred, and what part they are.

        Each has the byte of the file where it begins.
        """
        head = self.head()
        data = self.stored.read(
            head.start,
            size + 1,
        )
        if len(data) <= size:
            text = self._decoded(data, head.start)
            return [(head.start, text)], ""
        if head.encoding.name != "utf-8" or self.is_packed():
            text = self._decoded(
                data[:size],
                head.start,
                is_whole=False,
            )
            text = _whole_rows(text, head)
            return [(head.start, text)], f"seen in the first {_mebibytes(size)}"

        whole = head.stamp.size - head.start
        samples = self._spread_samples(size, whole)
        return samples, f"seen in {_mebibytes(size)} of {_mebibytes(whole)}"

    def _spread_samples(
        self,
        size: int,
        whole: int,
    ) -> list[tuple[int, bytes]]:
        """Return rows of SAMPLE_PARTS places, and the byte where each part begins.

        Args:
          size: bytes of all parts together.
          whole: bytes of the rows of the file.
        """
        head = self.head()
        part = size // SAMPLE_PARTS
        step = (whole - part) // (SAMPLE_PARTS - 1)
        samples = []
        for i in range(SAMPLE_PARTS):
            start = head.start + i * step
            text = self.stored.read(start, part)
            skipped = text.find(b"\n") + 1 if i else 0
            text = _whole_rows(text[skipped:], head)
            samples.append((start + skipped, text))
        return samples

    def is_packed(self) -> bool:
        """Whether the bytes are unpacked as they are read."""
        if self.stored.entry:
            return True
        with open(self.stored.path, "rb") as file:
            first = file.read(1 << 10)
        return first != self.stored.read(
            0,
            len(first),
        )

    # ---- dividing ----

    def _scan(
        self,
        size: int,
        hashing: Executor,
    ) -> Iterator[Part]:
        head = self.head()
        before = self.stored.stamp()
        position = head.start
        row = 0
        data = b""
        hashed: Future[str] | None = None
        want = size
        is_packed = self.is_packed()
        while True:
            more = self.stored.read(
                position + len(data),
                want - len(data),
            )
            data = data + more if data else more
            is_end = len(data) < want
            utf8 = self._decoded(data, position, is_whole=is_end)
            whole = self._cut(utf8, want, is_end, position)
            if whole is None:
                want *= 2
                continue
            length = head.encoding.length(utf8, whole.stop)
            if whole.plain:
                self._plain.add((position, position + length))
            if whole.records:
                if hashed is not None:
                    hashed.result()  # so that at most two parts are in memory
                hashed = hashing.submit(digest, memoryview(data)[:length])
                yield Part(position, position + length, row, hashed)
            position += length
            row += whole.records
            if is_end:
                self._count = row
                break
            # Packed bytes are not unpacked twice; others are sooner read than moved.
            data = data[length:] if is_packed else b""
            want = max(size, len(data) + 1)
        if self.stored.stamp()[:3] != before[:3]:
            raise self._changed()

    def _cut(
        self,
        utf8: bytes,
        size: int,
        is_end: bool,
        position: int,
    ) -> records.Cut | None:
        """Find the whole records of some bytes; None: more bytes are needed."""
        grammar = self.head().dialect.grammar
        whole = records.cut(utf8, grammar, is_end)
        if whole.stop or is_end:
            return whole
        longest = self.settings.longest_row
        if size <= longest:
            return None
        if self.settings.bad_rows == "refuse":
            whole = records.cut(
                utf8,
                grammar,
                is_end,
                is_long=True,
            )
        if whole.stop:
            return whole
        raise DataError(
            f"a row has more than {longest:,} bytes: perhaps a quote is not closed",
            where=self.place(position, b"", 0),
            remedy=(
                "close the quote, set `quote` to '' if quotes mean nothing, or raise"
                " `longest_row`"
            ),
        )

    # ---- reading ----

    def _content(self, piece: Piece) -> bytes:
        """Return a piece's bytes, after the check that they are its own."""
        length = piece.stop - piece.start
        data = self.stored.read(piece.start, length)
        now = self.stored.stamp()
        is_sure = self.head().stamp.is_sure(now) and len(data) == length
        if not is_sure and digest(data) != piece.digest:
            raise self._changed()
        return data

    def _changed(self) -> DataError:
        return DataError(
            "the file changed while it was read",
            where=self.stored,
            remedy="read a copy that nobody writes to, or start again",
        )

    def _decoded(
        self,
        data: bytes,
        position: int,
        encoding: Encoding | None = None,
        is_whole: bool = True,
    ) -> bytes:
        """Return bytes of the file in UTF-8.

        Args:
          data: the bytes.
          position: of the first one in the file.
          encoding: of the file; None: as found out.
          is_whole: whether the last character may not be cut.
        """
        encoding = encoding or self.head().encoding
        fault = "the last character is cut short"
        try:
            utf8, used = encoding.to_utf8(data)
        except UnicodeDecodeError as error:
            fault = f"bytes that are not {encoding.name}: {error.reason}"
            used = error.start
        else:
            if used == len(data) or not is_whole:
                return utf8
        raise DataError(
            fault,
            where=f"{self.stored}, byte {position + used:,}",
            remedy="set `encoding`, or get the file again if it is damaged",
        )

    def _directly(
        self,
        utf8: bytes,
        dialect: Dialect,
        plans: list[Plan],
        is_plain: bool,
    ) -> pl.DataFrame | None:
        """Return the values of rows by Polars' own parser; None if it may err."""
        types = {
            plan.column.name: plan.column.type if plan.is_direct else pl.String()
            for plan in plans
        }
        table = self._parsed(
            utf8,
            dialect,
            types,
            is_plain=is_plain,
        )
        if table is None:
            return None
        columns = []
        for plan in plans:
            values = self._checked(
                table[plan.column.name],
                plan,
            )
            if values is None:
                return None
            columns.append(values)
        return pl.DataFrame(columns)

    def _checked(
        self,
        cells: pl.Series,
        plan: Plan,
    ) -> pl.Series | None:
        """Return the values of a column as Polars read it.

        None: some cells argue against its type.
        """
        type_ = plan.column.type
        if not plan.is_direct:
            values, wrong = plan.values(
                cells,
                self.settings.missing,
            )
            return None if wrong.any() else values.alias(plan.column.name)
        if type_ == pl.String():
            is_empty = cells.str.len_bytes() == 0
            return (
                cells.set(
                    is_empty,
                    None,
                )
                if is_empty.any()
                else cells
            )
        is_word = type_.is_float() and bool(cells.is_nan().any())
        return None if is_word else cells

    def _parsed(
        self,
        utf8: bytes,
        dialect: Dialect,
        types: Types,
        missing: Sequence[str] | None = None,
        is_plain: bool = False,
    ) -> pl.DataFrame | None:
        """Return rows as Polars parses them; None if it can't, or may err.

        Args:
          utf8: the rows.
          dialect: of the file.
          types: of the columns.
          missing: words for a missing value; None: those of the settings.
          is_plain: whether all quotes are known to be regular.
        """
        if not _is_ready(utf8, dialect, is_plain):
            return None
        if missing is None:
            missing = self.settings.missing
        table = parse(utf8, dialect, types, missing)
        # An empty line is a row of missing values to Polars.
        if table is None or table.to_series(-1).null_count():
            clean = records.without_blank_lines(utf8, dialect.grammar)
            if len(clean) < len(utf8):
                utf8 = clean
                table = parse(utf8, dialect, types, missing)
        if table is None or not _has_width(
            utf8,
            dialect,
            table,
        ):
            return None
        return table.select(dialect.names)

    def cells(self, utf8: bytes) -> Cells:
        """Return rows as text."""
        dialect = self.head().dialect
        types: Types = dict.fromkeys(
            dialect.names,
            pl.String(),
        )
        table = self._parsed(
            utf8,
            dialect,
            types,
            missing=(),
        )
        if table is not None:
            return Cells(
                table,
                np.arange(table.height),
                [],
            )

        repaired = records.repaired(
            utf8,
            dialect.grammar,
            dialect.width,
            spare=dialect.width > len(dialect.names),
        )
        clean = parse(
            repaired.data,
            dialect,
            types,
            (),
        )
        assert clean is not None, "repaired rows can be parsed"
        return Cells(
            clean.select(dialect.names),
            repaired.numbers,
            repaired.refused,
        )

    def _slowly(
        self,
        utf8: bytes,
        piece: Piece,
        plans: list[Plan],
    ) -> Rows:
        """Return the values of rows, whatever is wrong with some of them."""
        cells = self.cells(utf8)
        if cells.refused and self.settings.bad_rows == "error":
            raise self._bad_row(
                cells.refused[0],
                utf8,
                piece,
            )
        numbers = pl.Series(
            ROW,
            cells.numbers + piece.first_row,
            dtype=pl.UInt64,
        )
        columns = []
        notes = [refused_rows(cells.refused, piece.first_row)]
        for plan in plans:
            before = cells.table[plan.column.name]
            values, wrong = plan.values(
                before,
                self.settings.missing,
            )
            columns.append(values.alias(plan.column.name))
            if wrong.any():
                self._check_sampled(plan, before, wrong, numbers)
                notes.append(
                    changed_cells(
                        plan.column,
                        before,
                        wrong,
                        numbers,
                    )
                )
        table = pl.DataFrame([*columns, numbers])
        return Rows(table, pl.concat(notes))

    def _check_sampled(
        self,
        plan: Plan,
        cells: pl.Series,
        wrong: pl.Series,
        numbers: pl.Series,
    ) -> None:
        """Check that a type inferred from a sample is not too narrow for other rows."""
        if "seen in" not in plan.column.reason or plan.column.type != pl.Int64():
            return
        wider = (
            cells.filter(wrong)
            .str.strip_chars()
            .cast(
                pl.Float64,
                strict=False,
            )
        )
        if wider.is_not_null().any():
            i = int(wider.is_not_null().arg_max() or 0)
            cell = cells.filter(wrong)[i]
            raise DataError(
                f"{cell!r} is a number, but no whole one as those of the sample",
                where=(
                    f"{self.stored}, row {numbers.filter(wrong)[i]}, column"
                    f" {plan.column.name!r}"
                ),
                remedy=f"set types={{{plan.column.name!r}: 'Float64'}}",
            )

    def _bad_row(
        self,
        refused: records.Refused,
        utf8: bytes,
        piece: Piece,
    ) -> DataError:
        grammar = self.head().dialect.grammar
        shown = refused.text[:80].decode(
            "utf-8",
            "replace",
        )
        return DataError(
            f"{refused.fault}: {shown!r}",
            where=self.place(
                piece.start,
                utf8,
                refused.number,
            ),
            remedy=(
                "correct the row (quote cells that contain"
                f" {grammar.delimiter.decode()!r}), set `skip` if it is no row but"
                " stands above them, or bad_rows='refuse' to leave such rows out and"
                " count them"
            ),
        )

    def place(
        self,
        start: int,
        utf8: bytes,
        number: int,
    ) -> str:
        """Return the file and the line of a record.

        Args:
          start: byte of the file where some records begin.
          utf8: these records.
          number: of the record among them.
        """
        grammar = self.head().dialect.grammar
        ordered = records.records_of(utf8, grammar)
        record = next(
            itertools.islice(ordered, number, None),
            None,
        )
        inside = utf8[: record.start] if record is not None else b""
        lines = 1 + _line_ends(inside)
        done = 0
        encoding = self.head().encoding
        while done < start:
            block = self.stored.read(
                done,
                min(2**22, start - done),
            )
            if not block:
                break
            text, used = encoding.to_utf8(block)
            lines += _line_ends(text)
            done += used or len(block)
        return f"{self.stored}, line {lines}"


class Sample(NamedTuple):
    """Rows of a file by which types are inferred.

    Attributes:
      reader: of the file.
      start: byte of the file where they begin.
      text: the rows in UTF-8.
      cells: the rows.
      seen: what part of the file they are, in words; "" for all.
    """

    reader: CsvReader
    start: int
    text: bytes
    cells: Cells
    seen: str

    def place(self, row: int) -> str:
        """Return the file and the line of a row."""
        number = int(self.cells.numbers[row])
        return self.reader.place(
            self.start,
            self.text,
            number,
        )


def parse(
    utf8: bytes,
    dialect: Dialect,
    types: Types,
    missing: Sequence[str],
) -> pl.DataFrame | None:
    """Return rows as Polars parses them; None if it can't."""
    if dialect.width > len(dialect.names):
        types = {**types, "lepton.trailing": pl.String()}
    if not utf8:
        return pl.DataFrame(schema=types)
    quote = dialect.grammar.quote.decode() or None
    try:
        return pl.read_csv(
            utf8,
            has_header=False,
            schema=types,
            separator=dialect.grammar.delimiter.decode(),
            quote_char=quote,
            null_values=[word for word in missing if word] or None,
        )
    except pl.exceptions.PolarsError:
        return None


# ---- internals ----


def _with_reason(
    plan: Plan,
    dialect: Dialect,
    seen: str,
) -> Plan:
    """Return a plan that says all of why a column is what it is."""
    renamed = dialect.renamed.get(
        plan.column.name,
        "",
    )
    reasons = [plan.column.reason, renamed, seen]
    reason = "; ".join(filter(None, reasons))
    return replace(
        plan,
        column=replace(plan.column, reason=reason),
    )


def _whole_rows(text: bytes, head: Head) -> bytes:
    """Return a text without the row that it breaks off in."""
    whole = records.cut(
        text,
        head.dialect.grammar,
        is_end=False,
    )
    return text[: whole.stop]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _line_ends(text: bytes) -> int:
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")


def _is_ready(
    utf8: bytes,
    dialect: Dialect,
    is_plain: bool,
) -> bool:
    """Whether Polars parses these bytes as they are meant."""
    if b"\0" in utf8 or (not utf8.isascii() and records.MARK in utf8):
        return False
    return is_plain or records.is_regular(utf8, dialect.grammar)


def _has_width(
    utf8: bytes,
    dialect: Dialect,
    table: pl.DataFrame,
) -> bool:
    """Whether each row has as many cells as there are columns.

    Polars refuses rows with more cells; in one with fewer, the last cell is missing.
    """
    last = table.to_series(-1)
    if dialect.width > len(dialect.names) and last.is_not_null().any():
        return False
    if dialect.width == 1 or not last.null_count():
        return True
    found = records.delimiters_outside_quotes(utf8, dialect.grammar)
    return found == (dialect.width - 1) * table.height
