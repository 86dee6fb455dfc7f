"""The page to try a model in a browser, and what it has to know of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from lepton_jax.ship.serve.answering import Answer
from lepton_jax.ship.serve.application import Call, Handler, as_json
from lepton_jax.ship.serve.models import Models, Served
from lepton_jax.ship.serve.signature import Signature, Tensor

HTML = b"text/html; charset=utf-8"
# The page loads nothing from elsewhere, and stands in no other page.
POLICY = (
    b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    b" img-src data: blob:; connect-src 'self'; frame-ancestors 'none'"
)

SIDES = range(4, 1025)  # pixels of a picture's height and width
CHANNELS = (1, 3)
MOST_SHOWN = 2048  # elements of an example that the page shows (assumption)
INK = 0.25  # share of the way from background to ink at which a pixel is inked


@dataclass(frozen=True)
class Picture:
    """An input that is a picture, and how training's pictures lie in it.

    Attributes:
      name: of the tensor.
      height: pixels.
      width: pixels.
      channels: 1 for gray, 3 for colours.
      low: least value.
      high: largest value.
      background: value around the thing that is shown; `low` or `high`.
      span: share of the larger side that the thing takes up.
    """

    name: str
    height: int
    width: int
    channels: int
    low: float
    high: float
    background: float
    span: float


def handlers(models: Models) -> dict[tuple[str, str], Handler]:
    """Return the handlers of the page, by method and path."""

    async def page(call: Call) -> Answer:
        return Answer(page_html(), HTML, headers=[(b"content-security-policy", POLICY)])

    async def about(call: Call) -> Answer:
        return as_json(facts(models.find(call.words[0])))

    async def no_icon(call: Call) -> Answer:
        return Answer(b"", b"image/x-icon")

    return {
        ("GET", "/"): page,
        ("GET", "/try/*"): about,
        ("GET", "/favicon.ico"): no_icon,
    }


@cache
def page_html() -> bytes:
    """Return the page."""
    return files("lepton_jax.ship.serve").joinpath("page.html").read_bytes()


def facts(served: Served) -> dict[str, Any]:
    """Return what the page has to know of a model."""
    artifact = served.artifact
    picture = picture_of(served.signature, artifact.stored.inputs)
    return {
        "name": served.name,
        "version": served.version,
        "columns": [asdict(column) for column in artifact.columns],
        "arrays": [part.facts() for part in served.signature.arrays.values()],
        "outputs": [part.facts() for part in served.signature.outputs.values()],
        "labels": [str(label) for label in artifact.manifest.labels],
        "picture": None if picture is None else asdict(picture),
        "example": example_of(artifact.stored.inputs),
    }


def picture_of(
    signature: Signature,
    stored: Mapping[str, np.ndarray],
) -> Picture | None:
    """Return the picture that a model takes as its only array; None: it takes none.

    Args:
      signature: of the model.
      stored: rows of its inputs, by name.
    """
    if signature.columns or len(signature.arrays) != 1:
        return None
    (tensor,) = signature.arrays.values()
    size = _size(tensor)
    if size is None:
        return None
    pixels = stored.get(tensor.name)
    if pixels is not None and pixels.size:
        return _as_stored(tensor.name, size, pixels)
    high = 255.0 if tensor.datatype == "UINT8" else 1.0
    return Picture(tensor.name, *size, 0.0, high, 0.0, 1.0)


def example_of(stored: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Return a stored row's arrays; None: there are none, or they are large."""
    first = {name: array[0] for name, array in stored.items() if len(array)}
    size = sum(array.size for array in first.values())
    if not first or size > MOST_SHOWN:
        return None
    return {name: _plain(array) for name, array in first.items()}


# ---- internals ----


def _as_stored(
    name: str,
    size: tuple[int, int, int],
    stored: np.ndarray,
) -> Picture:
    """Return a picture whose values and place are those of stored ones."""
    pixels = np.asarray(stored, np.float32).reshape(-1, *size)
    low = float(pixels.min())
    high = float(pixels.max())
    gray = pixels.mean(axis=3)
    rows = gray[:, [0, -1]]
    columns = gray[:, :, [0, -1]]
    rim = np.concatenate([rows.ravel(), columns.ravel()])
    is_light = float(np.median(rim)) > (low + high) / 2
    background = high if is_light else low
    inked = np.abs(gray - background) > INK * (high - low)
    return Picture(name, *size, low, high, background, _span(inked))


def _size(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return height, width and channels of a tensor that is a picture."""
    extents = tensor.extents
    if len(extents) == 2:
        extents = (*extents, 1)
    if len(extents) != 3:
        return None
    height, width, channels = extents
    is_picture = height in SIDES and width in SIDES and channels in CHANNELS
    return (height, width, channels) if is_picture else None


def _span(inked: np.ndarray) -> float:
    """Return the share of the larger side that the inked pixels take up, usually.

    Args:
      inked: booleans (pictures, height, width).
    """
    _, height, width = inked.shape
    tall = _extent(np.any(inked, axis=2)) / height
    wide = _extent(np.any(inked, axis=1)) / width
    spans = np.maximum(tall, wide)
    spans = spans[spans > 0]
    return float(np.median(spans)) if spans.size else 1.0


def _extent(inked: Any) -> np.ndarray:
    """Return from the first inked place to the last one, for each picture."""
    length = inked.shape[1]
    first = inked.argmax(axis=1)
    last = length - inked[:, ::-1].argmax(axis=1)
    return np.where(inked.any(axis=1), last - first, 0)


def _plain(array: np.ndarray) -> Any:
    if array.dtype.kind in "iub":
        return array.tolist()
    return np.nan_to_num(array.astype(np.float32)).tolist()
