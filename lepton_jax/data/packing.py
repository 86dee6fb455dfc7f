"""Documents of any length as rows of one length, for next-token prediction.

The documents are written one after the other and cut every `length` tokens. Each token
is an input once and a target once, nothing is padded, and all that must be remembered
between two rows is how far the last document has been used. Fitting whole documents
into rows would keep them uncut, but leave gaps, bar documents longer than a row, and
make the position a set of half-filled rows.

With the documents abc and defgh, an end token "." and rows of 4 tokens, the stream of
tokens is abc.defgh. and the rows are

    row  inputs  targets  segments  positions  pieces (document, from, to)
    0    abc.    bc.d     1111      0123       (0, 0, 4)
    1    defg    efgh     1111      0123       (1, 0, 4)

A row's last target is the next row's first input. A document's own end token counts as
its last one, so abc is 4 long.

A token that is read and not learned, such as one of a prompt, stands in its document as
its complement, ~t = -1 - t (see `masked`). It is an input like any other, and where it
would be a target, the target is -1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.data.arrays import aligned_empty
from lepton_jax.data.rows import Rows, lengths
from lepton_jax.data.shuffling import mixed_keys
from lepton_jax.data.streams import (
    NO_PADDING,
    Draw,
    Padding,
    Stream,
    Test,
    fields,
)
from lepton_jax.errors import DataError

# Target of what is not learned: padding, and masked tokens;
# `lepton_jax.losses.padded_cross_entropy` leaves it out.
PADDING = -1

# Documents that are measured beyond those that a row is expected to need. Assumption:
# enough that a few short ones among them do not make it look again.
MEASURED_AHEAD = 16


def masked(tokens: Any) -> np.ndarray:
    """Return tokens that are read and not learned, for a document: int32.

    >>> masked([0, 7])
    array([-1, -8], dtype=int32)
    """
    return ~np.asarray(tokens, np.int32)


def instruction(prompt: Any, answer: Any) -> np.ndarray:
    """Return a document of a prompt that is read, and an answer that is learned.

    Longer dialogues are `np.concatenate` of `masked(...)` and what is learned.

    Args:
      prompt: token ids.
      answer: token ids; pack with `end` to also learn where it ends.

    Returns:
      A document for a `Source` that is packed, int32. The loss must be
      `lepton_jax.losses.padded_cross_entropy`.

    Example:
      >>> instruction([5, 6], [1, 2])
      array([-6, -7,  1,  2], dtype=int32)
    """
    return np.concatenate([masked(prompt), np.asarray(answer, np.int32)])


def unmasked(tokens: np.ndarray) -> np.ndarray:
    """Return the tokens themselves, of which some may be masked."""
    return np.where(tokens < 0, ~tokens, tokens)


def learned(tokens: np.ndarray) -> np.ndarray:
    """Return tokens as targets, with -1 for the masked ones."""
    return np.maximum(tokens, PADDING)


@dataclass(frozen=True)
class RowForm:
    """The form of packed rows.

    Attributes:
      length: tokens of a row.
      end: a token after each document, or None.
      segments: whether inputs say which document each token is of.
    """

    length: int
    end: int | None
    segments: bool


class Piece(NamedTuple):
    """A part of a document in a row: its tokens from `start` to `stop`."""

    document: int
    start: int
    stop: int


class PackDraw:
    """Rows of a token stream.

    Args:
      documents: those that the rows are made of.
      ends: where each document ends in the token stream, (documents,).
      starts: where each row starts, (rows,).
      form: of the rows.
    """

    def __init__(
        self,
        documents: Draw,
        ends: np.ndarray,
        starts: np.ndarray,
        form: RowForm,
    ):
        self.documents = documents
        self.ends = ends
        self.starts = starts
        self.form = form

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, which: Any) -> PackDraw:
        return PackDraw(
            self.documents,
            self.ends,
            self.starts[which],
            self.form,
        )

    def identifiers(self) -> list[str]:
        rows = self._pieces(0)
        if not rows:
            return []
        first = rows[0][0].document
        last = rows[-1][-1].document
        names = self.documents.take(
            slice(
                first,
                last + 1,
            )
        ).identifiers()

        def name(piece: Piece) -> str:
            return f"{names[piece.document - first]}[{piece.start}:{piece.stop}]"

        return [
            "+".join(
                map(
                    name,
                    row,
                )
            )
            for row in rows
        ]

    def read(self) -> Rows:
        rows = self._pieces(1)
        documents = self._read_documents(rows)
        count = len(self)
        length = self.form.length

        # one token more than a row has: its last target
        tokens = np.empty(
            (count, length + 1),
            np.int32,
        )
        for row, pieces in enumerate(rows):
            self._write_tokens(tokens[row], pieces, documents)
        inputs = aligned_empty((count, length), np.int32)
        targets = aligned_empty((count, length), np.int32)
        inputs[:] = unmasked(tokens[:, :-1])
        targets[:] = learned(tokens[:, 1:])
        if not self.form.segments:
            return inputs, targets

        segments = aligned_empty((count, length), np.int32)
        positions = aligned_empty((count, length), np.int32)
        for row, pieces in enumerate(rows):
            _write_segments(segments[row], positions[row], pieces)
        return {"tokens": inputs, "segments": segments, "positions": positions}, targets

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        raise AssertionError("rows are not filtered")

    def keys(self) -> np.ndarray:
        """Return a key for each row, by its first document and the place in it."""
        firsts = [row[0] for row in self._pieces(0)]
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
        return NO_PADDING

    def _pieces(
        self,
        beyond: int,
    ) -> list[list[Piece]]:
        """Return the pieces of each row and of `beyond` tokens after it."""
        stops = self.starts + self.form.length + beyond
        first = np.searchsorted(
            self.ends,
            self.starts,
            "right",
        )
        last = np.searchsorted(self.ends, stops, "left")
        # document d begins at borders[d] and ends at borders[d + 1]
        borders = np.concatenate([[0], self.ends]).tolist()

        def piece(
            document: int,
            start: int,
            stop: int,
        ) -> Piece:
            begin = borders[document]
            end = borders[document + 1]
            return Piece(
                document,
                max(start, begin) - begin,
                min(stop, end) - begin,
            )

        rows = []
        limits = np.stack(
            [self.starts, stops, first, last],
            axis=1,
        ).tolist()
        for start, stop, low, high in limits:
            rows.append(
                [
                    piece(
                        d,
                        start,
                        stop,
                    )
                    for d in range(low, high + 1)
                ]
            )
        return rows

    def _read_documents(
        self,
        rows: list[list[Piece]],
    ) -> dict[int, np.ndarray]:
        """Read the documents of some pieces, and check that they are as measured."""
        needed = sorted({piece.document for row in rows for piece in row})
        contents = self.documents.take(np.array(needed)).read()
        assert isinstance(contents, list)

        documents = dict(
            zip(
                needed,
                contents,
                strict=True,
            )
        )
        end_tokens = 0 if self.form.end is None else 1
        for document, tokens in documents.items():
            begin = self.ends[document - 1] if document else 0
            expected = self.ends[document] - begin - end_tokens
            if len(tokens) != expected:
                this = self.documents.take(
                    slice(
                        document,
                        document + 1,
                    )
                )
                raise DataError(
                    f"a document has {len(tokens)} tokens, and had {expected} when it"
                    " was measured",
                    where=this.identifiers()[0],
                    remedy=(
                        "give documents whose length is the same whenever they are read"
                    ),
                )
        return documents

    def _write_tokens(
        self,
        row: np.ndarray,
        pieces: list[Piece],
        documents: dict[int, np.ndarray],
    ) -> None:
        at = 0
        for piece in pieces:
            tokens = documents[piece.document][piece.start : piece.stop]
            row[at : at + len(tokens)] = tokens
            at += piece.stop - piece.start
            if len(tokens) < piece.stop - piece.start:
                row[at - 1] = self.form.end


def _write_segments(
    segments: np.ndarray,
    positions: np.ndarray,
    pieces: list[Piece],
) -> None:
    """Write the number of each token's document in the row, and its place in it."""
    at = 0
    for number, piece in enumerate(pieces, 1):
        # the last piece may reach a token beyond the row
        stop = min(
            at + piece.stop - piece.start,
            len(segments),
        )
        segments[at:stop] = number
        positions[at:stop] = np.arange(stop - at)
        at = stop


class PackStream:
    """Rows of a stream of documents."""

    def __init__(self, stream: Stream, form: RowForm):
        self.stream = stream
        self.form = form
        self.hints = stream.hints
        self._used = 0  # tokens of the next document that earlier rows had
        # ends of the next documents that have been measured, from the next one's start
        self._ends = np.empty(0, np.int64)
        lengths(stream.peek(1).read())  # for its error

    def peek(self, count: int) -> PackDraw:
        length = self.form.length
        # the last row's last target is the token after it
        needed = self._used + count * length + 1
        while self._measured_tokens < needed:
            self._measure(needed)

        documents = (
            np.searchsorted(
                self._ends,
                needed,
                "left",
            )
            + 1
        )
        ends = self._ends[:documents]
        starts = (
            self._used
            + np.arange(
                count,
                dtype=np.int64,
            )
            * length
        )
        return PackDraw(
            self.stream.peek(len(ends)),
            ends,
            starts,
            self.form,
        )

    def advance(self, count: int) -> None:
        used = self._used + count * self.form.length
        documents = int(
            np.searchsorted(
                self._ends,
                used,
                "right",
            )
        )
        begin = int(self._ends[documents - 1]) if documents else 0
        self.stream.advance(documents)
        self._used = used - begin
        self._ends = self._ends[documents:] - begin

    def state(self) -> dict[str, Any]:
        return {"used": self._used, "documents": self.stream.state()}

    def restore(self, state: Any) -> None:
        fields(state, {"used", "documents"}, "packed rows")
        self.stream.restore(state["documents"])
        self._used = state["used"]
        self._ends = np.empty(0, np.int64)

    def possible(
        self,
        tests: Sequence[Test],
    ) -> bool:
        raise AssertionError("rows are not filtered")

    @property
    def _measured_tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _measure(self, needed: int) -> None:
        """Measure some documents more, on the way to `needed` tokens."""
        known = len(self._ends)
        tokens = self._measured_tokens
        missing = needed - tokens
        # as many as the missing tokens take, if documents stay as long as they were
        expected = missing * known // max(tokens, 1)
        more = min(missing, expected + MEASURED_AHEAD)

        unmeasured = self.stream.peek(known + more).take(
            slice(
                known,
                None,
            )
        )
        tokens_each = unmeasured.measured(self, lengths)
        end_tokens = 0 if self.form.end is None else 1
        ends = tokens + np.cumsum(tokens_each + end_tokens)
        self._ends = np.concatenate([self._ends, ends])
