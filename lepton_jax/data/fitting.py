"""Documents fitted whole into rows of one length, with padding where none fits.

A number of documents that follow each other in the stream is planned together, by their
lengths alone: the longest first, each into a row with room for it. "first" takes the
first such row (first-fit decreasing takes at most 11/9 of the fewest rows possible, and
6/9 of a row: Dosa 2007), "best" the one in which it leaves least room. With
rows of 8 tokens and documents of 5, 4, 3, 3 and 1:

    row 0    5 5 5 5 5 3 3 3
    row 1    4 4 4 4 3 3 3 1

Only documents longer than a row are cut. Nothing is written: rows of another length are
another plan. The position is the first document that is planned together with the next
row, and the number of that row in the plan.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lepton_jax.data.arrays import aligned_empty
from lepton_jax.data.packing import PADDING, Piece, learned, unmasked
from lepton_jax.data.rows import Rows, lengths
from lepton_jax.data.shuffling import mixed_keys
from lepton_jax.data.streams import Draw, Padding, Stream, Test, fields
from lepton_jax.errors import DataError

# Documents that are planned together. For 20,480 documents of exponential lengths with
# mean 200, in rows of 1,024, `plan_rows` leaves 4.1 % of padding with 64 together,
# 0.94 % with 256, 0.27 % with 1,024 and 0.07 % with 4,096, by either fit; best fit
# takes 5 microseconds a document, first fit 14 (one core, 2026-11-29).
TOGETHER = 1024

# Plans in a row without a token to predict, after which it is an error. Assumption.
FRUITLESS = 16


@dataclass(frozen=True)
class FitForm:
    """The form of fitted rows.

    Attributes:
      length: tokens of a row.
      end: a token that is each document's last target, and fills the inputs; None:
        documents end with their last token, and 0 fills the inputs.
      segments: whether inputs say which document each token is of; 0 is padding.
      fit: into which row a document goes.
    """

    length: int
    end: int | None
    segments: bool
    fit: Literal["first", "best"]

    def inputs_of(self, tokens: Any) -> Any:
        """Return how many inputs documents with so many tokens have."""
        return tokens if self.end is not None else tokens - 1


Row = list[Piece]


def plan_rows(
    sizes: Sequence[int],
    length: int,
    fit: Literal["first", "best"],
) -> list[Row]:
    """Plan the rows of some documents.

    >>> for row in plan_rows([3, 5, 4], 8, "best"):
    ...     print([tuple(piece) for piece in row])
    [(1, 0, 5), (0, 0, 3)]
    [(2, 0, 4)]

    Args:
      sizes: inputs of each document; those of 0 are in no row.
      length: inputs of a row.
      fit: into which row a document goes.

    Returns:
      The rows, in the order of the document that each began with.
    """
    pieces = [
        Piece(
            document,
            start,
            min(start + length, size),
        )
        for document, size in enumerate(sizes)
        for start in range(0, size, length)
    ]
    pieces.sort(key=_size, reverse=True)
    rows = (
        _best_fit(pieces, length)
        if fit == "best"
        else _first_fit(
            pieces,
            length,
        )
    )
    return sorted(rows, key=_first_document)


def _first_fit(
    pieces: Sequence[Piece],
    length: int,
) -> list[Row]:
    rows: list[Row] = []
    room = np.full(len(pieces), length)
    for piece in pieces:
        size = _size(piece)
        row = int(np.argmax(room >= size))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        room[row] -= size
    return rows


def _best_fit(
    pieces: Sequence[Piece],
    length: int,
) -> list[Row]:
    rows: list[Row] = []
    rooms: list[
        tuple[int, int]
    ] = []  # (room, row) of rows that are not full, ascending
    for piece in pieces:
        size = _size(piece)
        place = bisect_left(rooms, (size, -1))
        if place == len(rooms):
            room, row = length, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(piece)
        if room > size:
            insort(rooms, (room - size, row))
    return rows


def _size(piece: Piece) -> int:
    return piece.stop - piece.start


def _first_document(row: Row) -> int:
    return row[0].document


class FitDraw:
    """Rows into which documents are fitted.

    Args:
      documents: those that were planned.
      rows: the pieces of each row.
      form: of the rows.
    """

    def __init__(
        self,
        documents: Draw,
        rows: list[Row],
        form: FitForm,
    ):
        self.documents = documents
        self.rows = rows
        self.form = form

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: Any) -> FitDraw:
        numbers = np.arange(len(self.rows))[which].tolist()
        rows = [self.rows[number] for number in numbers]
        return FitDraw(self.documents, rows, self.form)

    def identifiers(self) -> list[str]:
        used, places = self._used()
        names = self.documents.take(used).identifiers() if len(used) else []

        def name(piece: Piece) -> str:
            return f"{names[places[piece.document]]}[{piece.start}:{piece.stop}]"

        return [
            "+".join(
                map(
                    name,
                    row,
                )
            )
            for row in self.rows
        ]

    def read(self) -> Rows:
        used, places = self._used()
        documents = self.documents.take(used).read()
        shape = (len(self), self.form.length)
        inputs = _filled(shape, self.form.end or 0)
        targets = _filled(shape, PADDING)
        segments = _filled(shape, 0)
        positions = _filled(shape, 0)

        for row, pieces in enumerate(self.rows):
            at = 0
            for number, piece in enumerate(pieces, 1):
                tokens = documents[places[piece.document]]
                self._check(tokens, piece)
                here = slice(at, at + _size(piece))
                inputs[row, here] = unmasked(tokens[piece.start : piece.stop])
                targets[row, here] = self._targets(
                    tokens,
                    piece,
                )
                segments[row, here] = number
                positions[row, here] = np.arange(_size(piece))
                at += _size(piece)
        if not self.form.segments:
            return inputs, targets
        return {"tokens": inputs, "segments": segments, "positions": positions}, targets

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        raise AssertionError("rows are not filtered")

    def keys(self) -> np.ndarray:
        """Return a key for each row, by its first document and the place in it."""
        firsts = [row[0] for row in self.rows]
        documents = np.array(
            [piece.document for piece in firsts],
            np.int64,
        )
        starts = np.array(
            [piece.start for piece in firsts],
            np.int64,
        )
        return mixed_keys(
            self.documents.take(documents).keys(),
            starts,
        )

    def ranks(self) -> np.ndarray | None:
        return None

    def padding(self) -> Padding:
        total = len(self.rows) * self.form.length
        used = sum(_size(piece) for row in self.rows for piece in row)
        return Padding(total - used, total)

    def _used(self) -> tuple[np.ndarray, dict[int, int]]:
        """Return the documents of these rows, and the place of each among them."""
        used = sorted({piece.document for row in self.rows for piece in row})
        return np.array(
            used,
            np.int64,
        ), {d: place for place, d in enumerate(used)}

    def _targets(
        self,
        tokens: np.ndarray,
        piece: Piece,
    ) -> np.ndarray:
        following = tokens[piece.start + 1 : piece.stop + 1]
        if len(following) == _size(piece):
            return learned(following)
        assert self.form.end is not None
        return np.append(learned(following), self.form.end)

    def _check(
        self,
        tokens: np.ndarray,
        piece: Piece,
    ) -> None:
        inputs = self.form.inputs_of(len(tokens))
        is_shorter = inputs < piece.stop
        is_longer = inputs > piece.stop and _size(piece) < self.form.length
        if not is_shorter and not is_longer:
            return
        this = self.documents.take(
            slice(
                piece.document,
                piece.document + 1,
            )
        )
        raise DataError(
            f"a document has {len(tokens)} tokens now, and had another number when it"
            " was measured",
            where=this.identifiers()[0],
            remedy="give documents whose length is the same whenever they are read",
        )


class FitStream:
    """Rows into which the documents of a stream are fitted."""

    def __init__(
        self,
        stream: Stream,
        form: FitForm,
    ):
        self.stream = stream
        self.form = form
        self.hints = stream.hints
        self._row = 0  # of the first plan's rows, those that are consumed
        self._plans: list[list[Row]] = []
        lengths(stream.peek(1).read())  # for its error

    def peek(self, count: int) -> FitDraw:
        while (
            sum(
                map(
                    len,
                    self._plans,
                )
            )
            - self._row
            < count
        ):
            self._plan()
        documents = self.stream.peek(TOGETHER * len(self._plans))
        rows: list[Row] = []
        skipped = self._row
        for number, plan in enumerate(self._plans):
            missing = count - len(rows)
            for row in plan[skipped : skipped + missing]:
                rows.append(_shifted(row, number * TOGETHER))
            skipped = max(0, skipped - len(plan))
        return FitDraw(documents, rows, self.form)

    def advance(self, count: int) -> None:
        self._row += count
        while self._plans and self._row >= len(self._plans[0]):
            self._row -= len(self._plans[0])
            self._plans.pop(0)
            self.stream.advance(TOGETHER)

    def state(self) -> dict[str, Any]:
        return {"row": self._row, "documents": self.stream.state()}

    def restore(self, state: Any) -> None:
        fields(state, {"row", "documents"}, "fitted rows")
        self.stream.restore(state["documents"])
        self._row = state["row"]
        self._plans = []

    def possible(
        self,
        tests: Sequence[Test],
    ) -> bool:
        raise AssertionError("rows are not filtered")

    def _plan(self) -> None:
        """Plan the documents that follow those that are planned."""
        known = TOGETHER * len(self._plans)
        documents = self.stream.peek(known + TOGETHER).take(
            slice(
                known,
                None,
            )
        )
        tokens = documents.measured(self, lengths)
        sizes = self.form.inputs_of(tokens).tolist()
        self._plans.append(
            plan_rows(
                sizes,
                self.form.length,
                self.form.fit,
            )
        )
        if len(self._plans) > FRUITLESS and not any(self._plans[-FRUITLESS:]):
            raise DataError(
                f"{FRUITLESS * TOGETHER} documents have one token each, and nothing to"
                " predict",
                where="pack",
                remedy="give an end token: .pack(length, end=...)",
            )


def _shifted(
    row: Row,
    documents: int,
) -> Row:
    """Return a row of a plan, its documents counted from the first plan's."""
    return [Piece(piece.document + documents, piece.start, piece.stop) for piece in row]


def _filled(
    shape: tuple[int, int],
    value: int,
) -> np.ndarray:
    out = aligned_empty(shape, np.int32)
    out.fill(value)
    return out
