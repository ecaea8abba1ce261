from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from typing import Any, cast

import httpx2
import numpy as np
import pytest
from answers import STORED
from live_server import deployed, listening
from numpy.typing import NDArray

from unipinrec.runtime.bundle.golden import read_golden
from unipinrec.runtime.bundle.manifest import Tensor
from unipinrec.runtime.graphs.engine import pad_histories
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.server.admission import Admission
from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.call import Endpoint, Server
from unipinrec.runtime.server.v2.graphs import GraphLimits
from unipinrec.runtime.server.v2.routes import oip_routes

LIMITS = GraphLimits(batch=3, candidates=5, work_bytes=24_000, body_bytes=20_000)
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with deployed(STORED) as deployments:
        yield make_server(deployments=deployments)


@pytest.fixture(scope="module")
def recommender(server: Server) -> Recommender:
    assert server.deployments is not None
    return server.deployments.current.recommender


@pytest.fixture(scope="module")
def version(recommender: Recommender) -> str:
    return recommender.bundle.hash


@pytest.fixture(scope="module")
def port(server: Server) -> Iterator[int]:
    with listening(make_app(server, oip_routes(server, LIMITS, version="1.2.3"))) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def asked(recommender: Recommender) -> Arrays:
    """The encoder's inputs for two golden histories."""
    histories = pad_histories(read_golden(recommender.bundle).histories[:2])
    return {
        "item_vectors": recommender.bundle.item_vectors[histories.item_rows],
        "actions": histories.actions,
        "surfaces": histories.surfaces,
        "timestamps_ms": histories.timestamps_ms,
        "lengths": histories.lengths,
    }


def as_json(inputs: Arrays, **changes: Any) -> dict[str, Any]:
    types = {"float32": "FP32", "int64": "INT64"}
    tensors = [
        {"name": name, "shape": list(array.shape), "datatype": types[array.dtype.name], "data": array.ravel().tolist()}
        for name, array in inputs.items()
    ]
    return {"inputs": tensors, **changes}


def run(recommender: Recommender, graph: str, inputs: Arrays) -> Arrays:
    outputs: dict[str, Tensor] = recommender.engine.backend.run(graph, inputs)
    return {name: output.numpy() for name, output in outputs.items()}


def test_the_server_describes_itself(client: httpx2.Client) -> None:
    assert client.get("/v2").json() == {"name": "unipinrec", "version": "1.2.3", "extensions": ["binary_tensor_data"]}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/encoder/ready").json() == {"name": "encoder", "ready": True}


def test_a_model_describes_its_tensors(client: httpx2.Client, version: str) -> None:
    described = client.get(f"/v2/models/retrieval/versions/{version}").json()
    assert described == client.get("/v2/models/retrieval").json()
    assert described == {
        "name": "retrieval",
        "versions": [version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "last_hidden_state", "datatype": "FP32", "shape": [-1, 8]}],
        "outputs": [{"name": "queries", "datatype": "FP32", "shape": [-1, 1, 4]}],
    }


@pytest.mark.parametrize("model", ["encoder", "extend", "retrieval", "ranker"])
def test_every_graph_is_a_model(client: httpx2.Client, recommender: Recommender, model: str) -> None:
    graph = recommender.bundle.manifest.graphs[model]
    described = client.get(f"/v2/models/{model}").json()
    assert [tensor["name"] for tensor in described["inputs"]] == [spec.name for spec in graph.inputs]
    assert [tensor["name"] for tensor in described["outputs"]] == [spec.name for spec in graph.outputs]


def test_an_inference_as_json(client: httpx2.Client, recommender: Recommender, asked: Arrays, version: str) -> None:
    answer = client.post("/v2/models/encoder/infer", json=as_json(asked, id="a-7"))
    assert answer.status_code == 200, answer.text
    document = answer.json()
    expected = run(recommender, "encoder", asked)
    assert (document["model_name"], document["model_version"], document["id"]) == ("encoder", version, "a-7")
    assert [output["name"] for output in document["outputs"]] == list(expected)
    for output in document["outputs"]:
        assert output["shape"] == list(expected[output["name"]].shape)
        np.testing.assert_array_equal(np.float32(output["data"]), expected[output["name"]].ravel())


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/v2/models/item_embedder", 404, "there is no model 'item_embedder'"),
        ("/v2/models/..%2f..%2fetc%2fpasswd", 404, "this path"),
        ("/v2/models/ranker/versions/1", 404, "version '1' is not active; the active version is"),
        ("/v2/models/ranker/versions/1/ready", 404, "version '1' is not active"),
        ("/v2/models/ranker/infer", 405, "this path does not accept this method"),
        ("/v2/nothing", 404, "this path does not exist"),
    ],
)
def test_errors_have_the_shape_of_the_protocol(client: httpx2.Client, path: str, status: int, message: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lengths", np.array([0, 1]), "lengths holds 0 to 1; its values must be from 1 to"),
        ("lengths", np.array([1, 99]), "lengths holds 1 to 99"),
        ("lengths", np.array([1, 1, 1]), "lengths is int64 [3], expected int64 ['batch']"),
        ("lengths", np.array([1.0, 1.0], np.float32), "lengths is float32"),
        ("surfaces", 2, "its values must be from 0 to 1"),
        ("surfaces", -1, "its values must be from 0 to 1"),
        ("timestamps_ms", 2**62, "timestamps_ms holds"),
        ("timestamps_ms", -2, "timestamps_ms holds"),
    ],
)
def test_values_that_a_graph_cannot_take(
    client: httpx2.Client, asked: Arrays, name: str, value: Any, message: str
) -> None:
    changed = value if isinstance(value, np.ndarray) else np.full_like(asked[name], value)
    body = json.dumps(as_json(asked | {name: changed}, outputs=[{"name": "last_hidden_state"}]))
    answer = client.post("/v2/models/encoder/infer", content=body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]


def test_inputs_that_lack_or_are_unknown(client: httpx2.Client, asked: Arrays) -> None:
    for given in (asked | {"more": asked["lengths"]}, {name: a for name, a in asked.items() if name != "lengths"}):
        answer = client.post("/v2/models/encoder/infer", json=as_json(given))
        assert answer.status_code == 400
        assert "encoder: the inputs are" in answer.json()["error"]


def test_what_is_too_much_is_refused(client: httpx2.Client, asked: Arrays) -> None:
    def of(rows: int, events: int) -> dict[str, Any]:
        shaped = {
            name: np.ones((rows, *([events, *a.shape[2:]] if a.ndim > 1 else [])), a.dtype) for name, a in asked.items()
        }
        return as_json(shaped)

    for rows, events, message in (
        (4, 1, "4 batch were sent; at most 3"),
        (1, 9, "9 events were sent; at most 8"),
        (3, 7, "3 rows of 7 events or candidates over 8 slots take up to 25 KiB; at most 23 KiB are accepted"),
    ):
        answer = client.post("/v2/models/encoder/infer", json=of(rows, events))
        assert (answer.status_code, message in answer.json()["error"]) == (400, True), answer.text
    answer = client.post("/v2/models/encoder/infer", content=b" " * 20_001)
    assert (answer.status_code, "larger than 20000 bytes" in answer.json()["error"]) == (413, True)


def test_the_time_that_an_upload_takes_is_not_learnt(server: Server, asked: Arrays) -> None:
    routes = oip_routes(server, LIMITS)
    (endpoint,) = (cast("Endpoint", one.endpoint) for one in routes if one.path == "/v2/models/{model}/infer")
    admission: Admission = cast("Any", endpoint.handler).__self__.admission

    async def slowly() -> AsyncIterator[bytes]:
        content = json.dumps(as_json(asked)).encode()
        yield content[:10]
        await asyncio.sleep(0.5)
        assert (admission.pending, admission.arriving) == (1, 1)
        yield content[10:]

    async def scenario() -> None:
        transport = httpx2.ASGITransport(app=make_app(server, routes))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.post("/v2/models/encoder/infer", content=slowly())).status_code == 200

    asyncio.run(scenario())
    assert 0 < admission.seconds_each < 0.4


def test_a_wish_for_a_deadline_that_is_none(client: httpx2.Client) -> None:
    answer = client.get("/v2", headers={"X-Deadline-Ms": "soon"})
    assert answer.status_code == 400
    assert answer.json() == {"error": "X-Deadline-Ms: 'soon' must be an integer number of ms, at least 1"}


def ranking(recommender: Recommender, key: Any) -> Arrays:
    """A ranker's inputs over one sequence of equal keys."""
    return {
        "past_key_values.0.key": key,
        "past_key_values.0.value": np.ones_like(key),
        "past_lengths": np.array([1]),
        "past_timestamps_ms": np.array([0]),
        "candidate_vectors": recommender.bundle.item_vectors[None, :2],
        "surfaces": np.array([0]),
        "timestamps_ms": np.array([0]),
    }


def test_keys_and_values_that_hold_no_event(client: httpx2.Client, recommender: Recommender) -> None:
    answer = client.post(
        "/v2/models/ranker/infer", json=as_json(ranking(recommender, np.ones((1, 1, 1, 4), np.float32)))
    )
    assert answer.status_code == 400
    assert "past_key_values hold 1 slots; the keys and values of a history of n events have n + 1" in answer.text


def test_what_overflows_is_no_answer(client: httpx2.Client, recommender: Recommender) -> None:
    key = np.full((1, 1, 3, 4), 3e38, np.float32)
    key[:, :, 1] *= -1
    answer = client.post("/v2/models/ranker/infer", json=as_json(ranking(recommender, key)))
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "ranker: logits is not finite; send inputs of ordinary size"},
    )
    hidden = {"name": "last_hidden_state", "shape": [1, 8], "datatype": "FP32", "data": [1e39] * 8}
    answer = client.post("/v2/models/retrieval/infer", json={"inputs": [hidden]})
    assert answer.status_code == 400
    assert "last_hidden_state holds values that are not finite" in answer.json()["error"]


@pytest.fixture
def triton(port: int) -> Iterator[Any]:
    if find_spec("tritonclient") is None or find_spec("geventhttpclient") is None:
        pytest.skip("tritonclient[http] is not installed")
    import tritonclient.http

    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


def ask(triton: Any, model: str, inputs: Arrays, *, binary: bool, version: str = "") -> Arrays:
    from tritonclient.http import InferInput, InferRequestedOutput

    wanted = [tensor["name"] for tensor in triton.get_model_metadata(model)["outputs"]]
    tensors = []
    for name, array in inputs.items():
        tensors.append(InferInput(name, list(array.shape), "INT64" if array.dtype == np.int64 else "FP32"))
        tensors[-1].set_data_from_numpy(array, binary_data=binary)
    outputs = None if binary else [InferRequestedOutput(name, binary_data=False) for name in wanted]
    result = triton.infer(model, tensors, model_version=version, outputs=outputs, request_id="r")
    assert result.get_response()["id"] == "r"
    return {name: result.as_numpy(name) for name in wanted}


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_chains_the_graphs_as_the_recommender_does(
    triton: Any, recommender: Recommender, version: str, binary: bool
) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("ranker", version)
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    bundle, golden = recommender.bundle, read_golden(recommender.bundle)
    history, rows, m = golden.histories[0], golden.candidates[:1, :5], int(golden.prefixes[0])

    def events(start: int, stop: int | None) -> Arrays:
        part = pad_histories([history.part(start, stop)])
        return {
            "item_vectors": bundle.item_vectors[part.item_rows],
            "actions": part.actions,
            "surfaces": part.surfaces,
            "timestamps_ms": part.timestamps_ms,
            "lengths": part.lengths,
        }

    def past(layers: Arrays, count: int) -> Arrays:
        last = np.array([history.timestamps_ms[count - 1]])
        return {**layers, "past_lengths": np.array([count]), "past_timestamps_ms": last}

    def layers(encoded: Arrays) -> Arrays:
        return {name.replace("present", "past_key_values"): a for name, a in encoded.items() if "present" in name}

    def infer(model: str, inputs: Arrays) -> Arrays:
        return ask(triton, model, inputs, binary=binary, version=version)

    begun = layers(infer("encoder", events(0, m)))
    added = infer("extend", {**events(m, None), **past(begun, m)})
    whole = {
        name: np.concatenate([a, added[name.replace("past_key_values", "present")]], axis=2)
        for name, a in begun.items()
    }
    queries = infer("retrieval", {"last_hidden_state": added["last_hidden_state"]})["queries"]
    shown = {"surfaces": golden.surfaces[:1], "timestamps_ms": golden.now_ms[:1]}
    ranked = infer("ranker", {**past(whole, len(history)), "candidate_vectors": bundle.item_vectors[rows], **shown})
    np.testing.assert_allclose(queries, golden.outputs["retrieval.queries"][:1], atol=1e-5)
    np.testing.assert_allclose(ranked["logits"], golden.outputs["ranker.logits"][:1, :5], atol=1e-4)


def test_tritonclient_understands_our_errors(triton: Any, asked: Arrays) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match=r"\[404\] there is no model 'none'"):
        triton.get_model_metadata("none")
    with pytest.raises(InferenceServerException, match=r"\[400\] encoder: lengths holds 8 to 9"):
        ask(triton, "encoder", asked | {"lengths": np.array([8, 9])}, binary=True)
    with pytest.raises(InferenceServerException, match=r"\[400\] Content-Encoding: 'gzip' is not supported"):
        triton.infer("encoder", [], request_compression_algorithm="gzip")
    with pytest.raises(InferenceServerException, match=r"\[404\] version 'old' is not active"):
        ask(triton, "encoder", asked, binary=True, version="old")
