"""The promises of the model: what was computed in parts equals what is computed at once, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unipinrec.models.config import AttentionForm
from unipinrec.models.model import CandidateTokens, HistoryTokens, KeyValues, UniPinRec

Make = Callable[..., UniPinRec]
FORMS: tuple[AttentionForm, ...] = ("sink", "self")
N_MAX = 8
NOW = 1_700_000_000_000
TOLERANCE = 1e-5

quick = settings(max_examples=20, deadline=None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One drawn situation: lengths of the rows, number of candidates, seed of all values, and the architecture."""

    seed: int
    lengths: list[int]
    candidates: int
    form: AttentionForm
    kv_heads: int


cases = st.builds(
    Case,
    seed=st.integers(0, 10_000),
    lengths=st.one_of(st.lists(st.integers(1, N_MAX), min_size=1, max_size=4), st.just([1, N_MAX])),
    candidates=st.integers(1, 5),
    form=st.sampled_from(FORMS),
    kv_heads=st.sampled_from([4, 2, 1]),
)


def _model(make_model: Make, case: Case, **overrides: object) -> UniPinRec:
    return make_model(seed=case.seed % 7, attention=case.form, num_kv_heads=case.kv_heads, **overrides)


def _with_mark(make_model: Make, case: Case) -> UniPinRec:
    """The same model with a mark that would be seen."""
    model = _model(make_model, case, mark_masked=True)
    mark = model.token_embedder.logged
    assert mark is not None
    mark.data = torch.randn(mark.shape, generator=torch.Generator().manual_seed(1))
    model.load_state_dict({**_model(make_model, case).state_dict(), "token_embedder.logged": mark.data})
    return model


def _unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn((*shape, 8), generator=generator), dim=-1)


def _history(case: Case) -> HistoryTokens:
    """Random events, right-padded with garbage; some rows begin with events whose time is missing."""
    generator = torch.Generator().manual_seed(case.seed)
    batch, events = len(case.lengths), max(case.lengths)
    gaps = torch.randint(0, 90_000_000, (batch, events), generator=generator)
    times = NOW - 10**10 + gaps.cumsum(1)
    missing = torch.randint(0, events + 3, (batch, 1), generator=generator) - 3
    return HistoryTokens(
        vectors=_unit(generator, batch, events),
        actions=torch.randint(0, 2, (batch, events, 3), generator=generator).float(),
        surfaces=torch.randint(0, 3, (batch, events), generator=generator),
        timestamps_ms=torch.where(torch.arange(events) < missing, -1, times),
        lengths=torch.tensor(case.lengths),
    )


def _slate(case: Case, cutoffs: Tensor | None = None) -> CandidateTokens:
    """Random candidates that see `cutoffs` events (default: all); candidates of one cutoff share surface and time."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    batch = len(case.lengths)
    if cutoffs is None:
        cutoffs = torch.tensor(case.lengths)[:, None].expand(-1, case.candidates)
    surfaces = torch.randint(0, 3, (batch, N_MAX + 1), generator=generator)
    times = NOW + torch.randint(0, 90_000_000, (batch, N_MAX + 1), generator=generator)
    return CandidateTokens(
        vectors=_unit(generator, batch, cutoffs.shape[1]),
        surfaces=surfaces.gather(1, cutoffs),
        timestamps_ms=torch.where(times.gather(1, cutoffs) % 5 == 0, -1, times.gather(1, cutoffs)),
        cutoffs=cutoffs,
    )


def _rows(history: HistoryTokens, begin: int, end: int, row: int) -> HistoryTokens:
    """Events [begin, end) of one row, without padding."""
    span = (slice(row, row + 1), slice(begin, end))
    return HistoryTokens(
        vectors=history.vectors[span],
        actions=history.actions[span],
        surfaces=history.surfaces[span],
        timestamps_ms=history.timestamps_ms[span],
        lengths=torch.tensor([end - begin]),
    )


def _chosen(slate: CandidateTokens, row: int, which: slice | list[int]) -> CandidateTokens:
    """Some candidates of one row."""
    drawn = {f.name: getattr(slate, f.name) for f in fields(slate) if f.name != "logged"}
    return CandidateTokens(**{name: value[row : row + 1, which] for name, value in drawn.items()})


def _last_times(history: HistoryTokens, lengths: Tensor) -> Tensor:
    known = torch.cat([torch.full_like(history.timestamps_ms[:, :1], -1), history.timestamps_ms], dim=1)
    return known.gather(1, lengths[:, None])[:, 0]


def _unmasked(history: HistoryTokens) -> Tensor:
    return torch.zeros_like(history.timestamps_ms).float()


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def _reference(model: UniPinRec, history: HistoryTokens, slate: CandidateTokens) -> tuple[Tensor, Tensor]:
    """Last hidden states and candidate logits by the one-pass forward with a dense mask."""
    hidden, candidates = model.joint(history, _unmasked(history), slate, dense_mask=True)
    return hidden[torch.arange(len(hidden)), history.lengths - 1], model.action_heads(candidates)


def _rank(model: UniPinRec, past: KeyValues, history: HistoryTokens, slate: CandidateTokens) -> Tensor:
    return model.rank(past, history.lengths, _last_times(history, history.lengths), slate)


@quick
@given(case=cases)
def test_encode_then_retrieve_and_rank_equal_one_joint_pass(make_model: Make, case: Case) -> None:
    model, history, slate = _model(make_model, case), _history(case), _slate(case)
    with torch.no_grad():
        last, logits = _reference(model, history, slate)
        past, actual = model.encode(history)
        _close(actual, last)
        _close(model.retrieve(actual), model.retrieve(last))
        _close(_rank(model, past, history, slate), logits)
    slots = max(case.lengths) + (case.form == "sink")
    assert [tuple(t.shape) for pair in past for t in pair] == [(len(case.lengths), case.kv_heads, slots, 4)] * 4


@quick
@given(case=cases, data=st.data())
def test_both_ways_to_attend_in_a_joint_pass_agree(make_model: Make, case: Case, data: st.DataObject) -> None:
    model, history = _model(make_model, case), _history(case)
    cutoffs = [[data.draw(st.integers(0, n)) for _ in range(case.candidates)] for n in case.lengths]
    masked = torch.tensor([[data.draw(st.sampled_from([0.0, 1.0])) for _ in range(max(case.lengths))]])
    slate = _slate(case, torch.tensor(cutoffs))
    with torch.no_grad():
        split = model.joint(history, masked.expand(len(cutoffs), -1), slate)
        dense = model.joint(history, masked.expand(len(cutoffs), -1), slate, dense_mask=True)
    _close(split[0], dense[0])
    _close(split[1], dense[1])


@quick
@given(case=cases, data=st.data())
def test_extending_a_part_equals_encoding_the_whole(make_model: Make, case: Case, data: st.DataObject) -> None:
    """Rows of one batch have pasts of different lengths; both parts are padded with other events, as garbage."""
    case = replace(case, lengths=[max(n, 2) for n in case.lengths])
    model, history = _model(make_model, case), _history(case)
    prefixes = [data.draw(st.integers(1, n - 1)) for n in case.lengths]
    prefix = 1 if case.form == "sink" else 0
    with torch.no_grad():
        whole, last = model.encode(history)
        past, _ = model.encode(replace(history, lengths=torch.tensor(prefixes)))
        past = [(k[:, :, : prefix + max(prefixes)], v[:, :, : prefix + max(prefixes)]) for k, v in past]
        new = _shifted(history, prefixes)
        added, extended = model.extend(new, past, torch.tensor(prefixes), _last_times(history, torch.tensor(prefixes)))
    _close(extended, last)
    for row, (begin, end) in enumerate(zip(prefixes, case.lengths, strict=True)):
        for (key, value), (new_key, new_value) in zip(whole, added, strict=True):
            _close(new_key[row, :, : end - begin], key[row, :, prefix + begin : prefix + end])
            _close(new_value[row, :, : end - begin], value[row, :, prefix + begin : prefix + end])


def _shifted(history: HistoryTokens, prefixes: list[int]) -> HistoryTokens:
    """The events after each row's prefix, right-padded with other events of the row."""
    lengths = history.lengths - torch.tensor(prefixes)
    index = torch.arange(int(lengths.max()))[None] + torch.tensor(prefixes)[:, None]
    index = index % history.timestamps_ms.shape[1]
    return HistoryTokens(
        vectors=history.vectors.gather(1, index[..., None].expand(-1, -1, 8)),
        actions=history.actions.gather(1, index[..., None].expand(-1, -1, 3)),
        surfaces=history.surfaces.gather(1, index),
        timestamps_ms=history.timestamps_ms.gather(1, index),
        lengths=lengths,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_extension_event_by_event_equals_encoding_the_whole(
    make_model: Make, form: AttentionForm, kv_heads: int
) -> None:
    case = Case(seed=3, lengths=[N_MAX], candidates=2, form=form, kv_heads=kv_heads)
    model, history = _model(make_model, case), _history(case)
    with torch.no_grad():
        whole, expected = model.encode(history)
        past, last = model.encode(_rows(history, 0, 1, 0))
        for n in range(1, N_MAX):
            added, last = model.extend(
                _rows(history, n, n + 1, 0), past, torch.tensor([n]), history.timestamps_ms[:, n - 1]
            )
            past = [
                (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))
                for (k, v), (new_k, new_v) in zip(past, added, strict=True)
            ]
    _close(last, expected)
    for (key, value), (other_key, other_value) in zip(past, whole, strict=True):
        _close(key, other_key)
        _close(value, other_value)


@quick
@given(case=cases)
def test_ranking_after_an_extension_equals_ranking_after_encoding(make_model: Make, case: Case) -> None:
    """A cache grown by appending to a row's valid slots serves as well as a fresh one."""
    case = replace(case, lengths=[max(n, 2) for n in case.lengths])
    model, history, slate = _model(make_model, case), _history(case), _slate(case)
    prefix = 1 if case.form == "sink" else 0
    with torch.no_grad():
        past, _ = model.encode(history)
        expected = _rank(model, past, history, slate)
        for row, length in enumerate(case.lengths):
            head = length // 2
            kept, _ = model.encode(_rows(history, 0, head, row))
            times = history.timestamps_ms[row : row + 1, head - 1]
            added, _ = model.extend(_rows(history, head, length, row), kept, torch.tensor([head]), times)
            grown = [(torch.cat([k, n], 2), torch.cat([v, m], 2)) for (k, v), (n, m) in zip(kept, added, strict=True)]
            assert grown[0][0].shape[2] == prefix + length
            one = _chosen(slate, row, slice(None))
            _close(_rank(model, grown, _rows(history, 0, length, row), one)[0], expected[row])


@quick
@given(case=cases, data=st.data())
def test_an_answer_does_not_depend_on_batch_padding_or_other_candidates(
    make_model: Make, case: Case, data: st.DataObject
) -> None:
    model, history, slate = _model(make_model, case), _history(case), _slate(case)
    order = data.draw(st.permutations(range(case.candidates)))
    kept = order[: data.draw(st.integers(1, case.candidates))]
    row = data.draw(st.integers(0, len(case.lengths) - 1))
    alone = _rows(history, 0, case.lengths[row], row)
    some = _chosen(slate, row, kept)
    with torch.no_grad():
        past, last = model.encode(history)
        logits = _rank(model, past, history, slate)
        past_alone, last_alone = model.encode(alone)
        _close(last_alone[0], last[row])
        _close(model.retrieve(last_alone)[0], model.retrieve(last)[row])
        _close(_rank(model, past_alone, alone, some)[0], logits[row, kept])


@quick
@given(case=cases)
def test_garbage_in_padding_changes_nothing(make_model: Make, case: Case) -> None:
    model, history, slate = _model(make_model, case), _history(case), _slate(case)
    padding = torch.arange(max(case.lengths)) >= history.lengths[:, None]
    garbage = HistoryTokens(
        vectors=torch.where(padding[..., None], 1e4, history.vectors),
        actions=torch.where(padding[..., None], -77.0, history.actions),
        surfaces=torch.where(padding, 2, history.surfaces),
        timestamps_ms=torch.where(padding, 4_000_000_000_000, history.timestamps_ms),
        lengths=history.lengths,
    )
    with torch.no_grad():
        past, last = model.encode(history)
        other_past, other_last = model.encode(garbage)
        slots = torch.arange(past[0][0].shape[2]) >= (history.lengths + model.config.kv_prefix_slots)[:, None]
        spoiled = [(k.masked_fill(slots[:, None, :, None], 1e4), v) for k, v in other_past]
        _close(other_last, last)
        _close(_rank(model, spoiled, history, slate), _rank(model, past, history, slate))


@quick
@given(case=cases, data=st.data())
def test_an_event_never_depends_on_later_ones(make_model: Make, case: Case, data: st.DataObject) -> None:
    model, history = _model(make_model, case), _history(case)
    events = max(case.lengths)
    changed = data.draw(st.integers(0, events - 1))
    other = _history(replace(case, seed=case.seed + 1))
    later = torch.arange(events) >= changed
    mixed = HistoryTokens(
        vectors=torch.where(later[None, :, None], other.vectors, history.vectors),
        actions=torch.where(later[None, :, None], other.actions, history.actions),
        surfaces=torch.where(later[None], other.surfaces, history.surfaces),
        timestamps_ms=torch.where(later[None], other.timestamps_ms, history.timestamps_ms),
        lengths=history.lengths,
    )
    end = changed + model.config.kv_prefix_slots
    with torch.no_grad():
        before, after = model.encode(history)[0], model.encode(mixed)[0]
    for (key, value), (other_key, other_value) in zip(before, after, strict=True):
        _close(other_key[:, :, :end], key[:, :, :end])
        _close(other_value[:, :, :end], value[:, :, :end])
        assert not torch.allclose(other_value[:, :, end:], value[:, :, end:])


@quick
@given(case=cases, data=st.data())
def test_slates_in_one_joint_pass_equal_each_slate_alone(make_model: Make, case: Case, data: st.DataObject) -> None:
    """Each slate is ranked after encoding only the events before its cutoff, as a server would."""
    model, history = _model(make_model, case), _history(case)
    count = data.draw(st.integers(1, 3))
    cutoffs = [[data.draw(st.integers(1, n)) for _ in range(count)] for n in case.lengths]
    slate = _slate(case, torch.tensor(cutoffs).repeat_interleave(case.candidates, dim=1))
    with torch.no_grad():
        _, candidates = model.joint(history, _unmasked(history), slate)
        logits = model.action_heads(candidates)
        for row, ends in enumerate(cutoffs):
            for number, end in enumerate(ends):
                span = slice(number * case.candidates, (number + 1) * case.candidates)
                one = _chosen(slate, row, span)
                past, _ = model.encode(_rows(history, 0, end, row))
                _close(_rank(model, past, _rows(history, 0, end, row), one)[0], logits[row, span])


@quick
@given(case=cases, data=st.data())
def test_a_masked_event_does_not_tell_its_actions(make_model: Make, case: Case, data: st.DataObject) -> None:
    model, history, slate = _model(make_model, case), _history(case), _slate(case)
    at = data.draw(st.integers(0, min(case.lengths) - 1))
    masked = _unmasked(history)
    masked[:, at] = 1.0
    flipped = history.actions.clone()
    flipped[:, at] = 1.0 - flipped[:, at]
    with torch.no_grad():
        before = model.joint(history, masked, slate)
        after = model.joint(replace(history, actions=flipped), masked, slate)
        seen = model.joint(replace(history, actions=flipped), _unmasked(history), slate)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(seen[0][:, at], before[0][:, at], atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("marked", [False, True])
def test_a_masked_event_is_computed_as_a_candidate_is(make_model: Make, form: AttentionForm, marked: bool) -> None:
    """Same token but for a mark, same position, same view of the past: what is learned on one holds for the other."""
    case = Case(seed=5, lengths=[6], candidates=1, form=form, kv_heads=2)
    model, history = _with_mark(make_model, case) if marked else _model(make_model, case), _history(case)
    for at in range(6):
        masked = _unmasked(history)
        masked[:, at] = 1.0
        slate = CandidateTokens(
            vectors=history.vectors[:, at : at + 1],
            surfaces=history.surfaces[:, at : at + 1],
            timestamps_ms=history.timestamps_ms[:, at : at + 1],
            cutoffs=torch.tensor([[at]]),
        )
        with torch.no_grad():
            hidden, candidates = model.joint(history, masked, slate)
            _, logged = model.joint(history, masked, replace(slate, logged=torch.ones(1, 1)))
        _close(hidden[:, at], logged[:, 0])
        assert torch.allclose(candidates, logged, atol=1e-3) != marked


@quick
@given(case=cases)
def test_what_serves_knows_nothing_of_the_mark(make_model: Make, case: Case) -> None:
    marked, plain = _with_mark(make_model, case), _model(make_model, case)
    history, slate = _history(case), _slate(case)
    lengths, last = history.lengths, _last_times(history, history.lengths)
    with torch.no_grad():
        for model in (marked, plain):
            cache, hidden = model.encode(history)
            logits = model.rank(cache, lengths, last, slate)
            _, candidates = model.joint(history, _unmasked(history), slate)
            if model is marked:
                expected = hidden, logits, candidates
            else:
                assert all(torch.equal(*pair) for pair in zip((hidden, logits, candidates), expected, strict=True))


def test_a_mask_differs_from_an_event_without_action(make_model: Make) -> None:
    case = Case(seed=5, lengths=[3], candidates=1, form="sink", kv_heads=2)
    model, history, slate = _model(make_model, case), _history(case), _slate(case)
    silent = replace(history, actions=torch.zeros_like(history.actions))
    with torch.no_grad():
        none, _ = model.joint(silent, _unmasked(history), slate)
        hidden, _ = model.joint(silent, torch.ones_like(_unmasked(history)), slate)
    assert float((none - hidden).abs().amin(dim=1).max()) > 1e-3


def test_queries_are_unit_vectors_and_follow_the_outcome(make_model: Make) -> None:
    model = make_model(outcome_conditioned=True)
    last = torch.randn((2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clicks = model.retrieve(last, torch.tensor([[1.0, 0.0, 0.0]]).expand(2, -1))
        likes = model.retrieve(last, torch.tensor([[0.0, 1.0, 0.0]]).expand(2, -1))
    assert clicks.shape == (2, 1, 8)
    torch.testing.assert_close(clicks.norm(dim=-1), torch.ones(2, 1))
    assert not torch.allclose(clicks, likes, atol=1e-2)
    with pytest.raises(ValueError, match="conditioned on outcomes; pass outcomes"):
        model.retrieve(last)


def test_action_heads_are_one_mlp_per_action(make_model: Make) -> None:
    heads = make_model().action_heads
    hidden = torch.randn((5, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = heads(hidden)
        for c in range(3):
            weight, bias = heads.up.weight[16 * c : 16 * (c + 1)], heads.up.bias[16 * c : 16 * (c + 1)]
            alone = torch.nn.functional.silu(hidden @ weight.T + bias) @ heads.down[c] + heads.bias[c]
            _close(logits[:, c], alone)
        assert heads(hidden[:0]).shape == (0, 3)


def test_every_parameter_gets_a_gradient(make_model: Make) -> None:
    case = Case(seed=5, lengths=[3, 8], candidates=2, form="sink", kv_heads=2)
    model = _model(make_model, case, outcome_conditioned=True, mark_masked=True)
    history, slate = _history(case), _slate(case)
    vectors = model.embed_items(torch.arange(11), torch.randn(11, 3), torch.ones((11, 2), dtype=torch.int64))
    history = replace(history, vectors=vectors[torch.arange(16).reshape(2, 8) % 11])
    masked = _unmasked(history)
    masked[:, 1] = 1.0
    hidden, candidates = model.joint(history, masked, slate)
    queries = model.retrieval_head(hidden, history.actions)
    (model.action_heads(candidates).sum() + model.log_scale * (queries * vectors[0]).sum()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []
