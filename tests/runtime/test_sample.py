"""The bundle's own check, counted again by hand."""

from __future__ import annotations

from unipinrec.runtime import Recommender, RecommendOptions
from unipinrec.runtime.requests import Order
from unipinrec.runtime.sample import sample_quality


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
