"""Serve on a Ray cluster of two nodes, kill one of them, and look at every answer.

    python -m tools.replicas [--json FILE]

The configuration that `lepton serve --on ray --dry-run` shows is deployed by Ray's own
client on a cluster of this machine: two nodes of one core each, a replica on each. Some
clients send rows all the time; in the middle the second node is killed (SIGKILL of its
raylet). A client that hears of a fault asks again, as a load balancer would. Every row
must get one right answer; what was lost on the way is counted.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.cli.settings import Parser
from lepton_jax.errors import LeptonError
from lepton_jax.ship.scale import Deployment
from lepton_jax.ship.scale.documents import as_yaml
from lepton_jax.ship.scale.ray_config import config
from tools.bench.cli import surroundings
from tools.every_row import ROOT, save_trained

PORT = 8_321
REPLICAS = 2
CLIENTS = 2
ROWS = 600  # of each client
PAUSE = 0.01  # seconds between two rows of a client
MIDDLE = 0.4  # share of the rows that are answered when the node is killed
PATIENCE = 400  # seconds for the replicas to be there, and for a row to be answered
TIMEOUT = 5  # seconds of one attempt
SEED = 0
NEAR = 1e-5  # between a replica's outputs and the artifact's here


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if every row got one right answer, else 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="python -m tools.replicas", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder))
    print(json.dumps(result))
    if options.json is not None:
        command = f"python -m tools.replicas {' '.join(words)}"
        record = {**surroundings([]), "command": command, "results": result}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(result["right"] != CLIENTS * ROWS or result["wrong"] > 0)


def campaign(folder: Path) -> dict[str, Any]:
    """Serve, kill, and return what the clients saw."""
    artifact = folder / "signs.lepton"
    save_trained(artifact)
    with cluster() as (first, second):
        deploy(artifact, folder / "serve.yaml", first)
        clients = [Client(artifact, number) for number in range(CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        while sum(client.right for client in clients) < MIDDLE * CLIENTS * ROWS:
            time.sleep(PAUSE)
        os.kill(second.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        killed = time.monotonic()
        for thread in threads:
            thread.join()
        shares = answers_by_replica(Path(first.get_session_dir_path()))
    faults: Counter[str] = sum((client.faults for client in clients), Counter())
    return {
        "rows": CLIENTS * ROWS,
        "right": sum(client.right for client in clients),
        "wrong": sum(client.wrong for client in clients),
        "attempts_lost": dict(faults),
        "seconds_after_the_kill": round(time.monotonic() - killed, 1),
        "longest_wait": round(max(client.longest for client in clients), 2),
        "answers_by_replica": shares,
    }


class Client:
    """A client that asks for one row after the other.

    Args:
      artifact: that is served.
      number: of the client.
    """

    def __init__(self, artifact: Path, number: int) -> None:
        from lepton_jax.ship import Artifact

        self.right = 0
        self.wrong = 0
        self.longest = 0.0  # seconds until a row was answered
        self.faults: Counter[str] = Counter()
        chance = np.random.default_rng(SEED + number)
        self._rows = chance.normal(size=(ROWS, 4)).round(4)
        rows = [self._raw(row) for row in self._rows]
        opened = Artifact.open(artifact)
        self._expected = opened.run(opened.prepare(rows))["outputs"]

    def run(self) -> None:
        """Ask for every row until it is answered."""
        for row, expected in zip(self._rows, self._expected, strict=True):
            began = time.monotonic()
            found = self._answer(row)
            self.longest = max(self.longest, time.monotonic() - began)
            if np.allclose(found, expected, atol=NEAR):
                self.right += 1
            else:
                self.wrong += 1
            time.sleep(PAUSE)

    def _answer(self, row: np.ndarray) -> Any:
        body = json.dumps({"rows": [self._raw(row)]}).encode()
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                status, content = ask("POST", "/v2/models/signs/rows", body)
            except OSError as error:
                self.faults[type(error).__name__] += 1
            else:
                if status == http.HTTPStatus.OK:
                    return content["outputs"]["outputs"]
                self.faults[str(status)] += 1
            time.sleep(PAUSE)
        return np.nan

    @staticmethod
    def _raw(row: np.ndarray) -> dict[str, float]:
        return {f"x{k}": float(value) for k, value in enumerate(row)}


def ask(
    method: str,
    path: str,
    body: bytes | None = None,
    host: str = "127.0.0.1",
    port: int = PORT,
) -> tuple[int, Any]:
    """Return the status and the JSON of an answer.

    Raises:
      OSError: there was none.
    """
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()
    is_json = content[:1] in (b"{", b"[")
    return answer.status, json.loads(content) if is_json else None


def deploy(artifact: Path, file: Path, first: Any) -> None:
    """Deploy two replicas by Ray's client, and wait until both are there.

    Raises:
      LeptonError: the client refuses, or they don't come.
    """
    asked = Deployment(
        "signs",
        (str(artifact),),
        least=REPLICAS,
        most=REPLICAS,
        arguments=("--batch=1,4",),
    )
    made = config(asked)
    made["http_options"] = {"host": "127.0.0.1", "port": PORT}
    made["proxy_location"] = "HeadOnly"
    file.write_text(as_yaml([made]))
    address = f"http://{first.webui_url}"
    client = [str(Path(sys.executable).with_name("serve"))]
    done = subprocess.run(
        [*client, "deploy", "--address", address, str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    until = time.monotonic() + PATIENCE
    while done.returncode == 0 and time.monotonic() < until:
        if _running(first.webui_url) == REPLICAS:
            return
        time.sleep(1)
    raise LeptonError(
        "the replicas do not come",
        where=file,
        remedy=f"see what Ray says: {done.stderr[-800:]}",
    )


def answers_by_replica(session: Path) -> list[int]:
    """Return how many requests each replica has answered, by its log."""
    logs = (session / "logs" / "serve").glob("replica_signs_*.log")
    return sorted(log.read_text().count('"POST / 200') for log in logs)


def _running(dashboard: str) -> int:
    """Return how many replicas run, as Ray's dashboard says."""
    host, _, port = dashboard.rpartition(":")
    try:
        _, told = ask("GET", "/api/serve/applications/", port=int(port), host=host)
    except OSError:
        return 0
    found = (told or {}).get("applications", {}).get("signs", {})
    return sum(
        replica["state"] == "RUNNING"
        for deployment in found.get("deployments", {}).values()
        for replica in deployment.get("replicas", ())
    )


@contextlib.contextmanager
def cluster() -> Any:
    """Give the two nodes of a cluster."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # else the proxy asks the replica of its own node alone, while it is not busy
    os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"
    # its workers must find Lepton, and whatever else this process finds
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "dashboard_host": "127.0.0.1", "include_dashboard": True}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made.head_node, second
    finally:
        made.shutdown()


if __name__ == "__main__":
    sys.exit(main())
