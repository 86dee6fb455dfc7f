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

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

# Bytes of regular text that are looked at together; records that are taken one by one
# before another look. Assumptions.
STRETCH = 2**18
SHORT_STRETCH = 2**12
LONGEST_RUN = 2**10
BLOCK = 2**18  # bytes that NumPy looks at together; assumption: as many as a cache has

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
        return re.compile(
            self._field + others + end,
            re.DOTALL,
        )

    @cached_property
    def unclosed(self) -> re.Pattern[bytes]:
        """Pattern of a record with a quote that is open at the end of the text."""
        delimiter = re.escape(self.delimiter)
        before = rb"(?:" + self._field + delimiter + rb")*+"
        half = rb"(?:" + re.escape(self.escape) + rb")?" if self.escape else rb""
        return re.compile(
            before + self._opened + half + rb"\Z",
            re.DOTALL,
        )

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
      plain: whether each quote stands where one can, and no return ends a line.
    """

    stop: int
    records: int
    plain: bool


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
    stop = 0
    count = 0
    plain = not has_lone_returns(data)
    for stretch in _stretches(data, grammar, is_end, is_long):
        if isinstance(stretch, Stretch):
            count += _filled(data, stretch)
            stop = stretch.stop
        else:
            count += 1
            stop = stretch.end
            plain = False
    return Cut(
        len(data) if is_end else stop,
        count,
        plain,
    )


def has_lone_returns(data: bytes) -> bool:
    """Whether some return has no newline behind it; one at the very end counts."""
    return b"\r" in data and data.count(b"\r") != data.count(b"\r\n")


def is_regular(data: bytes, grammar: Grammar) -> bool:
    """Whether parity of quotes tells where these whole records end."""
    if has_lone_returns(data):
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
    kept = np.repeat(~blank, ends - starts)
    return _bytes(data)[kept].tobytes()


def delimiters_outside_quotes(data: bytes, grammar: Grammar) -> int:
    """Return the count of delimiters in regular text."""
    if not grammar.quote or grammar.quote not in data:
        return data.count(grammar.delimiter)
    array = _bytes(data)
    quotes = _places_of(array, grammar.quote)
    places = _places_of(array, grammar.delimiter)
    before = np.searchsorted(quotes, places)
    return int(np.count_nonzero(before % 2 == 0))


def records_of(
    data: bytes,
    grammar: Grammar,
    position: int = 0,
) -> Iterator[Record]:
    """Yield each record from a position on that is no empty line, broken or not."""
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


def cells_of(
    text: bytes,
    grammar: Grammar,
) -> list[bytes]:
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
    parts = []
    numbers = []
    refused = []
    count = 0
    for stretch in _stretches(data, grammar):
        done = None
        if isinstance(stretch, Stretch):
            text = data[stretch.start : stretch.stop]
            base = stretch.start
            done = _sieved(stretch, text, grammar, width, spare)
        else:
            text = data[stretch.start : stretch.end]
            base = stretch.start
        if done is None:
            done = _one_by_one(text, grammar, width, spare)
        parts.append(done.data)
        numbers.append(done.numbers + count)
        refused += [
            each._replace(
                number=each.number + count,
                start=each.start + base,
            )
            for each in done.refused
        ]
        count += len(done.numbers) + len(done.refused)
    return Repaired(
        b"".join(parts),
        np.concatenate(
            [
                np.empty(
                    0,
                    np.int64,
                ),
                *numbers,
            ]
        ),
        refused,
    )


# ---- stretches of regular text ----


class Stretch(NamedTuple):
    """Records one after another whose quotes are regular.

    Attributes:
      start: their first byte.
      stop: the byte after the last one.
      ends: of each record, in bytes from `start`; empty lines have ends, too.
    """

    start: int
    stop: int
    ends: np.ndarray


def _stretches(
    data: bytes,
    grammar: Grammar,
    is_end: bool = True,
    is_long: bool = False,
) -> Iterator[Stretch | Record]:
    """Yield the records of a text: regular ones together, others one by one.

    Where many are irregular, more and more of them are taken one by one before the next
    look for regular ones, so that the looks don't cost more than they save.
    """
    position = 0
    window = STRETCH
    run = 1
    while position < len(data):
        text = data[position : position + window]
        is_last = is_end and position + window >= len(data)
        ends = _regular_ends(text, grammar, is_last)
        if len(ends):
            stop = position + int(ends[-1])
            yield Stretch(position, stop, ends)
            position = stop
            window = min(2 * window, STRETCH)
            run = 1
            continue
        before = position
        ordered = records_of(data, grammar, position)
        for record in itertools.islice(ordered, run):
            if not is_end and _may_go_on(
                data,
                grammar,
                record,
                is_long,
            ):
                return
            yield record
            position = record.end
        if position == before:
            return
        window = SHORT_STRETCH
        run = min(2 * run, LONGEST_RUN)


def _regular_ends(
    text: bytes,
    grammar: Grammar,
    is_last: bool,
) -> np.ndarray:
    """Return the ends of the whole records before the first irregular quote."""
    array = _bytes(text)
    lines = _line_ends(text, array)
    first_bad = len(text) + 1
    is_open = False
    if grammar.quote and grammar.quote in text:
        quotes = _places_of(array, grammar.quote)
        wrong = _irregular(array, quotes, grammar)
        if len(wrong):
            first_bad = int(wrong[0])
        if grammar.escape and grammar.escape in text:
            first_bad = min(
                first_bad,
                text.index(grammar.escape),
            )
        lines = lines[
            np.searchsorted(
                quotes,
                lines,
            )
            % 2
            == 0
        ]
        is_open = len(quotes) % 2 == 1
    ends = lines + 1
    if first_bad <= len(text):
        return ends[ends <= first_bad]
    has_tail = not len(ends) or ends[-1] < len(text)
    if is_last and has_tail and not is_open:
        ends = np.append(ends, len(text))
    return ends


def _line_ends(
    text: bytes,
    array: np.ndarray,
) -> np.ndarray:
    """Return where lines end: at newlines, and at returns without one.

    A return at the very end does not count: a newline may follow.
    """
    lines = np.flatnonzero(array == NEWLINE)
    if b"\r" not in text:
        return lines
    returns = np.flatnonzero(array[:-1] == RETURN)
    lone = returns[array[returns + 1] != NEWLINE]
    return np.sort(np.concatenate([lines, lone]))


def _places_of(array: np.ndarray, character: bytes) -> np.ndarray:
    """Return where a character of one byte stands."""
    return np.flatnonzero(array == character[0])


def _irregular(
    array: np.ndarray,
    quotes: np.ndarray,
    grammar: Grammar,
) -> np.ndarray:
    """Return the places of quotes that stand where none can, in order."""
    around = _around(grammar)
    opening = quotes[0::2]
    opening = opening[opening > 0]
    closing = quotes[1::2]
    closing = closing[closing < len(array) - 1]
    wrong_opening = opening[~around[array[opening - 1]]]
    wrong_closing = closing[~around[array[closing + 1]]]
    return np.sort(np.concatenate([wrong_opening, wrong_closing]))


def _sieved(
    stretch: Stretch,
    text: bytes,
    grammar: Grammar,
    width: int,
    spare: bool,
) -> Repaired | None:
    """Return the records of regular text that have the right number of cells.

    None: each record must be looked at.
    """
    if spare or _damage(text) or MARK in text:
        return None
    array = _bytes(text)
    starts = np.concatenate([[0], stretch.ends[:-1]])
    contents = _content_ends(array, starts, stretch.ends)
    filled = contents > starts
    cells = 1 + _delimiters_between(
        array,
        starts,
        stretch.ends,
        grammar,
    )
    good = filled & (cells == width)

    numbers = np.cumsum(filled) - 1
    refused = []
    for i in np.flatnonzero(filled & ~good).tolist():
        start = int(starts[i])
        fault = f"expected {width} cells, found {cells[i]}"
        content = text[start : int(contents[i])]
        refused.append(
            Refused(
                int(numbers[i]),
                start,
                content,
                fault,
            )
        )
    data = _kept(
        text,
        array,
        starts,
        stretch.ends,
        good,
    )
    return Repaired(
        data,
        numbers[good].astype(np.int64),
        refused,
    )


def _kept(
    text: bytes,
    array: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    good: np.ndarray,
) -> bytes:
    """Return some of the records, each with a newline at its end."""
    lasts = ends - 1
    lone = lasts[array[lasts] == RETURN]
    if len(lone):
        array = array.copy()
        array[lone] = NEWLINE
        text = array.tobytes()
    if not good.all():
        sizes = ends - starts
        text = array[
            np.repeat(
                good,
                sizes,
            )
        ].tobytes()
    if text and not text.endswith(b"\n"):
        text += b"\n"
    return text


def _content_ends(
    array: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
) -> np.ndarray:
    """Return where records end without the ends of their lines."""
    contents = ends.copy()
    for char in (NEWLINE, RETURN):
        lasts = array[
            np.maximum(
                contents - 1,
                0,
            )
        ]
        contents -= (contents > starts) & (lasts == char)
    return contents


def _delimiters_between(
    array: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    grammar: Grammar,
) -> np.ndarray:
    """Return how many delimiters outside of quotes each record has."""
    places = _places_of(array, grammar.delimiter)
    if grammar.quote:
        quotes = _places_of(array, grammar.quote)
        if len(quotes):
            places = places[
                np.searchsorted(
                    quotes,
                    places,
                )
                % 2
                == 0
            ]
    return np.searchsorted(places, ends) - np.searchsorted(
        places,
        starts,
    )


def _one_by_one(
    data: bytes,
    grammar: Grammar,
    width: int,
    spare: bool,
) -> Repaired:
    """Return the readable records of a text, each of which is looked at."""
    lines = []
    numbers = []
    refused = []
    for number, record in enumerate(
        records_of(
            data,
            grammar,
        )
    ):
        text = data[record.start : record.stop]
        fault = record.fault or _damage(text)
        if not fault:
            cells = cells_of(text.removeprefix(MARK), grammar)
            if spare and len(cells) == width - 1:
                cells.append(b"")
            fault = _misfit(cells, width, spare)
        if fault:
            refused.append(
                Refused(
                    number,
                    record.start,
                    text,
                    fault,
                )
            )
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


def _quotes_are_regular(
    array: np.ndarray,
    grammar: Grammar,
) -> bool:
    """Whether each quote stands where one can, and is closed.

    They are looked at by blocks that fit into a cache.
    """
    around = _around(grammar)
    is_open = 0
    for start in range(
        0,
        len(array),
        BLOCK,
    ):
        block = array[start : start + BLOCK]
        quotes = np.flatnonzero(block == grammar.quote[0]) + start
        opening = quotes[is_open::2]
        before = opening[opening > 0] - 1
        closing = quotes[1 - is_open :: 2]
        after = closing[closing < len(array) - 1] + 1
        if not around[array[before]].all():
            return False
        if not around[array[after]].all():
            return False
        is_open = (is_open + len(quotes)) % 2
    return not is_open


def _around(grammar: Grammar) -> np.ndarray:
    """Return which bytes may stand before an opening or after a closing quote."""
    around = np.zeros(256, bool)
    allowed = [
        NEWLINE,
        RETURN,
        grammar.delimiter[0],
        grammar.quote[0],
    ]
    around[allowed] = True
    return around


def _ends_outside_quotes(
    data: bytes,
    grammar: Grammar,
) -> np.ndarray:
    array = _bytes(data)
    newlines = np.flatnonzero(array == NEWLINE)
    if not grammar.quote:
        return newlines + 1
    quotes = _places_of(array, grammar.quote)
    before = np.searchsorted(quotes, newlines)
    return newlines[before % 2 == 0] + 1


def _are_blank(
    data: bytes,
    starts: np.ndarray,
    ends: np.ndarray,
) -> np.ndarray:
    """Whether each line is empty: bool (lines,)."""
    lengths = ends - starts
    firsts = _bytes(data)[
        np.minimum(
            starts,
            len(data) - 1,
        )
    ]
    blank = (lengths == 1) & (firsts == NEWLINE)
    blank |= (lengths == 2) & (firsts == RETURN)
    return blank | (lengths == 0)


def _filled(data: bytes, stretch: Stretch) -> int:
    """Return how many records of a stretch are no empty lines."""
    starts = np.concatenate([[0], stretch.ends[:-1]])
    if (stretch.ends - starts).min() > len(b"\r\n"):
        return len(stretch.ends)
    text = data[stretch.start : stretch.stop]
    contents = _content_ends(
        _bytes(text),
        starts,
        stretch.ends,
    )
    return int((contents > starts).sum())


def _may_go_on(
    data: bytes,
    grammar: Grammar,
    record: Record,
    is_long: bool,
) -> bool:
    """Whether the text after these bytes may belong to a record."""
    may_close = record.fault and not is_long
    if (
        may_close
        and grammar.unclosed.match(
            data,
            record.start,
        )
        is not None
    ):
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
        inner = re.sub(
            escaped,
            rb"\1",
            inner,
            flags=re.DOTALL,
        )
    return inner.replace(quote + quote, quote)


def _written(
    cells: list[bytes],
    grammar: Grammar,
) -> bytes:
    """Return a record with quotes where they are needed."""
    quote = grammar.quote
    special = [grammar.delimiter, b"\n", b"\r"]
    if quote:
        special.append(quote)

    parts = []
    for cell in cells:
        if quote and any(char in cell for char in special):
            cell = (
                quote
                + cell.replace(
                    quote,
                    quote + quote,
                )
                + quote
            )
        parts.append(cell)
    if len(parts) == 1 and not parts[0] and quote:
        parts = [quote + quote]
    return grammar.delimiter.join(parts) + b"\n"
