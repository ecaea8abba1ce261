"""Hits of the sample users' next items: a figure that any machine can measure again."""

from __future__ import annotations

from unipinrec.runtime.bundle.quality import SampleQuality
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import Event, Order, RecommendOptions, Request

USERS = 200
TOP = 10
BATCH = 32


def sample_quality(recommender: Recommender) -> SampleQuality:
    """Count hits of the first sample users, with their last event held out.

    Raises:
        BundleError: The bundle's sample users cannot be read.
        BackendError: A graph does not run.
    """
    bundle = recommender.bundle
    positive = set(bundle.manifest.positive_actions)
    held_out = []
    for history in bundle.sample_histories(USERS):
        *before, last = bundle.events_of(history)
        seen = {event.item for event in before}
        few = bundle.catalogue.num_live - len(seen) < TOP
        if before and positive & set(last.actions) and last.item not in seen and not few:
            held_out.append((tuple(before), last))
    parts = [held_out[start : start + BATCH] for start in range(0, len(held_out), BATCH)]
    served = sum(_hits(recommender, part, None) for part in parts)
    retrieved = sum(_hits(recommender, part, "retrieval") for part in parts)
    return SampleQuality(users=len(held_out), served=served, retrieved=retrieved)


def _hits(recommender: Recommender, users: list[tuple[tuple[Event, ...], Event]], order: Order | None) -> int:
    slates = recommender.recommend_many(
        [
            Request(
                history=before,
                k=TOP,
                options=RecommendOptions(surface=last.surface, now_ms=last.timestamp_ms, order=order),
            )
            for before, last in users
        ]
    )
    return sum(last.item in {item.item for item in slate.items} for slate, (_, last) in zip(slates, users, strict=True))
