"""What is popular on each surface, for requests without a history."""

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
        bundle: With a `popularity`.
        order: [S, N] i32, for each surface all rows, the most popular first, equal ones in row order.
        device: What is said of the device in a slate.
    """

    bundle: Bundle
    order: NDArray[np.int32]
    device: str

    @classmethod
    def open(cls, bundle: Bundle, cold_start: str, device: str) -> PopularItems | None:
        """Order the items of a bundle; None where it stores no popularity or `cold_start` is "refuse".

        Raises:
            ConfigError: `cold_start` is unknown.
        """
        if cold_start not in get_args(ColdStart):
            raise ConfigError(f"cold_start={cold_start!r} is unknown; use one of {', '.join(get_args(ColdStart))}")
        if cold_start == "refuse":
            return None
        if bundle.popularity is None:
            log.info("%s stores no popularity: requests without events are refused", bundle.path)
            return None
        order = np.stack([np.argsort(-share, kind="stable").astype(np.int32) for share in bundle.popularity])
        return cls(bundle=bundle, order=order, device=device)

    def slate(self, asked: ResolvedRequest) -> Slate:
        """The k most popular eligible items on the surface of a request."""
        start, bundle = time.perf_counter(), self.bundle
        assert bundle.popularity is not None
        rows = self.best(asked)
        items = tuple(
            SlateItem(
                item=bundle.item_ids[row],
                title=bundle.titles[row],
                score=share,
                value=None,
                actions={},
                retrieval_score=None,
            )
            for row, share in zip(rows.tolist(), bundle.popularity[asked.surface, rows].tolist(), strict=True)
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
        )

    def best(self, asked: ResolvedRequest) -> NDArray[np.int32]:
        """The k first eligible rows [k]; reads the order only as far as they reach."""
        order, seen = self.order[asked.surface], asked.k + len(asked.excluded)
        while True:
            rows: NDArray[np.int32] = order[:seen]
            if asked.allowed is not None:
                rows = rows[asked.allowed[rows]]
            rows = rows[~np.isin(rows, asked.excluded)]
            if len(rows) >= asked.k:
                return rows[: asked.k]
            assert seen < len(order)  # a valid request leaves k rows
            seen *= 4


def refusal(bundle: Bundle) -> ColdStartError:
    """Why a request without a history is not answered where there are no `PopularItems`."""
    if bundle.popularity is None:
        return ColdStartError(
            "the history is empty, and this bundle does not store what is popular; export it again with --data, or "
            "send events or a history first"
        )
    return ColdStartError(
        "the history is empty, and cold starts are refused here; send events or a history first, or show what is "
        "popular"
    )
