"""The server's application: from a message of HTTP to its answer.

    GET  /                                    a page to try the models
    GET  /try/M                               what that page has to know of a model
    GET  /docs, /openapi.json                 all of this, described
    GET  /metrics                             for Prometheus
    GET  /v2                                  the server
    GET  /v2/health/live, /v2/health/ready
    GET  /v2/models                           their names
    GET  /v2/models/M[/versions/V][/ready]
    POST /v2/models/M[/versions/V]/infer      tensors in, tensors out
    POST /v2/models/M[/versions/V]/rows       raw rows in, predictions in words out
    POST /v2/repository/index
    POST /v2/repository/models/M/load, .../unload    with an admin's token

It is plain ASGI. FastAPI, which describes it, would add twice the time of all that
happens here to a small request (python -m tools.bench serve).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import orjson

from lepton_jax.ship.serve.answering import Answer, Answering, Asked
from lepton_jax.ship.serve.batcher import Done
from lepton_jax.ship.serve.guards import Guards, json_length
from lepton_jax.ship.serve.models import Models
from lepton_jax.ship.serve.protocol import JSON_LENGTH
from lepton_jax.ship.serve.refusal import Refusal, busy, unknown

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger("lepton.serve")

CLIENT_GONE = 499  # as nginx writes it in its logs: the client closed the connection
MOST_PATHS = 1024  # that are remembered; a client may ask for any
HEALTH = ("/v2/health/live", "/v2/health/ready")


class Phase(Enum):
    """A server's life."""

    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"


@dataclass
class Call:
    """A message under way.

    Attributes:
      scope: of ASGI.
      headers: by name, in lower case.
      receive: of ASGI.
      visit: of `ship.watch`; None: nothing is measured.
      words: the parts of the path that stand for names.
    """

    scope: Message
    headers: Mapping[bytes, bytes]
    receive: Receive
    visit: Any = None
    words: tuple[str, ...] = ()

    def is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        cycle = self.scope.get("state", {}).get("cycle")
        return cycle is not None and cycle.disconnected

    def has_arrived(self) -> bool:
        """Whether the whole body is here, so that no time limit is needed."""
        cycle = self.scope.get("state", {}).get("cycle")
        return cycle is not None and not cycle.more_body


Handler = Callable[[Call], Awaitable[Answer]]


@dataclass
class Application:
    """The application.

    Attributes:
      models: that are served.
      answering: of requests for inference.
      guards: of all messages.
      others: further handlers of the pages and of changes, by method and path.
      documents: an ASGI application that describes this one; None: there is none.
      meter: of `ship.watch`; None: nothing is measured.
      phase: of the server's life.
    """

    models: Models
    answering: Answering
    guards: Guards
    others: Mapping[tuple[str, str], Handler] = field(default_factory=dict)
    documents: Any = None
    meter: Any = None
    phase: Phase = Phase.LOADING

    def __post_init__(self) -> None:
        routes = _table({**self._own(), **self.others})
        # the same few paths come again and again
        self._find = lru_cache(MOST_PATHS)(routes.find)

    @property
    def is_ready(self) -> bool:
        """Whether the server is to get requests; never without a model."""
        models = self.models
        return (
            self.phase is Phase.READY and bool(models.all()) and not models.is_loading
        )

    async def __call__(
        self,
        scope: Message,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer a message, as ASGI has it."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        call = Call(scope, headers, receive)
        # probes, metadata and metrics are asked all the time, and are no predictions
        if self.meter is not None and scope["method"] == "POST":
            call.visit = self._arrived(headers)
        try:
            answer = await self._answer(call)
        except Refusal as refusal:
            answer = _refused(refusal)
        except asyncio.CancelledError:
            self._leaves(call, CLIENT_GONE)
            if call.is_gone():
                return
            raise
        except Exception:
            # a fault of ours in one request must not end the others
            log.exception("%s %s failed", scope["method"], scope["path"])
            answer = _refused(
                Refusal(
                    HTTPStatus.INTERNAL_SERVER_ERROR,
                    "the server failed; its log says why",
                )
            )
        if answer is DOCUMENTED:
            await self.documents(scope, receive, send)
        else:
            await _send(send, call, answer)
        self._leaves(call, answer.status, answer.done)

    # ---- the way of a message ----

    async def _answer(self, call: Call) -> Answer:
        """Return the answer to a message.

        Raises:
          Refusal: it is refused.
        """
        path: str = call.scope["path"]
        if path not in HEALTH:
            self.guards.check(call.headers)
        handlers, call.words = self._find(path)
        method = call.scope["method"]
        if handlers is None:
            if self.documents is not None:
                return DOCUMENTED
            raise unknown(f"there is nothing at {path!r}")
        if method not in handlers:
            raise Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"ask {path!r} by {' or '.join(handlers)}",
            )
        return await handlers[method](call)

    def _own(self) -> dict[tuple[str, str], Handler]:
        """Return the handlers by method and path."""
        return {
            ("POST", "/v2/models/*/infer"): self._infer,
            ("POST", "/v2/models/*/versions/*/infer"): self._infer,
            ("POST", "/v2/models/*/rows"): self._rows,
            ("POST", "/v2/models/*/versions/*/rows"): self._rows,
            ("GET", "/v2/health/live"): self._live,
            ("GET", "/v2/health/ready"): self._ready,
            ("GET", "/v2"): self._server,
            ("GET", "/v2/models"): self._names,
            ("GET", "/v2/models/*"): self._model,
            ("GET", "/v2/models/*/versions/*"): self._model,
            ("GET", "/v2/models/*/ready"): self._model_ready,
            ("GET", "/v2/models/*/versions/*/ready"): self._model_ready,
        }

    def _arrived(self, headers: Mapping[bytes, bytes]) -> Any:
        given = headers.get(b"x-request-id")
        parent = headers.get(b"traceparent")
        return self.meter.arrive(
            None if given is None else given.decode("latin-1"),
            None if parent is None else parent.decode("latin-1"),
        )

    def _leaves(
        self,
        call: Call,
        status: int,
        done: Done | None = None,
    ) -> None:
        """Have the meter told of a request that was answered, or can't be."""
        if call.visit is None:
            return
        now = time.perf_counter()
        call.visit.clock = lambda: now  # it is told later, but ended now
        self.models.afterwards.do(self._left, call.visit, status, done)

    def _left(
        self,
        visit: Any,
        status: int,
        done: Done | None,
    ) -> None:
        if done is not None:
            visit.charge = done.charge
        self.meter.leave(visit, status)

    # ---- inference ----

    async def _infer(self, call: Call) -> Answer:
        return await self.answering.infer(await self._asked(call))

    async def _rows(self, call: Call) -> Answer:
        return await self.answering.rows(await self._asked(call))

    async def _asked(self, call: Call) -> Asked:
        """Return a request for inference; its body is read after all is known."""
        name, version = _model_of(call)
        self._check_loaded()
        if not call.has_arrived():
            # a model that is not there is said before megabytes are sent
            self.models.find(name, version)
        body = await read_body(call, self.guards)
        return Asked(
            name,
            version,
            body,
            json_length(call.headers, JSON_LENGTH),
            call.is_gone,
            call.visit,
        )

    def _check_loaded(self) -> None:
        """Check that it is known which models there are.

        Raises:
          Refusal: 503, no artifact has been opened yet.
        """
        if self.phase is not Phase.READY and not self.models.all():
            raise busy(f"the server is {self.phase.value}")

    # ---- health and metadata ----

    async def _live(self, call: Call) -> Answer:
        return as_json({"live": True})

    async def _ready(self, call: Call) -> Answer:
        if self.is_ready:
            return as_json({"ready": True})
        state = self.phase.value if self.models.all() else "without a model"
        answer = as_json({"ready": False, "error": f"the server is {state}"})
        return Answer(
            answer.body,
            status=HTTPStatus.SERVICE_UNAVAILABLE,
            headers=[(b"retry-after", b"1")],
        )

    async def _server(self, call: Call) -> Answer:
        return as_json(
            {
                "name": "lepton-jax",
                "version": _version(),
                "extensions": ["binary_tensor_data", "model_repository"],
            }
        )

    async def _names(self, call: Call) -> Answer:
        names = sorted({served.name for served in self.models.all()})
        return as_json({"models": names})

    async def _model(self, call: Call) -> Answer:
        name, version = _model_of(call)
        self._check_loaded()
        served = self.models.find(name, version)
        return as_json(served.metadata(self.models.versions(name)))

    async def _model_ready(self, call: Call) -> Answer:
        name, version = _model_of(call)
        self._check_loaded()
        served = self.models.find(name, version)
        if self.phase is Phase.LEAVING:
            raise busy("the server is leaving")
        return as_json({"name": served.name, "ready": True})


def as_json(content: Any) -> Answer:
    """Return an answer in JSON."""
    return Answer(orjson.dumps(content))


async def read_body(call: Call, guards: Guards) -> bytes:
    """Return the body of a message.

    Raises:
      Refusal: 413, it is too large; 408, it takes too long; or see `Guards.unpacked`.
      CancelledError: the client went away in the middle.
    """
    guards.check_length(call.headers)
    if call.has_arrived():
        body: bytes = (await call.receive())["body"]
    else:
        try:
            async with asyncio.timeout(guards.body_seconds):
                body = await _whole(call, guards)
        except TimeoutError as error:
            raise _slow(guards) from error
    if len(body) > guards.most_bytes:
        raise guards.too_large()
    return guards.unpacked(body, call.headers.get(b"content-encoding"))


# ---- internals ----

# Stands for the answer of the application that describes this one.
DOCUMENTED = Answer(b"")

GUARDS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class _Routes:
    """Handlers by method, by the pattern of a path."""

    fixed: Mapping[tuple[str, ...], dict[str, Handler]]

    def find(self, path: str) -> tuple[dict[str, Handler] | None, tuple[str, ...]]:
        """Return the handlers of a path, and the words in the places of "*"."""
        parts = tuple(path.rstrip("/").split("/")[1:])
        for pattern in _patterns(parts):
            handlers = self.fixed.get(pattern)
            if handlers is not None:
                pairs = zip(parts, pattern, strict=True)
                words = tuple(part for part, star in pairs if star == "*")
                return handlers, words
        return None, ()


# Places of a path where names stand: /v2/models/M/versions/V, /try/M,
# /v2/repository/models/M/load.
PLACES = ((), (2,), (2, 4), (1,), (3,))


def _patterns(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the patterns that a path may have."""
    return [
        tuple("*" if place in places else part for place, part in enumerate(parts))
        for places in PLACES
        if not places or places[-1] < len(parts)
    ]


def _table(handlers: Mapping[tuple[str, str], Handler]) -> _Routes:
    fixed: dict[tuple[str, ...], dict[str, Handler]] = {}
    for (method, path), handler in handlers.items():
        parts = tuple(path.rstrip("/").split("/")[1:])
        fixed.setdefault(parts, {})[method] = handler
    return _Routes(fixed)


def _model_of(call: Call) -> tuple[str, str | None]:
    """Return the model in a path, and the version, if one is named."""
    name, *version = call.words
    return name, version[0] if version else None


async def _whole(call: Call, guards: Guards) -> bytes:
    """Return a body that comes in parts."""
    message = await _part(call)
    parts = [message["body"]]
    size = len(parts[0])
    while message["more_body"]:
        message = await _part(call)
        parts.append(message["body"])
        size += len(parts[-1])
        if size > guards.most_bytes:
            raise guards.too_large()
    return b"".join(parts)


async def _part(call: Call) -> Message:
    message = await call.receive()
    if message["type"] == "http.disconnect":
        raise asyncio.CancelledError
    return message


def _slow(guards: Guards) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        f"the body did not arrive within {guards.body_seconds:g} s",
        closes=True,
    )


def _refused(refusal: Refusal) -> Answer:
    headers = []
    if refusal.retry_after is not None:
        headers.append((b"retry-after", b"%d" % refusal.retry_after))
    if refusal.closes:
        headers.append((b"connection", b"close"))
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    body = orjson.dumps({"error": refusal.message})
    return Answer(body, status=int(refusal.status), headers=headers)


async def _send(send: Send, call: Call, answer: Answer) -> None:
    headers = [
        (b"content-type", answer.kind),
        (b"content-length", b"%d" % len(answer.body)),
        *answer.headers,
    ]
    if call.scope["method"] == "GET":
        headers.extend(GUARDS)
    if call.visit is not None:
        headers.append((b"x-request-id", call.visit.id.encode()))
    await send(
        {
            "type": "http.response.start",
            "status": int(answer.status),
            "headers": headers,
        }
    )
    await send({"type": "http.response.body", "body": answer.body})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lepton-jax")
    except PackageNotFoundError:
        return "unknown"
