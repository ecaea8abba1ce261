"""What a path of the server takes and answers, beside its handler; the OpenAPI document is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from unipinrec.runtime.server.api import ErrorAnswer

EVERY, READS = (400, 500), (400, 500, 503)
POSTS, STORE, ADMIN = (*READS, 408, 413, 429, 504), (*READS, 429, 504), (*READS, 401)


@dataclass(frozen=True)
class AnyOf:
    """One of several types that msgspec has no union for; with `listed`, a list of those."""

    types: tuple[Any, ...]
    listed: bool = False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A path and what it does.

    Attributes:
        method, path: As the table of routes has them, converters included.
        tag, summary: For people; without a summary it is not in the document.
        answer: Type of the answer; None = text.
        body: Type of the body; None = there is none.
        statuses: Of refusals.
        parameters: By name, as OpenAPI describes them.
        refused: Type of the answer with a status where it is not `error`.
        error: Type of other refusals, which it makes of an `ErrorDetail` by `of`.
        binary: Whether tensors may follow the JSON of body and answer.
    """

    method: str
    path: str
    tag: str = "operation"
    summary: str = ""
    answer: Any = None
    body: Any = None
    statuses: Sequence[int] = EVERY
    parameters: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[int, Any] = field(default_factory=dict)
    error: Any = ErrorAnswer
    binary: bool = False

    @cached_property
    def documented(self) -> str:
        """The path without converters."""
        return re.sub(r":\w+}", "}", self.path)


def in_path(example: str | None = None, **schema: Any) -> dict[str, Any]:
    """A parameter in a path."""
    given = {} if example is None else {"example": example}
    return {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1, **schema}, **given}


def in_header(description: str, **schema: Any) -> dict[str, Any]:
    """A header of a request."""
    return {"in": "header", "description": description, "schema": schema}
