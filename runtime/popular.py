"""Popular items of each surface, for requests without a history."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ColdStartError, ConfigError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.requests import ResolvedRequest, Slate, SlateItem, StageTimes

ColdStart = Literal["popular", "refuse"]
NO_HISTORY = "no history"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class PopularItems:
    """The items of a bundle by popularity; safe to use from several threads.

    Attributes:
        bundle: A bundle with a `popularity`.
        order: [S, N] i32, all rows for each surface, the most popular first, equal ones in row order.
        device: Name of the device in a slate.
    """

    bundle: Bundle
    order: NDArray[np.int32]
    device: str

    @classmethod
    def open(cls, bundle: Bundle, cold_start: str, device: str) -> PopularItems | None:
        """Order the items of a bundle; None if it stores no popularity or `cold_start` is "refuse".

        Raises:
            ConfigError: `cold_start` is unknown.
        """
        if cold_start not in get_args(ColdStart):
            raise ConfigError(f"cold_start={cold_start!r} is unknown; use one of {', '.join(get_args(ColdStart))}")
        if cold_start == "refuse":
            return None
        if bundle.popularity is None:
            log.info("%s stores no popularity: requests without events are rejected", bundle.path)
            return None
        order = np.stack([np.argsort(-share, kind="stable").astype(np.int32) for share in bundle.popularity])
        return cls(bundle=bundle, order=order, device=device)

    def slate(self, request: ResolvedRequest) -> Slate:
        """The k most popular eligible items on the surface of a request, or all items that it names, in that order."""
        start, bundle = time.perf_counter(), self.bundle
        assert bundle.popularity is not None
        rows = self.best(request)
        items = tuple(
            SlateItem(
                item=bundle.item_ids[row],
                title=bundle.titles[row],
                metadata=bundle.catalogue.metadata_of(row),
                score=share,
                value=None,
                actions={},
                retrieval_score=None,
                source=None,
            )
            for row, share in zip(rows.tolist(), bundle.popularity[request.surface, rows].tolist(), strict=True)
        )
        took_ms = (time.perf_counter() - start) * 1e3
        return Slate(
            items=items,
            source="popular",
            order=None,
            stages_ms=StageTimes(encode=0.0, retrieve=took_ms, rank=0.0, total=took_ms),
            kv="miss",
            kv_reason=NO_HISTORY,
            device=self.device,
            bundle=bundle.hash,
            exact=None,
            unknown=request.unknown,
        )

    def best(self, request: ResolvedRequest) -> NDArray[np.int32]:
        """The first k eligible rows [k] within the limit of the slate; reads no more of the order than necessary."""
        if not request.candidates:
            assert self.bundle.popularity is not None
            shares = self.bundle.popularity[request.surface, request.own]
            return request.own[np.argsort(-shares, kind="stable")].astype(np.int32)
        order, seen = self.order[request.surface], request.k + len(request.excluded)
        while True:
            rows: NDArray[np.int32] = order[:seen]
            if request.allowed is not None:
                rows = rows[request.allowed[rows]]
            rows = rows[~np.isin(rows, request.excluded)]
            first = request.first(rows)
            if len(first) == request.k:
                return rows[first]
            assert seen < len(order)  # a valid request leaves k rows
            seen *= 4


def refusal(bundle: Bundle) -> ColdStartError:
    """The error for a request without a history if there are no `PopularItems`."""
    reason, remedy = "cold starts are refused here", "show popular items of your own"
    if bundle.popularity is None:
        reason, remedy = "this bundle stores no popularity", "export it again with --data"
    return ColdStartError(f"the history is empty, and {reason}; send events or a history first, or {remedy}")
