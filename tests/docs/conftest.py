"""A server whose metrics alerts and dashboard speak of."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import pytest
from served_process import HISTORY, Running, started

SECRET = "the-secret-of-prometheus"
EVENTS = {"user": "ada", "events": [{"item": "item-1", "actions": ["click"]}]}


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two processes that have answered requests of each kind; metrics need the token `SECRET`."""
    folder = tmp_path_factory.mktemp("observed")
    tokens = folder / "tokens.toml"
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    tokens.write_text(f'[prometheus]\nsha256 = "{digest}"\nscopes = ["recommend", "events", "metrics"]\n')
    options = ("--processes", "2", "--state", folder / "state", "--tokens", tokens, "--log-served", folder / "served")
    swaps = ("--watch", "--bundles", folder)
    with started(*options, *swaps, "--recall-share", "1", "--rate-limit", "500") as running:
        running.ready()
        while running.scrape(token=SECRET).count("unipinrec_ready{") < 2:
            time.sleep(0.1)  # until the other process is up
        use(running)
        (folder / "current.json").write_text('{"bundle": "absent"}')
        running.until("nothing was swapped")
        yield running


def use(running: Running) -> None:
    """Send some requests."""
    bodies = [{"user": f"u{index}", "history": HISTORY, "k": 3} for index in range(8)]
    for body in bodies + bodies:
        assert running.ask("POST", "/v1/recommend", body, token=SECRET)[0] == 200
    assert running.ask("POST", "/v1/events", EVENTS, token=SECRET)[0] == 200
    assert running.ask("POST", "/v1/recommend", {"user": "ada", "k": 0}, token=SECRET)[0] == 400
    assert running.ask("GET", "/v2")[0] == 401


@pytest.fixture(scope="session")
def scrape(observed: Running) -> str:
    """All metrics of it."""
    return observed.scrape(token=SECRET)
