"""Quality of the lists of a bundle: `export` measures and stores it, `verify` measures the sample's again."""

from __future__ import annotations

from typing import Literal

import msgspec

KvDtype = Literal["fp32", "fp16", "bf16", "int8"]  # from the finest to the coarsest
DEFAULT_KV_DTYPE: KvDtype = "int8"  # where a bundle states no type


class Estimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mean over requests and its standard error."""

    mean: float
    error: float


class ListQuality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Quality of the ten best items of one order or baseline, over the requests of an evaluation.

    Attributes:
        hit_rate: HR@10 of the logged next item; None if no request has one.
        ndcg: NDCG@10 of it.
        value: The weighted actions of logged next items among the ten, as a share of those of all next items; None
            if the data has slates, or no action varies.
        true_value: True probability of a positive action, mean over the ten; simulated data only.
        served_ahead: Mean lead of the served list per request: in true value, else in HR@10.
    """

    hit_rate: Estimate | None = None
    ndcg: Estimate | None = None
    value: Estimate | None = None
    true_value: Estimate | None = None
    served_ahead: Estimate | None = None


class ActionQuality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well the probability of one action orders logged slate items.

    Attributes:
        auc: Over all items.
        gauc: Per user, weighted by items.
        slate_auc: Per slate, weighted by items.
        logloss: Mean negative log-likelihood in nats.
        rows: Slate items.
    """

    auc: float | None
    gauc: float | None
    slate_auc: float | None
    logloss: float
    rows: int


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Quality on held-out requests, measured on the lists that `Recommender` returns.

    Attributes:
        split: "test" or "valid".
        requests: Answered requests.
        targets: Requests with a logged next item.
        repeats: Whether items that the user had before count as targets and are served.
        order: Order of the served lists.
        candidates: Most items that retrieval passed on.
        items: Items of the data.
        found: Share of the targets among the candidates; None without targets.
        lists: "served", other orders of the same candidates, and baselines over all items, by name.
        actions: By action; empty if the data has no slates or the ranker does not run.
        gap_closed: Share of the gap in true value between popularity and the best ten that the served list closes;
            None without a true value.
        data: Shares that show the limits of the data (`models.data_sheet`).
        warnings: Reasons against serving this bundle, in plain words.
    """

    split: str
    requests: int
    targets: int
    repeats: bool
    order: str
    candidates: int
    items: int
    found: Estimate | None
    lists: dict[str, ListQuality]
    actions: dict[str, ActionQuality]
    gap_closed: float | None
    data: dict[str, float]
    warnings: tuple[str, ...]


class SampleQuality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often the last event of a sample user is among the ten items recommended from the events before it.

    Attributes:
        users: Sample users whose last event is positive and of an item new to them.
        served: Hits of the served list.
        retrieved: Hits of the ten nearest items.
    """

    users: int
    served: int
    retrieved: int


class CacheAgreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far lists that are served with a cache agree with those served without one; means over requests.

    Attributes:
        requests: Compared requests: a first one of each user, and one that extends half of the history.
        overlap: Share of the ten best items that are among the ten best without a cache, ties included.
        overlap_strict: The same without ties.
    """

    requests: int
    overlap: float
    overlap_strict: float


class CacheSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The type in which a cache stores this bundle's keys and values.

    Attributes:
        dtype: The first of int8, bf16, fp16 and fp32 that keeps the ten best items.
        agreement: With this type.
        refused: With each type before it; one is missing if keys or values are out of its range.
    """

    dtype: KvDtype
    agreement: CacheAgreement
    refused: dict[KvDtype, CacheAgreement]


def named(name: str) -> str:
    """Readable name of a list of an evaluation."""
    return name.replace("_", " ")
