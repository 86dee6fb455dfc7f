"""The protocol by its published description, Triton's client, and schemathesis."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lepton_jax.errors import LeptonError
from tools.siege.target import ROOT, message, read_answer

STANDINS = ROOT / "tests" / "ship"
TRITON = Path(__file__).with_name("triton_client.py")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
MORE_CHECKS = "response_schema_conformance,response_headers_conformance"
TENSOR = {"name": "inputs", "datatype": "FP32", "shape": [1, 3], "data": [1, 2.5, 3]}
REQUEST = {"id": "42", "inputs": [TENSOR], "outputs": [{"name": "outputs"}]}

# Path, method, body, and the schemas of the request and of the answer.
EXCHANGES: tuple[tuple[str, str, Any, str | None, str], ...] = (
    ("/v2/", "GET", None, None, "metadata_server_response"),
    ("/v2", "GET", None, None, "metadata_server_response"),
    ("/v2/models/linear", "GET", None, None, "metadata_model_response"),
    ("/v2/models/people/versions/1", "GET", None, None, "metadata_model_response"),
    ("/v2/models/nobody", "GET", None, None, "metadata_model_error_response"),
    (
        "/v2/models/linear/infer",
        "POST",
        REQUEST,
        "inference_request",
        "inference_response",
    ),
    (
        "/v2/models/linear/versions/1/infer",
        "POST",
        {"inputs": [TENSOR]},
        "inference_request",
        "inference_response",
    ),
    (
        "/v2/models/people/infer",
        "POST",
        {
            "inputs": [
                {"name": "age", "datatype": "FP64", "shape": [1], "data": [61]},
                {"name": "job", "datatype": "BYTES", "shape": [1], "data": ["cook"]},
            ]
        },
        "inference_request",
        "inference_response",
    ),
    ("/v2/models/linear/infer", "POST", {}, None, "inference_error_response"),
)


def conform(
    place: Path,
    description: Path | None,
    triton: str | None,
    schemathesis: str | None,
) -> dict[str, Any]:
    """Return what holds; what has no program or file here is "not run".

    Args:
      place: of an artifact; only stand-ins are served.
      description: the protocol's, in OpenAPI.
      triton: a Python that has tritonclient.
      schemathesis: the program.
    """
    results: dict[str, Any] = {}
    with _served() as port:
        results["description"] = "not run"
        if description is not None:
            results["description"] = asyncio.run(_described(port, description))
        results["tritonclient"] = "not run"
        if triton is not None:
            results["tritonclient"] = _output([triton, str(TRITON), str(port)])
        results["schemathesis"] = "not run"
        if schemathesis is not None:
            results["schemathesis"] = _output(
                [
                    *(schemathesis, "run", f"http://127.0.0.1:{port}/openapi.json"),
                    *("--checks", f"{CHECKS},{MORE_CHECKS}"),
                    *("--max-examples", "40", "--seed", "0", "--no-color"),
                    # what the server's state alone decides: not ready, swapped models
                    *("--exclude-path-regex", "repository|ready"),
                ]
            )
    faults = [key for key, value in results.items() if "FAULT" in str(value)]
    return {**results, "faults": faults, "kept": not faults}


# ---- internals ----


def _served() -> Any:
    """Run a server of stand-ins."""
    import contextlib

    sys.path[:0] = [str(ROOT), str(STANDINS)]
    from server_process import server

    @contextlib.contextmanager
    def port() -> Any:
        names = ("linear", "people", "half", "brain")
        with server(*names, "--most-mib", "1") as process:
            yield process.port

    return port()


def _output(command: list[str]) -> list[str]:
    """Return the last lines of a program; the first says FAULT if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    fault = ["FAULT"] if done.returncode else []
    return [*fault, *lines[-14 if not fault else -60 :]]


async def _described(port: int, description: Path) -> list[str]:
    """Validate requests and answers by the protocol's description."""
    import jsonschema

    try:
        schemas = yaml.safe_load(description.read_text())["components"]["schemas"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise LeptonError(
            f"the protocol's description can't be read: {error}",
            where=description,
            remedy="give open_inference_rest.yaml as it is published",
        ) from error
    whole = {"components": {"schemas": schemas}}
    lines = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for path, method, body, sent, returned in EXCHANGES:
        content = b"" if body is None else json.dumps(body).encode()
        writer.write(message(path, content, method, content_type="application/json"))
        answer = await read_answer(reader)
        pairs = [(returned, json.loads(answer.body))]
        if sent is not None:
            pairs.append((sent, body))
        verdict = "valid"
        for name, value in pairs:
            schema = {**whole, "$ref": f"#/components/schemas/{name}"}
            try:
                jsonschema.Draft4Validator(schema).validate(value)
            except jsonschema.ValidationError as error:
                verdict = f"FAULT: {error.message}"
        lines.append(f"{method} {path} {answer.status}: {returned} {verdict}")
    writer.close()
    return lines
