"""Parameters from tensors: of each, only the slice that a device keeps is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lepton_jax.hub.names import Piece, Source
from lepton_jax.hub.shards import Shards

Index = tuple[slice, ...]


def read(
    shards: Shards,
    wanted: Mapping[str, Any],
    found: Mapping[str, Source],
) -> dict[str, jax.Array]:
    """Return parameters, laid out on their devices.

    Args:
      shards: the tensors.
      wanted: by path, shapes with dtype and sharding.
      found: where each comes from.
    """
    arrays = {}
    for path, leaf in wanted.items():
        arrays[path] = _array(shards, leaf, found[path])
    return arrays


def _array(
    shards: Shards,
    leaf: Any,
    source: Source,
) -> jax.Array:
    # Devices that keep the same part ask for it one after the other.
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = str(index)
        if key not in parts:
            values = part_of(shards, source, leaf.shape, index)
            parts[key] = values.astype(leaf.dtype)
        return parts[key]

    return jax.make_array_from_callback(
        leaf.shape,
        leaf.sharding,
        part,
        dtype=leaf.dtype,
    )


def part_of(
    shards: Shards,
    source: Source,
    shape: tuple[int, ...],
    index: Index,
) -> np.ndarray:
    """Return a part of a parameter, of the file's dtype.

    Args:
      shards: the tensors.
      source: where the parameter comes from.
      shape: of the whole parameter.
      index: of the part.
    """
    if not source.stacked:
        return _piece(shards, source.pieces[0], shape, index)
    layers = source.pieces[index[0]]
    parts = [_piece(shards, piece, shape[1:], index[1:]) for piece in layers]
    return np.stack(parts)


def _piece(
    shards: Shards,
    piece: Piece,
    shape: tuple[int, ...],
    index: Index,
) -> np.ndarray:
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    whole = [slice(start, stop) for start, stop, _ in bounds]
    if piece.third is not None:
        start, stop, _ = bounds[-1]
        offset = piece.third * shape[-1]
        whole[-1] = slice(offset + start, offset + stop)
    if piece.transposed:
        return shards.read(piece.tensor, tuple(reversed(whole))).T
    return shards.read(piece.tensor, tuple(whole))
