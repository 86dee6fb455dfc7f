"""Arrays by name in a safetensors file, also of types that it does not know.

Types that the library can't read back (4-bit integers, 8-bit floats, bfloat16 without
JAX) are stored as bytes, and the header's metadata says what they are. Two integers of
4 bits share a byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lepton_jax.ship.extras import needs

EXTRA = "ship"
TYPES = "lepton.types"  # in the metadata: {name: [type, shape]}
KNOWN = "?bBhHiIlLqQefdF"  # NumPy's characters of types that are stored as they are
HALVES = ("int4", "uint4")  # two of which share a byte


def write_tensors(
    path: Path,
    arrays: Mapping[str, Any],
) -> None:
    """Write arrays by name.

    Raises:
      MissingExtraError: safetensors is not installed.
      OSError: the file can't be written.
    """
    library = needs("safetensors.numpy", extra=EXTRA, purpose="an artifact")
    types = {}
    plain = {}
    for name, given in arrays.items():
        array = np.asarray(given)
        if array.dtype.char not in KNOWN:
            types[name] = [array.dtype.name, list(array.shape)]
            array = _as_bytes(array)
        plain[name] = np.ascontiguousarray(array).reshape(array.shape)
    metadata = {TYPES: json.dumps(types)} if types else None
    path.write_bytes(library.save(plain, metadata))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read arrays by name.

    Raises:
      MissingExtraError: safetensors is not installed.
      OSError, ValueError, KeyError: the file can't be read.
    """
    library = needs("safetensors", extra=EXTRA, purpose="an artifact")
    try:
        with library.safe_open(path, framework="np") as file:
            types = json.loads(
                (file.metadata() or {}).get(
                    TYPES,
                    "{}",
                )
            )
            names = list(file.keys())
            arrays = {name: file.get_tensor(name) for name in names}
    except library.SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, (kind, shape) in types.items():
        arrays[name] = _from_bytes(
            arrays[name],
            kind,
            tuple(shape),
        )
    return arrays


# ---- internals ----


def _as_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype.name not in HALVES:
        return np.frombuffer(
            array.tobytes(),
            np.uint8,
        )
    halves = array.reshape(-1).astype(np.int8).view(np.uint8) & 0xF
    halves = np.append(
        halves,
        np.zeros(
            len(halves) % 2,
            np.uint8,
        ),
    )
    return halves[0::2] | (halves[1::2] << 4)


def _from_bytes(
    stored: np.ndarray,
    kind: str,
    shape: tuple[int, ...],
) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, kind))
    if kind not in HALVES:
        return np.frombuffer(
            stored.tobytes(),
            dtype,
        ).reshape(shape)
    halves = np.stack(
        [stored & 0xF, stored >> 4],
        axis=1,
    ).reshape(-1)
    halves = halves[: int(np.prod(shape))].astype(np.int8)
    if kind == "int4":  # 8 to 15 are the negative ones
        halves = np.where(
            halves > 7,
            halves - 16,
            halves,
        )
    return halves.astype(dtype).reshape(shape)
