from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from unipinrec.cli import main
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.integrity import seal
from unipinrec.runtime.kv.pages import PAGE_SLOTS

LOAD = ("--users", "100000", "--qps", "100")
SMALL = (*LOAD, "--size", "small", "--events", "200", "--page-slots", "32", "--dtype", "fp32")
COSTS = ("--encode-ms", "30", "--extend-ms", "3", "--retrieve-ms", "2", "--rank-ms", "11")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["plan", *(str(word) for word in words)])


def plan(*words: str | Path) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_bytes_of_a_named_size() -> None:
    kv = plan(*SMALL)["kv"]
    assert (kv["bytes_per_event"], kv["events_per_page"], kv["page_bytes"]) == (8192, 32, 262_144)
    assert (kv["mean_events"], kv["max_history"]) == (pytest.approx(200), 992)
    assert kv["users_per_gib"] == pytest.approx(2**30 / (kv["pages_per_user"] * 262_144))
    assert kv["bytes_of_all_users"] == pytest.approx(100_000 * kv["bytes_per_user"])


def test_the_cache_is_planned_as_it_is_kept_unless_told_otherwise() -> None:
    kv = plan(*LOAD, "--size", "small", "--events", "200")["kv"]
    assert (kv["dtype"], kv["bytes_per_event"]) == ("int8", 2304)


def test_the_type_is_that_of_the_bundle_unless_told_otherwise(outlying: Path, bundle: Path) -> None:
    words = (*LOAD, "--events", "30", "--bundle")
    assert plan(*words, outlying)["kv"]["dtype"] == "bf16"
    assert plan(*words, bundle)["kv"]["dtype"] == "int8"
    assert plan(*words, outlying, "--dtype", "int8")["kv"]["dtype"] == "int8"


def test_a_history_longer_than_the_bundle_allows_is_refused(bundle: Path) -> None:
    result = run(*LOAD, "--bundle", bundle, "--events", "30", "--max-history", "65")
    assert result.exit_code == 2
    assert "--max-history 65 must be at most the model's own, 64" in result.stderr


def test_a_bundle_whose_histories_are_not_cached_has_no_cache_to_plan(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = Bundle.open(copy).manifest
    seal(copy, msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, cache="none")))
    result = run(*LOAD, "--bundle", copy, "--events", "30")
    assert result.exit_code == 2
    assert "this model's histories cannot be cached; no cache to plan" in " ".join(result.stderr.split())


def test_bytes_of_a_bundle(bundle: Path) -> None:
    kv = plan(*LOAD, "--bundle", bundle, "--events", "30", "--dtype", "fp32")["kv"]
    assert (kv["bytes_per_event"], kv["max_history"], kv["events_per_page"]) == (1024, 64, PAGE_SLOTS)


def test_bytes_of_given_sizes() -> None:
    own = (*LOAD, "--layers", "12", "--dim", "768", "--heads", "12", "--events", "200")
    assert plan(*own, "--dtype", "bf16")["kv"]["bytes_per_event"] == 36_864
    assert plan(*own, "--kv-heads", "4", "--dtype", "int8")["kv"]["bytes_per_event"] == 6528
    kv = plan(*own, "--page-slots", "8", "--max-history", "100")["kv"]
    assert (kv["events_per_page"], kv["max_history"]) == (8, 100)
    assert kv["requests_at_max_history"] > 0.5
    assert plan(*own)["kv"]["max_history"] is None


def test_lengths_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("user,events\na,31\nb,32\nc,0\n")
    kv = plan(*LOAD, "--size", "small", "--page-slots", "32", "--events-file", path)["kv"]
    assert (kv["mean_events"], kv["pages_per_user"]) == (21.0, pytest.approx(4 / 3))


def test_a_budget_and_the_table_around_it() -> None:
    document = plan(*SMALL, "--budget-gib", "40")
    assert document["plan"]["memory_bytes"] == 40 * 2**30
    assert document["plan"]["machines"] is None
    found = [row["found"] for row in document["choices"]]
    assert found == sorted(found)
    assert (found[0], document["choices"][0]["cached_users"]) == (0, 0)
    assert found[-1] == pytest.approx(1, abs=0.001)
    assert found[1] < document["plan"]["found"] < found[-1]


def test_machines_from_stage_times() -> None:
    document = plan(*SMALL, *COSTS, "--memory-gib", "16")
    fleet, none = document["plan"], document["choices"][0]
    assert none["machines"] == 7  # 100 / s * 43 ms / 0.7 = 6.1
    assert fleet["machines"] < 7
    assert fleet["memory_bytes"] == fleet["machines"] * 16 * 2**30
    assert [row["machine_gib"] for row in document["choices"]] == [0, 4, 8, 16, 32, 64]
    assert fleet in document["choices"]
    halved = plan(*SMALL, *COSTS, "--memory-gib", "16", "--utilisation", "0.35")
    assert halved["choices"][0]["machines"] == 13


def test_the_text_says_what_was_planned() -> None:
    result = run(*SMALL, *COSTS, "--memory-gib", "16")
    assert result.exit_code == 0
    assert "8,192 bytes per event (4 layers, 8 key/value heads of 32, fp32), 32 events per page of 256 KiB" in (
        result.stdout
    )
    assert "GiB each" in result.stdout
    assert "machines, 16 GiB of cache on each, for 100 requests per second" in result.stdout
    for kind in ("given:", "measured:", "computed:", "assumed:"):
        assert kind in result.stdout.splitlines()


def test_without_stage_times_it_says_what_to_measure() -> None:
    result = run(*SMALL, "--budget-gib", "40")
    assert result.exit_code == 0
    assert "machines: not planned, because the stage times are missing. Measure them on your machine" in result.stdout


def test_without_a_cache_the_machines_alone() -> None:
    result = run(*SMALL, *COSTS)
    assert "7 machines without a cache for 100 requests per second" in result.stdout


def test_a_log_of_ones_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    start, month = 1_650_000_000_000, 30 * 86_400_000
    times = start + np.cumsum(rng.exponential(6.0, (200, 160)), axis=1) * 3_600_000  # every six hours, for a month
    path = tmp_path / "log.csv"
    lines = (f"{user},{int(time)}\n" for user, row in enumerate(times) for time in row if time < start + month)
    path.write_text("user,timestamp_ms\n" + "".join(lines))
    document = plan(*SMALL, "--arrivals", path, "--ttl-hours", "6", "--budget-gib", "1000")
    arrivals = document["arrivals"]
    assert arrivals["requests_per_user_day"] == pytest.approx(4, rel=0.03)
    assert np.dot(arrivals["weights"], arrivals["mean_hours"]) == pytest.approx(6, rel=0.03)
    assert document["plan"]["found"] == pytest.approx(1 - np.exp(-1), abs=0.02)
    assert document["plan"]["cached_users"] == pytest.approx(100_000 * (1 - np.exp(-1)), rel=0.04)
    assert any(str(path) in line for line in document["basis"]["measured"])


def test_the_pace_matters_with_a_time_to_live_only() -> None:
    paces = ("--requests-per-user-day", "1"), ("--requests-per-user-day", "20")
    slow, fast = (plan(*SMALL, "--budget-gib", "40", *pace)["plan"]["found"] for pace in paces)
    assert slow == pytest.approx(fast, abs=0.01)
    slow, fast = (plan(*SMALL, "--budget-gib", "40", "--ttl-hours", "2", *pace)["plan"]["found"] for pace in paces)
    assert slow < fast - 0.1


def test_shares_of_new_users_and_of_unchanged_histories() -> None:
    shares = ("--new-share", "0.02", "--unchanged-share", "0.5", "--requests-per-user-day", "1")
    row = plan(*SMALL, "--budget-gib", "500", *shares)["plan"]
    assert row["miss_new"] == 0.02
    assert row["found"] == pytest.approx(0.98)
    assert row["hit"] == row["extend"] == pytest.approx(0.49)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*LOAD, "--events", "9"), "give the model's shape: one of --bundle, --size, or --layers"),
        ((*SMALL, "--layers", "2", "--dim", "64", "--heads", "2"), "give the model's shape: one of"),
        ((*LOAD, "--events", "9", "--layers", "2", "--dim", "64"), "--layers with --dim and --heads"),
        ((*LOAD, "--events", "9", "--layers", "2", "--dim", "65", "--heads", "2"), "--dim 65 is not a multiple"),
        ((*SMALL, "--max-history", "993"), "--max-history 993 must be at most the model's own, 992"),
        ((*SMALL, "--kv-heads", "2"), "--kv-heads belongs to --layers, --dim and --heads; --size has its own"),
        ((*LOAD, "--size", "small"), "give exactly one of --events and --events-file"),
        ((*SMALL, "--budget-gib", "1", "--memory-gib", "1"), "--budget-gib (all machines together) or --memory-gib"),
        ((*SMALL, "--encode-ms", "5", "--rank-ms", "5"), "stage times go together: --extend-ms, --retrieve-ms is"),
        ((*SMALL, "--memory-gib", "1"), "--memory-gib plans machines and needs all four stage times"),
        ((*SMALL, "--new-share", "0.5"), "new users alone would outnumber all users"),
        ((*SMALL, "--requests-per-user-day", "0.001"), "less than one of each user in 29.4 days"),
        ((*SMALL, "--dtype", "fp8"), "'fp8' is not one of"),
        ((*SMALL, "--qps", "nan"), "Invalid value for '--qps': nan is not a finite number"),
        ((*SMALL, "--budget-gib", "inf"), "Invalid value for '--budget-gib': inf is not a finite number"),
        ((*SMALL, "--new-share", "nan"), "Invalid value for '--new-share': nan is not a finite number"),
        ((*SMALL, "--ttl-hours", "nan"), "Invalid value for '--ttl-hours': nan is not a finite number"),
        ((*SMALL, "--utilisation", "nan"), "Invalid value for '--utilisation': nan is not a finite number"),
        ((*SMALL, *COSTS, "--encode-ms", "inf"), "Invalid value for '--encode-ms': inf is not a finite number"),
        ((*SMALL, "--budget-gib", "1e300"), "a number is too large to plan with"),
        ((*SMALL, *COSTS, "--encode-ms", "1e308"), "a number is too large to plan with"),
        ((*SMALL, "--users", "1" + "0" * 400), "a number is too large to plan with"),
    ],
)
def test_wrong_use(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length\n5\n", "no column 'events'"),
        ("events\n5\nmany\n", "line 3: events is a number of events"),
    ],
)
def test_lengths_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    result = run(*LOAD, "--size", "small", "--events-file", path)
    assert result.exit_code == 1
    assert message in result.stderr


def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    lengths, log = tmp_path / "lengths.csv", tmp_path / "log.csv"
    lengths.write_text("events\n31\n", encoding="utf-8-sig")
    assert plan(*LOAD, "--size", "small", "--events-file", lengths)["kv"]["mean_events"] == 31
    log.write_text("user,timestamp_ms\na,1650000000000\n", encoding="utf-8-sig")
    assert "at least 1000 are needed" in run(*SMALL, "--arrivals", log).stderr


def test_lengths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "lengths.csv").write_text("events\n-5\n")
    result = run(*LOAD, "--size", "small", "--events-file", tmp_path / "lengths.csv")
    assert result.exit_code == 2
    assert "history lengths must be numbers of events" in result.stderr


def test_a_log_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,timestamp_ms\na,1650000000000\na,1650000000001\n")
    result = run(*SMALL, "--arrivals", path)
    assert result.exit_code == 1
    assert "at least 1000 are needed" in result.stderr


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    result = run(*LOAD, "--bundle", tmp_path, "--events", "9")
    assert result.exit_code == 1
    assert "is not a bundle" in result.stderr


def test_help_shows_an_example() -> None:
    assert "unipinrec plan --users 1000000" in run("--help").stdout
