from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.errors import RequestError
from unipinrec.runtime.server.v2.codec import HEADER_LENGTH, InferRequest, decode_infer, encode_infer

PAIR = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2.5, -3, 0]}


def body(**members: Any) -> bytes:
    return json.dumps(members).encode()


def binary(header: dict[str, Any], *tensors: bytes) -> tuple[bytes, str]:
    encoded = json.dumps(header).encode()
    return encoded + b"".join(tensors), str(len(encoded))


def binary_input(name: str, array: Any, **changes: Any) -> dict[str, Any]:
    datatype = {"float32": "FP32", "int64": "INT64"}[array.dtype.name]
    given = {"name": name, "shape": list(array.shape), "datatype": datatype}
    return given | {"parameters": {"binary_data_size": array.nbytes}} | changes


@pytest.mark.parametrize("data", [[1, 2.5, -3, 0], [[1, 2.5], [-3, 0]], [1, 2.5, -3, -0.0]])
def test_json_is_flat_or_nested(data: list[Any]) -> None:
    _, arrays = decode_infer(body(inputs=[PAIR | {"data": data}]), None)
    assert arrays["x"].dtype == np.float32
    assert arrays["x"].tolist() == [[1.0, 2.5], [-3.0, 0.0]]


def test_integers_keep_all_their_bits() -> None:
    given = {"name": "t", "shape": [2], "datatype": "INT64", "data": [2**63 - 1, -(2**63)]}
    _, arrays = decode_infer(body(inputs=[given]), None)
    assert arrays["t"].dtype == np.int64
    assert arrays["t"].tolist() == [2**63 - 1, -(2**63)]


def test_binary_and_json_inputs_mix_and_what_is_not_aligned_is_copied() -> None:
    first, second = np.array([1.5, 2.5, 3.5], np.float32), np.array([[7], [-8]], np.int64)
    for padding in range(8):  # the JSON's length decides where the numbers lie
        header = {"id": "." * padding, "inputs": [binary_input("a", first), PAIR, binary_input("b", second)]}
        request, arrays = decode_infer(*binary(header, first.tobytes(), second.tobytes()))
        assert [given.name for given in request.inputs] == ["a", "x", "b"]
        assert arrays["a"].tolist() == [1.5, 2.5, 3.5]
        assert arrays["b"].tolist() == [[7], [-8]]
        assert all(array.flags.aligned and array.flags.c_contiguous for array in arrays.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": [1, 2, 3]}, r"data is \[3\], its shape is \[2, 2\]"),
        ({"data": [[1, 2, 3], [4, 5, 6]]}, r"data is \[2, 3\], its shape is \[2, 2\]"),
        ({"data": [[1, 2, 3, 4]]}, r"data is \[1, 4\], its shape is \[2, 2\]"),
        ({"data": [[1, 2], [3]]}, "data is not FP32"),
        ({"data": [[[1]], 2]}, "data is not FP32"),
        ({"data": ["1", 2, 3, 4]}, r"data is not FP32 \[2, 2\].*got `str`"),
        ({"data": [True, 2, 3, 4]}, "got `bool`"),
        ({"data": [None, 2, 3, 4]}, "got `null`"),
        ({"data": {"a": 1}}, "Expected `array`"),
        ({"datatype": "INT64"}, "got `float`"),
        ({"datatype": "FP16"}, "'FP16'; send FP32 or INT64"),
        ({"shape": [2, -2]}, r"Expected `int` >= 1 - at `\$.inputs\[0\].shape"),
        ({"shape": [10**30, 0]}, "inference request is not valid"),
        ({"shape": [2**62, 2**62]}, "its shape is"),
        ({"shape": [1] * 5}, "length <= 4"),
        ({"data": None}, "Expected `array`, got `null`"),
        ({"parameters": {"binary_data_size": 16}}, "both data and binary_data_size"),
        ({"parameters": {"shared_memory_region": "a"}}, "shared_memory_region is not supported"),
    ],
)
def test_inputs_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode_infer(body(inputs=[PAIR | given]), None)


def test_an_input_without_numbers() -> None:
    given = {name: value for name, value in PAIR.items() if name != "data"}
    with pytest.raises(RequestError, match="neither data nor binary_data_size"):
        decode_infer(body(inputs=[given]), None)
    with pytest.raises(RequestError, match="input 'x' is given twice"):
        decode_infer(body(inputs=[PAIR, PAIR]), None)


@pytest.mark.parametrize(
    "given",
    [b"", b"null", b"[]", b"{", b'{"inputs": 1}', b"\xff", b'{"inputs": [], "id": 3}', b'{"inputs":' + b"[" * 99_999],
)
def test_bodies_that_are_no_request(given: bytes) -> None:
    with pytest.raises(RequestError, match="the inference request is not valid"):
        decode_infer(given, None)


def test_more_numbers_than_can_be_read_quickly_are_refused_before_they_are() -> None:
    given = body(inputs=[PAIR | {"data": [0] * ((1 << 20) + 2)}])
    with pytest.raises(RequestError, match="more than 1048576 values; send large tensors as binary"):
        decode_infer(given, None)
    numbers = np.zeros(1 << 20, np.float32)
    given, length = binary({"inputs": [binary_input("x", numbers)]}, b",," * (2 << 20))
    assert decode_infer(given, length)[1]["x"].size == numbers.size


def test_nesting_without_end_is_refused() -> None:
    deep = '{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": ' + "[" * 50_000 + "]" * 50_000 + "}]}"
    with pytest.raises(RequestError, match=r"nested too deeply|not valid|not FP32"):
        decode_infer(deep.encode(), None)
    with pytest.raises(RequestError, match=r"nested too deeply|not valid"):
        decode_infer(b'{"inputs": [], "more": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", None)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ("x", "must be the length of the JSON"),
        ("-1", "must be the length of the JSON"),
        ("٣", "must be the length of the JSON"),
        ("9" * 30, "must be the length of the JSON"),
        ("999999", "is more than the"),
        ("3", "the inference request is not valid"),
    ],
)
def test_header_lengths_that_are_refused(length: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode_infer(body(inputs=[PAIR]), length)


@pytest.mark.parametrize(
    ("size", "tail", "message"),
    [
        (12, 12, r"binary_data_size=12, but FP32 \[4\] takes 16"),
        (-16, 16, "binary_data_size=-16"),
        (True, 16, "binary_data_size=True"),
        (16.0, 16, "binary_data_size=16.0"),
        (16, 15, "needs 16 bytes after the JSON, 15 are left"),
        (16, 17, "1 bytes follow the inputs"),
    ],
)
def test_binary_sizes_that_are_refused(size: Any, tail: int, message: str) -> None:
    given = binary_input("a", np.zeros(4, np.float32), parameters={"binary_data_size": size})
    with pytest.raises(RequestError, match=message):
        decode_infer(*binary({"inputs": [given]}, bytes(tail)))


OUTPUTS: dict[str, NDArray[Any]] = {"logits": np.array([[0.5, -2.0]], np.float32), "ids": np.array([3, 4], np.int64)}


def asked(**members: Any) -> InferRequest:
    return decode_infer(body(inputs=[PAIR], **members), None)[0]


def test_an_answer_is_json_unless_it_is_asked_for_as_binary() -> None:
    answer = encode_infer(asked(id="42"), "ranker", "v", OUTPUTS)
    assert dict(answer.headers) == {"content-length": str(len(answer.body)), "content-type": "application/json"}
    assert json.loads(bytes(answer.body)) == {
        "model_name": "ranker",
        "model_version": "v",
        "id": "42",
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.5, -2.0]},
            {"name": "ids", "datatype": "INT64", "shape": [2], "data": [3, 4]},
        ],
    }


def test_binary_outputs_follow_the_json_in_the_order_asked_for() -> None:
    wanted = [{"name": "ids"}, {"name": "logits", "parameters": {"binary_data": False}}]
    answer = encode_infer(asked(parameters={"binary_data_output": True}, outputs=wanted), "ranker", "v", OUTPUTS)
    size = int(answer.headers[HEADER_LENGTH])
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert json.loads(bytes(answer.body)[:size])["outputs"] == [
        {"name": "ids", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}},
        {"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.5, -2.0]},
    ]
    assert np.frombuffer(answer.body[size:], "<i8").tolist() == [3, 4]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([{"name": "queries"}], "no output 'queries'; this model gives logits, ids"),
        ([{"name": "ids"}, {"name": "ids"}], "output 'ids' is listed twice"),
        ([{"name": "ids", "parameters": {"classification": 2}}], "classification is not supported"),
    ],
)
def test_outputs_that_are_refused(wanted: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encode_infer(asked(outputs=wanted), "ranker", "v", OUTPUTS)
