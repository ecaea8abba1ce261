"""The request path: encode a history once, retrieve with what it left, rank with what it left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import RequestError
from unipinrec.runtime.bundle import INDEX, Bundle
from unipinrec.runtime.device import Device, resolve_device
from unipinrec.runtime.engine import Engine, pad_histories, pad_rows
from unipinrec.runtime.index import ExactIndex, HnswIndex
from unipinrec.runtime.requests import (
    EventLike,
    RecommendOptions,
    Request,
    ResolvedRequest,
    as_events,
    item_row,
    resolve_request,
)
from unipinrec.runtime.retrieval import Candidates, Retriever
from unipinrec.runtime.slate import Slate, SlateItem, StageTimes
from unipinrec.runtime.verify import require_golden

MAX_BATCH = 32
DEFAULT_OPTIONS = RecommendOptions()
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recommender:
    """Serves one bundle on one device; safe to call from several threads."""

    bundle: Bundle
    engine: Engine
    retriever: Retriever
    device: Device

    @classmethod
    def load(cls, path: Path | str, device: str = "auto", *, verify: bool = True) -> Recommender:
        """Open a bundle for serving.

        Args:
            path: The bundle's folder.
            device: "auto" or "cpu".
            verify: Refuse to serve if the golden requests' outputs do not reproduce on this machine.

        Raises:
            BundleError: The bundle is damaged, of a newer format, or does not compute what PyTorch computed.
            BackendError: The device is not available, or does not run the graphs.
        """
        running = resolve_device(device)
        bundle = Bundle.open(path)
        engine = Engine.open(bundle)
        if verify:
            require_golden(engine, bundle)
        vectors = bundle.item_vectors
        index = HnswIndex(bundle.path / INDEX, bundle.manifest.index, vectors)
        log.info("serving %s on %s (%s), bundle %s", bundle.path, running.name, running.reason, bundle.hash)
        return cls(
            bundle=bundle,
            engine=engine,
            retriever=Retriever(index=index, scan=ExactIndex(vectors), item_vectors=vectors),
            device=running,
        )

    def recommend(
        self, history: Iterable[EventLike], k: int = 20, options: RecommendOptions = DEFAULT_OPTIONS
    ) -> Slate:
        """The k best items after a history, given oldest event first as events or dictionaries with their keys.

        Raises:
            RequestError: The request cannot be answered as given.
        """
        return self.recommend_many([Request(history=as_events(history), k=k, options=options)])[0]

    def recommend_many(self, requests: Sequence[Request]) -> list[Slate]:
        """Answer requests together, in their order; each gets the slate that it would get alone.

        Raises:
            RequestError: One of the requests cannot be answered as given; then none is.
        """
        asked = [resolve_request(request, self.bundle.manifest, self.bundle.rows) for request in requests]
        batches = (asked[start : start + MAX_BATCH] for start in range(0, len(asked), MAX_BATCH))
        return [slate for batch in batches for slate in self._answer(batch)]

    def _answer(self, asked: Sequence[ResolvedRequest]) -> list[Slate]:
        start = time.perf_counter()
        encoded = self.engine.encode(pad_histories([one.history for one in asked]))
        encode_end = time.perf_counter()
        queries = self.engine.retrieve(encoded, np.stack([one.outcomes for one in asked]))
        found = [self._candidates(one, query) for one, query in zip(asked, queries, strict=True)]
        retrieve_end = time.perf_counter()
        surfaces, now_ms = np.array([one.surface for one in asked]), np.array([one.now_ms for one in asked])
        logits = self.engine.rank(encoded, pad_rows([one.rows for one in found]), surfaces, now_ms)
        rank_end = time.perf_counter()
        stages = _stages(start, encode_end, retrieve_end, rank_end)
        return [self._slate(*parts, stages) for parts in zip(asked, found, logits, strict=True)]

    def _candidates(self, asked: ResolvedRequest, queries: NDArray[np.float32]) -> Candidates:
        return self.retriever.retrieve(queries, asked.candidates, asked.excluded, exact=asked.exact)

    def _slate(
        self, asked: ResolvedRequest, found: Candidates, logits: NDArray[np.float32], stages: StageTimes
    ) -> Slate:
        # Rows of `logits` beyond the request's own candidates are padding.
        probabilities = _sigmoid(logits[: len(found.rows)])
        scores = probabilities @ asked.weights
        best = np.lexsort((found.rows, -scores))[: asked.k]  # equal scores in row order
        return Slate(
            items=tuple(
                self._item(int(found.rows[i]), float(scores[i]), probabilities[i], float(found.similarity[i]))
                for i in best
            ),
            stages_ms=stages,
            kv="miss",
            kv_reason="new",
            device=self.device.name,
            bundle=self.bundle.hash,
            exact=found.exact,
        )

    def _item(self, row: int, score: float, probabilities: NDArray[np.float64], similarity: float) -> SlateItem:
        return SlateItem(
            item=self.bundle.item_ids[row],
            title=self.bundle.titles[row],
            score=score,
            actions=dict(zip(self.bundle.manifest.actions, probabilities.tolist(), strict=True)),
            retrieval_score=similarity,
        )

    def score(
        self,
        history: Iterable[EventLike],
        candidates: Iterable[str],
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
        nothing_left_out = msgspec.structs.replace(options, exclude_seen=False, exclude=())
        request = Request(history=as_events(history), k=1, options=nothing_left_out)
        asked = resolve_request(request, self.bundle.manifest, self.bundle.rows)
        rows = np.array([[item_row(item, self.bundle.rows, "candidates") for item in candidates]], np.int64)
        if extend_at is not None and not 0 < extend_at < len(asked.history):
            raise RequestError(f"extend_at={extend_at} must be from 1 to {len(asked.history) - 1}")
        encoded = self.engine.encode(pad_histories([asked.history.part(0, extend_at)]))
        if extend_at is not None:
            encoded = self.engine.extend(encoded, pad_histories([asked.history.part(extend_at)]))
        logits = self.engine.rank(encoded, rows, np.array([asked.surface]), np.array([asked.now_ms]))
        return logits.reshape(rows.size, -1)


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    probabilities: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))
    return probabilities


def _stages(start: float, encode_end: float, retrieve_end: float, rank_end: float) -> StageTimes:
    return StageTimes(
        encode=(encode_end - start) * 1e3,
        retrieve=(retrieve_end - encode_end) * 1e3,
        rank=(rank_end - retrieve_end) * 1e3,
        total=(rank_end - start) * 1e3,
    )
