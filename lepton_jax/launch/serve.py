"""A run's status for whoever looks from outside: a small HTTP server, off unless it is
asked for.

    GET  /         a page to look at
    GET  /status   JSON, as `monitor.status` gives it; a number that is not finite is the text "NaN", "Infinity" or "-Infinity"
    GET  /metrics  for Prometheus
    POST /control  {"do": "set", "settings": {"learning_rate": "3e-4"}}, as tools/control.py asks; always with the token

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

from lepton_jax.controller.live import REQUESTS, ask, holder
from lepton_jax.errors import DataError, LeptonError, SettingError
from lepton_jax.launch.cluster import joined, split
from lepton_jax.launch.record import HostRecord
from lepton_jax.launch.verdict import Place
from lepton_jax.launch.watchdog import reading
from lepton_jax.monitor import Watch, encode, prometheus
from lepton_jax.monitor.status_page import status_html

MOST = 1 << 14  # bytes of a request
AT_ONCE = 16  # clients
PATIENCE = 10.0  # seconds for a client to ask, and again to take the answer
TIME_TO_ANSWER = 60.0  # seconds for a run to take what it is asked for
LOOK = 2.0  # seconds between two looks for the run's token
GUARDS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    ),
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def address(text: str) -> tuple[str, int]:
    """Name and port of "PORT", which is this machine's loopback, or "HOST:PORT".

    Raises:
      SettingError: it is neither.
    """
    match = re.fullmatch(r"(?:(?:\[([^][]+)\]|([^][:]+)):)?([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65535:
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
    """Serves the status of the run in a folder, from threads that never keep the
    process alive.

    Args:
      place: name and port; port 0: any that is free.
      folder: of the run; it need not be there yet.
      hosts: what is known of the hosts, as in hosts.json; None: what that says.

    Raises:
      OSError: the port is taken, or may not be used.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = AT_ONCE

    def __init__(
        self,
        place: tuple[str, int],
        folder: Path,
        hosts: Callable[[], dict[str, Any]] | None = None,
    ):
        family, _, _, _, where = socket.getaddrinfo(
            *place, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        self.folder = Path(folder)
        self._watch = Watch(folder)
        self._hosts = hosts
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(AT_ONCE)
        self._tokens = set[str]()
        self._looked = 0.0
        super().__init__((str(where[0]), int(where[1])), Handler)
        self.name, self.port = str(self.server_address[0]), int(self.server_address[1])
        self.loopback = ipaddress.ip_address(self.name.partition("%")[0]).is_loopback

    @property
    def url(self) -> str:
        return f"http://{joined(self.name, self.port)}/"

    def announce(self) -> None:
        """Say where it is."""
        _say(
            f"status: {self.url}"
            + (
                ""
                if self.loopback
                else f", with the token in {self.folder / 'control' / 'run.json'}"
            )
        )

    def status(self) -> dict[str, Any]:
        """Raises DataError: there is no run yet."""
        with self._lock:
            return self._watch.status(
                self._hosts() if self._hosts is not None else None
            )

    def knows(
        self,
        token: str | None,
        now: bool = False,
    ) -> bool:
        """Whether a token is that of the run at work, or, unless it must be so `now`,
        was so while this server looked: each attempt of a run has another, and who only
        reads shall not have to fetch it anew each time.
        """
        present = self._look()
        known = present if now else self._tokens
        return token is not None and any(
            hmac.compare_digest(token.encode(), each.encode()) for each in [*known]
        )

    def _look(self) -> set[str]:
        token = (holder(self.folder) or {}).get("token")
        found = {token} if isinstance(token, str) and token else set()
        self._tokens |= found
        return found

    def service_actions(self) -> None:
        """Called about twice a second while it serves."""
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            self._look()

    def process_request(
        self,
        request: Any,
        client_address: Any,
    ) -> None:
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
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(
        self,
        request: Any,
        client_address: Any,
    ) -> None:
        # a client that has gone is no news
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Request(io.RawIOBase):
    """What a client sends: so many bytes at most, within so many seconds in all."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._left = MOST
        self._until = time.monotonic() + PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            return 0
        self._connection.settimeout(max(0.001, self._until - time.monotonic()))
        count = self._connection.recv_into(buffer, min(len(buffer), self._left))
        self._left -= count
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """One request on one connection."""

    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Request(self.connection))

    def version_string(self) -> str:
        return "lepton-jax"

    def log_message(self, *_: Any) -> None:
        """The terminal is the run's."""

    def send_error(
        self,
        code: int,
        message: str | None = None,
        explain: str | None = None,
    ) -> None:
        """What http.server itself refuses; without the words of the client, which its
        own message repeats.
        """
        self._refuse(HTTPStatus(code), HTTPStatus(code).phrase)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        make = {
            "/": self._page,
            "/status": self._status,
            "/metrics": self._metrics,
        }.get(path)
        if make is None:
            self._refuse(
                (
                    HTTPStatus.METHOD_NOT_ALLOWED
                    if path == "/control"
                    else HTTPStatus.NOT_FOUND
                ),
                (
                    "POST to it"
                    if path == "/control"
                    else "there are /, /status, /metrics and /control"
                ),
            )
        elif not self._asked_at_home() and not self.server.knows(self._token()):
            self._refuse(
                HTTPStatus.UNAUTHORIZED,
                "send the token of control/run.json as Authorization: Bearer TOKEN",
            )
        else:
            try:
                found = self.server.status()
            except DataError as error:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, error.what)
                return
            self._send(HTTPStatus.OK, *make(found))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self.path.partition("?")[0] != "/control":
            self._refuse(HTTPStatus.NOT_FOUND, "requests go to /control")
        elif not self.server.knows(self._token()):
            self._refuse(
                HTTPStatus.UNAUTHORIZED,
                "send the token of control/run.json as Authorization: Bearer TOKEN",
            )
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
        try:
            answer = ask(
                self.server.folder,
                {"who": f"HTTP from {self.client_address[0]}", **request},
                TIME_TO_ANSWER,
            )
        except LeptonError as error:
            self._refuse(
                HTTPStatus.SERVICE_UNAVAILABLE,
                error.what,
                error.remedy,
            )
            return
        self._send(
            HTTPStatus.OK if answer.get("ok") else HTTPStatus.CONFLICT,
            "application/json",
            encode(answer),
        )

    def _request(self) -> dict[str, Any] | None:
        """What is asked for; None if that has been refused."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "say Content-Length")
            return None
        if len(length) > 9 or int(length) > MOST // 2:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request has at most {MOST // 2} bytes",
            )
            return None
        try:
            found = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            found = None
        settings = found.get("settings", {}) if isinstance(found, dict) else None
        if (
            not isinstance(found, dict)
            or not found.keys() <= {"do", "settings"}
            or found.get("do") not in REQUESTS
            or not isinstance(settings, dict)
            or not all(
                isinstance(each, str | int | float) for each in settings.values()
            )
        ):
            self._refuse(
                HTTPStatus.BAD_REQUEST,
                f'send {{"do": one of {", ".join(REQUESTS)}}}, for set with '
                '"settings": {KNOB: VALUE}',
            )
            return None
        return found

    def _token(self) -> str | None:
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token.strip() if kind.lower() == "bearer" else None

    def _asked_at_home(self) -> bool:
        """On a loopback address, by a loopback name."""
        asked = self.headers.get("Host")
        return self.server.loopback and (
            asked is None or split(asked)[0].lower() in LOOPBACK
        )

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
        self._send(
            code,
            "application/json",
            encode(
                {
                    "ok": False,
                    "error": what,
                    **({"remedy": remedy} if remedy else {}),
                }
            ),
        )

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
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **GUARDS,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Here:
    """This process as the one host of a run that nobody watches over; called, it gives
    the row of hosts.json.
    """

    def __init__(self) -> None:
        self._record = HostRecord("running", socket.gethostname(), 0)
        self._lock = threading.Lock()

    def __call__(self) -> dict[str, Any]:
        now = time.monotonic()
        with self._lock:
            self._record.hear(
                Place(**reading(float("inf"))),
                now,
                0.0,
            )
            return {"0": self._record.to_json(now)}


@contextlib.contextmanager
def serving(
    place: tuple[str, int] | None,
    folder: Path,
    hosts: Callable[[], dict[str, Any]] | None = None,
) -> Iterator[Server | None]:
    """A server in a thread of its own while it is open; None if there is no `place`, or
    none to be had: a run does not end because nobody can look at it.
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
