"""The Open Inference Protocol v2: the graphs of the bundle for clients that speak it, such as tritonclient.

A version is the hash of a bundle. A client that chains graphs names it in every request: keys and values of one bundle
then never reach another's ranker, whatever is swapped meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from unipinrec.runtime.bundle.manifest import REQUIRED_GRAPHS
from unipinrec.runtime.server.admission import Admission
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.bodies import ApiError
from unipinrec.runtime.server.call import Call, Server, as_json
from unipinrec.runtime.server.deployment import Deployment
from unipinrec.runtime.server.operations import EVERY, POSTS, READS, AnyOf, Operation, in_header, in_path
from unipinrec.runtime.server.v2.codec import (
    HEADER_LENGTH,
    EncodedBody,
    InferError,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    decode_infer,
    encode_infer,
    wanted_outputs,
)
from unipinrec.runtime.server.v2.graphs import (
    GraphLimits,
    check_graph_inputs,
    graph_metadata,
    output_names,
    run_graph,
)

SERVER_NAME, EXTENSIONS = "unipinrec", ("binary_tensor_data",)
NONE: Mapping[str, Any] = MappingProxyType({})
NAME, LENGTH = (
    in_path("retrieval"),
    in_header("Bytes of the JSON, where binary tensors follow it.", type="integer", minimum=0),
)
MODELS: dict[str, dict[str, Any]] = {
    "/v2/models/{model}": {"model": NAME},
    "/v2/models/{model}/versions/{version}": {"model": NAME, "version": in_path()},
}


def oip_routes(server: Server, limits: GraphLimits | None = None, *, version: str = "") -> list[Route]:
    """The protocol's lines of the table of routes; `version` is that of the server."""
    graphs = _Graphs(
        limits=limits or GraphLimits(),
        admission=Admission((limits or GraphLimits()).pending),
        executor=ThreadPoolExecutor(1, "unipinrec-graphs"),  # one run at a time, beside those of /v1/recommend
    )
    about = ServerMetadata(name=SERVER_NAME, version=version, extensions=EXTENSIONS)
    own = [
        route(server, _get("/v2", "What the server is", ServerMetadata), partial(_about, about)),
        route(server, _get("/v2/health/live", "Whether the server answers", ServerLive), _live),
        route(server, READY, _ready),
    ]
    return own + [
        route(server, operation, handler)
        for path, parameters in MODELS.items()
        for operation, handler in (
            (_get(path, "Inputs and outputs of a graph", ModelMetadata, (*READS, 404), parameters), _model),
            (_model_readiness(path, parameters), _model_ready),
            (_inference(path, parameters), graphs.infer),
        )
    ]


def _get(
    path: str, summary: str, answer: Any, statuses: Sequence[int] = EVERY, parameters: Mapping[str, Any] = NONE
) -> Operation:
    return Operation(
        method="GET",
        path=path,
        tag="graphs",
        summary=summary,
        answer=answer,
        statuses=statuses,
        parameters=parameters,
        error=InferError,
    )


READY = replace(
    _get("/v2/health/ready", "Whether all graphs are ready", ServerReady, READS), refused={503: ServerReady}
)


def _model_readiness(path: str, parameters: Mapping[str, Any]) -> Operation:
    ready = _get(f"{path}/ready", "Whether a graph is ready", ModelReady, (*READS, 404), parameters)
    return replace(ready, refused={503: AnyOf((ModelReady, InferError))})


def _inference(path: str, parameters: Mapping[str, Any]) -> Operation:
    return Operation(
        method="POST",
        path=f"{path}/infer",
        tag="graphs",
        summary="Run a graph",
        body=InferRequest,
        answer=InferResponse,
        statuses=(*POSTS, 404),
        parameters={**parameters, HEADER_LENGTH: LENGTH},
        error=InferError,
        binary=True,
    )


async def _about(about: ServerMetadata, _server: Server, _call: Call) -> Response:
    return as_json(about)


async def _live(_server: Server, _call: Call) -> Response:
    return as_json(ServerLive(live=True))


async def _ready(server: Server, _call: Call) -> Response:
    ready = server.phase == "ready"
    return as_json(ServerReady(ready=ready), 200 if ready else 503)


async def _model(server: Server, call: Call) -> Response:
    model, version = _named(call)
    with server.acquire() as deployment:
        _check_named(model, version, deployment)
        return as_json(graph_metadata(model, deployment.recommender, deployment.version))


async def _model_ready(server: Server, call: Call) -> Response:
    model, version = _named(call)
    with server.acquire() as deployment:
        _check_named(model, version, deployment)
    ready = server.phase == "ready"
    return as_json(ModelReady(name=model, ready=ready), 200 if ready else 503)


@dataclass(frozen=True, kw_only=True)
class _Graphs:
    """Runs graphs for clients."""

    limits: GraphLimits
    admission: Admission
    executor: Executor

    async def infer(self, server: Server, call: Call) -> Response:
        """POST .../infer."""
        with self.admission.admit(call.left_s):
            body = await call.body(self.limits.body_bytes)
            answer = self.executor.submit(self._answer, server, call, body)
            await call.wait([answer])
            encoded = answer.result()
        return Response(encoded.body, headers=encoded.headers)

    def _answer(self, server: Server, call: Call, body: bytes) -> EncodedBody:
        """In the executor's thread, which holds the deployment: a client that leaves does not take it away."""
        model, version = _named(call)
        with server.acquire() as deployment:
            _check_named(model, version, deployment)
            recommender = deployment.recommender
            request, inputs = decode_infer(body, call.request.headers.get(HEADER_LENGTH))
            wanted_outputs(request, output_names(model, recommender))
            check_graph_inputs(model, recommender, inputs, self.limits)
            outputs = run_graph(model, recommender, inputs)
            return encode_infer(request, model, deployment.version, outputs)


def _named(call: Call) -> tuple[str, str | None]:
    """Model and version of the path."""
    named = call.request.path_params
    return named["model"], named.get("version")


def _check_named(model: str, version: str | None, deployment: Deployment) -> None:
    if model not in REQUIRED_GRAPHS:
        known = ", ".join(REQUIRED_GRAPHS)
        raise ApiError(404, "unknown_model", f"there is no model {model[:100]!r}; this server has {known}")
    if version not in (None, deployment.version):
        raise ApiError(
            404,
            "unknown_version",
            f"version {(version or '')[:100]!r} does not serve; what serves is {deployment.version}",
        )
