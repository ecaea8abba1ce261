"""The OpenAPI 3.1 document of the server, made from the structs that decode and encode its bodies."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from unipinrec.runtime.server.app import operations_of, route
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.openapi_examples import Examples, examples
from unipinrec.runtime.server.operations import AnyOf, Operation, in_header

JSON, BINARY, TEXT = "application/json", "application/octet-stream", "text/plain"
HEADERS = {
    "X-Deadline-Ms": in_header(
        "Milliseconds that the request may take.", type="integer", minimum=1, maximum=999_999_999_999
    ),
    "X-Request-Id": in_header("Returned with the answer, and named in the log.", type="string"),
}
STATUSES = {
    200: "The answer.",
    400: "The request is not valid; the message says what is accepted.",
    401: "The token is missing, unknown or expired.",
    403: "The token lacks the scope.",
    404: "It does not exist.",
    408: "The body did not arrive before the deadline.",
    409: "The bundle was not swapped.",
    413: "The body is too large.",
    422: "The request is valid, but cannot be answered: cold starts are refused, or the bundle cannot be served.",
    429: "Too many requests wait, or came from this client; Retry-After says in how many seconds to send it again.",
    500: "An error of the server; its log says more about X-Request-Id.",
    503: "The server is loading or shutting down, or cannot reach the store.",
    504: "There was no answer before the deadline.",
}
REF = "#/components/schemas/{name}"
ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)
Schemas = dict[Any, dict[str, Any]]


def openapi_route(server: Server, version: str = "0") -> Route:
    """GET /openapi.json; `version` is that of the server."""
    cached: dict[str | None, bytes] = {}  # by the hash of the bundle, whose items are in the examples

    async def openapi(_server: Server, call: Call) -> Response:
        recommender = server.deployments.current.recommender if server.deployments else None
        key = recommender.bundle.hash if recommender else None
        if key not in cached:
            bodies = {}
            if recommender is not None:
                bodies = examples(recommender.bundle, cold_start=recommender.popular is not None)
            served = [
                replace(one, statuses=(*one.statuses, *server.access.statuses(one.scope)))
                for one in operations_of(call.request.app.routes)
            ]
            content = msgspec.json.encode(document(served, version, bodies))
            cached.clear()
            cached[key] = content
        return Response(cached[key], media_type=JSON)

    return route(server, Operation(path="/openapi.json"), openapi)


def document(operations: Iterable[Operation], version: str, bodies: dict[str, Examples]) -> dict[str, Any]:
    """The OpenAPI document of operations, with examples of bodies by `Operation.examples`."""
    documented = [operation for operation in operations if operation.summary]
    schemas, components = _schemas(documented)
    paths: dict[str, dict[str, Any]] = {}
    for operation in documented:
        path = operation.documented
        paths.setdefault(path, {})[operation.method.lower()] = _operation(
            operation, schemas, bodies.get(operation.examples, {})
        )
    terms = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "UniPinRec", "version": version, "license": terms},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _schemas(operations: Iterable[Operation]) -> tuple[Schemas, dict[str, Any]]:
    """The schema of each type, and the components that they refer to."""
    kinds: dict[Any, None] = {}
    for operation in operations:
        for kind in (operation.error, operation.answer, operation.body, *operation.refused.values()):
            kinds |= dict.fromkeys(_parts(kind))
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF)
    return dict(zip(kinds, schemas, strict=True)), {name: _described(schema) for name, schema in components.items()}


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose properties have the texts of the docstring's attributes."""
    text, _, attributes = inspect.cleandoc(schema.get("description", "")).partition("\n\nAttributes:\n")
    schema = schema | ({"description": text} if text else {})
    for names, text_of_names in ATTRIBUTE.findall(attributes):
        for name in names.split(", "):
            schema["properties"][name] = {**schema["properties"][name], "description": " ".join(text_of_names.split())}
    return schema


def _parts(kind: Any) -> list[Any]:
    if isinstance(kind, AnyOf):
        return [part for inner in kind.types for part in _parts(inner)]
    return [] if kind is None else [kind]


def _schema(kind: Any, schemas: Schemas) -> dict[str, Any]:
    if not isinstance(kind, AnyOf):
        return schemas[kind]
    several = {"anyOf": [_schema(inner, schemas) for inner in kind.types]}
    return {"type": "array", "items": several} if kind.listed else several


def _operation(operation: Operation, schemas: Schemas, bodies: Examples) -> dict[str, Any]:
    parameters = {**operation.parameters, **HEADERS}
    binary = {BINARY: {"schema": {"type": "string", "format": "binary"}}} if operation.binary else {}
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method.lower()}{operation.documented}").strip("_"),
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [{"name": name, **parameter} for name, parameter in parameters.items()],
        "responses": _responses(operation, schemas, binary),
    }
    if operation.body is not None:
        content: dict[str, Any] = {"schema": _schema(operation.body, schemas)}
        if bodies:
            content["examples"] = {
                name: {"summary": example.summary, "value": example.value, "x-status": example.status}
                for name, example in bodies.items()
            }
        described["requestBody"] = {"required": True, "content": {JSON: content} | binary}
    if 401 in operation.statuses:
        described["security"] = [{"token": [operation.scope]}]
    return described


def _responses(operation: Operation, schemas: Schemas, binary: dict[str, Any]) -> dict[str, Any]:
    contents: dict[int, dict[str, Any]] = {200: {TEXT: {"schema": {"type": "string"}}}}
    if operation.answer is not None:
        contents[200] = {JSON: {"schema": _schema(operation.answer, schemas)}} | binary
    for status in sorted(set(operation.statuses)):
        kind = operation.refused.get(status, operation.error)
        contents[status] = {JSON: {"schema": _schema(kind, schemas)}}
    headers = {"X-Request-Id": {"schema": {"type": "string"}}}
    with_retry = {**headers, "Retry-After": {"schema": {"type": "integer"}}}
    return {
        str(status): {
            "description": STATUSES[status],
            "headers": with_retry if status == 429 else headers,
            "content": content,
        }
        for status, content in contents.items()
    }
