"""Random valid requests of random sizes to every endpoint: refused with figures, or computed within the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORK_MIB, RUNS = 24, 2  # a batch and a request to /v2 at the same time
BESIDE_MIB = 160  # of bodies, answers, and blocks that the allocator has not joined yet
REQUESTS = """
import json, re, sys
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
from live_server import SMALL, listening, served

from unipinrec.runtime import Bundle
from unipinrec.runtime.machine import keep_memory_flat

def mib(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

def recommend():
    wanted = {"history": history(), "k": 5, "candidates": int(rng.integers(5, 290)), "exclude_seen": False}
    return "/v1/recommend", json.dumps([wanted] * int(rng.integers(1, 33))), {}

def rank():
    wanted = {"history": history(), "items": ids[: rng.integers(1, 300)]}
    return "/v1/rank", json.dumps([wanted] * int(rng.integers(1, 33))), {}

def similar():
    return "/v1/items/similar", json.dumps({"items": ids[: rng.integers(1, 100)], "k": 100}), {}

def history():
    return [{"item": str(item), "actions": []} for item in rng.choice(ids, rng.integers(1, 65))]

def infer():
    graph = str(rng.choice(["encoder", "ranker"]))
    rows, tokens, slots = int(rng.integers(1, 33)), int(rng.integers(1, 65)), int(rng.integers(2, 65))
    if graph == "ranker":
        tokens = int(4096 ** rng.random() if rng.random() < 0.5 else 4096)
    sizes = {"batch": rows, "history": tokens, "candidates": tokens, "past": slots}
    tensors, binary = [], b""
    for spec in bundle.manifest.graphs[graph].inputs:
        shape = [sizes.get(size, size) for size in spec.shape]
        content = np.ones(shape, spec.dtype).tobytes()
        kind = "FP32" if spec.dtype == "float32" else "INT64"
        tensors.append({"name": spec.name, "shape": shape, "datatype": kind,
                        "parameters": {"binary_data_size": len(content)}})
        binary += content
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    return f"/v2/models/{graph}/infer", head + binary, {"Inference-Header-Content-Length": str(len(head))}

keep_memory_flat()
path, count, work_mib = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
bundle, rng = Bundle.open(path), np.random.default_rng(int(sys.argv[4]))
ids = list(bundle.item_ids)
with served(path, replace(SMALL, work_mib=work_mib, threads=1)) as app, listening(app) as port:
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        answers, before = [], mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        for turn in range(count):
            path, body, headers = (recommend, rank, similar, infer)[turn % 4]()
            answer = client.post(path, content=body, headers={**headers, "X-Deadline-Ms": "30000"})
            answers.append((path, answer.status_code, answer.text[:300] if answer.status_code != 200 else ""))
print(json.dumps({"answers": answers, "grown_mib": mib("VmHWM") - before}))
"""


def ask(bundle: Path, count: int, work_mib: int, seed: int) -> dict[str, Any]:
    """The answers to random requests in a process of its own, and how far its memory grew."""
    doubles = Path(__file__).resolve().parents[2] / "doubles"
    paths = os.pathsep.join([str(doubles), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", REQUESTS, str(bundle), str(count), str(work_mib), str(seed)]
    run = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("count", [48, pytest.param(1_000, marks=pytest.mark.slow)])
def test_requests_are_refused_or_stay_within_the_budget(bundle: Path, count: int) -> None:
    found = ask(bundle, count, WORK_MIB, seed=count)
    statuses = {
        path: {status for other, status, _ in found["answers"] if other == path} for path, _, _ in found["answers"]
    }
    refusals = [text for _, status, text in found["answers"] if status != 200]
    assert set(statuses) == {
        *("/v1/recommend", "/v1/rank", "/v1/items/similar"),
        *("/v2/models/encoder/infer", "/v2/models/ranker/infer"),
    }
    assert all(codes == {200} for path, codes in statuses.items() if path.startswith("/v1")), refusals
    assert statuses["/v2/models/ranker/infer"] == {200, 400}, refusals
    assert all("KiB are accepted: send fewer at a time" in text for text in refusals), refusals
    assert found["grown_mib"] < RUNS * WORK_MIB + BESIDE_MIB


def test_a_history_that_takes_too_much_is_refused_with_figures(bundle: Path) -> None:
    from unipinrec.errors import RequestError
    from unipinrec.runtime import Event, Recommender

    with Recommender.load(bundle, "cpu", work_bytes=200_000) as recommender:
        events = [Event(item=item, actions=()) for item in recommender.bundle.item_ids[:64]]
        assert len(recommender.recommend(events[:2], 5).items) == 5
        with pytest.raises(RequestError, match=r"a history of 64 events takes up to .* KiB .* may take 195 KiB; send"):
            recommender.recommend(events, 5)
