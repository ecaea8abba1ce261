"""The Open Inference Protocol v2: the graphs of the bundle for clients that speak it, such as tritonclient.

A version is the hash of a bundle. A client that chains graphs names it in every request: keys and values of one bundle
then never reach another's ranker, whatever is swapped meanwhile.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from starlette.responses import Response
from starlette.routing import Route

from unipinrec.runtime.bundle.manifest import REQUIRED_GRAPHS
from unipinrec.runtime.server.admission import Admission
from unipinrec.runtime.server.api import Refusal
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.context import Call, Server
from unipinrec.runtime.server.deployments import Deployment
from unipinrec.runtime.server.handlers import as_json
from unipinrec.runtime.server.v2.codec import (
    HEADER_LENGTH,
    Encoded,
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
MODEL, VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"


def oip_routes(server: Server, limits: GraphLimits | None = None, *, version: str = "") -> list[Route]:
    """The protocol's lines of the table of routes; `version` is that of the server."""
    graphs = _Graphs(
        limits=limits or GraphLimits(),
        admission=Admission((limits or GraphLimits()).pending),
        executor=ThreadPoolExecutor(1, "unipinrec-graphs"),  # one run at a time, beside those of /v1/recommend
    )
    about = ServerMetadata(name=SERVER_NAME, version=version, extensions=EXTENSIONS)
    return [
        route(server, "GET", "/v2", partial(_about, about)),
        route(server, "GET", "/v2/health/live", _live),
        route(server, "GET", "/v2/health/ready", _ready),
        *(route(server, "GET", path, _model) for path in (MODEL, VERSION)),
        *(route(server, "GET", f"{path}/ready", _model_ready) for path in (MODEL, VERSION)),
        *(route(server, "POST", f"{path}/infer", graphs.infer) for path in (MODEL, VERSION)),
    ]


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

    def _answer(self, server: Server, call: Call, body: bytes) -> Encoded:
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
        raise Refusal(404, "unknown_model", f"there is no model {model[:100]!r}; this server has {known}")
    if version not in (None, deployment.version):
        raise Refusal(
            404,
            "unknown_version",
            f"version {(version or '')[:100]!r} does not serve; what serves is {deployment.version}",
        )
