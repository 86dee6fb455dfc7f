"""Requests that must be answered right, of an artifact's stored rows."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from lepton_jax.ship.serve.datatypes import DTYPES, datatype_of, to_bytes
from tools.siege.target import MOST_ROWS, Answer, Expected, message

JSON_LENGTH = "inference-header-content-length"


@dataclass(frozen=True)
class Good:
    """A request and what its answer must be.

    Attributes:
      content: bytes to send.
      rows: numbers of the stored rows in it.
      id: of the request.
      wanted: its outputs.
    """

    content: bytes
    rows: np.ndarray
    id: str
    wanted: tuple[str, ...]

    def fault(self, answer: Answer, expected: Expected) -> str | None:
        """Return what is wrong with an answer; None: nothing."""
        if answer.status != 200:
            return f"status {answer.status}: {answer.body[:200]!r}"
        length = int(answer.headers.get(JSON_LENGTH, len(answer.body)))
        response = json.loads(answer.body[:length])
        if response.get("id") != self.id:
            return f"id {response.get('id')!r}, not {self.id!r}"
        names = tuple(output["name"] for output in response["outputs"])
        if names != self.wanted:
            return f"outputs {names}, not {self.wanted}"
        outputs = {}
        place = length
        for output in response["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size")
            dtype = DTYPES[output["datatype"]]
            if size is None:
                array = np.array(output["data"], dtype)
            else:
                array = np.frombuffer(answer.body[place : place + size], dtype)
                place += size
            outputs[output["name"]] = array.reshape(output["shape"])
        if place != len(answer.body):
            return f"{len(answer.body) - place} bytes too many"
        return expected.fault(
            self.rows, outputs, int(answer.headers["lepton-batch-size"])
        )


def draw_good(expected: Expected, draw: np.random.Generator, number: int) -> Good:
    """Return a request of some rows, in JSON or binary, with or without options."""
    rows = draw.integers(0, expected.rows, draw.integers(1, MOST_ROWS + 1))
    is_binary = bool(draw.random() < 0.5)
    answers_binary = bool(draw.random() < 0.5)
    inputs = []
    blobs = []
    for name, array in expected.inputs.items():
        part = array[rows]
        entry = {
            "name": name,
            "datatype": datatype_of(part.dtype),
            "shape": part.shape,
        }
        if is_binary:
            blob = to_bytes(part)
            blobs.append(blob)
            entry["parameters"] = {"binary_data_size": len(blob)}
        else:
            entry["data"] = part.ravel().tolist()
        inputs.append(entry)
    known = next(iter(expected.outputs.values()))
    wanted = tuple(name for name in known if draw.random() < 0.7)
    request = {
        "id": f"request-{number}",
        "inputs": inputs,
        "parameters": {
            "binary_data_output": answers_binary,
            "priority": int(draw.integers(0, 4)),
        },
        "outputs": [{"name": name} for name in wanted],
    }
    head = json.dumps(request).encode()
    headers = {JSON_LENGTH: str(len(head))} if is_binary else {}
    path = f"/v2/models/{expected.name}/infer"
    content = message(path, head + b"".join(blobs), **headers)
    return Good(content, rows, request["id"], wanted or tuple(known))
