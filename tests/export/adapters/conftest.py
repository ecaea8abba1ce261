"""A bundle's answers, in process and over HTTP, beside the scores of the library that the model comes from."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_server import SMALL, listening, served

from unipinrec.runtime import CacheOptions, Recommender
from unipinrec.runtime.requests import RecommendOptions

TOP, TIE = 10, 1e-5
Scores = dict[str, float]  # by item
Difference = tuple[float, int]  # largest difference of a score, histories with the same ten best items, ties aside
Differences = Callable[[Path, Sequence[list[str]], Sequence[Scores]], dict[str, Difference]]


@pytest.fixture(scope="session")
def differences() -> Differences:
    return _differences


def _differences(bundle: Path, histories: Sequence[list[str]], expected: Sequence[Scores]) -> dict[str, Difference]:
    """By way of asking; no history is empty, or longer than the model's limit."""
    options = RecommendOptions(exclude_seen=False)
    with Recommender.load(bundle, "cpu") as fresh:
        caches = fresh.bundle.manifest.model.cache == "prefix"
        answers = {"fresh": [fresh.recommend(events(one), TOP, options).to_json() for one in histories]}
    if caches:
        with Recommender.load(bundle, "cpu", cache=CacheOptions(budget_bytes=8 << 20, dtype="fp32")) as cached:
            answers["cached"] = []
            for user, history in enumerate(histories):
                for end in (len(history) // 2, len(history)):
                    slate = cached.recommend(events(history[:end]), TOP, options, user=str(user)) if end else None
                assert slate is not None
                assert slate.kv == ("extended" if len(history) > 1 else "miss")
                answers["cached"].append(slate.to_json())
    with served(bundle, replace(SMALL, cache_dtype="fp32")) as app, listening(app) as port:
        answers["http"] = [asked(port, one) for one in histories]
    return {way: _difference(slates, expected) for way, slates in answers.items()}


def events(history: list[str]) -> list[dict[str, Any]]:
    return [{"item": item, "actions": ["click"]} for item in history]


def asked(port: int, history: list[str]) -> dict[str, Any]:
    body = json.dumps({"history": events(history), "k": TOP, "exclude_seen": False}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/recommend", body, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        slate: dict[str, Any] = json.load(answer)
    return slate


def _difference(slates: Sequence[dict[str, Any]], expected: Sequence[Scores]) -> Difference:
    largest, same = 0.0, 0
    for slate, scores in zip(slates, expected, strict=True):
        assert slate["order"] == "retrieval"
        assert len(slate["items"]) == TOP
        largest = max(largest, *(abs(item["score"] - scores[item["item"]]) for item in slate["items"]))
        served, best = [scores[item["item"]] for item in slate["items"]], sorted(scores.values(), reverse=True)[:TOP]
        same += max(abs(one - other) for one, other in zip(served, best, strict=True)) < TIE
    return largest, same
