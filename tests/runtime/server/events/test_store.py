from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unipinrec.errors import BackendError, ConfigError
from unipinrec.runtime.serve import open_store
from unipinrec.runtime.server.events.seen import ItemsByHash
from unipinrec.runtime.server.events.sqlite import SqliteEventStore
from unipinrec.runtime.server.events.store import (
    Append,
    EventStore,
    MemoryEventStore,
    Receipt,
    StoredEvent,
    StoreLimits,
    merged,
)

NOW = 1_700_000_000_000
LIMITS = StoreLimits(events=8, users=3)


def event(item: str, at: int | None = None, name: str | None = None) -> StoredEvent:
    return StoredEvent(item=item, actions=("click",), timestamp_ms=at, id=name)


def append(user: str, *events: StoredEvent) -> Append:
    return Append(user=user, events=events)


def items(events: tuple[StoredEvent, ...]) -> str:
    return "".join(str(event.item) for event in events)


def merge(known: tuple[StoredEvent, ...], *new: StoredEvent, limit: int = 8) -> tuple[str, Receipt]:
    events, receipt, _ = merged(known, append("u", *new), limit, NOW)
    return items(events), receipt


# The rule.


def test_events_take_the_place_of_their_time() -> None:
    known = (event("a", 10), event("b", 20), event("c", 20))
    order, receipt = merge(known, event("d", 20), event("e", 15), event("f", 30))
    assert order == "aebcdf"
    assert (receipt.appended, receipt.out_of_order, receipt.events) == (3, 1, 6)


def test_an_id_that_is_known_changes_nothing() -> None:
    known = (event("a", 10, "x"),)
    order, receipt = merge(known, event("b", 20, "x"), event("c", 30, "y"), event("d", 40, "y"), event("e", 50))
    assert order == "ace"
    assert (receipt.appended, receipt.duplicates) == (2, 2)


def test_events_without_an_id_are_never_duplicates() -> None:
    assert merge((event("a", 10),), event("a", 10))[0] == "aa"


def test_an_event_without_a_time_comes_last_and_gets_one_where_others_have_one() -> None:
    untimed, _, _ = merged((), append("u", event("a"), event("b")), 8, NOW)
    assert [one.timestamp_ms for one in untimed] == [None, None]
    timed, _, _ = merged(untimed, append("u", event("c", 10), event("d")), 8, NOW)
    assert [(one.item, one.timestamp_ms) for one in timed] == [("a", None), ("b", None), ("c", 10), ("d", NOW)]
    ahead, _, _ = merged(timed, append("u", event("e", NOW + 5), event("f")), 8, NOW)
    assert [(one.item, one.timestamp_ms) for one in ahead[-2:]] == [("e", NOW + 5), ("f", NOW + 5)]


def test_beyond_the_limit_the_oldest_go_an_eighth_at_a_time() -> None:
    known = tuple(event(letter, at) for at, letter in enumerate("abcdefgh"))
    order, receipt = merge(known, event("i", 100))
    assert (order, receipt.dropped, receipt.events) == ("cdefghi", 2, 7)
    order, receipt = merge(known[1:], event("i", 100))
    assert (order, receipt.dropped) == ("bcdefghi", 0)
    order, receipt = merge(known, event("z", -0, "late"), limit=8)
    assert "z" not in order


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from("xyz") | st.none()), max_size=30),
    st.lists(st.integers(1, 5), max_size=8),
)
def test_a_history_is_in_order_and_does_not_depend_on_how_it_was_sent(
    sent: list[tuple[int, str | None]], cuts: list[int]
) -> None:
    events = [event(str(index), at, name) for index, (at, name) in enumerate(sent)]
    whole, _, _ = merged((), append("u", *events), 100, NOW)
    parts: tuple[StoredEvent, ...] = ()
    for cut in (*cuts, len(events)):
        parts, _, _ = merged(parts, append("u", *events[:cut]), 100, NOW)
        events = events[cut:]
    assert parts == whole
    times = [one.timestamp_ms or 0 for one in whole]
    assert times == sorted(times)


# Every store.


@pytest.fixture(params=["memory", "sqlite", "redis"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    if request.param == "redis":
        url = str(request.getfixturevalue("redis_url"))
        import redis

        redis.Redis.from_url(url).flushall()
        return url
    return str(tmp_path / "state") if request.param == "sqlite" else None


@pytest.fixture
def store(state: str | None) -> Iterator[EventStore]:
    opened = open_store(state, LIMITS)
    yield opened
    opened.close()


def test_all_users_are_listed(store: EventStore) -> None:
    store.append([append("u", event("a")), append("v:*", event("b")), append("w", event("c"))], NOW).result()
    store.forget("w").result()
    assert sorted(store.users().result()) == ["u", "v:*"]


def test_what_was_appended_is_read(store: EventStore) -> None:
    first = StoredEvent(item="ä/1", actions=("click", "save"), surface="home", timestamp_ms=5, id="i")
    (receipt,) = store.append([append("u", first)], NOW).result(10)
    assert receipt == Receipt(user="u", appended=1, duplicates=0, out_of_order=0, dropped=0, events=1)
    assert store.append([append("u", first, event("b", 9))], NOW).result(10)[0].duplicates == 1
    assert store.histories(["u", "nobody", "u"]).result(10) == [(first, event("b", 9)), (), (first, event("b", 9))]


def test_one_call_may_name_a_user_twice(store: EventStore) -> None:
    receipts = store.append([append("u", event("a", 1)), append("v"), append("u", event("b", 2))], NOW).result(10)
    assert [receipt.events for receipt in receipts] == [1, 0, 2]
    assert list(map(items, store.histories(["u", "v"]).result(10))) == ["ab", ""]


def test_a_user_who_is_forgotten_is_new(store: EventStore) -> None:
    store.append([append("u", event("a", 1, "x"), event("b", 2)), append("v", event("c"))], NOW).result(10)
    assert store.forget("u").result(10) == 2
    assert store.forget("u").result(10) == 0
    assert list(map(items, store.histories(["u", "v"]).result(10))) == ["", "c"]
    assert store.append([append("u", event("a", 1, "x"))], NOW).result(10)[0].appended == 1


def test_events_of_a_user_are_bounded(store: EventStore) -> None:
    for index in range(30):
        store.append([append("u", event(str(index % 10), index))], NOW).result(10)
    (events,) = store.histories(["u"]).result(10)
    assert 7 <= len(events) <= 8
    assert events[-1].timestamp_ms == 29


def seen_items(store: EventStore, user: str = "u") -> str:
    (seen,) = store.seen([user]).result(10)
    return "".join(ItemsByHash("abcdefghijklmnopqrstuvwxyz").named(seen))


def test_items_of_dropped_events_are_remembered_until_the_user_is_forgotten(state: str | None) -> None:
    store = open_store(state, StoreLimits(events=4, seen=6, users=3))
    for at, item in enumerate("abcdefgh"):
        store.append([append("u", event(item, at))], NOW).result(10)
    assert items(store.histories(["u"]).result(10)[0]) == "efgh"
    assert seen_items(store) == "dcba"
    store.append([append("u", event("d", 9), event("i", 10)), append("v"), append("u", event("j", 11))], NOW).result(10)
    assert items(store.histories(["u"]).result(10)[0]) == "hdij"
    assert seen_items(store) == "gfedcb"  # the newest six
    assert store.seen(["v", "nobody"]).result(10) == [b"", b""]
    for at in range(5):
        store.append([append("u", event("d", 20 + at))], NOW).result(10)
    assert seen_items(store) == "djihgf"  # an item that is dropped again is new again
    store.close()
    if state is not None:
        store = open_store(state, StoreLimits(events=4, seen=6, users=3))
        assert seen_items(store) == "djihgf"
    store.forget("u").result(10)
    assert seen_items(store) == ""
    store.append([append("u", event("a", 1))], NOW).result(10)
    assert seen_items(store) == ""


@pytest.mark.parametrize("state", ["memory", "sqlite"], indirect=True)
def test_the_items_of_a_user_go_with_the_user(state: str | None) -> None:
    store = open_store(state, StoreLimits(events=1, users=1))
    store.append([append("u", event("a", 1), event("b", 2))], NOW).result(10)
    assert seen_items(store) == "a"
    store.append([append("v", event("a", 1))], NOW + 1).result(10)
    assert seen_items(store) == ""
    store.close()


def test_memory_counts_remembered_items() -> None:
    store = MemoryEventStore(StoreLimits(events=1, memory_bytes=1000))
    store.append([append("u", *(event(str(number), number) for number in range(100)))], NOW).result()
    assert (len(store.histories(["u"]).result()[0]), len(store.seen(["u"]).result()[0])) == (1, 99 * 8)
    store.append([append("u", *(event(str(number), number) for number in range(100, 200)))], NOW).result()
    assert store.histories(["u"]).result() == [()]  # more than a thousand bytes


def test_a_file_of_a_version_that_remembered_no_items_is_used(tmp_path: Path) -> None:
    store = SqliteEventStore(tmp_path, StoreLimits(events=1))
    store.append([append("u", event("a", 1))], NOW).result(10)
    store.close()
    with sqlite3.connect(tmp_path / "events.sqlite3") as file:
        file.execute("DROP TRIGGER seen_out")
        file.execute("DROP TABLE seen")
    store = SqliteEventStore(tmp_path, StoreLimits(events=1))
    store.append([append("u", event("b", 2))], NOW).result(10)
    assert seen_items(store) == "a"
    store.close()


@pytest.mark.parametrize("state", ["memory", "sqlite"], indirect=True)
def test_users_are_bounded(store: EventStore) -> None:
    for at, user in enumerate("uvwux"):
        store.append([append(user, event("a", at))], NOW + at).result(10)
    store.append([append("v")], NOW + 100).result(10)
    assert list(map(items, store.histories(["u", "v", "w", "x"]).result(10))) == ["aa", "", "a", "a"]


def test_memory_is_bounded() -> None:
    store = MemoryEventStore(StoreLimits(events=10, memory_bytes=1000))
    for at in range(100):
        store.append([append(f"u{at}", event("x" * 90, at))], NOW).result()
    known = [bool(events) for events in store.histories([f"u{at}" for at in range(100)]).result()]
    assert 8 <= sum(known) <= 10
    assert known == sorted(known)  # the latest
    store.append([append("large", event("x" * 2000))], NOW).result()
    assert not any(store.histories(["large", "u99"]).result())  # it alone is more than that
    for at in range(8):
        assert store.forget(f"u{at}").result() == 0
    store.append([append("u", event("a", 1))], NOW).result()
    assert items(store.histories(["u"]).result()[0]) == "a"


@pytest.mark.parametrize("state", ["sqlite", "redis"], indirect=True)
def test_many_writers_lose_nothing(state: str) -> None:
    stores = [open_store(state, StoreLimits(events=1000)) for _ in range(2)]  # two replicas
    futures: list[Future[list[Receipt]]] = []

    def write(writer: int) -> None:
        order = random.Random(writer)
        for index in range(25):
            one = append(order.choice("uv"), event("a", index, f"{writer}.{index}"))
            futures.append(stores[writer % 2].append([one], NOW))

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sum(receipt.appended for future in futures for receipt in future.result(60)) == 100
    assert sum(map(len, stores[0].histories(["u", "v"]).result(10))) == 100
    for one in stores:
        one.close()


def test_a_store_outlives_its_process(state: str | None) -> None:
    opened = open_store(state, LIMITS)
    opened.append([append("u", event("a", 1))], NOW)
    opened.close()
    again = open_store(state, LIMITS)
    assert items(again.histories(["u"]).result(10)[0]) == ("" if state is None else "a")
    again.close()


@pytest.mark.parametrize("state", ["sqlite", "redis"], indirect=True)
def test_a_closed_store_says_so(state: str) -> None:
    opened = open_store(state, LIMITS)
    opened.close()
    with pytest.raises(BackendError, match="is closed"):
        opened.append([append("u", event("a", 1))], NOW)
    with pytest.raises(BackendError, match="closed"):
        opened.histories(["u"]).result(10)


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="must hold at least 1 of each"):
        StoreLimits(events=0)


def test_memory_says_that_it_forgets() -> None:
    assert MemoryEventStore(LIMITS).description == "memory, which a restart forgets"


# SQLite.

WRITE = """
import sys
from pathlib import Path
from unipinrec.runtime.server.events.store import Append, StoredEvent, StoreLimits
from unipinrec.runtime.server.events.seen import ItemsByHash
from unipinrec.runtime.server.events.sqlite import SqliteEventStore

store = SqliteEventStore(Path(sys.argv[1]), StoreLimits(events=100_000))
for place in range(100_000):
    event = StoredEvent(item=str(place), actions=(), timestamp_ms=place)
    store.append([Append(user="u", events=(event,))], 0).result()
    print(place, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WRITE, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += map(int, writer.stdout)
    assert writer.returncode == -signal.SIGKILL
    store = SqliteEventStore(tmp_path, LIMITS)
    (events,) = store.histories(["u"]).result(10)
    store.close()
    assert [int(one.item) for one in events][: len(acknowledged)] == acknowledged
    assert len(events) <= len(acknowledged) + 1


def test_appends_that_wait_are_written_together(tmp_path: Path) -> None:
    store = SqliteEventStore(tmp_path, StoreLimits(events=1000))
    with sqlite3.connect(tmp_path / "events.sqlite3", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")  # holds the writer up
        futures = [store.append([append("u", event("a", at))], NOW) for at in range(50)]
        assert not wait(futures, timeout=0.2).done
        assert items(store.histories(["u"]).result(10)[0]) == ""  # readers wait for nobody
        other.execute("COMMIT")
    assert [future.result(10)[0].events for future in futures] == list(range(1, 51))
    store.close()
    other.close()


def test_an_append_that_was_cancelled_leaves_nothing(tmp_path: Path) -> None:
    store = SqliteEventStore(tmp_path, LIMITS)
    with sqlite3.connect(tmp_path / "events.sqlite3", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        first = store.append([append("u", event("a", 1))], NOW)
        while not first.running():
            time.sleep(0.001)
        second = store.append([append("u", event("b", 2))], NOW)
        assert second.cancel()
        other.execute("COMMIT")
    other.close()
    first.result(10)
    assert store.append([append("u", event("c", 3))], NOW).result(10)[0].events == 2
    store.close()


def test_a_write_that_fails_is_told_and_the_next_one_works(tmp_path: Path) -> None:
    store = SqliteEventStore(tmp_path, LIMITS)
    with sqlite3.connect(tmp_path / "events.sqlite3", isolation_level=None) as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON users BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
        with pytest.raises(BackendError, match="disk is full; check the folder"):
            store.append([append("u", event("a", 1))], NOW).result(10)
        other.execute("DROP TRIGGER full")
    other.close()
    assert store.append([append("u", event("a", 1))], NOW).result(10)[0].events == 1
    store.close()


def test_who_is_forgotten_is_not_left_in_the_file(tmp_path: Path) -> None:
    store = SqliteEventStore(tmp_path, LIMITS)
    store.append([append("u", event("very-secret-item", 1)), append("v", event("b"))], NOW).result(10)
    store.close()  # which empties the write-ahead log into the file
    assert b"very-secret-item" in (tmp_path / "events.sqlite3").read_bytes()
    store = SqliteEventStore(tmp_path, LIMITS)
    store.append([append("u", event("other-secret", 2))], NOW).result(10)
    assert store.forget("u").result(10) == 2
    left = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"secret" not in left
    store.close()


def test_a_long_read_of_another_process_delays_no_write_and_what_it_kept_goes_with_the_next(tmp_path: Path) -> None:
    store = SqliteEventStore(tmp_path, LIMITS)
    store.append([append("u", event("very-secret-item", 1))], NOW).result(10)
    backup = sqlite3.connect(tmp_path / "events.sqlite3", isolation_level=None)
    backup.execute("BEGIN")
    backup.execute("SELECT * FROM users").fetchall()
    began = time.monotonic()
    assert store.forget("u").result(10) == 1
    store.append([append("v", event("b"))], NOW).result(10)
    assert time.monotonic() - began < 2
    backup.execute("COMMIT")
    store.append([append("v", event("c", 2))], NOW).result(10)
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    backup.close()
    store.close()


def test_a_folder_that_is_deleted_is_noticed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "state"), LIMITS)
    store.append([append("u", event("a"))], NOW).result(5)
    shutil.rmtree(tmp_path / "state")
    for asked in (lambda: store.append([append("u", event("b"))], NOW), lambda: store.histories(["u"])):
        with pytest.raises(BackendError, match="No such file"):
            asked().result(5)
    other = open_store(str(tmp_path / "state"), LIMITS)
    with pytest.raises(BackendError, match="another file lies in its place; start again"):
        store.append([append("u", event("b"))], NOW).result(5)
    for one in (store, other):
        one.close()


def test_stores_that_begin_at_the_same_moment_make_one_file(tmp_path: Path) -> None:
    for attempt in range(10):
        gate, folder = threading.Barrier(4), tmp_path / str(attempt)

        def begin(gate: threading.Barrier = gate, folder: Path = folder) -> SqliteEventStore:
            gate.wait()
            return SqliteEventStore(folder, LIMITS)

        with ThreadPoolExecutor(4) as threads:
            stores = [future.result() for future in [threads.submit(begin) for _ in range(4)]]
        for number, store in enumerate(stores):
            store.append([append(f"u{number}", event("a", number))], NOW + number).result(20)
        known = [len(events) for events in stores[0].histories([f"u{number}" for number in range(4)]).result()]
        assert known == [0, 1, 1, 1]  # the limit is one for all of them
        for store in stores:
            store.close()


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    SqliteEventStore(tmp_path, LIMITS).close()
    with sqlite3.connect(tmp_path / "events.sqlite3") as file:
        file.execute("PRAGMA user_version = 1")
    file.close()
    with pytest.raises(BackendError, match="its format is 1, this version reads 2"):
        SqliteEventStore(tmp_path, LIMITS)


def test_a_folder_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="give another --state"):
        open_store(str(tmp_path / "file" / "state"), LIMITS)
    (tmp_path / "events.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(BackendError, match="file is not a database"):
        open_store(str(tmp_path), LIMITS)


def test_the_folder_is_closed_to_others(tmp_path: Path) -> None:
    SqliteEventStore(tmp_path / "new", LIMITS).close()
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


# Redis.


def test_a_redis_that_does_not_answer_is_told_without_its_password() -> None:
    pytest.importorskip("redis")
    with pytest.raises(BackendError, match=r"redis://127.0.0.1/0: .*check that the server runs") as raised:
        open_store("redis://:secret@127.0.0.1:1/0", LIMITS)
    assert "secret" not in str(raised.value)


def test_an_unknown_scheme_is_told() -> None:
    with pytest.raises(BackendError, match="give a folder, or a URL of redis, rediss, unix"):
        open_store("mysql://somewhere", LIMITS)
