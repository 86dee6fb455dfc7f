"""What serving costs over the compiled function, next to others' servers.

`tools.bench serve`. For each model, on loopback, a server in one process and a client
in another:

- **Overhead**: one client, one row a request; the time from request to response, minus
  that of the model in it, which the answer tells (Server-Timing); the median. JSON, and
  the binary extension. Also the median of the whole, minus that of the bare compiled
  function: in a loop, with its code and data in the processor's caches, a small model
  is a third faster than between requests.
- **Throughput**: many clients, one row a request, in closed loop; rows a second over
  those of the bare compiled function at its best batch, which is called from a loop
  with arrays that lie ready. Next to a plain FastAPI handler around `jit`, the better
  of two, and LitServe, which both get JSON alone.

All servers are started first, and stopped (SIGSTOP) until it is their turn. A round is
a slice of each, and of the bare function before them; differences and ratios are taken
within a round, and the median of the rounds counts. The first quarter of a slice, in
which clients connect, does not count. The server, the client and the compiled
function share the machine's cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import LeptonError
from tools.bench import options as checks
from tools.bench.serving.models import CASES, make

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds for a server to be ready
LOOK = 0.1  # seconds between two looks
ONE = 1  # client of the overhead
LEPTON = "lepton"
OURS = ("json", "binary")
PLAIN = ("fastapi", "fastapi-threads")
RIVALS = (*PLAIN, "litserve")
JSON = {"Content-Type": "application/json"}
MILLI = 1e3

# the claims
MOST_JSON = 0.6  # ms in the median
MOST_BINARY = 0.25  # ms
LEAST_OF_BARE = 0.85
LEAST_OF_FASTAPI = 2.0


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `serve` to the subcommands."""
    parser = checks.add_command(
        commands, shared, "serve", __doc__, "what serving costs over the function"
    )
    checks.add_timing(parser, rounds=3, seconds=4.0)
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(CASES),
        metavar="MODEL",
        help=f"of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=256,
        help="connections for throughput (default: 256)",
    )
    parser.add_argument(
        "--litserve",
        type=Path,
        default=Path(sys.executable),
        metavar="PYTHON",
        help="an interpreter that has LitServe and Lepton's libraries (default: this)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the models asked for, and print a table of each.

    Raises:
      SettingError: no such model, or a count that can't be.
    """
    checks.check_positive(options, "rounds", "seconds", "clients")
    checks.check_names(options.only, CASES, "--only", "model")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            result = _measure(name, Path(folder), options)
            _print(result)
            results.append(result)
    return results


# ---- internals ----


def _measure(
    name: str,
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Start all servers of a model, and measure them in rounds."""
    place = folder / f"{name}.lepton"
    _make(name, place)
    function = Bare(place)
    contenders = _contenders(name, folder)
    commands = _commands(place, options.litserve)
    with contextlib.ExitStack() as stack:
        servers = {}
        for server, command in commands.items():
            try:
                context = _served(command, is_rival=server != LEPTON)
                servers[server] = stack.enter_context(context)
            except LeptonError as error:
                print(f"  {server}: not measured: {error.what}", file=sys.stderr)
        present = {
            kind: contender
            for kind, contender in contenders.items()
            if contender.server in servers
        }
        rounds = [
            _round(function, present, servers, options) for _ in range(options.rounds)
        ]
    return {
        "model": name,
        "about": CASES[name].about,
        "best_size": function.best,
        **_summary(rounds, present),
    }


@dataclass(frozen=True)
class Contender:
    """A way to ask a server.

    Attributes:
      server: that is asked.
      path: at the server.
      body: file of the request.
      headers: of the request.
    """

    server: str
    path: str
    body: Path
    headers: dict[str, str]


@dataclass(frozen=True)
class Running:
    """A server's process group, which is stopped between its turns.

    Attributes:
      process: the first one.
      port: of the server.
    """

    process: subprocess.Popen
    port: int

    @contextlib.contextmanager
    def awake(self) -> Iterator[int]:
        """Let it run in the block; yield its port."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield self.port
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)


def _contenders(name: str, folder: Path) -> dict[str, Contender]:
    bodies = _bodies(name, folder)
    path = f"/v2/models/{name}/infer"
    ours = {kind: Contender(LEPTON, path, *bodies[kind]) for kind in OURS}
    theirs = {rival: Contender(rival, "/predict", *bodies["plain"]) for rival in RIVALS}
    return {**ours, **theirs}


def _commands(place: Path, litserve: Path) -> dict[str, list[str]]:
    """Return the command of each server, without its port."""
    commands = {LEPTON: [sys.executable, "-m", "lepton_jax", "serve", str(place)]}
    for rival in RIVALS:
        python = str(litserve) if rival == "litserve" else sys.executable
        module = "tools.bench.serving.rivals"
        commands[rival] = [python, "-m", module, rival, str(place)]
    return commands


def _round(
    function: Bare,
    contenders: dict[str, Contender],
    servers: dict[str, Running],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Return milliseconds of one row, and rows a second, of each contender."""
    figures = {"bare_ms": MILLI * function.seconds(1, options.seconds / 4)}
    for kind, contender in contenders.items():
        with servers[contender.server].awake() as port:
            one = _ask(port, contender, ONE, options.seconds / 2)
        figures[f"{kind}_ms"] = MILLI * one["seconds"]
        figures[f"{kind}_rest_ms"] = MILLI * one["rest"]
    best = function.best
    figures["bare_rows"] = best / function.seconds(best, options.seconds)
    for kind, contender in contenders.items():
        with servers[contender.server].awake() as port:
            many = _ask(port, contender, options.clients, options.seconds)
        figures[f"{kind}_rows"] = _rate(many)
    return figures


def _summary(
    rounds: list[dict[str, float]],
    contenders: dict[str, Contender],
) -> dict[str, float]:
    """Return the medians over the rounds, and of what is compared within them."""
    whole = {
        name: statistics.median(figures[name] for figures in rounds)
        for name in rounds[0]
    }
    for kind in OURS:
        whole[f"{kind}_overhead_ms"] = whole[f"{kind}_rest_ms"]
        whole[f"{kind}_over_bare_ms"] = statistics.median(
            figures[f"{kind}_ms"] - figures["bare_ms"] for figures in rounds
        )
        whole[f"{kind}_of_bare"] = statistics.median(
            figures[f"{kind}_rows"] / figures["bare_rows"] for figures in rounds
        )
    plain = [kind for kind in PLAIN if kind in contenders]
    if plain:
        whole["json_of_fastapi"] = statistics.median(
            figures["json_rows"] / max(figures[f"{kind}_rows"] for kind in plain)
            for figures in rounds
        )
    if "litserve" in contenders:
        whole["json_of_litserve"] = statistics.median(
            figures["json_rows"] / figures["litserve_rows"] for figures in rounds
        )
    return {**whole, "rounds": len(rounds)}


def _print(result: dict[str, Any]) -> None:
    print(f"{result['model']}: {result['about']}")
    print(
        f"  bare function: {result['bare_ms']:.3f} ms for a row;"
        f" {result['bare_rows']:,.0f} rows/s in batches of {result['best_size']}"
    )
    for kind, most in (("json", MOST_JSON), ("binary", MOST_BINARY)):
        print(
            f"  {kind}: {result[f'{kind}_ms']:.3f} ms, of which"
            f" {result[f'{kind}_overhead_ms']:.3f} ms overhead (at most {most}),"
            f" {result[f'{kind}_over_bare_ms']:.3f} ms over the bare function;"
            f" {result[f'{kind}_rows']:,.0f} rows/s,"
            f" {result[f'{kind}_of_bare']:.2f} of the bare function's"
            f" (at least {LEAST_OF_BARE})"
        )
    for rival in RIVALS:
        if f"{rival}_ms" in result:
            print(
                f"  {rival}: {result[f'{rival}_ms']:.3f} ms;"
                f" {result[f'{rival}_rows']:,.0f} rows/s"
            )
    print(
        f"  rows a second: {result.get('json_of_fastapi', math.nan):.2f} of the plain"
        f" handler's (at least {LEAST_OF_FASTAPI:g}),"
        f" {result.get('json_of_litserve', math.nan):.2f} of LitServe's",
        flush=True,
    )


def _rate(answers: dict[str, Any]) -> float:
    statuses = answers["statuses"]
    assert set(statuses) == {"200"}, statuses
    return answers["rate"]


def _bodies(
    name: str,
    folder: Path,
) -> dict[str, tuple[Path, dict[str, str]]]:
    """Write a request of one row in three forms; return their files and headers."""
    draw = np.random.default_rng(1)
    # four digits, as a person or a sensor would have them
    row = draw.normal(size=(1, *CASES[name].row)).round(4).astype(np.float32)
    flat = [round(float(value), 4) for value in row.ravel()]
    part = {"name": "inputs", "datatype": "FP32", "shape": list(row.shape)}
    wanted = [{"name": "outputs"}]

    whole = {"inputs": [{**part, "data": flat}], "outputs": wanted}
    size = {"parameters": {"binary_data_size": row.nbytes}}
    binary = {"parameters": {"binary_data_output": True}}
    head = json.dumps({"inputs": [{**part, **size}], "outputs": wanted, **binary})
    contents = {
        "json": (json.dumps(whole).encode(), JSON),
        "binary": (
            head.encode() + row.tobytes(),
            {"Inference-Header-Content-Length": str(len(head))},
        ),
        "plain": (json.dumps({"inputs": flat}).encode(), JSON),
    }
    bodies = {}
    for kind, (content, headers) in contents.items():
        file = folder / f"{name}-{kind}"
        file.write_bytes(content)
        bodies[kind] = (file, headers)
    return bodies


def _ask(
    port: int,
    contender: Contender,
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    """Return what a client of some connections measures."""
    job = {
        "port": port,
        "path": contender.path,
        "body": str(contender.body),
        "headers": contender.headers,
        "connections": clients,
        "seconds": seconds,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.serving.client"],
        cwd=ROOT,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LeptonError(
            f"the client failed: {done.stderr.strip().splitlines()[-1]}",
            where=contender.server,
            remedy="read the server's output",
        )
    return json.loads(done.stdout)


@contextlib.contextmanager
def _served(command: list[str], is_rival: bool = False) -> Iterator[Running]:
    """Run a server in a process group of its own; it is stopped in the block.

    Raises:
      LeptonError: it does not become ready.
    """
    port = _free_port()
    words = [str(port)] if is_rival else ["--port", str(port), "--unready", "0"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [*command, *words],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=_environment(),
            start_new_session=True,
        )
        try:
            _wait(server, port, log, is_rival)
            os.killpg(server.pid, signal.SIGSTOP)
            yield Running(server, port)
        finally:
            # the group, for LitServe's workers outlive a SIGTERM to their parent
            os.killpg(server.pid, signal.SIGCONT)
            os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(
    server: subprocess.Popen,
    port: int,
    log: Any,
    is_rival: bool,
) -> None:
    path = "/docs" if is_rival else "/v2/health/ready"
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError):
            if _status(port, path) == "200":
                return
        time.sleep(LOOK)
    log.seek(0)
    lines = log.read().strip().splitlines() or ["it says nothing"]
    raise LeptonError(
        lines[-1], where="a server", remedy="install what it needs, or leave it out"
    )


def _status(port: int, path: str) -> str:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        return connection.recv(12).decode().rpartition(" ")[2]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _make(name: str, place: Path) -> None:
    """Make an artifact in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "tools.bench.serve", name, str(place)],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        check=True,
    )


class Bare:
    """The compiled function of an artifact, without a server.

    Args:
      place: of the artifact.

    Attributes:
      best: the batch size that does the most rows a second.
    """

    def __init__(self, place: Path):
        import jax

        import lepton_jax as lepton

        # as the server has it, and faster for a small model
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        self._artifact = lepton.Artifact.open(place)
        sizes = self._artifact.sizes
        self.best = min(sizes, key=lambda size: self.seconds(size, LOOK) / size)

    def seconds(self, size: int, span: float) -> float:
        """Return the median seconds of a call, over some span."""
        program = self._artifact.compiled(size)
        inputs = {
            name: np.resize(array, (size, *array.shape[1:]))
            for name, array in self._artifact.stored.inputs.items()
        }
        program(inputs)
        times = []
        end = time.perf_counter() + span
        while time.perf_counter() < end or not times:
            began = time.perf_counter()
            program(inputs)
            times.append(time.perf_counter() - began)
        return statistics.median(times)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
