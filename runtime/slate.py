"""What a request gets back: items with the reasons for their order, and what it took."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class SlateItem(msgspec.Struct, frozen=True, kw_only=True):
    """One recommended item.

    Attributes:
        item: External id.
        title: For people; None where the bundle has none.
        score: Weighted sum of the action probabilities; what the slate is sorted by.
        value: Weighted sum of the action probabilities; None where no action was predicted.
        actions: Probability of each action.
        retrieval_score: Similarity of the item with the user's query.
    """

    item: str
    title: str | None
    score: float
    actions: dict[str, float]
    retrieval_score: float
    value: float | None = None


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
        stages_ms: What each stage took.
        kv: Where the history's keys and values came from.
        kv_reason: Why they were not, or not wholly, cached.
        device: What ran.
        bundle: Hash of the bundle.
        exact: Why all items were scanned; None = the index found the candidates.
        source: What chose the items.
    """

    items: tuple[SlateItem, ...]
    stages_ms: StageTimes
    kv: Literal["hit", "extended", "miss"]
    kv_reason: str | None
    device: str
    bundle: str
    exact: str | None
    source: Literal["model", "popular"] = "model"

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form; titles and `exact` are not part of it."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        del document["exact"]
        for item in document["items"]:
            del item["title"]
        return document
