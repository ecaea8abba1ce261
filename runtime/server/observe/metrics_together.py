"""The metrics of processes that serve together, in one scrape: a label of each sample names its process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.routing import Route

from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.observe.metrics import METRICS, ServerMetrics, counters
from unipinrec.runtime.server.process.peers import PeerAnswer, Peers


def metrics_together_route(server: Server, metrics: ServerMetrics, peers: Peers) -> Route:
    """GET /metrics of all processes; another process of them gets only the metrics of this one."""

    metrics.registry.register(_HandedOver(peers))

    async def scrape(_server: Server, call: Call) -> Response:
        own, content_type = metrics.render()
        if call.from_peer:
            return Response(own, headers={"content-type": content_type})
        texts = {peers.worker.index: own.decode()}
        for index, answer in (await peers.ask_others(call)).items():
            if isinstance(answer, PeerAnswer) and answer.status == 200:
                texts[index] = answer.content.decode()
        encode, content_type = choose_encoder(call.request.headers.get("accept", ""))
        body = await asyncio.to_thread(encode, _Together(texts, peers.worker.count))
        return Response(body, headers={"content-type": content_type})

    return route(server, METRICS, scrape)


@dataclass(frozen=True)
class _HandedOver(Collector):
    """Requests that this process handed to others."""

    peers: Peers

    def collect(self) -> Iterator[Metric]:
        text = "Requests handed to the process that caches their user, by result."
        counts = {(str(index), result): count for (index, result), count in self.peers.handed_over.items()}
        yield counters("handed_over", text, ("owner", "result"), counts)


@dataclass(frozen=True)
class _Together(Collector):
    """The samples of several texts by family, with a label for the process."""

    texts: dict[int, str]
    processes: int

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for index, text in sorted(self.texts.items()):
            for family in text_string_to_metric_families(text):
                kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    kept.samples.append(sample._replace(labels={**sample.labels, "process": str(index)}))
        yield from families.values()
        up = GaugeMetricFamily("unipinrec_process_up", "Whether a process answered this scrape.", labels=["process"])
        for index in range(self.processes):
            up.add_metric([str(index)], int(index in self.texts))
        yield up
