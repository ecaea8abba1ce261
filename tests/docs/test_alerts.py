"""The alerting rules speak of metrics that are there, and fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ALERTS = Path(__file__).resolve().parents[2] / "docs" / "alerts.yml"
RUNBOOKS = ALERTS.parent / "deploy" / "runbooks.md"
CASES = Path(__file__).parent / "alerts_test.yml"


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


def test_every_rule_has_a_runbook_and_names_it() -> None:
    rules = dict(re.findall(r"- alert: (\w+)(?:.*\n)+?        annotations: \{runbook: (\S+)\}", ALERTS.read_text()))
    assert list(rules) == re.findall(r"- alert: (\w+)", ALERTS.read_text())
    sections = dict(re.findall(r"^## (\w+)\n((?:(?!## ).*\n)+)", RUNBOOKS.read_text(), re.MULTILINE))
    assert list(sections) == list(rules)
    for name, runbook in rules.items():
        assert runbook == f"docs/deploy/runbooks.md#{name.lower()}"
        assert re.search(r"- \*\*Look\*\*: .*(?:\n  .*)*\n- \*\*Do\*\*: ", sections[name]), name
