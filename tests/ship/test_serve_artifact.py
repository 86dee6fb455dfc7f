"""The server with a model that was really trained."""

import asyncio
import json

import numpy as np
import pytest

pytest.importorskip("orjson", reason="the extra 'serve'")
pytest.importorskip("safetensors", reason="the extra 'ship'")
pytest.importorskip("flatbuffers", reason="the extra 'ship'")

import test_serve_application as application
from artifacts import people

import lepton_jax as lepton


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, quick_compilation):
    folder = tmp_path_factory.mktemp("people")
    place = folder / "people.lepton"
    lepton.Artifact.of(people(folder / "prepared"), rows=40).save(place)
    return lepton.Artifact.open(place)


def test_the_server_answers_as_the_artifact_predicts(artifact):
    rows = json.loads(artifact.stored.rows.head(20).write_json())
    expected = artifact.predict(rows, words=True)

    async def run():
        async with application.served(artifact, sizes=(1, 4)) as client:
            path = "/v2/models/people"
            status, answer = await client("POST", f"{path}/rows", {"rows": rows})
            assert (status, answer["predictions"]) == (200, expected)
            logits = np.array(answer["outputs"]["outputs"], np.float32)
            np.testing.assert_allclose(
                logits, artifact.stored.outputs["outputs"][:20], atol=1e-5
            )
            _, model = await client("GET", path)
            assert model["parameters"]["difference_from_the_trainer"] < 1e-5
            assert model["parameters"]["rows_compared"] == len(artifact.stored)

            part = {"name": "age", "datatype": "INT64", "shape": [1], "data": [61]}
            job = {"name": "job", "datatype": "BYTES", "shape": [1], "data": ["cook"]}
            hours = {**part, "name": "hours", "data": [None]}
            body = {"inputs": [part, job, hours], "outputs": [{"name": "label"}]}
            status, answer = await client("POST", f"{path}/infer", body)
            row = {"age": 61, "job": "cook", "hours": None}
            assert status == 200, answer
            assert answer["outputs"][0]["data"] == artifact.predict(row, words=True)

    asyncio.run(run())


def test_rows_that_can_not_be_prepared_are_the_clients_fault(artifact):
    async def run():
        async with application.served(artifact, sizes=(1, 4)) as client:
            path = "/v2/models/people/rows"
            for row in ({"job": "cook"}, {"age": "old", "hours": 1, "job": "cook"}):
                status, answer = await client("POST", path, {"rows": [row]})
                assert status == 400 and "age" in answer["error"], answer

    asyncio.run(run())


def test_an_explanation_is_part_of_the_answer_when_asked_for(artifact):
    rows = json.loads(artifact.stored.rows.head(2).write_json())

    async def run():
        async with application.served(artifact, sizes=(1, 4)) as client:
            path = "/v2/models/people/rows"
            body = {"rows": rows, "parameters": {"explain": "occlusion"}}
            status, answer = await client("POST", path, body)
            assert status == 200, answer
            assert answer["explanation"]["method"] == "occlusion"
            body["parameters"]["explain"] = "magic"
            assert (await client("POST", path, body))[0] == 400

    asyncio.run(run())
