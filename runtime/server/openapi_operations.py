"""Every path of the server: what it takes, what it answers, and with which statuses; for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unipinrec.runtime.server.admin import Current
from unipinrec.runtime.server.api import (
    ErrorAnswer,
    EventsBody,
    ForgetAnswer,
    Readiness,
    RecommendAnswer,
    RecommendBody,
    SimilarAnswer,
    SimilarBody,
    UserAnswer,
)
from unipinrec.runtime.server.deployments import DeploymentStatus
from unipinrec.runtime.server.events.store import Receipt
from unipinrec.runtime.server.openapi_examples import EXAMPLE_USER
from unipinrec.runtime.server.page import SampleHistory, SampleUsers
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
)

STATUSES = {
    200: "The answer.",
    400: "The request is not valid; the message says what is accepted.",
    401: "The token is missing or wrong.",
    404: "There is no such thing.",
    408: "The body did not arrive before the deadline.",
    409: "Nothing was swapped.",
    413: "The body is too large.",
    422: "The request is valid, but cannot be answered: cold starts are refused, or the bundle cannot be served.",
    429: "Too many requests are waiting; Retry-After says in how many seconds to send it again.",
    500: "A fault of the server; its log says more about X-Request-Id.",
    503: "The server is loading, shutting down, or cannot reach the store.",
    504: "There was no answer before the deadline.",
}
EVERY, READS = (400, 500), (400, 500, 503)
POSTS, STORE, ADMIN = (*READS, 408, 413, 429, 504), (*READS, 429, 504), (*READS, 401)
MODEL, VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"


@dataclass(frozen=True)
class AnyOf:
    """One of several types that msgspec has no union for; with `listed`, a list of those."""

    types: tuple[Any, ...]
    listed: bool = False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A path and what it does.

    Attributes:
        method, path: As in the document, in lower case and without converters.
        tag, summary: For people.
        answer: Type of the answer; None = text.
        body: Type of the body; None = there is none.
        statuses: Of refusals.
        parameters: Names in `PARAMETERS`.
        refused: Type of the answer with a status where it is not the usual error.
    """

    method: str
    path: str
    tag: str
    summary: str
    answer: Any
    body: Any = None
    statuses: Sequence[int] = EVERY
    parameters: Sequence[str] = ()
    refused: dict[int, Any] = field(default_factory=dict)


def _get(path: str, summary: str, answer: Any, statuses: Sequence[int] = EVERY, **more: Any) -> Operation:
    return Operation(method="get", path=path, tag=_tag(path), summary=summary, answer=answer, statuses=statuses, **more)


def _post(path: str, summary: str, body: Any, answer: Any, statuses: Sequence[int] = POSTS, **more: Any) -> Operation:
    return Operation(
        method="post", path=path, tag=_tag(path), summary=summary, body=body, answer=answer, statuses=statuses, **more
    )


def _tag(path: str) -> str:
    tags = {"/v2": "graphs", "/v1/demo": "page", "/v1/events": "users", "/v1/users": "users", "/v1": "recommend"}
    return next((tag for start, tag in tags.items() if path.startswith(start)), "operation")


def _model(path: str, *named: str) -> tuple[Operation, ...]:
    ready = {503: AnyOf((ModelReady, InferError))}
    return (
        _get(path, "Inputs and outputs of a graph", ModelMetadata, (*READS, 404), parameters=named),
        _get(f"{path}/ready", "Whether a graph is ready", ModelReady, (*READS, 404), parameters=named, refused=ready),
        _post(
            f"{path}/infer",
            "Run a graph",
            InferRequest,
            InferResponse,
            (*POSTS, 404),
            parameters=(*named, HEADER_LENGTH),
        ),
    )


OPERATIONS = (
    _post(
        "/v1/recommend",
        "The best items for a user, or for each of a list",
        RecommendBody | list[RecommendBody],
        AnyOf((RecommendAnswer, AnyOf((RecommendAnswer, ErrorAnswer), listed=True))),
        (*POSTS, 422),
    ),
    _post(
        "/v1/events",
        "Append what users just did",
        EventsBody | list[EventsBody],
        AnyOf((Receipt, AnyOf((Receipt, ErrorAnswer), listed=True))),
    ),
    _get("/v1/users/{user}", "What is known of a user", UserAnswer, (*STORE, 404), parameters=("user",)),
    Operation(
        method="delete",
        path="/v1/users/{user}",
        tag="users",
        summary="Forget a user",
        answer=ForgetAnswer,
        statuses=STORE,
        parameters=("user",),
    ),
    _post("/v1/items/similar", "Items like other items", SimilarBody, SimilarAnswer),
    _get("/v1/demo/users", "The first sample users of the bundle", SampleUsers, READS),
    _get("/v1/demo/history", "The events of a sample user", SampleHistory, (*READS, 404), parameters=("sample",)),
    _get("/health/live", "Whether the process answers", dict[str, str]),
    _get("/health/ready", "Whether requests are answered, and with what", Readiness, READS, refused={503: Readiness}),
    _get("/metrics", "Metrics for Prometheus", None),
    _get("/debug/traces/{name}", "The trace of a request", dict[str, Any], (*EVERY, 404), parameters=("name",)),
    _post("/admin/reload", "Serve another bundle", Current, DeploymentStatus, (*ADMIN, 404, 408, 409, 413, 422)),
    _post("/admin/rollback", "Serve the bundle before this one", None, DeploymentStatus, (*ADMIN, 409, 422)),
    _get("/admin/status", "What serves, and what was swapped", DeploymentStatus, ADMIN),
    _get("/v2", "What the server is", ServerMetadata),
    _get("/v2/health/live", "Whether the server answers", ServerLive),
    _get("/v2/health/ready", "Whether all graphs are ready", ServerReady, READS, refused={503: ServerReady}),
    *_model(MODEL, "model"),
    *_model(VERSION, "model", "version"),
)


def _in_path(example: str | None = None, **schema: Any) -> dict[str, Any]:
    given = {} if example is None else {"example": example}
    return {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1, **schema}, **given}


def _in_header(description: str, **schema: Any) -> dict[str, Any]:
    return {"in": "header", "description": description, "schema": schema}


PARAMETERS: dict[str, dict[str, Any]] = {
    "user": _in_path(EXAMPLE_USER, maxLength=256),
    "sample": {"name": "user", "in": "query", "required": True, "schema": {"type": "string"}},
    "name": _in_path(),
    "model": _in_path("retrieval"),
    "version": _in_path(),
    HEADER_LENGTH: _in_header("Bytes of the JSON, where binary tensors follow it.", type="integer", minimum=0),
    "X-Deadline-Ms": _in_header(
        "Milliseconds that the request may take.", type="integer", minimum=1, maximum=999_999_999_999
    ),
    "X-Request-Id": _in_header("Returned with the answer, and named in the log.", type="string"),
}
