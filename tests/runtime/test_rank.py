"""Items that the request names: ranked alone, or beside those of retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from answers import STORED
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import BackendError, ColdStartError, RequestError
from unipinrec.runtime import (
    Batcher,
    BatchOptions,
    CacheOptions,
    Event,
    RankOptions,
    RankRequest,
    Recommender,
    RecommendOptions,
    Request,
    Slate,
)
from unipinrec.runtime.bundle.manifest import OrderSpec
from unipinrec.runtime.ranking import sigmoid
from unipinrec.runtime.requests import Order
from unipinrec.runtime.validation import resolve_request

AT = 1_760_000_000_000
NOW = RankOptions(now_ms=AT + 1_000)
SEARCH = RecommendOptions(now_ms=AT + 1_000, exclude_seen=False)
HISTORY = tuple(
    Event(item=f"item-{row}", actions=("click",), timestamp_ms=AT + place) for place, row in enumerate((3, 1, 4, 1, 5))
)
ORDERS: tuple[Order, ...] = ("value", "blend", "product", "retrieval")


@pytest.fixture(scope="module")
def stored() -> Iterator[Recommender]:
    """The stored bundle of 24 items, with a cache and every order."""
    with Recommender.load(STORED, "cpu", cache=CacheOptions(budget_bytes=1 << 20, dtype="fp32")) as loaded:
        spec = OrderSpec(by="blend", reason="of a test", retrieval_scale=5.0, retrieval_weight=0.5)
        manifest = msgspec.structs.replace(loaded.bundle.manifest, order=spec)
        yield replace(loaded, bundle=replace(loaded.bundle, manifest=manifest))


def items(*rows: int) -> list[str]:
    return [f"item-{row}" for row in rows]


def names(slate: Slate) -> list[str]:
    return [item.item for item in slate.items]


@pytest.mark.parametrize("order", ORDERS)
def test_an_item_has_the_score_that_a_recommendation_of_it_has(stored: Recommender, order: Order) -> None:
    whole = stored.recommend(HISTORY, 24, msgspec.structs.replace(SEARCH, order=order))
    chosen = items(17, 3, 9, 22, 0)
    ranked = stored.rank(HISTORY, chosen, msgspec.structs.replace(NOW, order=order))
    expected = [item for item in whole.items if item.item in chosen]
    assert (names(ranked), ranked.order, ranked.exact) == ([item.item for item in expected], order, None)
    for ours, theirs in zip(ranked.items, expected, strict=True):
        assert ours.retrieval_score == theirs.retrieval_score
        assert ours.score == pytest.approx(theirs.score, abs=1e-6)
        assert ours.actions == pytest.approx(theirs.actions, abs=1e-6)
        assert (ours.source, theirs.source) == ("request", "retrieval")
        assert (ours.value is None) == (order == "retrieval") == (not ours.actions)


def test_the_actions_are_those_of_the_logits(stored: Recommender) -> None:
    chosen = items(17, 3, 9)
    by_item = {item.item: list(item.actions.values()) for item in stored.rank(HISTORY, chosen, NOW).items}
    expected = sigmoid(stored.score(HISTORY, chosen, NOW))
    np.testing.assert_allclose([by_item[item] for item in chosen], expected, atol=1e-6)
    assert np.ptp(expected) > 1e-3


def test_the_score_of_an_item_named_twice_stands_at_both_places(stored: Recommender) -> None:
    first, second, again = stored.score(HISTORY, items(9, 2, 9), NOW)
    np.testing.assert_allclose(first, again, atol=1e-6)
    assert np.abs(first - second).max() > 1e-3


def test_a_cached_history_ranks_as_a_fresh_one(stored: Recommender) -> None:
    chosen = items(*range(0, 24, 3))
    fresh = stored.rank(HISTORY, chosen, NOW)
    stored.recommend(HISTORY[:3], 2, SEARCH, user="cached")
    slates = [stored.rank(HISTORY, chosen, NOW, user="cached") for _ in range(2)]
    assert [(slate.kv, slate.kv_reason) for slate in slates] == [("extended", "2 new events"), ("hit", None)]
    for slate in slates:
        assert names(slate) == names(fresh)
        np.testing.assert_allclose([i.score for i in slate.items], [i.score for i in fresh.items], rtol=1e-4)
    assert stored.recommend(HISTORY, 2, SEARCH, user="cached").kv == "hit"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 23), min_size=1, max_size=40), st.randoms(), st.sampled_from(ORDERS))
def test_neither_order_nor_repetition_of_the_items_counts(
    stored: Recommender, rows: list[int], random: Random, order: Order
) -> None:
    mixed = list(rows)
    random.shuffle(mixed)
    options = msgspec.structs.replace(NOW, order=order)
    one, other, distinct = (stored.rank(HISTORY, items(*r), options).items for r in (rows, mixed, sorted(set(rows))))
    assert one == other == distinct
    assert {item.item for item in one} == set(items(*rows))


def test_requests_of_both_kinds_are_batched_and_answered_as_alone(stored: Recommender) -> None:
    rng = np.random.default_rng(4)
    requests: list[Request | RankRequest] = []
    for _ in range(12):
        chosen = tuple(items(*rng.integers(0, 24, rng.integers(1, 9))))
        requests.append(RankRequest(history=HISTORY, items=chosen, options=NOW))
        requests.append(Request(history=HISTORY, k=3, options=msgspec.structs.replace(SEARCH, candidates=8)))
        options = msgspec.structs.replace(SEARCH, candidates=6, own_candidates=chosen)
        requests.append(Request(history=HISTORY, k=6, options=options))
    alone = [stored.recommend_many([request])[0] for request in requests]
    with Batcher(stored, BatchOptions(max_wait_ms=50)) as batcher, ThreadPoolExecutor(12) as pool:
        together = list(pool.map(batcher.recommend, requests))
        assert batcher.statistics().largest > 1
    for one, other in zip(alone, together, strict=True):
        assert names(one) == names(other)
        assert [item.source for item in one.items] == [item.source for item in other.items]
        np.testing.assert_allclose([i.score for i in one.items], [i.score for i in other.items], rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_own_candidates_are_joined_with_those_of_retrieval(stored: Recommender, order: Order) -> None:
    options = msgspec.structs.replace(SEARCH, order=order, candidates=4)
    near = [
        item.item for item in stored.recommend(HISTORY, 4, msgspec.structs.replace(options, order="retrieval")).items
    ]
    far = next(item for item in items(*range(24)) if item not in near)
    both = near[1]
    joined = stored.recommend(HISTORY, 4, msgspec.structs.replace(options, own_candidates=(far, both, far)))
    expected = stored.rank(HISTORY, [*near, far], msgspec.structs.replace(NOW, order=order)).items[:4]
    assert names(joined) == [item.item for item in expected]
    assert [item.score for item in joined.items] == pytest.approx([item.score for item in expected], abs=1e-6)
    sources = {far: "request", both: "both"}
    assert [item.source for item in joined.items] == [sources.get(item.item, "retrieval") for item in joined.items]


def test_own_candidates_may_come_first(stored: Recommender) -> None:
    """With one candidate of retrieval, a slate by value holds the item of the request if it is worth more."""
    best = stored.recommend(HISTORY, 24, msgspec.structs.replace(SEARCH, order="value")).items[0].item
    narrow = msgspec.structs.replace(SEARCH, order="value", candidates=1)
    (found,) = stored.recommend(HISTORY, 1, narrow).items
    (first,) = stored.recommend(HISTORY, 1, msgspec.structs.replace(narrow, own_candidates=(best,))).items
    assert found.item != best
    assert (first.item, first.source) == (best, "request")


def test_filters_hold_for_own_candidates(stored: Recommender) -> None:
    options = RecommendOptions(now_ms=AT + 1_000, exclude=("item-9",), own_candidates=("item-3", "item-9", "item-20"))
    by_item = {item.item: item.source for item in stored.recommend(HISTORY, 19, options).items}
    assert not {"item-3", "item-9"} & set(by_item)  # the first is in the history
    assert by_item["item-20"] == "both"
    for order in ORDERS:
        allowed = msgspec.structs.replace(options, allow=("item-9", "item-10"), order=order)
        assert [(i.item, i.source) for i in stored.recommend(HISTORY, 1, allowed).items] == [("item-10", "retrieval")]


def test_items_that_the_bundle_lacks_are_refused_or_named_in_the_answer(stored: Recommender) -> None:
    chosen = ["new", "item-2", "newer", "item-7"]
    message = r"items: this bundle lacks or has retired \['new', 'newer'\]; leave them out, or send skip_unknown=true"
    with pytest.raises(RequestError, match=message):
        stored.rank(HISTORY, chosen, NOW)
    skipping = msgspec.structs.replace(NOW, skip_unknown=True)
    slate = stored.rank(HISTORY, chosen, skipping)
    assert (set(names(slate)), slate.unknown) == ({"item-2", "item-7"}, ("new", "newer"))
    assert slate.items == stored.rank(HISTORY, items(2, 7), NOW).items
    with pytest.raises(
        RequestError, match=r"there is nothing to rank; name at least one .* lacks or has retired \['new'\]"
    ):
        stored.rank(HISTORY, ["new"], skipping)
    own = msgspec.structs.replace(SEARCH, own_candidates=tuple(chosen))
    with pytest.raises(RequestError, match="own_candidates: this bundle lacks or has retired"):
        stored.recommend(HISTORY, 2, own)
    assert stored.recommend(HISTORY, 2, msgspec.structs.replace(own, skip_unknown=True)).unknown == ("new", "newer")


def test_a_message_names_few_of_many_unknown_items(stored: Recommender) -> None:
    with pytest.raises(
        RequestError, match=r"retired .* and 1,980 more; leave them out, or send skip_unknown=true$"
    ) as caught:
        stored.rank(HISTORY, [f"{index}{'x' * 300}" for index in range(2000)], NOW)
    assert len(str(caught.value)) < 2_000


def test_a_retired_item_is_refused(stored: Recommender) -> None:
    catalogue = replace(stored.bundle.catalogue, retired=np.array([7]))
    request = RankRequest(history=HISTORY, items=("item-7", "item-8"), options=NOW)
    with pytest.raises(RequestError, match=r"lacks or has retired \['item-7'\]; leave"):
        resolve_request(request, stored.bundle.manifest, catalogue)
    skipping = msgspec.structs.replace(request, options=msgspec.structs.replace(NOW, skip_unknown=True))
    resolved = resolve_request(skipping, stored.bundle.manifest, catalogue)
    assert (resolved.own.tolist(), resolved.unknown) == ([8], ("item-7",))


def test_what_cannot_be_ranked_is_told(stored: Recommender) -> None:
    with pytest.raises(RequestError, match=r"items: there is nothing to rank; name at least one item of this bundle$"):
        stored.rank(HISTORY, [], NOW)
    with pytest.raises(RequestError, match=r"items='item-1' must be a list of item ids; write \['item-1'\]"):
        stored.rank(HISTORY, "item-1", NOW)
    with pytest.raises(RequestError, match="value of the wrong type"):
        stored.recommend_many([RankRequest(history=HISTORY, items=("item-1",), options=RankOptions(surface=[]))])  # type: ignore[arg-type]
    with pytest.raises(ColdStartError, match="the history is empty, and this bundle stores no popularity"):
        stored.rank([], items(1), NOW)


def test_without_a_history_items_are_ranked_by_popularity(popular: Path) -> None:
    with Recommender.load(popular, "cpu") as loaded:
        assert loaded.popular is not None
        chosen, options = items(1, 22, 6, 0, 23), RankOptions(surface="home")
        slate = loaded.rank([], chosen, options)
        assert (slate.source, slate.order) == ("popular", None)
        assert names(slate) == items(23, 22, 0, 1, 6)
        shares = {item.item: item.score for item in loaded.recommend([], 24, RecommendOptions(surface="home")).items}
        assert [item.score for item in slate.items] == [shares[name] for name in names(slate)]
        assert {(item.value, item.retrieval_score, item.source) for item in slate.items} == {(None, None, None)}


def test_a_query_that_is_not_finite_fails(stored: Recommender) -> None:
    with pytest.raises(BackendError, match="a query vector is not finite"):
        stored.retriever.join([], np.full((1, 1, 2), np.nan, np.float32), [])
