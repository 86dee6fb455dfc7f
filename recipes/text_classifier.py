"""Texts and their classes: sentences that praise or pan a film, say."""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import optax

import lepton_jax as lepton
from lepton_jax.errors import DataError, nearest

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

# The embedded texts: lines of modules of Python's standard library that are long and
# about different things. Assumption: every version has them.
MODULES = ("argparse", "tarfile", "typing", "xml.dom.minidom")
SHORTEST_LINE = 20  # characters; assumption: a shorter one could be of any module

TEST_SHARE = 0.1  # of the texts


def recipe(
    data: Path | None = None,
    text: str = "text",
    label: str = "file",
    vocab: int = 20_000,
    length: int = 64,
    dim: int = 64,
    hidden: int = 64,
    dropout: float = 0.5,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
    epochs: float = 3,
    steps: int | None = None,
    prepared: Path | None = None,
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Classify texts by their words.

    Without `data` it learns which of four modules of Python's standard library a line
    is from: 85 % of a held-out tenth, with 9 seconds of a CPU core's time, starting and
    compiling included:

        python tools/launch.py recipes/text_classifier.py

    With the sentences of rt-polarity, two files of a line each in an archive, it gets
    76 % of a held-out tenth right:

        python tools/launch.py recipes/text_classifier.py --data sentence_polarity.zip

    Args:
      data: text files, a folder or an archive of them, with a text on each line and a
        file for each class; or a table with a column of texts and one of classes.
      text: name of the column of texts.
      label: name of the column of classes; "file" is the name of the file.
      vocab: words that are told apart, the most frequent ones.
      length: words of a text that are looked at, from its beginning.
      dim: width of a word's embedding.
      hidden: units of the hidden layer.
      dropout: share of the units dropped.
      learning_rate: of AdamW at the start; it falls as a cosine to zero.
      batch_size: texts per step, over all devices.
      epochs: passes over the training texts.
      steps: length of the run in steps, instead of epochs.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, dropout and the order of the texts.
    """
    from lepton_jax.data import prepare
    from recipes import _tables

    source = _embedded() if data is None else _tables.texts(data)
    known = [column.name for column in source.columns()]
    for name in (text, label):
        if name not in known:
            raise DataError(
                f"there is no column {name!r}{nearest(name, known)}",
                where=data,
                remedy=f"the columns are {', '.join(known)}",
            )
    preparation = prepare.Preparation(
        {"texts": source},
        [
            prepare.DropMissing([text, label]),
            prepare.Split(test=TEST_SHARE, stratify=label),
            prepare.WordTokens(
                text,
                most=vocab,
                length=length,
            ),
            prepare.Classes(label),
        ],
        inputs=[text],
        target=label,
    )
    serving = _tables.prepared(
        preparation,
        text,
        prepared,
        {},
    )
    print(
        _tables.twice({"texts": source}),
        file=sys.stderr,
    )
    train = serving.split("train")
    total = steps or math.ceil(epochs * len(train) / batch_size)

    return lepton.Recipe(
        name="text_classifier",
        model=partial(
            lepton.models.BagOfWords,
            len(serving.words),
            _rows(serving),
            dim=dim,
            hidden=(hidden,),
            dropout=dropout,
        ),
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.adamw,
        learning_rate=optax.cosine_decay_schedule(learning_rate, total),
        train=train,
        test=serving.split("test"),
        preparation=serving,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        save_every=save_every,
        seed=seed,
    )


def _rows(serving: Any) -> int:
    """Return the rows of the embedding: the words, padding, and the unknown word."""
    step = serving.prepared.steps[2]
    return step.state.height + 2


def _embedded() -> Any:
    """Return lines of some modules, and the module of each."""
    from lepton_jax.data.readers import reader_of

    rows = []
    for name in MODULES:
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        lines = (
            Path(found.origin)
            .read_text(
                encoding="utf-8",
            )
            .splitlines()
        )
        stripped = [line.strip() for line in lines]
        long = dict.fromkeys(line for line in stripped if len(line) >= SHORTEST_LINE)
        rows += [{"text": line, "file": name} for line in long]
    return reader_of(rows, name="Python's standard library")
