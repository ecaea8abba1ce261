"""What a module must keep before it is traced: shapes, and that its five methods agree with each other.

Parity proves that each graph computes what its method computes. It does not see that `extend` forgot the positions, or
that `encode` reads the padding; such a bundle passes every other check and answers wrongly. All of this runs in PyTorch
on short random histories of the module's own items, and once on the longest history.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unipinrec.errors import ContractError
from unipinrec.export.checks.probe import (
    CANDIDATES,
    TOLERANCE,
    EncodedHistories,
    Outputs,
    Probe,
    ProbeError,
    difference,
    state_of,
    window,
    with_junk,
    wrong,
)
from unipinrec.export.protocol import Events, ExportSource
from unipinrec.runtime.bundle.bundle import wrong_rows

SATURATED = 36.0  # The sigmoid of larger numbers is 1 in double precision.
BIDIRECTIONAL = (
    "if this is how the model is meant (bidirectional attention, positions counted from the end), export with "
    'cache="none": each request then encodes its whole history'
)
log = logging.getLogger(__name__)


def check_contract(source: ExportSource) -> None:
    """Check a module and its catalogue, without a trace. Takes seconds; puts the module in eval mode.

    Raises:
        ContractError: Lists every violation with its size and a remedy. What a wrong description or a wrong shape hides
            is only looked for once those are right.
    """
    problems = list(source.problems())
    if not problems:
        source.module.eval()
        with torch.inference_mode():
            problems = _module_problems(source)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ContractError(f"{type(source.module).__name__} cannot be exported:{lines}")


def _module_problems(source: ExportSource) -> list[str]:
    probe = Probe(source)
    found: list[str] = []
    for stage in STAGES:
        for check in stage:
            try:
                found += check(probe)
            except ProbeError as error:
                found.append(str(error))
        if found:
            break
    return list(dict.fromkeys(found))


def _item_vectors(probe: Probe) -> Iterator[str]:
    """Item vectors are the same alone as among others, and of unit length where similarity is the cosine."""
    vectors, shape = {"item vectors": probe.vectors}, (len(probe.rows), probe.spec.item_dim)
    if found := list(wrong("embed_items", vectors, {"item vectors": shape})):
        yield from found
        return
    if off := difference({"item vectors": probe.embed(probe.rows)}, vectors):
        yield f"embed_items returns other vectors on the second call: {off}; it must not draw random numbers"
        return
    if off := difference({"item vectors": torch.cat([probe.embed(rows) for rows in probe.rows.split(3)])}, vectors):
        yield f"embed_items: a vector depends on the other items of the call: {off}; embed each item for itself"
    tables = {"catalogue": probe.vectors}
    if probe.source.has_content:
        tables["unknown (row -1)"] = probe.embed(probe.rows, known=False)
    for what, table in tables.items():
        if probe.spec.similarity == "cosine" and len(rows := wrong_rows(table.numpy(), "cosine")):
            yield (
                f"embed_items: {len(rows)} of {len(table)} vectors of {what} items are not of unit length, one has "
                f'{float(table[rows[0]].norm()):.3g}; normalise them, or export with similarity="dot"'
            )


def _history_shapes(probe: Probe) -> Iterator[str]:
    """`encode` and `extend` return what `ModelSpec` says."""
    yield from _wrong_history(probe, "encode", probe.encoded, probe.longest + probe.spec.kv_prefix_slots)
    if probe.spec.cache == "prefix":
        added, past = probe.step
        yield from _wrong_history(probe, "extend", probe.extend(added, past), added.surfaces.shape[1])


def _wrong_history(probe: Probe, method: str, encoded: EncodedHistories, slots: int) -> Iterator[str]:
    spec, batch, count = probe.spec, len(encoded.hidden), len(encoded.key_values)
    if count != spec.num_layers:
        yield f"{method} gives keys and values of {count} layers, the source says num_layers={spec.num_layers}"
    shape = (batch, spec.num_kv_heads, slots, spec.head_dim)
    shapes = dict.fromkeys(encoded.outputs(), shape) | {"hidden state": (batch, spec.hidden_size)}
    yield from wrong(method, encoded.outputs(), shapes)


def _queries(probe: Probe) -> Iterator[str]:
    """Queries have the width of items, and a length or a last number that suits the similarity."""
    spec, hidden = probe.spec, probe.encoded.hidden
    queries = probe.retrieve(hidden)
    count = max(1, queries.shape[1]) if queries.ndim == 3 else 1
    if found := list(wrong("retrieve", {"queries": queries}, {"queries": (len(hidden), count, spec.item_dim)})):
        yield from found
        return
    norms = queries.norm(dim=-1)
    if spec.similarity == "cosine" and len(wrong_rows(queries.flatten(0, 1).numpy(), "cosine")):
        yield (
            f"retrieve: queries have lengths from {norms.min():.3g} to {norms.max():.3g}; normalise them, or export "
            'with similarity="dot"'
        )
    if spec.item_bias and (off := float((queries[..., -1] - 1).abs().max())) > TOLERANCE:
        yield f"retrieve: the last number of a query is off 1 by {off:.2g}; with item_bias it multiplies the bias"
    if spec.outcome_conditioned and torch.equal(queries, probe.retrieve(hidden, 0.0)):
        yield "retrieve: queries do not depend on the outcomes; use them, or export with outcome_conditioned=False"


def _logit_shapes(probe: Probe) -> Iterator[str]:
    """`rank` gives a logit for each history, candidate and action."""
    if probe.spec.ranker is not None:
        shape = (len(probe.lengths), CANDIDATES, len(probe.source.actions))
        yield from wrong("rank", {"logits": probe.rank(probe.state, probe.items)}, {"logits": shape})


def _repeatable(probe: Probe) -> Iterator[str]:
    """The same call gives the same result."""
    calls: dict[str, Callable[[], Outputs]] = {
        "encode": lambda: probe.encode(probe.events).outputs(),
        "retrieve": lambda: {"queries": probe.retrieve(probe.encoded.hidden)},
    }
    if probe.spec.ranker is not None:
        calls["rank"] = lambda: {"logits": probe.rank(probe.state, probe.items)}
    if probe.spec.cache == "prefix":
        calls["extend"] = lambda: probe.extend(*probe.step).outputs()
    for method, call in calls.items():
        if off := difference(call(), call()):
            yield f"{method} returns other values on the second call: {off}; draw no random numbers, and keep no state"


def _encode_padding(probe: Probe) -> Iterator[str]:
    """A history alone gives what it gives in a batch, at any width, over any padding."""
    prefix, batch = probe.spec.kv_prefix_slots, f"in a batch of {probe.lengths}"
    wide = window(probe.events, range(len(probe.lengths)), [0] * len(probe.lengths), probe.lengths, probe.extra)
    spoiled = f"with large numbers in its padding of {probe.extra} more columns"
    for where, encoded in ((batch, probe.encoded), (spoiled, probe.encode(with_junk(wide)))):
        for row, length in enumerate(probe.lengths):
            expected = probe.alone(row, length).part(0, 0, prefix + length)
            if off := difference(encoded.part(row, 0, prefix + length), expected):
                yield (
                    f"encode: a history of {length} events alone is not what it is {where}: {off}; mask the padding by "
                    "`lengths`, and let nothing depend on other rows or the width"
                )
                return


def _growth(probe: Probe) -> Iterator[str]:
    """Cached keys and values stay true when a history grows, and `extend` goes on from them as `encode` would."""
    if probe.spec.cache != "prefix":
        return
    grows = True
    for check in (_prefixes, _steps):
        for problem in check(probe):
            grows = False
            yield problem
    if grows:
        yield from _batched_steps(probe)
    else:
        yield BIDIRECTIONAL


def _prefixes(probe: Probe) -> Iterator[str]:
    prefix, total = probe.spec.kv_prefix_slots, probe.longest
    for cut in _cuts(total):
        known, later = (probe.alone(0, length).part(0, 0, prefix + cut) for length in (cut, total))
        del known["hidden state"]
        if off := difference(later, known):
            yield (
                f"encode: keys and values of the first {cut} of {total} events change when the later ones are known: "
                f"{off}; attend to earlier events alone, and count positions from the first"
            )
            return


def _steps(probe: Probe) -> Iterator[str]:
    total = probe.longest
    for cut in _cuts(total):
        if off := _step_off(probe, [0], [cut], [total]):
            yield (
                f"extend: {cut} cached and {total - cut} new events are not what encode gives for {total}: {off}; "
                "positions go on at past.lengths, times at past.timestamps_ms, and new events see the cached ones"
            )
            return


def _batched_steps(probe: Probe) -> Iterator[str]:
    total, short = probe.lengths[:2]
    for cuts in ([total // 2, 1], [total - 1, 1], [1, short - 1]):
        for junk in (False, True):
            if off := _step_off(probe, [0, 1], cuts, [total, short], junk):
                values = "large numbers" if junk else "other events"
                yield (
                    f"extend: in a batch, pasts of {cuts} and new events of {[total - cuts[0], short - cuts[1]]} with "
                    f"{values} in the padding are not what encode gives for {[total, short]}: {off}; mask cached slots "
                    "by past.lengths and new events by `lengths`"
                )
                return


def _cuts(total: int) -> list[int]:
    return sorted({1, total // 2, total - 1})


def _step_off(probe: Probe, rows: list[int], cuts: list[int], totals: list[int], junk: bool = False) -> str:
    """Difference of histories in two steps from the same histories at once; empty if there is none."""
    events, prefix, new = probe.events, probe.spec.kv_prefix_slots, [t - c for t, c in zip(totals, cuts, strict=True)]
    head, tail = window(events, rows, [0] * len(rows), cuts), window(events, rows, cuts, new, probe.extra * junk)
    state = state_of(probe.encode(head), head)
    past = state.with_junk(prefix).past if junk else state.past
    added = probe.extend(with_junk(tail) if junk else tail, past)
    for index, (row, cut, total) in enumerate(zip(rows, cuts, totals, strict=True)):
        whole = probe.alone(row, total)
        if off := difference(added.part(index, 0, total - cut), whole.part(0, prefix + cut, prefix + total)):
            return off
    return ""


def _candidates(probe: Probe) -> Iterator[str]:
    """A candidate alone gives what it gives among others, few or many."""
    if probe.spec.ranker is None:
        return
    among = probe.rank(probe.state, probe.items)
    for chosen in ([0], [CANDIDATES - 1], [*range(CANDIDATES)] * 10):
        if off := difference({"logits": probe.rank(probe.state, probe.items[chosen])}, {"logits": among[:, chosen]}):
            yield (
                f"rank: candidates among {len(chosen)} are not what they are among {CANDIDATES}: {off}; a candidate "
                "must see the history and itself, not other candidates or their number"
            )
            return


def _rank_padding(probe: Probe) -> Iterator[str]:
    """A history's logits do not depend on other rows, or on slots beyond its length."""
    if probe.spec.ranker is None:
        return
    prefix, spoiled = probe.spec.kv_prefix_slots, "with large numbers in more slots beyond past.lengths"
    states = {f"in a batch of {probe.lengths}": probe.state, spoiled: probe.state.with_junk(prefix)}
    for where, state in states.items():
        logits = probe.rank(state, probe.items)
        for row, length in enumerate(probe.lengths):
            expected = {"logits": probe.rank(probe.state.row(row, prefix + length), probe.items)}
            if off := difference({"logits": logits[row : row + 1]}, expected):
                yield (
                    f"rank: a history of {length} events alone is not what it is {where}: {off}; mask slots by "
                    "past.lengths, and let nothing depend on other rows or the width"
                )
                return


def _query_rows(probe: Probe) -> Iterator[str]:
    """A history's queries do not depend on other rows."""
    hidden = probe.encoded.hidden
    alone = torch.cat([probe.retrieve(row) for row in hidden.split(1)])
    if off := difference({"queries": probe.retrieve(hidden)}, {"queries": alone}):
        yield f"retrieve: a row depends on the other rows: {off}; leave the batch axis alone"


def _order(probe: Probe) -> Iterator[str]:
    """The logits can order candidates. An action that cannot is worth a warning, unless no action can."""
    if probe.spec.ranker is None or len(probe.vectors.unique(dim=0)) < 2:
        return
    logits = probe.rank(probe.state, probe.items)
    problems = []
    for index, name in enumerate(probe.source.actions):
        own = logits[..., index]
        largest, spread = float(own.abs().max()), float((own.amax(1) - own.amin(1)).max())
        if spread <= 1e-6 * largest:
            problems.append(f"{name!r} gives every candidate the same logit ({float(own[0, 0]):.3g})")
        elif ((own > SATURATED).sum(1) > 1).any():
            problems.append(f"{name!r} has logits of {float(own.max()):.3g}: beyond {SATURATED:g} a probability is 1")
    order = probe.source.order
    if (order is None or order.by == "value") and len(problems) == len(probe.source.actions):
        yield (
            f"rank cannot order candidates: action {'; '.join(problems)}; scale large logits down, or export without a "
            "ranker: ranker=None"
        )
    elif problems:
        log.warning("rank cannot order candidates by every action: %s", "; ".join(problems))


def _longest_history(probe: Probe) -> Iterator[str]:
    """All methods take histories of up to `max_history` events; in a batch, padding may lie beyond that."""
    most, where = probe.spec.max_history, "encode"
    try:
        long = probe.histories([most])
        encoded = probe.encode(long)
        yield from wrong("encode", encoded.outputs(), {"hidden state": (1, probe.spec.hidden_size)})
        if probe.spec.ranker is not None:
            where = "rank"
            probe.rank(state_of(encoded, long), probe.items)
        if probe.spec.cache == "prefix":
            where = f"extend of {most - 1} cached events by 1, beside a row of 1 cached and more new ones,"
            if off := difference({"hidden state": _last_step(probe, long, encoded)}, {"hidden state": encoded.hidden}):
                yield f"extend: the last of max_history={most} events is not what encode gives: {off}"
    except ProbeError as error:
        yield (
            f"{where} at max_history={most}: {error}; have positions for that many events, clamp those of padding, or "
            "lower max_history"
        )


def _positions(probe: Probe) -> Iterator[str]:
    """If the first events have positions that differ, all up to `max_history` have: a table may end before that.

    The keys of the first layer show it, for equal events depend on their position alone there.
    """
    most = probe.spec.max_history
    if not probe.spec.num_layers or most < 4:
        return
    long = probe.histories([most])
    equal = {name: tensor[:, :1].expand_as(tensor) for name, tensor in vars(long).items() if name != "lengths"}
    key = probe.encode(Events(**equal, lengths=long.lengths)).key_values[0][0][0, :, probe.spec.kv_prefix_slots :]
    differs = (key[:, 1:] - key[:, :-1]).abs().amax((0, 2)) > 1e-6 * key.abs().amax()
    known = int(differs.sum()) + 1
    if 2 < known < most and bool(differs[: known - 1].all()):
        yield (
            f"encode: only the first {known} positions differ, while max_history={most}; export with "
            f"max_history={known}, or with a table of {most} positions"
        )


def _last_step(probe: Probe, long: Events, encoded: EncodedHistories) -> Tensor:
    """The hidden state of the longest history, its last event added to all others; a second row makes padding."""
    most, slots = probe.spec.max_history, probe.spec.kv_prefix_slots + probe.spec.max_history - 1
    head = window(long, [0, 0], [0, 0], [most - 1, 1])
    tail = window(long, [0, 0], [most - 1, 1], [1, min(8, most - 1)])
    cut = [tuple(tensor[:, :, :slots].expand(2, -1, -1, -1) for tensor in pair) for pair in encoded.key_values]
    past = state_of(EncodedHistories([(key, value) for key, value in cut], encoded.hidden), head).past
    return probe.extend(tail, past).hidden[:1]


Check = Callable[[Probe], Iterator[str]]
# What a stage finds would only be repeated, in worse words, by the next one.
STAGES: tuple[tuple[Check, ...], ...] = (
    (_item_vectors, _history_shapes, _queries, _logit_shapes),
    (_repeatable,),
    (
        *(_encode_padding, _growth, _query_rows),
        *(_rank_padding, _candidates, _order, _longest_history, _positions),
    ),
)
