"""The metrics of processes that serve together, as one scrape: each sample says of which process it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.routing import Route

from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.observe.metrics import METRICS, Metrics
from unipinrec.runtime.server.process.peers import PeerAnswer, Peers


def metrics_together_route(server: Server, metrics: Metrics, peers: Peers) -> Route:
    """GET /metrics of all processes; what another of them asks for is that of this one."""

    metrics.registry.register(_HandedOver(peers))

    async def scrape(_server: Server, call: Call) -> Response:
        own, content_type = metrics.render()
        if call.from_peer:
            return Response(own, headers={"content-type": content_type})
        texts = {peers.place.index: own.decode()}
        for index, answer in (await peers.ask_others(call)).items():
            if isinstance(answer, PeerAnswer) and answer.status == 200:
                texts[index] = answer.content.decode()
        encode, content_type = choose_encoder(call.request.headers.get("accept", ""))
        body = await asyncio.to_thread(lambda: encode(_registry(_Together(texts, peers.place.count))))
        return Response(body, headers={"content-type": content_type})

    return route(server, METRICS, scrape)


class _HandedOver(Collector):
    """What this process handed to others."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def collect(self) -> Iterator[Metric]:
        text = "Requests handed to the process that keeps what is cached of their user, by what became of them."
        family = CounterMetricFamily("unipinrec_handed_over", text, labels=["owner", "result"])
        for (index, result), count in sorted(self._peers.handed_over.items()):
            family.add_metric([str(index), result], count)
        yield family


def _registry(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return registry


class _Together(Collector):
    """The samples of several texts by family, with a label for the process."""

    def __init__(self, texts: Mapping[int, str], processes: int) -> None:
        self._texts, self._processes = texts, processes

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for index, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    kept.samples.append(sample._replace(labels={**sample.labels, "process": str(index)}))
        yield from families.values()
        up = GaugeMetricFamily("unipinrec_process_up", "Whether a process answered this scrape.", labels=["process"])
        for index in range(self._processes):
            up.add_metric([str(index)], int(index in self._texts))
        yield up
