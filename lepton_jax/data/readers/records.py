r"""Records of delimited text: where they end, and which of them are broken.

A newline inside of quotes ends no record, so the ends are found by the parity of the
quotes before them, in a few passes of NumPy over the bytes:

    7,"a      the newline after "a" is behind one quote: inside
    b",4      the newline after 4 is behind two quotes: a record ends
    8,c,5     none more: a record ends

That holds as long as each quote stands where one can: an opening one at the beginning
of a cell, a closing one at its end, or two for one inside. Text with other quotes, such
as

    9,5" pipe,1
    10,"unclosed,2
    11,d,3

is taken record by record with a regular expression. The quote in the first line is a
character like others; the second record is broken, and is its line alone, so that the
third one is not lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

NEWLINE = 10
RETURN = 13
MARK = b"\xef\xbb\xbf"  # U+FEFF, which files put together have in their middle


@dataclass(frozen=True)
class Grammar:
    """The characters that structure the text.

    Attributes:
      delimiter: one byte between cells.
      quote: one byte around cells; b"" for none.
      escape: one byte before a quote inside of quotes; b"" if quotes are doubled.
    """

    delimiter: bytes
    quote: bytes = b'"'
    escape: bytes = b""

    @cached_property
    def field(self) -> re.Pattern[bytes]:
        """Pattern of a cell."""
        return re.compile(self._field, re.DOTALL)

    @cached_property
    def record(self) -> re.Pattern[bytes]:
        """Pattern of a record with its end."""
        delimiter = re.escape(self.delimiter)
        others = rb"(?:" + delimiter + self._field + rb")*+"
        end = rb"(?:\r\n|\n|\r|\Z)"
        return re.compile(self._field + others + end, re.DOTALL)

    @cached_property
    def unclosed(self) -> re.Pattern[bytes]:
        """Pattern of a record with a quote that is open at the end of the text."""
        delimiter = re.escape(self.delimiter)
        before = rb"(?:" + self._field + delimiter + rb")*+"
        half = rb"(?:" + re.escape(self.escape) + rb")?" if self.escape else rb""
        return re.compile(before + self._opened + half + rb"\Z", re.DOTALL)

    @property
    def _spaces(self) -> bytes:
        return rb"" if self.delimiter == b" " else rb" *+"

    @property
    def _opened(self) -> bytes:
        """Pattern of a quote and what is inside of it."""
        quote = re.escape(self.quote)
        escape = re.escape(self.escape)
        inner = rb"[^" + quote + escape + rb"]++|" + quote + quote
        if self.escape:
            inner += rb"|" + escape + rb"."
        return self._spaces + quote + rb"(?:" + inner + rb")*+"

    @property
    def _field(self) -> bytes:
        delimiter = re.escape(self.delimiter)
        plain = rb"[^" + delimiter + rb"\r\n]*+"
        if not self.quote:
            return plain
        quote = re.escape(self.quote)
        end = quote + self._spaces + rb"(?=[" + delimiter + rb"\r\n]|\Z)"
        unquoted = rb"(?!" + self._spaces + quote + rb")" + plain
        return rb"(?:" + self._opened + end + rb"|" + unquoted + rb")"


class Cut(NamedTuple):
    """The whole records at the beginning of some bytes.

    Attributes:
      stop: bytes of these records.
      records: how many there are, without empty lines.
    """

    stop: int
    records: int


class Record(NamedTuple):
    """A record as it stands in its bytes.

    Attributes:
      start: its first byte.
      stop: the byte after its last one, without the end of the line.
      end: the byte after the end of its line.
      fault: what is wrong with its quotes; "" if nothing.
    """

    start: int
    stop: int
    end: int
    fault: str = ""


class Refused(NamedTuple):
    """A record that can't be read.

    Attributes:
      number: of the record in its bytes.
      start: its first byte.
      text: as it stands there.
      fault: why.
    """

    number: int
    start: int
    text: bytes
    fault: str


class Repaired(NamedTuple):
    """The readable records of some bytes, in a form that every parser reads alike.

    Attributes:
      data: the records.
      numbers: number of each of them among all, int64.
      refused: the others.
    """

    data: bytes
    numbers: np.ndarray
    refused: list[Refused]


def cut(
    data: bytes,
    grammar: Grammar,
    is_end: bool,
    is_long: bool = False,
) -> Cut:
    """Find the whole records at the beginning of bytes.

    Args:
      data: begins with a record.
      grammar: of the text.
      is_end: whether the text ends with these bytes.
      is_long: whether a record that is not closed in these bytes is a broken one.
    """
    if is_long or not is_regular(data, grammar):
        return _cut_carefully(data, grammar, is_end, is_long)
    if grammar.quote and grammar.quote in data:
        ends = _ends_outside_quotes(data, grammar)
        return _cut_at(data, ends, is_end)

    stop = len(data) if is_end else data.rfind(b"\n") + 1
    if has_blank_lines(data):
        ends = np.flatnonzero(_bytes(data) == NEWLINE) + 1
        return _cut_at(data, ends, is_end)
    has_tail = is_end and not data.endswith(b"\n") and data != b""
    return Cut(stop, data.count(b"\n", 0, stop) + has_tail)


def is_regular(data: bytes, grammar: Grammar) -> bool:
    """Whether parity of quotes tells where the records end."""
    if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
        # A return at the very end may be half of an end of line.
        return False
    if not grammar.quote or grammar.quote not in data:
        return True
    if grammar.escape and grammar.escape in data:
        return False
    return _quotes_are_regular(_bytes(data), grammar)


def has_blank_lines(data: bytes) -> bool:
    """Whether some line may be empty."""
    if data.startswith((b"\n", b"\r\n")) or b"\n\n" in data:
        return True
    return b"\r" in data and b"\n\r\n" in data


def without_blank_lines(data: bytes, grammar: Grammar) -> bytes:
    """Return regular text without its empty lines."""
    if not has_blank_lines(data):
        return data
    ends = _ends_outside_quotes(data, grammar)
    starts = np.concatenate([[0], ends])
    ends = np.append(ends, len(data))
    blank = _are_blank(data, starts, ends)
    kept = np.ones(len(data), bool)
    for start, end in zip(starts[blank].tolist(), ends[blank].tolist(), strict=True):
        kept[start:end] = False
    return _bytes(data)[kept].tobytes()


def delimiters_outside_quotes(data: bytes, grammar: Grammar) -> int:
    """Return the count of delimiters in regular text."""
    if not grammar.quote or grammar.quote not in data:
        return data.count(grammar.delimiter)
    array = _bytes(data)
    quotes = np.flatnonzero(array == grammar.quote[0])
    places = np.flatnonzero(array == grammar.delimiter[0])
    before = np.searchsorted(quotes, places)
    return int(np.count_nonzero(before % 2 == 0))


def records_of(
    data: bytes,
    grammar: Grammar,
) -> Iterator[Record]:
    """Yield each record that is no empty line, broken or not."""
    position = 0
    while position < len(data):
        match = grammar.record.match(data, position)
        if match is not None:
            end = match.end()
            fault = ""
        else:
            end = _line_end(data, position)
            fault = "a quote is not closed, or text follows the closing quote"
        stop = end
        while stop > position and data[stop - 1] in (NEWLINE, RETURN):
            stop -= 1
        if stop > position:
            yield Record(position, stop, end, fault)
        position = end


def cells_of(text: bytes, grammar: Grammar) -> list[bytes]:
    """Return the cells of a record, without their quotes."""
    if not grammar.quote or grammar.quote not in text:
        return text.split(grammar.delimiter)
    cells = []
    position = 0
    while True:
        match = grammar.field.match(text, position)
        assert match is not None
        cells.append(_unquoted(match[0], grammar))
        position = match.end()
        if position >= len(text):
            return cells
        position += 1


def repaired(
    data: bytes,
    grammar: Grammar,
    width: int,
    spare: bool = False,
) -> Repaired:
    """Tell the readable records of a text from the others.

    Args:
      data: whole records in UTF-8, possibly with bytes that are none.
      grammar: of the text.
      width: cells that a record must have.
      spare: whether the last of them is nothing behind a delimiter.
    """
    lines = []
    numbers = []
    refused = []
    number = -1
    for record in records_of(data, grammar):
        number += 1
        text = data[record.start : record.stop]
        fault = record.fault or _damage(text)
        if not fault:
            cells = cells_of(text.removeprefix(MARK), grammar)
            if spare and len(cells) == width - 1:
                cells.append(b"")
            fault = _misfit(cells, width, spare)
        if fault:
            refused.append(Refused(number, record.start, text, fault))
            continue
        lines.append(_written(cells, grammar))
        numbers.append(number)
    return Repaired(
        b"".join(lines),
        np.array(numbers, np.int64),
        refused,
    )


# ---- internals ----


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _quotes_are_regular(array: np.ndarray, grammar: Grammar) -> bool:
    quotes = np.flatnonzero(array == grammar.quote[0])
    around = np.zeros(256, bool)
    around[[NEWLINE, RETURN, grammar.delimiter[0], grammar.quote[0]]] = True

    opening = quotes[0::2]
    before = opening[opening > 0] - 1
    if not around[array[before]].all():
        return False
    closing = quotes[1::2]
    after = closing[closing < len(array) - 1] + 1
    return bool(around[array[after]].all())


def _ends_outside_quotes(data: bytes, grammar: Grammar) -> np.ndarray:
    array = _bytes(data)
    newlines = np.flatnonzero(array == NEWLINE)
    if not grammar.quote:
        return newlines + 1
    quotes = np.flatnonzero(array == grammar.quote[0])
    before = np.searchsorted(quotes, newlines)
    return newlines[before % 2 == 0] + 1


def _cut_at(
    data: bytes,
    ends: np.ndarray,
    is_end: bool,
) -> Cut:
    """Return the cut at the last of the records' ends."""
    if is_end and (not len(ends) or ends[-1] < len(data)):
        ends = np.append(ends, len(data))
    if not len(ends):
        return Cut(0, 0)
    starts = np.concatenate([[0], ends[:-1]])
    blank = _are_blank(data, starts, ends)
    return Cut(int(ends[-1]), int(len(ends) - blank.sum()))


def _are_blank(
    data: bytes,
    starts: np.ndarray,
    ends: np.ndarray,
) -> np.ndarray:
    """Whether each line is empty: bool (lines,)."""
    lengths = ends - starts
    firsts = _bytes(data)[np.minimum(starts, len(data) - 1)]
    blank = (lengths == 1) & (firsts == NEWLINE)
    blank |= (lengths == 2) & (firsts == RETURN)
    return blank | (lengths == 0)


def _cut_carefully(
    data: bytes,
    grammar: Grammar,
    is_end: bool,
    is_long: bool,
) -> Cut:
    stop = 0
    count = 0
    for record in records_of(data, grammar):
        if not is_end and _may_go_on(data, grammar, record, is_long):
            return Cut(stop, count)
        stop = record.end
        count += 1
    return Cut(len(data) if is_end else stop, count)


def _may_go_on(
    data: bytes,
    grammar: Grammar,
    record: Record,
    is_long: bool,
) -> bool:
    """Whether the text after these bytes may belong to a record."""
    may_close = record.fault and not is_long
    if may_close and grammar.unclosed.match(data, record.start) is not None:
        return True
    # A return at the very end may be followed by a newline.
    return record.end == len(data) and data[-1] != NEWLINE


def _line_end(data: bytes, position: int) -> int:
    """Return where the line at a position ends, with its newline."""
    newline = data.find(b"\n", position)
    stop = len(data) if newline < 0 else newline + 1
    lone = data.find(b"\r", position, stop)
    if lone < 0:
        return stop
    return lone + 2 if data[lone + 1 : lone + 2] == b"\n" else lone + 1


def _misfit(
    cells: list[bytes],
    width: int,
    spare: bool,
) -> str:
    """Return what is wrong with the number of a record's cells; "" if nothing."""
    if len(cells) != width:
        return f"expected {width - spare} cells, found {len(cells)}"
    if spare and cells[-1].strip():
        return f"expected {width - 1} cells, found {width}"
    return ""


def _damage(text: bytes) -> str:
    if b"\0" in text:
        return "the row has zero bytes"
    if text.isascii():
        return ""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"byte {text[error.start]:#04x} is not UTF-8 text"
    return ""


def _unquoted(cell: bytes, grammar: Grammar) -> bytes:
    inner = cell if grammar.delimiter == b" " else cell.strip(b" ")
    quote = grammar.quote
    if not inner.startswith(quote):
        return cell
    inner = inner[1:-1]
    if grammar.escape:
        escaped = re.escape(grammar.escape) + rb"(.)"
        inner = re.sub(escaped, rb"\1", inner, flags=re.DOTALL)
    return inner.replace(quote + quote, quote)


def _written(cells: list[bytes], grammar: Grammar) -> bytes:
    """Return a record with quotes where they are needed."""
    quote = grammar.quote
    special = [grammar.delimiter, b"\n", b"\r"]
    if quote:
        special.append(quote)

    parts = []
    for cell in cells:
        if quote and any(char in cell for char in special):
            cell = quote + cell.replace(quote, quote + quote) + quote
        parts.append(cell)
    if len(parts) == 1 and not parts[0] and quote:
        parts = [quote + quote]
    return grammar.delimiter.join(parts) + b"\n"
