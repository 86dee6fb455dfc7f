"""A replica on a Ray cluster: the server of artifacts without its socket."""

import asyncio
import json

import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax.cli import ray_serve
from lepton_jax.cli.serve import MISTAKE, main, named
from tests.ship import artifacts

pytest.importorskip("fastapi", reason="needs the extra 'serve'")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, quick_compilation):
    place = tmp_path_factory.mktemp("replica") / "numbers.lepton"
    return lepton.Artifact.of(artifacts.numbers(), rows=20).save(place)


async def ask(application, method, path, body=b""):
    """Return (status, content) of a message by ASGI."""
    sent = []
    headers = [(b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1"}

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    await application(scope, receive, send)
    content = b"".join(part.get("body", b"") for part in sent[1:])
    return sent[0]["status"], content


def test_a_replica_answers_as_the_server_does(artifact):
    inputs = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
    expected = lepton.Artifact.open(artifact).predict(inputs)
    tensor = {"name": "inputs", "shape": [3, 12], "datatype": "FP32"}
    body = json.dumps({"inputs": [{**tensor, "data": inputs.ravel().tolist()}]})

    async def story():
        words = ["--batch=1,4", "--price-per-hour=3.6"]
        application = await ray_serve.loaded([f"mine={artifact}"], words)
        ready = await ask(application, "GET", "/v2/health/ready")
        answer = await ask(application, "POST", "/v2/models/mine/infer", body.encode())
        metrics = await ask(application, "GET", "/metrics")
        ray_serve.close(application)
        return ready, answer, metrics

    ready, (status, content), (_, metrics) = asyncio.run(story())
    assert ready[0] == 200 and status == 200, content
    outputs = {one["name"]: one["data"] for one in json.loads(content)["outputs"]}
    assert outputs["prediction"] == expected.tolist()
    assert b'lepton_serve_rows_total{model="mine",version="1"} 3.0' in metrics
    assert b"lepton_serve_price_per_1000_predictions" in metrics
    assert b'lepton_serve_drift_window_rows{model="mine",version="1"} 3.0' in metrics


def test_an_artifact_may_be_named_on_the_command_line(tmp_path):
    assert named("mine=/models/a.lepton")[1] == "mine"
    assert str(named("mine=/models/a.lepton")[0]) == "/models/a.lepton"
    assert named("/odd=name/a.lepton")[1] == ""


def test_the_server_s_command_shows_what_would_start_replicas(capsys):
    words = ["/models/a.lepton", "--queue", "99", "--port", "9000", "--host", "::"]
    words += ["--on", "k8s", "--job-image", "i:1", "--dry-run"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "- --queue\n            - '99'\n" in shown
    assert "9000" not in shown and shown.count("--host") == 1


def test_prices_that_can_t_be(capsys, artifact):
    assert main([str(artifact), "--price-per-hour", "-1"]) == MISTAKE
    assert "--price-per-hour is -1" in capsys.readouterr().err
