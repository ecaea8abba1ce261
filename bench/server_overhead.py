"""The time that the server adds to `Recommender.recommend` with one request in flight.

    python bench/server_overhead.py [--rounds 2000] [--size tiny] [--bundle FOLDER]

Card: the `tiny` or the `small` size with random weights over 10,000 items, a history of 64 events, k = 20 of 200
candidates, encoded histories cached as int8. Ways, each in turn with the first, one request at a time:

    in_process   `recommend(history, user=...)` here: keys and values are cached, so that the cost of HTTP shows
    inline       POST /v1/recommend of the same, history and all, to `unipinrec serve` in a process of its own
    known        POST /v1/recommend of the user alone, whose events the server keeps in memory
    sqlite       the same of a second server, which keeps them in a file
    null         a Starlette route in a process of its own that answers as many bytes and computes nothing

The client is a socket that is kept open; it parses no JSON. `over_in_process_ms` is the difference of medians. On a
machine that does other things too, give the processes precedence (`chrt`) once the last has started.
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import card, finish, interleaved
from synthetic import NOW_MS, random_bundle, random_events

from unipinrec.models.config import SMALL, TINY
from unipinrec.runtime import CacheOptions, Recommender, RecommendOptions

ITEMS, EVENTS, CACHE_MIB = 10_000, 64, 64
HEAD_END, LENGTH = b"\r\n\r\n", re.compile(rb"content-length: (\d+)", re.IGNORECASE)
NULL = """
import socket
import sys
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

content = b"x" * int(sys.argv[1])


async def answer(request: Request) -> Response:
    await request.body()
    return Response(content, media_type="application/json")


listener = socket.create_server(("127.0.0.1", 0))
print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
app = Starlette(routes=[Route("/v1/recommend", answer, methods=["POST"])])
uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning")).run(sockets=[listener])
"""


class Client:
    """One connection, kept open."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ready(self) -> bool:
        return self._ask(b"GET /health/ready HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200

    def post(self, message: bytes) -> bytes:
        status, content = self._ask(message)
        if status != 200:
            raise SystemExit(f"{status} {content!r}")
        return content

    def _ask(self, message: bytes) -> tuple[int, bytes]:
        self._socket.sendall(message)
        got = b""
        while HEAD_END not in got:
            got += self._socket.recv(1 << 16)
        head, _, content = got.partition(HEAD_END)
        found = LENGTH.search(head)
        assert found is not None
        while len(content) < int(found[1]):
            content += self._socket.recv(1 << 16)
        return int(head[9:12]), content


def message(path: str, body: Any) -> bytes:
    content = msgspec.json.encode(body)
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(content), content)


@contextmanager
def started(words: list[str]) -> Iterator[Client]:
    """A process that prints its address on stderr."""
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            port = next(
                int(found[1]) for line in lines if (found := re.search(r"listening on http://[^:]+:(\d+)", line))
            )
            # Its later output must not fill the pipe.
            threading.Thread(target=lambda: list(lines), daemon=True).start()
            client = Client(port)
            while "serve" in words and not client.ready():
                time.sleep(0.1)
            yield client
        finally:
            process.kill()


def serve(bundle: Path, *more: str) -> list[str]:
    options = ["--port", "0", "--device", "cpu", "--cache-mib", str(CACHE_MIB), "--log-format", "human"]
    return ["-m", "unipinrec", "serve", str(bundle), *options, *more]


def measure(bundle: Path, state: Path, rounds: int) -> dict[str, Any]:
    events = random_events(EVENTS, ITEMS, 1)
    options = RecommendOptions(now_ms=NOW_MS)
    alone = {"user": "u", "now_ms": NOW_MS, "k": 20}
    known, inline = message("/v1/recommend", alone), message("/v1/recommend", {**alone, "history": events})
    with ExitStack() as stack:
        recommender = stack.enter_context(
            Recommender.load(bundle, "cpu", cache=CacheOptions(budget_bytes=CACHE_MIB << 20))
        )
        memory = stack.enter_context(started(serve(bundle, "--log-level", "info")))
        sqlite = stack.enter_context(started(serve(bundle, "--state", str(state))))
        for client in (memory, sqlite):
            client.post(message("/v1/events", {"user": "u", "events": events}))
        size = len(memory.post(known))
        null = stack.enter_context(started(["-c", NULL, str(size)]))

        def in_process() -> object:
            return recommender.recommend(events, 20, options, user="u")

        ways: dict[str, Callable[[], object]] = {
            "inline": lambda: memory.post(inline),
            "known": lambda: memory.post(known),
            "sqlite": lambda: sqlite.post(known),
            "null": lambda: null.post(inline),
        }
        pairs = {way: interleaved({"in_process": in_process, way: ask}, rounds) for way, ask in ways.items()}
        assert msgspec.json.decode(memory.post(known))["kv"] == "hit"
    rows = {way: {name: _percentiles(took) for name, took in pair.items()} for way, pair in pairs.items()}
    over = {way: round(row[way]["p50"] - row["in_process"]["p50"], 3) for way, row in rows.items() if way != "null"}
    return {"ms": rows, "over_in_process_ms": over, "request_bytes": len(inline), "answer_bytes": size}


def _percentiles(took: list[float]) -> dict[str, float]:
    found = np.percentile(took, [10, 50, 95, 99]).round(3).tolist()
    return dict(zip(("p10", "p50", "p95", "p99"), found, strict=True))


def main() -> None:
    """Measure every size; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--size", choices=["tiny", "small"], default="tiny")
    parser.add_argument("--bundle", type=Path, help="folder to read the bundle from, or to keep it in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.bundle or Path(folder) / "bundle"
        bundle = random_bundle(path, ITEMS, {"tiny": TINY, "small": SMALL}[options.size])
        result = measure(bundle, Path(folder) / "state", options.rounds)
    sys.stdout.write(f"{'':12} {'p10':>8} {'p50':>8} {'p95':>8} {'p99':>8}\n")
    for pair in result["ms"].values():
        for way, took in pair.items():
            sys.stdout.write(f"{way:12} {took['p10']:8.3f} {took['p50']:8.3f} {took['p95']:8.3f} {took['p99']:8.3f}\n")
    document = {**card("server_overhead"), "rounds": options.rounds, "size": options.size, "events": EVENTS}
    finish({**document, **result}, "server_overhead")


if __name__ == "__main__":
    main()
