"""Served answers of models of other origin, beside the scores of the model or library itself.

    OMP_NUM_THREADS=1 PYTHONPATH=examples python bench/own_models.py [--users 100]

Card: each model, and for each way of asking the largest difference of a score and the number of users whose ten best
items are the model's (scores within 1e-5 are a tie). Histories have 1 to as many events as the model reads. Lists may
hold items of the history. Ways: `fresh`; `cached fp32` and `cached int8`, the second half of a history after its cached
first half; `http` and `http cached fp32`, the same through `unipinrec serve`; `openvino`, fresh on that engine.

    sasrec, gru4rec, hstu    examples/, trained for 200 steps on a made-up log
    llama, qwen2             transformers' own classes with random weights, through `export.adapters.hugging_face`
    rectools ...             checkpoints that RecTools wrote, and the scores that it gave (tests/fixtures/sasrec)
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, card, finish
from numpy.typing import NDArray

from unipinrec.export.adapters.hugging_face import source_from_decoder
from unipinrec.export.adapters.sasrec import source_from_sasrec
from unipinrec.export.bundle_writer import export_bundle
from unipinrec.runtime import CacheOptions, Recommender
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.requests import RecommendOptions

TOP, TIE, PORT = 10, 1e-5, 8765
LIBRARIES = ("transformers", "torch")
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Histories as requests hold them, and the model's own scores of all items after each, [users, N]."""

    bundle: Path
    histories: list[list[dict[str, Any]]]
    scores: Floats


def example(name: str, users: int, folder: Path) -> Case:
    """One of the examples, which trains and exports itself."""
    made_up = importlib.import_module("made_up")
    model = importlib.import_module(name).main(str(folder / name))
    rows, times_ms = made_up.made_up_log(users)
    vectors, lengths = made_up.catalogue(model), np.random.default_rng(3).integers(1, made_up.LONGEST + 1, users)
    histories, scores = [], []
    with torch.no_grad():
        for own, times, count in zip(rows, times_ms, lengths.tolist(), strict=True):
            part = slice(0, count)
            state = model.states(made_up.events_of(vectors, own[None, part], times[None, part]))[:, -1]
            scores.append((vectors @ model.retrieve(state, None)[0, 0]).numpy())
            histories.append(events([made_up.ITEM_IDS[row] for row in own[part]], times[part].tolist()))
    return Case(bundle=folder / name, histories=histories, scores=np.stack(scores))


def decoder(kind: str, users: int, folder: Path) -> Case:
    """A small decoder of transformers with random weights."""
    import transformers  # noqa: PLC0415 - only these cases need it

    torch.manual_seed(7)
    shape = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(**shape, initializer_range=0.15)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    ids = [f"item-{row}" for row in range(500)]
    export_bundle(source_from_decoder(model, ids, max_history=50), folder / kind)
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, 500, count).tolist() for count in rng.integers(1, 51, users)]
    with torch.no_grad():
        scores = [model(torch.tensor([own])).logits[0, -1].numpy() for own in rows]
    histories = [events([ids[row] for row in own]) for own in rows]
    return Case(bundle=folder / kind, histories=histories, scores=np.stack(scores))


def rectools(variant: str, users: int, folder: Path) -> Case:
    """A checkpoint of RecTools, and its scores."""
    stored = ROOT / "tests" / "fixtures" / "sasrec" / variant
    source, document = (
        source_from_sasrec(stored.with_suffix(".ckpt")),
        json.loads(stored.with_suffix(".json").read_text()),
    )
    export_bundle(source, folder / variant)
    scores = [[own[item] for item in source.item_ids] for own in document["scores"][:users]]
    longest = source.model.max_history
    return Case(
        bundle=folder / variant,
        histories=[events(own[-longest:]) for own in document["histories"][:users]],
        scores=np.array(scores, np.float32),
    )


def events(items: Sequence[str], times_ms: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Clicks, as a request holds them."""
    clicks: list[dict[str, Any]] = [{"item": item, "actions": ["click"]} for item in items]
    for click, time_ms in zip(clicks, times_ms or [], strict=False):
        click["timestamp_ms"] = time_ms
    return clicks


def measured(case: Case) -> dict[str, dict[str, float | int]]:
    """Largest difference and equal lists, by way of asking."""
    options = RecommendOptions(exclude_seen=False)
    answers: dict[str, list[dict[str, Any]]] = {}
    for way, device in (("fresh", "cpu"), ("openvino", "openvino")):
        with Recommender.load(case.bundle, device, strict=True) as recommender:
            answers[way] = [recommender.recommend(own, TOP, options).to_json() for own in case.histories]
    for dtype in ("fp32", "int8") if Bundle.open(case.bundle).manifest.model.cache == "prefix" else ():
        cache = CacheOptions(budget_bytes=64 << 20, dtype=dtype)
        with Recommender.load(case.bundle, "cpu", cache=cache) as recommender:
            slates = []
            for user, own in enumerate(case.histories):
                for end in sorted({len(own) // 2 or 1, len(own)}):
                    slate = recommender.recommend(own[:end], TOP, options, user=str(user))
                slates.append(slate.to_json())
            answers[f"cached {dtype}"] = slates
    with serving(case.bundle):
        answers["http"] = [asked(own) for own in case.histories]
        if "cached fp32" in answers:
            answers["http cached fp32"] = []
            for user, own in enumerate(case.histories):
                *_, last = [asked(own[:end], str(user)) for end in sorted({len(own) // 2 or 1, len(own)})]
                assert last["kv"] == ("extended" if len(own) > 1 else "miss")
                answers["http cached fp32"].append(last)
    row_of = {item: row for row, item in enumerate(Bundle.open(case.bundle).item_ids)}
    return {way: compared(slates, case.scores, row_of) for way, slates in answers.items()}


def compared(slates: Sequence[dict[str, Any]], scores: Floats, row_of: dict[str, int]) -> dict[str, float | int]:
    """Of the lists of one way of asking."""
    largest, same = 0.0, 0
    for slate, expected in zip(slates, scores, strict=True):
        rows = [row_of[item["item"]] for item in slate["items"]]
        served = np.array([item["score"] for item in slate["items"]])
        largest = max(largest, float(np.abs(served - expected[rows]).max()))
        same += bool(np.abs(expected[rows] - np.sort(expected)[: -TOP - 1 : -1]).max() < TIE)
    return {"max_score_diff": float(f"{largest:.1e}"), "same_ten": same, "users": len(slates)}


@contextmanager
def serving(bundle: Path) -> Iterator[None]:
    """`unipinrec serve`, until the block ends."""
    words = [
        "serve",
        str(bundle),
        "--device",
        "cpu",
        "--port",
        str(PORT),
        "--cache-dtype",
        "fp32",
        "--log-level",
        "error",
    ]
    process = subprocess.Popen([sys.executable, "-m", "unipinrec", *words])
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def asked(history: list[dict[str, Any]], user: str | None = None) -> dict[str, Any]:
    """A recommendation over HTTP."""
    named = {} if user is None else {"user": user}
    body = json.dumps({"history": history, "k": TOP, "exclude_seen": False, **named}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/recommend", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        slate: dict[str, Any] = json.load(answer)
    return slate


def main() -> None:
    """Measure all models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=100)
    users, models = parser.parse_args().users, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("sasrec", "gru4rec", "hstu"):
            models[name] = measured(example(name, users, folder))
        for kind in ("Llama", "Qwen2"):
            models[kind.lower()] = measured(decoder(kind, users, folder))
        for variant in ("default", "masked", "cosine", "categories"):
            models[f"rectools {variant}"] = measured(rectools(variant, users, folder))
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    finish({**card("own_models"), "libraries": versions, "models": models}, "own_models")


if __name__ == "__main__":
    main()
