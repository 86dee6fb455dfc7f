"""Load of every kind at once: open loop, bursts, slow clients, clients that go away."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.siege.bad import draw_bad
from tools.siege.good import draw_good
from tools.siege.target import (
    ADMIN,
    Expected,
    Target,
    ask_json,
    connection,
    message,
    read_answer,
    target,
)

# assumptions: what an hour's ups and downs look like in five minutes
BURST_EVERY = 20.0  # seconds
BURST_LASTS = 2.0
BURST_FACTOR = 4.0
SWAP_EVERY = 30.0  # seconds between two hot swaps
SLOW_CLIENTS = 8  # at any time
SLOW_PAUSE = 0.05  # seconds between two bytes of theirs
SHARE_GONE = 0.02  # of the good requests whose clients go away
POOL = 64  # connections that are kept
SAMPLE = 5.0  # seconds between two looks at the memory
WARM_UP = 0.2  # share of the time before the memory counts
MOST_GROWTH = 0.05  # share that the memory may grow over the rest
OVERLOADED = (503, 504)
HALF = 1 << 16  # bytes of an oversize body that are sent before the answer is read


@dataclass
class Siege:
    """What has happened.

    Attributes:
      counts: by kind and outcome.
      faults: the first of each kind.
      latencies: of good requests, seconds.
      memory: (seconds, bytes) of the server.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def note(self, kind: str, fault: str | None) -> None:
        """Count one request."""
        self.counts[f"{kind}: {'fault' if fault else 'as it should be'}"] += 1
        if fault and len(self.faults) < 20:
            self.faults.append(f"{kind}: {fault}")


def besiege(
    place: Path,
    seconds: float,
    rate: float,
    bad: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Load a server, and return what came of it.

    Args:
      place: of the artifact.
      seconds: of load.
      rate: good requests a second, outside of bursts.
      bad: requests that are the client's fault, over the time.
      seed: of the draws.
    """
    with target(place, "--queue", "512", "--most-mib", "1") as server:
        siege = asyncio.run(_run(server, place, seconds, rate, bad, seed))
        code = server.end()
        log = server.log.read_text()
    late = [size for when, size in siege.memory if when > WARM_UP * seconds]
    growth = late[-1] / late[0] - 1 if late else 0.0
    quantiles = np.quantile(siege.latencies, [0.5, 0.99, 1.0]).round(4).tolist()
    return {
        "artifact": place.name,
        "seconds": seconds,
        "rate": rate,
        "counts": dict(sorted(siege.counts.items())),
        "faults": siege.faults,
        "latency_seconds": dict(zip(("p50", "p99", "most"), quantiles, strict=True)),
        "memory_growth": round(growth, 4),
        "memory_mib": round(late[-1] / (1 << 20)) if late else None,
        "exit_code": code,
        "tracebacks": log.count("Traceback"),
        "kept": not siege.faults
        and code == 0
        and growth <= MOST_GROWTH
        and "Traceback" not in log,
    }


async def _run(
    server: Target,
    place: Path,
    seconds: float,
    rate: float,
    bad: int,
    seed: int,
) -> Siege:
    siege = Siege()
    model = json.loads((place / "manifest.json").read_text())["name"]
    facts = await ask_json(server.port, "GET", f"/v2/models/{model}")
    expected = Expected(place, facts["parameters"]["sizes"])
    end = time.monotonic() + seconds
    await asyncio.gather(
        _good(server, expected, siege, rate, end, seed),
        _bad(server, expected, siege, bad, seconds, seed + 1),
        *(
            _slow(server, expected, siege, end, seed + 2 + i)
            for i in range(SLOW_CLIENTS)
        ),
        _oversize(server, expected, siege, end),
        _swap(server, expected, siege, end),
        _watch(server, siege, seconds),
    )
    return siege


# ---- good requests, in open loop ----


async def _good(
    server: Target,
    expected: Expected,
    siege: Siege,
    rate: float,
    end: float,
    seed: int,
) -> None:
    """Send at times drawn beforehand, whether or not answers have come."""
    draw = np.random.default_rng(seed)
    pool: asyncio.Queue[Any] = asyncio.Queue()
    for _ in range(POOL):
        pool.put_nowait(None)
    tasks = set()
    began = when = time.monotonic()
    number = 0
    while when < end:
        is_burst = (when - began) % BURST_EVERY > BURST_EVERY - BURST_LASTS
        when += draw.exponential(1 / (rate * (BURST_FACTOR if is_burst else 1.0)))
        pause = when - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        number += 1
        good = draw_good(expected, draw, number)
        is_gone = bool(draw.random() < SHARE_GONE)
        cut = int(draw.integers(1, len(good.content) + 1))
        work = (
            _go_away(server, siege, good.content[:cut])
            if is_gone
            else _ask(server, expected, siege, good, pool, when)
        )
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def _ask(
    server: Target,
    expected: Expected,
    siege: Siege,
    good: Any,
    pool: asyncio.Queue[Any],
    when: float,
) -> None:
    streams = await pool.get()
    kept = None
    try:
        if streams is None:
            streams = await asyncio.open_connection("127.0.0.1", server.port)
        reader, writer = streams
        writer.write(good.content)
        answer = await read_answer(reader)
        kept = None if answer.closes else streams
    except (OSError, EOFError) as error:
        siege.note("good", f"lost: {error!r}")
        return
    finally:
        pool.put_nowait(kept)
    if answer.status in OVERLOADED:
        is_told = answer.status != 503 or "retry-after" in answer.headers
        siege.note("overload", None if is_told else "503 without Retry-After")
        return
    siege.note("good", good.fault(answer, expected))
    siege.latencies.append(time.monotonic() - when)


async def _go_away(server: Target, siege: Siege, content: bytes) -> None:
    """Send a part of a request, or all of it, and close."""
    async with connection(server.port) as (_, writer):
        writer.write(content)
        await asyncio.sleep(0.002)
    siege.note("gone", None)


# ---- the others ----


async def _bad(
    server: Target,
    expected: Expected,
    siege: Siege,
    count: int,
    seconds: float,
    seed: int,
) -> None:
    draw = np.random.default_rng(seed)
    began = time.monotonic()
    for number in range(count):
        content = draw_bad(expected, draw, number)
        try:
            async with connection(server.port) as (reader, writer):
                writer.write(content)
                answer = await read_answer(reader)
        except (OSError, EOFError) as error:
            siege.note("bad", f"no answer: {error!r} to {content[:300]!r}")
            continue
        is_client = 400 <= answer.status < 500 or answer.status == 503
        says = b'"error"' in answer.body
        fault = f"{answer.status} {answer.body[:100]!r} to {content[:300]!r}"
        siege.note("bad", None if is_client and says else fault)
        await asyncio.sleep(began + seconds * number / count - time.monotonic())


async def _slow(
    server: Target,
    expected: Expected,
    siege: Siege,
    end: float,
    seed: int,
) -> None:
    """Send a good request byte by byte, and read as slowly."""
    draw = np.random.default_rng(seed)
    number = 0
    while time.monotonic() < end:
        good = draw_good(expected, draw, number)
        number += 1
        try:
            async with connection(server.port) as (reader, writer):
                step = max(1, len(good.content) // 60)
                for start in range(0, len(good.content), step):
                    writer.write(good.content[start : start + step])
                    await asyncio.sleep(SLOW_PAUSE)
                answer = await read_answer(reader)
        except (OSError, EOFError) as error:
            siege.note("slow", f"lost: {error!r}")
            continue
        is_overload = answer.status in OVERLOADED
        siege.note("slow", None if is_overload else good.fault(answer, expected))


async def _oversize(
    server: Target,
    expected: Expected,
    siege: Siege,
    end: float,
) -> None:
    """Announce, or send, more than a request may hold."""
    path = f"/v2/models/{expected.name}/infer"
    head = message(path, b"").replace(b"content-length: 0", b"content-length: 99999999")
    chunks = message(path, b"").replace(
        b"content-length: 0", b"transfer-encoding: chunked"
    )
    while time.monotonic() < end:
        for content in (head, chunks + b"200000\r\n" + b"x" * (1 << 21)):
            try:
                async with connection(server.port) as (reader, writer):
                    writer.write(content)
                    answer = await read_answer(reader)
            except (OSError, EOFError) as error:
                siege.note("oversize", f"no answer: {error!r}")
                continue
            fault = None if answer.status == 413 else f"status {answer.status}"
            siege.note("oversize", fault)
        await asyncio.sleep(1.0)


async def _swap(
    server: Target,
    expected: Expected,
    siege: Siege,
    end: float,
) -> None:
    """Load the model again under load."""
    path = f"/v2/repository/models/{expected.name}/load"
    token = {"authorization": f"Bearer {ADMIN}"}
    while True:
        await asyncio.sleep(min(SWAP_EVERY, max(0.0, end - time.monotonic())))
        if time.monotonic() >= end:
            return
        async with connection(server.port) as (reader, writer):
            writer.write(message(path, b"{}", **token))
            answer = await read_answer(reader)
        is_done = answer.status == 200
        siege.note("swap", None if is_done else f"{answer.status} {answer.body!r}")


async def _watch(server: Target, siege: Siege, seconds: float) -> None:
    """Look at the server's memory now and then."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        siege.memory.append((time.monotonic() - began, server.memory))
        await asyncio.sleep(SAMPLE)
