"""The server's application: routes, errors, versions, raw rows, limits."""

import asyncio
import base64
import contextlib
import gzip
import json
import struct
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import standins

pytest.importorskip("orjson", reason="the extra 'serve'")

from lepton_jax.errors import LeptonError
from lepton_jax.ship.serve.application import Phase
from lepton_jax.ship.serve.batcher import Limits
from lepton_jax.ship.serve.guards import Guards
from lepton_jax.ship.serve.models import parse_canary
from lepton_jax.ship.serve.serving import Options, build

TOKEN = "t" * 32
ADMIN = "a" * 32


class Client:
    """Asks an application without a socket."""

    def __init__(self, application):
        self.application = application

    async def __call__(self, method, path, body=None, parts=None, **headers):
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        messages = [
            {"type": "http.request", "body": part, "more_body": True}
            for part in (parts or [])
        ]
        messages.append(
            {"type": "http.request", "body": body or b"", "more_body": False}
        )
        sent = []

        async def receive():
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [
                (name.replace("_", "-").encode(), str(value).encode())
                for name, value in headers.items()
            ],
            "query_string": b"",
            "root_path": "",
        }
        await self.application(scope, receive, send)
        self.headers = {name.decode(): v.decode() for name, v in sent[0]["headers"]}
        content = b"".join(message.get("body", b"") for message in sent[1:])
        is_json = self.headers["content-type"].startswith("application/json")
        return sent[0]["status"], json.loads(content) if is_json else content


@contextlib.asynccontextmanager
async def served(*artifacts, opens=None, **options):
    def open_artifact(place):
        if opens is None or str(place) not in opens:
            raise LeptonError("nothing is there", where=place, remedy="look elsewhere")
        return opens[str(place)]

    application = build(Options(**options), open_artifact)
    for artifact in artifacts:
        await application.models.load(artifact, Path(artifact.manifest.name))
    application.phase = Phase.READY
    yield Client(application)
    application.models.close()
    application.answering.close()


def ask(*artifacts, **options):
    """Run a test's coroutine with a client of these artifacts."""

    def decorate(test):
        def run():
            async def inner():
                async with served(*(make() for make in artifacts), **options) as client:
                    await test(client)

            asyncio.run(inner())

        run.__name__ = test.__name__
        return run

    return decorate


def tensor(*rows, name="inputs", datatype="FP32"):
    return {
        "name": name,
        "datatype": datatype,
        "shape": [len(rows), len(rows[0])],
        "data": list(rows),
    }


ONE = {"inputs": [tensor([1, 2, 3])]}


@ask(standins.linear)
async def test_the_endpoints_of_the_protocol(client):
    assert await client("GET", "/v2/health/live") == (200, {"live": True})
    assert await client("GET", "/v2/health/ready") == (200, {"ready": True})
    for path in ("/v2", "/v2/"):
        status, server = await client("GET", path)
        assert status == 200 and "binary_tensor_data" in server["extensions"]
        assert server["name"] and server["version"]
    for path in ("/v2/models/linear", "/v2/models/linear/versions/1"):
        status, model = await client("GET", path)
        assert (status, model["versions"]) == (200, ["1"])
        assert model["inputs"] == [
            {"name": "inputs", "datatype": "FP32", "shape": [-1, 3]}
        ]
        assert (await client("GET", path + "/ready"))[0] == 200
        status, answer = await client("POST", path + "/infer", {**ONE, "id": "x"})
        assert status == 200 and answer["id"] == "x"
        assert "compute;dur=" in client.headers["server-timing"]
        assert answer["outputs"][0]["data"] == [2, 4, 6]


@ask(standins.linear)
async def test_what_is_not_there_is_not_found_in_a_sentence(client):
    for path in (
        "/v2/models/lineal",
        "/v2/models/linear/versions/2",
        "/v2/models/linear/versions/2/ready",
    ):
        status, answer = await client("GET", path)
        assert status == 404 and list(answer) == ["error"]
        status, answer = await client("POST", path + "/infer", ONE)
        assert status == 404
    assert (
        "did you mean 'linear'"
        in (await client("GET", "/v2/models/lineal"))[1]["error"]
    )
    assert (await client("GET", "/v3"))[0] == 404
    assert (await client("GET", "/v2/models/linear/infer"))[0] == 405
    assert (await client("POST", "/v2/health/live"))[0] == 405


@ask(standins.poisoned)
async def test_whose_fault_it_is(client):
    path = "/v2/models/poisoned/infer"
    assert (await client("POST", path, b"{"))[0] == 400
    status, answer = await client("POST", path, {"inputs": [tensor([13, 0, 0])]})
    assert status == 500 and "thirteen" in answer["error"]


@ask()
async def test_a_server_without_models_is_not_ready(client):
    status, answer = await client("GET", "/v2/health/ready")
    assert status == 503 and client.headers["retry-after"]
    assert answer["ready"] is False
    assert (await client("GET", "/v2/health/live"))[0] == 200


def test_a_server_that_leaves_before_it_has_loaded_says_503_and_not_404():
    artifact = standins.linear()
    usual = artifact.compiled

    def compiled(size):
        import time

        time.sleep(0.05)
        return usual(size)

    artifact.compiled = compiled

    async def run():
        async with served() as client:
            models = client.application.models
            loading = asyncio.ensure_future(models.load(artifact))
            await asyncio.sleep(0.02)
            client.application.phase = Phase.LEAVING
            models.stop()
            await asyncio.wait([loading])
            assert loading.exception() is not None
            path = "/v2/models/linear/infer"
            assert (await client("POST", path, ONE))[0] == 503
            assert (await client("GET", "/v2/models/linear"))[0] == 503

    asyncio.run(run())


@ask(standins.linear)
async def test_a_server_that_leaves_is_not_ready_but_answers(client):
    client.application.phase = Phase.LEAVING
    assert (await client("GET", "/v2/health/ready"))[0] == 503
    assert (await client("GET", "/v2/models/linear/ready"))[0] == 503
    assert (await client("GET", "/v2/health/live"))[0] == 200
    assert (await client("POST", "/v2/models/linear/infer", ONE))[0] == 200


def test_while_a_model_is_being_loaded_it_is_neither_ready_nor_unknown():
    artifact = standins.linear()
    usual = artifact.compiled

    def compiled(size):
        import time

        time.sleep(0.1)
        return usual(size)

    artifact.compiled = compiled

    async def run():
        async with served() as client:
            loading = asyncio.ensure_future(client.application.models.load(artifact))
            await asyncio.sleep(0.02)
            during = [
                (await client("GET", "/v2/health/ready"))[0],
                (await client("GET", "/v2/models/linear"))[0],
                (await client("POST", "/v2/models/linear/infer", ONE))[0],
                (await client("GET", "/v2/models/other"))[0],
            ]
            assert client.headers.get("retry-after") is None
            await loading
            after = (await client("GET", "/v2/health/ready"))[0]
            assert sorted(artifact.compiled_sizes) == [1, 2, 4, 8]
        return during, after

    assert asyncio.run(run()) == ([503, 503, 503, 404], 200)


@ask(standins.linear, lambda: standins.linear(version="10", scale=3.0))
async def test_without_a_version_the_newest_answers(client):
    _, answer = await client("POST", "/v2/models/linear/infer", ONE)
    assert answer["model_version"] == "10" and answer["outputs"][0]["data"][0] == 3
    _, answer = await client("POST", "/v2/models/linear/versions/1/infer", ONE)
    assert answer["model_version"] == "1" and answer["outputs"][0]["data"][0] == 2
    _, model = await client("GET", "/v2/models/linear")
    assert model["versions"] == ["1", "10"]


@ask(
    standins.linear,
    lambda: standins.linear(version="2", scale=3.0),
    canaries=dict([parse_canary("linear=2:0.25")]),
)
async def test_a_canary_gets_its_share_of_those_that_name_no_version(client):
    versions = []
    for _ in range(200):
        _, answer = await client("POST", "/v2/models/linear/infer", ONE)
        versions.append(answer["model_version"])
    # four standard deviations of a binomial: 50 +- 25
    assert 25 <= versions.count("2") <= 75
    _, answer = await client("POST", "/v2/models/linear/versions/1/infer", ONE)
    assert answer["model_version"] == "1"


@ask(
    standins.linear,
    lambda: standins.linear(version="2", scale=3.0),
    shadows={"linear": "2"},
)
async def test_a_shadow_is_asked_and_compared_and_never_answers(client):
    for _ in range(5):
        _, answer = await client("POST", "/v2/models/linear/infer", ONE)
        assert answer["model_version"] == "1"
    await asyncio.sleep(0.05)
    _, model = await client("GET", "/v2/models/linear/versions/2")
    shadow = model["parameters"]["shadow"]
    assert (shadow["compared"], shadow["differing"]) == (5, 5)
    # 3, 6, 9 in place of 2, 4, 6: half of the largest
    assert shadow["largest"] == pytest.approx(0.5)


NEWER = standins.linear(scale=5.0)
SECOND = standins.linear(version="2", scale=7.0)


@ask(
    standins.linear,
    opens={"linear": NEWER, "second": SECOND},
    guards=Guards(tokens=(TOKEN,), admin_tokens=(ADMIN,)),
)
async def test_models_are_swapped_while_requests_are_under_way(client):
    user = {"authorization": f"Bearer {TOKEN}"}
    admin = {"authorization": f"Bearer {ADMIN}"}
    path = "/v2/models/linear/infer"
    load = "/v2/repository/models/linear/load"
    assert (await client("POST", load, {}))[0] == 401
    assert (await client("POST", load, {}, **user))[0] == 401
    seen = set()

    async def keep_asking():
        other = Client(client.application)
        while len(seen) < 2:
            status, answer = await other("POST", path, ONE, **user)
            assert status == 200
            seen.add(answer["outputs"][0]["data"][0])
            await asyncio.sleep(0)

    asking = asyncio.ensure_future(keep_asking())
    await asyncio.sleep(0.01)
    assert (await client("POST", load, {}, **admin))[0] == 200
    await asyncio.wait_for(asking, 5)
    assert seen == {2, 5}

    status, answer = await client(
        "POST", load, {"parameters": {"place": "second", "canary": 0}}, **admin
    )
    assert (status, answer["version"]) == (200, "2")
    _, answer = await client("POST", path, ONE, **user)
    assert answer["model_version"] == "1"
    status, index = await client("POST", "/v2/repository/index", {}, **user)
    assert [entry["version"] for entry in index] == ["1", "2"]
    status, answer = await client(
        "POST", load, {"parameters": {"place": "third"}}, **admin
    )
    assert status == 400 and "look elsewhere" in answer["error"]

    unload = "/v2/repository/models/linear/unload"
    assert (await client("POST", unload, {}, **admin))[0] == 200
    assert (await client("POST", path, ONE, **user))[0] == 404
    assert (await client("GET", "/v2/health/ready"))[0] == 503


@ask(standins.linear, guards=Guards(tokens=(TOKEN,)))
async def test_without_the_token_only_health_is_told(client):
    assert (await client("GET", "/v2/health/ready"))[0] == 200
    for given in ({}, {"authorization": "Bearer x"}, {"authorization": TOKEN}):
        status, _ = await client("POST", "/v2/models/linear/infer", ONE, **given)
        assert status == 401 and client.headers["www-authenticate"] == "Bearer"
    given = {"authorization": f"Bearer {TOKEN}"}
    assert (await client("POST", "/v2/models/linear/infer", ONE, **given))[0] == 200
    load = "/v2/repository/models/linear/load"
    assert (await client("POST", load, {}, **given))[0] == 403


@ask(standins.linear, guards=Guards(is_local=True))
async def test_a_page_of_the_web_can_not_ask_a_local_server(client):
    path = "/v2/models/linear/infer"
    assert (await client("POST", path, ONE, host="localhost:8000"))[0] == 200
    assert (await client("POST", path, ONE, host="evil.example"))[0] == 403
    headers = {"host": "localhost:8000", "origin": "https://evil.example"}
    assert (await client("POST", path, ONE, **headers))[0] == 403
    headers["origin"] = "http://localhost:8000"
    assert (await client("POST", path, ONE, **headers))[0] == 200


@ask(standins.linear, guards=Guards(most_bytes=200, body_seconds=0.05), most_rows=2)
async def test_limits_on_bodies_and_rows(client):
    path = "/v2/models/linear/infer"
    large = b"x" * 201
    assert (await client("POST", path, large, content_length=201))[0] == 413
    assert client.headers["connection"] == "close"
    assert (await client("POST", path, parts=[b"x" * 150] * 2))[0] == 413
    assert (await client("POST", path, ONE, content_length="-1"))[0] == 400
    rows = {"inputs": [tensor([1, 2, 3], [1, 2, 3], [1, 2, 3])]}
    assert (await client("POST", path, rows))[0] == 400


@ask(standins.linear, guards=Guards(most_bytes=2000))
async def test_compressed_bodies_are_unpacked_up_to_the_limit(client):
    path = "/v2/models/linear/infer"
    body = json.dumps(ONE).encode()
    for encoding, packed in (
        ("gzip", gzip.compress(body)),
        ("deflate", zlib.compress(body)),
    ):
        headers = {"content_encoding": encoding}
        assert (await client("POST", path, packed, **headers))[0] == 200
        assert (await client("POST", path, packed[:-4], **headers))[0] == 400
    bomb = gzip.compress(b" " * 10_000_000)[:2000]
    assert (await client("POST", path, bomb, content_encoding="gzip"))[0] == 413
    assert (await client("POST", path, body, content_encoding="br"))[0] == 415


@ask(standins.people)
async def test_raw_rows_are_prepared_and_answered_in_words(client):
    rows = [{"age": 39, "job": "clerk"}, {"age": 61, "job": None}, {"age": None}]
    status, answer = await client("POST", "/v2/models/people/rows", {"rows": rows})
    assert status == 200 and answer["predictions"] == ["young", "old", "young"]
    status, answer = await client("POST", "/v2/models/people/rows", {"rows": rows[1]})
    assert answer["predictions"] == ["old"]
    for bad in ({}, {"rows": []}, {"rows": [1]}, {"rows": [{"age": "x"}]}):
        assert (await client("POST", "/v2/models/people/rows", bad))[0] == 400


@ask(standins.people)
async def test_raw_rows_as_tensors_of_the_protocol_with_bytes(client):
    _, model = await client("GET", "/v2/models/people")
    assert [(i["name"], i["datatype"]) for i in model["inputs"]] == [
        ("age", "FP64"),
        ("job", "BYTES"),
    ]
    assert model["outputs"][-1] == {"name": "label", "datatype": "BYTES", "shape": [-1]}
    age = {"name": "age", "datatype": "INT64", "shape": [2, 1], "data": [39, 61]}
    job = {"name": "job", "datatype": "BYTES", "shape": [2], "data": ["clerk", None]}
    request = {"inputs": [age, job], "outputs": [{"name": "label"}]}
    status, answer = await client("POST", "/v2/models/people/infer", request)
    assert status == 200 and answer["outputs"][0]["data"] == ["young", "old"]

    blob = struct.pack("<2d", 61, float("nan"))
    age = {**age, "datatype": "FP64", "shape": [2]}
    age = {**age, "parameters": {"binary_data_size": 16}}
    del age["data"]
    label = {"name": "label", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [age], "outputs": [label]}).encode()
    status, answer = await client(
        "POST",
        "/v2/models/people/infer",
        head + blob,
        inference_header_content_length=len(head),
    )
    assert status == 200
    assert answer.endswith(b"\3\0\0\0old\5\0\0\0young")
    # the program's own arrays are taken, too
    status, answer = await client(
        "POST", "/v2/models/people/infer", {"inputs": [tensor([61])]}
    )
    assert answer["outputs"][-1]["data"] == ["old"]


def test_pictures_come_as_base64_in_json():
    artifact = standins.people()
    seen = []

    def prepare(rows):
        seen.extend(rows)
        return {"inputs": np.zeros((len(rows), 1), np.float32)}

    artifact.prepare_rows = prepare
    artifact.columns = (standins.Column("file", "image"),)

    async def run():
        async with served(artifact) as client:
            text = base64.b64encode(b"picture").decode()
            for sent in (text, f"data:image/png;base64,{text}"):
                body = {"rows": [{"file": sent}]}
                assert (await client("POST", "/v2/models/people/rows", body))[0] == 200
            body = {"rows": [{"file": "?!"}]}
            status, answer = await client("POST", "/v2/models/people/rows", body)
            assert status == 400 and "base64" in answer["error"]

    asyncio.run(run())
    assert [row["file"] for row in seen] == [b"picture"] * 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "bool", "uint64"])
def test_every_dtype_goes_through_to_the_bit(dtype):
    from lepton_jax.ship.serve.datatypes import datatype_of, to_bytes

    async def run():
        async with served(standins.identity(dtype)) as client:
            sent = np.array([[0, 1], [1, 0]]).astype(dtype)
            blob = to_bytes(sent)
            part = {
                "name": "inputs",
                "datatype": datatype_of(dtype),
                "shape": [2, 2],
                "parameters": {"binary_data_size": len(blob)},
            }
            parameters = {"binary_data_output": True}
            head = json.dumps({"inputs": [part], "parameters": parameters}).encode()
            status, answer = await client(
                "POST",
                "/v2/models/identity/infer",
                head + blob,
                inference_header_content_length=len(head),
            )
            assert status == 200 and answer.endswith(blob)
            length = int(client.headers["inference-header-content-length"])
            assert len(answer) == length + len(blob)

    asyncio.run(run())


@ask(standins.linear, limits=Limits(seconds=0.02))
async def test_a_timeout_of_the_request_is_in_microseconds(client):
    body = {**ONE, "parameters": {"timeout": 1, "priority": 1}}
    # it runs before the timer, which is as it should be: nothing else waits
    assert (await client("POST", "/v2/models/linear/infer", body))[0] in (200, 504)


def test_a_model_that_departs_from_its_trainer_is_not_served():
    artifact = standins.linear()
    inputs = np.ones((4, 3), np.float32)
    outputs = {"outputs": inputs * 2.1, "prediction": np.zeros(4, np.int32)}
    artifact.stored = standins.Stored({"inputs": inputs}, outputs)

    async def run():
        async with served() as client:
            await client.application.models.load(artifact)

    with pytest.raises(LeptonError, match="differ by"):
        asyncio.run(run())


def test_where_rows_meet_each_request_has_a_batch_of_its_own_size():
    artifact = standins.linear()
    artifact.meeting = "a mean over the batch"

    def function(arrays):
        inputs = arrays["inputs"]
        outputs = inputs - inputs.mean(0)
        return {"outputs": outputs, "prediction": outputs.argmax(1).astype("int32")}

    artifact.function = function

    async def run():
        async with served(artifact) as client:
            path = "/v2/models/linear/infer"
            bodies = [
                {"inputs": [tensor(*([i, 0, 0] for i in range(rows)))]}
                for rows in (1, 2, 3, 5)
            ]
            asked = [Client(client.application)("POST", path, b) for b in bodies]
            answers = await asyncio.gather(*asked)
            _, model = await client("GET", "/v2/models/linear")
            assert model["parameters"]["rows_share_batches"] is False
            return answers

    for rows, (status, answer) in zip((1, 2, 3, 5), asyncio.run(run()), strict=True):
        assert status == 200
        first = np.reshape(answer["outputs"][0]["data"], (rows, 3))[:, 0]
        np.testing.assert_allclose(first, np.arange(rows) - (rows - 1) / 2)


@ask(standins.linear)
async def test_the_description_names_every_route(client):
    status, description = await client("GET", "/openapi.json")
    assert status == 200
    assert "/v2/models/{model}/versions/{version}/infer" in description["paths"]
    status, page = await client("GET", "/")
    assert status == 200 and b"<canvas" in page
    assert "frame-ancestors" in client.headers["content-security-policy"]


def test_a_picture_is_told_from_the_shape_of_the_only_input():
    digits = standins.Standin(
        lambda arrays: {"outputs": arrays["x"].reshape(len(arrays["x"]), -1)[:, :2]},
        (standins.Tensor("x", "uint8", (-1, 8, 8, 1)),),
        (standins.Tensor("outputs", "uint8", (-1, 2)),),
        "digits",
    )
    pixels = np.zeros((3, 8, 8, 1), np.uint8)
    pixels[:, 2:6, 3:5] = 16
    digits.stored = standins.Stored({"x": pixels})

    async def run():
        async with served(digits) as client:
            _, facts = await client("GET", "/try/digits")
            return facts

    facts = asyncio.run(run())
    assert facts["picture"] == {
        "name": "x",
        "height": 8,
        "width": 8,
        "channels": 1,
        "low": 0.0,
        "high": 16.0,
        "background": 0.0,
        "span": 0.5,
    }
    assert np.shape(facts["example"]["x"]) == (8, 8, 1)


class Meter:
    """Keeps the statuses that it is told of."""

    def __init__(self):
        self.left = []

    def arrive(self, identity, parent):
        return types.SimpleNamespace(id="1", charge=None)

    def leave(self, visit, status):
        self.left.append(status)


@ask(standins.linear)
async def test_probes_and_metadata_are_no_requests_to_count(client):
    client.application.meter = meter = Meter()
    client.application.phase = Phase.LOADING
    assert (await client("GET", "/v2/health/ready"))[0] == 503
    client.application.phase = Phase.READY
    for path in ("/v2/health/ready", "/v2/models/linear", "/v2/models/gone"):
        await client("GET", path)
    await client("POST", "/v2/models/gone/infer", ONE)
    client.application.models.afterwards.flush()

    assert meter.left == [404]
