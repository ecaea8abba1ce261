"""Every query of the dashboard is valid, speaks of metrics and labels that are there, and has an answer."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served_process import Running

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "deploy" / "grafana.json"
SECRET = "the-secret-of-prometheus"
OF_PROMETHEUS = {"job", "instance", "le"}
SELECTOR = re.compile(r"\b((?:unipinrec|process)_\w+)(?:\{([^}]*)\})?")


def queries() -> dict[str, str]:
    """Expressions by panel, as Grafana sends them."""
    found = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$job", "unipinrec")
            assert "$" not in expression
            found[f"{panel['title']}/{target['refId']}"] = expression
    return found


def test_metrics_and_labels_of_the_queries_are_in_a_scrape(scrape: str) -> None:
    labels: dict[str, set[str]] = defaultdict(set)
    families = set()
    for family in text_string_to_metric_families(scrape):
        families.add(family.name)
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    assert len(queries()) >= 40
    for panel, expression in queries().items():
        known = set(OF_PROMETHEUS)
        selectors = SELECTOR.findall(expression)
        assert selectors, panel
        for metric, matchers in selectors:
            assert metric in labels or re.sub("_total$", "", metric) in families, (panel, metric)
            known |= labels[metric]
            for name in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers):
                assert name in labels[metric] | OF_PROMETHEUS, (panel, metric, name)
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert set(re.split(r"\s*,\s*", group)) <= known, (panel, group)


def test_the_dashboard_is_whole() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.fixture(scope="module")
def prometheus(observed: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that scrapes the server."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "config.yml").write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n  - job_name: unipinrec\n"
        f"    authorization: {{credentials: {SECRET}}}\n"
        f"    static_configs: [{{targets: ['127.0.0.1:{observed.port}']}}]\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["prometheus", f"--config.file={folder / 'config.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    words += [f"--web.listen-address={address}", "--log.level=error"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait(20)


def answer(address: str, expression: str) -> list[Any]:
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=20) as response:
        result: list[Any] = json.loads(response.read())["data"]["result"]
    return result


def test_every_query_has_an_answer(prometheus: str, observed: Running) -> None:
    limit = time.monotonic() + 60
    scraped = 'count_over_time(unipinrec_ready{job="unipinrec",process="0"}[1m])'
    while True:
        try:
            if int((answer(prometheus, scraped) or [{"value": (0, 0)}])[0]["value"][1]) >= 3:
                break
        except OSError:
            pass  # it starts
        assert time.monotonic() < limit
        time.sleep(0.2)
    assert observed.ask("GET", "/v2")[0] == 401
    assert [panel for panel, expression in queries().items() if not answer(prometheus, expression)] == []
