"""Whether a backend that rounds to bf16 still recommends what fp32 recommends.

Rounded values never reproduce golden outputs to 1e-4, so they are judged by what a caller sees: over the golden
requests, with PyTorch's outputs as the truth, and over sample users of the bundle, whose histories are longer, with
fp32 ONNX Runtime as the truth and the candidates that it retrieves. Half of the requests are encoded at once, half are
extended. Which requests, and how many, depends on the bundle alone; `MAX_USERS` and `MAX_EVENTS` keep it to about a
second for a model that suits a CPU.

Three things must hold. No logit is off by more than `MAX_LOGIT_DIFF`, a `LOGIT_ROUNDING` of itself left aside, and no
query turns beyond `MIN_COSINE`: bounds some times wider than what rounding was seen to do, which wrong arithmetic
breaks. And the best ten, ranked and retrieved, overlap with those of fp32 by `MIN_OVERLAP` on average. There, two items
may stand for each other if the fp32 values that order them are closer than rounding resolves: a model whose best scores
lie close together would otherwise fail for swaps that are as good as a draw. Such a tie (`TIED_LOGIT`,
`TIED_SIMILARITY`) is far narrower than the bounds, so that the overlap does not follow from them.

A bundle may carry a precision that is known to fail this, accepted when it was exported. Then the manifest says what
was lost, and a device may lose half as much again (`MARGIN`): rounding comes out differently everywhere.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BundleError
from unipinrec.runtime.bundle.bundle import GOLDEN, Bundle
from unipinrec.runtime.bundle.golden import read_golden
from unipinrec.runtime.bundle.manifest import Agreement, Manifest
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.ranking import Scoring, sigmoid
from unipinrec.runtime.requests import CANDIDATES, SOON_MS, History

TOP = 10
MIN_OVERLAP = 0.99
MAX_LOGIT_DIFF, TIED_LOGIT = 0.1, 0.01
LOGIT_ROUNDING = 2.0**-6  # four times what bf16 resolves
MIN_COSINE, TIED_SIMILARITY = 0.999, 0.0005
MARGIN = 1.5
MAX_USERS, MAX_EVENTS, MAX_ITEMS = 48, 4096, 50_000


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A request and its fp32 answer.

    Attributes:
        history: n events.
        split: Events to encode before extending by the others; None = encode all at once.
        candidates: [k] i64 rows, shown at `surface` and `now_ms`.
        logits: [k, C] f32.
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
        BackendError: A graph does not run, or ONNX Runtime, which gives the fp32 answers for users, is missing.
    """
    manifest = bundle.manifest
    positive = manifest.positive.astype(np.float32)
    items = bundle.item_vectors[:: -(-manifest.num_items // MAX_ITEMS)]
    with closing(Engine.on_cpu(bundle)) as exact:
        users = [_user_case(exact, *user, positive) for user in enumerate(_users(bundle))]
    cases = [*_golden_cases(bundle), *users]
    figures = np.array([_compare(engine, case, bundle, items) for case in cases])
    ranked, ranked_strict, retrieved, retrieved_strict = figures[:, :4].mean(axis=0).tolist()
    cosine, difference = float(figures[:, 4].min()), float(figures[:, 5].max())
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
    """Lowest overlap, lowest cosine and largest difference of a logit, as far as they are accepted."""
    spec = bundle.manifest.precisions.get(engine.device.precision)
    if spec is None or spec.agreement.problem is None:
        return MIN_OVERLAP, MIN_COSINE, MAX_LOGIT_DIFF
    lost = spec.agreement
    overlap = min(lost.ranked_overlap, lost.retrieved_overlap)
    return (
        min(MIN_OVERLAP, 1.0 - MARGIN * (1.0 - overlap)),
        min(MIN_COSINE, 1.0 - MARGIN * (1.0 - lost.min_query_cosine)),
        max(MAX_LOGIT_DIFF, MARGIN * lost.max_logit_diff),
    )


def _problem(overlap: float, cosine: float, difference: float, bounds: tuple[float, float, float]) -> str | None:
    min_overlap, min_cosine, max_difference = bounds
    # Written so that a value that is no number is a problem too.
    if not difference <= max_difference:
        return f"a logit is off by {difference:.3g}, allowed are {max_difference:.3g}"
    if not cosine >= min_cosine:
        return f"the cosine of a query with the exact one is {cosine:.6g}, at least {min_cosine:.6g} is needed"
    if not overlap >= min_overlap:
        return f"the best {TOP} items overlap by {overlap:.4f}, at least {min_overlap:.4g} is needed"
    return None


def _golden_cases(bundle: Bundle) -> list[_Case]:
    """Each golden request twice: encoded at once and extended."""
    golden = read_golden(bundle)
    try:
        logits, queries = golden.outputs["ranker.logits"], golden.outputs["retrieval.queries"]
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
        for split in (None, int(golden.prefixes[row]))
    ]


def _users(bundle: Bundle) -> list[History]:
    """Histories of the first sample users, within the limits; none where the bundle carries none."""
    histories = bundle.sample_histories(MAX_USERS)
    events = np.cumsum([len(history) for history in histories])
    return histories[: int((events <= MAX_EVENTS).sum())]


def _user_case(exact: Engine, index: int, history: History, positive: NDArray[np.float32]) -> _Case:
    """What fp32 answers to a user soon after the last event; every other user is to be extended half-way."""
    encoded = exact.encode(pad_histories([history]))
    queries = exact.retrieve(encoded, positive[None])[0]
    candidates = _best(_similarity(exact.item_vectors, queries), CANDIDATES)
    last = int(history.timestamps_ms[-1])
    now_ms = last if last < 0 else last + SOON_MS
    return _Case(
        history=history,
        split=len(history) // 2 if index % 2 and len(history) > 1 else None,
        candidates=candidates,
        surface=0,
        now_ms=now_ms,
        logits=exact.rank(encoded, candidates[None], np.zeros(1, np.int64), np.array([now_ms]))[0],
        queries=queries,
    )


def _compare(engine: Engine, case: _Case, bundle: Bundle, items: NDArray[np.float32]) -> tuple[float, ...]:
    """Overlap of the ranked and of the retrieved, each with ties and strictly; lowest cosine; largest difference."""
    manifest = bundle.manifest
    positive = manifest.positive.astype(np.float32)
    encoded = engine.encode(pad_histories([case.history.part(0, case.split)]))
    if case.split is not None:
        encoded = engine.extend(encoded, pad_histories([case.history.part(case.split)]))
    queries = engine.retrieve(encoded, positive[None])[0]
    logits = engine.rank(encoded, case.candidates[None], np.array([case.surface]), np.array([case.now_ms]))[0]
    near = bundle.item_vectors[case.candidates]
    exact, tied = _served(manifest, case.logits, _similarity(near, case.queries))
    ranked = _best(_served(manifest, logits, _similarity(near, queries))[0], TOP)
    similarity = _similarity(items, case.queries)
    found = _best(_similarity(items, queries), TOP)
    return (
        _overlap(exact, ranked, tied[ranked]),
        _overlap(exact, ranked, 0.0),
        _overlap(similarity, found, TIED_SIMILARITY),
        _overlap(similarity, found, 0.0),
        float((case.queries * queries).sum(axis=-1).min()),
        max(0.0, float((np.abs(case.logits - logits) - LOGIT_ROUNDING * np.abs(case.logits)).max())),
    )


def _served(
    manifest: Manifest, logits: NDArray[np.float32], similarity: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the bundle orders candidates by [k], and how far apart two of them may be and still count as tied."""
    positive = manifest.positive.astype(np.float64)
    chances, order = sigmoid(logits), manifest.order
    values, tied = chances @ positive, TIED_LOGIT * (chances * (1.0 - chances)) @ positive
    scoring = Scoring.of(manifest)
    if order is None or scoring is None or order.by == "value":
        return values, tied
    if order.by == "retrieval":
        return similarity.astype(np.float64), np.full(len(similarity), TIED_SIMILARITY)
    tied_share, tied_logit = tied / values, scoring.retrieval_scale * TIED_SIMILARITY
    if order.by == "blend":
        scores = scoring.blend(values, similarity)
        return scores, scores * (tied_share + scoring.retrieval_weight * tied_logit)
    return scoring.product(logits, positive, similarity), tied_share + tied_logit


def _similarity(items: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarity [N] of items [N, E] with the query, of [Q, E], that each is most similar to."""
    similarity: NDArray[np.float32] = (items @ queries.T).max(axis=1)
    return similarity


def _best(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Places of the largest values, best first, equal ones in order."""
    return np.argsort(-values, kind="stable")[:count]


def _overlap(exact: NDArray[Any], chosen: NDArray[np.int64], tied: NDArray[np.float64] | float) -> float:
    """Share of the chosen that are among as many best by `exact`, or no more than `tied` below the last of them."""
    last = exact[_best(exact, len(chosen))[-1]]
    return float((exact[chosen] >= last - tied).mean())
