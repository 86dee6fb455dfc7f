"""JSON lines: one object a line.

The types are those of the values that a sample has. What does not fit a column's type
is missing and noted, if it is a small part of the cells, and a question otherwise.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from lepton_jax.data.extras import needs
from lepton_jax.data.notation import NUMERIC_SHARE
from lepton_jax.data.readers.counted import check_names, numbered
from lepton_jax.data.readers.delimited import SAMPLE
from lepton_jax.data.readers.dialect import LONGEST_ROW
from lepton_jax.data.readers.files import Stored
from lepton_jax.data.readers.inference import EXAMPLES, MISSING, TypeSettings
from lepton_jax.data.readers.json_types import (
    Unfit,
    conformed,
    kind_of,
    merged,
    type_of,
)
from lepton_jax.data.readers.lines import LinesReader
from lepton_jax.data.readers.notes import changed_cells, refused_rows
from lepton_jax.data.readers.reader import ROW, Column, Piece, Rows
from lepton_jax.data.readers.records import Refused
from lepton_jax.errors import DataError


class Line(NamedTuple):
    """A line that holds a row.

    Attributes:
      number: among the lines that are not empty.
      text: the line.
      row: its object; None: it is none.
      fault: why not.
    """

    number: int
    text: bytes
    row: dict[str, Any] | None
    fault: str = ""


class JsonLinesReader(LinesReader):
    """A file of JSON lines.

    Args:
      stored: the file, or the entry of an archive.
      types: of columns, as in `TypeSettings`.
      missing: words for a missing value in columns that are not text.
      bad_rows: "error" or "refuse", as for CSV.
      encoding: Python's name of the codec; None: found out.
      longest_row: bytes that a line may have.
    """

    def __init__(
        self,
        stored: Stored,
        types: Mapping[str, Any] | None = None,
        missing: tuple[str, ...] = MISSING,
        bad_rows: str = "error",
        encoding: str | None = None,
        longest_row: int = LONGEST_ROW,
    ):
        super().__init__(stored, encoding, longest_row)
        self.settings = TypeSettings(types or {}, missing)
        if bad_rows not in ("error", "refuse"):
            raise DataError(
                f"bad_rows is {bad_rows!r}",
                where="bad_rows",
                remedy="use 'error' or 'refuse'",
            )
        self.bad_rows = bad_rows
        self._columns: list[Column] | None = None

    def columns(self) -> list[Column]:
        if self._columns is None:
            self._columns = self._inferred()
            check_names(
                [column.name for column in self._columns],
                self.stored,
            )
        return self._columns

    def rows_in(self, utf8: bytes) -> int:
        return sum(1 for line in utf8.split(b"\n") if line.strip())

    def read(self, piece: Piece) -> Rows:
        columns = self.columns()
        utf8 = self.content(piece)
        table = self._directly(utf8, columns)
        if table is not None:
            return numbered(table, piece.first_row)
        return self._slowly(utf8, piece, columns)

    # ---- internals ----

    def _directly(
        self,
        utf8: bytes,
        columns: list[Column],
    ) -> pl.DataFrame | None:
        """Return rows as Arrow's strict parser reads them; None if it refuses."""
        if not _is_utf8(utf8):
            return None
        arrow = needs("pyarrow", extra="data", purpose="reading JSON lines")
        parser = needs("pyarrow.json", extra="data", purpose="reading JSON lines")
        schema = {column.name: column.type for column in columns}
        empty = pl.DataFrame(schema=schema).to_arrow(
            compat_level=pl.CompatLevel.oldest()
        )
        try:
            found = parser.read_json(
                io.BytesIO(utf8),
                read_options=parser.ReadOptions(block_size=len(utf8) + 1),
                parse_options=parser.ParseOptions(
                    explicit_schema=empty.schema,
                    unexpected_field_behavior="error",
                ),
            )
            table = pl.from_arrow(found)
        except (arrow.ArrowException, UnicodeDecodeError, pl.exceptions.PolarsError):
            return None
        assert isinstance(table, pl.DataFrame)
        if table.height != self.rows_in(utf8):
            return None
        typed = [pl.col(name).cast(type_) for name, type_ in schema.items()]
        table = table.select(typed)
        return table.with_columns(pl.selectors.float().fill_nan(None))

    def _slowly(
        self,
        utf8: bytes,
        piece: Piece,
        columns: list[Column],
    ) -> Rows:
        """Return rows that are read one by one, whatever is wrong with some."""
        known = {column.name for column in columns}
        refused = []
        rows = []
        numbers = []
        for line in _lines(utf8):
            fault = line.fault
            unknown = sorted(set(line.row or ()) - known)
            if unknown:
                fault = f"the field {unknown[0]!r} is in no row of the sample"
            if fault:
                bad = Refused(
                    line.number,
                    0,
                    line.text,
                    fault,
                )
                if self.bad_rows == "error":
                    raise self._bad_row(bad, utf8, piece)
                refused.append(bad)
                continue
            rows.append(line.row or {})
            numbers.append(piece.first_row + line.number)
        number = pl.Series(
            ROW,
            numbers,
            dtype=pl.UInt64,
        )
        notes = [refused_rows(refused, piece.first_row)]
        series = []
        for column in columns:
            cells = [row.get(column.name) for row in rows]
            values, wrong = self._typed(cells, column, number)
            series.append(values)
            notes += wrong
        return Rows(
            pl.DataFrame([*series, number]),
            pl.concat(notes),
        )

    def _typed(
        self,
        cells: list[Any],
        column: Column,
        number: pl.Series,
    ) -> tuple[pl.Series, list[pl.DataFrame]]:
        """Return cells as a column of its type, and notes if some do not fit it."""
        values, wrong = self._values(cells, column.type)
        series = pl.Series(column.name, values, column.type)
        if not any(wrong):
            return series, []
        text = pl.Series(
            [_text(cell) for cell in cells],
            dtype=pl.String,
        )
        notes = changed_cells(
            column,
            text,
            pl.Series(wrong),
            number,
        )
        return series, [notes]

    def _values(
        self,
        cells: list[Any],
        type_: pl.DataType,
    ) -> tuple[list[Any], list[bool]]:
        """Return cells as values of a type, and which of them do not fit it."""
        values = []
        wrong = []
        for cell in cells:
            is_word = (
                isinstance(
                    cell,
                    str,
                )
                and cell in self.settings.missing
            )
            if is_word and type_ != pl.String():
                cell = None
            try:
                values.append(conformed(cell, type_))
                wrong.append(False)
            except Unfit:
                values.append(None)
                wrong.append(True)
        return values, wrong

    def _inferred(self) -> list[Column]:
        samples, seen = self.samples(SAMPLE)
        cells: dict[str, list[tuple[int, Any]]] = {}
        rows = 0
        for sample in samples:
            for line in _lines(sample):
                for name, value in (line.row or {}).items():
                    cells.setdefault(
                        name,
                        [],
                    ).append((line.number, value))
                rows += line.row is not None
        if not rows or samples[0].lstrip().startswith(b"["):
            raise DataError(
                "no line is a JSON object",
                where=f"{self.stored}, line 1",
                remedy=(
                    "write one object a line, as {...}; of an array of objects"
                    " jq -c '.[]' makes such lines"
                ),
            )
        for name in self.settings.types:
            cells.setdefault(name, [])
        return [
            self._column(
                name,
                found,
                rows,
                seen,
            )
            for name, found in cells.items()
        ]

    def _column(
        self,
        name: str,
        found: list[tuple[int, Any]],
        rows: int,
        seen: str,
    ) -> Column:
        """Return what is inferred of a column.

        Args:
          name: of the column.
          found: the lines that have it, and its values there.
          rows: all lines.
          seen: what part of the file they are.
        """
        values = [value for _, value in found]
        filled = [value for value in values if not self._is_missing(value)]
        type_ = self.settings.types.get(name)
        reason = "set"
        if type_ is None:
            type_ = self._type(name, found, filled)
            reason = "the values' own type" if filled else "no row has a value"
            if type_ == pl.String() and filled:
                reason += _spelling(filled)
        _, wrong = self._values(values, type_)
        against = [
            value
            for value, bad in zip(
                values,
                wrong,
                strict=True,
            )
            if bad
        ]
        missing = rows - len(filled)
        if type_ == pl.String():
            missing = rows - sum(value is not None for value in values)
        return Column(
            name,
            type_,
            "; ".join(
                filter(
                    None,
                    [reason, seen],
                )
            ),
            against=len(against),
            missing=missing,
            examples=tuple(
                map(
                    _text,
                    against[:EXAMPLES],
                )
            ),
        )

    def _is_missing(self, value: Any) -> bool:
        return value is None or (
            isinstance(value, str) and value in self.settings.missing
        )

    def _type(
        self,
        name: str,
        found: list[tuple[int, Any]],
        filled: list[Any],
    ) -> pl.DataType:
        """Return the type of a column's values.

        Raises:
          DataError: they are of several kinds.
        """
        if not filled:
            return pl.String()
        kinds = Counter(kind_of(value) for value in filled)
        kind, count = kinds.most_common(1)[0]
        if count < NUMERIC_SHARE * len(filled):
            other = next(
                (line, value)
                for line, value in found
                if not self._is_missing(value) and kind_of(value) != kind
            )
            shown = ", ".join(f"{each} in {rows}" for each, rows in kinds.items())
            raise DataError(
                f"column {name!r} has values of several kinds: {shown} rows",
                where=f"{self.stored}, row {other[0]}: {_text(other[1])[:80]}",
                remedy=(
                    "write values of one kind, or"
                    f" types={{{name!r}: 'String'}} to read all of them as text"
                ),
            )
        types = [type_of(value) for value in filled if kind_of(value) == kind]
        common = merged(types)
        if common is None:
            raise DataError(
                f"the values of column {name!r} have inner values of several kinds",
                where=self.stored,
                remedy=f"set types={{{name!r}: 'String'}} to read them as text",
            )
        return common

    def _bad_row(
        self,
        refused: Refused,
        utf8: bytes,
        piece: Piece,
    ) -> DataError:
        lines = utf8.split(b"\n")
        filled = [i for i, line in enumerate(lines) if line.strip()]
        line = self.line_before(piece.start) + filled[refused.number] + 1
        shown = refused.text[:80].decode(
            "utf-8",
            "replace",
        )
        return DataError(
            f"{refused.fault}: {shown!r}",
            where=f"{self.stored}, line {line}",
            remedy=(
                "correct the line, or set bad_rows='refuse' to leave such rows out and"
                " count them; of a field that is rare, set the type in `types`"
            ),
        )


def _lines(utf8: bytes) -> list[Line]:
    lines = []
    texts = [text for text in utf8.split(b"\n") if text.strip()]
    for number, text in enumerate(texts):
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            fault = f"the line is not JSON: {type(error).__name__}: {error}"
            lines.append(
                Line(
                    number,
                    text,
                    None,
                    fault,
                )
            )
            continue
        fault = "" if isinstance(row, dict) else "the line is no JSON object"
        lines.append(
            Line(
                number,
                text,
                row if not fault else None,
                fault,
            )
        )
    return lines


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = names.most_common(1)[0][0]
        raise ValueError(f"the field {twice!r} is there twice")
    return made


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _spelling(values: list[Any]) -> str:
    """Return words about a column of text that may be meant as numbers."""
    text = pl.Series(
        values,
        dtype=pl.String,
        strict=False,
    )
    numbers = text.str.strip_chars().cast(
        pl.Float64,
        strict=False,
    )
    if numbers.null_count() > (1 - NUMERIC_SHARE) * len(text):
        return ""
    return ", though nearly all spell numbers: set `types` if numbers are meant"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(
        value,
        ensure_ascii=False,
        default=str,
    )
