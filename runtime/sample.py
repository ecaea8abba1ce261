"""Figures of the sample users that any machine can measure again: hits of their next items, agreement of the cache."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec
import numpy as np

from unipinrec.errors import BackendError
from unipinrec.runtime.agreement import TIED_SIMILARITY, TOP, overlap, tie_widths
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.bundle.quality import CacheAgreement, CacheSpec, KvDtype, SampleQuality
from unipinrec.runtime.kv.cache import KvCache
from unipinrec.runtime.kv.encoder import HistoryEncoder
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.kv.pages import KV_DTYPES, KvGeometry
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import CANDIDATES, SOON_MS, Event, History, Order, RecommendOptions, Request, Slate

USERS = 200
BATCH = 32
MIN_OVERLAP = 0.999
CACHED_USERS, CACHED_EVENTS, CACHED_TOGETHER = 100, 32_768, 8
RANDOM_EVENTS, START_MS = 64, 1_700_000_000_000
log = logging.getLogger(__name__)


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


def chosen_cache(recommender: Recommender) -> CacheSpec | None:
    """The coarsest type of cached keys and values that keeps the ten best items by `MIN_OVERLAP`; fp32 always does.

    None if the model's histories are not cached.

    Raises:
        BundleError: The sample users cannot be read.
        BackendError: A graph does not run.
    """
    if recommender.bundle.manifest.model.cache == "none":
        return None
    refused: dict[KvDtype, CacheAgreement] = {}
    for dtype in KV_DTYPES[:0:-1]:
        try:
            measured = cache_agreement(recommender, dtype)
        except BackendError as error:  # out of its range; a graph that does not run fails with fp32 as well
            log.warning("a cache in %s does not suit this model: %s", dtype, error)
            continue
        if measured.overlap >= MIN_OVERLAP:
            return CacheSpec(dtype=dtype, agreement=measured, refused=refused)
        log.warning("a cache in %s keeps only %.4f of the ten best items", dtype, measured.overlap)
        refused[dtype] = measured
    return CacheSpec(dtype="fp32", agreement=cache_agreement(recommender, "fp32"), refused=refused)


def cache_agreement(recommender: Recommender, dtype: KvDtype) -> CacheAgreement:
    """Compare the ten best items with a cache of a type and without one, for sample users, else random histories.

    Each user's history is requested at once, and again after its first half.

    Args:
        recommender: Without a cache.
        dtype: Type of cached keys and values.

    Raises:
        BundleError: The sample users cannot be read.
        BackendError: A graph does not run, or a key or value is out of the type's range.
    """
    manifest, requests = recommender.bundle.manifest, _requests(recommender.bundle)
    geometry = KvGeometry.of(manifest.model, dtype)
    slots = max(len(request.history) for request in requests) + manifest.model.kv_prefix_slots
    budget_bytes = CACHED_TOGETHER * geometry.pages_for(slots) * geometry.page_bytes
    cache = KvCache(manifest.model, CacheOptions(budget_bytes=budget_bytes, dtype=dtype))
    encoder = HistoryEncoder(recommender.engine, cache, dtype, recommender.bundle.kv_item_keys)
    cached, figures = replace(recommender, encoder=encoder), []
    for start in range(0, len(requests), CACHED_TOGETHER):
        part = requests[start : start + CACHED_TOGETHER]
        fresh = recommender.recommend_many(part)
        first = cached.recommend_many([msgspec.structs.replace(request, user=None) for request in part])
        halves = [msgspec.structs.replace(r, history=r.history[: len(r.history) // 2], k=1) for r in part]
        cached.recommend_many([half for half in halves if half.history])
        extended = cached.recommend_many(part)
        cache.clear()
        figures += [_overlaps(manifest, *pair) for pair in zip([*fresh, *fresh], [*first, *extended], strict=True)]
    tied, strict = np.mean(figures, axis=0).round(6).tolist()  # rounded: 999 of 1,000 must be 0.999
    return CacheAgreement(requests=len(figures), overlap=tied, overlap_strict=strict)


def _requests(bundle: Bundle) -> list[Request]:
    """One request for each user, soon after the last event, for all candidates; the users have different names."""
    histories = bundle.sample_histories(CACHED_USERS) or _random_histories(bundle.manifest)
    parts = [history.part(-bundle.manifest.model.max_history) for history in histories]
    within = max(1, int((np.cumsum(list(map(len, parts))) <= CACHED_EVENTS).sum()))
    requests = []
    for index, history in enumerate(parts[:within]):
        left, last = bundle.catalogue.num_live - len(set(history.item_rows.tolist())), int(history.timestamps_ms[-1])
        unseen = left >= TOP
        options = RecommendOptions(now_ms=None if last < 0 else last + SOON_MS, exclude_seen=unseen)
        k = min(CANDIDATES, left if unseen else bundle.catalogue.num_live)
        requests.append(Request(history=bundle.events_of(history), k=k, options=options, user=str(index)))
    return requests


def _random_histories(manifest: Manifest) -> list[History]:
    """For a bundle without sample users; the same for the same manifest."""
    rng, longest = np.random.default_rng(0), min(RANDOM_EVENTS, manifest.model.max_history)
    return [
        History(
            item_rows=rng.integers(0, manifest.num_items, events),
            actions=(rng.random((events, len(manifest.actions))) < 0.3).astype(np.float32),
            surfaces=rng.integers(0, len(manifest.surfaces), events),
            timestamps_ms=START_MS + rng.integers(0, 10_000_000, events).cumsum(),
        )
        for events in rng.integers(2, longest + 1, CACHED_USERS).tolist()
    ]


def _overlaps(manifest: Manifest, fresh: Slate, served: Slate) -> tuple[float, float]:
    """Share of the ten best served items that are among the ten best without a cache: with ties, and strict."""
    scores = np.array([item.score for item in fresh.items])
    probabilities = np.array([[*item.actions.values()] for item in fresh.items])
    largest = max(abs(item.retrieval_score or 0.0) for item in fresh.items)
    tie = TIED_SIMILARITY * (1.0 if manifest.model.similarity == "cosine" else largest)
    widths = np.append(tie_widths(manifest, scores, probabilities, tie), 0.0)
    places = {item.item: place for place, item in enumerate(fresh.items)}
    scores = np.append(scores, -np.inf)  # of an item that is not even a candidate
    chosen = np.array([places.get(item.item, -1) for item in served.items[:TOP]])
    return overlap(scores, chosen, widths[chosen]), overlap(scores, chosen, 0.0)
