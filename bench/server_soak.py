"""Minutes of everything at once: load, swaps, users who come back, nonsense, and a `kill -9`.

    python bench/server_soak.py BUNDLE [--minutes 30] [--processes 2] [--qps 200] [--swap-s 60] [--check 10]
    python bench/server_soak.py BUNDLE --no-kill --minutes 1 --qps 700 --swap-s 100 --name server_soak_peak

BUNDLE has items and actions; a second one is made of it by `unipinrec index`, with fifty items retired. `unipinrec
serve` keeps events in SQLite and encoded histories as fp32, in less memory than all users need. Arrivals are Poisson
(`bench/open_loop.py`). At each, a user who is not busy comes back: an event with an id is sent, then the recommendation
asked for, or only that; users whose history has reached one and a half of the model's limit are deleted and begin
anew. One arrival in a hundred is malformed. Every `--swap-s` the other bundle is loaded: by /admin/reload where one
process serves, by another current.json where several do. In the middle of the time all processes are killed and started
again; of several one is killed after a quarter of it, and replaced by its parent.

Required: an answer is a 200, or a 4xx for a malformed request; 429, 503 and 504 are declared rejections; nothing else.
Requests between the kill and the start get no answer. A user without an answer to an event sends it again under the
same id. Every answer to a recommendation names one of both bundles and rests on exactly the events that
were acknowledged, by their number. One in `--check` is kept and, after the load, compared with a fresh single request
in process, of the bundle that it names, after the very events that were acknowledged by then: scores and similarities
within 1e-4. `noticed` is how many of 200 such comparisons fail when the last event of the history is left out. At
the end every user's events are read back and compared one by one.

The second command sends more than the server can answer: `answered_per_s` is the peak of this mix of requests.

Exits with 1 if anything of that is not so, or if memory grew by more than 2 % after the first tenth between two of
start, kills and end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from common import card, finish
from open_loop import Answer, Connections, arrive, ask, post
from served import Answered, Served, answered, difference, fresh, recommend, second_bundle, sent
from soak import memory

from unipinrec.runtime import Event, Recommender

START_MS, NOW_MS, TOLERANCE = 1_700_000_000_000, 1_790_000_000_000, 1e-4
DECLARED = {429, 503, 504}
REASK = 404  # of a DELETE that is sent again
NONSENSE = (
    post("/v1/recommend", b"{"),
    post("/v1/recommend", b""),
    post("/v1/recommend", b'{"user": "nobody", "k": 0}'),
    post("/v1/recommend", b'{"user": 7}'),
    post("/v1/recommend", b'{"user": "nobody", "surprise": true}'),
    post("/v1/recommend", b'{"history": [{"item": "no such item", "actions": []}]}'),
    post("/v1/recommend", b'{"user": "\xff"}'),
    post("/v1/recommend", b"[" * 5000),
    post("/v1/recommend", b'{"user": "nobody", "surface": "no such surface"}'),
    post("/v1/events", b'{"user": "nobody", "events": []}'),
    post("/v1/events", b'{"user": "nobody", "events": [{"item": "no such item"}]}'),
    post("/v1/items/similar", b'{"items": [null]}'),
    post("/v1/nowhere", b"{}"),
    b"GET /v1/recommend HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/users/..%2F..%2Fetc HTTP/1.1\r\nhost: x\r\n\r\n",
)


class Kept(NamedTuple):
    """An answer to be compared, and the history that it must rest on."""

    user: str
    history: tuple[Event, ...]
    answer: Answered


class User:
    """The client's view of a user: acknowledged events, and events to send again."""

    def __init__(self, name: str) -> None:
        self.name, self.made = name, 0
        self.events: tuple[Event, ...] = ()
        self.ids: tuple[str, ...] = ()
        self.unsure: tuple[tuple[Event, ...], tuple[str, ...]] | None = None
        self.deleting = False


class Soak:
    """The load, and its failures."""

    def __init__(self, server: Served, bundles: dict[str, Recommender], options: argparse.Namespace) -> None:
        self.server, self.bundles, self.options = server, bundles, options
        self.rng, self.lock = random.Random(0), threading.Lock()
        first = next(iter(bundles.values())).bundle
        self.items, self.actions = first.item_ids, first.manifest.actions
        self.limit = first.manifest.model.max_history
        self.free = [User(f"user-{number}") for number in range(options.users)]
        self.counts, self.statuses, self.kinds, self.served = (Counter[str]() for _ in range(4))
        self.kept: list[Kept] = []
        self.failures: list[str] = []
        self.latencies: list[float] = []
        self.down = False
        self.restarts_s: list[float] = []
        for user in self.free:
            self._begin(user)

    def arrival(self, due: float) -> None:
        """One user does something."""
        with self.lock:
            nonsense = self.rng.random() < 0.01
            user = None if nonsense or not self.free else self.free.pop(self.rng.randrange(len(self.free)))
        if nonsense:
            self._send("malformed", self.rng.choice(NONSENSE), self._refused)
        elif user is None:
            self.counts["all users busy"] += 1
        elif user.deleting or len(user.events) > 1.5 * self.limit:
            user.deleting = True
            self._delete(user)
        elif user.unsure or self.rng.random() < 0.5:
            self._append(user, due)
        else:
            self._recommend(user, due)

    def _send(self, kind: str, message: bytes, done: Any) -> None:
        down = self.down

        def counted(answer: Answer) -> None:
            try:
                with self.lock:
                    self.counts[kind] += 1
                    self.statuses[f"{kind} {answer.status or 'none'}"] += 1
                    lost = answer.status == 0 and not (down or self.down)
                    if lost or (answer.status >= 500 and answer.status not in DECLARED):
                        self.failures.append(f"{kind}: {answer.status} {answer.content[:300]!r}")
                    if answer.status == 429 and b"\r\nretry-after: " not in answer.head.lower():
                        self.failures.append(f"{kind}: 429 without Retry-After")
                done(answer)
            except Exception as error:  # any failure must show in the result
                self.failures.append(f"{kind}: {error!r}")

        self.connections.send(message, counted)

    def _refused(self, answer: Answer) -> None:
        if answer.status and not 400 <= answer.status < 500 and answer.status not in DECLARED:
            self.failures.append(f"malformed: {answer.status}")

    def _delete(self, user: User) -> None:
        def done(answer: Answer) -> None:
            if answer.status in (200, REASK):
                user.events, user.ids, user.unsure, user.deleting = (), (), None, False
                self._begin(user)
            self._rest(user)

        self._send("delete", f"DELETE /v1/users/{user.name} HTTP/1.1\r\nhost: x\r\n\r\n".encode(), done)

    def _append(self, user: User, due: float) -> None:
        events, ids = user.unsure = user.unsure or self._next(user, 1)

        def done(answer: Answer) -> None:
            if answer.status == 200:
                user.events, user.ids, user.unsure = user.events + events, user.ids + ids, None
                known = msgspec.json.decode(answer.content)["events"]
                if known != len(user.events):
                    self.failures.append(f"{user.name}: {known} events are known, {len(user.events)} acknowledged")
                self._recommend(user, due)
                return
            if answer.status and answer.status not in DECLARED:
                self.failures.append(f"events: {answer.status} {answer.content[:300]!r}")
            self._rest(user)

        self._send("events", sent(user.name, events, ids), done)

    def _recommend(self, user: User, due: float) -> None:
        def done(answer: Answer) -> None:
            if answer.status == 200:
                self.latencies.append((time.perf_counter() - due) * 1e3)
                self._judge(user, answered(answer))
            elif answer.status and answer.status not in DECLARED:
                self.failures.append(f"recommend: {answer.status} {answer.content[:300]!r}")
            self._rest(user)

        self._send("recommend", recommend(user.name, NOW_MS), done)

    def _judge(self, user: User, got: Answered) -> None:
        self.kinds[got.kv] += 1
        self.served[got.bundle] += 1
        if got.events != len(user.events) or got.bundle not in self.bundles or len(got.items) != 20:
            self.failures.append(f"{user.name}: {got.events} events of {len(user.events)}, bundle {got.bundle}")
        if self.counts["recommend"] % self.options.check == 0:
            self.kept.append(Kept(user.name, user.events, got))

    def _rest(self, user: User) -> None:
        with self.lock:
            self.free.append(user)

    def _begin(self, user: User) -> None:
        user.unsure = self._next(user, self.rng.randint(1, self.limit))

    def _next(self, user: User, count: int) -> tuple[tuple[Event, ...], tuple[str, ...]]:
        made, user.made = user.made, user.made + count
        events = tuple(
            Event(
                item=self.rng.choice(self.items),
                actions=tuple(name for name in self.actions if self.rng.random() < 0.3),
                timestamp_ms=START_MS + (made + index) * 60_000,
            )
            for index in range(count)
        )
        return events, tuple(f"e{made + index}" for index in range(count))

    def run(self) -> list[list[float]]:
        """Load, swaps and kills; resident MiB once a second, up to each kill and after the last."""
        seconds, several = 60 * self.options.minutes, self.options.processes > 1
        end, over = time.monotonic() + seconds, threading.Event()
        kills = [(end - 3 * seconds / 4, self._kill_one)] if several else []
        kills.append((end - seconds / 2, self._kill_all))
        if self.options.no_kill:
            kills.clear()
        samples: list[list[float]] = [[]]
        side = threading.Thread(target=self._administrate, args=(kills, samples, over))
        with Connections(self.server.port) as self.connections:
            side.start()
            arrive(self.arrival, self.options.qps, lambda: time.monotonic() < end and not self.failures)
            over.set()
            side.join()
            limit = time.monotonic() + 30
            while len(self.free) < self.options.users and time.monotonic() < limit:
                time.sleep(0.05)
        if len(self.free) < self.options.users:
            self.failures.append(f"{self.options.users - len(self.free)} users never had an answer")
        return samples

    def _administrate(
        self, kills: list[tuple[float, Callable[[], None]]], samples: list[list[float]], over: threading.Event
    ) -> None:
        names, swap_at = ["b", "a"], time.monotonic() + self.options.swap_s
        swap = self._swap_by_file if self.options.processes > 1 else self._swap_by_request
        while not over.wait(1.0):
            samples[-1].append(self.server.resident_mib() or 0.0)
            if kills and time.monotonic() > kills[0][0]:
                _, kill = kills.pop(0)
                self.down, began = True, time.monotonic()
                kill()
                self.restarts_s.append(round(time.monotonic() - began, 2))
                self.down = False
                samples.append([])
            if time.monotonic() > swap_at:
                swap_at += self.options.swap_s
                began = time.monotonic()
                swap(names[0])
                self.counts["swap"] += 1
                self.counts["swap ms"] += round((time.monotonic() - began) * 1e3)
                names.reverse()

    def _kill_one(self) -> None:
        victim = self.server.serving()[0]
        os.kill(victim, signal.SIGKILL)
        self._until(lambda: len(self._served_by()) == self.options.processes and victim not in self.server.serving())

    def _kill_all(self) -> None:
        self.server.kill()
        self.server.start()
        if self.options.processes > 1:
            self._until(lambda: len(self._served_by()) == self.options.processes)

    def _swap_by_request(self, name: str) -> None:
        header = f"authorization: Bearer {self.options.token}"
        (answer,) = ask(self.server.port, [post("/admin/reload", json.dumps({"bundle": name}).encode(), header)])
        if answer.status != 200:
            self.failures.append(f"swap to {name}: {answer.status} {answer.content[:300]!r}")

    def _swap_by_file(self, name: str) -> None:
        new = self.options.bundles / "new.json"
        new.write_text(json.dumps({"bundle": name}))
        new.replace(self.options.bundles / "current.json")
        self._until(lambda: self._served_by() == [name] * self.options.processes)

    def _served_by(self) -> list[str]:
        """The bundle of each process that answers a scrape."""
        (answer,) = ask(self.server.port, [b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"])
        return re.findall(r'^unipinrec_serving_info\{bundle="([^"]*)"', answer.content.decode(), re.MULTILINE)

    def _until(self, reached: Callable[[], bool]) -> None:
        limit = time.monotonic() + 60
        while not reached():
            if time.monotonic() > limit:
                self.failures.append(f"after a minute the processes still serve {self._served_by()}")
                return
            time.sleep(0.2)

    def compare(self) -> dict[str, Any]:
        """Compare every kept answer with a new one; and whether the comparison notices a missing event."""
        compared = Counter[str]()
        noticed = tried = 0
        for kept in self.kept:
            recommender = self.bundles[kept.answer.bundle]
            found = difference(kept.answer, fresh(recommender, kept.history, NOW_MS), TOLERANCE)
            compared[kept.answer.kv] += 1
            if found:
                self.failures.append(f"{kept.user}: {kept.answer.kv}, {len(kept.history)} events: {found}")
            if tried < 200 and len(kept.history) > 1:
                tried += 1
                noticed += difference(kept.answer, fresh(recommender, kept.history[:-1], NOW_MS), TOLERANCE) is not None
        return {"compared": sum(compared.values()), "compared_kv": dict(compared), "noticed": f"{noticed} of {tried}"}

    def read_back(self) -> int:
        """Compare all events of all users, one by one; how many there are."""
        total = 0
        asked = [f"GET /v1/users/{user.name} HTTP/1.1\r\nhost: x\r\n\r\n".encode() for user in self.free]
        for user, answer in zip(self.free, ask(self.server.port, asked), strict=True):
            known = msgspec.json.decode(answer.content)["events"] if answer.status == 200 else []
            listed = list(zip(user.ids, [event.item for event in user.events], strict=True))
            unsure = (
                [] if user.unsure is None else list(zip(user.unsure[1], [e.item for e in user.unsure[0]], strict=True))
            )
            read = [(event["id"], event["item"]) for event in known]
            total += len(read)
            if read not in (listed, listed + unsure) and not user.deleting:
                self.failures.append(f"{user.name}: {len(read)} events were read back, {len(listed)} acknowledged")
        return total


def soaked(options: argparse.Namespace, folder: Path) -> tuple[Soak, dict[str, Any]]:
    options.token = secrets.token_hex(16)
    token, state = folder / "token", folder / "state"
    token.write_text(options.token)
    bundles = folder / "bundles"
    bundles.mkdir()
    paths = second_bundle(options.bundle, bundles)
    alone = {one.bundle.hash: one for one in (Recommender.load(path, "cpu") for path in paths.values())}
    options.bundles = bundles
    words: list[str | Path] = ["--state", state, "--cache-dtype", "fp32", "--processes", str(options.processes)]
    words += ["--watch"] if options.processes > 1 else ["--admin-token-file", token]
    with Served.of(paths["a"], folder, *words, "--cache-mib", str(options.cache_mib)) as server:
        soak = Soak(server, alone, options)
        samples = soak.run()
        events = soak.read_back()
        grown = [memory(part) for part in samples if part]
        result = {"exit_code": server.stop(), "events_read_back": events, "memory": grown, **soak.compare()}
    log = server.log.read_text()
    return soak, result | {"errors_in_log": log.count('"level":"error"')}


def main() -> None:
    """Soak; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=2, help="of the server")
    parser.add_argument("--qps", type=float, default=200.0, help="arrivals a second; about half send an event first")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--swap-s", type=float, default=60.0)
    parser.add_argument("--cache-mib", type=int, default=48)
    parser.add_argument("--check", type=int, default=10)
    parser.add_argument("--no-kill", action="store_true", help="let all processes live")
    parser.add_argument("--name", default="server_soak", help="of the result")
    parser.add_argument("--no-result", action="store_true", help="do not write bench/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak, result = soaked(options, Path(folder))
    kept = ("minutes", "processes", "qps", "users", "swap_s", "cache_mib", "check", "no_kill")
    p50, p95, p99 = np.percentile(soak.latencies, [50, 95, 99]).round(2).tolist()
    document = {
        **card("server_soak"),
        **{name: getattr(options, name) for name in kept},
        "counts": dict(soak.counts),
        "statuses": dict(sorted(soak.statuses.items())),
        "kv": dict(soak.kinds),
        "answers_by_bundle": list(soak.served.values()),
        "answered_per_s": round(soak.statuses["recommend 200"] / (60 * options.minutes), 1),
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
        "restarts_s": soak.restarts_s,
        **result,
        "failures": soak.failures[:20],
    }
    if options.no_result:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        finish(document, options.name)
    flat = all(part["growth_share"] < 0.02 for part in result["memory"]) or options.minutes < 5
    sys.exit(0 if flat and not soak.failures else 1)


if __name__ == "__main__":
    main()
