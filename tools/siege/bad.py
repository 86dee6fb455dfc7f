"""Requests that are the client's fault: fuzzed JSON, fuzzed bytes, wrong fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.siege.good import draw_good
from tools.siege.target import END, Expected, message

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 70,
    1e308,
    "",
    "x" * 2000,
    [],
    {},
    [[[]]],
    {"data": [1]},
    "\u0000",
    "FP16",
    [None],
)
DEEP = b"[" * 5000


def draw_bad(expected: Expected, draw: np.random.Generator, number: int) -> bytes:
    """Return a message that no server may answer with 200 or with its own fault."""
    kinds: tuple[Callable[..., bytes], ...] = (
        _odd_field,
        _cut_off,
        _noise,
        _other_bytes,
        _deep,
        _elsewhere,
        _wrong_length,
    )
    kind = kinds[draw.integers(len(kinds))]
    return kind(expected, draw, number)


def _path(expected: Expected) -> str:
    return f"/v2/models/{expected.name}/infer"


def _request(expected: Expected, number: int) -> dict[str, Any]:
    """Return a request in JSON that is good."""
    inputs = [
        {
            "name": name,
            "datatype": "FP32" if array.dtype == np.float32 else "UINT8",
            "shape": array[:1].shape,
            "data": array[0].ravel().tolist(),
        }
        for name, array in expected.inputs.items()
    ]
    return {"id": str(number), "inputs": inputs}


def _odd_field(expected: Expected, draw: np.random.Generator, number: int) -> bytes:
    """Put something else in the place of a field that must be right."""
    request = _request(expected, number)
    part = request["inputs"][0]
    field = ("name", "datatype", "shape", "data", "inputs")[draw.integers(5)]
    value = ODD[draw.integers(len(ODD))]
    if field == "inputs":
        request["inputs"] = value
    elif draw.random() < 0.2:
        del part[field]
    else:
        part[field] = value
    return message(_path(expected), json.dumps(request).encode())


def _cut_off(expected: Expected, draw: np.random.Generator, number: int) -> bytes:
    """Send the first part of a JSON request as if it were whole."""
    body = json.dumps(_request(expected, number)).encode()
    return message(_path(expected), body[: draw.integers(0, len(body) - 1)])


def _noise(expected: Expected, draw: np.random.Generator, number: int) -> bytes:
    """Send bytes that mean nothing."""
    return message(_path(expected), b"\xff" + draw.bytes(int(draw.integers(0, 3000))))


def _other_bytes(expected: Expected, draw: np.random.Generator, number: int) -> bytes:
    """Leave bytes out of a binary request, or add some."""
    request = _request(expected, number)
    blob = b""
    for part in request["inputs"]:
        array = expected.inputs[part["name"]][:1]
        del part["data"]
        part["parameters"] = {"binary_data_size": array.nbytes}
        blob += array.tobytes()
    head = json.dumps(request).encode()
    more = int(draw.integers(1, 40))
    blob = blob[:-more] if draw.random() < 0.5 else blob + draw.bytes(more)
    length = {"inference_header_content_length": str(len(head))}
    return message(_path(expected), head + blob, **length)


def _deep(expected: Expected, draw: np.random.Generator, number: int) -> bytes:
    """Nest lists so that a careless parser runs out of stack."""
    return message(_path(expected), b'{"inputs":' + DEEP)


def _elsewhere(expected: Expected, draw: np.random.Generator, number: int) -> bytes:
    """Ask for what is not there."""
    paths = (
        "/v2/models/nobody/infer",
        f"/v2/models/{expected.name}/versions/99/infer",
        f"/v2/models/{expected.name}/rows",
        "/v2/repository/models/x/load",
        "/nowhere",
    )
    body = json.dumps(_request(expected, number)).encode()
    return message(paths[draw.integers(len(paths))], body)


def _wrong_length(expected: Expected, draw: np.random.Generator, number: int) -> bytes:
    """Announce a length of JSON that is none."""
    good = draw_good(expected, draw, number).content.partition(END)[2]
    texts = ("-1", "x", "99999999", "1e3")
    length = {"inference_header_content_length": texts[draw.integers(len(texts))]}
    return message(_path(expected), good, **length)
