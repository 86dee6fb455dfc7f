"""Generate text, or tokens, with a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.errors import DataError, ModelError, SettingError
from lepton_jax.generation.codec import Codec, codec_of
from lepton_jax.generation.engine import Draws, Engine
from lepton_jax.generation.filters import WHERE, Sampling
from lepton_jax.generation.source import Source, source_of
from lepton_jax.generation.text import RowText, is_whole, prompt_row
from lepton_jax.trainer import Trainer

# Tokens of a call where somebody looks at them in between: of a stream, or for stop
# strings. A call costs about as much as 0.1 to 1 token; assumption.
CHUNK = 16
# A prompt is filled up to a power of two, from 1,024 tokens on to a multiple of that,
# and a cache to a multiple of 32 slots, so that few programs are compiled. Assumption.
LEAST_WIDTH = 16
MOST_WIDTH = 1024
SLOTS = 32
MOST_SLOTS = 2**31 - 1  # of a cache whose model has no learned positions: int32
ENGINES = 32  # compiled pairs of programs that are kept; assumption

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Generated:
    """The tokens that follow one prompt.

    Attributes:
      tokens: int32, with the end token or the one that completed a stop string, if one
        did.
      text: of the tokens, without a stop string; None: without a tokenizer.
      reason: why it ended: "length", "end" (an end token) or "stop" (a stop string).
    """

    tokens: np.ndarray
    text: str | None
    reason: str


@dataclass(frozen=True)
class Piece:
    """A part of a stream.

    Attributes:
      row: number of the prompt.
      tokens: that came, int32.
      text: that is certain since the row's last piece; "" without a tokenizer. Behind
        the tokens where a stop string may have begun, or a character is unfinished.
      reason: None; of a row's last piece as in `Generated`.
    """

    row: int
    tokens: np.ndarray
    text: str
    reason: str | None = None


def generate(
    model: Any,
    prompts: Any,
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: str | Sequence[str] = (),
    end: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    tokenizer: Any = None,
    vocab: int | None = None,
    cached: bool | None = None,
    stream: bool = False,
) -> Any:
    """Generate tokens after prompts.

    The rows of a batch have nothing to do with each other: what comes after a prompt
    does not depend on the others, but for its random numbers, which depend on the seed
    and the row's number, or on the row's own seed alone.

    The first call compiles two programs; a later one with another temperature, top_p,
    min_p, seed, or prompts of a similar length uses them again.

    Args:
      model: a Trainer; or an NNX module that maps tokens (rows, length) to logits, and
        keeps to the cache contract of `lepton_jax.models.TransformerLM`, or has no
        cache.
      prompts: a text or token ids; or a list of them, a row each, of any lengths.
      tokens: to generate at most, for each prompt.
      temperature: the logits are divided by it; 0: the most probable token.
      top_k: how many of the most probable tokens can be drawn; None: all.
      top_p: the fewest most probable tokens that together reach this share can be
        drawn; None: all.
      min_p: tokens can be drawn that have this share of the greatest probability; None:
        all.
      stop: strings before which the text ends.
      end: token ids after which a row ends. None: the tokenizer's own.
      seed: of the random numbers; or one for each row.
      tokenizer: with `encode` and `decode`: of tokenizers, SentencePiece, transformers
        or your own. None: as the trainer's raw rows are prepared, if that is by
        characters.
      vocab: token ids from this one on are padding of the head, and never drawn. None:
        the tokenizer's, or none is.
      cached: whether to keep keys and values; False computes the whole row for each
        token. None: if the model can.
      stream: whether to return an iterator of pieces.

    Returns:
      A `Generated`, or a list of them for a list of prompts; with `stream` an iterator
      of `Piece`s, a row's last one with a reason.

    Raises:
      SettingError: a setting is out of its range, or does not fit the others.
      DataError: a prompt is empty, or has a token that there is not.
      ModelError: the model maps no tokens to logits, has no cache where one is asked
        for, or its logits are not numbers.

    Example:
      >>> import lepton_jax as lepton
      >>> from flax import nnx
      >>> net = lepton.models.TransformerLM(
      ...     8, dim=16, layers=1, heads=2, rngs=nnx.Rngs(0)
      ... )
      >>> rows = lepton.generate(net, [[1, 2, 3], [4]], tokens=5)
      >>> [len(row.tokens) for row in rows]
      [5, 5]
    """
    preparation = model.preparation if isinstance(model, Trainer) else None
    codec = codec_of(tokenizer, preparation)
    is_one, rows = _rows(prompts, codec)
    job = _Job(
        rows,
        _count(tokens),
        Sampling(temperature, top_k, top_p, min_p),
        codec,
        _stops(stop, codec),
        _ends(end, codec),
        _seeds(seed, len(rows)),
        vocab if vocab is not None or codec is None else codec.size,
        CHUNK if stream or stop else tokens,
    )
    pieces = job.pieces(model, cached)
    if stream:
        return pieces
    generated = _joined(pieces, len(rows), codec is not None)
    return generated[0] if is_one else generated


# ---- internals ----


class _Filled(NamedTuple):
    """Prompts as a compiled program takes them."""

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: dict[str, int]


@dataclass(frozen=True)
class _Job:
    """One call of `generate`, whose arguments are checked."""

    rows: Rows
    tokens: int
    sampling: Sampling
    codec: Codec | None
    stop: tuple[str, ...]
    ends: tuple[int, ...]
    seeds: np.ndarray
    vocab: int | None
    chunk: int

    def pieces(
        self,
        model: Any,
        cached: bool | None,
    ) -> Iterator[Piece]:
        """Check the model, and return an iterator that generates."""
        source, weights = source_of(model)
        engine = _engine_of(source, self._kept(), self.vocab, _mode(source, cached))
        head = engine.head(weights)
        _check_vocab(self.vocab, head)
        _check_length(self.rows, self.tokens, source.longest)
        _check_tokens(self.rows, self.vocab or head)
        if not self.rows:
            return iter(())
        return self._generated(engine, weights)

    def _kept(self) -> Sampling:
        """Return the sampling with the values that compiled programs don't depend on.

        They are set to one and the same value.
        """
        knobs = self.sampling.knobs()
        if not knobs:
            return Sampling()
        return Sampling(
            1.0,
            self.sampling.top_k,
            0.5 if "top_p" in knobs else None,
            0.5 if "min_p" in knobs else None,
        )

    def _generated(
        self,
        engine: Engine,
        weights: Any,
    ) -> Iterator[Piece]:
        texts = [RowText(self.codec, row, self.stop) for row in self.rows]
        open_rows = set(range(len(self.rows)))
        filled = self._filled(engine.source)
        draws = self._draws(len(filled.lengths))
        carry = None
        made = 0
        while open_rows:
            until = min(made + self.chunk, self.tokens)
            if carry is None and until == self.tokens:
                last = np.int32(until)
                carry = engine.whole(weights, *filled[:2], draws, last, **filled.sizes)
            else:
                carry = carry or engine.begin(weights, *filled[:2], **filled.sizes)
                carry = engine.decode(weights, carry, draws, np.int32(until))
            drawn, counts, ended, is_nan = jax.device_get(
                (carry.tokens, carry.counts, carry.ended, carry.is_nan)
            )
            _check_numbers(is_nan[: len(self.rows)])
            for row in sorted(open_rows):
                new = drawn[row, made : min(until, counts[row])]
                is_last = bool(ended[row]) or until == self.tokens
                piece = _piece(texts[row], row, new, bool(ended[row]), is_last)
                if piece.reason is not None:
                    open_rows.discard(row)
                yield piece
            made = until

    def _filled(self, source: Source) -> _Filled:
        """Return the prompts, filled up to a size that programs are compiled for."""
        lengths = [len(row) for row in self.rows]
        longest = source.longest or MOST_SLOTS
        width = min(_width(max(lengths) - 1) + 1, longest)
        needed = max(width, max(lengths) + self.tokens)
        slots = min(-(-needed // SLOTS) * SLOTS, longest)
        count = -(-len(self.rows) // source.rows) * source.rows

        tokens = np.zeros((count, width), np.int32)
        for number, row in enumerate(self.rows):
            tokens[number, : len(row)] = row
        filled = np.ones(count, np.int32)
        filled[: len(lengths)] = lengths
        room = -(-self.tokens // SLOTS) * SLOTS
        return _Filled(tokens, filled, {"slots": slots, "room": room})

    def _draws(
        self,
        count: int,
    ) -> Draws:
        seeds = np.zeros(count, np.uint32)
        seeds[: len(self.seeds)] = self.seeds
        return Draws(seeds, self.sampling.knobs(), np.asarray(self.ends, np.int32))


@lru_cache(maxsize=ENGINES)
def _engine_of(
    source: Source,
    sampling: Sampling,
    vocab: int | None,
    cached: bool,
) -> Engine:
    return Engine(source, sampling, vocab, cached)


def _piece(
    text: RowText,
    row: int,
    new: np.ndarray,
    ended: bool,
    is_last: bool,
) -> Piece:
    """Add new tokens to a row's text, and return what it makes of them."""
    before = text.count
    shown = text.add(new.tolist(), is_last)
    reason = None
    if text.stopped:
        reason = "stop"
    elif is_last:
        reason = "end" if ended else "length"
    return Piece(row, new[: text.count - before], shown, reason)


def _joined(
    pieces: Iterator[Piece],
    count: int,
    has_text: bool,
) -> list[Generated]:
    """Join the pieces of each row."""
    rows: list[list[Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        rows[piece.row].append(piece)

    def joined(row: list[Piece]) -> Generated:
        text = "".join(piece.text for piece in row)
        return Generated(
            np.concatenate([piece.tokens for piece in row]),
            text if has_text else None,
            row[-1].reason or "length",
        )

    return [joined(row) for row in rows]


def _width(tokens: int) -> int:
    """Return to how many tokens prompts are filled up; 0 for none."""
    if tokens > MOST_WIDTH:
        return -(-tokens // MOST_WIDTH) * MOST_WIDTH
    if not tokens:
        return 0
    return max(LEAST_WIDTH, 1 << (tokens - 1).bit_length())


# ---- checks of the arguments ----


def _rows(
    prompts: Any,
    codec: Codec | None,
) -> tuple[bool, Rows]:
    """Return whether there is one prompt, and the tokens of each."""
    is_one = isinstance(prompts, str) or _are_numbers(prompts)
    rows = [prompts] if is_one else list(prompts)
    return is_one, [prompt_row(row, number, codec) for number, row in enumerate(rows)]


def _are_numbers(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return False
    return np.ndim(prompt) == 1 if hasattr(prompt, "ndim") else _all_whole(prompt)


def _all_whole(prompt: Any) -> bool:
    return len(prompt) > 0 and all(is_whole(token) for token in prompt)


def _check_vocab(
    vocab: int | None,
    head: int,
) -> None:
    if vocab is not None and not 1 <= vocab <= head:
        raise SettingError(
            f"the vocabulary has {vocab} tokens, but the model logits for {head}",
            where=WHERE,
            remedy="give the model's own tokenizer, or vocab=...",
        )


def _check_length(
    rows: Rows,
    tokens: int,
    longest: int | None,
) -> None:
    needed = max(map(len, rows), default=0) + tokens
    if longest is not None and needed > longest:
        raise SettingError(
            f"the longest prompt and {tokens} tokens make {needed}, but the model has"
            f" positions for {longest}",
            where=WHERE,
            remedy="give a shorter prompt, or ask for fewer tokens",
        )


def _check_tokens(
    rows: Rows,
    vocab: int,
) -> None:
    for number, row in enumerate(rows):
        strange = [token for token in row if not 0 <= token < vocab]
        if strange:
            raise DataError(
                f"the prompt has the token {strange[0]}",
                where=f"prompt {number}",
                remedy=f"give tokens from 0 to {vocab - 1}",
            )


def _count(tokens: int) -> int:
    if not is_whole(tokens) or tokens < 1:
        raise SettingError(
            f"tokens is {tokens!r}; it must be a whole number of at least 1",
            where=WHERE,
            remedy="say how many tokens to generate, e.g. tokens=128",
        )
    return int(tokens)


def _stops(
    stop: str | Sequence[str],
    codec: Codec | None,
) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    stops = () if stop == "" else stops
    if not all(isinstance(text, str) and text for text in stops):
        raise SettingError(
            f"stop is {stop!r}",
            where=WHERE,
            remedy="give strings that are not empty",
        )
    if stops and codec is None:
        raise SettingError(
            "there are stop strings, but no tokenizer that makes text of tokens",
            where=WHERE,
            remedy="give tokenizer=..., or end=TOKEN in place of the stop strings",
        )
    return stops


def _ends(
    end: Any,
    codec: Codec | None,
) -> tuple[int, ...]:
    if end is None:
        return () if codec is None else codec.ends
    ends = (end,) if is_whole(end) else tuple(end)
    if not all(is_whole(token) and token >= 0 for token in ends):
        raise SettingError(
            f"end is {end!r}",
            where=WHERE,
            remedy="give a token id, or several",
        )
    return tuple(int(token) for token in ends)


def _seeds(
    seed: Any,
    count: int,
) -> np.ndarray:
    """Return a seed for each row."""
    if is_whole(seed):
        sequence = np.random.SeedSequence(abs(int(seed)))
        return sequence.generate_state(count, np.uint32) if count else np.zeros(0)
    seeds = list(seed)
    if len(seeds) != count or not all(is_whole(one) and one >= 0 for one in seeds):
        raise SettingError(
            f"seed is {seed!r} for {count} prompts",
            where=WHERE,
            remedy="give a whole number, or one of at least 0 for each prompt",
        )
    return np.asarray(seeds, np.uint32)


def _mode(
    source: Source,
    cached: bool | None,
) -> bool:
    has_cache = source.empty is not None
    if cached and not has_cache:
        raise ModelError(
            "the model has no cache",
            where=WHERE,
            remedy=(
                "give it empty_cache and the argument cache, as"
                " lepton_jax.models.TransformerLM has them; or leave cached out"
            ),
        )
    return has_cache if cached is None else cached


def _check_numbers(is_nan: np.ndarray) -> None:
    if is_nan.any():
        raise ModelError(
            f"the logits of row {np.flatnonzero(is_nan)[0]} are not numbers (NaN)",
            where=WHERE,
            remedy="look at the model's weights, and at the losses of its training",
        )
