from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from unipinrec.errors import BackendError, BundleCorruptError, BundleError, RequestError, TooFewItemsError
from unipinrec.runtime import Event, Recommender, RecommendOptions, Request, Slate
from unipinrec.runtime.graphs.engine import Encoded
from unipinrec.runtime.kv.encoder import Lookup
from unipinrec.runtime.requests import Order, Range, Spread

Reseal = Callable[..., None]
T = 1_760_000_000_000
NOW = RecommendOptions(now_ms=T + 1000)


def history(recommender: Recommender, *rows: int) -> tuple[Event, ...]:
    ids, action = recommender.bundle.item_ids, recommender.bundle.manifest.actions[0]
    return tuple(Event(item=ids[row], actions=(action,), timestamp_ms=T + index) for index, row in enumerate(rows))


def names(slate: Slate) -> list[str]:
    return [item.item for item in slate.items]


def test_a_slate(recommender: Recommender) -> None:
    slate = recommender.recommend(history(recommender, 3, 1, 4), 10, NOW)
    assert len(set(names(slate))) == 10
    manifest = recommender.bundle.manifest
    for item in slate.items:
        assert list(item.actions) == list(manifest.actions)
        assert all(0 < probability < 1 for probability in item.actions.values())
        expected = sum(item.actions[action] for action in manifest.positive_actions)
        assert item.score == pytest.approx(expected)
        assert item.retrieval_score is not None
        assert -1 <= item.retrieval_score <= 1
        row = recommender.bundle.rows[item.item]
        assert item.title == recommender.bundle.titles[row]
    assert [item.score for item in slate.items] == sorted((item.score for item in slate.items), reverse=True)
    assert (slate.kv, slate.kv_reason, slate.device) == ("miss", "no cache", "cpu")
    assert slate.bundle == recommender.bundle.hash
    times = slate.stages_ms
    assert 0 < times.encode < times.total
    assert times.total == pytest.approx(times.encode + times.retrieve + times.rank)


def test_the_documented_json(recommender: Recommender) -> None:
    slate = recommender.recommend(history(recommender, 3), 2, NOW)
    document = slate.to_json()
    fields = ["items", "source", "order", "stages_ms", "kv", "kv_reason", "device", "bundle", "exact", "unknown"]
    assert list(document) == fields
    assert list(document["stages_ms"]) == ["encode", "retrieve", "rank", "total"]
    item = ["item", "title", "score", "value", "actions", "retrieval_score", "source", "metadata"]
    assert list(document["items"][0]) == item
    assert document["items"][1]["item"] == slate.items[1].item


def test_the_scores_are_those_of_the_ranker(recommender: Recommender) -> None:
    events = history(recommender, 3, 1, 4)
    slate = recommender.recommend(events, 10, NOW)
    logits = recommender.score(events, names(slate), NOW)
    assert logits.shape == (10, len(recommender.bundle.manifest.actions))
    expected = [list(item.actions.values()) for item in slate.items]
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), expected, atol=1e-6)


def test_dictionaries_serve_as_events(recommender: Recommender) -> None:
    events = history(recommender, 3, 1)
    given = [{"item": e.item, "actions": list(e.actions), "timestamp_ms": e.timestamp_ms} for e in events]
    assert recommender.recommend(given, 5, NOW).items == recommender.recommend(events, 5, NOW).items


def test_seen_and_excluded_items_are_left_out(recommender: Recommender) -> None:
    ids, events = recommender.bundle.item_ids, history(recommender, 3, 1, 4)
    everything = recommender.recommend(events, 297, NOW)
    assert set(names(everything)) == set(ids) - {ids[3], ids[1], ids[4]}
    first = names(everything)[0]
    denied = recommender.recommend(events, 296, RecommendOptions(now_ms=T + 1000, exclude=(first,)))
    assert set(names(denied)) == set(names(everything)) - {first}
    seen = recommender.recommend(events, 300, RecommendOptions(now_ms=T + 1000, exclude_seen=False))
    assert set(names(seen)) == set(ids)
    with pytest.raises(RequestError, match="k=298 items were requested, but only 297 of the 300 items are eligible"):
        recommender.recommend(events, 298, NOW)


def test_weights_decide_the_order(recommender: Recommender) -> None:
    events = history(recommender, 3, 1, 4)
    last = recommender.bundle.manifest.actions[-1]
    slate = recommender.recommend(events, 297, RecommendOptions(now_ms=T + 1000, weights={last: -2.0}))
    assert [item.score for item in slate.items] == [-2.0 * item.actions[last] for item in slate.items]
    assert names(slate) != names(recommender.recommend(events, 297, NOW))


@pytest.mark.hnswlib
def test_the_index_and_the_scan_agree(recommender: Recommender) -> None:
    events = history(recommender, 3, 1, 4)
    asked = replace(recommender, retriever=replace(recommender.retriever, visit_cost=0))
    found = asked.recommend(events, 10, RecommendOptions(now_ms=T + 1000, candidates=20))
    scanned = recommender.recommend(events, 10, RecommendOptions(now_ms=T + 1000, candidates=20, exact=True))
    assert (found.exact, scanned.exact) == (None, "requested")
    assert names(found) == names(scanned)


def test_only_allowed_items_of_a_category_are_recommended(recommender: Recommender) -> None:
    catalogue, events = recommender.bundle.catalogue, history(recommender, 3, 1, 4)
    (feature, words), *_ = catalogue.words.items()
    assert catalogue.codes is not None
    of_word = np.flatnonzero(catalogue.codes[:, 0] == 2)
    eligible = set(of_word[::2].tolist()) - {3, 1, 4}
    options = RecommendOptions(
        now_ms=T + 1000,
        allow=tuple(
            recommender.bundle.item_ids[row] for row in range(300) if row in of_word[::2] or row not in of_word
        ),
        categories={feature: (words[1],)},
    )
    slate = recommender.recommend(events, len(eligible), options)
    assert {recommender.bundle.rows[name] for name in names(slate)} == eligible
    with pytest.raises(RequestError, match=f"only {len(eligible)} of the 300 items are eligible"):
        recommender.recommend(events, len(eligible) + 1, options)
    logits = recommender.score(events, recommender.bundle.item_ids[:7], options)
    assert logits.shape == (7, 4)


def test_many_requests_are_answered_in_their_order(recommender: Recommender) -> None:
    rng = np.random.default_rng(1)
    requests = [
        Request(
            history=history(recommender, *rng.integers(0, 300, rng.integers(1, 65))),
            k=int(rng.integers(1, 20)),
            options=RecommendOptions(now_ms=T + 1000, candidates=int(rng.integers(1, 60))),
        )
        for _ in range(40)
    ]
    together = recommender.recommend_many(requests)
    assert len(together) == 40
    for request, slate in zip(requests, together, strict=True):
        alone = recommender.recommend(request.history, request.k, request.options)
        assert names(slate) == names(alone)
        np.testing.assert_allclose([i.score for i in slate.items], [i.score for i in alone.items], atol=1e-5)
    assert recommender.recommend_many([]) == []


def test_threads_get_the_answers_that_one_gets(recommender: Recommender) -> None:
    rng = np.random.default_rng(2)
    histories = [history(recommender, *rng.integers(0, 300, rng.integers(1, 65))) for _ in range(24)]
    options = RecommendOptions(now_ms=T + 1000, candidates=40)

    def items(events: tuple[Event, ...]) -> Any:
        return recommender.recommend(events, 10, options).items

    alone = [items(events) for events in histories]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(items, histories * 3)) == alone * 3


def test_extending_a_history_scores_the_same(recommender: Recommender) -> None:
    events, candidates = history(recommender, 3, 1, 4, 1, 5), recommender.bundle.item_ids[:7]
    whole = recommender.score(events, candidates, NOW)
    for cut in (1, 4):
        np.testing.assert_allclose(recommender.score(events, candidates, NOW, extend_at=cut), whole, atol=1e-5)


def test_seen_and_excluded_items_can_be_scored(recommender: Recommender) -> None:
    ids = recommender.bundle.item_ids
    options = RecommendOptions(now_ms=T + 1000, exclude=ids)
    assert recommender.score(history(recommender, 3), [ids[3]], options).shape == (1, 4)


def test_an_unknown_candidate_is_named(recommender: Recommender) -> None:
    with pytest.raises(RequestError, match=r"items: this bundle lacks or has retired \['z'\]; leave"):
        recommender.score(history(recommender, 3), ["z"], NOW)


def test_candidates_and_filters_may_be_integers_and_are_lists(recommender: Recommender) -> None:
    events, ids = history(recommender, 3), recommender.bundle.item_ids
    with pytest.raises(RequestError, match="there is nothing to rank; name at least one item"):
        recommender.score(events, [], NOW)
    with pytest.raises(RequestError, match=r"candidates='item-12' must be a list of item ids; write \['item-12'\]"):
        recommender.score(events, "item-12", NOW)
    unread = RecommendOptions(now_ms=T + 1000, weights={"nope": 1.0}, candidates=0, exact=True)
    np.testing.assert_array_equal(recommender.score(events, ids[:2], unread), recommender.score(events, ids[:2], NOW))


def test_what_one_request_spoils_is_its_own(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(history=history(recommender, row), k=5, options=NOW) for row in (3, 1, 4)]
    expected = recommender.recommend_many(requests)
    asked = [recommender.resolve(request) for request in requests]
    encoding = recommender.encoder.encoding

    def spoilt(group: Sequence[Lookup]) -> AbstractContextManager[Encoded]:
        if any(lookup.request is asked[1] for lookup in group):
            raise BackendError("a key of the second does not fit")
        return encoding(group)

    monkeypatch.setattr(recommender.encoder, "encoding", spoilt)
    first, second, third = recommender.answer(asked)
    assert isinstance(second, BackendError)
    for slate, alone in ((first, expected[0]), (third, expected[2])):
        assert isinstance(slate, Slate)
        assert names(slate) == names(alone)


@pytest.mark.parametrize("cut", [0, 3, -1])
def test_an_extension_needs_events_on_both_sides(recommender: Recommender, cut: int) -> None:
    with pytest.raises(RequestError, match=rf"extend_at={cut} must be from 1 to 2"):
        recommender.score(history(recommender, 3, 1, 4), recommender.bundle.item_ids[:2], NOW, extend_at=cut)


def test_one_bad_request_is_named_before_any_is_answered(recommender: Recommender) -> None:
    good = Request(history=history(recommender, 3))
    with pytest.raises(RequestError, match="unknown surface 'moon'"):
        recommender.recommend_many([good, Request(history=(), options=RecommendOptions(surface="moon"))])


def test_nothing_is_scored_after_an_empty_history(recommender: Recommender) -> None:
    with pytest.raises(RequestError, match="the history is empty; send at least one event to score items"):
        recommender.score([], recommender.bundle.item_ids[:2])


def test_what_serves_is_logged(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="unipinrec"):
        Recommender.load(bundle)
    assert "on cpu (auto: ONNX Runtime on the CPU; openvino" in caplog.text
    assert "ONNX Runtime" in caplog.text


def test_a_damaged_bundle_is_not_served(copy: Path) -> None:
    (copy / "weights.bin").unlink()
    with pytest.raises(BundleCorruptError, match=r"weights\.bin is missing"):
        Recommender.load(copy, verify=False)


@pytest.mark.hnswlib
def test_an_index_of_fewer_items_is_not_served(copy: Path, reseal: Reseal) -> None:
    import hnswlib

    vectors = load_file(copy / "items.safetensors")["item_vectors"]
    index = hnswlib.Index(space="ip", dim=64)
    index.init_index(299, M=16, ef_construction=100, random_seed=1)
    index.add_items(vectors[:299], np.arange(299), num_threads=1)
    index.save_index(str(copy / "index.hnsw"))
    reseal(copy)
    with pytest.raises(BundleError, match=r"the index does not match the items: it has .* \(64, 299\)"):
        Recommender.load(copy)


def test_outputs_that_do_not_reproduce_are_not_served(copy: Path, reseal: Reseal) -> None:
    golden = load_file(copy / "golden.safetensors")
    golden["ranker.logits"][1, 2, 0] += 0.01
    save_file(golden, copy / "golden.safetensors")
    reseal(copy)
    with pytest.raises(BundleError, match=r"first ranker\.logits: differs by up to 0\.01, at most 0\.0001 is allowed"):
        Recommender.load(copy)
    assert Recommender.load(copy, verify=False).bundle.path == copy


@pytest.mark.parametrize("order", ["value", "product", "retrieval"])
def test_an_order_is_that_of_its_score(recommender: Recommender, order: Order) -> None:
    events = history(recommender, 3, 1, 4)
    options = msgspec.structs.replace(NOW, order=order)
    slate = recommender.recommend(events, 40, options)
    assert slate.order == order
    assert [item.score for item in slate.items] == sorted((item.score for item in slate.items), reverse=True)
    spec = recommender.bundle.manifest.order
    assert spec is not None
    for item in slate.items:
        if order == "retrieval":
            assert (item.value, item.actions, item.score) == (None, {}, item.retrieval_score)
            continue
        assert item.value == pytest.approx(item.actions["click"])  # the one positive action
        expected = item.value
        if order == "product":  # one positive action: a positive event is worth 1
            assert item.retrieval_score is not None
            expected = spec.retrieval_scale * item.retrieval_score
        assert item.score == pytest.approx(expected)
    assert names(recommender.recommend(events, 5, options)) == names(slate)[:5]


def test_requests_of_several_orders_are_answered_together_as_alone(recommender: Recommender) -> None:
    orders: list[Order | None] = ["retrieval", "value", None, "product", "retrieval"]
    requests = [
        Request(history=history(recommender, 3, row, 4), k=6, options=msgspec.structs.replace(NOW, order=order))
        for row, order in enumerate(orders, 5)
    ]
    for request, together in zip(requests, recommender.recommend_many(requests), strict=True):
        alone = recommender.recommend_many([request])[0]
        assert together.order == alone.order
        assert names(together) == names(alone)
        assert [item.score for item in together.items] == pytest.approx([item.score for item in alone.items], abs=1e-5)


def test_the_ranker_does_not_run_where_retrieval_orders(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the ranker ran")

    with Recommender.load(bundle, "cpu") as loaded:
        monkeypatch.setattr(type(loaded.engine), "rank", refuse)
        slate = loaded.recommend(history(loaded, 3), 5, msgspec.structs.replace(NOW, order="retrieval"))
        assert len(slate.items) == 5
        with pytest.raises(AssertionError, match="the ranker ran"):
            loaded.recommend(history(loaded, 3), 5, NOW)


def test_a_bundle_of_an_earlier_version_warns_where_its_ranker_saw_no_slates(
    copy: Path, reseal: Reseal, caplog: pytest.LogCaptureFixture
) -> None:
    reseal(copy, order=None, metrics={"ranking": None})
    with Recommender.load(copy, "cpu") as loaded:
        assert loaded.order == "value"
        with pytest.raises(RequestError, match="needs the scale of retrieval"):
            loaded.recommend(history(loaded, 3), 5, msgspec.structs.replace(NOW, order="product"))
    assert "its ranker was not measured on items that were shown without an action" in caplog.text
    caplog.clear()
    reseal(copy, metrics={"ranking": {"click": {}}})
    with Recommender.load(copy, "cpu"):
        assert "left alone" not in caplog.text


@pytest.fixture(scope="module")
def selling(shop: Path) -> Iterator[Recommender]:
    """A recommender whose items have prices."""
    with Recommender.load(shop, "cpu") as recommender:
        yield recommender


@settings(max_examples=60, deadline=None)
@given(
    seen=st.integers(0, 23),
    k=st.integers(1, 5),
    each=st.integers(1, 3),
    candidates=st.integers(1, 24),
    least=st.floats(0, 12),
    order=st.sampled_from(["value", "retrieval"]),
)
def test_a_limit_holds_whatever_retrieval_finds(
    selling: Recommender, *, seen: int, k: int, each: int, candidates: int, least: float, order: Order
) -> None:
    catalogue, events = selling.bundle.catalogue, history(selling, seen)
    assert catalogue.metadata is not None
    codes, prices = catalogue.codes_of("kind", ""), catalogue.metadata.numbers["price"]
    eligible = np.flatnonzero((prices >= least) & (np.arange(24) != seen))
    free = RecommendOptions(order=order, candidates=candidates, now_ms=T + 1000, ranges={"price": Range(min=least)})
    limited = msgspec.structs.replace(free, max_per_category={"kind": each})
    if Spread(codes=codes, each=each, k=k).most(eligible) < k:
        with pytest.raises(TooFewItemsError, match="max_per_category"):
            selling.recommend(events, k, limited)
        return
    slate = selling.recommend(events, k, limited)
    rows = [catalogue.rows[name] for name in names(slate)]
    assert len(set(rows)) == k
    assert set(rows) <= set(eligible.tolist())
    assert all(count <= each for word, count in Counter(codes[rows].tolist()).items() if word)
    assert [(item.metadata or {})["price"] for item in slate.items] == prices[rows].tolist()
    whole = selling.recommend(events, len(eligible), free)
    ranked = np.array([catalogue.rows[name] for name in names(whole)])
    places = {row: place for place, row in enumerate(ranked.tolist())}
    assert [places[row] for row in rows] == sorted(places[row] for row in rows)
    if candidates >= len(eligible) or order == "retrieval":  # all of them were ranked: a walk down the whole order
        assert rows == ranked[Spread(codes=codes, each=each, k=k).places(ranked)].tolist()
