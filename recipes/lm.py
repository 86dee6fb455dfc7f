"""A language model of the Llama shape, from a laptop's to the largest."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax.data.idx import read_bytes
from lepton_jax.errors import DataError, RecipeError, nearest
from lepton_jax.step import optimizers

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

Size = Literal["1m", "10m", "124m", "1b", "8b", "70b", "405b"]
# Bytes of Python's standard library that are learned by default: its files differ in
# number and length by Python's version. Assumption: every version has as many.
EMBEDDED_BYTES = 4_000_000
TEST_SHARE = 0.1  # of a text: its end
PIECE_BYTES = 2**26  # of a text that are read at once; assumption
# Larger sizes have the vocabulary that they were published with.
SIZES_WITH_THE_TEXTS_VOCABULARY = ("1m", "10m")


class Usual(NamedTuple):
    """Settings that a size is usually trained with; each can be set."""

    length: int
    batch_size: int
    learning_rate: float
    loop: str
    precision: str


# Assumptions: settings with which models of these sizes are known to learn.
USUAL = {
    "1m": Usual(
        128,
        8,
        4e-3,
        "unrolled",
        "float32",
    ),
    "10m": Usual(
        256,
        64,
        1e-3,
        "unrolled",
        "float32",
    ),
    "124m": Usual(
        1024,
        512,
        6e-4,
        "unrolled",
        "bfloat16",
    ),
    "1b": Usual(
        4096,
        512,
        4e-4,
        "scan",
        "bfloat16",
    ),
    "8b": Usual(
        8192,
        512,
        3e-4,
        "scan",
        "bfloat16",
    ),
    "70b": Usual(
        8192,
        1024,
        1.5e-4,
        "scan",
        "bfloat16",
    ),
    "405b": Usual(
        8192,
        2048,
        8e-5,
        "scan",
        "bfloat16",
    ),
}


def recipe(
    size: Size = "1m",
    text: Path | None = None,
    tokenizer: Path | None = None,
    prepared: Path | None = None,
    vocab: int | None = None,
    experts: int = 0,
    chosen: int = 2,
    capacity: float = 1.25,
    dropless: bool = False,
    loop: Literal["unrolled", "scan"] | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    steps: int = 800,
    micro_batches: int | None = None,
    precision: Literal["float32", "bfloat16", "float16", "fp8", "int8"] | None = None,
    optimizer: Literal["adamw", "muon"] = "adamw",
    query_key_norm: bool = False,
    z_loss: float = 0.0,
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Predict the next character, or piece, of a text.

    By default, a million parameters learn the source of Python's standard library. They
    reach a loss of 1.49 per character, perplexity 4.4, on the held-out last tenth, in
    about a minute on two CPU cores:

        python tools/launch.py recipes/lm.py

    124m has the dims of GPT-2, 1b and above those of Llama 3, with their vocabularies;
    they learn little from the embedded text, but can be planned and timed with it.

    Args:
      size: of the model, in parameters.
      text: a file of text, a folder or an archive of them; if left out, the first 4 MB
        of Python's own standard library.
      tokenizer: a SentencePiece model file; if left out, each distinct character of the
        text is a token.
      prepared: folder for the prepared text, with a manifest of all that was done; if
        left out, it is removed at the end.
      vocab: rows of the token embedding; if left out, the text's own for 1m and 10m,
        and the size's from 124m on.
      experts: in place of each feed-forward layer, a mixture of this many of its
        width; 0 for none.
      chosen: experts that a token goes to.
      capacity: places at the experts, over what an even distribution of the tokens
        would take.
      dropless: let each expert take all tokens that choose it, whatever the capacity.
      loop: over the layers: unrolled, or a scan, which compiles faster. If left out, a
        scan from 1b on.
      length: tokens per sample; if left out, 128 (1m), 256 (10m), 1024 (124m), 4096
        (1b) or 8192.
      batch_size: samples per step, over all devices; if left out, from 8 (1m) to 2048
        (405b).
      learning_rate: of the optimizer at its peak; it rises over the first tenth of the
        run and falls as a cosine to a tenth. If left out, from 0.004 (1m) to 0.00008
        (405b).
      steps: length of the run.
      micro_batches: parts in which a batch passes through the model; if left out, as
        few as fit into memory.
      precision: dtype that the model computes in; if left out, float32 for 1m and 10m,
        bfloat16 from 124m on. With fp8 (GPUs) and int8 (TPUs) it is bfloat16, and
        training multiplies large kernels in 8 bits.
      optimizer: AdamW; or Muon for the kernels of the blocks, and AdamW for the rest.
      query_key_norm: normalize queries and keys, so that scores can't grow.
      z_loss: weight of the squared logarithm of the softmax's sum, e.g. 0.0001.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters and the order of the samples.
    """
    if size not in USUAL:
        raise RecipeError(
            f"size {size!r} is not known{nearest(str(size), USUAL)}",
            where="recipes/lm.py",
            remedy=f"use one of {', '.join(get_args(Size))}",
        )
    if experts < 0:
        raise RecipeError(
            f"experts is {experts}; it must be 0 or more",
            where="--experts",
            remedy="leave it out for none",
        )
    usual = _settled(
        USUAL[size],
        length=length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        loop=loop,
        precision=precision,
    )
    tokens, kinds, where, preparation = _tokens(
        text,
        tokenizer,
        prepared,
    )
    train, test = _windows(tokens, usual.length, where)
    shape = lepton.models.transformer_size(size) | {"loop": usual.loop}
    if query_key_norm:
        shape["query_key_norm"] = True
    shape["vocab"] = _rows(
        size,
        vocab,
        kinds,
        shape["vocab"],
        where,
    )

    model: Any = lepton.models.TransformerLM
    if experts:
        model = partial(
            lepton.models.MoELM,
            experts=experts,
            chosen=chosen,
            capacity=None if dropless else capacity,
        )

    loss = lepton.losses.cross_entropy
    if z_loss:
        loss = partial(lepton.losses.weighted_cross_entropy, z=z_loss)

    total = max(steps, 1)
    warmup = total // 10
    peak = usual.learning_rate
    return lepton.Recipe(
        name="lm",
        model=partial(model, **shape),
        loss=loss,
        metrics={"perplexity": lepton.metrics.perplexity},
        optimizer=_optimizer(optimizer),
        learning_rate=optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, total, 0.1 * peak
        ),
        clip_norm=1.0,
        train=train,
        test=test,
        preparation=preparation,
        batch_size=usual.batch_size,
        steps=steps,
        micro_batches=micro_batches,
        precision=usual.precision,
        save_every=save_every,
        seed=seed,
    )


def _optimizer(name: str) -> Any:
    """Return an optimizer as `Recipe` takes it.

    Muon's updates are scaled to the size of AdamW's, so that both take one rate and one
    weight decay (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
    """
    adamw = partial(optax.adamw, b2=0.95, weight_decay=0.1)
    if name == "adamw":
        return adamw
    if name != "muon":
        known = ("adamw", "muon")
        raise RecipeError(
            f"optimizer {name!r} is not known{nearest(str(name), known)}",
            where="--optimizer",
            remedy=f"use one of {', '.join(known)}",
        )
    muon = partial(optimizers.muon, weight_decay=0.1, consistent_rms=0.2)
    return optimizers.by_part({"blocks/*/kernel": muon}, default=adamw)


def _settled(usual: Usual, **given: Any) -> Usual:
    """Return what a size is usually trained with, but for the settings given."""
    return usual._replace(
        **{k: v for k, v in given.items() if v is not None},
    )


def _rows(
    size: Size,
    vocab: int | None,
    kinds: int,
    rows_of_size: int,
    where: str,
) -> int:
    """Return the rows of the token embedding.

    Args:
      size: of the model.
      vocab: the rows that were asked for, if any.
      kinds: different tokens of the text or the tokenizer.
      rows_of_size: rows that a model of this size has as published.
      where: the text, for messages.
    """
    rows = rows_of_size
    if vocab is not None:
        rows = vocab
    elif size in SIZES_WITH_THE_TEXTS_VOCABULARY:
        rows = kinds

    if rows < kinds:
        raise DataError(
            f"there are {kinds} different tokens, but the embedding has {rows} rows",
            where=where,
            remedy=f"set vocab to {kinds} or more",
        )
    return rows


# ---- from a text to samples ----


class Tokens(NamedTuple):
    """A text as tokens.

    Attributes:
      tokens: int32.
      kinds: how many different ones there can be.
      where: the text, for messages.
      serving: the way from raw rows to tokens; None with a tokenizer, and without the
        library that prepares.
    """

    tokens: np.ndarray
    kinds: int
    where: str
    serving: Any = None


def _tokens(
    text: Path | None,
    tokenizer: Path | None,
    out: Path | None,
) -> Tokens:
    """Return the tokens of a text, or of Python's standard library."""
    if text is None:
        content = _embedded()
        where = "Python's standard library"
    else:
        content = _read(text)
        where = str(text)
    if tokenizer is not None:
        return Tokens(*_pieces(content, tokenizer), where)
    if text is not None:
        return _prepared(_reader(text), where, out)
    if importlib.util.find_spec("polars") is None:
        # The embedded text needs no library. What is generated is then tokens.
        return Tokens(*_characters(content), where)
    import polars

    return _prepared(polars.DataFrame({"text": [content]}), where, out)


def _prepared(
    source: Any,
    where: str,
    out: Path | None,
) -> Tokens:
    """Prepare a text character by character.

    Args:
      source: a reader of it, or a table with it.
      where: the text, for messages.
      out: folder for the prepared text; None: one that is removed at the end.
    """
    from lepton_jax.data import prepare
    from recipes import _tables

    preparation = prepare.Preparation(
        {"text": source},
        [prepare.CharacterTokens("text")],
        inputs=["text"],
    )
    serving = _tables.prepared(
        preparation,
        "text",
        out,
        {},
    )
    rows = serving.prepared.table("train")["text"]
    tokens = rows.explode().drop_nulls().to_numpy()
    kinds = serving.prepared.steps[0].state.height
    return Tokens(tokens, kinds, where, serving)


def _reader(text: Path) -> Any:
    from lepton_jax.data.readers import reader_of

    return reader_of(text, format="text", rows="file")


def _windows(
    tokens: np.ndarray, length: int, where: str
) -> tuple[lepton.data.Arrays, lepton.data.Arrays]:
    """Return consecutive samples to train on and to test on: views, not copies.

    Inputs and targets are int32 (n, length); the targets are the next tokens.
    """
    if length < 1:
        raise RecipeError(
            f"length is {length}; it must be at least 1",
            where="recipes/lm.py",
            remedy="set e.g. length=256",
        )
    count = (len(tokens) - 1) // length
    if count < 2:
        remedy = "give a longer text"
        if len(tokens) > 2:
            remedy += f", or set length to {(len(tokens) - 1) // 2} or less"
        raise DataError(
            f"the text has {len(tokens):,} tokens, but a sample to train on and one to"
            f" test on take {2 * length + 1:,}",
            where=where,
            remedy=remedy,
        )
    inputs = tokens[: count * length].reshape(
        count,
        length,
    )
    targets = tokens[1 : count * length + 1].reshape(
        count,
        length,
    )
    cut = count - max(
        1,
        round(TEST_SHARE * count),
    )
    return (
        lepton.data.Arrays(
            inputs[:cut],
            targets[:cut],
        ),
        lepton.data.Arrays(
            inputs[cut:],
            targets[cut:],
        ),
    )


def _embedded() -> str:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    content = b"".join(file.read_bytes() for file in files)[:EMBEDDED_BYTES]
    if not content:
        raise RecipeError(
            "this Python comes without the source of its standard library",
            where=sysconfig.get_paths()["stdlib"],
            remedy="give --text, a file of text",
        )
    return content.decode("ascii", "ignore")


def _read(path: Path) -> str:
    """Return the content of a text file, or of all files of a folder or an archive."""
    reader = _reader(path)
    tables = [reader.read(piece).table for piece in reader.pieces(PIECE_BYTES)]
    content = "".join(text for table in tables for text in table["text"])
    if not content:
        raise DataError("the file is empty", where=path, remedy="give a file of text")
    return content


def _characters(content: str) -> tuple[np.ndarray, int]:
    """Return a text's characters as tokens int32, and how many different ones occur.

    They are numbered by code point: in "abca", a is 0, b is 1 and c is 2.
    """
    codes = np.frombuffer(
        content.encode("utf-32-le", "surrogatepass"),
        np.uint32,
    )
    occurs = np.zeros(
        codes.max() + 1,
        bool,
    )
    occurs[codes] = True

    numbers = (
        np.cumsum(
            occurs,
            dtype=np.int32,
        )
        - 1
    )
    return numbers[codes], int(occurs.sum())


def _pieces(
    content: str,
    path: Path,
) -> tuple[np.ndarray, int]:
    """Return a text's tokens int32 by a SentencePiece model, and the model's pieces."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise RecipeError(
            "sentencepiece, which reads tokenizers, is not installed",
            where="--tokenizer",
            remedy="pip install -e '.[text]', or leave the tokenizer out",
        ) from error
    blob = read_bytes(path)
    try:
        pieces = SentencePieceProcessor(model_proto=blob)
        return np.asarray(
            pieces.encode(content),
            np.int32,
        ), pieces.get_piece_size()
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"the file is no SentencePiece model: {error}",
            where=path,
            remedy="give the .model file that sentencepiece wrote",
        ) from error
