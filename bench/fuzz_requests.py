"""Every request of a client is rejected with a documented reason, or answered correctly.

The first byte of an input selects its form: the raw body of a route, or choices that make a probably valid body. The
stored bundle of the tests answers valid bodies, and the answer is checked.
Usage: see bench/fuzzing.py.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing

with contextlib.ExitStack() as stack:
    if fuzzing.CHILD in sys.argv:
        atheris = importlib.import_module("atheris")
        stack.enter_context(atheris.instrument_imports(include=["unipinrec"]))
    from unipinrec.errors import RequestError
    from unipinrec.runtime.recommender import Recommender
    from unipinrec.runtime.requests import parse_events
    from unipinrec.runtime.server.bodies import (
        ApiError,
        Limits,
        decode_events,
        decode_rank,
        decode_recommend,
        decode_similar,
    )
    from unipinrec.runtime.server.similar import similar_items
    from unipinrec.runtime.server.v2.codec import decode_infer, encode_infer, wanted_outputs
    from unipinrec.runtime.server.v2.graphs import GraphLimits, check_graph_inputs, output_names, run_graph
    from unipinrec.runtime.validation import read_history, usable

STORED = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "bundle_v1"
NOW_MS = 1_800_000_000_000
LIMITS = Limits(batch=4, history=20, events=10, candidates=30, k=30, items=5, id_characters=20)
GRAPHS = ("encoder", "extend", "retrieval", "ranker")
RECOMMENDER = Recommender.load(STORED, "cpu", verify=False)
BUNDLE = RECOMMENDER.bundle
WORDS = (
    *("user", "history", "item", "item-3", "actions", "click", "save", "surface", "home", "unknown", "timestamp_ms"),
    *(
        "k",
        "candidates",
        "weights",
        "outcomes",
        "exclude",
        "exclude_seen",
        "own_candidates",
        "skip_unknown",
        "allow",
        "categories",
        "kind",
        "exact",
    ),
    *("truncate", "now_ms", "events", "items", "id", "inputs", "outputs", "shape", "datatype", "FP32", "INT64", "data"),
    *("parameters", "binary_data_size", "binary_data", "binary_data_output", "name", "true", "false", "null", "1e999"),
    *("\\ud800", "9223372036854775808", "-0.0", "[[", "]]", "253402300800000", "last_hidden_state", "lengths"),
)


def target(data: bytes) -> None:
    """One input."""
    if not data:
        return
    kind, body = data[0] % 9, data[1:]
    with contextlib.suppress(RequestError, ApiError):
        if kind == 0:
            _recommend(body)
        elif kind == 1:
            decode_events(body, LIMITS, NOW_MS)
        elif kind == 2:
            _similar(body)
        elif kind == 3 and body:
            _infer(GRAPHS[body[0] % 4], body[1:], None)
        elif kind == 4 and len(body) > 2:
            _infer(GRAPHS[body[0] % 4], body[3:], str(int.from_bytes(body[1:3], "little")))
        elif kind == 5:
            read_history(parse_events(body), BUNDLE.manifest, BUNDLE.rows)
        elif kind == 6:
            _recommend(json.dumps(_likely(body)).encode())
        elif kind == 7:
            _infer("retrieval", *_likely_inference(body))
        elif kind == 8:
            _rank(body)


def _recommend(body: bytes) -> None:
    decoded = decode_recommend(body, LIMITS)
    for asked in decoded if isinstance(decoded, tuple) else (decoded,):
        events = asked.history or ()
        request = asked.request(events)
        slate = RECOMMENDER.recommend_many([request])[0]
        usable(events, BUNDLE)
        assert len(slate.items) == asked.k
        assert len({item.item for item in slate.items}) == asked.k
        assert not {item.item for item in slate.items} & set(asked.exclude)
        assert all(math.isfinite(item.score) for item in slate.items)
        assert [item.score for item in slate.items] == sorted((item.score for item in slate.items), reverse=True)


def _rank(body: bytes) -> None:
    decoded = decode_rank(body, LIMITS)
    for asked in decoded if isinstance(decoded, tuple) else (decoded,):
        slate = RECOMMENDER.recommend_many([asked.request(asked.history or ())])[0]
        ranked = [item.item for item in slate.items]
        assert sorted([*ranked, *slate.unknown]) == sorted({str(item) for item in asked.items})
        assert [item.score for item in slate.items] == sorted((item.score for item in slate.items), reverse=True)


def _similar(body: bytes) -> None:
    asked = decode_similar(body, LIMITS)
    answer = similar_items(RECOMMENDER, asked)
    assert len(answer.items) == asked.k
    assert not {item.item for item in answer.items} & {str(item) for item in asked.items}


def _infer(graph: str, body: bytes, header_length: str | None) -> None:
    request, inputs = decode_infer(body, header_length)
    wanted_outputs(request, output_names(graph, RECOMMENDER))
    check_graph_inputs(graph, RECOMMENDER, inputs, GraphLimits(batch=4, candidates=30, work_bytes=1 << 20))
    outputs = run_graph(graph, RECOMMENDER, inputs)
    assert encode_infer(request, graph, "v", outputs).body


def _likely(data: bytes) -> dict[str, Any]:
    """A recommendation that may well be answered."""
    choose = fuzzing.Choices(data)
    time = choose.one_of(0, NOW_MS, None)
    events = []
    for _ in range(choose.one_of(3, 1, 8, 12, 21, 0)):
        event: dict[str, Any] = {
            "item": _item(choose),
            "actions": choose.one_of([], ["click"], ["click", "save"], ["none"]),
        }
        if choose.number(2):
            event["surface"] = choose.one_of("home", "unknown", "elsewhere")
        if time is not None:
            time += choose.one_of(0, 1, 86_400_000, 0, 0, -1)
            event["timestamp_ms"] = choose.one_of(time, time, time, None)
        events.append(event)
    body: dict[str, Any] = {"history": events, "k": choose.one_of(3, 1, 24, 30, 0, -1)}
    options: dict[str, Callable[[], Any]] = {
        "user": lambda: choose.one_of("u", "", "v" * 21),
        "candidates": lambda: choose.one_of(5, 30, 0),
        "weights": lambda: choose.one_of({"save": 1}, {"click": -1e300, "save": 1e300}, {"none": 1}, {"save": 0}, {}),
        "outcomes": lambda: choose.one_of([], ["save"]),
        "exclude": lambda: [_item(choose) for _ in range(choose.number(4))],
        "allow": lambda: [_item(choose) for _ in range(choose.number(20))],
        "categories": lambda: choose.one_of({"kind": ["a"]}, {"kind": []}, {}, {"kind": ["z"]}, {"size": ["a"]}),
        "exclude_seen": lambda: False,
        "exact": lambda: True,
        "truncate": lambda: False,
        "now_ms": lambda: choose.one_of(NOW_MS * 2, 0, 2**63, -1),
        "surface": lambda: choose.one_of("home", "nowhere"),
    }
    for name, value in options.items():
        if choose.number(3) == 2:
            body[name] = value()
    return body


def _item(choose: fuzzing.Choices) -> str | int:
    item: str | int = choose.one_of(f"item-{choose.number(30)}", "item-1", "item-2", 3, "")
    return item


def _likely_inference(data: bytes) -> tuple[bytes, str]:
    """An inference with binary inputs that may well run."""
    choose = fuzzing.Choices(data)
    rows = choose.one_of(1, 2, 4, 5, 0)
    numbers = data[8 : 8 + 32 * rows].ljust(32 * rows, b"\0")
    size = len(numbers) + choose.one_of(0, 0, 0, 1, -1, 2**40)
    shape, parameters = [rows, choose.one_of(8, 8, 8, 4)], {"binary_data_size": size}
    tensor = {"name": "last_hidden_state", "shape": shape, "datatype": "FP32", "parameters": parameters}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": bool(choose.number(2))}}).encode()
    return header + numbers, str(len(header) + choose.one_of(0, 0, 0, 1, -1))


def _seeds() -> list[bytes]:
    history = [{"item": "item-3", "actions": ["click"], "surface": "home", "timestamp_ms": 1_700_000_000_000}]
    recommend = {"history": history, "k": 2, "weights": {"save": 1}, "exclude": ["item-1"], "user": "u"}
    hidden = {"name": "last_hidden_state", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8}
    bodies: list[tuple[int, Any]] = [
        (0, recommend),
        (0, [recommend, {"user": "u"}]),
        (8, {"history": history, "items": ["item-1", 2, "item-3"], "skip_unknown": True}),
        (1, {"user": "u", "events": [{**history[0], "id": "a"}]}),
        (2, {"items": ["item-1", 2], "k": 3, "exclude": ["item-4"], "categories": {"kind": ["a"]}}),
        (5, history),
    ]
    graphs = {name: [spec.name for spec in BUNDLE.manifest.graphs[name].inputs] for name in GRAPHS}
    seeds = [bytes([kind]) + json.dumps(body).encode() for kind, body in bodies]
    seeds += [bytes([3, 2]) + json.dumps({"id": "x", "inputs": [hidden], "outputs": [{"name": "queries"}]}).encode()]
    for index, names in enumerate(graphs.values()):
        inputs = [{"name": name, "shape": [1], "datatype": "INT64", "data": [1]} for name in names]
        seeds.append(bytes([3, index]) + json.dumps({"inputs": inputs}).encode())
    return [*seeds, bytes([6]) + bytes(40), bytes([7]) + bytes(60), bytes([6]) + bytes(range(200))]


if __name__ == "__main__":
    fuzzing.main(__file__, target, _seeds(), WORDS, longest=4096)
