"""A client of Triton against a server of `tests/ship/standin_server.py`.

    PYTHON triton_client.py PORT

It is run by an interpreter that has tritonclient[http], and imports nothing of Lepton.
The server serves `linear`, `people`, `half` and `brain`. Each step is a line of output;
a fault is a traceback.
"""

from __future__ import annotations

import sys

import numpy as np
import tritonclient.http as http
from tritonclient.utils import InferenceServerException


def main(port: str) -> None:
    """Do all that the client can."""
    client = http.InferenceServerClient(f"127.0.0.1:{port}")
    for step in (
        health,
        metadata,
        repository,
        json_inference,
        binary_inference,
        several_rows_and_options,
        compressed,
        asynchronous,
        texts,
        half,
        brain,
        errors,
    ):
        step(client)
        print(f"{step.__name__}: ok")
    client.close()


def health(client):
    """Ask whether server and models live and are ready."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "1")
    assert not client.is_model_ready("nobody")


def metadata(client):
    """Ask what the server and a model are."""
    server = client.get_server_metadata()
    assert "binary_tensor_data" in server["extensions"]
    model = client.get_model_metadata("linear", "1")
    assert model["inputs"] == [{"name": "inputs", "datatype": "FP32", "shape": [-1, 3]}]
    assert model["versions"] == ["1"]


def repository(client):
    """List the models."""
    names = {entry["name"] for entry in client.get_model_repository_index()}
    assert names == {"linear", "people", "half", "brain"}


def _linear(rows, binary):
    part = http.InferInput("inputs", [len(rows), 3], "FP32")
    part.set_data_from_numpy(np.array(rows, np.float32), binary_data=binary)
    return part


def json_inference(client):
    """Send and receive JSON."""
    wanted = [http.InferRequestedOutput("outputs", binary_data=False)]
    answer = client.infer(
        "linear", [_linear([[1, 2, 3]], False)], outputs=wanted, request_id="7"
    )
    assert answer.get_response()["id"] == "7"
    np.testing.assert_array_equal(answer.as_numpy("outputs"), [[2, 4, 6]])
    assert answer.as_numpy("prediction") is None


def binary_inference(client):
    """Send and receive bytes."""
    answer = client.infer("linear", [_linear([[1, 2, 3]], True)], model_version="1")
    assert "id" not in answer.get_response()
    np.testing.assert_array_equal(answer.as_numpy("outputs"), [[2, 4, 6]])
    np.testing.assert_array_equal(answer.as_numpy("prediction"), [2])


def several_rows_and_options(client):
    """Mix bytes and JSON, with a priority and a time-out."""
    wanted = [
        http.InferRequestedOutput("prediction", binary_data=False),
        http.InferRequestedOutput("outputs", binary_data=True),
    ]
    rows = np.arange(33).reshape(11, 3)
    answer = client.infer(
        "linear",
        [_linear(rows, True)],
        outputs=wanted,
        priority=1,
        timeout=1_000_000,
        parameters={"mine": "yes"},
    )
    np.testing.assert_array_equal(answer.as_numpy("outputs"), 2 * rows)
    np.testing.assert_array_equal(answer.as_numpy("prediction"), [2] * 11)


def compressed(client):
    """Send a body that is compressed."""
    for way in ("gzip", "deflate"):
        answer = client.infer(
            "linear", [_linear([[1, 2, 3]], True)], request_compression_algorithm=way
        )
        np.testing.assert_array_equal(answer.as_numpy("outputs"), [[2, 4, 6]])


def asynchronous(client):
    """Send several requests at once."""
    under_way = [
        client.async_infer("linear", [_linear([[i, i, i]], True)]) for i in range(8)
    ]
    for i, each in enumerate(under_way):
        np.testing.assert_array_equal(
            each.get_result().as_numpy("outputs"), [[2 * i] * 3]
        )


def texts(client):
    """Send and receive BYTES, by JSON and by bytes."""
    for binary in (False, True):
        age = http.InferInput("age", [2], "FP64")
        age.set_data_from_numpy(np.array([39.0, 61.0]), binary_data=binary)
        job = http.InferInput("job", [2], "BYTES")
        words = np.array(["clerk", "Köchin"], dtype=object)
        job.set_data_from_numpy(words, binary_data=binary)
        wanted = [http.InferRequestedOutput("label", binary_data=binary)]
        answer = client.infer("people", [age, job], outputs=wanted)
        labels = answer.as_numpy("label").tolist()
        assert [str(x, "utf-8") if isinstance(x, bytes) else x for x in labels] == [
            "young",
            "old",
        ]


def half(client):
    """Send and receive FP16."""
    sent = np.array([[0.1, 65504.0], [-0.0, 6e-8]], np.float16)
    part = http.InferInput("inputs", [2, 2], "FP16")
    part.set_data_from_numpy(sent)
    answer = client.infer("half", [part])
    assert answer.as_numpy("outputs").tobytes() == sent.tobytes()


def brain(client):
    """Send and receive BF16, which the client keeps as float32 or bfloat16."""
    sent = np.array([[1.5, -2.0], [3e38, 0.0]], np.float32)
    part = http.InferInput("inputs", [2, 2], "BF16")
    try:
        part.set_data_from_numpy(sent)
    except InferenceServerException:
        import ml_dtypes

        part.set_data_from_numpy(sent.astype(ml_dtypes.bfloat16))
    answer = client.infer("brain", [part])
    got = np.asarray(answer.as_numpy("outputs"), np.float32)
    np.testing.assert_allclose(got, sent, rtol=2**-8)


def errors(client):
    """Hear of what is wrong, with the status in the message."""
    for name, part, status in (
        ("nobody", _linear([[1, 2, 3]], True), "404"),
        ("linear", http.InferInput("inputs", [1, 4], "FP32"), "400"),
        ("linear", http.InferInput("other", [1, 3], "FP32"), "400"),
        ("linear", http.InferInput("inputs", [1, 3], "FP64"), "400"),
    ):
        if part._raw_data is None:
            dtype = np.float64 if part.datatype() == "FP64" else np.float32
            part.set_data_from_numpy(np.zeros(part.shape(), dtype))
        try:
            client.infer(name, [part])
        except InferenceServerException as error:
            assert error.status() == status and error.message(), error
        else:
            raise AssertionError(f"{name} {part.shape()} was answered")


if __name__ == "__main__":
    main(sys.argv[1])
