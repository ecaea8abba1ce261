"""The request path: encode a history once, retrieve with what it left, rank with what it left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ConfigError, RequestError
from unipinrec.runtime.bundle.bundle import READ_WHILE_SERVING, Bundle
from unipinrec.runtime.bundle.catalogue import as_ids
from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.device import DeviceRules, open_engine
from unipinrec.runtime.golden_check import require_golden
from unipinrec.runtime.graphs.backend import Backend, Device
from unipinrec.runtime.graphs.engine import Encoded, Engine, pad_histories, pad_rows
from unipinrec.runtime.kv.cache import KvCache
from unipinrec.runtime.kv.histories import Found, HistoryEncoder, Padding, grouped
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.kv.pages import KvGeometry
from unipinrec.runtime.popular import ColdStart, PopularItems, refusal
from unipinrec.runtime.ranking import Ranked, Scoring, by_retrieval, rank
from unipinrec.runtime.requests import (
    EventLike,
    Order,
    RecommendOptions,
    Request,
    ResolvedRequest,
    Slate,
    SlateItem,
    StageTimes,
    as_events,
    check_types,
)
from unipinrec.runtime.retrieval.retriever import Candidates, Retriever, Search
from unipinrec.runtime.validation import item_row, resolve_request

DEFAULT_OPTIONS = RecommendOptions()
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recommender:
    """Serves one bundle on one device; safe to call from several threads.

    It is its own context manager, which closes it. `popular` answers requests without a history; None = they are
    refused.
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
            bundle: Its folder, or opened; of the latter all files stay in memory as long as it does.
            device: One of `runtime.device.DEVICES`; `Recommender.device` says what really runs, and why. A GPU device
                that does not run is replaced by the next best unless `strict`. Or a backend of your own, such as
                `MockBackend`.
            verify: Refuse to serve if the golden requests' outputs do not reproduce on this machine.
            cache: Keep encoded histories from request to request: how much of them, or the cache of a recommender that
                this one replaces. None = encode every history anew.
            window_slack: By how many events the window over a history that is too long moves at a time; None = an
                eighth of the model's limit.
            cold_start: Answer a request without a history with "popular" items, or "refuse" it; a bundle that stores no
                popularity refuses it in any case.
            **rules: `strict`, `allow_bundle_engines`, `threads`, `machine`; see `DeviceRules`.

        Raises:
            BundleError: The bundle is damaged, of a newer format, or does not compute what PyTorch computed.
            BackendError: The device is not available and nothing else may be used, or it does not run the graphs.
            ConfigError: The cache or the slack cannot be had for this model, or `cold_start` is unknown.
        """
        opened_here = not isinstance(bundle, Bundle)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        model = bundle.manifest.model
        _check_slack(window_slack, model)
        engine = open_engine(bundle, device, **rules)
        with ExitStack() as unless_served:
            unless_served.callback(engine.close)
            if verify:
                require_golden(engine, bundle)
            namespace = f"{bundle.kv_namespace} {engine.device.precision}"
            recommender = cls(
                bundle=bundle,
                engine=engine,
                retriever=Retriever.open(bundle),
                encoder=HistoryEncoder(engine, _cache(cache, model), namespace, bundle.kv_item_keys),
                window_slack=window_slack,
                popular=PopularItems.open(bundle, cold_start, engine.device.name),
            )
            if opened_here:
                bundle.files.let_go(READ_WHILE_SERVING)
            unless_served.pop_all()
        running = engine.device
        log.info("serving %s on %s (%s), bundle %s", bundle.path, running.name, running.reason, bundle.hash)
        _say_order(bundle)
        return recommender

    def close(self) -> None:
        """Release the graphs and the memory that they take, a GPU's above all; later requests fail."""
        self.engine.close()

    def __enter__(self) -> Recommender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def device(self) -> Device:
        """What runs, why, and what was tried before it."""
        return self.engine.device

    @property
    def order(self) -> Order:
        """What slates are ordered by where a request does not say."""
        spec = self.bundle.manifest.order
        return "value" if spec is None else spec.by

    @cached_property
    def scoring(self) -> Scoring | None:
        """How retrieval takes part in the order; None for bundles that do not say how it was trained."""
        return Scoring.of(self.bundle.manifest)

    @property
    def cache(self) -> KvCache | None:
        """The cache of encoded histories."""
        return self.encoder.cache

    def padding(self) -> dict[str, Padding]:
        """What was computed beside what was asked, by stage: encode, extend, rank."""
        return self.encoder.padding.snapshot()

    def recommend(
        self,
        history: Iterable[EventLike],
        k: int = 20,
        options: RecommendOptions = DEFAULT_OPTIONS,
        *,
        user: str | None = None,
    ) -> Slate:
        """The k best items after a history, given oldest event first as events or dictionaries with their keys.

        After an empty one they are the most popular ones, and `order` and `weights` have no effect. With a cache, what
        is encoded of `user` serves the next request whose history begins with the same events.

        Raises:
            ColdStartError: The history is empty, and popular items are not to be had.
            RequestError: The request cannot be answered as given.
        """
        return self.recommend_many([Request(history=as_events(history), k=k, options=options, user=user)])[0]

    def recommend_many(self, requests: Sequence[Request]) -> list[Slate]:
        """Answer requests together, in their order; each gets the slate that it would get alone.

        Raises:
            RequestError: One of the requests cannot be answered as given; then none is.
        """
        slates = []
        for answer in self.answer([self.resolve(request) for request in requests]):
            if isinstance(answer, Exception):
                raise answer
            slates.append(answer)
        return slates

    def resolve(self, request: Request) -> ResolvedRequest:
        """Validate a request.

        Raises:
            ColdStartError: Its history is empty, and popular items are not to be had.
            RequestError: It cannot be answered as given.
            BackendError: This process is a fork of the one that loaded the bundle.
        """
        self.engine.require_process()
        if not request.history and self.popular is None:
            raise refusal(self.bundle)
        try:
            return resolve_request(request, self.bundle.manifest, self.bundle.catalogue, self.window_slack)
        except (TypeError, ValueError, AttributeError):
            check_types(request)
            raise

    def answer(self, asked: Sequence[ResolvedRequest]) -> list[Slate | Exception]:
        """Answer valid requests; those without a history take no part in what the model computes for the others."""
        answers: dict[int, Slate | Exception] = {}
        if self.popular is not None:
            answers = {place: self.popular.slate(one) for place, one in enumerate(asked) if not len(one.history)}
        modelled = [place for place in range(len(asked)) if place not in answers]
        if modelled:
            answers.update(zip(modelled, self._by_model([asked[place] for place in modelled]), strict=True))
        return [answers[place] for place in range(len(asked))]

    def _by_model(self, asked: Sequence[ResolvedRequest]) -> list[Slate | Exception]:
        """Answer requests in groups; those of a group that fails are answered one by one."""
        answers: dict[int, Slate | Exception] = {}
        failed: list[int] = []
        with self.engine.under_way(), self.encoder.find(asked) as found:
            for places in grouped([self.encoder.work(one) for one in found], self.engine.backend.prefill_chunk):
                try:
                    answers.update(zip(places, self._answer([found[place] for place in places]), strict=True))
                except Exception as error:  # it belongs to those who asked, not to the other groups
                    answers.update(dict.fromkeys(places, error))
                    failed += places if len(places) > 1 else []
        for place in failed:  # one of them may have spoilt it for the others
            answers[place] = self._by_model([asked[place]])[0]
        return [answers[place] for place in range(len(asked))]

    def _answer(self, group: Sequence[Found]) -> list[Slate]:
        asked, start = [found.asked for found in group], time.perf_counter()
        with self.encoder.encoding(group) as encoded:
            encode_end = time.perf_counter()
            queries = self.engine.retrieve(encoded, np.stack([one.outcomes for one in asked]))
            candidates = self.retriever.retrieve([_search(*parts) for parts in zip(asked, queries, strict=True)])
            retrieve_end = time.perf_counter()
            ranked = self._rank(encoded, candidates, asked)
        stages = _stages(start, encode_end, retrieve_end, time.perf_counter())
        return [self._slate(*parts, stages) for parts in zip(group, candidates, ranked, strict=True)]

    def _rank(
        self, encoded: Encoded, candidates: Sequence[Candidates], asked: Sequence[ResolvedRequest]
    ) -> list[Ranked]:
        """Requests of one group are all ordered by retrieval, or none is."""
        if asked[0].order == "retrieval":
            return by_retrieval(candidates, asked)
        surfaces, now_ms = np.array([one.surface for one in asked]), np.array([one.now_ms for one in asked])
        logits = self.engine.rank(encoded, pad_rows([one.rows for one in candidates]), surfaces, now_ms)
        self.encoder.padding.add("rank", [len(one.rows) for one in candidates])
        return rank(candidates, logits, asked, self.scoring)

    def _slate(self, request: Found, found: Candidates, ranked: Ranked, stages: StageTimes) -> Slate:
        bundle, actions = self.bundle, self.bundle.manifest.actions
        values: Iterable[float | None] = repeat(None) if ranked.values is None else ranked.values.tolist()
        chances: Iterable[list[float]] = repeat([]) if ranked.probabilities is None else ranked.probabilities.tolist()
        items = tuple(
            SlateItem(
                item=bundle.item_ids[row],
                title=bundle.titles[row],
                score=score,
                value=value,
                actions=dict(zip(actions, probabilities, strict=False)),
                retrieval_score=similarity,
            )
            for row, score, similarity, value, probabilities in zip(
                found.rows[ranked.order].tolist(),
                ranked.scores.tolist(),
                found.similarity[ranked.order].tolist(),
                values,
                chances,
                strict=False,
            )
        )
        return Slate(
            items=items,
            source="model",
            order=request.asked.order,
            stages_ms=stages,
            kv=request.kind,
            kv_reason=request.reason,
            device=self.device.name,
            bundle=bundle.hash,
            exact=found.exact,
        )

    def score(
        self,
        history: Iterable[EventLike],
        candidates: Iterable[str | int],
        options: RecommendOptions = DEFAULT_OPTIONS,
        *,
        extend_at: int | None = None,
    ) -> NDArray[np.float32]:
        """Action logits [k, C] of given items, without retrieval.

        Args:
            history: As in `recommend`.
            candidates: External ids of k items.
            options: Of which surface, now_ms and truncate are read.
            extend_at: Encode only this many events at first, from 1 to one less than all, and extend by the others;
                the result is the same.

        Raises:
            RequestError: The request cannot be answered as given.
        """
        events = as_events(history)
        if not events:
            raise RequestError("the history is empty; to score items takes at least one event")
        read = RecommendOptions(
            surface=options.surface, now_ms=options.now_ms, truncate=options.truncate, exclude_seen=False
        )
        asked = self.resolve(Request(history=events, k=1, options=read))
        items = as_ids(candidates, "candidates")
        if not items:
            raise RequestError("candidates is empty; name at least one item to score")
        rows = np.array([[item_row(item, self.bundle.rows, "candidates") for item in items]], np.int64)
        if extend_at is not None and not 0 < extend_at < len(asked.history):
            raise RequestError(f"extend_at={extend_at} must be from 1 to {len(asked.history) - 1}")
        encoded = self.engine.prefill(pad_histories([asked.history.part(0, extend_at)]))
        if extend_at is not None:
            encoded = self.engine.extend(encoded, pad_histories([asked.history.part(extend_at)]))
        logits = self.engine.rank(encoded, rows, np.array([asked.surface]), np.array([asked.now_ms]))
        return logits.reshape(rows.size, -1)


def _check_slack(given: int | None, model: ModelSpec) -> None:
    slack = model.max_history if given is None else given
    if not isinstance(slack, int) or not 0 < slack <= model.max_history:
        raise ConfigError(f"window_slack={given} must be an integer from 1 to {model.max_history}")


def _say_order(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if manifest.order is not None:
        log.info("slates are ordered by %s: %s", manifest.order.by, manifest.order.reason)
    elif manifest.metrics is not None and manifest.metrics.get("ranking") is None:
        log.warning(
            "%s: slates are ordered by value, but its ranker was not measured on items that were shown and left alone "
            "and may order by chance; export the checkpoint again with --data, or send order 'retrieval' with requests",
            bundle.path,
        )


def _cache(wanted: CacheOptions | KvCache | None, model: ModelSpec) -> KvCache | None:
    if not isinstance(wanted, KvCache):
        return None if wanted is None else KvCache(model, wanted)
    geometry = KvGeometry.of(model, wanted.geometry.dtype, wanted.geometry.page_slots)
    if geometry != wanted.geometry:
        raise ConfigError(
            f"the cache was made for {wanted.geometry}, this model needs {geometry}; give it a cache of its own"
        )
    return wanted


def _search(asked: ResolvedRequest, queries: NDArray[np.float32]) -> Search:
    return Search(
        queries=queries, wanted=asked.candidates, excluded=asked.excluded, allowed=asked.allowed, exact=asked.exact
    )


def _stages(start: float, encode_end: float, retrieve_end: float, rank_end: float) -> StageTimes:
    return StageTimes(
        encode=(encode_end - start) * 1e3,
        retrieve=(retrieve_end - encode_end) * 1e3,
        rank=(rank_end - retrieve_end) * 1e3,
        total=(rank_end - start) * 1e3,
    )
