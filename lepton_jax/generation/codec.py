"""Text to tokens and back, by whatever tokenizer there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_jax.errors import DataError

# Tokens of the prompt that are decoded along, so that a piece keeps its leading space
# (SentencePiece drops that of a text's first piece); assumption.
CONTEXT = 8
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a character of which bytes are missing


class Characters:
    """Each character is a token; the alphabet is in the order of their numbers."""

    def __init__(self, alphabet: str):
        self.alphabet = alphabet
        self._numbers = {character: i for i, character in enumerate(alphabet)}

    def encode(
        self,
        text: str,
    ) -> list[int]:
        """Return the numbers of a text's characters.

        Raises:
          DataError: one is not in the alphabet.
        """
        strange = [c for c in text if c not in self._numbers]
        if strange:
            raise DataError(
                f"{strange[0]!r} is no character that the model was trained on",
                where=f"prompt, character {text.index(strange[0])}",
                remedy="leave it out, or replace it by one that is",
            )
        return [self._numbers[c] for c in text]

    def decode(
        self,
        tokens: Sequence[int],
    ) -> str:
        """Return the text of some tokens."""
        return "".join(self.alphabet[token] for token in tokens)

    def get_vocab_size(self) -> int:
        """Return how many characters there are."""
        return len(self.alphabet)


@dataclass(frozen=True)
class Codec:
    """A tokenizer, whichever library it is of.

    Attributes:
      tokenizer: of tokenizers, SentencePiece or transformers, `Characters`, or anything
        with `encode` and `decode`.
    """

    tokenizer: Any

    def encode(
        self,
        text: str,
    ) -> list[int]:
        """Return the tokens of a text."""
        encoded = self.tokenizer.encode(text)
        return [int(token) for token in getattr(encoded, "ids", encoded)]

    def decode(
        self,
        tokens: Sequence[int],
    ) -> str:
        """Return the text of some tokens."""
        return self.tokenizer.decode([int(token) for token in tokens])

    def text_after(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
    ) -> str:
        """Return the text of tokens that follow a prompt, without the prompt's."""
        context = list(prompt[-CONTEXT:])
        before = self.decode(context)
        whole = self.decode([*context, *tokens])
        if whole.startswith(before):
            return whole[len(before) :]
        return self.decode(tokens)

    @property
    def size(self) -> int | None:
        """Number of tokens; None: the tokenizer doesn't say."""
        for name in ("get_vocab_size", "get_piece_size", "__len__"):
            method = getattr(self.tokenizer, name, None)
            if callable(method):
                return int(method())
        return None

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokenizer's own end token, if it says which that is."""
        token = getattr(self.tokenizer, "eos_token_id", None)
        if token is None and callable(getattr(self.tokenizer, "eos_id", None)):
            token = self.tokenizer.eos_id()
        return () if token is None or token < 0 else (int(token),)


def codec_of(
    tokenizer: Any,
    preparation: Any,
) -> Codec | None:
    """Return the codec of a tokenizer, or of how a model's raw rows are prepared.

    Args:
      tokenizer: what somebody gave; None: nothing.
      preparation: a `lepton_jax.data.prepare.Serving`, or None.

    Returns:
      None: neither says how text becomes tokens.
    """
    if tokenizer is not None:
        return Codec(tokenizer)
    steps = getattr(getattr(preparation, "prepared", None), "steps", ())
    for fitted in steps:
        if type(fitted.step).__name__ == "CharacterTokens":
            codes = np.asarray(fitted.state["code"])
            return Codec(Characters("".join(map(chr, codes))))
    return None
