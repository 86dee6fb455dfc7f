"""Requests and responses of inference by the Open Inference Protocol v2, as bytes.

A pure module: bytes in, arrays out, and back. A request is JSON alone,

    {"id": "7", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2],
                            "data": [0.5, 1]}]}

or, by the binary extension, JSON and then the tensors' bytes in the same order, where
`"parameters": {"binary_data_size": 8}` stands for `data`, and a header gives the length
of the JSON.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from lepton_jax.errors import nearest
from lepton_jax.ship.serve.datatypes import (
    BYTES,
    DTYPES,
    FLOATS,
    NUMBERS,
    WITHOUT_JSON,
    from_bytes,
    from_json,
    is_finite,
    to_bytes,
)
from lepton_jax.ship.serve.refusal import bad, broken, unknown
from lepton_jax.ship.serve.signature import Signature, Tensor

JSON_LENGTH = b"inference-header-content-length"  # header of the binary extension
SIZE = "binary_data_size"
BINARY = "binary_data"
ALL_BINARY = "binary_data_output"
MICROSECONDS = 1e6  # a second; the unit of the parameter `timeout`
MOST_ID = 1024  # characters of a request's id (assumption)
NARROWEST = 4  # bytes of a float that JSON is written of

ENCODING = orjson.OPT_SERIALIZE_NUMPY


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for.

    Attributes:
      name: of the output.
      binary: whether it is sent as bytes.
    """

    name: str
    binary: bool = False


@dataclass
class Request:
    """A request for inference.

    Attributes:
      rows: how many it holds; at least one.
      inputs: arrays by name, the rows first.
      is_raw: whether `inputs` are columns of raw rows, and not the program's arrays.
      wanted: the outputs to send.
      id: of the request; None: it has none.
      priority: 1 is first; 0: the server's default.
      timeout: seconds that it may wait for its batch; None: the server's default.
      is_binary: whether any input came as bytes.
      parameters: of the request.
    """

    rows: int
    inputs: dict[str, np.ndarray]
    is_raw: bool
    wanted: Sequence[Wanted]
    id: str | None = None
    priority: int = 0
    timeout: float | None = None
    is_binary: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


def parse_json(content: bytes | memoryview) -> dict[str, Any]:
    """Return the JSON object of a request.

    Raises:
      Refusal: it is none.
    """
    try:
        parsed = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise bad(f"the request is no JSON: {error}") from error
    if type(parsed) is not dict:
        raise bad("the request is no JSON object")
    return parsed


def read_request(
    body: bytes,
    json_length: int | None,
    signature: Signature,
    most_rows: int,
) -> Request:
    """Return the request in the body of a message.

    Args:
      body: of the message.
      json_length: bytes of JSON at its beginning, the rest being tensors; None: all.
      signature: of the model.
      most_rows: limit to the rows of a request.

    Raises:
      Refusal: the body is no request that the model can answer.
    """
    content = memoryview(body)
    end = len(content) if json_length is None else json_length
    if end > len(content):
        raise bad(f"{end} bytes of JSON are announced, but {len(content)} are sent")
    parsed = parse_json(content[:end])
    parts = _objects(parsed, "inputs")
    is_raw = _are_columns(parts, signature)
    tensors = signature.columns if is_raw else signature.arrays
    reader = _Reader(content[end:], most_rows, is_raw)
    inputs: dict[str, np.ndarray] = {}
    for part in parts:
        tensor = _named(part, tensors)
        if tensor.name in inputs:
            raise bad(f"input {tensor.name!r} is given twice")
        inputs[tensor.name] = reader.read(part, tensor)
    reader.close()
    _check_complete(inputs, tensors, is_raw)

    parameters = _parameters(parsed)
    return Request(
        reader.rows,
        inputs,
        is_raw,
        _wanted(parsed, parameters, signature),
        _id(parsed),
        _count(parameters, "priority"),
        _timeout(parameters),
        reader.is_binary,
        parameters,
    )


def plain_request(
    parsed: Mapping[str, Any],
    rows: int,
    wanted: Sequence[Wanted],
) -> Request:
    """Return the request of a JSON object that holds raw rows, and no tensors.

    Raises:
      Refusal: its id or its parameters are not as they should be.
    """
    parameters = _parameters(parsed)
    return Request(
        rows,
        {},
        True,
        wanted,
        _id(parsed),
        _count(parameters, "priority"),
        _timeout(parameters),
        parameters=parameters,
    )


def write_response(
    request: Request,
    model: str,
    version: str,
    outputs: Mapping[str, np.ndarray],
    datatypes: Mapping[str, Tensor],
    parameters: Mapping[str, Any] | None = None,
) -> tuple[bytes, int | None]:
    """Return the body of the response to a request.

    Args:
      request: the request.
      model: name of the model.
      version: of the model.
      outputs: arrays by name.
      datatypes: the signature's outputs.
      parameters: of the response; None: there are none.

    Returns:
      The bytes, and how many of them are JSON; None: all.

    Raises:
      Refusal: an output can't be said in JSON.
    """
    described = []
    blobs = []
    for wanted in request.wanted:
        array = outputs[wanted.name]
        tensor = datatypes[wanted.name]
        entry: dict[str, Any] = {
            "name": wanted.name,
            "datatype": tensor.datatype,
            "shape": array.shape,
        }
        if wanted.binary:
            blob = to_bytes(array)
            blobs.append(blob)
            entry["parameters"] = {SIZE: len(blob)}
        else:
            entry["data"] = _json_data(array, tensor, request)
        described.append(entry)

    response: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        response["id"] = request.id
    if parameters:
        response["parameters"] = parameters
    response["outputs"] = described
    head = orjson.dumps(response, option=ENCODING)
    if not blobs:
        return head, None
    return b"".join([head, *blobs]), len(head)


def finite(array: np.ndarray, name: str, request: Request) -> Any:
    """Return an output's elements, nested, for orjson.

    Raises:
      Refusal: it holds NaN or infinity, which JSON can't say.
    """
    if array.dtype == object:
        return array.tolist()
    if array.dtype.kind not in "iub":
        if array.dtype.itemsize < NARROWEST:
            array = array.astype(np.float32)
        if not is_finite(array):
            raise _not_finite(name, request)
    return np.ascontiguousarray(array)


# ---- internals ----


class _Reader:
    """Reads the tensors of a request, one after the other.

    Args:
      content: the bytes after the JSON.
      most_rows: limit to the rows of a request.
      is_raw: whether the tensors are columns of raw rows.
    """

    def __init__(
        self,
        content: memoryview,
        most_rows: int,
        is_raw: bool,
    ):
        self.rows = 0
        self.is_binary = False
        self._content = content
        self._place = 0
        self._most_rows = most_rows
        self._is_raw = is_raw

    def read(
        self,
        part: Mapping[str, Any],
        tensor: Tensor,
    ) -> np.ndarray:
        """Return the array of one input.

        Raises:
          Refusal: it is not as the tensor must be.
        """
        datatype = self._datatype(part, tensor)
        shape = self._shape(part, tensor)
        size = _parameters(part).get(SIZE)
        with _naming(tensor.name):
            if size is not None:
                return from_bytes(self._take(part, size), datatype, shape)
            if "data" not in part:
                raise ValueError(f"it has neither data nor {SIZE}")
            if self._is_raw:
                return _cells(part["data"], datatype, shape)
            return from_json(part["data"], datatype, shape)

    def close(self) -> None:
        """Raise Refusal if bytes are left that belong to no tensor."""
        left = len(self._content) - self._place
        if left:
            raise bad(f"{left} bytes follow the last tensor")

    def _take(
        self,
        part: Mapping[str, Any],
        size: Any,
    ) -> memoryview:
        """Return the bytes of a tensor.

        Raises:
          ValueError: they are not there.
        """
        if "data" in part:
            raise ValueError(f"it has both data and {SIZE}")
        if type(size) is not int or size < 0:
            raise ValueError(f"{SIZE} is no count of bytes")
        start = self._place
        if start + size > len(self._content):
            raise ValueError(
                f"{size} bytes are announced, but {len(self._content) - start} follow"
            )
        self._place = start + size
        self.is_binary = True
        return self._content[start : self._place]

    def _datatype(
        self,
        part: Mapping[str, Any],
        tensor: Tensor,
    ) -> str:
        given = part.get("datatype")
        if given == tensor.datatype:
            return tensor.datatype
        if not isinstance(given, str) or given not in DTYPES:
            raise bad(
                f"input {tensor.name!r}: {given!r} is no datatype;"
                f" send {tensor.datatype}"
            )
        # a column of numbers is prepared from numbers of any width
        if self._is_raw and tensor.datatype in FLOATS and given in NUMBERS:
            return given
        raise bad(f"input {tensor.name!r} is {tensor.datatype}, not {given}")

    def _shape(
        self,
        part: Mapping[str, Any],
        tensor: Tensor,
    ) -> tuple[int, ...]:
        """Return the extents that a request states, if the model takes them."""
        given = part.get("shape")
        if type(given) is not list or set(map(type, given)) - {int}:
            raise bad(f"input {tensor.name!r} has no shape; send a list of integers")
        shape = tuple(given)
        expected = tensor.extents
        # a column may come as (rows, 1), as some clients send it
        is_column = self._is_raw and shape[1:] == (1,)
        if not shape or (shape[1:] != expected and not is_column):
            raise bad(
                f"input {tensor.name!r} has shape {list(shape)[:9]},"
                f" but the model takes {list(tensor.shape)}"
            )
        rows = shape[0]
        if not 1 <= rows <= self._most_rows:
            raise bad(
                f"input {tensor.name!r} has {rows} rows;"
                f" send 1 to {self._most_rows} in a request"
            )
        if self.rows and rows != self.rows:
            raise bad(f"the inputs have {self.rows} and {rows} rows")
        self.rows = rows
        return shape


@contextlib.contextmanager
def _naming(tensor: str) -> Iterator[None]:
    """Make a refusal of a ValueError, which names the tensor."""
    try:
        yield
    except ValueError as error:
        raise bad(f"input {tensor!r}: {error}") from error


def _objects(
    parent: Mapping[str, Any],
    key: str,
) -> list[dict[str, Any]]:
    """Return a list of objects in an object.

    Raises:
      Refusal: there is none.
    """
    parts = parent.get(key)
    if type(parts) is not list or set(map(type, parts)) - {dict}:
        raise bad(f"{key!r} is no list of objects")
    return parts


def _parameters(parent: Mapping[str, Any]) -> dict[str, Any]:
    parameters = parent.get("parameters", {})
    if type(parameters) is not dict:
        raise bad("'parameters' is no object")
    if "shared_memory_region" in parameters:
        raise bad("tensors in shared memory are not taken; send the data")
    return parameters


def _are_columns(
    parts: Sequence[Mapping[str, Any]],
    signature: Signature,
) -> bool:
    """Whether the inputs are columns of raw rows: most names decide."""
    if not signature.columns:
        return False
    names = [str(part.get("name")) for part in parts]
    arrays = sum(name in signature.arrays for name in names)
    columns = sum(name in signature.columns for name in names)
    return columns >= arrays


def _named(
    part: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Tensor:
    name = part.get("name")
    if not isinstance(name, str):
        raise bad("an input has no name")
    tensor = tensors.get(name)
    if tensor is None:
        raise bad(
            f"the model takes no input {name[:MOST_ID]!r}{nearest(name, tensors)};"
            f" it takes {', '.join(tensors)}"
        )
    return tensor


def _check_complete(
    inputs: Mapping[str, np.ndarray],
    tensors: Mapping[str, Tensor],
    is_raw: bool,
) -> None:
    """Raise Refusal if an array is missing; the preparation judges columns."""
    missing = [name for name in tensors if name not in inputs]
    if not inputs or (missing and not is_raw):
        raise bad(f"input {missing[0]!r} is missing")


def _wanted(
    parsed: Mapping[str, Any],
    parameters: Mapping[str, Any],
    signature: Signature,
) -> list[Wanted]:
    """Return the outputs that a request asks for; all, if it names none.

    Raises:
      Refusal: there is no such output.
    """
    default = _flag(parameters, ALL_BINARY, False)
    parts = _objects(parsed, "outputs") if "outputs" in parsed else []
    if not parts:
        return [Wanted(name, default) for name in signature.outputs]
    wanted: list[Wanted] = []
    for part in parts:
        name = part.get("name")
        if not isinstance(name, str):
            raise bad("an output has no name")
        if name not in signature.outputs:
            raise unknown(
                f"the model has no output {name[:MOST_ID]!r}"
                f"{nearest(name, signature.outputs)};"
                f" it has {', '.join(signature.outputs)}"
            )
        if any(name == other.name for other in wanted):
            raise bad(f"output {name!r} is asked for twice")
        binary = _flag(_parameters(part), BINARY, default)
        wanted.append(Wanted(name, binary))
    return wanted


def _flag(
    parameters: Mapping[str, Any],
    name: str,
    default: bool,
) -> bool:
    flag = parameters.get(name, default)
    if type(flag) is not bool:
        raise bad(f"parameter {name!r} is neither true nor false")
    return flag


def _id(parsed: Mapping[str, Any]) -> str | None:
    given = parsed.get("id")
    if given is None:
        return None
    if not isinstance(given, str) or len(given) > MOST_ID:
        raise bad(f"'id' is no text of at most {MOST_ID} characters")
    return given


def _count(parameters: Mapping[str, Any], name: str) -> int:
    count = parameters.get(name, 0)
    if type(count) is not int or count < 0:
        raise bad(f"parameter {name!r} is no count")
    return count


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return the seconds that a request may wait; it states microseconds."""
    microseconds = _count(parameters, "timeout")
    return microseconds / MICROSECONDS if microseconds else None


def _cells(
    data: Any,
    datatype: str,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Return a column of raw rows; null is a cell that is missing.

    Raises:
      ValueError: the data are no such column.
    """
    if type(data) is list and len(shape) == 2 and data and type(data[0]) is list:
        data = [cell for part in data for cell in part]
    if type(data) is not list or len(data) != shape[0]:
        raise ValueError(f"data is no list of {shape[0]} cells")
    given = [cell for cell in data if cell is not None]
    if len(given) == len(data):
        return from_json(data, datatype, shape[:1])
    values = from_json(given, datatype, (len(given),))
    cells = np.empty(len(data), dtype=object)
    places = [place for place, cell in enumerate(data) if cell is not None]
    cells[places] = values
    return cells


def _json_data(
    array: np.ndarray,
    tensor: Tensor,
    request: Request,
) -> Any:
    """Return an output's elements, flat, as orjson writes them.

    Raises:
      Refusal: JSON has no form for them.
    """
    if tensor.datatype in WITHOUT_JSON:
        raise bad(
            f"output {tensor.name!r} is {tensor.datatype}, which has no form in JSON;"
            f" ask for it with the parameter {BINARY!r}"
        )
    flat = np.ascontiguousarray(array).ravel()
    if tensor.datatype == BYTES:
        return [_text(element, tensor.name) for element in flat]
    if tensor.datatype in FLOATS and not is_finite(flat):
        raise _not_finite(tensor.name, request)
    return flat


def _text(element: Any, name: str) -> str:
    if isinstance(element, str):
        return element
    try:
        return bytes(element).decode()
    except UnicodeDecodeError as error:
        raise bad(
            f"output {name!r} holds bytes that are no text; ask for it with the"
            f" parameter {BINARY!r}"
        ) from error


def _not_finite(name: str, request: Request) -> Exception:
    """Return the refusal of an output with NaN or infinity, by whose fault it is."""
    message = (
        f"output {name!r} holds NaN or infinity, which JSON can't say; ask for it with"
        f" the parameter {BINARY!r}"
    )
    for array in request.inputs.values():
        is_float = array.dtype != object and array.dtype.kind not in "biu"
        if is_float and not np.isfinite(array).all():
            return bad(f"{message}; an input holds some")
    return broken(message)
