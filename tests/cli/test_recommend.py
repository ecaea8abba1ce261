from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from unipinrec.cli import main
from unipinrec.cli.recommend import _words
from unipinrec.runtime.machine import driver_problem, has_bf16


def run(*words: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def user(bundle: Path) -> str:
    users: list[str] = json.loads((bundle / "user_ids.json").read_bytes())
    return users[0]


@pytest.fixture
def events(bundle: Path, tmp_path: Path) -> Path:
    ids = json.loads((bundle / "item_ids.json").read_bytes())
    path = tmp_path / "events.json"
    path.write_text(json.dumps([{"item": ids[row], "actions": ["click"], "timestamp_ms": 10**12} for row in (5, 6)]))
    return path


@pytest.mark.hnswlib
def test_verify_prints_every_check(bundle: Path) -> None:
    result = run("verify", bundle)
    assert result.exit_code == 0
    for name in ("manifest.json", "index.hnsw", "encoder.present.*", "ranker.logits"):
        assert name in result.stdout
    assert "on cpu (auto: ONNX Runtime on the CPU; openvino" in " ".join(result.stdout.split())
    assert "ten best items with a cache in int8 as without: 1.0000, 1.0000 at export: ok" in result.stdout


def test_verify_json(bundle: Path) -> None:
    result = run("verify", bundle, "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["ok"], document["device"]["name"]) == (0, True, "cpu")
    assert document["golden"][-1]["output"] == "ranker.logits"
    assert 0 <= document["golden"][-1]["max_abs_diff"] < 1e-4
    assert (document["cache"]["dtype"], document["cache"]["here"]["requests"]) == ("int8", 200)


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")
@pytest.mark.parametrize("words", [("verify", "--json"), ("verify",), ("verify", "--help")])
def test_a_full_disk_is_told(bundle: Path, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "unipinrec", *words, str(bundle)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "error: the output could not be written: No space left on device",
    )
    assert "Traceback" not in done.stderr


def test_output_that_the_terminal_cannot_encode_is_escaped(bundle: Path, tmp_path: Path) -> None:
    named = shutil.copytree(bundle, tmp_path / "\u4e2d")
    command = [sys.executable, "-m", "unipinrec", "verify", str(named)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "COLUMNS": "200"}
    shown = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert rb"\u4e2d" in shown.stdout
    as_json = subprocess.run([*command, "--json"], env=environment, capture_output=True, check=True)
    assert json.loads(as_json.stdout.decode("utf-8"))


def test_verify_of_a_device_that_rounds(bundle: Path) -> None:
    result = run("verify", bundle, "--device", "openvino-bf16")
    assert result.exit_code == 0
    assert "agreement with fp32 on 56 requests" in result.stdout
    assert "at most 0.1" in result.stdout
    document = json.loads(run("verify", bundle, "--device", "openvino-bf16", "--json").stdout)
    assert (document["ok"], document["golden"], document["device"]["name"]) == (True, [], "openvino-bf16")
    assert document["agreement"]["ranked_overlap"] >= 0.99


@pytest.mark.hnswlib
def test_verify_of_a_damaged_bundle_fails_with_the_reason(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "ranker.onnx").unlink()
    result = run("verify", copy)
    assert result.exit_code == 1
    assert "is missing" in result.stdout
    assert "golden outputs were not compared" in result.stdout
    assert "1 of 15 checks failed" in result.stderr
    result = run("verify", copy, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["ok"], document["golden"]) == (False, [])


def test_recommend_for_a_sample_user(bundle: Path, user: str) -> None:
    result = run("recommend", bundle, "--user", user, "-k", "3")
    assert result.exit_code == 0
    assert "item" in result.stdout
    assert "score" in result.stdout
    assert "encode" in result.stdout.splitlines()[-1]
    assert "history miss (no cache)" in result.stdout.splitlines()[-1]


def test_recommend_json_for_a_history(bundle: Path, events: Path) -> None:
    words = ("recommend", bundle, "--history", events, "-k", "4", "--now", str(10**12), "--json")
    result = run(*words)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    fields = ["item", "title", "score", "value", "actions", "retrieval_score", "source", "metadata"]
    assert [list(item) for item in document["items"]] == [fields] * 4
    assert (document["kv"], document["kv_reason"], document["device"]) == ("miss", "no cache", "cpu")
    assert {item["item"] for item in document["items"]}.isdisjoint(
        event["item"] for event in json.loads(events.read_bytes())
    )
    assert json.loads(run(*words, "--exact").stdout)["items"] == document["items"]


@pytest.mark.skipif(driver_problem() is None, reason="this machine has an NVIDIA driver")
def test_a_fallback_is_told_and_strict_refuses_it(bundle: Path, user: str) -> None:
    words = ("recommend", bundle, "--user", user, "-k", "1", "--device", "tensorrt")
    document = json.loads(run(*words, "--json").stdout)
    assert (document["device"], document["device_reason"]) == ("cpu", "instead of tensorrt, which does not run here")
    assert document["device_refused"][1].startswith("cuda: there is no NVIDIA driver here")
    verified = json.loads(run("verify", bundle, "--device", "cuda", "--json").stdout)
    assert (verified["device"]["name"], len(verified["device"]["refused"])) == ("cpu", 1)
    for refused in (run(*words, "--strict"), run("verify", bundle, "--device", "cuda", "--strict")):
        assert refused.exit_code == 1
        assert "strict allows no other device" in refused.stderr


def test_weights_make_the_score(bundle: Path, user: str) -> None:
    document = json.loads(run("recommend", bundle, "--user", user, "--weights", "click=1,save=2.5", "--json").stdout)
    for item in document["items"]:
        assert item["score"] == pytest.approx(item["actions"]["click"] + 2.5 * item["actions"]["save"])


def test_filters(bundle: Path, user: str, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    ids = json.loads((bundle / "item_ids.json").read_bytes())
    codes = load_file(bundle / "items.safetensors")["categories"]
    word = manifest["categories"]["topic"][1]
    (tmp_path / "allow.txt").write_text("\n".join(ids[:200]))
    (tmp_path / "deny.txt").write_text("\n".join(ids[:100]))
    words = ("recommend", bundle, "--user", user, "--allow", tmp_path / "allow.txt", "--deny", tmp_path / "deny.txt")
    document = json.loads(run(*words, "--category", f"topic={word}", "-k", "3", "--json").stdout)
    rows = [ids.index(item["item"]) for item in document["items"]]
    assert len(rows) == 3
    assert all(100 <= row < 200 and codes[row, 0] == 2 for row in rows)
    result = run(*words, "--category", "topic=nothing")
    assert result.exit_code == 1
    assert "categories: topic has no word 'nothing'; it has" in result.stderr
    result = run(*words, "--category", "topic")
    assert result.exit_code == 2
    assert "'topic' is not NAME=WORD[,WORD]" in result.stderr


def test_words_of_a_feature_are_collected(bundle: Path, user: str) -> None:
    words = json.loads((bundle / "manifest.json").read_bytes())["categories"]["topic"]
    codes = load_file(bundle / "items.safetensors")["categories"]
    some = f"topic={words[0]},{words[1]}"
    count = str(int(np.isin(codes[:, 0], [1, 2, 3]).sum()) + 1)
    result = run(
        "recommend", bundle, "--user", user, "--category", some, "--category", f"topic={words[2]}", "-k", count
    )
    assert result.exit_code == 1
    assert f"k={count} items were requested" in result.stderr


def test_a_word_may_hold_commas() -> None:
    known = ("Drama", "Comedy", "Little, Brown")
    assert _words(("Little, Brown",), known) == ("Little, Brown",)
    assert _words(("Drama,Comedy", "Little, Brown"), known) == ("Drama", "Comedy", "Little, Brown")
    assert _words(("Little, Green",), known) == ("Little", " Green")


@pytest.mark.parametrize("words", [(), ("--user", "u", "--history", "events")])
def test_exactly_one_of_user_and_history(bundle: Path, events: Path, words: tuple[str, ...]) -> None:
    result = run("recommend", bundle, *(events if word == "events" else word for word in words))
    assert result.exit_code == 2
    assert "give exactly one of --user and --history" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-k", "0"), "0 is not in the range x>=1"),
        (("--weights", "click"), "'click' is not ACTION=NUMBER"),
        (("--weights", "click=much"), "'click=much' is not ACTION=NUMBER"),
        (("--history", "missing.json"), "does not exist"),
        (("--device", "tpu"), "Invalid value for '--device': unknown device 'tpu'; use one of auto, cpu, openvino"),
    ],
)
def test_wrong_use(bundle: Path, words: tuple[str, ...], message: str) -> None:
    result = run("recommend", bundle, "--user", "u", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_verify_on_an_unknown_device(bundle: Path) -> None:
    result = run("verify", bundle, "--device", "gpu")
    assert result.exit_code == 2
    assert "Invalid value for '--device': unknown device 'gpu'; use one of auto" in result.stderr


def test_an_unknown_user_gets_popular_items_and_is_told_so(bundle: Path, events: Path) -> None:
    words = ("recommend", bundle, "-k", "3", "--surface", "home", "--weights", "click=2")
    result = run(*words, "--user", "nobody")
    assert result.exit_code == 0
    assert "user 'nobody' is not among the sample users of this bundle: popular items" in result.stderr
    assert "share" in result.stdout
    assert "retrieval" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("popular items; ")
    document = json.loads(run(*words, "--user", "nobody", "--json").stdout)
    assert (document["source"], document["order"], document["kv_reason"]) == ("popular", None, "no history")
    shares = load_file(bundle / "popular.safetensors")["share"]
    surface = json.loads((bundle / "manifest.json").read_bytes())["surfaces"].index("home")
    assert [item["score"] for item in document["items"]] == sorted(shares[surface].tolist(), reverse=True)[:3]
    events.write_text("[]")
    empty = run(*words, "--history", events, "--json")
    assert "holds no events: popular items" in empty.stderr
    assert json.loads(empty.stdout)["items"] == document["items"]


def test_cold_starts_can_be_refused(bundle: Path, events: Path, user: str) -> None:
    words = ("recommend", bundle, "--cold-start", "refuse", "-k", "1")
    result = run(*words, "--user", "nobody")
    assert result.exit_code == 1
    assert "not among the 200 sample users of this bundle" in result.stderr
    assert "--history" in result.stderr
    events.write_text("[]")
    result = run(*words, "--history", events)
    assert result.exit_code == 1
    assert "the history is empty, and cold starts are refused here" in result.stderr
    assert run(*words, "--user", user).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weights", "like=1"), "unknown action 'like'"),
        (("-k", "301"), "k=301 items were requested"),
        (("--now", "1"), "now_ms=1 is before the last event"),
        (("--surface", "moon"), "unknown surface 'moon'"),
    ],
)
def test_a_request_that_cannot_be_answered(bundle: Path, user: str, words: tuple[str, ...], message: str) -> None:
    result = run("recommend", bundle, "--user", user, *words)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_history_file_that_is_malformed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "events.json").write_text('[{"item": "a", "actions": [], "colour": 1}]')
    result = run("recommend", bundle, "--history", tmp_path / "events.json")
    assert result.exit_code == 1
    assert "unknown field `colour`" in result.stderr


def test_named_items_are_ranked_with_the_scores_of_recommend(bundle: Path, events: Path, tmp_path: Path) -> None:
    words = ("recommend", bundle, "--history", events, "--now", 10**12, "--weights", "save=2")
    best = json.loads(run(*words, "-k", 200, "--include-seen", "--exact", "--json").stdout)["items"]
    expected = [best[place] for place in (3, 90, 170)]
    (tmp_path / "ids.txt").write_text(f"{expected[2]['item']} \n\n{expected[1]['item']}\n")
    named = ("--rank", expected[1]["item"], "--rank", expected[0]["item"], "--rank-file", tmp_path / "ids.txt")
    document = json.loads(run(*words, *named, "--json").stdout)
    assert [item["item"] for item in document["items"]] == [item["item"] for item in expected]
    assert {item["source"] for item in document["items"]} == {"request"}
    for name in ("score", "value", "retrieval_score"):
        assert [item[name] for item in document["items"]] == pytest.approx([item[name] for item in expected], abs=1e-6)
    table = run(*words, *named)
    assert [line.split()[1] for line in table.stdout.splitlines()[3:6]] == [item["item"] for item in expected]
    assert "(no cache); items as named; ordered by" in table.stdout


def test_unknown_items_to_rank_are_refused_or_left_out(bundle: Path, user: str, tmp_path: Path) -> None:
    known = json.loads((bundle / "item_ids.json").read_bytes())[7]
    words = ("recommend", bundle, "--user", user, "--rank", "gone", "--rank", known)
    refused = run(*words)
    assert refused.exit_code == 1
    assert "lacks or has retired ['gone']" in refused.stderr
    result = run(*words, "--skip-unknown", "--json")
    assert f"{bundle} lacks or has retired ['gone']; they are left out" in result.stderr
    document = json.loads(result.stdout)
    assert ([item["item"] for item in document["items"]], document["unknown"]) == ([known], ["gone"])
    popular = run("recommend", bundle, "--user", "nobody", "--rank", known)
    assert "of this bundle: items by popularity" in popular.stderr
    assert popular.stdout.splitlines()[-1].startswith("popular items; ")
    (tmp_path / "none.txt").write_text("\n")
    assert (
        "there is nothing to rank"
        in run("recommend", bundle, "--user", user, "--rank-file", tmp_path / "none.txt").stderr
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", "a", "-k", "3"), "-k cannot be used with --rank or --rank-file; leave it out"),
        (("--rank", "a", "--include-seen", "--exact"), "--exclude-seen/--include-seen, --exact cannot be used with"),
        (("--rank", "a", "--category", "genre=Drama"), "--category cannot be used with --rank"),
        (("--skip-unknown",), "--skip-unknown cannot be used without --rank or --rank-file; leave it out"),
    ],
)
def test_a_search_has_other_options_than_named_items(bundle: Path, words: tuple[str, ...], message: str) -> None:
    result = run("recommend", bundle, "--user", "u", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", ["verify", "recommend"])
def test_help_shows_an_example(name: str) -> None:
    assert f"unipinrec {name} bundle/" in run(name, "--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recommend", "b", "--user", "u", "--range", "price=1:2", "--range", "price=3:"), "price is named twice"),
        (("export", "checkpoint", "hf://org/name"), "hf://org/name is an address, and this takes a path"),
    ],
)
def test_what_a_command_cannot_take_is_told_at_once(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
