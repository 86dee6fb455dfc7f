"""Explanations as pictures, and as a part of a run's report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.errors import DataError, LeptonError, ModelError, writing_remedy
from lepton_jax.monitor import encode, plain, png, write_report
from lepton_jax.monitor.explained import FILE
from lepton_jax.ship.artifact.signature import INPUTS
from lepton_jax.ship.explain.attribution import Attribution
from lepton_jax.ship.explain.gradients import integrated_gradients
from lepton_jax.ship.explain.neighbours import nearest_examples
from lepton_jax.ship.explain.permutation import permutation_importance
from lepton_jax.train.judged import class_names

ROWS = 8  # that a report shows; assumption: what a person looks through
NEIGHBOURS = 3  # training pictures next to each; assumption
COLUMNS = 15  # of a table's importances, the largest; assumption
MOST_COLUMNS = 100  # that are put out of order, each in a second or so; assumption
ENTRIES = 8  # shares of a row of a table; assumption

# Colours of shares for and against an output, on white (assumption: told apart also by
# who can't see red and green).
FOR = np.array([202, 66, 37])
AGAINST = np.array([39, 104, 178])
WHITE = 255.0
BRIGHT = 128  # of bytes that are pixels as they are; smaller ones have another scale
FAINT = 0.35  # share of the picture that shines through; assumption
BRIGHTEST = 99.0  # percentile of the shares that has the full colour; assumption


def heat_map(
    picture: np.ndarray,
    shares: np.ndarray,
) -> np.ndarray:
    """Return shares over a faint picture, uint8 (height, width, 3).

    Red entries speak for the output, blue ones against it.

    Args:
      picture: (height, width) or (height, width, channels), any numbers.
      shares: of the same shape.
    """
    grey = png.as_pixels(_flat(picture, np.mean)).astype(np.float64)
    own = _flat(shares, np.sum)
    strongest = np.percentile(np.abs(own), BRIGHTEST)
    strength = np.clip(np.abs(own) / (strongest or 1), 0, 1)[..., None]
    colour = np.where(own[..., None] > 0, FOR, AGAINST)
    # a white picture on black, as MNIST's, becomes black on white
    under = WHITE - FAINT * grey[..., None]
    mixed = (1 - strength) * under + strength * colour
    return mixed.round().astype(np.uint8)


def write_explanations(
    trainer: Any,
    folder: str | Path,
    rows: int = ROWS,
) -> Path:
    """Explain test rows in a run's report, and return its path.

    Pictures get a map of what speaks for their prediction, with the training pictures
    that the model takes for alike; tables the importance of their columns, and the
    largest shares of some rows.

    Args:
      trainer: with the model and test rows in memory.
      folder: of the run.
      rows: that are shown, the first ones.

    Raises:
      DataError: there are no test rows in memory.
      ModelError: the model has several outputs, or has none.
      LeptonError: the folder can't be written.
    """
    folder = Path(folder)
    facts = explanations(trainer, rows)
    try:
        (folder / FILE).write_bytes(encode(plain(facts)))
    except OSError as error:
        raise LeptonError(
            f"the explanations can't be written: {error.strerror or error}",
            where=folder / FILE,
            remedy=writing_remedy(error),
        ) from error
    return write_report(folder)


def explanations(
    trainer: Any,
    rows: int = ROWS,
) -> dict[str, Any]:
    """Return what a report shows of explanations, as plain data."""
    test = trainer.recipe.test
    if not isinstance(test, Arrays):
        raise DataError(
            "there are no test rows in memory to explain",
            where="Recipe.test",
            remedy="give test as (inputs, targets)",
        )
    count = min(rows, len(test))
    inputs, targets = test.take(np.arange(count))
    found = integrated_gradients(trainer, inputs)
    named = inputs if isinstance(inputs, dict) else {INPUTS: inputs}
    outputs = trainer.program.trace.outputs
    classes = outputs.shape[-1] if len(outputs.shape) == 2 else 0
    words = class_names(trainer.recipe, classes)
    facts: dict[str, Any] = {
        "method": found.method,
        "steps": found.steps,
        "gap": float(found.gap.max()),
    }
    picture = next((n for n, x in named.items() if png.are_pictures(x)), None)
    shown = [_described(found, words, targets, at) for at in range(count)]
    if picture is None:
        for at, fields in enumerate(shown):
            fields["shares"] = found.ranked(at, ENTRIES)
        return facts | {"rows": shown, "columns": _importances(trainer, named)}
    examples = _examples(trainer, inputs, picture)
    _draw(shown, named[picture], found.values[picture])
    for at, fields in enumerate(shown):
        fields["examples"] = examples[at] if examples else []
    return facts | {"rows": shown}


# ---- internals ----


def _draw(
    shown: list[dict[str, Any]],
    pictures: np.ndarray,
    shares: np.ndarray,
) -> None:
    """Add each row's picture, and a map of what speaks for its prediction."""
    scale = scale_of(pictures)
    for fields, picture, share in zip(shown, pictures, shares, strict=True):
        fields["picture"] = _address(picture, scale)
        fields["map"] = png.address(png.encode(heat_map(picture, share)))


def _described(
    found: Attribution,
    words: list[str],
    targets: Any,
    row: int,
) -> dict[str, Any]:
    number = int(found.target[row])
    fields: dict[str, Any] = {
        "row": row,
        "output": float(found.outputs[row]),
        "baseline": float(found.baseline[row]),
        "explained": words[number] if number < len(words) else str(number),
    }
    is_class = isinstance(targets, np.ndarray) and targets.ndim == 1
    if is_class and targets.dtype.kind in "iu" and 0 <= targets[row] < len(words):
        fields["target"] = words[int(targets[row])]
    return fields


def _importances(
    trainer: Any,
    named: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    rows = [array for array in named.values() if array.ndim == 2]
    if sum(array.shape[1] for array in rows) > MOST_COLUMNS:
        return []  # texts have places, but no columns
    try:
        found = permutation_importance(trainer)
    except DataError:  # nor have other inputs of more dims
        return []
    return [one._asdict() for one in found[:COLUMNS]]


def _examples(
    trainer: Any,
    inputs: Any,
    picture: str,
) -> list[list[str]]:
    """Return the nearest training pictures of each row, as addresses."""
    train = trainer.recipe.train
    if not isinstance(train, Arrays):
        return []
    try:
        near = nearest_examples(trainer, inputs, count=NEIGHBOURS)
    except ModelError:
        return []
    known = train.inputs
    pictures = known[picture] if isinstance(known, Mapping) else known
    scale = scale_of(pictures)
    return [[_address(pictures[at], scale) for at in own] for own in near.numbers]


def scale_of(pictures: np.ndarray) -> tuple[float, float] | None:
    """Return what is black and what is white in pictures; None: 0 and 255."""
    low = float(pictures.min())
    high = float(pictures.max())
    return None if pictures.dtype == np.uint8 and high >= BRIGHT else (low, high)


def _address(
    picture: np.ndarray,
    scale: tuple[float, float] | None,
) -> str:
    return png.address(png.encode(png.as_pixels(picture, scale)))


def _flat(
    picture: np.ndarray,
    over: Any,
) -> np.ndarray:
    array = np.asarray(picture, np.float64)
    return over(array, axis=2) if array.ndim == 3 else array
