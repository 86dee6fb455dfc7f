"""What serving costs over the compiled function, next to others' servers.

`tools.bench serve`. For each model, on loopback, a server in one process and a client
in another:

- **Overhead**: one client, one row a request; the median from request to response,
  minus the median of the bare compiled function on one row. JSON, and the binary
  extension.
- **Throughput**: many clients, one row a request, in closed loop; rows a second over
  those of the bare compiled function at its best batch, which has the machine to itself
  and is called from a loop with arrays that lie ready. Next to a plain FastAPI handler
  around `jit`, the better of two, and LitServe, which both get JSON alone.

The servers and the clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
    checks.add_timing(parser, rounds=1, seconds=4.0)
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
        default=128,
        help="connections for throughput (default: 128)",
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
    place = folder / f"{name}.lepton"
    _in_a_process("make", name, place)
    bare = json.loads(_in_a_process("bare", name, place))
    result: dict[str, Any] = {"model": name, "about": CASES[name].about, **bare}
    bodies = _bodies(name, folder)

    with _served([sys.executable, "-m", "lepton_jax", "serve", str(place)]) as port:
        path = f"/v2/models/{name}/infer"
        for kind, (body, headers) in bodies.items():
            if kind == "plain":
                continue
            one = _ask(port, path, body, headers, ONE, options)
            result[f"{kind}_ms"] = MILLI * statistics.median(one["latencies"])
            result[f"{kind}_overhead_ms"] = result[f"{kind}_ms"] - bare["one_ms"]
            many = _ask(port, path, body, headers, options.clients, options)
            result[f"{kind}_rows_a_second"] = _rate(many)

    rivals = Path("tools", "bench", "serving", "rivals.py")
    module = ".".join(rivals.with_suffix("").parts)
    body, headers = bodies["plain"]
    for rival in ("fastapi", "fastapi-threads", "litserve"):
        python = options.litserve if rival == "litserve" else sys.executable
        command = [str(python), "-m", module, rival, str(place)]
        try:
            with _served(command, is_rival=True) as port:
                one = _ask(port, "/predict", body, headers, ONE, options)
                many = _ask(port, "/predict", body, headers, options.clients, options)
        except LeptonError as error:
            print(f"  {rival}: not measured: {error.what}", file=sys.stderr)
            continue
        result[f"{rival}_ms"] = MILLI * statistics.median(one["latencies"])
        result[f"{rival}_rows_a_second"] = _rate(many)
    return {**result, **_ratios(result)}


def _ratios(result: dict[str, Any]) -> dict[str, float]:
    """Return throughput over the function's own, and over the plain handler's."""
    best = max(result["json_rows_a_second"], result["binary_rows_a_second"])
    plain = [
        result[f"{rival}_rows_a_second"]
        for rival in ("fastapi", "fastapi-threads")
        if f"{rival}_rows_a_second" in result
    ]
    ratios = {"of_bare": best / result["best_rows_a_second"]}
    if plain:
        ratios["of_fastapi"] = result["json_rows_a_second"] / max(plain)
    return ratios


def _print(result: dict[str, Any]) -> None:
    print(f"{result['model']}: {result['about']}")
    print(
        f"  bare function: {result['one_ms']:.3f} ms for a row;"
        f" {result['best_rows_a_second']:,.0f} rows/s in batches of"
        f" {result['best_size']}"
    )
    for kind, most in (("json", MOST_JSON), ("binary", MOST_BINARY)):
        print(
            f"  {kind}: {result[f'{kind}_ms']:.3f} ms, of which"
            f" {result[f'{kind}_overhead_ms']:.3f} ms overhead (at most {most});"
            f" {result[f'{kind}_rows_a_second']:,.0f} rows/s"
        )
    for rival in ("fastapi", "fastapi-threads", "litserve"):
        if f"{rival}_ms" in result:
            print(
                f"  {rival}: {result[f'{rival}_ms']:.3f} ms;"
                f" {result[f'{rival}_rows_a_second']:,.0f} rows/s"
            )
    print(
        f"  throughput: {result['of_bare']:.2f} of the bare function's (at least"
        f" {LEAST_OF_BARE}), {result.get('of_fastapi', float('nan')):.2f} of the plain"
        f" handler's (at least {LEAST_OF_FASTAPI:g})",
        flush=True,
    )


def _rate(answers: dict[str, Any]) -> float:
    statuses = answers["statuses"]
    assert set(statuses) == {"200"}, statuses
    return statuses["200"] / answers["seconds"]


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
    path: str,
    body: Path,
    headers: dict[str, str],
    clients: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return what a client of some connections measures; the second of two turns."""
    job = {
        "port": port,
        "path": path,
        "body": str(body),
        "headers": headers,
        "connections": clients,
    }
    for seconds in (options.seconds / 4, options.seconds):
        done = subprocess.run(
            [sys.executable, "-m", "tools.bench.serving.client"],
            cwd=ROOT,
            input=json.dumps({**job, "seconds": seconds}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LeptonError(
                f"the client failed: {done.stderr.strip().splitlines()[-1]}",
                where=path,
                remedy="read the server's output",
            )
    return json.loads(done.stdout)


@contextlib.contextmanager
def _served(command: list[str], is_rival: bool = False) -> Iterator[int]:
    """Run a server in a process of its own; yield its port.

    Raises:
      LeptonError: it does not become ready.
    """
    port = _free_port()
    words = [str(port)] if is_rival else ["--port", str(port), "--unready", "0"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [*command, *words], cwd=ROOT, stdout=log, stderr=log, env=_environment()
        )
        try:
            _wait(server, port, log, is_rival)
            yield port
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
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


def _in_a_process(what: str, name: str, place: Path) -> str:
    """Make an artifact, or time it bare, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.serve", what, name, str(place)],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def bare(place: Path) -> dict[str, float]:
    """Time the compiled function of an artifact, alone on the machine.

    Returns:
      Milliseconds of one row, and rows a second of its best batch size.
    """
    import jax

    import lepton_jax as lepton

    # as the server has it, and faster for a small model
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    artifact = lepton.Artifact.open(place)
    seconds = {}
    for size in artifact.sizes:
        program = artifact.compiled(size)
        inputs = {
            name: np.resize(array, (size, *array.shape[1:]))
            for name, array in artifact.stored.inputs.items()
        }
        seconds[size] = _median(program, inputs)
    best = min(seconds, key=lambda size: seconds[size] / size)
    return {
        "one_ms": MILLI * seconds[1],
        "best_size": best,
        "best_rows_a_second": best / seconds[best],
    }


def _median(program: Any, inputs: dict[str, np.ndarray]) -> float:
    """Return the median seconds of a call, over about two seconds."""
    times = []
    end = time.perf_counter() + 2.0
    while time.perf_counter() < end:
        began = time.perf_counter()
        program(inputs)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], Path(sys.argv[3]))
    else:
        print(json.dumps(bare(Path(sys.argv[3]))))
