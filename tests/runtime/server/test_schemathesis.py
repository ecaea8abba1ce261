"""Requests made from our own OpenAPI document, right and wrong ones: all are answered, and as the document says.

Short by default; `-m slow` sends 5,000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from answers import STORED
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from live_server import SMALL, listening, served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

TOKEN = "not-a-secret-at-all"
HANG_S = 10


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN_OF_A_TEST", TOKEN)
        folder = tmp_path_factory.mktemp("no-bundles")
        options = replace(SMALL, admin_token_env="TOKEN_OF_A_TEST", bundles=folder)
        with served(STORED, options) as app, listening(app) as port:
            yield f"http://127.0.0.1:{port}"


def send(url: str, count: int) -> Counter[int]:
    """Send about so many requests, equally many to every operation; how often each status came back."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    modes = list(schemathesis.GenerationMode)
    each, statuses = -(-count // (len(operations) * len(modes))), Counter[int]()
    for operation in operations:
        for mode in modes:
            _send_to(operation, mode, each, statuses)
    return statuses


def _send_to(operation: Any, mode: Any, count: int, statuses: Counter[int]) -> None:
    from schemathesis.specs.openapi import checks

    described = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]

    @seed(1)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"} if operation.path.startswith("/admin") else {}
        answer = case.call(headers=headers, timeout=HANG_S)
        statuses[answer.status_code] += 1
        hurried = "X-Deadline-Ms" in (case.headers or {})
        assert answer.status_code < 500 or (answer.status_code == 504 and hurried), case.as_curl_command()
        case.validate_response(answer, checks=described)

    with suppress(Unsatisfiable):  # an operation that takes nothing cannot be asked wrongly
        one()


@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_whatever_is_sent_is_answered_as_described(url: str, count: int) -> None:
    statuses = send(url, count)
    assert statuses.total() >= 0.8 * count, statuses
    assert statuses[200] > 0.1 * count, statuses
    assert statuses[400] > 0.05 * count, statuses
