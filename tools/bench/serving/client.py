"""A client that sends the same request again and again, on some connections at once.

    python -m tools.bench.serving.client < JOB.json

It is given {"port", "path", "headers", "body" (a file), "connections", "seconds"}, and
prints {"seconds": median from request to answer, "rest": median of that without the
model's time, as Server-Timing tells it, "rate": answers a second after the first
quarter of the time, "statuses": {status: count}}. It does as little as it can for a
response, for it shares the machine with the server: it reads the head once, and then
counts bytes.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
COMPUTED = re.compile(rb"compute;dur=([0-9.]+)")  # milliseconds
MILLI = 1e-3
RAMP = 0.25  # share of the time in which clients connect
STATUS = slice(9, 12)  # of "HTTP/1.1 200 OK"
END = b"\r\n\r\n"


class Connection(asyncio.Protocol):
    """One connection in a closed loop."""

    def __init__(self, request: bytes, load: Load):
        self._request = request
        self._load = load
        self._parts = bytearray()
        self._size = 0  # bytes of the response, head included
        self._began = 0.0
        self._is_over = False
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._parts += data
        if not self._size:
            self._measure()
        if self._size and len(self._parts) >= self._size:
            self._take()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._is_over:
            self._load.statuses["lost"] += 1
            self._load.end()

    def _send(self) -> None:
        self._size = 0
        self._parts.clear()
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def _measure(self) -> None:
        end = self._parts.find(END)
        if end < 0:
            return
        length = LENGTH.search(self._parts, 0, end)
        assert length is not None, bytes(self._parts)
        self._size = end + len(END) + int(length[1])

    def _take(self) -> None:
        now = time.perf_counter()
        load = self._load
        load.latencies.append(now - self._began)
        load.counted += load.starts <= now < load.until
        load.statuses[self._parts[STATUS].decode()] += 1
        computed = COMPUTED.search(self._parts)
        load.computed.append(MILLI * float(computed[1]) if computed else 0.0)
        if now < load.until:
            self._send()
        else:
            self._is_over = True
            load.end()
            self._transport.close()


class Load:
    """All connections of a client.

    Args:
      job: see the module.
    """

    def __init__(self, job: dict[str, Any]):
        self.latencies: list[float] = []
        self.computed: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.counted = 0  # answers from `starts` to `until`
        self.starts = 0.0
        self.until = 0.0
        self._job = job
        self._left = job["connections"]
        self._done: asyncio.Event | None = None

    def end(self) -> None:
        """Note that a connection has ended."""
        self._left -= 1
        if self._left <= 0 and self._done is not None:
            self._done.set()

    async def run(self) -> dict[str, Any]:
        """Send for the time, and return what came of it."""
        job = self._job
        self._done = asyncio.Event()
        request = _request(job)
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        self.starts = began + RAMP * job["seconds"]
        self.until = began + job["seconds"]
        for _ in range(job["connections"]):
            await loop.create_connection(
                lambda: Connection(request, self), "127.0.0.1", job["port"]
            )
        await asyncio.wait_for(self._done.wait(), job["seconds"] + 60)
        pairs = zip(self.latencies, self.computed, strict=True)
        rests = [latency - computed for latency, computed in pairs]
        return {
            "seconds": statistics.median(self.latencies),
            "rest": statistics.median(rests),
            "rate": self.counted / (self.until - self.starts),
            "statuses": dict(self.statuses),
        }


def _request(job: dict[str, Any]) -> bytes:
    body = Path(job["body"]).read_bytes()
    headers = {
        "Host": "localhost",
        "Content-Length": str(len(body)),
        **job["headers"],
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {job['path']} HTTP/1.1\r\n{head}\r\n".encode() + body


def main() -> None:
    """Run the job of standard input."""
    job = json.load(sys.stdin)
    try:
        import uvloop
    except ImportError:
        print(json.dumps(asyncio.run(Load(job).run())))
    else:
        print(json.dumps(uvloop.run(Load(job).run())))


if __name__ == "__main__":
    main()
