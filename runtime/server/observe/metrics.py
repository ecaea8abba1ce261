"""Prometheus metrics of a server. Requests are counted as they are answered; all else is read at each scrape.

docs/operations.md explains every metric, and which are worth an alert.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from unipinrec.runtime.server.access.access import Access
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.operations import Operation
from unipinrec.runtime.server.swap import Deployments

METRICS = Operation(path="/metrics", scope="metrics", summary="Metrics for Prometheus", polled=True)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STAGES = ("encode", "retrieve", "rank", "total")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
RECALLS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)


class Tally:
    """A histogram for one thread; the library's own have locks, which cost more than all else here."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class ServerMetrics(Collector):
    """The metrics of one server, in their own registry; used in the event loop's thread."""

    def __init__(self, server: Server, sampler: RecallSampler | None = None) -> None:
        """Count the requests of a server, and the recall that a sampler measures."""
        self._server, self._sampler = server, sampler
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self._http: dict[str, Tally] = defaultdict(lambda: Tally(SECONDS))
        self._stages = {stage: Tally(SECONDS) for stage in STAGES}
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
            if slate.source == "popular":  # neither cached nor computed
                self._popular += 1
                continue
            for stage, tally in self._stages.items():
                tally.observe(getattr(slate.stages_ms, stage) * 1e-3)
            self._slates[slate.kv, "index" if slate.exact is None else "scan"] += 1

    def collect(self) -> Iterator[Metric]:
        """All metrics of the server, at this moment."""
        server, deployments = self._server, self._server.deployments
        yield _histogram("http_seconds", "From a request's arrival to its answer.", self._http, "endpoint")
        yield _histogram("stage_seconds", "Time of a stage, for a slate and its batch.", self._stages, "stage")
        yield _histogram("queue_seconds", "From a slate's request to the start of its batch.", {"": self._queue})
        yield _histogram("slate_batch_size", "Requests in a slate's batch.", {"": self._batch})
        yield counters("http_requests", "Answers.", ("endpoint", "code"), self._codes)
        yield counters("http_errors", "Answers that are errors, by reason.", ("endpoint", "reason"), self._errors)
        yield counters("slates", "The model's slates, by cache result and search.", ("kv", "search"), self._slates)
        yield _counter("popular_slates", "Slates of popular items, for requests without a history.", self._popular)
        for kind, admission in (("recommend", server.admission), ("store", server.writes)):
            yield _gauge(f"{kind}_pending", "Requests that were admitted and not yet answered.", admission.pending)
            yield _gauge(f"{kind}_pending_max", "Most pending requests so far.", admission.most_pending)
            yield _counter(f"{kind}_turned_away", "Requests that were rejected for lack of room.", admission.refused)
        yield _gauge("ready", "Whether requests are answered.", int(server.phase == "ready"))
        yield from _access(server.access)
        if self._sampler is not None:
            yield _counter("ann_recall_passed_over", "Samples that were not compared.", self._sampler.passed_over)
        if deployments is not None:
            yield from _active(deployments)
            yield from _swaps(deployments)
            yield from _batches(deployments)
            cache = deployments.current.recommender.cache
            if cache is not None:
                yield from _cache(cache.statistics())

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


def _access(access: Access) -> Iterator[Metric]:
    stale = GaugeMetricFamily(
        "unipinrec_access_stale", "Whether tokens or certificate changed and cannot be used.", labels=["file"]
    )
    reloads: dict[tuple[str, str], int] = {}
    for kind, file in access.files():
        stale.add_metric([kind], int(file.stale))
        reloads |= {(kind, result): count for result, count in file.reloads.items()}
    yield stale
    yield counters("access_reloads", "Reads of changed tokens or certificates.", ("file", "result"), reloads)


def _active(deployments: Deployments) -> Iterator[Metric]:
    deployment = deployments.current
    device = deployment.recommender.device
    active = {"bundle": deployment.path.name, "version": deployment.version, "device": device.name}
    active |= {"precision": device.precision, "reason": device.reason}
    yield InfoMetricFamily("unipinrec_serving", "The active bundle and its device.", value=active)
    refused = GaugeMetricFamily("unipinrec_device_refused", "Preferred devices that do not run.", labels=["why"])
    for why in device.refused:
        refused.add_metric([why], 1)
    yield refused
    yield _gauge("device_fell_back", "Whether the device is a fallback.", int(device.fell_back))
    yield _gauge("device_fallbacks", "Devices that were tried before the active one.", len(device.refused))


def _swaps(deployments: Deployments) -> Iterator[Metric]:
    status = deployments.status()
    yield counters("swaps", "Attempts to swap the bundle.", ("kind", "result"), deployments.swap_counts())
    yield _gauge("serving_since_seconds", "When the active bundle took over, Unix time.", status.since)
    yield _gauge("swap_opening", "Whether another bundle is being opened.", int(status.opening is not None))
    yield _gauge("draining", "Replaced bundles that requests still hold.", len(status.draining))
    yield _gauge("draining_requests", "Requests that hold a replaced bundle.", sum(status.draining.values()))


def _batches(deployments: Deployments) -> Iterator[Metric]:
    work = deployments.work()
    yield _counter("batches", "Batches computed.", work.batches)
    yield _counter("batched_requests", "Requests of those batches.", work.requests)
    rows = {stage: padding.useful for stage, padding in work.padding.items()}
    yield counters("rows_given", "Events or candidates that a stage had to compute.", ("stage",), rows)
    rows = {stage: padding.computed for stage, padding in work.padding.items()}
    yield counters("rows_computed", "The same, with padding.", ("stage",), rows)


def _cache(kv: CacheStatistics) -> Iterator[Metric]:
    hits = {"hit": kv.hits, "extended": kv.extended}
    yield counters("kv_hits", "Lookups that found all events of a history, or its first ones.", ("kind",), hits)
    yield counters("kv_misses", "Lookups that found no usable entry.", ("reason",), kv.misses)
    yield _counter("kv_evictions", "Entries that were evicted.", kv.evictions)
    yield _counter("kv_unstored", "Encoded histories that did not fit.", kv.unstored)
    yield _gauge("kv_entries", "Users with an entry.", kv.entries)
    yield _gauge("kv_pinned_entries", "Entries in use.", kv.pinned)
    yield _gauge("kv_budget_bytes", "Bytes allocated.", kv.bytes_budget)
    yield _gauge("kv_used_bytes", "Bytes of pages in use.", kv.bytes_used)
    yield _gauge("kv_high_water_bytes", "Most bytes in use so far.", kv.bytes_high_water)
    yield _gauge("kv_beside_bytes", "Bytes of entries outside the pages.", kv.bytes_beside)


def counters(
    name: str, text: str, labels: Sequence[str], counts: Mapping[str, int] | Mapping[tuple[str, str], int]
) -> CounterMetricFamily:
    """A counter for each label value, or pair of values."""
    family = CounterMetricFamily(f"unipinrec_{name}", text, labels=labels)
    for key, count in sorted(counts.items()):
        family.add_metric([key] if isinstance(key, str) else key, count)
    return family


def _histogram(name: str, text: str, tallies: Mapping[str, Tally], *label: str) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"unipinrec_{name}", text, labels=label)
    for value, tally in tallies.items():
        bounds = [*map(floatToGoString, tally.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(tally.counts), strict=True))
        family.add_metric([value] * len(label), buckets, tally.total)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"unipinrec_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"unipinrec_{name}", text, value=value)
