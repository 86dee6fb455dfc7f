"""Kills at random moments under load: what was accepted is answered."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tools.siege.good import draw_good
from tools.siege.target import Expected, Target, ask_json, read_answer

CLIENTS = 12
LATEST = 1.0  # seconds after the server listens; a part of them falls into the loading
SETTLES = 30.0  # seconds for a killed server to be gone
OVERLOADED = (503, 504)


def kill_often(place: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kill a server many times by SIGTERM, and once in five times by SIGKILL.

    A request is accepted once its connection is made and its first byte is sent. It is
    lost if the client gets neither an answer nor, by SIGKILL, the news that the
    connection is gone.

    Args:
      place: of the artifact.
      count: of kills by SIGTERM.
      seed: of the moments.
    """
    draw = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    expected = None
    for number in range(count + count // 5):
        is_term = number < count
        server = Target(place, "--unready", "0.3", "--batch", "1,2,4,8")
        try:
            server.until("listening on")
            if expected is None:
                expected = _expected(server, place)
            # some kills fall into the loading, most into the load
            is_early = draw.random() < 0.2
            if not is_early:
                server.until("ready:")
            moment = draw.uniform(0, LATEST)
            asyncio.run(_one(server, expected, moment, is_term, counts, faults, seed))
            code = server.process.poll()
            if is_term and code != 0:
                faults.append(f"kill {number}: exit code {code}")
            counts["kills by SIGTERM" if is_term else "kills by SIGKILL"] += 1
        finally:
            server.close()
    return {
        "artifact": place.name,
        "counts": dict(sorted(counts.items())),
        "faults": faults[:20],
        "kept": not faults,
    }


def _expected(server: Target, place: Path) -> Expected:
    server.until("ready:")
    name = json.loads((place / "manifest.json").read_text())["name"]
    facts = asyncio.run(ask_json(server.port, "GET", f"/v2/models/{name}"))
    return Expected(place, facts["parameters"]["sizes"])


async def _one(
    server: Target,
    expected: Expected,
    moment: float,
    is_term: bool,
    counts: Counter[str],
    faults: list[str],
    seed: int,
) -> None:
    """Load one server, and kill it in the middle."""
    clients = [
        asyncio.create_task(_client(server, expected, is_term, counts, faults, i))
        for i in range(CLIENTS)
    ]
    await asyncio.sleep(moment)
    number = signal.SIGTERM if is_term else signal.SIGKILL
    server.process.send_signal(number)
    await asyncio.gather(*clients)
    end = time.monotonic() + SETTLES
    while server.process.poll() is None and time.monotonic() < end:
        await asyncio.sleep(0.02)


async def _client(
    server: Target,
    expected: Expected,
    is_term: bool,
    counts: Counter[str],
    faults: list[str],
    seed: int,
) -> None:
    """Ask in closed loop until nobody listens; one in three connects each time."""
    draw = np.random.default_rng(seed)
    keeps = seed % 3 > 0
    number = 0
    while True:
        try:
            streams = await asyncio.open_connection("127.0.0.1", server.port)
        except OSError:
            counts["refused a connection, in the end"] += 1
            return
        reader, writer = streams
        is_open = True
        while is_open:
            number += 1
            good = draw_good(expected, draw, number)
            try:
                writer.write(good.content)
                answer = await read_answer(reader)
            except (OSError, EOFError) as error:
                if is_term:
                    faults.append(f"lost: {error!r}")
                else:
                    counts["told by the connection's end"] += 1
                break
            except TimeoutError:
                faults.append("neither answered nor told")
                return
            if answer.status in OVERLOADED:
                counts["503 or 504"] += 1
                await asyncio.sleep(0.01)
            else:
                fault = good.fault(answer, expected)
                counts["answered right"] += fault is None
                if fault:
                    faults.append(fault)
            is_open = keeps and not answer.closes
        writer.transport.abort()
