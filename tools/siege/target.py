"""The server under siege, and what it must answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import LeptonError
from lepton_jax.ship.artifact.compiled import filled

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds for the server to be ready
ANSWER_SECONDS = 60.0  # for an answer; longer is a lost request
BOUND = 1e-5  # share of the largest output, where the bits of a size are not known
MOST_ROWS = 8  # of a request
END = b"\r\n\r\n"
ADMIN = "siege-" + "0" * 40


@dataclass
class Answer:
    """An answer of HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def closes(self) -> bool:
        """Whether the server ends the connection."""
        return self.headers.get("connection") == "close"


class Expected:
    """What an artifact answers for its stored rows, by compiled size.

    Args:
      place: of the artifact.
      sizes: compiled sizes of the server.
    """

    def __init__(self, place: Path, sizes: list[int]):
        artifact = lepton.Artifact.open(place)
        self.name = artifact.manifest.name
        self.inputs = artifact.stored.inputs
        self.rows = len(artifact.stored)
        self.datatypes = {part.name: part for part in artifact.inputs}
        self.outputs = {
            size: _replayed(artifact.compiled(size), self.inputs, self.rows, size)
            for size in sizes
        }

    def fault(
        self,
        rows: np.ndarray,
        outputs: dict[str, np.ndarray],
        size: int,
    ) -> str | None:
        """Return what is wrong with outputs for some stored rows; None: nothing."""
        for name, got in outputs.items():
            expected = self.outputs[size][name][rows]
            if got.shape != expected.shape:
                return f"{name} has shape {got.shape}"
            if not np.array_equal(got, expected):
                return f"{name} is {got.ravel()[:4]}, not {expected.ravel()[:4]}"
        return None


def _replayed(program: Any, inputs: Any, rows: int, size: int) -> dict[str, Any]:
    """Return the outputs of a size for all stored rows, each in a batch by itself."""
    parts = []
    for row in range(rows):
        batch = {name: filled(array, row, 1, size) for name, array in inputs.items()}
        parts.append({name: np.asarray(a)[:1] for name, a in program(batch).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Target:
    """A running server.

    Args:
      place: of its artifact.
      *words: further words of its command line.
    """

    def __init__(self, place: Path, *words: str):
        self._folder = tempfile.TemporaryDirectory()
        token = Path(self._folder.name) / "token"
        token.touch(0o600)
        token.write_text(ADMIN)
        self.log = Path(self._folder.name) / "log"
        self._stream = self.log.open("w")
        command = [sys.executable, "-m", "lepton_jax", "serve", str(place)]
        more = ["--port", "0", "--admin-token-file", str(token), *words]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [*command, *more],
            cwd=ROOT,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self.port = 0

    def until(self, word: str) -> None:
        """Wait until the server has said something.

        Raises:
          LeptonError: it ends, or says nothing of the kind.
        """
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            found = re.search(rf"{word} https?://[^ ]*:(\d+)/", self.log.read_text())
            if found:
                self.port = int(found[1])
                return
            time.sleep(0.02)
        raise LeptonError(
            "the server does not get ready",
            where=self.log.read_text()[-400:],
            remedy="start it by hand and look",
        )

    @property
    def memory(self) -> int:
        """Bytes of the process that lie in memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]

    def end(self) -> int:
        """Return the exit code, after SIGTERM."""
        self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def close(self) -> None:
        """End it in any case."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._stream.close()
        self._folder.cleanup()


@contextlib.contextmanager
def target(place: Path, *words: str, word: str = "ready:") -> Iterator[Target]:
    """Run a server; it is ready in the block."""
    server = Target(place, *words)
    try:
        server.until(word)
        yield server
    finally:
        server.close()


@contextlib.asynccontextmanager
async def connection(
    port: int,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection to the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Return the next answer.

    Raises:
      EOFError: the server hung up.
      TimeoutError: it says nothing.
    """
    async with asyncio.timeout(ANSWER_SECONDS):
        head = await reader.readuntil(END)
        lines = head.decode("latin-1").lower().strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(lines[0].split()[1]), headers, body)


def message(
    path: str,
    body: bytes,
    method: str = "POST",
    **headers: str,
) -> bytes:
    """Return the bytes of a message of HTTP."""
    named = {
        "host": "localhost",
        "content-length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


async def ask_json(port: int, method: str, path: str) -> Any:
    """Return the JSON at a path."""
    async with connection(port) as (reader, writer):
        writer.write(message(path, b"", method))
        return json.loads((await read_answer(reader)).body)
