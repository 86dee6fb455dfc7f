"""Files of lines: pieces begin and end between two of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from lepton_jax.data.readers.counted import CountedReader
from lepton_jax.data.readers.delimited import SAMPLE, SAMPLE_PARTS
from lepton_jax.data.readers.dialect import LONGEST_ROW
from lepton_jax.data.readers.encoding import Encoding, encoding_of
from lepton_jax.data.readers.files import Stamp, Stored, digest
from lepton_jax.data.readers.reader import Piece
from lepton_jax.errors import DataError

HEAD = 2**20  # bytes by which the encoding is found; assumption


class Head(NamedTuple):
    """How a file of lines is read.

    Attributes:
      encoding: of its text.
      stamp: the file's state when this was found out.
    """

    encoding: Encoding
    stamp: Stamp


class LinesReader(CountedReader):
    """A file of lines.

    Args:
      stored: the file, or the entry of an archive.
      encoding: Python's name of the codec; None: found out.
      longest_row: bytes that a line may have.
    """

    def __init__(
        self,
        stored: Stored,
        encoding: str | None = None,
        longest_row: int = LONGEST_ROW,
    ):
        self.name = stored.name
        self.stored = stored
        self.encoding = encoding
        self.longest_row = longest_row
        self._head: Head | None = None
        self._pieces: dict[int, list[Piece]] = {}
        self._count: int | None = None

    @abstractmethod
    def rows_in(self, utf8: bytes) -> int:
        """Return how many rows some lines are."""

    def pieces(self, size: int) -> list[Piece]:
        if size not in self._pieces:
            self._pieces = {size: list(self._scan(size))}
        return self._pieces[size]

    def count(self) -> int:
        if self._count is None:
            self.pieces(SAMPLE)
        assert self._count is not None
        return self._count

    def head(self) -> Head:
        """Return how the file is read.

        Raises:
          DataError: the file is empty.
        """
        if self._head is None:
            stamp = self.stored.stamp()
            first = self.stored.read(0, HEAD)
            if not first.strip():
                raise DataError(
                    "the file is empty",
                    where=self.stored,
                    remedy="give a file with rows",
                )
            encoding = encoding_of(first, self.encoding, self.stored)
            self._head = Head(encoding, stamp)
        return self._head

    def content(self, piece: Piece) -> bytes:
        """Return a piece's lines in UTF-8, after the check that they are its own."""
        length = piece.stop - piece.start
        data = self.stored.read(piece.start, length)
        now = self.stored.stamp()
        is_sure = self.head().stamp.is_sure(now) and len(data) == length
        if not is_sure and digest(data) != piece.digest:
            raise self._changed()
        return self.decoded(data, piece.start)

    def decoded(
        self,
        data: bytes,
        position: int,
        is_whole: bool = True,
    ) -> bytes:
        """Return bytes of the file in UTF-8; those of UTF-8 are not checked.

        Args:
          data: the bytes.
          position: of the first one in the file.
          is_whole: whether the last character may not be cut.
        """
        encoding = self.head().encoding
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

    def samples(self, size: int) -> tuple[list[bytes], str]:
        """Return lines in UTF-8 by which types are inferred, and what part they are."""
        start = self.head().encoding.mark
        data = self.stored.read(start, size + 1)
        if len(data) <= size:
            return [self.decoded(data, start)], ""
        first = self.decoded(data[:size], start, is_whole=False)
        whole = self.head().stamp.size
        is_plain = self.head().encoding.name == "utf-8" and not self.stored.entry
        if not is_plain or self.stored.path.endswith((".gz", ".bz2", ".xz")):
            return [
                first[: first.rfind(b"\n") + 1]
            ], f"seen in the first {size:,} bytes"

        part = size // SAMPLE_PARTS
        step = (whole - part) // (SAMPLE_PARTS - 1)
        samples = []
        for i in range(SAMPLE_PARTS):
            text = self.stored.read(start * (i == 0) + i * step, part)
            begin = text.find(b"\n") + 1 if i else 0
            samples.append(text[begin : text.rfind(b"\n") + 1])
        return samples, f"seen in {size:,} of {whole:,} bytes"

    def line_before(self, position: int) -> int:
        """Return the count of newlines before a byte of the file."""
        lines = 0
        done = 0
        while done < position:
            block = self.stored.read(done, min(2**22, position - done))
            if not block:
                break
            utf8, used = self.head().encoding.to_utf8(block)
            lines += utf8.count(b"\n")
            done += used or len(block)
        return lines

    # ---- internals ----

    def _scan(self, size: int) -> Iterator[Piece]:
        encoding = self.head().encoding
        before = self.stored.stamp()
        position = encoding.mark
        row = 0
        data = b""
        want = size
        while True:
            data += self.stored.read(position + len(data), want - len(data))
            is_end = len(data) < want
            utf8 = self.decoded(data, position, is_whole=is_end)
            stop = len(utf8) if is_end else utf8.rfind(b"\n") + 1
            if not stop and not is_end:
                self._check_length(want, position)
                want *= 2
                continue
            length = encoding.length(utf8[:stop])
            rows = self.rows_in(utf8[:stop])
            if rows:
                hashed = digest(memoryview(data)[:length])
                end = position + length
                yield Piece(str(self.stored), position, end, row, hashed)
            position += length
            row += rows
            if is_end:
                break
            data = data[length:]
            want = max(size, len(data) + 1)
        self._count = row
        if self.stored.stamp()[:3] != before[:3]:
            raise self._changed()

    def _check_length(self, size: int, position: int) -> None:
        if size > self.longest_row:
            raise DataError(
                f"a line has more than {self.longest_row:,} bytes",
                where=f"{self.stored}, line {self.line_before(position) + 1}",
                remedy="write one row a line, or raise `longest_row`",
            )

    def _changed(self) -> DataError:
        return DataError(
            "the file changed while it was read",
            where=self.stored,
            remedy="read a copy that nobody writes to, or start again",
        )
