"""Whether a backend that rounds, such as to bf16, still recommends the items that fp32 recommends.

Rounded values never reproduce golden outputs to 1e-4, so this compares recommendations. It uses the golden requests,
with PyTorch's outputs as the reference, and sample users, whose histories are longer, with fp32 ONNX Runtime as the
reference. Half of the requests are encoded at once, half are extended; each is computed alone, and in batches with
others of other lengths. The requests depend on the bundle alone;
`MAX_USERS` and `MAX_EVENTS` keep the time to about a second for a model that suits a CPU.

Three conditions must hold. No logit differs by more than `MAX_LOGIT_DIFF`, plus a `LOGIT_ROUNDING` of itself. No query
turns beyond `MIN_COSINE`. These bounds are several times wider than observed rounding; wrong arithmetic exceeds them.
And the best ten, ranked and retrieved, overlap with those of fp32 by `MIN_OVERLAP` on average. There two items count as
tied if their fp32 values are closer than rounding resolves; otherwise a model with close best scores would fail for
harmless swaps. Ties (`TIED_LOGIT`, `TIED_SIMILARITY`) are far narrower than the bounds.

An export may accept a precision that fails this. The manifest then stores the loss, and a device may lose half as much
again (`MARGIN`), because rounding differs between devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BundleError
from unipinrec.runtime.bundle.bundle import GOLDEN, Bundle
from unipinrec.runtime.bundle.golden import read_golden
from unipinrec.runtime.bundle.manifest import Agreement, Manifest
from unipinrec.runtime.graphs.backend import MAX_ROWS, MAX_SLOTS
from unipinrec.runtime.graphs.engine import Encoded, Engine, pad_histories
from unipinrec.runtime.ranking import Scoring, sigmoid
from unipinrec.runtime.requests import CANDIDATES, SOON_MS, History

TOP = 10
MIN_OVERLAP = 0.99
MAX_LOGIT_DIFF, TIED_LOGIT = 0.1, 0.01
LOGIT_ROUNDING = 2.0**-6  # four times what bf16 resolves
MIN_COSINE, TIED_SIMILARITY = 0.999, 0.0005
MARGIN = 1.5
MAX_USERS, MAX_EVENTS, MAX_ITEMS = 48, 4096, 50_000
ROWS = 8  # of a batch in the middle


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A request and its fp32 answer.

    Attributes:
        history: n events.
        split: Events to encode before extending by the others; None = encode all at once.
        candidates: [k] i64 rows, shown at `surface` and `now_ms`.
        logits: [k, C] f32; zeros if there is no ranker.
        queries: [Q, E] f32.
    """

    history: History
    split: int | None
    candidates: NDArray[np.int64]
    surface: int
    now_ms: int
    logits: NDArray[np.float32]
    queries: NDArray[np.float32]


def measure_agreement(engine: Engine, bundle: Bundle) -> Agreement:
    """Compare an engine that rounds with fp32 on the golden requests and on sample users.

    Raises:
        BundleError: The golden requests or the sample users cannot be read.
        BackendError: A graph does not run, or ONNX Runtime, which computes the fp32 answers for users, is missing.
    """
    manifest = bundle.manifest
    positive = manifest.positive.astype(np.float32)
    items = bundle.item_vectors[:: -(-manifest.num_items // MAX_ITEMS)]
    histories = bundle.sample_histories(MAX_USERS)
    within = int((np.cumsum(list(map(len, histories))) <= MAX_EVENTS).sum())
    cases = _golden_cases(bundle)
    with closing(Engine.on_cpu(bundle)) as exact:
        cases += [_user_case(exact, *user, positive) for user in enumerate(histories[:within])]
    figures = np.array([_compare(engine, case, bundle, items) for case in cases])
    ranked, ranked_strict, retrieved, retrieved_strict = figures[:, :4].mean(axis=0).tolist()
    # A fault in how padding is left out shows only where requests of different lengths share a batch.
    figures = np.concatenate([figures[:, 4:], _compare_together(engine, cases, positive)])
    cosine, difference = float(figures[:, 0].min()), float(figures[:, 1].max())
    return Agreement(
        requests=len(cases),
        ranked_overlap=ranked,
        ranked_overlap_strict=ranked_strict,
        retrieved_overlap=retrieved,
        retrieved_overlap_strict=retrieved_strict,
        min_query_cosine=cosine,
        max_logit_diff=difference,
        problem=_problem(min(ranked, retrieved), cosine, difference, _bounds(engine, bundle)),
    )


def _bounds(engine: Engine, bundle: Bundle) -> tuple[float, float, float]:
    """Lowest accepted overlap and cosine, and largest accepted difference of a logit."""
    spec = bundle.manifest.precisions.get(engine.device.precision)
    if spec is None or spec.agreement.problem is None:
        return MIN_OVERLAP, MIN_COSINE, MAX_LOGIT_DIFF
    accepted = spec.agreement
    overlap = min(accepted.ranked_overlap, accepted.retrieved_overlap)
    return (
        min(MIN_OVERLAP, 1.0 - MARGIN * (1.0 - overlap)),
        min(MIN_COSINE, 1.0 - MARGIN * (1.0 - accepted.min_query_cosine)),
        max(MAX_LOGIT_DIFF, MARGIN * accepted.max_logit_diff),
    )


def _problem(overlap: float, cosine: float, difference: float, bounds: tuple[float, float, float]) -> str | None:
    min_overlap, min_cosine, max_difference = bounds
    # `not` comes first so that NaN is a problem too.
    if not difference <= max_difference:
        return f"a logit is off by {difference:.3g}, at most {max_difference:.3g} is allowed"
    if not cosine >= min_cosine:
        return f"the cosine of a query with its fp32 query is {cosine:.6g}, at least {min_cosine:.6g} is needed"
    if not overlap >= min_overlap:
        return f"the best {TOP} items overlap by {overlap:.4f}, at least {min_overlap:.4g} is needed"
    return None


def _golden_cases(bundle: Bundle) -> list[_Case]:
    """Each golden request twice: encoded at once and extended."""
    golden, manifest = read_golden(bundle), bundle.manifest
    without = np.zeros((*golden.candidates.shape, 1), np.float32)
    try:
        queries = golden.outputs["retrieval.queries"]
        logits = golden.outputs["ranker.logits"] if "ranker" in manifest.model.graphs else without
    except KeyError as error:
        raise BundleError(f"{bundle.path / GOLDEN}: {error} is missing; export the bundle again") from error
    return [
        _Case(
            history=golden.histories[row],
            split=split,
            candidates=golden.candidates[row],
            surface=int(golden.surfaces[row]),
            now_ms=int(golden.now_ms[row]),
            logits=logits[row],
            queries=queries[row],
        )
        for row in range(len(golden.histories))
        for split in ((None, int(golden.prefixes[row])) if "extend" in manifest.model.graphs else (None,))
    ]


def _user_case(exact: Engine, index: int, history: History, positive: NDArray[np.float32]) -> _Case:
    """A request soon after a user's last event, and its fp32 answer; every second user is extended half-way."""
    encoded = exact.encode(pad_histories([history]))
    queries = exact.retrieve(encoded, positive[None])[0]
    candidates = _best(_similarity(exact.item_vectors, queries), CANDIDATES)
    last = int(history.timestamps_ms[-1])
    now_ms = last if last < 0 else last + SOON_MS
    return _Case(
        history=history,
        split=len(history) // 2 if index % 2 and len(history) > 1 and "extend" in exact.model.graphs else None,
        candidates=candidates,
        surface=0,
        now_ms=now_ms,
        logits=_logits(exact, encoded, candidates[None], np.zeros(1, np.int64), np.array([now_ms]))[0],
        queries=queries,
    )


def _compare(engine: Engine, case: _Case, bundle: Bundle, items: NDArray[np.float32]) -> tuple[float, ...]:
    """Overlaps of the ranked and the retrieved items, each with ties and strict; lowest cosine; largest difference."""
    manifest = bundle.manifest
    positive = manifest.positive.astype(np.float32)
    encoded = engine.encode(pad_histories([case.history.part(0, case.split)]))
    if case.split is not None:
        encoded = engine.extend(encoded, pad_histories([case.history.part(case.split)]))
    queries = engine.retrieve(encoded, positive[None])[0]
    logits = _logits(engine, encoded, case.candidates[None], np.array([case.surface]), np.array([case.now_ms]))[0]
    near = bundle.item_vectors[case.candidates]
    tie = TIED_SIMILARITY * float(np.linalg.norm(case.queries, axis=1).max() * np.linalg.norm(near, axis=1).max())
    exact, tied = _scores(manifest, case.logits, _similarity(near, case.queries), tie)
    ranked = _best(_scores(manifest, logits, _similarity(near, queries), tie)[0], TOP)
    similarity = _similarity(items, case.queries)
    retrieved = _best(_similarity(items, queries), TOP)
    return (
        _overlap(exact, ranked, tied[ranked]),
        _overlap(exact, ranked, 0.0),
        _overlap(similarity, retrieved, tie),
        _overlap(similarity, retrieved, 0.0),
        *_differences(case, queries, logits),
    )


def _compare_together(engine: Engine, cases: Sequence[_Case], positive: NDArray[np.float32]) -> NDArray[np.float64]:
    """`_differences` [n, 2] of requests in batches of different lengths, from a pair to the largest batch."""
    figures = []
    for kind in ([case for case in cases if case.split is None], [case for case in cases if case.split is not None]):
        by_length = sorted(kind, key=lambda case: len(case.history))
        for rows in (2, ROWS, MAX_ROWS):
            count = -(-len(kind) // rows)
            figures += [pair for i in range(count) for pair in _compare_batch(engine, by_length[i::count], positive)]
    return np.array(figures)


def _compare_batch(engine: Engine, cases: Sequence[_Case], positive: NDArray[np.float32]) -> list[tuple[float, float]]:
    """`_differences` of requests that are all extended, or all encoded at once, in one batch."""
    if len(cases) * max(len(case.history) for case in cases) > MAX_SLOTS:
        return []  # the runtime makes no such batch
    encoded = engine.encode(pad_histories([case.history.part(0, case.split) for case in cases]))
    if cases[0].split is not None:
        encoded = engine.extend(encoded, pad_histories([case.history.part(case.split or 0) for case in cases]))
    queries = engine.retrieve(encoded, np.tile(positive, (len(cases), 1)))
    count = min(len(case.candidates) for case in cases)  # no candidate sees another
    surfaces, now_ms = np.array([case.surface for case in cases]), np.array([case.now_ms for case in cases])
    candidates = np.stack([case.candidates[:count] for case in cases])
    logits = _logits(engine, encoded, candidates, surfaces, now_ms)
    return [_differences(case, *row) for case, *row in zip(cases, queries, logits, strict=True)]


def _differences(case: _Case, queries: NDArray[np.float32], logits: NDArray[np.float32]) -> tuple[float, float]:
    """Lowest cosine of a query, and largest difference of the logits of the first candidates, beyond rounding."""
    exact = case.logits[: len(logits)]
    off = np.abs(exact - logits) - LOGIT_ROUNDING * np.abs(exact)
    lengths = np.linalg.norm(case.queries, axis=-1) * np.linalg.norm(queries, axis=-1)
    return float(((case.queries * queries).sum(axis=-1) / lengths).min()), max(0.0, float(off.max()))


def _logits(
    engine: Engine,
    encoded: Encoded,
    candidates: NDArray[np.int64],
    surfaces: NDArray[np.int64],
    now_ms: NDArray[np.int64],
) -> NDArray[np.float32]:
    """See `Engine.rank`; zeros [B, k, 1] if there is no ranker."""
    if "ranker" in engine.model.graphs:
        return engine.rank(encoded, candidates, surfaces, now_ms)
    return np.zeros((*candidates.shape, 1), np.float32)


def _scores(
    manifest: Manifest, logits: NDArray[np.float32], similarity: NDArray[np.float32], tie: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bundle's scores of candidates [k], and the difference up to which each counts as tied.

    Args:
        manifest: Of the bundle.
        logits: [k, C].
        similarity: [k], to the query.
        tie: Difference of two similarities that counts as tied.
    """
    if manifest.default_order == "retrieval":
        return similarity.astype(np.float64), np.full(len(similarity), tie)
    positive = manifest.positive.astype(np.float64)
    probabilities, order, scoring = sigmoid(logits), manifest.default_order, Scoring.of(manifest)
    values, tied = probabilities @ positive, TIED_LOGIT * (probabilities * (1.0 - probabilities)) @ positive
    if scoring is None or order == "value":
        return values, tied
    tied_share, tied_logit = tied / values, scoring.retrieval_scale * tie
    if order == "blend":
        scores = scoring.blend(values, similarity)
        return scores, scores * (tied_share + scoring.retrieval_weight * tied_logit)
    return scoring.product(logits, positive, similarity), tied_share + tied_logit


def _similarity(items: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarity [N] of items [N, E] to the nearest of queries [Q, E]."""
    similarity: NDArray[np.float32] = (items @ queries.T).max(axis=1)
    return similarity


def _best(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Places of the largest values, best first, equal ones in order."""
    return np.argsort(-values, kind="stable")[:count]


def _overlap(exact: NDArray[Any], chosen: NDArray[np.int64], tied: NDArray[np.float64] | float) -> float:
    """Share of the chosen n items that are among the n best by `exact`, or at most `tied` below the last of them."""
    last = exact[_best(exact, len(chosen))[-1]]
    return float((exact[chosen] >= last - tied).mean())
