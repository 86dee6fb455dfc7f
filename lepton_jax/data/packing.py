"""Documents of any length as rows of one length, for next-token prediction.

The documents are written one after the other and cut every `length` tokens. Each token
is an input once and a target once, nothing is padded, and all that is in hand between
two rows is how far the last document has been used. Whole documents fitted into rows
would keep them uncut, but leave gaps, bar documents longer than a row, and make the
position a set of half-filled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lepton_jax.data.arrays import aligned_empty
from lepton_jax.data.rows import Rows, lengths
from lepton_jax.data.streams import Draw, Stream, Test, fields
from lepton_jax.errors import DataError


class PackDraw:
    """Rows of a token stream.

    Args:
      documents: those that the rows are made of.
      ends: where each document ends in the token stream, (documents,).
      starts: where each row starts, (rows,).
      length: tokens a row.
      end: a token after each document, or None.
      segments: whether inputs say which document each token is of.
    """

    def __init__(
        self,
        documents: Draw,
        ends: np.ndarray,
        starts: np.ndarray,
        length: int,
        end: int | None,
        segments: bool,
    ):
        self.documents = documents
        self.ends = ends
        self.starts = starts
        self.length = length
        self.end = end
        self.segments = segments

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, which: Any) -> PackDraw:
        return PackDraw(
            self.documents,
            self.ends,
            self.starts[which],
            self.length,
            self.end,
            self.segments,
        )

    def _pieces(self, beyond: int) -> list[list[tuple[int, int, int]]]:
        """For each row, (document, from, to) of what it and `beyond` tokens more
        consist of; in the document's tokens.
        """
        first = np.searchsorted(self.ends, self.starts, "right").tolist()
        stops = self.starts + self.length + beyond
        last = np.searchsorted(self.ends, stops, "left").tolist()
        # of document d at d, and its end at d + 1
        begins = np.concatenate([[0], self.ends]).tolist()
        return [
            [
                (
                    d,
                    max(start, begins[d]) - begins[d],
                    min(stop, begins[d + 1]) - begins[d],
                )
                for d in range(low, high + 1)
            ]
            for start, stop, low, high in zip(
                self.starts.tolist(),
                stops.tolist(),
                first,
                last,
                strict=True,
            )
        ]

    def identifiers(self) -> list[str]:
        rows = self._pieces(0)
        low = rows[0][0][0] if rows else 0
        names = self.documents.take(
            slice(low, rows[-1][-1][0] + 1 if rows else 0)
        ).identifiers()
        return [
            "+".join(f"{names[d - low]}[{start}:{stop}]" for d, start, stop in row)
            for row in rows
        ]

    def read(self) -> Rows:
        rows = self._pieces(1)
        shape = (len(self), self.length)
        needed = sorted({d for row in rows for d, _, _ in row})
        contents = self.documents.take(np.array(needed)).read()
        assert isinstance(contents, list)
        documents = dict(zip(needed, contents, strict=True))
        for d, tokens in documents.items():
            expected = (
                self.ends[d] - (self.ends[d - 1] if d else 0) - (self.end is not None)
            )
            if len(tokens) != expected:
                raise DataError(
                    f"a document has {len(tokens)} tokens, and had {expected} when it"
                    " was measured",
                    where=self.documents.take(slice(d, d + 1)).identifiers()[0],
                    remedy=(
                        "give documents whose length is the same whenever they are read"
                    ),
                )
        tokens = np.empty((len(self), self.length + 1), np.int32)
        numbers, positions = np.empty((2, len(self), self.length + 1), np.int32)
        for i, row in enumerate(rows):
            at = 0
            for number, (d, start, stop) in enumerate(row, 1):
                piece = documents[d][start:stop]
                to = at + stop - start
                tokens[i, at : at + len(piece)] = piece
                if at + len(piece) < to:
                    tokens[i, to - 1] = self.end
                if self.segments:
                    numbers[i, at:to], positions[i, at:to] = (
                        number,
                        np.arange(stop - start),
                    )
                at = to
        inputs, targets, *more = (
            aligned_empty(shape, np.int32) for _ in range(4 if self.segments else 2)
        )
        inputs[:] = tokens[:, :-1]
        targets[:] = tokens[:, 1:]
        if not self.segments:
            return inputs, targets
        more[0][:], more[1][:] = numbers[:, :-1], positions[:, :-1]
        return {"tokens": inputs, "segments": more[0], "positions": more[1]}, targets

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        raise AssertionError("rows are not filtered")


class PackStream:
    """Rows of `length` tokens of a stream of documents."""

    def __init__(
        self,
        stream: Stream,
        length: int,
        end: int | None,
        segments: bool,
    ):
        self.stream = stream
        self.length = length
        self.end = end
        self.segments = segments
        self._used = 0  # tokens of the next document that earlier rows had
        # of the next documents that have been measured, from the next document's start
        self._ends = np.empty(0, np.int64)
        lengths(stream.peek(1).read())  # for its error

    def peek(self, count: int) -> PackDraw:
        # the last row's last target is the token after it
        needed = self._used + count * self.length + 1
        while self._last < needed:
            known = len(self._ends)
            missing = needed - self._last
            more = min(missing, missing * known // max(self._last, 1) + 16)
            found = (
                self.stream.peek(known + more)
                .take(slice(known, None))
                .measured(self, lengths)
            )
            self._ends = np.concatenate(
                [self._ends, self._last + np.cumsum(found + (self.end is not None))]
            )
        ends = self._ends[: np.searchsorted(self._ends, needed, "left") + 1]
        starts = self._used + np.arange(count, dtype=np.int64) * self.length
        return PackDraw(
            self.stream.peek(len(ends)),
            ends,
            starts,
            self.length,
            self.end,
            self.segments,
        )

    @property
    def _last(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def advance(self, count: int) -> None:
        used = self._used + count * self.length
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

    def possible(self, tests: Sequence[Test]) -> bool:
        raise AssertionError("rows are not filtered")
