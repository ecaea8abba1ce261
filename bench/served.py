"""A real `unipinrec serve` process on loopback, and whether its answers are right."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from open_loop import Answer, ask, post

from unipinrec.runtime import Event, Recommender, RecommendOptions, Request, Slate

RETIRED = 50
READY = b"GET /health/ready HTTP/1.1\r\nhost: x\r\n\r\n"


class Served:
    """A server process, which can be killed and started again at the same port with the same options."""

    def __init__(self, words: Sequence[str | Path], log: Path) -> None:
        self.port, self.log = free_port(), log
        self._words = [sys.executable, *map(str, words), "--port", str(self.port)]
        self.start()

    @classmethod
    def of(cls, bundle: Path, folder: Path, *options: str | Path) -> Served:
        """`unipinrec serve`, with its log in a folder."""
        words = ["-m", "unipinrec", "serve", bundle, "--device", "cpu", "--log-level", "warning", *options]
        return cls(words, folder / "server.log")

    def start(self) -> None:
        """Start, and wait until requests are answered."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._words, stderr=log, stdout=log)
        limit = time.monotonic() + 120
        while ask(self.port, [READY])[0].status != 200:
            if self.process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"the server does not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """`kill -9` of all its processes."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self) -> list[int]:
        """The process, and those that it started to serve with it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with suppress(OSError):
            return [self.process.pid, *map(int, children.read_text().split())]
        return [self.process.pid]

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def serving(self) -> list[int]:
        """The processes of several that answer requests."""
        return [pid for pid in self.pids()[1:] if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def resident_mib(self) -> float | None:
        """Its memory; None where it does not run."""
        try:
            texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids()]
        except OSError:
            return None
        found = [re.search(r"VmRSS:\s+(\d+) kB", text) for text in texts]
        return sum(int(one[1]) for one in found if one) / 1024

    def cpu_s(self) -> float:
        """Its processor time so far."""
        return sum(_cpu_s(pid) for pid in self.pids())

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def recommend(user: str, now_ms: int, k: int = 20, *headers: str) -> bytes:
    """The bytes of a request for a user whose events the server knows."""
    return post("/v1/recommend", msgspec.json.encode({"user": user, "now_ms": now_ms, "k": k}), *headers)


def sent(user: str, events: Sequence[Event], ids: Sequence[str]) -> bytes:
    """The bytes of a request that appends events."""
    listed = [{**msgspec.to_builtins(event), "id": name} for event, name in zip(events, ids, strict=True)]
    return post("/v1/events", msgspec.json.encode({"user": user, "events": listed}))


class AnsweredItem(msgspec.Struct, frozen=True):
    """The compared values of an item."""

    item: str
    score: float
    retrieval_score: float


class Answered(msgspec.Struct, frozen=True):
    """The compared values of an answer."""

    items: tuple[AnsweredItem, ...]
    bundle: str
    events: int
    kv: str


_ANSWERED = msgspec.json.Decoder(Answered)


def answered(answer: Answer) -> Answered:
    """Read a 200 of /v1/recommend."""
    return _ANSWERED.decode(answer.content)


def fresh(recommender: Recommender, history: tuple[Event, ...], now_ms: int, candidates: int = 200) -> Slate:
    """All candidates, ranked: a single request, without a cache."""
    options = RecommendOptions(now_ms=now_ms, candidates=candidates)
    manifest = recommender.bundle.manifest
    left = manifest.num_items - manifest.num_retired - len({event.item for event in history})
    return recommender.recommend_many([Request(history=history, k=min(candidates, left), options=options)])[0]


def difference(got: Answered, expected: Slate, tolerance: float, k: int = 20) -> str | None:
    """The fault of an answer; None if it is correct.

    Scores and similarities of the same item must agree, the order must be that of the scores, and no better item may be
    missing. Two items within the tolerance of each other may swap, also as the last candidate.
    """
    known = {item.item: item for item in expected.items}
    similarity = {item.item: item.retrieval_score for item in expected.items if item.retrieval_score is not None}
    edge = min(similarity.values()) + tolerance
    scores = [item.score for item in got.items]
    if len(scores) != k or scores != sorted(scores, reverse=True) or len({item.item for item in got.items}) != k:
        return f"{len(scores)} items, not the {k} best in their order"
    for item in got.items:
        same = known.get(item.item)
        if same is None and item.retrieval_score > edge:
            return f"{item.item} is no candidate"
        if same is not None:
            apart = max(abs(same.score - item.score), abs(similarity[item.item] - item.retrieval_score))
            if not apart <= tolerance:
                return f"{item.item} differs by {apart:.2g}"
    shown, last = {item.item for item in got.items}, scores[-1] + 2 * tolerance
    better = [i for i in expected.items if i.item not in shown and i.score > last and similarity[i.item] > edge]
    return f"{better[0].item} is missing" if better else None


def second_bundle(bundle: Path, folder: Path) -> dict[str, Path]:
    """The bundle under the name "a", and an update of it, "b"."""
    paths = {"a": folder / "a", "b": folder / "b"}
    paths["a"].symlink_to(bundle.resolve(), target_is_directory=True)
    ids = json.loads((bundle / "item_ids.json").read_bytes())
    retired = folder / "retired.txt"
    retired.write_text("\n".join(ids[:: len(ids) // RETIRED][:RETIRED]) + "\n")
    words = ["-m", "unipinrec", "index", str(bundle), "--out", str(paths["b"]), "--retire", str(retired)]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return paths
