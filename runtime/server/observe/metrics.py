"""Prometheus metrics of a server. What requests took is counted as they are answered; the rest is read when asked for.

What every metric means, and which are worth an alert, is in docs/operations.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.responses import Response
from starlette.routing import Route

from unipinrec.runtime.kv.options import CacheStatistics
from unipinrec.runtime.retrieval.sampling import RecallSampler
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.operations import Operation
from unipinrec.runtime.server.swap import Deployments

METRICS = Operation(path="/metrics", summary="Metrics for Prometheus")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STAGES = ("encode", "retrieve", "rank", "total")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
RECALLS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)


class Tally:
    """A histogram that one thread counts into; the library's own have locks, which cost more than all else here."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_to(self, family: HistogramMetricFamily, *labels: str) -> None:
        """Put what was counted into a metric."""
        names = [*map(floatToGoString, self.bounds), "+Inf"]
        family.add_metric(labels, list(zip(names, accumulate(self.counts), strict=True)), self.total)


class ServerMetrics(Collector):
    """The metrics of one server, in a registry of their own; used in the event loop's thread."""

    def __init__(self, server: Server, sampler: RecallSampler | None = None) -> None:
        """Count for a server, and what a sampler compares."""
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self._http: dict[str, Tally] = defaultdict(lambda: Tally(SECONDS))
        self._stages = tuple((stage, Tally(SECONDS)) for stage in STAGES)
        self._queue, self._batch = Tally(SECONDS), Tally(BATCHES)
        self._codes: Counter[tuple[str, str]] = Counter()
        self._errors: Counter[tuple[str, str]] = Counter()
        self._slates: Counter[tuple[str, str]] = Counter()
        self._popular = 0
        if sampler is not None:
            text = "Share of the true candidates that the index found, sampled."
            sampler.observe = Histogram("unipinrec_ann_recall", text, buckets=RECALLS, registry=registry).observe
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        registry.register(self)
        registry.register(_State(server, sampler))

    def observe(self, call: Call) -> None:
        """Count a request that was answered."""
        self._http[call.route].observe(call.seconds)
        self._codes[call.route, str(call.status)] += 1
        for code in (call.code, *call.codes_in_list):
            if code is not None:
                self._errors[call.route, code] += 1
        for slate, answer in zip(call.slates, call.answers, strict=True):
            self._queue.observe(answer.started - answer.arrived)
            self._batch.observe(answer.batch)
            if slate.source == "popular":  # neither looked up in the cache nor computed
                self._popular += 1
                continue
            for stage, tally in self._stages:
                tally.observe(getattr(slate.stages_ms, stage) * 1e-3)
            self._slates[slate.kv, "index" if slate.exact is None else "scan"] += 1

    def collect(self) -> Iterator[Metric]:
        """What `observe` counted."""
        yield _histogram("http_seconds", "From a request's arrival to its answer.", self._http.items(), "endpoint")
        yield _histogram("stage_seconds", "What a stage took for a slate and its company.", self._stages, "stage")
        yield _histogram("queue_seconds", "From a slate's request to the start of its batch.", [("", self._queue)])
        yield _histogram("slate_batch_size", "Requests that were answered with a slate's.", [("", self._batch)])
        yield _counters("http_requests", "Answers.", ("endpoint", "code"), self._codes.items())
        yield _counters(
            "http_errors", "Answers that are errors, by reason.", ("endpoint", "reason"), self._errors.items()
        )
        yield _counters(
            "slates",
            "The model's slates, by the cache's answer and what searched.",
            ("kv", "search"),
            self._slates.items(),
        )
        yield _counter("popular_slates", "Slates of popular items, for requests without a history.", self._popular)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type, in the format that an Accept header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


def metrics_route(server: Server, metrics: ServerMetrics) -> Route:
    """GET /metrics."""

    async def scrape(_server: Server, call: Call) -> Response:
        body, content_type = metrics.render(call.request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return route(server, METRICS, scrape)


class _State(Collector):
    """What the server, its deployments and their cache count by themselves."""

    def __init__(self, server: Server, sampler: RecallSampler | None) -> None:
        self._server, self._sampler = server, sampler

    def collect(self) -> Iterator[Metric]:
        """All of it, at this moment."""
        server, deployments = self._server, self._server.deployments
        for kind, admission in (("recommend", server.admission), ("store", server.writes)):
            yield _gauge(f"{kind}_pending", "Requests that were admitted and not yet answered.", admission.pending)
            yield _gauge(f"{kind}_pending_max", "The most that ever were.", admission.most_pending)
            yield _counter(f"{kind}_turned_away", "Requests for which there was no room.", admission.refused)
        yield _gauge("ready", "Whether requests are answered.", int(server.phase == "ready"))
        if self._sampler is not None:
            yield _counter("ann_recall_passed_over", "Samples that were not compared.", self._sampler.passed_over)
        if deployments is not None:
            yield from _serving(deployments)
            yield from _swaps(deployments)
            yield from _batches(deployments)
            cache = deployments.current.recommender.cache
            if cache is not None:
                yield from _cache(cache.statistics())


def _serving(deployments: Deployments) -> Iterator[Metric]:
    deployment = deployments.current
    device = deployment.recommender.device
    serving = {"bundle": deployment.path.name, "version": deployment.version, "device": device.name}
    yield InfoMetricFamily(
        "unipinrec_serving",
        "What serves, and on what.",
        value={**serving, "precision": device.precision, "reason": device.reason},
    )
    refused = GaugeMetricFamily("unipinrec_device_refused", "What does not serve, and why not.", labels=["why"])
    for why in device.refused:
        refused.add_metric([why], 1)
    yield refused
    yield _gauge("device_fell_back", "Whether a device serves that nobody wanted.", int(device.fell_back))
    yield _gauge("device_fallbacks", "Devices that were tried before the one that serves.", len(device.refused))


def _swaps(deployments: Deployments) -> Iterator[Metric]:
    status = deployments.status()
    yield _counters("swaps", "Attempts to swap the bundle.", ("kind", "result"), deployments.swap_counts().items())
    yield _gauge("serving_since_seconds", "When what serves took over, Unix time.", status.since)
    yield _gauge("swap_opening", "Whether a bundle is being opened beside it.", int(status.opening is not None))
    yield _gauge("draining", "Replaced bundles that requests still hold.", len(status.draining))
    yield _gauge("draining_requests", "Requests that hold a replaced bundle.", sum(status.draining.values()))


def _batches(deployments: Deployments) -> Iterator[Metric]:
    work = deployments.work()
    yield _counter("batches", "Batches computed.", work.batches)
    yield _counter("batched_requests", "Requests of those batches.", work.requests)
    given = {(stage,): padding.given for stage, padding in work.padding.items()}
    yield _counters("rows_given", "Events or candidates that a stage had to compute.", ("stage",), given.items())
    computed = {(stage,): padding.computed for stage, padding in work.padding.items()}
    yield _counters("rows_computed", "The same, with padding.", ("stage",), computed.items())


def _cache(kv: CacheStatistics) -> Iterator[Metric]:
    hits = {("hit",): kv.hits, ("extended",): kv.extended}
    yield _counters("kv_hits", "Lookups that found all events, or a beginning.", ("kind",), hits.items())
    misses = {(reason,): count for reason, count in kv.misses.items()}
    yield _counters("kv_misses", "Lookups that found nothing that serves.", ("reason",), misses.items())
    yield _counter("kv_evictions", "Entries that made room.", kv.evictions)
    yield _counter("kv_unstored", "Encoded histories that found no room.", kv.unstored)
    yield _gauge("kv_entries", "Users with an entry.", kv.entries)
    yield _gauge("kv_pinned_entries", "Entries in use.", kv.pinned)
    yield _gauge("kv_budget_bytes", "Bytes allocated.", kv.bytes_budget)
    yield _gauge("kv_used_bytes", "Bytes of pages in use.", kv.bytes_used)
    yield _gauge("kv_high_water_bytes", "The most that was ever in use.", kv.bytes_high_water)
    yield _gauge("kv_beside_bytes", "Bytes that entries take beside the pages.", kv.bytes_beside)


def _counters(
    name: str, text: str, labels: Sequence[str], counts: Iterable[tuple[Sequence[str], int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"unipinrec_{name}", text, labels=labels)
    for values, count in sorted(counts):
        family.add_metric(values, count)
    return family


def _histogram(name: str, text: str, tallies: Iterable[tuple[str, Tally]], *label: str) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"unipinrec_{name}", text, labels=label)
    for value, tally in tallies:
        tally.add_to(family, *[value] * len(label))
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"unipinrec_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"unipinrec_{name}", text, value=value)
