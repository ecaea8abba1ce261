"""The alerting rules speak of metrics that are there, and fire when they should."""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from served_process import HISTORY, started

ALERTS = Path(__file__).resolve().parents[2] / "docs" / "alerts.yml"
CASES = Path(__file__).parent / "alerts_test.yml"


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All metrics of two processes after a recommendation."""
    with started("--processes", "2", "--state", tmp_path_factory.mktemp("state")) as running:
        running.ready()
        assert running.ask("POST", "/v1/recommend", {"history": HISTORY, "k": 3})[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return text


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus' own tool."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return found


def passes(command: list[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_metric_of_a_rule_is_in_a_scrape(scrape: str) -> None:
    there = set(re.findall(r"^# TYPE (\w+) ", scrape, re.MULTILINE))
    asked = set(re.findall(r"unipinrec_\w+", re.sub("#.*", "", ALERTS.read_text())))
    assert len(asked) >= 10
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in asked} <= there


def test_rules_fire_when_they_should(promtool: str, tmp_path: Path) -> None:
    cases = tmp_path / "cases.yml"
    cases.write_text(CASES.read_text().replace("ALERTS", str(ALERTS)))
    assert "SUCCESS" in passes([promtool, "check", "rules", str(ALERTS)])
    assert "SUCCESS" in passes([promtool, "test", "rules", str(cases)])


def test_every_rule_is_tested() -> None:
    rules = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    for case in CASES.read_text().split("- name: ")[1:]:
        assert sorted(re.findall(r"alertname: (\w+)", case)) == sorted(rules)


def test_prometheus_reads_a_scrape(promtool: str, scrape: str) -> None:
    assert "error" not in passes([promtool, "check", "metrics"], scrape)
