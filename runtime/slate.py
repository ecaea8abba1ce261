"""What a request gets back: items with the reasons for their order, and what it took."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from unipinrec.runtime.requests import Order


class SlateItem(msgspec.Struct, frozen=True, kw_only=True):
    """One recommended item.

    Attributes:
        item: External id.
        title: For people; None where the bundle has none.
        score: What the slate is sorted by (see `Slate.order` and docs/ranking.md); the share of a popular item.
        value: Weighted sum of the action probabilities; None where the ranker did not run.
        actions: Probability of each action; empty where the ranker did not run.
        retrieval_score: Similarity of the item with the user's query; None of a popular item.
    """

    item: str
    title: str | None
    score: float
    value: float | None
    actions: dict[str, float]
    retrieval_score: float | None


class StageTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of each stage; of the whole batch where requests were answered together."""

    encode: float
    retrieve: float
    rank: float
    total: float


class Slate(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request.

    Attributes:
        items: Best first.
        source: What chose the items: "model"; "popular", as the history is empty.
        order: What the score is: "value"; "blend", the value times a power of the chance that retrieval gives the item,
            up to a factor of the request; "product", the logarithm of the value times the chance of an engagement, up
            to a constant of the request; "retrieval", the retrieval score. None of popular items.
        stages_ms: What each stage took.
        kv: Where the history's keys and values came from.
        kv_reason: Why they were not, or not wholly, cached.
        device: What ran.
        bundle: Hash of the bundle.
        exact: Why all items were scanned; None = the index found the candidates, or the items are popular ones.
    """

    items: tuple[SlateItem, ...]
    source: Literal["model", "popular"]
    order: Order | None
    stages_ms: StageTimes
    kv: Literal["hit", "extended", "miss"]
    kv_reason: str | None
    device: str
    bundle: str
    exact: str | None

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form; titles and `exact` are not part of it."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        del document["exact"]
        for item in document["items"]:
            del item["title"]
        return document
