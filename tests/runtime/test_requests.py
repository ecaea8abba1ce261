from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unipinrec.errors import RequestError
from unipinrec.runtime import Event, Recommender, RecommendOptions, Request, parse_events
from unipinrec.runtime.bundle.catalogue import Catalogue
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.requests import History, ResolvedRequest, Spread, as_events, check_types
from unipinrec.runtime.validation import default_slack, read_history, resolve_request, window_start

ROWS = {"a": 0, "b": 1, "c": 2, "d": 3, "7": 4}
CATALOGUE = Catalogue(
    rows=ROWS,
    num_rows=5,
    retired=np.array([], np.int64),
    words={"kind": ("red", "blue"), "size": ("s", "m")},
    codes=np.array([[1, 0], [2, 1], [1, 2], [0, 1], [2, 2]], np.int32),
)
T = 1_700_000_000_000


def event(item: str | int = "a", timestamp_ms: Any = None, **fields: Any) -> Event:
    return Event(item=item, actions=fields.pop("actions", ("click",)), timestamp_ms=timestamp_ms, **fields)


def resolve(manifest: Manifest, *events: Event, k: Any = 1, **options: Any) -> ResolvedRequest:
    history = events or (event("a", T),)
    return resolve_request(Request(history=history, k=k, options=RecommendOptions(**options)), manifest, CATALOGUE)


def read(manifest: Manifest, *events: Event, first: int = 0) -> History:
    return read_history(events, manifest, ROWS, first=first)


def test_a_history_becomes_arrays(manifest: Manifest) -> None:
    history = read(
        manifest,
        event("c", actions=()),
        event(7, T, actions=("hide", "click"), surface="search"),
        event("a", np.int64(T)),
    )
    assert history.item_rows.tolist() == [2, 4, 0]
    assert history.actions.tolist() == [[0, 0, 0], [1, 0, 1], [1, 0, 0]]
    assert history.surfaces.tolist() == [0, 2, 0]
    assert history.timestamps_ms.tolist() == [-1, T, T]
    assert (history.item_rows.dtype, history.actions.dtype) == (np.dtype(np.int64), np.dtype(np.float32))
    assert history.part(1, 2).item_rows.tolist() == [4]


def test_an_empty_history_is_valid_and_its_time_unknown(manifest: Manifest) -> None:
    def resolve_empty(**options: Any) -> ResolvedRequest:
        return resolve_request(Request(history=(), k=5, options=RecommendOptions(**options)), manifest, CATALOGUE)

    resolved = resolve_empty(weights={"hide": -1.0})
    assert (len(resolved.history), resolved.history.actions.shape, resolved.excluded.tolist()) == (0, (0, 3), [])
    assert (resolved.k, resolved.now_ms) == (5, -1)
    assert resolve_empty(now_ms=T).now_ms == T
    with pytest.raises(RequestError, match=r"now_ms=-2 must be a Unix time in ms"):
        resolve_empty(now_ms=-2)


@pytest.mark.parametrize(
    ("events", "match"),
    [
        ((event(), event("z")), r"history\[1\]: item 'z' is not among the 5 items of this bundle; drop it, or export"),
        ((event(actions=("like",)),), r"history\[0\]: unknown action 'like'; this bundle knows click, save, hide"),
        ((event(surface="feed"),), r"history\[0\]: unknown surface 'feed'; this bundle knows unknown, home, search"),
        ((event(),) * 5, "has 5 events, this model takes at most 4.*truncate"),
        (
            (event("a", T), event("b", T - 1)),
            rf"history\[1\] at {T - 1} is earlier .* at {T}; send the oldest first",
        ),
        ((event("a", T), event("b")), r"history\[1\] has no timestamp_ms, but the event before it has"),
        ((event("a", -1),), r"history\[0\]\.timestamp_ms=-1 must be a Unix time in ms"),
        ((event("a", T * 1000),), r"timestamp_ms=\d+ must be a Unix time in ms, from 0 to 253402300799999"),
        ((event("a", float("nan")),), r"history\[0\]\.timestamp_ms=nan must be an integer"),
        ((event("a", 1.5),), r"history\[0\]\.timestamp_ms=1\.5 must be an integer"),
    ],
)
def test_a_bad_history_is_refused(manifest: Manifest, events: tuple[Event, ...], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        read(manifest, *events)


def test_errors_name_the_place_in_what_was_sent(manifest: Manifest) -> None:
    assert read(manifest, event("b", T), first=3).item_rows.tolist() == [1]
    with pytest.raises(RequestError, match=r"history\[4\]: item 'y'"):
        read(manifest, event("b", T), event("y", T), first=3)
    with pytest.raises(RequestError, match=r"history\[4\] at 1 is earlier"):
        read(manifest, event("b", T), event("a", 1), first=3)


def test_a_long_history_is_cut_to_its_newest_events(manifest: Manifest) -> None:
    """The model takes four events and an eighth of that is less than one, so the window moves with every event."""
    sent = [event("7", T), *(event(item, T + index) for index, item in enumerate("abcd"))]
    request = resolve(manifest, *sent[1:], exclude_seen=False)
    assert (request.start, request.history.item_rows.tolist()) == (0, [0, 1, 2, 3])
    request = resolve(manifest, *sent, exclude_seen=False)
    assert (request.start, request.history.item_rows.tolist()) == (1, [0, 1, 2, 3])
    with pytest.raises(RequestError, match=r"has 5 events, this model takes at most 4; .*truncate"):
        resolve(manifest, *sent, truncate=False)
    with pytest.raises(RequestError, match=r"history\[5\]: item 'y'"):
        resolve(manifest, *sent, event("y", T + 9))


def test_what_the_window_leaves_out_was_seen_all_the_same(manifest: Manifest) -> None:
    sent = (event("z"), event("7"), *(event(item) for item in "abab"))
    assert resolve(manifest, *sent).excluded.tolist() == [0, 1, 4]
    assert resolve(manifest, *sent, exclude_seen=False).excluded.tolist() == []


@pytest.mark.parametrize(
    ("limit", "slack", "starts"),
    [
        (4, 1, {1: 0, 4: 0, 5: 1, 6: 2, 104: 100}),
        (4, 3, {4: 0, 5: 3, 6: 3, 7: 3, 8: 6}),
        (4, 4, {4: 0, 5: 4, 8: 4, 9: 8}),
        (992, 124, {992: 0, 993: 124, 1116: 124, 1117: 248}),
    ],
)
def test_the_window_moves_by_the_slack(limit: int, slack: int, starts: dict[int, int]) -> None:
    assert {count: window_start(count, limit, slack) for count in starts} == starts
    for count in range(limit + 1, limit + 5 * slack):
        start = window_start(count, limit, slack)
        assert limit - slack < count - start <= limit
        assert start - window_start(count - 1, limit, slack) in (0, slack)


def test_the_slack_is_an_eighth_of_the_limit_or_1_without_a_cache(manifest: Manifest) -> None:
    limits = [msgspec.structs.replace(manifest.model, max_history=limit) for limit in (1, 4, 15, 16, 64, 992)]
    assert [*map(default_slack, limits)] == [1, 1, 1, 2, 8, 124]
    assert default_slack(msgspec.structs.replace(limits[-1], cache="none")) == 1


def test_a_wider_slack_keeps_fewer_events(manifest: Manifest) -> None:
    events = tuple(event(item, T + index) for index, item in enumerate("abcda"))
    request = resolve_request(Request(history=events, k=1), manifest, CATALOGUE, 3)
    assert (request.start, request.history.item_rows.tolist()) == (3, [3, 0])


def test_a_user_has_an_id_or_is_none(manifest: Manifest) -> None:
    request = Request(history=(event(),), k=1, user="u-1")
    assert resolve_request(request, manifest, CATALOGUE).user == "u-1"
    assert resolve(manifest).user is None
    assert resolve_request(Request(history=(event(),), k=1, user=7), manifest, CATALOGUE).user == "7"
    for wrong in ("", True, 7.0, ["u"]):
        with pytest.raises(RequestError, match=r"user=.* must be a non-empty string, or None"):
            resolve_request(msgspec.structs.replace(request, user=wrong), manifest, CATALOGUE)


@pytest.mark.parametrize(
    ("events", "options", "match"),
    [
        ((event("a", T // 1000),), {}, r"history\[0\]\.timestamp_ms=1700000000 is in 1970, or in seconds; send Unix"),
        (
            (event("a", 5), event("b", T // 1000), event("c", T)),
            {},
            r"history\[1\]\.timestamp_ms=1700000000 is in 1970",
        ),
        ((event("a", 5),), {"now_ms": T // 1000}, "now_ms=1700000000 is in 1970, or in seconds"),
    ],
)
def test_times_in_seconds_are_refused(
    manifest: Manifest, events: tuple[Event, ...], options: dict[str, int], match: str
) -> None:
    with pytest.raises(RequestError, match=match):
        resolve(manifest, *events, **options)


def test_integers_name_items_in_filters_as_in_histories(manifest: Manifest) -> None:
    request = resolve(manifest, event(7, T), exclude=(np.int64(7), "a"), allow=(7, "b"), exclude_seen=False)
    assert request.excluded.tolist() == [0, 4]
    assert request.allowed is not None
    assert np.flatnonzero(request.allowed).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"exclude": "a"}, r"exclude='a' must be a list of item ids; write \['a'\]"),
        ({"allow": "ab"}, r"allow='ab' must be a list of item ids"),
        ({"allow": (1.5,)}, r"allow: 1\.5 is not an item id"),
        ({"exclude": (True,)}, "exclude: True is not an item id"),
        ({"categories": {"size": "sm"}}, r"categories: size='sm' must be a list of words; write \['sm'\]"),
    ],
)
def test_a_filter_that_is_no_list_is_refused(manifest: Manifest, options: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        resolve(manifest, **options)


def test_the_defaults_of_a_request(manifest: Manifest) -> None:
    request = resolve(manifest, event("b", T), event("d", T), event("b", T), k=2)
    assert request.excluded.tolist() == [1, 3]
    assert (request.k, request.candidates, request.surface, request.exact) == (2, 3, 0, False)
    assert request.weights.tolist() == [1, 1, 0]
    assert request.outcomes.tolist() == [1, 1, 0]


def test_the_options_of_a_request(manifest: Manifest) -> None:
    request = resolve(
        manifest,
        now_ms=T,
        surface="search",
        candidates=1,
        k=3,
        weights={"hide": -2.0},
        exclude_seen=False,
        exclude=("b", "gone"),
        exact=True,
    )
    assert (request.now_ms, request.surface, request.candidates, request.exact) == (T, 2, 3, True)
    assert request.weights.tolist() == [0, 0, -2]
    assert request.excluded.tolist() == [1]


def test_the_filters_of_a_request(manifest: Manifest) -> None:
    filters = {"allow": ("a", "b", "c", "gone"), "categories": {"kind": ("red", "blue")}}
    request = resolve(manifest, exclude=("b",), k=1, **filters)
    assert request.excluded.tolist() == [0, 1]
    assert request.allowed is not None
    assert request.allowed.tolist() == [True, True, True, False, False]
    assert (request.k, request.candidates) == (1, 1)
    assert resolve(manifest).allowed is None


def test_retired_items_count_for_nothing(manifest: Manifest) -> None:
    fewer = replace(CATALOGUE, retired=np.array([1, 2]))
    request = Request(history=(event("b", T), event("a", T)), k=2)
    resolved = resolve_request(request, manifest, fewer)
    assert resolved.history.item_rows.tolist() == [1, 0]
    assert resolved.candidates == 2
    with pytest.raises(RequestError, match="k=3 items were requested, but only 2 of the 3 items are eligible"):
        resolve_request(msgspec.structs.replace(request, k=3), manifest, fewer)


def test_large_requests_are_resolved_quickly() -> None:
    """992 events and 10,000 allowed ids of 100,000: 2 to 3 ms; the bound leaves room for a busy machine."""
    count = 100_000
    ids = [str(i) for i in range(count)]
    large = Catalogue(
        rows=dict(zip(ids, range(count), strict=True)),
        num_rows=count,
        retired=np.array([], np.int64),
        words={"kind": ("red", "blue")},
        codes=np.ones((count, 1), np.int32),
    )
    allow, categories = tuple(ids[::10]), {"kind": ("red",)}
    times = []
    for _ in range(9):
        start = time.perf_counter()
        mask = large.allowed(allow, categories)
        times.append(time.perf_counter() - start)
    assert mask is not None
    assert mask.sum() == 10_000
    assert min(times) < 0.01


def test_the_time_of_a_request_is_now_unless_no_event_has_one(manifest: Manifest) -> None:
    before = time.time_ns() // 1_000_000
    assert before <= resolve(manifest, event("a", T)).now_ms <= before + 10_000
    assert resolve(manifest, event("a")).now_ms == -1
    assert resolve(manifest, event("a"), now_ms=T).now_ms == T
    assert resolve(manifest, event("a", before + 60_000)).now_ms == before + 60_000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 0}, "k=0 must be an integer of at least 1"),
        ({"k": 2.0}, r"k=2\.0 must be an integer"),
        ({"k": True}, "k=True must be an integer"),
        ({"k": 5}, "k=5 items were requested, but only 4 of the 5 items are eligible"),
        ({"k": 4, "exclude": ("b",)}, "k=4 items were requested, but only 3 of the 5 items are eligible"),
        (
            {"k": 2, "allow": ("a", "b")},
            "k=2 .* only 1 of the 5 items are eligible .* 1 seen or excluded ones and those",
        ),
        (
            {"allow": ("z",)},
            "only 0 of the 5 items are eligible .* that allow, categories or ranges rule out; loosen the filters",
        ),
        ({"k": 3, "categories": {"kind": ("blue",)}}, "k=3 items .* only 2 of the 5 items .*; request at most 2"),
        ({"categories": {"colour": ("red",)}}, "categories: unknown feature 'colour'; .* kind, size"),
        ({"categories": {"kind": ("green",)}}, "categories: kind has no word 'green'; it has \\['red', 'blue'\\]"),
        ({"candidates": 0}, "candidates=0 must be an integer of at least 1"),
        ({"now_ms": T - 1}, f"now_ms={T - 1} is before the last event at {T}"),
        ({"now_ms": float("nan")}, "now_ms=nan must be an integer"),
        ({"surface": "feed"}, "unknown surface 'feed'; this bundle knows unknown, home, search"),
        ({"weights": {"like": 1.0}}, "weights: unknown action 'like'; this bundle knows click, save, hide"),
        ({"weights": {"click": float("inf")}}, "weights=.*must be finite numbers"),
        ({"weights": {}}, "one of them other than 0"),
        ({"order": "best"}, "order='best' is unknown; send one of value, blend, product, retrieval"),
        ({"order": "product"}, "order='product' needs the scale of retrieval, which this bundle lacks"),
        ({"order": "retrieval", "weights": {"click": 1.0}}, "have no effect with order 'retrieval'"),
        ({"outcomes": ("save",)}, "this model's retrieval is not conditioned on outcomes"),
    ],
)
def test_bad_options_are_refused(manifest: Manifest, options: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        resolve(manifest, **options)


def test_outcomes_where_the_model_is_conditioned_on_them(manifest: Manifest) -> None:
    model = msgspec.structs.replace(manifest.model, outcome_conditioned=True)
    conditioned = msgspec.structs.replace(manifest, model=model)
    assert resolve(conditioned, outcomes=("hide",)).outcomes.tolist() == [0, 0, 1]
    assert resolve(conditioned).outcomes.tolist() == [1, 1, 0]
    with pytest.raises(RequestError, match="outcomes: unknown action 'like'"):
        resolve(conditioned, outcomes=("like",))


def with_options(**options: Any) -> Request:
    return Request(history=(event(),), k=1, options=RecommendOptions(**options))


def test_events_are_parsed_with_defaults() -> None:
    first = b'{"item": "a", "actions": ["click", "save"], "surface": "home", "timestamp_ms": 5}'
    assert parse_events(b"[" + first + b', {"item": 7, "actions": []}]') == (
        Event(item="a", actions=("click", "save"), surface="home", timestamp_ms=5),
        Event(item=7, actions=(), surface="unknown", timestamp_ms=None),
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[{", r"events\.json: .*truncated"),
        (b'{"item": "a", "actions": []}', r"Expected `array`, got `object`"),
        (b'[{"item": "a", "actions": [], "action": "x"}]', r"unknown field `action` - at `\$\[0\]`"),
        (b'[{"item": "a"}]', r"missing required field `actions`"),
        (b'[{"item": null, "actions": []}]', r"Expected `int \| str`, got `null` - at `\$\[0\]\.item`"),
        (b'[{"item": "a", "actions": "click"}]', r"Expected `array`, got `str` - at `\$\[0\]\.actions`"),
        (b'[{"item": "a", "actions": [], "timestamp_ms": 1.5}]', r"timestamp_ms"),
        (b'[{"item": "a", "actions": [], "timestamp_ms": NaN}]', r"malformed"),
    ],
)
def test_malformed_events_say_what_is_accepted(content: bytes, match: str) -> None:
    with pytest.raises(RequestError, match=match) as error:
        parse_events(content, "events.json")
    assert "a history is a list, oldest first, of" in str(error.value)


def test_a_byte_order_mark_is_no_event() -> None:
    assert parse_events(b'\xef\xbb\xbf[{"item": "a", "actions": ["click"]}]') == (event(),)


def test_dictionaries_are_events() -> None:
    assert as_events([{"item": "a", "actions": ["click"]}, event("b")]) == (event("a"), event("b"))


@pytest.mark.parametrize("given", [{"item": "a", "actions": [], "weight": 1}, 3, "a"])
def test_what_is_no_event_is_named_by_position(given: Any) -> None:
    with pytest.raises(RequestError, match=r"history\[1\]: "):
        as_events([event(), given])


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request(history=(event(actions=None),), k=1), "Expected `array`, got `null` - at `.*actions`"),
        (Request(history=None, k=1), "Expected `array`, got `null` - at `.*history`"),  # type: ignore[arg-type]
        (with_options(weights={"click": "abc"}), "Expected `float`, got `str` - at `.*weights"),
        (with_options(weights=["click"]), "Expected `object"),
    ],
)
def test_what_is_of_the_wrong_type_is_named(recommender: Recommender, request_: Request, match: str) -> None:
    with pytest.raises(RequestError, match=f"the request has a value of the wrong type: {match}"):
        check_types(request_)
    with pytest.raises(RequestError):
        recommender.resolve(request_)


def spread(codes: list[int], each: int, k: int) -> Spread:
    return Spread(codes=np.array(codes, np.int32), each=each, k=k)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30).flatmap(
        lambda codes: st.tuples(st.just(codes), st.permutations(range(len(codes))))
    ),
    st.integers(1, 4),
    st.integers(1, 12),
)
def test_a_limit_keeps_what_a_walk_from_the_best_keeps(drawn: tuple[list[int], list[int]], each: int, k: int) -> None:
    codes, ranked = drawn
    used: Counter[int] = Counter()
    walked: list[int] = []
    for place, row in enumerate(ranked):
        if len(walked) < k and (codes[row] == 0 or used[codes[row]] < each):
            walked.append(place)
            used[codes[row]] += 1
    limit = spread(codes, each, k)
    assert limit.places(np.array(ranked)).tolist() == walked
    assert min(k, limit.most(np.array(ranked))) == len(walked)


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        ({"size": 1}, "max_per_category: unknown feature 'size'; this bundle has the features kind"),
        ({"kind": 0}, "max_per_category: kind=0 must be an integer of at least 1"),
        ({"kind": True}, "max_per_category: kind=True must be an integer of at least 1"),
        ({"kind": 1, "size": 1}, r"max_per_category names \['kind', 'size'\]; name one feature, as several"),
        (
            {"kind": 1},
            r"k=3 items were requested, but max_per_category=\{'kind': 1\} leaves only 2 of the eligible ones",
        ),
    ],
)
def test_a_limit_that_leaves_no_list_is_refused(manifest: Manifest, limit: dict[str, int], match: str) -> None:
    catalogue = Catalogue(
        rows={"a": 0, "b": 1, "c": 2, "d": 3},
        num_rows=4,
        retired=np.array([3]),
        words={"kind": ("x", "y")},
        codes=np.array([[1], [1], [2], [0]], np.int32),
    )
    request = Request(history=(), k=3, options=RecommendOptions(max_per_category=limit))
    with pytest.raises(RequestError, match=match):
        resolve_request(request, manifest, catalogue)
