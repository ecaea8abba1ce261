"""The Open Inference Protocol v2: the graphs of the bundle for clients that speak it, such as tritonclient.

A version is the hash of a bundle. A client that chains graphs names it in every request: then the keys and values of
one bundle never reach the ranker of another, even if a swap happens in between.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from starlette.responses import Response
from starlette.routing import Route

from unipinrec.runtime.server.admission import Admission
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.bodies import ApiError
from unipinrec.runtime.server.call import Call, Handler, Server, as_json
from unipinrec.runtime.server.deployment import Deployment
from unipinrec.runtime.server.operations import POSTS, READS, AnyOf, Operation, in_header, in_path
from unipinrec.runtime.server.v2.codec import (
    HEADER_LENGTH,
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
MODEL = "/v2/models/{model}"
NAME = {"model": in_path("retrieval")}
VERSION = {**NAME, "version": in_path()}
LENGTH = {
    HEADER_LENGTH: in_header("Bytes of the JSON, where binary tensors follow it.", type="integer", minimum=0),
}
_operation = partial(Operation, tag="graphs", error=InferError)


def oip_routes(server: Server, limits: GraphLimits | None = None, *, version: str = "") -> list[Route]:
    """The routes of the protocol; `version` is that of the server."""
    graphs = _Graphs(
        limits=limits or GraphLimits(),
        admission=Admission((limits or GraphLimits()).pending),
        executor=ThreadPoolExecutor(1, "unipinrec-graphs"),  # one run at a time, beside those of /v1/recommend
    )
    metadata = ServerMetadata(name=SERVER_NAME, version=version, extensions=EXTENSIONS)

    async def about(_server: Server, _call: Call) -> Response:
        return as_json(metadata)

    table: list[tuple[Operation, Handler]] = [
        (_operation(path="/v2", summary="What the server is", answer=ServerMetadata), about),
        (LIVE, _live),
        (READY, _ready),
    ]
    for path, parameters in ((MODEL, NAME), (f"{MODEL}/versions/{{version}}", VERSION)):
        metadata_of_graph = _operation(
            path=path,
            summary="Inputs and outputs of a graph",
            answer=ModelMetadata,
            statuses=(*READS, 404),
            parameters=parameters,
        )
        readiness = _operation(
            path=f"{path}/ready",
            summary="Whether a graph is ready",
            answer=ModelReady,
            statuses=(*READS, 404),
            parameters=parameters,
            refused={503: AnyOf((ModelReady, InferError))},
        )
        inference = _operation(
            method="POST",
            path=f"{path}/infer",
            summary="Run a graph",
            body=InferRequest,
            answer=InferResponse,
            statuses=(*POSTS, 404),
            parameters={**parameters, **LENGTH},
            binary=True,
            examples="inference" if path == MODEL else "",
        )
        table += [(metadata_of_graph, _model), (readiness, _model_ready), (inference, graphs.infer)]
    return [route(server, operation, handler) for operation, handler in table]


LIVE = _operation(path="/v2/health/live", scope=None, summary="Whether the server answers", answer=ServerLive)
READY = _operation(
    path="/v2/health/ready",
    scope=None,
    summary="Whether all graphs are ready",
    answer=ServerReady,
    statuses=READS,
    refused={503: ServerReady},
)


async def _live(_server: Server, _call: Call) -> Response:
    return as_json(ServerLive(live=True))


async def _ready(server: Server, _call: Call) -> Response:
    ready = server.phase == "ready"
    return as_json(ServerReady(ready=ready), 200 if ready else 503)


async def _model(server: Server, call: Call) -> Response:
    with server.acquire() as deployment:
        model = _checked_model(call, deployment)
        return as_json(graph_metadata(model, deployment.recommender, deployment.version))


async def _model_ready(server: Server, call: Call) -> Response:
    with server.acquire() as deployment:
        model = _checked_model(call, deployment)
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
        with self.admission.admit(call.left_s, arriving=True) as ticket:
            body = await call.body(self.limits.body_bytes)
            ticket.begin()
            answer = self.executor.submit(self._answer, server, call, body)
            try:
                await call.wait([answer])
            finally:
                ticket.outlast(answer)
            return answer.result()

    def _answer(self, server: Server, call: Call, body: bytes) -> Response:
        """Runs in the executor's thread, which holds the deployment even if the client leaves."""
        with server.acquire() as deployment:
            model, recommender = _checked_model(call, deployment), deployment.recommender
            request, inputs = decode_infer(body, call.request.headers.get(HEADER_LENGTH))
            wanted_outputs(request, output_names(model, recommender))
            check_graph_inputs(model, recommender, inputs, self.limits)
            outputs = run_graph(model, recommender, inputs)
            return encode_infer(request, model, deployment.version, outputs)


def _checked_model(call: Call, deployment: Deployment) -> str:
    """The model in the path.

    Raises:
        ApiError: 404, there is no such model, or its version is not that of the deployment.
    """
    model: str = call.request.path_params["model"]
    version = call.request.path_params.get("version", deployment.version)
    known = deployment.recommender.bundle.manifest.model.graphs
    if model not in known:
        raise ApiError(404, "unknown_model", f"there is no model {model[:100]!r}; this server has {', '.join(known)}")
    if version != deployment.version:
        message = f"version {version[:100]!r} is not active; the active version is {deployment.version}"
        raise ApiError(404, "unknown_version", message)
    return model
