"""A server of stand-ins in a process of its own, and plain requests to it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("standin_server.py")
PATIENCE = 30.0  # seconds


class Process:
    """A running server.

    Args:
      words: of its command line.
      is_awaited: whether to wait until it is ready, and not only until it listens.
    """

    def __init__(self, *words, is_awaited=True):
        self._log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *words, "--port", "0"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )
        word = "ready:" if is_awaited else "listening on"
        found = self._until(rf"{word} \w+://[^ ]*:(\d+)/")
        self.port = int(found[1])

    @property
    def text(self):
        return Path(self._log.name).read_text()

    def _until(self, pattern):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = re.search(pattern, self.text)
            if found:
                return found
            assert self.process.poll() is None, self.text
            time.sleep(0.02)
        raise AssertionError(self.text)

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE)
        if isinstance(body, dict):
            body = json.dumps(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        with contextlib.closing(connection):
            answer = connection.getresponse()
            content = answer.read()
            is_json = (answer.getheader("content-type") or "").endswith("json")
            return answer.status, json.loads(content) if is_json else content

    def end(self, number=signal.SIGTERM):
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def server(*words, **more):
    process = Process(*words, **more)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


def request(rows=1, value=1.0, name="linear"):
    """The bytes of a request for inference, with keep-alive."""
    part = {"name": "inputs", "datatype": "FP32", "shape": [rows, 3]}
    body = json.dumps({"inputs": [{**part, "data": [value] * (3 * rows)}]}).encode()
    head = (
        f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def read_answer(connection):
    """Status, headers and body of the next answer; None: the server hung up."""
    content = b""
    while b"\r\n\r\n" not in content:
        data = connection.recv(1 << 16)
        if not data:
            return None
        content += data
    head, _, body = content.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    length = int(headers["content-length"])
    while len(body) < length:
        data = connection.recv(1 << 16)
        if not data:
            return None
        body += data
    return int(lines[0].split()[1]), headers, body
