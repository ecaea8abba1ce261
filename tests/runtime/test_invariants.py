"""The five invariants on every backend, as properties of a real exported bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.runtime import Event, Recommender, RecommendOptions, Request, verify_bundle
from unipinrec.runtime.device import Machine
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.requests import History

TOLERANCE = 1e-4
MAX_EVENTS, ITEMS, ACTIONS = 64, 300, 4
NOW_MS = 1_760_000_000_000
lengths = st.lists(st.integers(1, MAX_EVENTS), min_size=1, max_size=4)
counts = st.integers(1, 40)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def recommender(bundle: Path, device: str, machine: Machine) -> Recommender:
    return Recommender.load(bundle, device, machine=machine)


@pytest.fixture(scope="module")
def engine(recommender: Recommender) -> Engine:
    return recommender.engine


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> UniPinRec:
    return load_checkpoint(checkpoint).model


def random_history(rng: np.random.Generator, events: int) -> History:
    gaps = (10 ** rng.uniform(0, 10.5, events)).astype(np.int64)  # a millisecond to a year
    times = NOW_MS - gaps[::-1].cumsum()[::-1]
    times[: rng.integers(0, events + 1)] = -1
    return History(
        item_rows=rng.integers(0, ITEMS, events),
        actions=(rng.random((events, ACTIONS)) < 0.4).astype(np.float32),
        surfaces=rng.integers(0, 2, events),
        timestamps_ms=times,
    )


def ranked(engine: Engine, histories: list[History], candidates: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [B, k, C] through encoder and ranker."""
    batch = len(histories)
    encoded = engine.encode(pad_histories(histories))
    return engine.rank(encoded, candidates, np.zeros(batch, np.int64), np.full(batch, NOW_MS))


@torch.inference_mode()
def one_pass(
    model: UniPinRec, table: torch.Tensor, history: History, candidates: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits [k, C] and query [E] from one pass of PyTorch over [history ; candidates] with the dense joint mask."""
    events, count = len(history), len(candidates)
    tokens = HistoryTokens(
        vectors=table[torch.from_numpy(history.item_rows)][None],
        actions=torch.from_numpy(history.actions)[None],
        surfaces=torch.from_numpy(history.surfaces)[None],
        timestamps_ms=torch.from_numpy(history.timestamps_ms)[None],
        lengths=torch.tensor([events]),
    )
    slate = CandidateTokens(
        vectors=table[torch.from_numpy(candidates)][None],
        surfaces=torch.zeros(1, count, dtype=torch.int64),
        timestamps_ms=torch.full((1, count), NOW_MS),
        cutoffs=torch.full((1, count), events),
    )
    hidden, shown = model.joint(tokens, torch.zeros(1, events), slate, dense_mask=True)
    return model.action_heads(shown)[0].numpy(), model.retrieve(hidden[:, -1])[0, 0].numpy()


@quick
@given(lengths=lengths, count=counts, seed=seeds)
def test_split_equals_whole(engine: Engine, model: UniPinRec, lengths: list[int], count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    histories = [random_history(rng, n) for n in lengths]
    candidates = rng.integers(0, ITEMS, (len(lengths), count))
    table = torch.from_numpy(np.array(engine.item_vectors))
    logits = ranked(engine, histories, candidates)
    queries = engine.retrieve(engine.encode(pad_histories(histories)), np.zeros((len(lengths), ACTIONS), np.float32))
    for row, history in enumerate(histories):
        expected_logits, expected_query = one_pass(model, table, history, candidates[row])
        np.testing.assert_allclose(logits[row], expected_logits, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(queries[row, 0], expected_query, atol=TOLERANCE, rtol=0)


@quick
@given(data=st.data(), lengths=st.lists(st.integers(2, MAX_EVENTS), min_size=1, max_size=4), seed=seeds)
def test_extending_equals_encoding_at_once(engine: Engine, data: st.DataObject, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    histories = [random_history(rng, n) for n in lengths]
    cuts = [data.draw(st.integers(1, n - 1), label="cut") for n in lengths]
    whole = engine.encode(pad_histories(histories))
    past = engine.encode(pad_histories([h.part(0, m) for h, m in zip(histories, cuts, strict=True)]))
    grown = engine.extend(past, pad_histories([h.part(m) for h, m in zip(histories, cuts, strict=True)]))
    np.testing.assert_array_equal(grown.lengths, whole.lengths)
    np.testing.assert_array_equal(grown.last_timestamps_ms, whole.last_timestamps_ms)
    np.testing.assert_allclose(grown.last_hidden_state.numpy(), whole.last_hidden_state.numpy(), atol=TOLERANCE, rtol=0)
    for old, new in zip(whole.key_values, grown.key_values, strict=True):
        for row, length in enumerate(lengths):
            slots = length + engine.model.kv_prefix_slots
            np.testing.assert_allclose(new.numpy()[row, :, :slots], old.numpy()[row, :, :slots], atol=TOLERANCE, rtol=0)


@quick
@given(length=st.integers(1, MAX_EVENTS), count=st.integers(2, 40), seed=seeds)
def test_a_score_depends_on_nothing_else(engine: Engine, length: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    history = random_history(rng, length)
    candidates = rng.integers(0, ITEMS, (1, count))
    together = ranked(engine, [history], candidates)[0]
    order = rng.permutation(count)
    np.testing.assert_allclose(ranked(engine, [history], candidates[:, order])[0], together[order], atol=1e-5, rtol=0)
    np.testing.assert_allclose(ranked(engine, [history], candidates[:, :1])[0, 0], together[0], atol=1e-5, rtol=0)
    strangers = [random_history(rng, n) for n in (MAX_EVENTS, 1)]
    batch = np.concatenate([rng.integers(0, ITEMS, (1, count)), candidates, rng.integers(0, ITEMS, (1, count))])
    in_a_batch = ranked(engine, [strangers[0], history, strangers[1]], batch)[1]
    np.testing.assert_allclose(in_a_batch, together, atol=1e-5, rtol=0)


def test_golden_outputs_reproduce_here(bundle: Path, device: str, machine: Machine) -> None:
    report = verify_bundle(bundle, device, machine=machine)
    assert report.ok
    outputs = {check.output for check in report.golden}
    assert {"encoder.present.1.value", "extend.last_hidden_state", "retrieval.queries", "ranker.logits"} <= outputs
    assert 0 < max(check.max_abs_diff or 0.0 for check in report.golden) < TOLERANCE


@quick
@given(lengths=lengths, seed=seeds)
def test_the_same_request_has_the_same_answer(recommender: Recommender, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    histories = [events_of(recommender, random_history(rng, n)) for n in lengths]
    options = RecommendOptions(now_ms=NOW_MS, candidates=50)
    batched = recommender.recommend_many([Request(history=h, k=10, options=options) for h in histories])
    for history, slate in zip(histories, batched, strict=True):
        alone, again = (recommender.recommend(history, 10, options) for _ in range(2))
        assert alone.items == again.items
        # Sums in another order differ in the last bit, so only items of equal score may change places.
        scores = {item.item: item.score for item in slate.items}
        np.testing.assert_allclose(sorted(scores.values()), sorted(item.score for item in alone.items), atol=1e-5)
        for item in alone.items:
            assert abs(scores.get(item.item, slate.items[-1].score) - item.score) < 1e-5


@quick
@given(data=st.data(), length=st.integers(2, MAX_EVENTS), seed=seeds)
def test_a_cached_start_gives_the_same_scores(
    recommender: Recommender, data: st.DataObject, length: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    history = events_of(recommender, random_history(rng, length))
    candidates = [recommender.bundle.item_ids[row] for row in rng.integers(0, ITEMS, 20)]
    options = RecommendOptions(now_ms=NOW_MS)
    cut = data.draw(st.integers(1, length - 1), label="cut")
    extended = recommender.score(history, candidates, options, extend_at=cut)
    np.testing.assert_allclose(extended, recommender.score(history, candidates, options), atol=TOLERANCE, rtol=0)


def events_of(recommender: Recommender, history: History) -> tuple[Event, ...]:
    """The history as a caller would send it."""
    manifest = recommender.bundle.manifest
    return tuple(
        Event(
            item=recommender.bundle.item_ids[row],
            actions=tuple(name for name, bit in zip(manifest.actions, bits, strict=True) if bit),
            surface=manifest.surfaces[surface],
            timestamp_ms=int(time) if time >= 0 else None,
        )
        for row, bits, surface, time in zip(
            history.item_rows, history.actions, history.surfaces, history.timestamps_ms, strict=True
        )
    )
