"""The datatypes of the Open Inference Protocol, and arrays of them as bytes.

A tensor travels as JSON numbers or as raw bytes: little-endian, row by row, a boolean
as one byte, and an element of BYTES as its length in four bytes and then itself. FP16
and BF16 have no form in JSON.

https://github.com/kserve/open-inference-protocol (inference_rest.md), and Triton's
extension for binary tensors (extension_binary_data.md).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

import ml_dtypes
import numpy as np

BYTES = "BYTES"
BOOL = "BOOL"

DTYPES: dict[str, np.dtype] = {
    BOOL: np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    BYTES: np.dtype(object),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WITHOUT_JSON = ("FP16", "BF16")
FLOATS = ("FP16", "BF16", "FP32", "FP64")
NUMBERS = tuple(name for name in DTYPES if name not in (BOOL, BYTES))

LENGTH = struct.Struct("<I")  # of an element of BYTES


def datatype_of(dtype: object) -> str | None:
    """Return the protocol's name of a NumPy dtype; None: it has none.

    >>> datatype_of("float32")
    'FP32'
    """
    return NAMES.get(np.dtype(dtype))  # type: ignore[call-overload]


def to_bytes(array: np.ndarray) -> bytes:
    """Return an array as the binary extension sends it."""
    if array.dtype != object:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return little.tobytes()
    parts = []
    for element in array.ravel():
        text = element.encode() if isinstance(element, str) else bytes(element)
        parts.append(LENGTH.pack(len(text)))
        parts.append(text)
    return b"".join(parts)


def from_bytes(
    content: memoryview,
    datatype: str,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Return the array that was sent as bytes.

    Numbers are not copied where they lie aligned in `content`.

    Args:
      content: exactly the bytes of the tensor.
      datatype: a key of `DTYPES`.
      shape: extents of the array.

    Raises:
      ValueError: the bytes are not those of such an array.
    """
    count = math.prod(shape)
    if datatype == BYTES:
        elements = np.empty(count, dtype=object)
        elements[:] = list(_elements(content, count))
        return elements.reshape(shape)

    dtype = DTYPES[datatype]
    if len(content) != count * dtype.itemsize:
        raise ValueError(
            f"{len(content)} bytes are sent, but {datatype}{list(shape)} has"
            f" {count * dtype.itemsize}"
        )
    if not count:
        return np.empty(shape, dtype)
    array = np.frombuffer(content, dtype)
    if datatype == BOOL and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("a BOOL is a byte of 0 or 1")
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def _elements(content: memoryview, count: int) -> Iterable[bytes]:
    """Yield the elements of BYTES.

    Raises:
      ValueError: there are more or fewer than `count`, or one is cut off.
    """
    place = 0
    for number in range(count):
        start = place + LENGTH.size
        if start > len(content):
            raise ValueError(f"the bytes end before element {number} of {count}")
        (length,) = LENGTH.unpack(content[place:start])
        place = start + length
        if place > len(content):
            raise ValueError(f"element {number} is cut off: it has {length} bytes")
        yield bytes(content[start:place])
    if place != len(content):
        raise ValueError(f"{len(content) - place} bytes follow the last element")


def from_json(
    data: object,
    datatype: str,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Return the array that was sent as JSON, nested or flat in row-major order.

    Args:
      data: a list of elements, or of lists.
      datatype: a key of `DTYPES`.
      shape: extents of the array.

    Raises:
      ValueError: the data are not those of such an array.
    """
    if datatype in WITHOUT_JSON:
        raise ValueError(
            f"{datatype} has no form in JSON; send it by the binary extension"
        )
    if not isinstance(data, list):
        raise ValueError("data is no list")
    flat = data if not data or type(data[0]) is not list else _flat(data, shape)
    count = math.prod(shape)
    if len(flat) != count:
        raise ValueError(
            f"data has {len(flat)} elements, but {list(shape)} has {count}"
        )
    _check_kinds(flat, datatype)
    return _array(flat, datatype).reshape(shape)


def is_finite(array: np.ndarray) -> bool:
    """Whether floats hold neither NaN nor infinity."""
    return bool(np.isfinite(array).all())


# ---- internals ----

# Types of Python that JSON's values have, by the kind of a datatype.
KINDS: dict[str, set[type]] = {
    BOOL: {bool},
    BYTES: {str},
    "FP32": {int, float},
    "FP64": {int, float},
}
INTEGERS: set[type] = {int}
KIND_NAMES = {
    bool: "a boolean",
    str: "a text",
    int: "an integer",
    float: "a fraction",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _flat(data: list, shape: tuple[int, ...]) -> list:
    """Return the elements of nested lists, which have the extents of the shape.

    Raises:
      ValueError: they have not.
    """
    level = [data]
    for extent in shape:
        for part in level:
            if type(part) is not list or len(part) != extent:
                raise ValueError(f"data is not nested as {list(shape)}")
        level = [inner for part in level for inner in part]
    return level


def _check_kinds(flat: list, datatype: str) -> None:
    kinds = set(map(type, flat))
    wrong = kinds - KINDS.get(datatype, INTEGERS)
    if wrong:
        name = KIND_NAMES[wrong.pop()]
        raise ValueError(f"data holds {name}, which is no {datatype}")


def _array(flat: list, datatype: str) -> np.ndarray:
    """Return a flat array of checked elements.

    Raises:
      ValueError: a number is out of range.
    """
    if datatype == BYTES:
        elements = np.empty(len(flat), dtype=object)
        elements[:] = [text.encode() for text in flat]
        return elements
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype=DTYPES[datatype])
    except OverflowError as error:
        raise ValueError(f"a number is out of {datatype}'s range") from error
    if datatype in FLOATS and not is_finite(array):
        raise ValueError(f"a number is out of {datatype}'s range")
    return array
