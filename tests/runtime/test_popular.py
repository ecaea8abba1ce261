"""Requests without a history: popular items, with all filters, alone and among others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import STORED
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from twin_bundle import with_shares

from unipinrec.errors import BundleError, ColdStartError, ConfigError, RequestError, TooFewItemsError
from unipinrec.runtime import (
    Batcher,
    Bundle,
    CacheOptions,
    Recommender,
    RecommendOptions,
    Request,
    Slate,
    verify_bundle,
)
from unipinrec.runtime.requests import Event, Range

Reseal = Callable[..., None]
AT = 1_700_000_000_000
HISTORY = tuple(Event(item=f"item-{row}", actions=("click",), timestamp_ms=AT + row) for row in range(3))


@pytest.fixture(scope="module")
def recommender(popular: Path) -> Recommender:
    return Recommender.load(popular, cache=CacheOptions(budget_bytes=1 << 20))


def ask(recommender: Recommender, k: int, **options: Any) -> Slate:
    return recommender.recommend([], k, RecommendOptions(**options))


def names(slate: Slate) -> list[str]:
    return [item.item for item in slate.items]


def without_times(slate: Slate) -> dict[str, Any]:
    document = slate.to_json()
    del document["stages_ms"]
    return document


def test_an_empty_history_is_answered_with_popular_items(recommender: Recommender) -> None:
    slate = ask(recommender, 4, surface="home")
    assert names(slate) == ["item-23", "item-22", "item-0", "item-1"]
    assert [item.score for item in slate.items] == [0.5, 0.25, np.float32(0.25 / 22), np.float32(0.25 / 22)]
    assert {(item.value, item.retrieval_score, len(item.actions)) for item in slate.items} == {(None, None, 0)}
    assert (slate.source, slate.order, slate.kv, slate.kv_reason) == ("popular", None, "miss", "no history")
    assert (slate.device, slate.bundle, slate.exact) == ("cpu", recommender.bundle.hash, None)
    assert (slate.stages_ms.encode, slate.stages_ms.rank) == (0.0, 0.0)
    assert slate.stages_ms.total == slate.stages_ms.retrieve > 0
    assert slate.items[0].title == recommender.bundle.titles[23]
    assert names(ask(recommender, 2)) == ["item-5", "item-6"]


def test_what_orders_other_slates_has_no_effect(recommender: Recommender) -> None:
    expected = without_times(ask(recommender, 5))
    for options in ({"order": "retrieval"}, {"weights": {"click": 2.0}}, {"now_ms": AT}, {"candidates": 1}):
        assert without_times(ask(recommender, 5, **options)) == expected


def test_filters_count_as_for_any_request(recommender: Recommender) -> None:
    assert names(ask(recommender, 2, exclude=["item-5"])) == ["item-6", "item-0"]
    assert names(ask(recommender, 2, allow=["item-9", "item-6", "gone"])) == ["item-6", "item-9"]
    with pytest.raises(TooFewItemsError, match="only 2 of the 24 items are eligible"):
        ask(recommender, 3, allow=["item-9", "item-6"])
    with pytest.raises(RequestError, match="unknown surface 'moon'"):
        ask(recommender, 1, surface="moon")


@given(data=st.data())
def test_exactly_k_eligible_items_in_order_of_their_share(recommender: Recommender, data: st.DataObject) -> None:
    bundle = recommender.bundle
    assert bundle.popularity is not None
    assert bundle.catalogue.codes is not None
    ids, surface = st.lists(st.sampled_from(bundle.item_ids)), data.draw(st.sampled_from(bundle.manifest.surfaces))
    exclude, allow = data.draw(ids), data.draw(st.none() | ids)
    words = data.draw(st.none() | st.sampled_from(["a", "b"]))
    codes, shares = bundle.catalogue.codes[:, 0], bundle.popularity[bundle.manifest.surfaces.index(surface)]
    eligible = {
        item: float(shares[row])
        for row, item in enumerate(bundle.item_ids)
        if item not in exclude
        and (allow is None or item in allow)
        and (words is None or codes[row] == "ab".index(words) + 1)
    }
    k = data.draw(st.integers(1, 24))
    options: dict[str, Any] = {"surface": surface, "exclude": exclude, "allow": allow}
    options["categories"] = None if words is None else {"kind": [words]}
    if k > len(eligible):
        with pytest.raises(TooFewItemsError, match=f"only {len(eligible)} of"):
            ask(recommender, k, **options)
        return
    slate = ask(recommender, k, **options)
    best = sorted(eligible, key=lambda item: (-eligible[item], bundle.rows[item]))[:k]
    assert [(item.item, item.score) for item in slate.items] == [(item, eligible[item]) for item in best]


def test_among_others_the_answer_is_that_of_the_request_alone(recommender: Recommender) -> None:
    options = RecommendOptions(now_ms=AT + 9, surface="home")
    cold = Request(history=(), k=3, options=options, user="ann")
    warm = Request(history=HISTORY, k=3, options=options, user="ann")
    alone = without_times(recommender.recommend_many([cold])[0])
    assert recommender.cache is not None
    recommender.cache.clear()
    before = recommender.cache.statistics()
    requests = [cold, warm, cold, Request(history=HISTORY[:1], k=3, options=options), cold]
    several = recommender.recommend_many(requests)
    with Batcher(recommender) as batcher:
        queued = [answer.result() for answer in [batcher.submit(request) for request in requests]]
    for slates in (several, queued):
        assert [slate.source for slate in slates] == ["popular", "model", "popular", "model", "popular"]
        assert [without_times(slates[index]) for index in (0, 2, 4)] == [alone] * 3
    after = recommender.cache.statistics()
    assert sum(after.misses.values()) - sum(before.misses.values()) == 1
    assert (after.hits - before.hits, after.entries) == (1, 1)
    plain = Recommender.load(recommender.bundle.path).recommend_many(requests)
    assert [without_times(plain[index]) for index in (0, 2, 4)] == [alone] * 3
    assert names(plain[1]) == names(several[1])


def test_nothing_is_computed(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a graph ran")

    monkeypatch.setattr(recommender.engine.backend, "run", fail)
    before = recommender.padding()
    assert names(ask(recommender, 1)) == ["item-5"]
    assert recommender.padding() == before


def test_it_reads_on_until_enough_are_left(tmp_path: Path) -> None:
    shares = np.linspace(1, 2, 48, dtype=np.float32).reshape(2, 24)
    recommender = Recommender.load(with_shares(tmp_path / "bundle", shares))
    assert names(ask(recommender, 2, allow=["item-1", "item-0"])) == ["item-1", "item-0"]
    assert names(ask(recommender, 24)) == [f"item-{row}" for row in reversed(range(24))]


def test_a_bundle_without_popularity_refuses(tmp_path: Path) -> None:
    recommender = Recommender.load(STORED)
    assert recommender.bundle.popularity is None
    message = "this bundle stores no popularity; send events or a history first, or export it again with --data"
    good = Request(history=HISTORY, k=1)
    with pytest.raises(ColdStartError, match=message):
        recommender.recommend_many([good, Request(history=())])
    with Batcher(recommender) as batcher, pytest.raises(ColdStartError, match=message):
        batcher.submit(Request(history=()))
    assert recommender.recommend_many([good])[0].source == "model"


def test_cold_starts_can_be_refused(popular: Path) -> None:
    recommender = Recommender.load(popular, cold_start="refuse")
    with pytest.raises(ColdStartError, match="cold starts are refused here; send events or a history first"):
        recommender.recommend([])
    with pytest.raises(ConfigError, match="cold_start='never' is unknown; use one of popular, refuse"):
        Recommender.load(popular, cold_start="never")  # type: ignore[arg-type]


RIGHT = np.full((2, 24), 1 / 24, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": RIGHT}, "does not contain tensor share; export the bundle again"),
        ({"share": RIGHT[:1]}, r"share is \('F32', \(1, 24\)\), expected \('F32', \(2, 24\)\)"),
        ({"share": RIGHT.astype(np.float64)}, r"share is \('F64', \(2, 24\)\), expected \('F32'"),
        ({"share": np.where(np.eye(2, 24), np.nan, RIGHT).astype(np.float32)}, "not finite and more than 0 everywhere"),
        ({"share": RIGHT * (1 - np.eye(2, 24, dtype=np.float32))}, "not finite and more than 0 everywhere"),
    ],
)
def test_what_contradicts_the_bundle_is_refused(
    popular: Path, tmp_path: Path, reseal: Reseal, tensors: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(popular, tmp_path / "bundle")
    save_file(tensors, folder / "popular.safetensors")
    reseal(folder)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_a_damaged_file_is_found_by_verify(popular: Path, tmp_path: Path) -> None:
    assert verify_bundle(popular, "cpu").ok
    folder = shutil.copytree(popular, tmp_path / "bundle")
    content = bytearray((folder / "popular.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "popular.safetensors").write_bytes(content)
    report = verify_bundle(folder, "cpu")
    (damaged,) = [check for check in report.files if check.problem]
    assert (report.ok, damaged.file, "is altered" in (damaged.problem or "")) == (False, "popular.safetensors", True)


def test_popular_items_have_their_metadata_and_obey_ranges_and_limits(shop: Path) -> None:
    with Recommender.load(shop) as recommender:
        slate = ask(recommender, 4, surface="home")
        assert slate.items[0].metadata == {"price": 23.0, "url": "https://shop.example/23", "image": None}
        everything = names(ask(recommender, 24, surface="home"))
        cheap = ask(recommender, 10, surface="home", ranges={"price": Range(min=2, max=12)})
        assert names(cheap) == [item for item in everything if item != "item-3" and 2 <= int(item[5:]) <= 12]
        with pytest.raises(TooFewItemsError, match=r"only 10 of the 24 .* allow, categories or ranges rule out"):
            ask(recommender, 11, ranges={"price": {"min": 2, "max": 12}})
        kinds = recommender.bundle.catalogue.codes_of("kind", "")[[int(item[5:]) for item in everything]].tolist()
        kept = [
            item for place, item in enumerate(everything) if not kinds[place] or kinds[:place].count(kinds[place]) < 2
        ]
        assert 4 < len(kept) < 24
        for k in range(1, len(kept) + 1):
            assert names(ask(recommender, k, surface="home", max_per_category={"kind": 2})) == kept[:k]
        with pytest.raises(TooFewItemsError, match=f"leaves only {len(kept)} of the eligible ones"):
            ask(recommender, len(kept) + 1, max_per_category={"kind": 2})
