"""What each path accepts and answers, for its route and for the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from unipinrec.runtime.server.access.tokens import Scope
from unipinrec.runtime.server.bodies import ErrorAnswer

EVERY, READS = (400, 500), (400, 500, 503)
POSTS, STORE = (*READS, 408, 413, 429, 504), (*READS, 429, 504)


@dataclass(frozen=True)
class AnyOf:
    """One of several types, where msgspec has no union of them; with `listed`, a list of them."""

    types: tuple[Any, ...]
    listed: bool = False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A method of a path.

    Attributes:
        method, path: As in the table of routes, with converters.
        scope: What a token needs for it, if there are tokens; None = it is open to all.
        tag, summary: Texts of the document; an operation without a summary is not in it.
        answer: Type of the answer; None = text.
        body: Type of the body; None = there is no body.
        statuses: Statuses of error answers.
        parameters: Parameters by name, as OpenAPI describes them.
        refused: Types of error answers by status, where they are not `error`.
        error: Type of the other error answers; its method `of` makes one of an `ErrorDetail`.
        binary: Whether tensors may follow the JSON of body and answer.
        examples: Key of its bodies in `openapi_examples`; "" = none.
        polled: Whether probes ask for it every few seconds; then it is logged only if it fails.
    """

    path: str
    method: str = "GET"
    scope: Scope | None = "recommend"
    tag: str = "operation"
    summary: str = ""
    answer: Any = None
    body: Any = None
    statuses: Sequence[int] = EVERY
    parameters: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[int, Any] = field(default_factory=dict)
    error: Any = ErrorAnswer
    binary: bool = False
    examples: str = ""
    polled: bool = False

    @cached_property
    def documented(self) -> str:
        """The path without converters."""
        return re.sub(r":\w+}", "}", self.path)


def in_path(example: str | None = None, **schema: Any) -> dict[str, Any]:
    """A parameter in a path."""
    extra = {} if example is None else {"example": example}
    return {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1, **schema}, **extra}


def in_header(description: str, **schema: Any) -> dict[str, Any]:
    """A header of a request."""
    return {"in": "header", "description": description, "schema": schema}
