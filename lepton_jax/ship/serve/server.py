"""The server's process: a socket, signals, and an end that loses nothing.

listening   answers health at once; requests get 503 until the models are warm
ready
SIGTERM     not ready: /v2/health/ready says 503, so that balancers look elsewhere
            answers say `Connection: close`; requests that come still are answered
            after `unready` seconds nobody new is let in
            when the last request is answered, or after `drain` seconds: the end
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.ship.serve.application import Application, Phase
from lepton_jax.ship.serve.connection import Connection, Door
from lepton_jax.ship.serve.gate import hold_back

BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
KEEP_ALIVE = 75  # seconds of a quiet connection, as nginx has it
LOOK = 0.05  # seconds between two looks at the connections
KNOCK = 0.1  # seconds for a connection that is half made (assumption)
TICK = 0.02  # seconds between two looks whether all is answered

log = logging.getLogger("lepton.serve")


@dataclass(frozen=True)
class Listening:
    """Where and how a server listens, and how it ends.

    Attributes:
      host: name or address.
      port: 0: any that is free.
      certificate: file of a TLS certificate chain; None: no TLS.
      key: file of its key.
      unready: seconds between being not ready and letting nobody new in: what a
        balancer takes to see it.
      drain: seconds after that for the requests that are under way.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None
    unready: float = 1.0
    drain: float = 30.0


def listen(where: Listening) -> socket.socket:
    """Return a socket that listens.

    Raises:
      SettingError: the address can't be had.
    """
    try:
        ways = socket.getaddrinfo(
            where.host,
            where.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        family, kind, number, _, address = ways[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise SettingError(
            f"port {where.port} of {where.host} can't be had:"
            f" {error.strerror or error}",
            where="command line, --port",
            remedy="give another one by --port",
        ) from error
    return listener


def check_tls(where: Listening) -> None:
    """Check that the files of TLS can be read and belong together.

    Raises:
      SettingError: they can't, or don't.
    """
    if where.certificate is None and where.key is None:
        return
    if where.certificate is None or where.key is None:
        raise SettingError(
            "TLS needs a certificate and its key",
            where="command line, --tls-cert and --tls-key",
            remedy="give both",
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(where.certificate, where.key)
    except (OSError, ssl.SSLError) as error:
        raise SettingError(
            f"the files of TLS can't be used: {error.strerror or error}",
            where=f"{where.certificate}, {where.key}",
            remedy="give a certificate chain and its unencrypted key, in PEM",
        ) from error


class Server(uvicorn.Server):
    """A server of models.

    Args:
      application: that answers.
      where: it listens.
      listener: a socket that listens.
      load: loads the models; when it returns, the server is ready.
    """

    def __init__(
        self,
        application: Application,
        where: Listening,
        listener: socket.socket,
        load: Callable[[], Awaitable[None]],
    ):
        self.application = application
        self.where = where
        self.failure: Exception | None = None  # that ended the server
        self._listener = listener
        self._load = load
        self._door = Door()
        self._signals: list[int] = []
        self._looking: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                application,
                http=type("Connection", (Connection,), {"door": self._door}),
                ws="none",
                lifespan="off",
                loop="uvloop" if _has_uvloop() else "asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                backlog=BACKLOG,
                ssl_certfile=where.certificate,
                ssl_keyfile=where.key,
            )
        )
        tasks = self.server_state.tasks
        application.models.is_alone = lambda: len(tasks) == 1

    # ---- uvicorn's hooks ----

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT end the server, and SIGHUP read files again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_end, number)
        loop.add_signal_handler(signal.SIGHUP, self._told_to_reload)
        try:
            yield
        finally:
            # the end is under way: a further signal must not cut it short
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and load the models meanwhile."""
        await super().startup(sockets)
        self._looking = asyncio.create_task(self._look())
        self._loading = asyncio.create_task(self._get_ready())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End without losing a request."""
        application = self.application
        application.phase = Phase.LEAVING
        if application.meter is not None:
            application.meter.ready(False)
        application.models.stop()
        self._door.is_leaving = True
        for connection in list(self.server_state.connections):
            connection.shutdown()

        if signal.SIGTERM in self._signals:
            await self._sleep(self.where.unready)
        await self._close_the_door()
        await self._drain()
        application.answering.close()
        application.models.close()
        if self._looking is not None:
            self._looking.cancel()

    # ---- internals ----

    async def _get_ready(self) -> None:
        try:
            await self._load()
        except asyncio.CancelledError:
            return
        except Exception as error:
            # whoever runs the server raises it again
            self.failure = error
            self.should_exit = True
            return
        if self.application.phase is not Phase.LOADING:
            return
        # what is there now stays: no pause to look through it again
        gc.collect()
        gc.freeze()
        self.application.phase = Phase.READY
        if self.application.meter is not None:
            self.application.meter.ready(True)

    def _told_to_end(self, number: int) -> None:
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True  # a second Ctrl-C
        self._signals.append(number)
        self.should_exit = True

    def _told_to_reload(self) -> None:
        """Read the files of TLS again, and look for newer artifacts."""
        if self.config.ssl is not None and self.where.certificate is not None:
            try:
                self.config.ssl.load_cert_chain(self.where.certificate, self.where.key)
            except (OSError, ssl.SSLError) as error:
                log.error("the files of TLS can't be read again: %s", error)
        if self.application.phase is Phase.READY:
            self._loading = asyncio.create_task(self._load_again())

    async def _load_again(self) -> None:
        try:
            await self._load()
        except LeptonError as error:
            log.error("what was served before still is: %s", error)

    async def _look(self) -> None:
        """Look at the connections now and then."""
        while True:
            await asyncio.sleep(LOOK if self._door.is_leaving else 1.0)
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.look(now)

    async def _sleep(self, seconds: float) -> None:
        """Wait, but no longer than until a second Ctrl-C."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(TICK)

    async def _close_the_door(self) -> None:
        """Let nobody new in, after all that have knocked."""
        if hold_back(self._listener):
            # what has knocked before is let in meanwhile
            await asyncio.sleep(KNOCK)
        for server in self.servers:
            server.close()
        self._door.closed = time.monotonic()

    async def _drain(self) -> None:
        """Wait until all is answered and each connection has ended."""
        end = time.monotonic() + self.where.drain
        state = self.server_state
        # the looking closes quiet connections
        while state.connections or state.tasks:
            if self.force_exit or time.monotonic() > end:
                break
            await asyncio.sleep(TICK)
        left = len(state.tasks)
        if left:
            log.error("%d requests are not answered after the time for that", left)
        for task in list(state.tasks):
            task.cancel()
        if left:
            await asyncio.sleep(TICK)


def _has_uvloop() -> bool:
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return False
    return True


def end_process(code: int) -> None:
    """End the process at once.

    A thread that compiles can't be stopped, and Python would wait for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
