"""The protocol as others see it: the server's description, and a client of Triton."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest
import standins
from server_process import server
from test_serve_application import ONE, served, tensor

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("fastapi", reason="the extra 'serve'")

# A Python that has tritonclient[http], which needs older libraries than Lepton.
TRITON = os.environ.get("LEPTON_TRITON_PYTHON")
CLIENT = Path(__file__).resolve().parents[2] / "tools" / "siege" / "triton_client.py"


def operation(description, method, path):
    """The description of a path: the one with the most words in common."""
    parts = path.strip("/").split("/")
    for pattern, methods in description["paths"].items():
        names = pattern.strip("/").split("/")
        pairs = zip(names, parts, strict=len(names) == len(parts))
        fits = len(names) == len(parts) and all(
            name == part or name.startswith("{") for name, part in pairs
        )
        if fits and method.lower() in methods:
            return methods[method.lower()]
    raise AssertionError(f"{method} {path} is not described")


EXCHANGES = [
    ("GET", "/v2", None),
    ("GET", "/v2/health/live", None),
    ("GET", "/v2/health/ready", None),
    ("GET", "/v2/models", None),
    ("GET", "/v2/models/linear", None),
    ("GET", "/v2/models/linear/versions/1/ready", None),
    ("GET", "/v2/models/nobody", None),
    ("POST", "/v2/models/linear/infer", {**ONE, "id": "7"}),
    ("POST", "/v2/models/linear/versions/1/infer", ONE),
    ("POST", "/v2/models/linear/versions/9/infer", ONE),
    ("POST", "/v2/models/linear/infer", {"inputs": []}),
    ("POST", "/v2/models/linear/infer", {"inputs": [tensor([1])]}),
    ("POST", "/v2/models/people/rows", {"rows": [{"age": 61}]}),
    ("POST", "/v2/models/people/rows", {"rows": 1}),
    ("POST", "/v2/repository/index", {}),
    ("POST", "/v2/repository/models/linear/load", {}),
]


def test_every_answer_is_as_the_description_says():
    async def run():
        async with served(standins.linear(), standins.people()) as client:
            _, description = await client("GET", "/openapi.json")
            for method, path, body in EXCHANGES:
                status, answer = await client(method, path, body)
                described = operation(description, method, path)["responses"]
                content = described[str(status)]["content"]["application/json"]
                whole = {"components": description["components"], **content["schema"]}
                jsonschema.validate(answer, whole)

    asyncio.run(run())


def test_what_the_description_takes_is_what_the_server_takes():
    async def run():
        async with served(standins.linear()) as client:
            _, description = await client("GET", "/openapi.json")
            whole = {
                "components": description["components"],
                "$ref": "#/components/schemas/InferRequest",
            }
            example = description["components"]["schemas"]["InferRequest"]["example"]
            jsonschema.validate(example, whole)
            status, _ = await client("POST", "/v2/models/linear/infer", example)
            assert status == 200
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({"inputs": [{"name": "x"}]}, whole)

    asyncio.run(run())


@pytest.mark.skipif(TRITON is None, reason="LEPTON_TRITON_PYTHON names no tritonclient")
def test_a_client_of_triton_does_all_it_can():
    with server("linear", "people", "half", "brain") as process:
        done = subprocess.run(
            [TRITON, CLIENT, str(process.port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.dumps(done.stdout.count(": ok")) == "12"
