"""Throughput and latency of `unipinrec serve` under open-loop load, up to and past saturation.

    python bench/server_load.py BUNDLE [--seconds 20] [--generator loadgen] [--out docs/server-load.svg]

BUNDLE has sample users. Their events are sent to the server first; then users drawn at random come back, each request
one POST of /v1/recommend with the user's name (k = 20 of 200 candidates): the cache has all of them (int8, as the
server does by default), so that the server's cost is a large part. Server, generator and the machine's other processes
share its cores. Arrivals are Poisson (`bench/open_loop.py`); the generator is MLCommons
LoadGen or, with `--generator poisson`, ours, which needs no package.

An answer is good if it is a 200 within 100 ms of the moment at which the request was due. Clients are patient, and
wait for the server's own deadline of 2 s, or hasty: their requests say `X-Deadline-Ms`, somewhat less than 100.

    in process   `Recommender` and `Batcher` here, set as in the server, same users and cache; `--clients` threads in a
                 closed loop; before and after everything else
    null         the same load on a Starlette route that answers as many bytes and computes nothing: the cost of the
                 generator, the sockets and HTTP
    peak         the highest rate at which 99 % of the answers to patient clients were good, by bisection
    curve        latencies and good answers of both kinds of clients at shares of the peak, past saturation too

One answer in `--check` is compared with a fresh recommendation here, within 0.02. Exits with 1 if one was wrong, if a
status was not one of 200, 429 and 504, or a 429 had no Retry-After. LoadGen's own FindPeakPerformance is not used: it
takes a 429 for an answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from batching import load
from common import card, finish
from load_plot import plot
from open_loop import Sample, ask, poisson
from served import Served, answered, difference, fresh, recommend, sent

from unipinrec.runtime import Batcher, BatchOptions, CacheOptions, Event, Recommender, RecommendOptions, Request

LIMIT_MS, NOW_MS, TOLERANCE, CACHE_MIB, LANES = 100.0, 1_800_000_000_000, 2e-2, 256, 32
SHARES = (0.1, 0.25, 0.5, 0.7, 0.85, 1.0, 1.1, 1.25, 1.5)
DECLARED = {200, 429, 504}
NULL = """
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


app = Starlette(routes=[Route("/{rest:path}", answer, methods=["GET", "POST"])])
uvicorn.run(app, port=int(sys.argv[3]), access_log=False, log_level="warning")
"""

Generator = Callable[[int, Sequence[bytes], float, float], list[Sample]]


@dataclass(frozen=True, kw_only=True)
class Users:
    """The returning users: their requests and histories."""

    names: list[str]
    histories: list[tuple[Event, ...]]
    patient: list[bytes]
    hasty: list[bytes]

    @classmethod
    def of(cls, recommender: Recommender, most: int, deadline_ms: float) -> Users:
        bundle = recommender.bundle
        sampled = [bundle.user_events(name) for name, events in bundle.sample_users(most) if events]
        if not sampled:
            raise SystemExit(f"{bundle.path} carries no sample users; export it with --data")
        names = [f"user-{index}" for index in range(most)]
        header = f"x-deadline-ms: {deadline_ms:g}"
        return cls(
            names=names,
            histories=list(islice(cycle(sampled), most)),
            patient=[recommend(name, NOW_MS) for name in names],
            hasty=[recommend(name, NOW_MS, 20, header) for name in names],
        )


class Judge:
    """Counts the answers, and compares some of them."""

    def __init__(self, recommender: Recommender, users: Users, check: int) -> None:
        self.recommender, self.users, self.check = recommender, users, check
        self.statuses, self.kinds, self.compared = Counter[int](), Counter[str](), 0
        self.wrong: list[str] = []

    def see(self, samples: Sequence[Sample]) -> None:
        for index, sample in enumerate(samples):
            status, head, _ = sample.answer
            self.statuses[status] += 1
            if status not in DECLARED:
                self.wrong.append(f"status {status}: {sample.answer.content[:200]!r}")
            if status == 429 and b"\r\nretry-after: " not in head.lower():
                self.wrong.append("429 without Retry-After")
            if status == 200 and index % self.check == 0:
                self._compare(sample)

    def _compare(self, sample: Sample) -> None:
        got, history = answered(sample.answer), self.users.histories[sample.position]
        expected = fresh(self.recommender, history, NOW_MS)
        found = difference(got, expected, TOLERANCE)
        if found or got.bundle != expected.bundle or got.events != len(history):
            self.wrong.append(f"{self.users.names[sample.position]}: {found}, {got.events} events")
        self.compared += 1
        self.kinds[got.kv] += 1


def row(samples: Sequence[Sample], offered: float) -> dict[str, Any]:
    """The result of a load at one rate."""
    good = [s for s in samples if s.answer.status == 200 and s.latency_ms <= LIMIT_MS]
    took = [s.latency_ms for s in samples if s.answer.status == 200] or [float("nan")]
    counts = Counter(sample.answer.status for sample in samples)
    # Per second of the schedule: the number of arrivals varies, and the same schedule makes it vary alike.
    return {
        "offered_per_s": round(offered, 1),
        "requests": len(samples),
        "good_share": round(len(good) / len(samples), 4),
        "good_per_s": round(offered * len(good) / len(samples), 1),
        "answered_ms": dict(
            zip(("p50", "p95", "p99"), np.percentile(took, [50, 95, 99]).round(2).tolist(), strict=True)
        ),
        "statuses": {str(status): counts[status] for status in sorted(counts)},
        "sent_late_p99_ms": round(float(np.percentile([s.late_ms for s in samples], 99)), 2),
    }


def in_process(recommender: Recommender, users: Users, clients: int, seconds: float) -> dict[str, Any]:
    """Throughput of the same requests without a server."""
    options = RecommendOptions(now_ms=NOW_MS)
    requests = [
        Request(history=history, options=options, user=name)
        for name, history in zip(users.names, users.histories, strict=True)
    ]
    with Batcher(recommender, BatchOptions(max_wait_ms=0.0, workers=2)) as batcher:
        for request in requests:
            batcher.recommend(request)
        of_us = time.process_time()
        took = load(batcher.recommend, requests, clients, seconds)
        cores = (time.process_time() - of_us) / seconds
    percentiles = np.percentile(took, [50, 95, 99]).round(2).tolist()
    found = {"per_s": round(len(took) / seconds, 1), "cores": round(cores, 3)}
    return found | dict(zip(("p50", "p95", "p99"), percentiles, strict=True))


def costed(server: Served, generate: Generator, messages: Sequence[bytes], rate: float, seconds: float) -> Any:
    """The samples of a load, and the cores that server and generator took meanwhile."""
    began, of_server, of_client = time.perf_counter(), server.cpu_s(), time.process_time()
    samples = generate(server.port, messages, rate, seconds)
    took = time.perf_counter() - began
    cores = {"server": (server.cpu_s() - of_server) / took, "generator": (time.process_time() - of_client) / took}
    return samples, {name: round(value, 3) for name, value in cores.items()}


def peak(loaded: Callable[[float], dict[str, Any]], low: float, high: float, steps: int) -> float:
    """The highest rate at which 99 % were good; `low` must be one, or it is halved."""
    while loaded(low)["good_share"] < 0.99:
        low, high = low / 2, low
        if low < 1:
            raise SystemExit("not even one request a second is answered in time")
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if loaded(middle)["good_share"] >= 0.99 else (low, middle)
    return low


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with Recommender.load(options.bundle, "cpu", cache=CacheOptions(budget_bytes=CACHE_MIB << 20)) as cached:
        users = Users.of(cached, options.users, options.deadline_ms)
        before = in_process(cached, users, options.clients, options.seconds)
        generate = generator(options.generator, folder)
        together = ("--processes", str(options.processes), "--state", folder / "state")
        with (
            Served.of(options.bundle, folder, "--cache-mib", str(CACHE_MIB), *together) as server,
            Recommender.load(options.bundle, "cpu") as alone,
        ):
            judge = Judge(alone, users, options.check)
            result = under_load(server, generate, users, judge, options, before["per_s"])
            null = on_null(result, generate, users, options.seconds, folder)
            result["exit_code"] = server.stop()
        after = in_process(cached, users, options.clients, options.seconds)
    throughput = (before["per_s"] + after["per_s"]) / 2
    return {
        "in_process": {"before": before, "after": after, "per_s": round(throughput, 1)},
        **result,
        "null": null,
        "peak_over_in_process": round(result["peak_per_s"] / throughput, 3),
        "compared": judge.compared,
        "compared_kv": dict(judge.kinds),
        "wrong": judge.wrong[:20],
    }


def under_load(
    server: Served, generate: Generator, users: Users, judge: Judge, options: argparse.Namespace, guess: float
) -> dict[str, Any]:
    """Peak and curve."""
    introduce(server.port, users)
    size = len(ask(server.port, users.patient[:1])[0].content)

    def loaded(clients: str, rate: float) -> dict[str, Any]:
        samples, cores = costed(server, generate, getattr(users, clients), rate, options.seconds)
        judge.see(samples)
        found = row(samples, rate) | {"cores": cores}
        show(clients, found)
        return found

    best = options.peak or peak(partial(loaded, "patient"), 0.4 * guess, 1.1 * guess, options.steps)
    curve = [
        {"share_of_peak": share, **{clients: loaded(clients, share * best) for clients in ("patient", "hasty")}}
        for share in options.shares
    ]
    good = [one["hasty"]["good_per_s"] for one in curve]
    past = [rate for rate, one in zip(good, curve, strict=True) if one["share_of_peak"] > 1]
    return {
        "peak_per_s": round(best, 1),
        "curve": curve,
        "goodput_past_saturation_over_peak": round(min(past) / max([*good, best]), 3) if past else None,
        "answer_bytes": size,
    }


def introduce(port: int, users: Users) -> None:
    """Tell a server of all users, and let each ask once; many at a time, which share the wait for the disk."""

    def tell(lane: int) -> None:
        named = list(zip(users.names, users.histories, strict=True))[lane::LANES]
        messages = [sent(name, history, [f"e{n}" for n in range(len(history))]) for name, history in named]
        for message in messages + users.patient[lane::LANES]:
            while (answer := ask(port, [message])[0]).status in (429, 504):
                time.sleep(0.2)
            if answer.status != 200:
                raise SystemExit(f"status {answer.status}: {answer.content[:200]!r}")

    with ThreadPoolExecutor(LANES) as threads:
        list(threads.map(tell, range(LANES)))


def on_null(
    result: dict[str, Any], generate: Generator, users: Users, seconds: float, folder: Path
) -> list[dict[str, Any]]:
    """The same rates on a route that computes nothing."""
    rows = []
    with Served(["-c", NULL, str(result["answer_bytes"])], folder / "null.log") as server:
        for one in result["curve"]:
            rate = one["patient"]["offered_per_s"]
            samples, cores = costed(server, generate, users.patient, rate, seconds)
            rows.append(row(samples, rate) | {"cores": cores})
            show("null", rows[-1])
    return rows


def generator(name: str, folder: Path) -> Generator:
    if name == "poisson":
        return poisson
    from open_loop_mlperf import loadgen  # noqa: PLC0415 - pip install 'unipinrec[bench]'

    return partial(loadgen, folder=folder)


def show(name: str, found: dict[str, Any]) -> None:
    ms, cores = found["answered_ms"], found["cores"]
    sys.stdout.write(
        f"{name:8} {found['offered_per_s']:8.1f}/s  good {found['good_per_s']:8.1f}/s ({found['good_share']:.2%})  "
        f"p50 {ms['p50']:7.2f} p95 {ms['p95']:7.2f} p99 {ms['p99']:7.2f} ms  cores {cores['server']:.2f} + "
        f"{cores['generator']:.2f}  {found['statuses']}\n"
    )
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--steps", type=int, default=6, help="of the search for the peak")
    parser.add_argument("--peak", type=float, help="peak rate; without it, the peak is searched")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the peak, for the curve")
    parser.add_argument("--processes", type=int, default=2, help="of the server")
    parser.add_argument("--users", type=int, default=5_000)
    parser.add_argument("--clients", type=int, default=32, help="threads in process")
    parser.add_argument("--deadline-ms", type=float, default=90.0)
    parser.add_argument("--generator", choices=["loadgen", "poisson"], default="loadgen")
    parser.add_argument("--check", type=int, default=50)
    parser.add_argument("--out", type=Path, help="where the plot goes")
    parser.add_argument("--no-result", action="store_true", help="do not write bench/results")
    return parser.parse_args()


def main() -> None:
    """Measure; write result and plot."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    kept = ("seconds", "processes", "users", "clients", "deadline_ms", "generator")
    document = {
        **card("server_load"),
        **{name: getattr(options, name) for name in kept},
        "limit_ms": LIMIT_MS,
        **result,
    }
    if options.out:
        options.out.write_text(plot(document))
    if options.no_result:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        finish(document, "server_load")
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
