"""The comparison of a written bundle with the library that its model comes from, through `Recommender`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ExportError
from unipinrec.export.golden import random_histories
from unipinrec.export.protocol import ExportSource
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.integrity import seal
from unipinrec.runtime.bundle.manifest import Manifest, ModelSpec
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.golden_check import tolerance
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.kv.pages import KvGeometry
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import Event, History, RecommendOptions

REFERENCE = "reference"  # its place in `Manifest.config`
SAMPLE, COMPARED, TOP = 100, 100, 10
SEEDS = 25  # of random histories, four each
CACHES: tuple[KvDtype, ...] = ("fp32", "int8")

# The library's scores after a history. Takes the external ids of its items, oldest first; returns the score of every
# item, [N] in row order: its dot product with the query, or their cosine, as `ModelSpec.similarity` says.
Reference = Callable[[Sequence[str]], NDArray[np.float32]]


class ReferenceDifference(msgspec.Struct, frozen=True, kw_only=True):
    """How far served answers are from the library's.

    Attributes:
        max_score_diff: Largest absolute difference of a score, over the served hundred best items of each history.
        same_top_ten: Share of the histories whose served ten best are the library's; closer scores are a tie.
    """

    max_score_diff: float
    same_top_ten: float


class ReferenceReport(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison with the library.

    Attributes:
        histories: Compared histories.
        served: "fresh", and for models with a cache "cached fp32" and "cached int8". A cached answer encodes the second
            half of a history after the cached first half.
    """

    histories: int
    served: dict[str, ReferenceDifference]


def with_reference(folder: Path, source: ExportSource, histories: Sequence[History], reference: Reference) -> Manifest:
    """Compare the answers of a written bundle with the library's scores, and seal the result.

    Args:
        folder: The bundle.
        source: What it was exported from.
        histories: The first hundred are compared, each cut to its newest events; none = histories of random items.
        reference: The library's scores.

    Returns:
        The manifest, with a `ReferenceReport` under "reference" in its `config`.

    Raises:
        ExportError: A score differs by more than 1e-4 and 1e-5 of the largest score, int8 aside, or `reference` returns
            something else than scores.
        BackendError: A graph does not run.
    """
    bundle, model = Bundle.open(folder), source.model
    histories = histories or [one for seed in range(SEEDS) for one in random_histories(source, seed).split()]
    sample = [bundle.events_of(history.part(-model.max_history)) for history in histories[:SAMPLE]]
    expected = [_expected(bundle, events, reference) for events in sample]
    caches: dict[str, CacheOptions | None] = {"fresh": None}
    if model.cache == "prefix":
        caches |= {f"cached {dtype}": _room_for_one(model, dtype) for dtype in CACHES}
    served = {name: _difference(bundle, cache, sample, expected) for name, cache in caches.items()}
    allowed = max(map(tolerance, expected))
    for name, found in served.items():
        if name != "cached int8" and not found.max_score_diff <= allowed:
            raise ExportError(
                f"{name}: a score differs from the reference by {found.max_score_diff:.3g}, allowed {allowed:.2g}; "
                f"{found.same_top_ten:.0%} of {len(sample)} histories have the same ten best items. The module "
                "computes something else than the library, or the library's model is in training mode"
            )
    report = ReferenceReport(histories=len(sample), served=served)
    config = {**bundle.manifest.config, REFERENCE: msgspec.to_builtins(report)}
    manifest = msgspec.structs.replace(bundle.manifest, config=config)
    seal(folder, manifest)
    return manifest


def _expected(bundle: Bundle, events: Sequence[Event], reference: Reference) -> NDArray[np.float32]:
    scores = np.asarray(reference([str(event.item) for event in events]))
    if scores.shape != (len(bundle.item_ids),) or not np.isfinite(scores).all():
        raise ExportError(
            f"the reference returned {scores.dtype} {list(scores.shape)} for {len(events)} events; it must return a "
            f"finite score for each of the {len(bundle.item_ids)} items"
        )
    return scores


def _room_for_one(model: ModelSpec, dtype: KvDtype) -> CacheOptions:
    """A cache for the history at hand: the others make room for it."""
    geometry = KvGeometry.of(model, dtype)
    pages = 2 * geometry.pages_for(model.max_history + model.kv_prefix_slots)
    return CacheOptions(budget_bytes=pages * geometry.page_bytes, dtype=dtype)


def _difference(
    bundle: Bundle,
    cache: CacheOptions | None,
    sample: Sequence[Sequence[Event]],
    expected: Sequence[NDArray[np.float32]],
) -> ReferenceDifference:
    """Serve all histories; with a cache, each after its first half."""
    count, differences, same = min(COMPARED, len(bundle.item_ids)), [], 0
    options = RecommendOptions(order="retrieval", exclude_seen=False)
    with Recommender.load(bundle, "cpu", cache=cache) as recommender:
        for user, (events, scores) in enumerate(zip(sample, expected, strict=True)):
            for end in (len(events) // 2, len(events)) if cache and len(events) > 1 else (len(events),):
                slate = recommender.recommend(events[:end], count, options, user=str(user) if cache else None)
            rows = [bundle.rows[item.item] for item in slate.items]
            served = np.array([item.score for item in slate.items])
            differences.append(float(np.abs(served - scores[rows]).max()))
            same += bool(np.abs(np.sort(scores[rows[:TOP]]) - np.sort(scores)[-TOP:]).max() <= tolerance(scores))
    return ReferenceDifference(max_score_diff=max(differences), same_top_ten=same / len(sample))
