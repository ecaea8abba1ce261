"""The request path: encode a history once, then retrieve and rank with its keys and values."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ConfigError, RequestError
from unipinrec.runtime.bundle.bundle import READ_WHILE_SERVING, Bundle
from unipinrec.runtime.bundle.catalogue import as_ids
from unipinrec.runtime.device import DeviceRules, open_engine
from unipinrec.runtime.golden_check import require_golden
from unipinrec.runtime.graphs.backend import Backend, Device
from unipinrec.runtime.graphs.engine import Encoded, Engine, pad_histories, pad_rows
from unipinrec.runtime.kv.cache import KvCache
from unipinrec.runtime.kv.encoder import HistoryEncoder, Lookup, Padding, grouped
from unipinrec.runtime.kv.options import CacheOptions, dtype_for
from unipinrec.runtime.kv.pages import KvGeometry
from unipinrec.runtime.popular import ColdStart, PopularItems, refusal
from unipinrec.runtime.ranking import Ranked, Scoring, by_retrieval, rank, slate_items
from unipinrec.runtime.requests import (
    EventLike,
    Order,
    RankOptions,
    RankRequest,
    RecommendOptions,
    Request,
    ResolvedRequest,
    Slate,
    StageTimes,
    as_events,
    check_types,
)
from unipinrec.runtime.retrieval.retriever import CandidateSet, Retriever, Search
from unipinrec.runtime.validation import resolve_request, stated_slack

DEFAULT_OPTIONS, DEFAULT_RANK_OPTIONS = RecommendOptions(), RankOptions()
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recommender:
    """Recommends items from one bundle on one device: it encodes a history, retrieves candidates and ranks them.

        with Recommender.load("bundle", "cpu", cache=CacheOptions()) as recommender:
            history = [{"item": "item-7", "actions": ["click"], "surface": "home", "timestamp_ms": 1_760_000_000_000}]
            slate = recommender.recommend(history, k=5, user="ann")
            for item in slate.items:
                print(item.item, item.title, item.score, item.actions)

            history.append({"item": slate.items[0].item, "actions": ["click"], "timestamp_ms": 1_760_000_060_000})
            options = RecommendOptions(surface="home", exclude=("item-9",), categories={"genre": ("drama",)})
            slate = recommender.recommend(history, k=10, options=options, user="ann")  # encodes only the new event
            print(slate.kv, slate.kv_reason, slate.stages_ms.total)

    `load` checks the bundle, picks the device and verifies its outputs; `device` says which one runs and why. The
    context manager, or `close`, frees the graphs and their memory.

    A history lists events, oldest first, as `Event` or as dictionaries with its keys. `k` is the number of items.
    `RecommendOptions` holds the filters, the surface, the time and the order of the slate. With a cache and a `user`,
    the next request of that user encodes only its new events; it must still send the whole history.

    A `Slate` holds the items, best first, each with its score, the probability of each action and its similarity to the
    query. It also holds the time of each stage, the use of the cache, the device and the bundle's hash. An empty
    history gets popular items, unless `popular` is None.

    All methods are safe to call from several threads; `Batcher` combines concurrent requests. After a fork, load the
    bundle in each process. `load` raises `BundleError`, `BackendError` or `ConfigError`. An invalid request raises
    `RequestError`, which names the value and the remedy. A failed computation raises `BackendError`. All of them are
    `UnipinrecError`.
    """

    bundle: Bundle
    engine: Engine
    retriever: Retriever
    encoder: HistoryEncoder
    window_slack: int | None
    popular: PopularItems | None

    @classmethod
    def load(
        cls,
        bundle: Path | str | Bundle,
        device: str | Backend = "auto",
        *,
        verify: bool = True,
        cache: CacheOptions | KvCache | None = None,
        window_slack: int | None = None,
        cold_start: ColdStart = "popular",
        **rules: Unpack[DeviceRules],
    ) -> Recommender:
        """Open a bundle for serving.

        Args:
            bundle: Its folder, `hf://org/name[@revision]`, or an open bundle, whose files then all stay in memory.
            device: One of `runtime.device.DEVICES`, or your own backend, such as `MockBackend`. If a GPU device does
                not run, the next best device replaces it, unless `strict`; see `Recommender.device`.
            verify: Check that the golden requests' outputs reproduce on this machine.
            cache: Options of a new cache of encoded histories, or the cache of a recommender that this one replaces.
                None = encode every history anew, as for a model whose histories cannot be cached.
            window_slack: Number of events by which the window over a long history moves at a time; None = as the
                bundle states, else an eighth of the model's limit.
            cold_start: "popular" answers an empty history with popular items, "refuse" rejects it; so does a bundle
                without popularity.
            **rules: `strict`, `allow_bundle_engines`, `threads`, `machine`, `work_bytes`; see `DeviceRules`.

        Raises:
            BundleError: The bundle is damaged, has a newer format, or its outputs do not reproduce.
            BackendError: The device does not run the graphs, and no other device may be used.
            ConfigError: `cache`, `window_slack` or `cold_start` is invalid for this model.
        """
        opened_here = not isinstance(bundle, Bundle)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        window_slack = stated_slack(window_slack, bundle.manifest)
        engine = open_engine(bundle, device, partial(require_golden, bundle=bundle) if verify else None, **rules)
        with ExitStack() as on_failure:
            on_failure.callback(engine.close)
            namespace = f"{bundle.kv_namespace} {engine.device.precision}"
            kept = None if cache is None else _cache(cache, bundle)
            recommender = cls(
                bundle=bundle,
                engine=engine,
                retriever=Retriever.open(bundle, rules.get("threads")),
                encoder=HistoryEncoder(engine, kept, namespace, bundle.kv_item_keys),
                window_slack=window_slack,
                popular=PopularItems.open(bundle, cold_start, engine.device.name),
            )
            if opened_here:
                bundle.files.let_go(READ_WHILE_SERVING)
            on_failure.pop_all()
        log.info("serving %s on %s (%s), bundle %s", bundle.path, engine.device.name, engine.device.reason, bundle.hash)
        if cache is not None and engine.device.name.startswith(("cuda", "tensorrt")):
            log.warning(
                "%s copies cached keys and values to the host and back. For a long history that takes longer than to "
                "encode it again: serve without a cache (--cache-mib 0)",
                engine.device.name,
            )
        _log_order(bundle)
        return recommender

    def close(self) -> None:
        """Release the graphs and their memory, also on a GPU; later requests fail."""
        self.engine.close()

    def __enter__(self) -> Recommender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def device(self) -> Device:
        """The device that computes, why it was chosen, and the devices that were tried before it."""
        return self.engine.device

    @property
    def order(self) -> Order:
        """Order of a slate if the request names none."""
        return self.bundle.manifest.default_order

    @cached_property
    def scoring(self) -> Scoring | None:
        """Weights of retrieval in the order; None if the bundle does not store how retrieval was trained."""
        return Scoring.of(self.bundle.manifest)

    @cached_property
    def by_item(self) -> Retriever:
        """Finds items by the cosine of their vectors."""
        return self.retriever if self.bundle.manifest.model.similarity == "cosine" else Retriever.of_items(self.bundle)

    @property
    def cache(self) -> KvCache | None:
        """The cache of encoded histories."""
        return self.encoder.cache

    def padding(self) -> dict[str, Padding]:
        """Events (or candidates) of requests and those computed, by stage: encode, extend, rank."""
        return self.encoder.padding.snapshot()

    def recommend(
        self,
        history: Iterable[EventLike],
        k: int = 20,
        options: RecommendOptions = DEFAULT_OPTIONS,
        *,
        user: str | None = None,
    ) -> Slate:
        """The k best items after a history (oldest event first), as events or dictionaries with their keys.

        An empty history gets the most popular items; `order` and `weights` then have no effect. With a cache, the next
        request of `user` whose history begins with the same events encodes only the others.

        Raises:
            ColdStartError: The history is empty, and there are no popular items.
            RequestError: The request is invalid.
            BackendError: The computation failed.
        """
        return self.recommend_many([Request(history=as_events(history), k=k, options=options, user=user)])[0]

    def rank(
        self,
        history: Iterable[EventLike],
        items: Iterable[str | int],
        options: RankOptions = DEFAULT_RANK_OPTIONS,
        *,
        user: str | None = None,
    ) -> Slate:
        """The given items, best first, without retrieval: each has the score that `recommend` would give it.

        An item that is named twice counts once. The cache and an empty history are treated as in `recommend`.

        Raises:
            ColdStartError: The history is empty, and there are no popular items.
            RequestError: The request is invalid, or the bundle lacks an item or has retired it.
            BackendError: The computation failed.
        """
        named, events = tuple(as_ids(items, "items")), as_events(history)
        return self.recommend_many([RankRequest(history=events, items=named, options=options, user=user)])[0]

    def recommend_many(self, requests: Sequence[Request | RankRequest]) -> list[Slate]:
        """Answer requests together, in their order; each slate is the same as alone.

        Raises:
            RequestError: A request is invalid; then none is answered.
            BackendError: The computation failed.
        """
        slates = []
        for answer in self.answer([self.resolve(request) for request in requests]):
            if isinstance(answer, Exception):
                raise answer
            slates.append(answer)
        return slates

    def resolve(self, request: Request | RankRequest) -> ResolvedRequest:
        """Validate a request.

        Raises:
            ColdStartError: Its history is empty, and there are no popular items.
            RequestError: The request is invalid.
            BackendError: This process is a fork of the process that loaded the bundle.
        """
        self.engine.require_process()
        if not request.history and self.popular is None:
            raise refusal(self.bundle)
        try:
            resolved = resolve_request(request, self.bundle.manifest, self.bundle.catalogue, self.window_slack)
        except (TypeError, ValueError, AttributeError):
            check_types(request)
            raise
        self.engine.require_room(len(resolved.history))
        return resolved

    def answer(self, requests: Sequence[ResolvedRequest]) -> list[Slate | Exception]:
        """Answer valid requests; the model computes only those with a history."""
        answers: dict[int, Slate | Exception] = {}
        if self.popular is not None:
            answers = {i: self.popular.slate(request) for i, request in enumerate(requests) if not len(request.history)}
        rest = [index for index in range(len(requests)) if index not in answers]
        if rest:
            answers.update(zip(rest, self._by_model([requests[index] for index in rest]), strict=True))
        return [answers[index] for index in range(len(requests))]

    def _by_model(self, requests: Sequence[ResolvedRequest]) -> list[Slate | Exception]:
        """Answer requests in groups; if a group fails, its requests are answered one by one."""
        answers: dict[int, Slate | Exception] = {}
        failed: list[int] = []
        with self.engine.under_way(), self.encoder.look_up(requests) as lookups:
            works = [self.encoder.work(lookup) for lookup in lookups]
            for indices in grouped(works, self.engine.prefill_chunk, self.engine.most_rows):
                try:
                    answers.update(zip(indices, self._answer([lookups[index] for index in indices]), strict=True))
                except Exception as error:  # the other groups must not fail with it
                    answers.update(dict.fromkeys(indices, error))
                    failed += indices if len(indices) > 1 else []
        for index in failed:  # perhaps only one of them made the group fail
            answers[index] = self._by_model([requests[index]])[0]
        return [answers[index] for index in range(len(requests))]

    def _answer(self, group: Sequence[Lookup]) -> list[Slate]:
        requests, start = [lookup.request for lookup in group], time.perf_counter()
        with self.encoder.encoding(group) as encoded:
            encode_end = time.perf_counter()
            outcomes = np.stack([request.outcomes for request in requests])
            queries = self.engine.retrieve(encoded, outcomes)
            candidates = self.retriever.retrieve(list(map(Search.of, requests, queries)))
            if any(len(request.own) for request in requests):
                candidates = self.retriever.join(candidates, queries, [request.own for request in requests])
            retrieve_end = time.perf_counter()
            ranked = self._rank(encoded, candidates, requests)
        times = np.array([start, encode_end, retrieve_end, time.perf_counter()])
        encode, retrieve, rank_, total = (1e3 * np.append(np.diff(times), times[-1] - start)).tolist()
        stages = StageTimes(encode=encode, retrieve=retrieve, rank=rank_, total=total)
        return [self._slate(*parts, stages) for parts in zip(group, candidates, ranked, strict=True)]

    def _rank(
        self, encoded: Encoded, candidates: Sequence[CandidateSet], requests: Sequence[ResolvedRequest]
    ) -> list[Ranked]:
        """Requests of one group are all ordered by retrieval, or none is."""
        if requests[0].order == "retrieval":
            return by_retrieval(candidates, requests)
        rows = [each.rows for each in candidates]
        surfaces = np.array([request.surface for request in requests])
        now_ms = np.array([request.now_ms for request in requests])
        logits = self.engine.rank(encoded, pad_rows(rows), surfaces, now_ms)
        self.encoder.padding.add("rank", list(map(len, rows)))
        return rank(candidates, logits, requests, self.scoring)

    def _slate(self, lookup: Lookup, candidates: CandidateSet, ranked: Ranked, stages: StageTimes) -> Slate:
        return Slate(
            items=slate_items(self.bundle, candidates, ranked),
            source="model",
            order=lookup.request.order,
            stages_ms=stages,
            kv=lookup.kind,
            kv_reason=lookup.reason,
            device=self.device.name,
            bundle=self.bundle.hash,
            exact=candidates.exact,
            unknown=lookup.request.unknown,
        )

    def score(
        self,
        history: Iterable[EventLike],
        candidates: Iterable[str | int],
        options: RankOptions = DEFAULT_RANK_OPTIONS,
        *,
        extend_at: int | None = None,
    ) -> NDArray[np.float32]:
        """Action logits [k, C] of k items in their order, computed alone and without the cache; see `rank`.

        Args:
            history: As in `recommend`.
            candidates: External ids of k items.
            options: Only surface, now_ms and truncate have an effect.
            extend_at: Encode this many events first, from 1 to one less than all, then extend by the others; the
                result is the same.

        Raises:
            RequestError: The request is invalid.
        """
        events, items, graphs = as_events(history), as_ids(candidates, "candidates"), self.bundle.manifest.model.graphs
        if not events:
            raise RequestError("the history is empty; send at least one event to score items")
        read = RankOptions(surface=options.surface, now_ms=options.now_ms, truncate=options.truncate)
        request = self.resolve(RankRequest(history=events, items=tuple(items), options=read))
        if "ranker" not in graphs:
            raise RequestError("this bundle has no ranker that could score items; rank them instead, by similarity")
        if extend_at is not None and "extend" not in graphs:
            raise RequestError(f"extend_at={extend_at}: this model encodes whole histories alone; leave it out")
        if extend_at is not None and not 0 < extend_at < len(request.history):
            raise RequestError(f"extend_at={extend_at} must be from 1 to {len(request.history) - 1}")
        encoded = self.engine.prefill(pad_histories([request.history.part(0, extend_at)]))
        if extend_at is not None:
            encoded = self.engine.extend(encoded, pad_histories([request.history.part(extend_at)]))
        rows = self.bundle.catalogue.known_rows(items)[None]
        logits = self.engine.rank(encoded, rows, np.array([request.surface]), np.array([request.now_ms]))
        return logits.reshape(rows.size, -1)


def _log_order(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if manifest.order is not None:
        log.info("slates are ordered by %s: %s", manifest.order.by, manifest.order.reason)
    elif manifest.model.ranker and manifest.metrics is not None and manifest.metrics.get("ranking") is None:
        log.warning(
            "%s: slates are ordered by value, but its ranker was not measured on items that were shown without an "
            "action and may order at random; export the checkpoint again with --data, or request order 'retrieval'",
            bundle.path,
        )


def _cache(cache: CacheOptions | KvCache, bundle: Bundle) -> KvCache | None:
    manifest = bundle.manifest
    if manifest.model.cache == "none":
        log.warning("%s: this model's histories cannot be cached; each request encodes its whole history", bundle.path)
        return None
    if isinstance(cache, CacheOptions):
        return KvCache(manifest.model, replace(cache, dtype=dtype_for(manifest, cache.dtype)))
    dtype = dtype_for(manifest, cache.geometry.dtype)
    geometry = KvGeometry.of(manifest.model, dtype, cache.geometry.page_slots)
    if geometry != cache.geometry:
        raise ConfigError(f"the cache was made for {cache.geometry}, this model needs {geometry}; pass a new cache")
    return cache
