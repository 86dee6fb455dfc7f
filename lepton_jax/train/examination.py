"""A look at a network's test rows, as plain data for the report.

What it holds depends on the task:

    classes      confusion, or the worst pairs of many classes; calibration; worst rows
    binary       the same, of the classes 0 and 1
    quantities   predictions against targets, residuals; worst rows
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import DataError, LeptonError, ModelError, writing_remedy
from lepton_jax.monitor import encode, plain, png
from lepton_jax.monitor.examined import FILE, SAMPLES
from lepton_jax.train.judged import Judged

GENERATED = 64  # samples that are shown; assumption: a square that a page has room for
MOST_IN_A_MATRIX = 30  # classes; assumption: more can't be read as a picture
MOST_PAIRS = 20  # of classes that are mistaken; assumption
BINS = 15  # of the calibration, as Guo et al. 2017 (ICML), section 2, take them
MOST_POINTS = 500  # of predictions against targets; assumption
NARROWEST = 1e-6  # histogram, relative to its values: below, its bins have no width
RESIDUAL_BINS = 30  # assumption
WORST = 12  # rows of text or of a table; assumption
WORST_PICTURES = 24  # assumption
LARGEST_PICTURE = 96  # pixels in height and width
BRIGHT = 128  # of bytes that are pixels as they are; smaller ones have another scale
LONGEST_TEXT = 400  # characters of a cell
MOST_CELLS = 12  # of a row
MOST_NUMBERS = 12  # of an input that is shown as numbers
WHITE = 255  # the greatest level of a picture of whole numbers
SEED = 0  # of the points that are drawn
FARTHEST = 1e300  # distance of a prediction that is no number
LEAST = 1e-12  # of a probability, before its logarithm


def facts_of(judged: Judged, names: Sequence[str]) -> dict[str, Any]:
    """Return what the report shows of a network's test rows.

    Args:
      judged: the rows, with its outputs.
      names: of the classes, by their numbers; () where there are none.

    Returns:
      Plain data; {} for a task of another kind.
    """
    samples = judged.samples
    outputs = judged.outputs
    if samples.task == "other" or not isinstance(
        outputs,
        np.ndarray,
    ):
        return {}
    facts: dict[str, Any] = {
        "task": samples.task,
        "rows": len(samples),
        "total": samples.total,
    }
    if samples.task == "quantities":
        return facts | _of_quantities(judged, outputs)
    shares, targets = _shares(judged, outputs)
    known = list(names) if len(names) == shares.shape[1] else None
    words = known or [str(number) for number in range(shares.shape[1])]
    return facts | _of_classes(judged, shares, targets, words)


def write_examined(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write examined.json into a run's folder.

    Raises:
      LeptonError: it can't be written.
    """
    _write(folder / FILE, encode(plain(facts)))


def write_samples(folder: Path, pictures: np.ndarray) -> int:
    """Write generated pictures as a grid, samples.png, and return their number.

    Args:
      folder: of the run.
      pictures: (count, height, width) or (count, height, width, 1 or 3): floats from 0
        to 1, or uint8.

    Raises:
      ModelError: these are no pictures.
      LeptonError: they can't be written.
    """
    if not png.are_pictures(pictures):
        raise ModelError(
            f"samples(key, count) gives {pictures.dtype}{list(pictures.shape)}",
            where="Recipe.model",
            remedy=(
                "return pictures (count, height, width[, 1 or 3]): floats from 0 to 1,"
                " or uint8"
            ),
        )
    scale = None if pictures.dtype == np.uint8 else (0.0, 1.0)
    pixels = png.as_pixels(pictures, scale)
    _write(
        folder / SAMPLES,
        png.encode(png.grid(pixels)),
    )
    return len(pictures)


def _write(path: Path, content: bytes) -> None:
    try:
        part = path.with_name(path.name + ".part")
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise LeptonError(
            f"what the report shows can't be written: {error.strerror or error}",
            where=path,
            remedy=writing_remedy(error),
        ) from error


# ---- classes ----


def _shares(judged: Judged, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities (rows, classes) of the rows that count, and targets."""
    targets = judged.samples.targets
    outputs = np.asarray(outputs, np.float64)
    if judged.samples.task == "binary":
        # of several answers a row, each counts
        logits = outputs.reshape(-1)
        outputs = np.stack(
            [np.zeros_like(logits), logits],
            axis=1,
        )
        targets = targets.reshape(-1).astype(np.int64)
    exponents = np.exp(
        outputs
        - outputs.max(
            axis=1,
            keepdims=True,
        )
    )
    shares = exponents / exponents.sum(
        axis=1,
        keepdims=True,
    )
    return np.nan_to_num(shares), targets


def _of_classes(
    judged: Judged,
    shares: np.ndarray,
    targets: np.ndarray,
    names: list[str],
) -> dict[str, Any]:
    # a negative target is padding, or a row without a class
    counts = (targets >= 0) & (targets < len(names))
    predicted = shares.argmax(axis=1)
    losses = np.full(
        len(targets),
        -np.inf,
    )
    of_target = shares[counts, targets[counts]]
    losses[counts] = -np.log(
        np.maximum(
            of_target,
            LEAST,
        )
    )

    def described(row: int) -> dict[str, Any]:
        target = int(targets[row])
        return {
            "target": names[target],
            "predicted": names[int(predicted[row])],
            "probability": float(shares[row, target]),
        }

    rows = len(judged.samples)
    one_a_row = len(targets) == rows
    return {
        "classes": names if len(names) <= MOST_IN_A_MATRIX else [],
        "confusion": confusion(
            targets[counts],
            predicted[counts],
            names,
        ),
        "calibration": calibration(
            shares[counts],
            targets[counts],
        ),
        "worst": _worst(
            judged,
            losses,
            described,
        )
        if one_a_row
        else [],
        "measure": "loss",
    }


def confusion(
    targets: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
) -> dict[str, Any]:
    """Return which classes are mistaken for which.

    Args:
      targets: numbers of classes, (rows,).
      predicted: the same.
      names: of the classes.

    Returns:
      "matrix" (target, predicted) of counts, of at most 30 classes; and "pairs" that
      are mistaken most often: (target, predicted, rows, share of the target's rows).
    """
    classes = len(names)
    numbers, counts = np.unique(
        targets * classes + predicted,
        return_counts=True,
    )
    totals = np.bincount(targets, minlength=classes)
    matrix = None
    if classes <= MOST_IN_A_MATRIX:
        cells = np.zeros(classes**2, np.int64)
        cells[numbers] = counts
        matrix = cells.reshape(classes, classes).tolist()
    wrong = numbers // classes != numbers % classes
    order = np.argsort(
        -counts[wrong],
        kind="stable",
    )[:MOST_PAIRS]
    pairs = [
        [
            names[number // classes],
            names[number % classes],
            int(count),
            float(count / totals[number // classes]),
        ]
        for number, count in zip(
            numbers[wrong][order], counts[wrong][order], strict=True
        )
    ]
    return {"matrix": matrix, "pairs": pairs}


def calibration(shares: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Return how far the probability of the predicted class can be trusted.

    Returns:
      "bins" of equal width: [mean probability, share of hits, rows], those without a
      row left out; and "error", the expected calibration error: the mean distance of
      the two, weighted by rows (Guo et al. 2017, equation 3).
    """
    confidence = shares.max(axis=1)
    hits = shares.argmax(axis=1) == targets
    number = np.minimum(
        (confidence * BINS).astype(int),
        BINS - 1,
    )
    rows = np.bincount(number, minlength=BINS)
    known = rows > 0
    count = np.maximum(1, rows)
    mean = np.bincount(number, confidence, BINS) / count
    share = np.bincount(number, hits, BINS) / count
    error = float(
        (np.abs(mean - share) * rows).sum()
        / max(
            1,
            rows.sum(),
        )
    )
    bins = np.stack(
        [mean, share, rows],
        axis=1,
    )[known]
    return {"bins": bins.tolist(), "error": error}


# ---- quantities ----


def _of_quantities(judged: Judged, outputs: np.ndarray) -> dict[str, Any]:
    targets = np.asarray(
        judged.samples.targets,
        np.float64,
    )
    given = np.asarray(
        outputs,
        np.float64,
    ).reshape(targets.shape)
    apart = given - targets
    distances = _distances(apart, np.isfinite(targets))

    def described(row: int) -> dict[str, Any]:
        return {
            "target": _figures(targets[row]),
            "predicted": _figures(given[row]),
        }

    flat = np.flatnonzero(np.isfinite(apart.reshape(-1)))
    drawn = np.random.default_rng(SEED).permutation(flat)[:MOST_POINTS]
    residuals = apart.reshape(-1)[flat]
    histogram: dict[str, list] = {"counts": [], "edges": []}
    if len(flat):
        counts, edges = np.histogram(
            residuals,
            RESIDUAL_BINS,
            _ends(residuals),
        )
        histogram = {"counts": counts.tolist(), "edges": edges.tolist()}
    return {
        "values": len(flat),
        "points": np.stack(
            [targets.reshape(-1), given.reshape(-1)],
            1,
        )[drawn].tolist(),
        "residuals": histogram,
        "bias": float(residuals.mean()) if len(flat) else None,
        "worst": _worst(judged, distances, described),
        "measure": "distance",
    }


def _distances(apart: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return each row's largest distance of a prediction from its target, (rows,).

    Args:
      apart: prediction less target, (rows, ...).
      known: whether there is a target; a row without any is left out as -infinite.
    """
    distances = np.nan_to_num(np.abs(apart), nan=FARTHEST)
    distances = np.where(known, distances, -np.inf)
    return distances.reshape(len(apart), -1).max(axis=1)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of a histogram, apart also where all values are the same."""
    low = float(values.min())
    high = float(values.max())
    least = NARROWEST * max(
        abs(low),
        abs(high),
        1,
    )
    return (low, high) if high - low > least else (low - least, high + least)


def _figures(value: np.ndarray) -> str:
    return ", ".join(f"{one:.4g}" for one in np.ravel(value)[:MOST_NUMBERS])


# ---- the worst rows ----


def _worst(
    judged: Judged,
    badness: np.ndarray,
    described: Any,
) -> list[dict[str, Any]]:
    """Return the worst rows, as a person knows them.

    Args:
      judged: the rows.
      badness: of each row, (rows,); what is -infinite is none.
      described: the number of a row to facts about it.
    """
    most = max(WORST, WORST_PICTURES)
    order = np.argsort(
        -badness,
        kind="stable",
    )[:most]
    order = order[badness[order] > -np.inf]
    shown = _shown(judged, order)
    are_pictures = any("picture" in one for one in shown)
    count = WORST_PICTURES if are_pictures else WORST
    return [
        {"row": int(row), "bad": float(badness[row]), **described(int(row)), **looks}
        for row, looks in list(
            zip(
                order,
                shown,
                strict=True,
            )
        )[:count]
    ]


def _shown(judged: Judged, rows: np.ndarray) -> list[dict[str, Any]]:
    """Return rows as pictures, texts or cells: from the raw rows if they are known."""
    samples = judged.samples
    if samples.read_raw is not None:
        try:
            return [_raw(row) for row in samples.raw(rows).iter_rows(named=True)]
        # the sources may be gone: then the inputs are shown
        except (DataError, OSError):
            pass
    inputs = samples.inputs
    if not isinstance(inputs, Mapping):
        inputs = {"input": inputs}
    return [
        _input(
            inputs,
            int(row),
        )
        for row in rows
    ]


def _raw(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a raw row: its picture if it has one, and its cells."""
    shown: dict[str, Any] = {}
    cells: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, bytes):
            picture = thumbnail(value)
            if picture is not None:
                shown["picture"] = picture
            continue
        levels = _levels(value)
        if levels is not None and "picture" not in shown:
            shown["picture"] = _drawn(levels, None)
            continue
        if value is not None and len(cells) < MOST_CELLS:
            cells[name] = _cut(str(value))
    shown["cells"] = cells
    return shown


def _input(inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return a row of the model's inputs."""
    shown: dict[str, Any] = {}
    cells: dict[str, str] = {}
    for name, values in inputs.items():
        array = np.asarray(values)
        if png.are_pictures(array) and "picture" not in shown:
            shown["picture"] = _drawn(array[row], _scale(array))
        elif len(cells) < MOST_CELLS:
            cells[name] = _figures(array[row])
    shown["cells"] = cells
    return shown


def _levels(value: Any) -> np.ndarray | None:
    """Return a cell that holds a picture's levels, 0 to 255; None: it holds none."""
    if not isinstance(value, list | np.ndarray):
        return None
    try:
        levels = np.asarray(value)
    except ValueError:  # rows of several lengths
        return None
    whole = levels.dtype.kind in "ui" and png.are_pictures(levels[None])
    if not whole or levels.min() < 0 or levels.max() > WHITE:
        return None
    return levels.astype(np.uint8)


def _drawn(picture: np.ndarray, scale: tuple[float, float] | None) -> str:
    """Return a small picture as an address."""
    pixels = png.smaller(png.as_pixels(picture, scale), LARGEST_PICTURE)
    return png.address(png.encode(pixels))


def _scale(pictures: np.ndarray) -> tuple[float, float] | None:
    """Return what is black and what is white; None: 0 and 255."""
    low = float(np.nan_to_num(pictures).min())
    high = float(np.nan_to_num(pictures).max())
    is_bright = pictures.dtype == np.uint8 and high >= BRIGHT
    return None if is_bright else (low, high)


def thumbnail(content: bytes) -> str | None:
    """Return a small picture as an address; None: it is none, or Pillow is missing."""
    try:
        from PIL import Image
    except ImportError:
        return None
    try:
        with Image.open(io.BytesIO(content)) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return png.address(buffer.getvalue(), "jpeg")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
