"""The encoding of a text file, and its bytes as UTF-8."""

from __future__ import annotations

import codecs
from typing import NamedTuple

from lepton_jax.errors import DataError

# Marks at a file's beginning. In this order, as that of UTF-32 begins with that of
# UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# Share of zero bytes at even or odd places that UTF-16 of Western text has, without a
# mark. Assumption: far above what a damaged file of one-byte text has.
ZERO_SHARE = 0.3
LEAST_PAIRS = 2  # of bytes, to tell UTF-16 by


class Encoding(NamedTuple):
    """The encoding of a text file.

    Attributes:
      name: Python's name of the codec.
      mark: bytes before the text.
      reason: why it is this one.
    """

    name: str
    mark: int
    reason: str

    def to_utf8(self, data: bytes) -> tuple[bytes, int]:
        """Return bytes in UTF-8.

        Args:
          data: bytes, the last character of which may be cut.

        Returns:
          (UTF-8, bytes of `data` that it stands for)

        Raises:
          UnicodeDecodeError: these bytes are not of the encoding.
        """
        if self.name == "utf-8":
            return data, len(data)
        decoder = codecs.getincrementaldecoder(self.name)("strict")
        text = decoder.decode(data)
        cut = len(decoder.getstate()[0])
        return text.encode("utf-8", "surrogatepass"), len(data) - cut

    def length(self, utf8: bytes) -> int:
        """Return how many bytes of the file some UTF-8 stands for."""
        if self.name == "utf-8":
            return len(utf8)
        text = utf8.decode("utf-8", "surrogatepass")
        return len(text.encode(self.name))


def encoding_of(
    sample: bytes,
    name: str | None,
    where: object,
) -> Encoding:
    """Find the encoding of a text file.

    Args:
      sample: the beginning of the file, perhaps all of it.
      name: of the encoding, if somebody has set it.
      where: the file, for messages.

    Raises:
      DataError: there is no encoding of this name.
    """
    mark, marked = next(
        ((mark, marked) for mark, marked in MARKS if sample.startswith(mark)),
        (b"", ""),
    )
    if name is not None:
        codec = _codec(name, where)
        mark_fits = codec.startswith(marked.removesuffix("-le").removesuffix("-be"))
        if marked and mark_fits:
            return Encoding(marked, len(mark), "set, with a mark")
        return Encoding(codec, 0, "set")
    if marked:
        return Encoding(marked, len(mark), "the file's mark says so")

    wide = _wide(sample)
    if wide:
        return Encoding(wide, 0, "every other byte is zero")
    if _is_utf8(sample):
        return Encoding("utf-8", 0, "all bytes are UTF-8")
    return _one_byte(sample)


# ---- internals ----


def _codec(name: str, where: object) -> str:
    try:
        found = codecs.lookup(name).name
        "a".encode(found)
    except (LookupError, UnicodeError, TypeError, ValueError) as error:
        raise DataError(
            f"there is no encoding {name!r}",
            where=where,
            remedy="use utf-8, utf-16, latin-1, cp1252, ... or leave it out",
        ) from error
    return {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(
        found, found
    )


def _wide(sample: bytes) -> str:
    """Return UTF-16's or UTF-32's name if the zeros in a sample show it."""
    if b"\0" not in sample:
        return ""
    quads = len(sample) // 4
    pairs = len(sample) // 2
    if quads >= LEAST_PAIRS:
        if (
            sample[2 : quads * 4 : 4].count(0)
            == sample[3 : quads * 4 : 4].count(0)
            == (quads)
        ):
            return "utf-32-le"
        if (
            sample[0 : quads * 4 : 4].count(0)
            == sample[1 : quads * 4 : 4].count(0)
            == (quads)
        ):
            return "utf-32-be"
    if pairs < LEAST_PAIRS:
        return ""
    even = sample[0 : pairs * 2 : 2].count(0) / pairs
    odd = sample[1 : pairs * 2 : 2].count(0) / pairs
    if odd > ZERO_SHARE and even < odd / 4:
        return "utf-16-le"
    if even > ZERO_SHARE and odd < even / 4:
        return "utf-16-be"
    return ""


def _is_utf8(sample: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


def _one_byte(sample: bytes) -> Encoding:
    """Return the encoding of text that is not UTF-8 throughout.

    If some of its characters are well-formed UTF-8 of several bytes, the text is UTF-8
    with damaged places, which is told when these are read.
    """
    text = sample.decode("utf-8", "replace")
    if any(char > "\x7f" and char != "\ufffd" for char in text):
        return Encoding("utf-8", 0, "most bytes are UTF-8")
    # 0x80 to 0x9f are the euro, quotes and dashes of Windows; nothing in Latin-1.
    if any(0x80 <= byte < 0xA0 for byte in set(sample)):
        try:
            sample.decode("cp1252")
        except UnicodeDecodeError:
            return Encoding("utf-8", 0, "no encoding fits")
        return Encoding("cp1252", 0, "bytes that are not UTF-8, but Windows'")
    return Encoding("latin-1", 0, "bytes that are not UTF-8, but Latin-1")
