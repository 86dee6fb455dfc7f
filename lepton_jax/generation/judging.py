"""How probable a model finds texts: perplexity, and the choice among answers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.errors import DataError, SettingError
from lepton_jax.generation.codec import Codec, codec_of
from lepton_jax.generation.source import Source, source_of
from lepton_jax.generation.text import prompt_row
from lepton_jax.trainer import Trainer

# Tokens that go through the model at once; assumption: logits of a vocabulary of
# 128,256 take 2 GiB then.
TOKENS_AT_ONCE = 4096
MOST_WIDTH = 2**31 - 1  # of rows, where positions are not learned: int32
WIDTH = 32  # rows are filled up to a multiple of it, so that few programs are compiled


@dataclass(frozen=True)
class Perplexity:
    """A measure of how well a model predicts texts.

    Attributes:
      perplexity: exp of the mean loss.
      loss: mean of -log p of a token, in nats.
      tokens: how many tokens were predicted.
    """

    perplexity: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class Choices:
    """The answers that a model chose.

    Attributes:
      chosen: number of the answer to each question, int64 (questions,).
      scores: of each question's answers, float64 each.
      accuracy: share of right ones; None: the right ones were not given.
    """

    chosen: np.ndarray
    scores: list[np.ndarray]
    accuracy: float | None


class Question(NamedTuple):
    """A text, and answers that may follow it.

    Attributes:
      text: before the answers; or token ids.
      answers: texts; or token ids.
    """

    text: Any
    answers: Sequence[Any]


def perplexity(
    model: Any,
    texts: Any,
    *,
    length: int = 1024,
    stride: int | None = None,
    tokenizer: Any = None,
) -> Perplexity:
    """Return how well a model predicts texts, each by itself.

    Every token but a text's first is predicted once. A text that is longer than the
    window is read in windows, which begin `stride` tokens apart: a token sees at least
    length - stride tokens before it, but for those at the beginning of its text.

    Args:
      model: as in `generate`.
      texts: a text or token ids, or a list of them.
      length: tokens of a window.
      stride: tokens between windows. None: half the length.
      tokenizer: as in `generate`.

    Raises:
      SettingError: the stride is longer than the window, or below 1.
      DataError: there is no token to predict.
    """
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride < length:
        raise SettingError(
            f"the windows have {length} tokens and begin {stride} apart",
            where="perplexity",
            remedy="give a stride of at least 1 and below the length",
        )
    codec = _codec(model, tokenizer)
    is_one = isinstance(texts, str) or np.ndim(texts[0]) == 0
    rows = [
        prompt_row(text, n, codec)
        for n, text in enumerate([texts] if is_one else texts)
    ]
    windows = [window for row in rows for window in _windows(row, length, stride)]
    total = 0.0
    count = 0
    for logs, new in _log_probabilities(model, windows):
        total -= logs
        count += new
    if not count:
        raise DataError(
            "there is no token to predict",
            where="perplexity",
            remedy="give texts of at least two tokens",
        )
    loss = total / count
    return Perplexity(math.exp(loss), loss, count)


def multiple_choice(
    model: Any,
    questions: Iterable[Question | tuple[Any, Sequence[Any]]],
    right: Sequence[int] | None = None,
    *,
    per: Literal["answer", "token", "character"] = "answer",
    tokenizer: Any = None,
) -> Choices:
    """Let a model choose the most probable answer to each question.

    Args:
      model: as in `generate`.
      questions: pairs (text, answers), of texts or token ids.
      right: number of the right answer to each.
      per: what a score is: the log probability of the whole answer, or that over its
        tokens or its characters, so that long answers have no disadvantage.
      tokenizer: as in `generate`.

    Raises:
      DataError: a question has no answers, or an answer no token.
      SettingError: there is no such score, or there are more right answers than
        questions, or fewer.
    """
    if per not in ("answer", "token", "character"):
        raise SettingError(
            f"per is {per!r}",
            where="multiple_choice",
            remedy='give "answer", "token" or "character"',
        )
    codec = _codec(model, tokenizer)
    asked = [Question(*question) for question in questions]
    windows: list[Window] = []
    for number, question in enumerate(asked):
        if not len(question.answers):
            raise DataError(
                "the question has no answers",
                where=f"question {number}",
                remedy="give at least one",
            )
        windows += [
            _window(question.text, answer, codec) for answer in question.answers
        ]

    found = iter(list(_log_probabilities(model, windows)))
    scores = [
        np.array([_score(next(found), answer, per) for answer in question.answers])
        for question in asked
    ]
    chosen = np.array([each.argmax() for each in scores], np.int64)
    return Choices(chosen, scores, _accuracy(chosen, right))


# ---- internals ----


class Window(NamedTuple):
    """Tokens of which those from `start` on are counted."""

    tokens: Sequence[int]
    start: int


def _codec(
    model: Any,
    tokenizer: Any,
) -> Codec | None:
    preparation = model.preparation if isinstance(model, Trainer) else None
    return codec_of(tokenizer, preparation)


def _windows(
    row: Sequence[int],
    length: int,
    stride: int,
) -> Iterator[Window]:
    counted = 1  # nothing predicts a text's first token
    for begin in range(0, len(row), stride):
        if counted >= len(row):
            return
        tokens = row[begin : begin + length]
        yield Window(tokens, counted - begin)
        counted = begin + len(tokens)


def _window(
    text: Any,
    answer: Any,
    codec: Codec | None,
) -> Window:
    """Return a question with an answer, as tokens.

    A text and its answer become tokens together, as tokenizers may join their letters.
    """
    context = prompt_row(text, 0, codec)
    if isinstance(text, str) and isinstance(answer, str):
        whole = prompt_row(text + answer, 0, codec)
    else:
        whole = [*context, *prompt_row(answer, 0, codec)]
    if len(whole) <= len(context):
        raise DataError(
            f"the answer {answer!r} has no token of its own",
            where="multiple_choice",
            remedy="move some of the question's text into the answers",
        )
    return Window(whole, len(context))


def _score(
    found: tuple[float, int],
    answer: Any,
    per: str,
) -> float:
    logs, count = found
    if per == "token":
        return logs / count
    return logs / len(answer) if per == "character" else logs


def _accuracy(
    chosen: np.ndarray,
    right: Sequence[int] | None,
) -> float | None:
    if right is None:
        return None
    if len(right) != len(chosen):
        raise SettingError(
            f"there are {len(right)} right answers to {len(chosen)} questions",
            where="multiple_choice",
            remedy="give the number of the right one for each question",
        )
    return float(np.mean(chosen == np.asarray(right)))


def _log_probabilities(
    model: Any,
    windows: Sequence[Window],
) -> Iterator[tuple[float, int]]:
    """Return the sum of log p of each window's counted tokens, and their count."""
    source, weights = source_of(model)
    run = _compiled(source)
    for part in _batches(windows, source.rows):
        longest = max(len(window.tokens) for window in part)
        if longest > (source.longest or longest):
            raise SettingError(
                f"a text has {longest} tokens, but the model has positions for"
                f" {source.longest}",
                where="perplexity, multiple_choice",
                remedy="give a shorter window, or shorter questions",
            )
        width = min(-(-longest // WIDTH) * WIDTH, source.longest or MOST_WIDTH)
        rows = -(-len(part) // source.rows) * source.rows
        tokens = np.zeros((rows, width), np.int32)
        counts = np.zeros((rows, width), bool)
        for number, window in enumerate(part):
            end = len(window.tokens)
            tokens[number, :end] = window.tokens
            counts[number, window.start : end] = True
        logs = np.asarray(run(weights, tokens, counts), np.float64)
        for number, window in enumerate(part):
            yield float(logs[number]), len(window.tokens) - window.start


def _batches(
    windows: Sequence[Window],
    rows: int,
) -> Iterator[Sequence[Window]]:
    """Cut windows into runs of about `TOKENS_AT_ONCE` tokens, in their order."""
    longest = max((len(window.tokens) for window in windows), default=1)
    size = max(rows, TOKENS_AT_ONCE // max(longest, 1) // rows * rows)
    for begin in range(0, len(windows), size):
        yield windows[begin : begin + size]


_COMPILED: weakref.WeakKeyDictionary[Source, Any] = weakref.WeakKeyDictionary()


def _compiled(source: Source) -> Any:
    if source not in _COMPILED:
        _COMPILED[source] = _scorer(source)
    return _COMPILED[source]


def _scorer(source: Source) -> Any:
    forward = source.forward

    def run(
        weights: Any,
        tokens: jax.Array,
        counts: jax.Array,
    ) -> jax.Array:
        params, variables = weights
        logits, _ = forward(params, variables, tokens, None)
        logits = logits[:, :-1]
        own = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        logs = own - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(counts[:, 1:], logs, 0.0).sum(-1)

    if source.replicated is None:
        return source.jit(run)
    return source.jit(run, out_shardings=source.replicated)
