"""The text of a row: its prompt, and as it grows pieces to show, and stop strings."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from lepton_jax.errors import DataError, SettingError
from lepton_jax.generation.codec import UNFINISHED, Codec


class RowText:
    """The text of one row, which grows token by token.

    With the stop string "END", a text that ends in "E" or "EN" is held back at that
    place until the next tokens say whether the string goes on:

    >>> class Letters:
    ...     def encode(self, text): return [ord(c) for c in text]
    ...     def decode(self, tokens): return "".join(map(chr, tokens))
    >>> row = RowText(Codec(Letters()), prompt=[], stop=("END",))
    >>> row.add([ord(c) for c in "a bE"]), row.add([ord("N")]), row.add([ord("D")])
    ('a b', '', '')
    >>> row.stopped, row.text, row.count
    (True, 'a b', 6)

    Args:
      codec: tokens to text; None: there is no text, and every piece of it is "".
      prompt: the tokens before.
      stop: strings before which the text ends.

    Attributes:
      text: so far, without a stop string.
      count: tokens up to the one that completed a stop string, or all.
      stopped: whether a stop string came.
    """

    def __init__(
        self,
        codec: Codec | None,
        prompt: Sequence[int],
        stop: Sequence[str],
    ):
        self._codec = codec
        self._prompt = prompt
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._shown = 0  # characters that were given out
        self.text = ""
        self.count = 0
        self.stopped = False

    def add(
        self,
        tokens: Sequence[int],
        last: bool = False,
    ) -> str:
        """Add tokens, and return the text that is certain by now.

        Args:
          tokens: the next ones.
          last: whether no more of them come.
        """
        if self.stopped:
            return ""
        self._tokens += tokens
        self.count = len(self._tokens)
        if self._codec is None:
            return ""
        self.text = self._text(self.count)
        if self._place(self.text) is not None:
            self.stopped = True
            self.count = self._completed(self.count - len(tokens))
            self.text = self._text(self.count)
            self.text = self.text[: self._place(self.text)]

        certain = len(self.text)
        if not self.stopped and not last:
            certain = self._certain()
        piece = self.text[self._shown : certain]
        self._shown = max(self._shown, certain)
        return piece

    def _text(
        self,
        count: int,
    ) -> str:
        assert self._codec is not None
        return self._codec.text_after(self._prompt, self._tokens[:count])

    def _place(
        self,
        text: str,
    ) -> int | None:
        """Return where the first stop string begins."""
        places = [text.find(stop) for stop in self._stop]
        return min((place for place in places if place >= 0), default=None)

    def _completed(
        self,
        before: int,
    ) -> int:
        """Return how many tokens it takes to complete a stop string."""
        for count in range(before + 1, len(self._tokens)):
            if self._place(self._text(count)) is not None:
                return count
        return len(self._tokens)

    def _certain(self) -> int:
        """Return how many characters no further token can take back."""
        whole = self.text.rstrip(UNFINISHED)
        held = [_overlap(whole, stop) for stop in self._stop]
        return len(whole) - max(held, default=0)


def prompt_row(
    prompt: Any,
    number: int,
    codec: Codec | None,
) -> list[int]:
    """Return the tokens of a prompt, a text or token ids.

    Args:
      prompt: the text or the token ids.
      number: of the prompt, for messages.
      codec: text to tokens, if anything is.

    Raises:
      SettingError: it is a text, and there is no codec.
      DataError: it has no token, or something else than whole numbers.
    """
    where = f"prompt {number}"
    if isinstance(prompt, str):
        if codec is None:
            raise SettingError(
                "a prompt is text, but there is no tokenizer",
                where=where,
                remedy="give tokenizer=... (--tokenizer FILE), or token ids"
                " (--prompt-tokens 1,2,3)",
            )
        prompt = codec.encode(prompt)
    if not all(is_whole(token) for token in prompt):
        raise DataError(
            f"the prompt is {prompt!r}",
            where=where,
            remedy="give a text, or token ids as whole numbers",
        )
    row = [int(token) for token in prompt]
    if not row:
        raise DataError(
            "the prompt has no token",
            where=where,
            remedy="begin with one, such as the tokenizer's token for a text's begin",
        )
    return row


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _overlap(
    text: str,
    stop: str,
) -> int:
    """Return the length of the longest end of a text that may begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    for length in range(longest, 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
