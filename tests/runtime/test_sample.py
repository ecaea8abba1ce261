"""The bundle's own check, counted again by hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle, CacheOptions, Recommender, RecommendOptions
from unipinrec.runtime import sample as measuring
from unipinrec.runtime.bundle.quality import CacheAgreement, KvDtype
from unipinrec.runtime.requests import SOON_MS, Order
from unipinrec.runtime.sample import _overlaps, cache_agreement, chosen_cache, sample_quality


def test_the_last_events_of_sample_users_counted_one_by_one(recommender: Recommender) -> None:
    bundle = recommender.bundle
    orders: tuple[Order | None, ...] = (None, "retrieval")
    users, hits = 0, dict.fromkeys(orders, 0)
    for history in bundle.sample_histories(200):
        *before, last = bundle.events_of(history)
        if not before or "click" not in last.actions or last.item in [event.item for event in before]:
            continue
        users += 1
        for order in orders:
            options = RecommendOptions(surface=last.surface, now_ms=last.timestamp_ms, order=order)
            hits[order] += last.item in [item.item for item in recommender.recommend(before, 10, options).items]
    found = sample_quality(recommender)
    assert (found.users, found.served, found.retrieved) == (users, hits[None], hits["retrieval"])
    assert found == bundle.manifest.sample
    assert users > 100
    assert hits["retrieval"] > 0


def test_the_ten_best_with_a_cache_counted_one_by_one(outlying: Path) -> None:
    plain = Recommender.load(outlying, "cpu")
    cached = Recommender.load(plain.bundle, "cpu", cache=CacheOptions(budget_bytes=1 << 24, dtype="int8"))
    assert (plain.order, plain.bundle.manifest.positive_actions) == ("value", ("click",))
    kept: list[bool] = []
    strict: list[bool] = []
    for user, history in enumerate(plain.bundle.sample_histories(100)):
        events, now_ms = plain.bundle.events_of(history), int(history.timestamps_ms[-1]) + SOON_MS
        options = RecommendOptions(now_ms=now_ms)
        fresh = plain.recommend(events, 200, options).items
        scores, last = {item.item: item.score for item in fresh}, fresh[9].score
        cached.recommend(events[: len(events) // 2], 10, options, user=str(user))
        slates = [cached.recommend(events, 10, options, user=name) for name in (str(user), None)]
        assert [slate.kv for slate in slates] == ["extended", "miss"]
        for item in (item.item for slate in slates for item in slate.items):
            score = scores.get(item, 0.0)  # of an item that is no candidate
            strict.append(score >= last)
            kept.append(score >= last - 0.01 * score * (1 - score))
    found = cache_agreement(plain, "int8")
    assert found.requests == 100
    assert (found.overlap, found.overlap_strict) == pytest.approx((np.mean(kept), np.mean(strict)))
    assert 0.9 < np.mean(strict) < np.mean(kept) < 0.999


def test_a_bundle_states_the_coarsest_type_that_keeps_the_ten_best(bundle: Path, lively: Path, outlying: Path) -> None:
    specs = [Bundle.open(path).manifest.cache for path in (bundle, lively, outlying)]
    assert [spec and spec.dtype for spec in specs] == ["int8", "int8", "bf16"]
    assert [spec and spec.agreement.requests for spec in specs] == [200, 200, 100]
    assert [spec and list(spec.refused) for spec in specs] == [[], [], ["int8"]]
    for spec in specs:
        assert spec is not None
        assert spec.agreement.overlap >= 0.999
        assert all(refused.overlap < 0.999 for refused in spec.refused.values())


def test_types_that_fail_are_passed_over_and_fp32_is_the_last(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measured(_: Recommender, dtype: KvDtype) -> CacheAgreement:
        if dtype == "fp16":
            raise BackendError("a key or value of 1e+06 does not fit into fp16")
        overlap = {"int8": 0.5, "bf16": 0.99, "fp32": 0.998}[dtype]
        return CacheAgreement(requests=2, overlap=overlap, overlap_strict=overlap)

    monkeypatch.setattr(measuring, "cache_agreement", measured)
    with caplog.at_level(logging.WARNING):
        spec = chosen_cache(recommender)
    assert spec is not None
    assert (spec.dtype, spec.agreement.overlap, list(spec.refused)) == ("fp32", 0.998, ["int8", "bf16"])
    assert "a cache in bf16 keeps only 0.9900 of the ten best items" in caplog.messages
    assert "a cache in fp16 does not suit this model: a key or value of 1e+06 does not fit into fp16" in caplog.messages


def test_a_model_whose_histories_are_not_cached_has_no_type(recommender: Recommender) -> None:
    manifest = recommender.bundle.manifest
    uncached = msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, cache="none"))
    assert chosen_cache(replace(recommender, bundle=replace(recommender.bundle, manifest=uncached))) is None


def test_small_scores_are_no_ties_where_similarity_is_a_product(recommender: Recommender) -> None:
    history = recommender.bundle.events_of(recommender.bundle.sample_histories(1)[0])
    fresh = recommender.recommend(history, 40, RecommendOptions(order="retrieval"))
    items = [
        msgspec.structs.replace(item, score=1e-5 / place, retrieval_score=1e-5 / place)
        for place, item in enumerate(fresh.items, 1)
    ]
    fresh = msgspec.structs.replace(fresh, items=tuple(items))
    served = msgspec.structs.replace(fresh, items=tuple(items[5:]))
    manifest = recommender.bundle.manifest
    model = msgspec.structs.replace(manifest.model, similarity="dot", ranker=None)
    assert _overlaps(msgspec.structs.replace(manifest, model=model), fresh, served) == (0.5, 0.5)
