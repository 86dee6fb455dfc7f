"""Tensors of the Open Inference Protocol: bytes to arrays and back."""

import json
import struct

import hypothesis.extra.numpy as arrays_of
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("orjson", reason="the extra 'serve'")

from lepton_jax.ship.serve import datatypes
from lepton_jax.ship.serve.datatypes import DTYPES, from_bytes, from_json, to_bytes
from lepton_jax.ship.serve.protocol import Wanted, read_request, write_response
from lepton_jax.ship.serve.refusal import Refusal
from lepton_jax.ship.serve.signature import Signature, Tensor

NUMERIC = [name for name in DTYPES if name != "BYTES"]


def signature(datatype="FP32", extents=(3,), **more):
    tensor = Tensor("x", datatype, (-1, *extents))
    return Signature({"x": tensor}, {}, {"y": Tensor("y", datatype, (-1, *extents))})


def body(**changes):
    part = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    content = {"inputs": [part], **changes}
    return json.dumps(content).encode()


def read(content, made=None, length=None):
    return read_request(content, length, made or signature(), 16)


def elements(datatype):
    dtype = DTYPES[datatype]
    if datatype == "BYTES":
        return st.binary(max_size=9)
    if datatype == "BF16":
        return st.floats(width=16, allow_nan=False)
    return arrays_of.from_dtype(dtype, allow_nan=False)


@st.composite
def tensors(draw, names=tuple(DTYPES)):
    datatype = draw(st.sampled_from(names))
    shape = draw(arrays_of.array_shapes(min_dims=1, max_dims=3, max_side=4))
    count = int(np.prod(shape))
    values = draw(st.lists(elements(datatype), min_size=count, max_size=count))
    array = np.empty(count, DTYPES[datatype])
    array[:] = values
    return datatype, array.reshape(shape)


@given(tensors())
def test_every_datatype_comes_back_from_its_bytes(sent):
    datatype, array = sent
    content = to_bytes(array)
    back = from_bytes(memoryview(content), datatype, array.shape)
    assert back.dtype == array.dtype and to_bytes(back) == content


@given(tensors([n for n in NUMERIC if n not in ("FP16", "BF16")]), st.booleans())
def test_numbers_come_back_from_json_nested_or_flat(sent, flat):
    datatype, array = sent
    if array.dtype.kind == "f":
        array = np.where(np.isfinite(array), array, 0).astype(array.dtype)
    data = array.ravel().tolist() if flat else array.tolist()
    back = from_json(json.loads(json.dumps(data)), datatype, array.shape)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@given(st.data())
@settings(max_examples=200)
def test_bytes_that_are_no_tensor_are_refused_and_nothing_else_happens(data):
    datatype = data.draw(st.sampled_from(list(DTYPES)))
    content = data.draw(st.binary(max_size=40))
    shape = data.draw(arrays_of.array_shapes(max_dims=2, max_side=4))
    try:
        back = from_bytes(memoryview(content), datatype, shape)
    except ValueError:
        return
    assert back.shape == shape and to_bytes(back) == content


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [*"xy", "name", "datatype", "shape", "data", "inputs", "parameters"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSONS)
@settings(max_examples=100)
def test_any_json_is_read_or_refused_as_the_clients_fault(content):
    for whole in (content, {"inputs": content}, {"inputs": [content]}):
        text = json.dumps(whole).replace("NaN", "1").replace("Infinity", "1")
        try:
            read(text.encode())
        except Refusal as refusal:
            assert refusal.status in (400, 404) and refusal.message


def test_a_request_and_its_answer_in_json():
    request = read(body(id="7"))
    assert request.inputs["x"].tolist() == [[1, 2, 3]] and request.rows == 1
    answer, length = write_response(
        request, "m", "2", {"y": request.inputs["x"]}, signature().outputs
    )
    assert length is None
    assert json.loads(answer) == {
        "model_name": "m",
        "model_version": "2",
        "id": "7",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
        ],
    }


def test_without_an_id_there_is_none_in_the_answer():
    request = read(body())
    answer, _ = write_response(
        request, "m", "1", {"y": request.inputs["x"]}, signature().outputs
    )
    assert "id" not in json.loads(answer)


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "BOOL", "BYTES"])
def test_tensors_behind_the_json_are_read_and_written_by_their_sizes(datatype):
    sent = np.zeros((2, 3), DTYPES[datatype])
    if datatype == "BYTES":
        sent[:] = b"ab"
    blob = to_bytes(sent)
    part = {
        "name": "x",
        "datatype": datatype,
        "shape": [2, 3],
        "parameters": {"binary_data_size": len(blob)},
    }
    head = body(inputs=[part], outputs=[{"name": "y", "parameters": {}}])
    head = head.replace(b'"parameters": {}', b'"parameters": {"binary_data": true}')
    made = signature(datatype)
    request = read(head + blob, made, len(head))
    assert request.wanted == [Wanted("y", True)] and request.is_binary
    answer, length = write_response(
        request, "m", "1", {"y": request.inputs["x"]}, made.outputs
    )
    described = json.loads(answer[:length])["outputs"][0]
    assert described["parameters"] == {"binary_data_size": len(blob)}
    assert "data" not in described and answer[length:] == blob


def part(**changes):
    return {"name": "x", "datatype": "FP32", "shape": [1, 3], **changes}


REFUSED = {
    "no JSON": (b"{", "no JSON"),
    "a list": (b"[]", "object"),
    "no inputs": (b"{}", "inputs"),
    "no data": (body(inputs=[part()]), "neither data"),
    "a wrong name": (body(inputs=[part(name="z")]), "no input 'z'"),
    "twice": (body(inputs=[part(data=[1, 2, 3])] * 2), "twice"),
    "a wrong datatype": (body(inputs=[part(datatype="FP64", data=[])]), "not FP64"),
    "no datatype": (body(inputs=[part(datatype="FLOAT", data=[])]), "no datatype"),
    "a wrong shape": (body(inputs=[part(shape=[1, 4], data=[])]), "[1, 4]"),
    "a shape of texts": (body(inputs=[part(shape=["1", 3], data=[])]), "shape"),
    "no rows": (body(inputs=[part(shape=[0, 3], data=[])]), "0 rows"),
    "too many rows": (body(inputs=[part(shape=[17, 3], data=[])]), "17 rows"),
    "negative rows": (body(inputs=[part(shape=[-1, 3], data=[])]), "-1 rows"),
    "too few elements": (body(inputs=[part(data=[1, 2])]), "2 elements"),
    "ragged": (body(inputs=[part(data=[[1, 2], [3]])]), "nested"),
    "a text among numbers": (body(inputs=[part(data=[1, "2", 3])]), "text"),
    "a boolean among numbers": (body(inputs=[part(data=[1, True, 3])]), "boolean"),
    "null among numbers": (body(inputs=[part(data=[1, None, 3])]), "null"),
    "out of range": (body(inputs=[part(data=[1, 1e39, 3])]), "range"),
    "an id that is a number": (body(id=7), "id"),
    "an output twice": (body(outputs=[{"name": "y"}] * 2), "twice"),
    "bytes left over": (body(inputs=[part(data=[1, 2, 3])]) + b"!", "no JSON"),
    "a timeout that is a text": (body(parameters={"timeout": "1"}), "timeout"),
    "shared memory": (
        body(inputs=[part(parameters={"shared_memory_region": "r"})]),
        "shared",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_wrong_is_refused_with_a_sentence_that_names_it(fault):
    content, word = REFUSED[fault]
    with pytest.raises(Refusal) as caught:
        read(content)
    assert caught.value.status == 400 and word in caught.value.message


def test_an_output_that_is_not_there_is_not_found():
    with pytest.raises(Refusal) as caught:
        read(body(outputs=[{"name": "z"}]))
    assert caught.value.status == 404


@pytest.mark.parametrize("size", [11, 13, -1, "12", None, 1 << 70])
def test_a_binary_tensor_has_exactly_its_bytes(size):
    head = body(inputs=[part(parameters={"binary_data_size": size})])
    with pytest.raises(Refusal) as caught:
        read(head + b"\0" * 12, length=len(head))
    assert caught.value.status == 400


def test_integers_beyond_their_datatype_are_refused_and_not_wrapped():
    content = body(inputs=[part(datatype="UINT8", data=[1, 256, 3])])
    with pytest.raises(Refusal, match="range"):
        read(content, signature("UINT8"))
    content = body(inputs=[part(datatype="UINT8", data=[1, 1.0, 3])])
    with pytest.raises(Refusal, match="fraction"):
        read(content, signature("UINT8"))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json(datatype):
    content = body(inputs=[part(datatype=datatype, data=[1, 2, 3])])
    with pytest.raises(Refusal, match="binary"):
        read(content, signature(datatype))


def test_nan_in_an_output_is_never_written_as_null():
    request = read(body())
    outputs = {"y": np.full((1, 3), np.nan, np.float32)}
    with pytest.raises(Refusal) as caught:
        write_response(request, "m", "1", outputs, signature().outputs)
    assert caught.value.status == 500

    blob = struct.pack("<3f", 1, float("inf"), 3)
    head = body(inputs=[part(parameters={"binary_data_size": 12})])
    request = read(head + blob, length=len(head))
    with pytest.raises(Refusal) as caught:
        write_response(request, "m", "1", outputs, signature().outputs)
    assert caught.value.status == 400


def test_a_boolean_byte_is_0_or_1():
    with pytest.raises(ValueError, match="0 or 1"):
        from_bytes(memoryview(b"\2"), "BOOL", (1,))


def test_each_dtype_of_jax_has_a_name():
    assert datatypes.datatype_of("bfloat16") == "BF16"
    assert datatypes.datatype_of("int32") == "INT32"
    assert datatypes.datatype_of("complex64") is None
