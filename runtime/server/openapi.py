"""What the server's paths take and answer, as OpenAPI 3.1, made of the structs that decode and encode them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from unipinrec.runtime.server.app import operations_of, route
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.openapi_examples import Example, Examples, examples
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
REF = "#/components/schemas/{name}"
ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)
Schemas = dict[Any, dict[str, Any]]


def openapi_route(server: Server, version: str = "0") -> Route:
    """GET /openapi.json; `version` is that of the server."""
    made: dict[str | None, bytes] = {}  # by bundle, whose items are in the examples

    async def openapi(_server: Server, call: Call) -> Response:
        held = server.deployments
        recommender = None if held is None else held.current.recommender
        key = None if recommender is None else recommender.bundle.hash
        if key not in made:
            there = operations_of(call.request.app.routes)
            given = {}
            if recommender is not None:
                given = examples(recommender.bundle, cold_start=recommender.popular is not None)
            content = msgspec.json.encode(document(there, version, given))
            made.clear()
            made[key] = content
        return Response(made[key], media_type=JSON)

    return route(server, Operation(path="/openapi.json"), openapi)


def document(there: Iterable[Operation], version: str, given: dict[str, Examples]) -> dict[str, Any]:
    """The description of operations, with examples by path."""
    operations = [one for one in there if one.summary]
    schemas, components = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        path = one.documented
        paths.setdefault(path, {})[one.method.lower()] = _operation(one, schemas, given.get(path, {}))
    terms = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "UniPinRec", "version": version, "license": terms},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _schemas(operations: Iterable[Operation]) -> tuple[Schemas, dict[str, Any]]:
    """The schema of each type, and what they refer to."""
    wanted: list[Any] = []
    for one in operations:
        for kind in (one.error, one.answer, one.body, *one.refused.values()):
            wanted += _parts(kind)
    kinds = list(dict.fromkeys(wanted))
    made, components = msgspec.json.schema_components(kinds, ref_template=REF)
    return dict(zip(kinds, made, strict=True)), {name: _described(schema) for name, schema in components.items()}


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """With what the docstring says of attributes beside them."""
    text, _, attributes = inspect.cleandoc(schema.get("description", "")).partition("\n\nAttributes:\n")
    schema = schema | ({"description": text} if text else {})
    for names, said in ATTRIBUTE.findall(attributes):
        for name in names.split(", "):
            schema["properties"][name] = {**schema["properties"][name], "description": " ".join(said.split())}
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


def _operation(one: Operation, schemas: Schemas, given: Examples) -> dict[str, Any]:
    parameters = {**one.parameters, **HEADERS}
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{one.method.lower()}{one.documented}").strip("_"),
        "tags": [one.tag],
        "summary": one.summary,
        "parameters": [{"name": name, **said} for name, said in parameters.items()],
        "responses": _responses(one, schemas),
    }
    if one.body is not None:
        content: dict[str, Any] = {JSON: {"schema": _schema(one.body, schemas)}}
        if given:
            content[JSON]["examples"] = {name: _example(example) for name, example in given.items()}
        described["requestBody"] = {"required": True, "content": content | _binary(one)}
    if one.path.startswith("/admin/"):
        described["security"] = [{"token": []}]
    return described


def _responses(one: Operation, schemas: Schemas) -> dict[str, Any]:
    content: dict[int, dict[str, Any]] = {
        status: {JSON: {"schema": _schema(one.refused.get(status, one.error), schemas)}} for status in one.statuses
    }
    if one.answer is None:
        content[200] = {TEXT: {"schema": {"type": "string"}}}
    else:
        content[200] = {JSON: {"schema": _schema(one.answer, schemas)}} | _binary(one)
    return {
        str(status): {"description": STATUSES[status], "headers": _headers(status), "content": content[status]}
        for status in sorted(content)
    }


def _binary(one: Operation) -> dict[str, Any]:
    """JSON with tensors behind it."""
    binary = {BINARY: {"schema": {"type": "string", "format": "binary"}}}
    return binary if one.binary else {}


def _headers(status: int) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-Id": {"schema": {"type": "string"}}}
    return headers | ({"Retry-After": {"schema": {"type": "integer"}}} if status == 429 else {})


def _example(example: Example) -> dict[str, Any]:
    return {"summary": example.summary, "value": example.value, "x-status": example.status}
