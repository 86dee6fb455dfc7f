"""A run's status over HTTP: a small server, off unless --status asks for it.

    GET  /         a page for a person
    GET  /status   JSON, as `monitor.status` gives it; a number that is not finite is
                   the text "NaN", "Infinity" or "-Infinity"
    GET  /metrics  for Prometheus
    POST /control  {"do": "set", "settings": {"learning_rate": "3e-4"}}, the request of
                   tools/control.py; always with the token

The token is that of the run at work, in control/run.json of its folder, and is sent as
`Authorization: Bearer TOKEN`. It is needed for everything, unless the server listens on
a loopback address and is asked by a loopback name: a page of the web may let a name of
its own lead here, but not that one.
"""

from __future__ import annotations

import contextlib
import hmac
import http.server
import io
import ipaddress
import json
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from lepton_jax.controller.live import REQUESTS
from lepton_jax.errors import DataError, LeptonError, SettingError
from lepton_jax.hosts.mailbox import ask, holder
from lepton_jax.launch.cluster import joined, split
from lepton_jax.launch.supervise.record import HostRecord
from lepton_jax.launch.supervise.verdict import Place
from lepton_jax.launch.supervise.watchdog import reading
from lepton_jax.monitor import Watch, encode, prometheus
from lepton_jax.monitor.status_page import status_html

# assumptions
MOST = 1 << 14  # bytes of a request, half of them for its body
MOST_DIGITS = 9  # of the length of a body
AT_ONCE = 16  # clients
PATIENCE = 10.0  # seconds for a client to ask, and again to take the answer
LEAST_PATIENCE = 0.001  # seconds; 0 would mean no limit
TIME_TO_ANSWER = 60.0  # seconds for a run to take a request
LOOK = 2.0  # seconds between two looks for the run's token
MOST_PORT = 65535
SEND_TOKEN = "send the token of control/run.json as Authorization: Bearer TOKEN"
# headers of every answer
GUARDS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    ),
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def address(text: str) -> tuple[str, int]:
    """Return name and port of "PORT" or "HOST:PORT".

    Without a host it is this machine's loopback address.

    Raises:
      SettingError: it is neither.
    """
    match = re.fullmatch(r"(?:(?:\[([^][]+)\]|([^][:]+)):)?([0-9]{1,5})", text)
    if match is None or int(match[3]) > MOST_PORT:
        raise SettingError(
            f"{text!r} is no place to serve the status at",
            where="command line, --status",
            remedy=(
                "write PORT for this machine alone, or HOST:PORT, e.g. 0.0.0.0:8477 or"
                " [::]:8477"
            ),
        )
    return match[1] or match[2] or "127.0.0.1", int(match[3])


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Server of the status of the run in a folder.

    Its threads never keep the process alive.

    Args:
      place: name and port; port 0: any that is free.
      folder: of the run; it need not be there yet.
      hosts: returns the field "hosts" of hosts.json; None: as that file says.

    Raises:
      OSError: the port is taken, or may not be used.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = AT_ONCE

    def __init__(
        self,
        place: tuple[str, int],
        folder: Path,
        hosts: Callable[[], dict[str, Any]] | None = None,
    ):
        ways = socket.getaddrinfo(
            *place, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = ways[0]
        self.address_family = family
        self.folder = Path(folder)
        self._watch = Watch(folder)
        self._hosts = hosts
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(AT_ONCE)
        self._tokens = set[str]()
        self._looked = 0.0
        name = str(address[0])
        port = int(address[1])
        super().__init__((name, port), Handler)
        self.name = str(self.server_address[0])
        self.port = int(self.server_address[1])
        number = self.name.partition("%")[0]
        self.loopback = ipaddress.ip_address(number).is_loopback

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{joined(self.name, self.port)}/"

    def announce(self) -> None:
        """Print the address."""
        text = f"status: {self.url}"
        if not self.loopback:
            text += f", with the token in {self.folder / 'control' / 'run.json'}"
        _say(text)

    def status(self) -> dict[str, Any]:
        """Return the run's state.

        Raises:
          DataError: there is no run yet.
        """
        with self._lock:
            hosts = self._hosts() if self._hosts is not None else None
            return self._watch.status(hosts)

    def knows(
        self,
        token: str | None,
        now: bool = False,
    ) -> bool:
        """Whether a token is the run's.

        Each attempt of a run has another token. A client that only reads need not fetch
        it anew each time.

        Args:
          token: of the client.
          now: whether it must be that of the run at work; else one that was so while
            this server looked is good enough.
        """
        if token is None:
            return False
        present = self._look()
        known = present if now else [*self._tokens]
        return any(hmac.compare_digest(token.encode(), good.encode()) for good in known)

    def _look(self) -> set[str]:
        """Return the token of the run at work, and remember it."""
        token = (holder(self.folder) or {}).get("token")
        present = {token} if isinstance(token, str) and token else set()
        self._tokens |= present
        return present

    def service_actions(self) -> None:
        """Look for a new token; socketserver calls this about twice a second."""
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            self._look()

    def process_request(
        self,
        request: Any,
        client_address: Any,
    ) -> None:
        """Serve a client in a thread, if there is room for one more."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._room.release()
            raise

    def process_request_thread(
        self,
        request: Any,
        client_address: Any,
    ) -> None:
        """Serve a client, and make room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(
        self,
        request: Any,
        client_address: Any,
    ) -> None:
        """Print an error, unless it only says that a client has gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Request(io.RawIOBase):
    """A client's request: at most `MOST` bytes, within `PATIENCE` seconds in all."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._left = MOST
        self._until = time.monotonic() + PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            return 0
        left = self._until - time.monotonic()
        self._connection.settimeout(max(LEAST_PATIENCE, left))
        count = self._connection.recv_into(buffer, min(len(buffer), self._left))
        self._left -= count
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """One request on one connection."""

    server: Server

    def setup(self) -> None:
        """Limit the request in size and time."""
        super().setup()
        self.rfile = io.BufferedReader(_Request(self.connection))

    def version_string(self) -> str:
        """Return the name in the header Server."""
        return "lepton-jax"

    def log_message(self, *_: Any) -> None:
        """Print nothing: the terminal is the run's."""

    def send_error(
        self,
        code: int,
        message: str | None = None,
        explain: str | None = None,
    ) -> None:
        """Answer a request that http.server itself refuses.

        Its own message would repeat the words of the client.
        """
        self._refuse(HTTPStatus(code), HTTPStatus(code).phrase)

    def do_GET(self) -> None:
        """Answer with the status, as the path says."""
        path = self.path.partition("?")[0]
        formats = {
            "/": self._page,
            "/status": self._status,
            "/metrics": self._metrics,
        }
        if path == "/control":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "POST to it")
        elif path not in formats:
            self._refuse(
                HTTPStatus.NOT_FOUND, "there are /, /status, /metrics and /control"
            )
        elif not self._asked_at_home() and not self.server.knows(self._token()):
            self._refuse(HTTPStatus.UNAUTHORIZED, SEND_TOKEN)
        else:
            try:
                status = self.server.status()
            except DataError as error:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, error.what)
                return
            kind, body = formats[path](status)
            self._send(HTTPStatus.OK, kind, body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Put a request to the run."""
        if self.path.partition("?")[0] != "/control":
            self._refuse(HTTPStatus.NOT_FOUND, "requests go to /control")
        elif not self.server.knows(self._token()):
            self._refuse(HTTPStatus.UNAUTHORIZED, SEND_TOKEN)
        elif not self.server.knows(self._token(), now=True):
            self._refuse(
                HTTPStatus.CONFLICT,
                "the token is of an earlier attempt: read it anew once the run is at"
                " work again",
            )
        else:
            request = self._request()
            if request is not None:
                self._control(request)

    def _control(self, request: dict[str, Any]) -> None:
        request = {"who": f"HTTP from {self.client_address[0]}", **request}
        try:
            answer = ask(self.server.folder, request, TIME_TO_ANSWER)
        except LeptonError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, error.what, error.remedy)
            return
        code = HTTPStatus.OK if answer.get("ok") else HTTPStatus.CONFLICT
        self._send(code, "application/json", encode(answer))

    def _request(self) -> dict[str, Any] | None:
        """Return the request for the run; None if it has been refused."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "say Content-Length")
            return None
        if len(length) > MOST_DIGITS or int(length) > MOST // 2:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request has at most {MOST // 2} bytes",
            )
            return None
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            request = None
        if not _is_request(request):
            self._refuse(
                HTTPStatus.BAD_REQUEST,
                f'send {{"do": one of {", ".join(REQUESTS)}}}, for set with '
                '"settings": {KNOB: VALUE}',
            )
            return None
        return request

    def _token(self) -> str | None:
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token.strip() if kind.lower() == "bearer" else None

    def _asked_at_home(self) -> bool:
        """Whether the client asks on a loopback address, by a loopback name."""
        asked = self.headers.get("Host")
        return self.server.loopback and (
            asked is None or split(asked)[0].lower() in LOOPBACK
        )

    # ---- answers ----

    def _status(self, found: Mapping[str, Any]) -> tuple[str, bytes]:
        return "application/json", encode(found)

    def _metrics(self, found: Mapping[str, Any]) -> tuple[str, bytes]:
        return "text/plain; version=0.0.4; charset=utf-8", prometheus(found).encode()

    def _page(self, found: Mapping[str, Any]) -> tuple[str, bytes]:
        return "text/html; charset=utf-8", status_html(found).encode(
            "utf-8", "xmlcharrefreplace"
        )

    def _refuse(
        self,
        code: HTTPStatus,
        what: str,
        remedy: str | None = None,
    ) -> None:
        answer = {"ok": False, "error": what}
        if remedy:
            answer["remedy"] = remedy
        self._send(code, "application/json", encode(answer))

    def _send(
        self,
        code: HTTPStatus,
        kind: str,
        body: bytes,
    ) -> None:
        self.connection.settimeout(PATIENCE)
        self.send_response(code)
        if code == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in GUARDS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Here:
    """This process as the one host of a run without a supervisor.

    Called, it returns the field "hosts" of hosts.json.
    """

    def __init__(self) -> None:
        self._record = HostRecord("running", socket.gethostname(), 0)
        self._lock = threading.Lock()

    def __call__(self) -> dict[str, Any]:
        now = time.monotonic()
        with self._lock:
            place = Place(**reading(limit=float("inf")))
            self._record.hear(place, now, silent=0.0)
            return {"0": self._record.to_json(now)}


@contextlib.contextmanager
def serving(
    place: tuple[str, int] | None,
    folder: Path,
    hosts: Callable[[], dict[str, Any]] | None = None,
) -> Iterator[Server | None]:
    """Serve the status in a thread of its own inside the block.

    Yields the server; None if there is no `place`, or it can't be had: a run does not
    end because nobody can look at it.

    Args:
      place: name and port; None: no server.
      folder: of the run.
      hosts: as `Server` takes it.
    """
    server = None
    if place is not None:
        try:
            server = Server(place, folder, hosts)
        except OSError as error:
            _say(
                f"warning: the status can't be served at {joined(*place)}:"
                f" {error.strerror or error}; the run goes on without"
            )
    if server is None:
        yield None
        return
    server.announce()
    thread = threading.Thread(
        target=server.serve_forever,
        name="status",
        daemon=True,
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal
        print(text, file=sys.stderr, flush=True)


def _is_request(request: Any) -> bool:
    """Whether it is a request that the run understands."""
    if not isinstance(request, dict) or not request.keys() <= {"do", "settings"}:
        return False
    settings = request.get("settings", {})
    if request.get("do") not in REQUESTS or not isinstance(settings, dict):
        return False
    return all(isinstance(value, str | int | float) for value in settings.values())
