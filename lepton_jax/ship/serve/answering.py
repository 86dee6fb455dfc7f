"""From a request's body to the body of its answer: read, prepare, run, write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from lepton_jax.errors import LeptonError
from lepton_jax.ship.artifact.given import check_ranges
from lepton_jax.ship.serve import protocol, raw
from lepton_jax.ship.serve.batcher import Done
from lepton_jax.ship.serve.models import Models, Served
from lepton_jax.ship.serve.protocol import Request, Wanted
from lepton_jax.ship.serve.refusal import bad, broken
from lepton_jax.ship.serve.signature import LABEL

JSON = b"application/json"
BINARY = b"application/octet-stream"
MILLI = 1e3  # of a second
# Threads that prepare raw rows; Polars has threads of its own (assumption).
PREPARERS = 2
# Rows of a request that are explained: occlusion runs the model once for each part of a
# row (assumption).
MOST_EXPLAINED = 16


@dataclass(frozen=True)
class Asked:
    """A request for inference, as it came over HTTP.

    Attributes:
      model: name in its path.
      version: in its path; None: there is none.
      body: of the message.
      json_length: bytes of JSON at the body's beginning; None: all.
      is_gone: whether the client has gone.
      visit: of `ship.watch`; None: nothing is measured.
    """

    model: str
    version: str | None
    body: bytes
    json_length: int | None = None
    is_gone: Callable[[], bool] = lambda: False
    visit: Any = None


@dataclass(frozen=True)
class Answer:
    """What is sent back.

    Attributes:
      body: of the message.
      kind: its Content-Type.
      status: of HTTP.
      headers: further ones.
      done: the run that it tells of; None: there was none.
    """

    body: bytes
    kind: bytes = JSON
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    done: Done | None = None


class Answering:
    """Answers requests for inference.

    Args:
      models: that answer.
      most_rows: limit to the rows of a request.
    """

    def __init__(self, models: Models, most_rows: int):
        self.models = models
        self.most_rows = most_rows
        self._preparers = ThreadPoolExecutor(PREPARERS, "lepton-prepare")

    async def infer(self, asked: Asked) -> Answer:
        """Answer a request of the protocol.

        Raises:
          Refusal: it can't be answered.
        """
        served = self.models.choose(asked.model, asked.version)
        served.visits += 1
        try:
            return await self._infer(served, asked)
        finally:
            served.visits -= 1

    async def rows(self, asked: Asked) -> Answer:
        """Answer a request of raw rows: {"rows": [{"age": 39}]}.

        Raises:
          Refusal: it can't be answered.
        """
        served = self.models.choose(asked.model, asked.version)
        served.visits += 1
        try:
            return await self._rows(served, asked)
        finally:
            served.visits -= 1

    def close(self) -> None:
        """Let go of the threads."""
        self._preparers.shutdown(wait=False, cancel_futures=True)

    # ---- internals ----

    async def _infer(self, served: Served, asked: Asked) -> Answer:
        request = protocol.read_request(
            asked.body,
            asked.json_length,
            served.signature,
            self.most_rows,
        )
        _name(served, asked, request)
        inputs = request.inputs
        if request.is_raw:
            rows = raw.columns_to_rows(request, served.artifact)
            inputs = await self._prepared(served, rows, asked)
        done = await self._run(served, inputs, request, asked)
        explanation = await self._explained(served, inputs, request)
        return _written(served, request, done, asked, explanation)

    async def _rows(self, served: Served, asked: Asked) -> Answer:
        parsed = protocol.parse_json(asked.body)
        artifact = served.artifact
        if not artifact.columns:
            names = ", ".join(served.signature.arrays)
            raise bad(
                "the model takes arrays alone; send the tensors"
                f" {names} to /v2/models/{served.name}/infer"
            )
        rows = raw.checked_rows(parsed.get("rows"), artifact, self.most_rows)
        wanted = [Wanted(name) for name in served.signature.outputs]
        request = protocol.plain_request(parsed, len(rows), wanted)
        _name(served, asked, request)
        inputs = await self._prepared(served, rows, asked)
        done = await self._run(served, inputs, request, asked)
        explanation = await self._explained(served, inputs, request)
        return _in_words(served, request, done, asked, explanation)

    async def _prepared(
        self,
        served: Served,
        rows: list[dict[str, Any]],
        asked: Asked,
    ) -> dict[str, np.ndarray]:
        """Return the program's inputs of raw rows, prepared in another thread.

        Each request is prepared alone: a cell of one can't change what another's
        column is taken for.
        """
        if served.meter is not None:
            served.meter.rows(rows)
        inputs = await asyncio.get_running_loop().run_in_executor(
            self._preparers, raw.prepare, served.artifact, rows
        )
        if asked.visit is not None:
            asked.visit.mark("prepare")
        return inputs

    async def _run(
        self,
        served: Served,
        inputs: Mapping[str, np.ndarray],
        request: Request,
        asked: Asked,
    ) -> Done:
        """Return the outputs of a request's rows."""
        limits = served.artifact.manifest.limits
        if limits:
            try:
                check_ranges(inputs, limits)
            except LeptonError as error:
                raise raw.refusal_of(error) from error
        if served.meter is not None:
            self.models.afterwards.do(served.meter.arrays, inputs)
        done = await served.batcher.submit(
            inputs,
            request.rows,
            request.priority,
            request.timeout,
            asked.is_gone,
        )
        if asked.visit is not None:
            _mark(asked.visit, done)
        _check_hidden(served, done.outputs, inputs)
        if self.models.shadows:
            self.models.shadow(served, inputs, request.rows, done.outputs)
        return done

    async def _explained(
        self,
        served: Served,
        inputs: Mapping[str, np.ndarray],
        request: Request,
    ) -> dict[str, Any] | None:
        """Return the explanation that the parameter `explain` asks for.

        It is made in another thread, next to the queue.

        Raises:
          Refusal: there is no such explanation, or there are too many rows for it.
        """
        method = request.parameters.get("explain")
        if method is None:
            return None
        if request.rows > MOST_EXPLAINED:
            raise bad(f"at most {MOST_EXPLAINED} rows of a request are explained")
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._preparers, _explanation, served.artifact, inputs, method
            )
        except LeptonError as error:
            raise raw.refusal_of(error) from error


def _explanation(
    artifact: Any,
    inputs: Mapping[str, np.ndarray],
    method: Any,
) -> dict[str, Any]:
    """Return an explanation as plain data."""
    from lepton_jax.ship import explain  # it is not often asked for

    if method not in explain.OF_ARTIFACTS:
        raise bad(f"explain is one of {', '.join(explain.OF_ARTIFACTS)}")
    return explain.explain(artifact, dict(inputs), method)


def _name(served: Served, asked: Asked, request: Request) -> None:
    """Tell the meter what a request is about, once it is read."""
    if asked.visit is None:
        return
    kind = "binary" if request.is_binary else "json"
    asked.visit.names(served.name, served.version, request.rows, kind)
    asked.visit.mark("read")


def _mark(visit: Any, done: Done) -> None:
    """Tell the meter how long a request waited and was computed."""
    visit.mark("compute")
    # the mark holds the time in the queue as well
    visit.add("compute", -done.waited)
    visit.add("queue", done.waited)


def _written(
    served: Served,
    request: Request,
    done: Done,
    asked: Asked,
    explanation: dict[str, Any] | None,
) -> Answer:
    """Return the answer of the protocol."""
    outputs = _with_label(served, done.outputs)
    body, json_length = protocol.write_response(
        request,
        served.name,
        served.version,
        outputs,
        served.signature.outputs,
        explanation and {"explanation": explanation},
    )
    headers = _headers(done)
    kind = JSON
    if json_length is not None:
        kind = BINARY
        headers.append((protocol.JSON_LENGTH, b"%d" % json_length))
    if asked.visit is not None:
        asked.visit.mark("write")
    return Answer(body, kind, headers=headers, done=done)


def _in_words(
    served: Served,
    request: Request,
    done: Done,
    asked: Asked,
    explanation: dict[str, Any] | None,
) -> Answer:
    """Return the answer to raw rows: predictions in words, and all outputs."""
    outputs = _with_label(served, done.outputs)
    response: dict[str, Any] = {
        "model_name": served.name,
        "model_version": served.version,
    }
    if request.id is not None:
        response["id"] = request.id
    best = outputs.get(LABEL, outputs.get("prediction"))
    if best is not None:
        response["predictions"] = best.tolist()
    response["outputs"] = {
        name: protocol.finite(array, name, request) for name, array in outputs.items()
    }
    if explanation is not None:
        response["explanation"] = explanation
    body = orjson.dumps(response, option=protocol.ENCODING)
    if asked.visit is not None:
        asked.visit.mark("write")
    return Answer(
        body,
        headers=_headers(done),
        done=done,
    )


def _headers(done: Done) -> list[tuple[bytes, bytes]]:
    """Return the headers that tell how an answer came about.

    Server-Timing is W3C's, in milliseconds: https://www.w3.org/TR/server-timing/
    """
    timing = b"queue;dur=%.3f, compute;dur=%.3f" % (
        MILLI * done.waited,
        MILLI * done.computed,
    )
    return [
        (b"lepton-batch-size", b"%d" % done.size),
        (b"server-timing", timing),
    ]


def _with_label(
    served: Served,
    outputs: Mapping[str, np.ndarray],
) -> Mapping[str, np.ndarray]:
    """Return the outputs, and the prediction in words where there are some."""
    if LABEL not in served.signature.outputs:
        return outputs
    labels = served.artifact.manifest.labels
    words = np.empty(len(outputs["prediction"]), dtype=object)
    words[:] = [str(labels[number]) for number in outputs["prediction"].tolist()]
    return {**outputs, LABEL: words}


def _check_hidden(
    served: Served,
    outputs: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
) -> None:
    """Raise Refusal if NaN in the outputs hides behind a class.

    The trainer refuses such a prediction, too.
    """
    for name in served.signature.hidden:
        if _holds_nan(outputs[name]):
            message = f"{name} holds NaN, which the prediction would hide"
            raise bad(message) if _any_nan(inputs) else broken(message)


def _holds_nan(array: np.ndarray) -> bool:
    if array.dtype.kind in "iubO":
        return False
    return bool(np.isnan(array).any())


def _any_nan(arrays: Mapping[str, np.ndarray]) -> bool:
    return any(_holds_nan(array) for array in arrays.values())
