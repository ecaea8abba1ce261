"""Where the time of one request went: as a trace that Chrome and Perfetto show, or as spans of OpenTelemetry."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.routing import Route

from unipinrec.errors import ConfigError
from unipinrec.runtime.batching import Answer
from unipinrec.runtime.requests import Slate
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.bodies import ApiError
from unipinrec.runtime.server.call import Call, Handler, Server, as_json
from unipinrec.runtime.server.operations import EVERY, Operation, in_path

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

ASKED, PATH = "x-trace", "/debug/traces"
SERVICE = "unipinrec"
TRACE = Operation(
    path=f"{PATH}/{{name}}",
    summary="The trace of a request",
    answer=dict[str, Any],
    statuses=(*EVERY, 404),
    parameters={"name": in_path()},
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a request.

    Attributes:
        name: What was done.
        start, end: When, by `time.perf_counter`.
        track: 0 = for the request as a whole, else for which of its slates.
        depth: Within how many other spans it lies; its parent is the latest one before it that lies less deep.
        facts: What else is known.
    """

    name: str
    start: float
    end: float
    track: int = 0
    depth: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def spans(call: Call) -> Iterator[Span]:
    """The parts of a request that was answered, outer ones first."""
    facts = {"request_id": call.id, "status": call.status}
    yield Span(name=call.route, start=call.began, end=call.began + call.seconds, facts=facts)
    for track, (slate, answer) in enumerate(zip(call.slates, call.answers, strict=True), 1):
        yield from _slate_spans(slate, answer, track)


def _slate_spans(slate: Slate, answer: Answer, track: int) -> Iterator[Span]:
    kv = {"kv": slate.kv, "kv_reason": slate.kv_reason}
    serving = {"bundle": slate.bundle, "device": slate.device, "batch": answer.batch}
    yield Span(name="queue", start=answer.arrived, end=answer.started, track=track, depth=1)
    yield Span(name="batch", start=answer.started, end=answer.finished, track=track, depth=1, facts=serving)
    times = slate.stages_ms
    # A batch is computed in groups one after another, and which came first is not kept: the last group ends with it.
    at = answer.finished - times.total / 1e3
    for stage, facts in (("encode", kv), ("retrieve", {"exact": slate.exact}), ("rank", {"items": len(slate.items)})):
        end = at + getattr(times, stage) / 1e3
        yield Span(name=stage, start=at, end=end, track=track, depth=2, facts=facts)
        at = end


def chrome_trace(call: Call) -> dict[str, Any]:
    """A request in the trace event format, times in microseconds since it arrived."""
    events: list[dict[str, Any]] = [
        {
            "name": span.name,
            "ph": "X",
            "ts": round((span.start - call.began) * 1e6, 1),
            "dur": round((span.end - span.start) * 1e6, 1),
            "pid": 1,
            "tid": span.track,
            "args": span.facts,
        }
        for span in spans(call)
    ]
    tracks = [("request", 0), *((f"slate {track}", track) for track in range(1, len(call.slates) + 1))]
    named = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": name}} for name, track in tracks
    ]
    return {"displayTimeUnit": "ms", "traceEvents": [*named, *events]}


class Traces:
    """The traces of the latest requests that asked for one with `X-Trace: 1`; their answers say where it lies."""

    def __init__(self, keep: int = 64) -> None:
        """Keep so many, the latest."""
        self.keep = keep
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def observe(self, call: Call) -> None:
        """Keep a request's trace if it asked for it."""
        if call.request.headers.get(ASKED) != "1":
            return
        name = os.urandom(8).hex()  # not the request's id, which a client may choose, and others guess
        self._kept[name] = chrome_trace(call)
        while len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        call.headers[ASKED] = f"{PATH}/{name}"

    def find(self, name: str) -> dict[str, Any] | None:
        """A trace that is kept."""
        return self._kept.get(name)


def trace_route(server: Server, traces: Traces, everywhere: Callable[[Handler], Handler] | None = None) -> Route:
    """GET /debug/traces/{name}; `everywhere` makes of its handler one that asks processes which serve together."""

    async def find(_server: Server, call: Call) -> Response:
        trace = traces.find(call.request.path_params["name"])
        if trace is None:
            raise ApiError(
                404, "no_such_trace", f"there is no such trace; the latest {traces.keep} that X-Trace: 1 asked for are"
            )
        return as_json(trace)

    return route(server, TRACE, find if everywhere is None else everywhere(find))


class OtelSpans:
    """Sends the spans of every request to OpenTelemetry, under the caller's own where it names one (traceparent)."""

    def __init__(self, processor: SpanProcessor) -> None:
        """Hand spans to a processor, which needs OpenTelemetry to be installed."""
        from opentelemetry import trace  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._trace, self._extract = trace, TraceContextTextMapPropagator().extract
        self._provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(SERVICE)

    @classmethod
    def open(cls) -> OtelSpans:
        """Send to the collector that OpenTelemetry's own variables name (OTEL_EXPORTER_OTLP_ENDPOINT), in batches.

        Raises:
            ConfigError: OpenTelemetry, or its exporter, is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                f"spans need {error.name}; run pip install 'unipinrec[otel]', or leave --otel out"
            ) from error
        return cls(BatchSpanProcessor(OTLPSpanExporter()))

    def observe(self, call: Call) -> None:
        """Send a request's spans."""
        kinds = self._trace.SpanKind
        now_ns = time.time_ns() - time.perf_counter_ns()
        parents = [self._extract({"traceparent": call.request.headers.get("traceparent", "")})]
        for span in spans(call):
            del parents[span.depth + 1 :]
            started = self._tracer.start_span(
                span.name,
                parents[-1],
                kind=kinds.INTERNAL if span.depth else kinds.SERVER,
                attributes={name: value for name, value in span.facts.items() if value is not None},
                start_time=int(span.start * 1e9) + now_ns,
            )
            parents.append(self._trace.set_span_in_context(started))
            started.end(int(span.end * 1e9) + now_ns)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
