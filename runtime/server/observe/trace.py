"""The time of one request, as a trace for Chrome and Perfetto, or as spans for OpenTelemetry."""

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
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.bodies import ApiError
from unipinrec.runtime.server.call import Call, Handler, Server, as_json
from unipinrec.runtime.server.operations import EVERY, Operation, in_path

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

HEADER, PATH = "x-trace", "/debug/traces"
SERVICE = "unipinrec"
TRACE = Operation(
    path=f"{PATH}/{{name}}",
    scope="metrics",
    summary="The trace of a request",
    answer=dict[str, Any],
    statuses=(*EVERY, 404),
    parameters={"name": in_path()},
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a request.

    Attributes:
        name: Name of the part.
        start, end: Times by `time.perf_counter`.
        track: 0 = the request as a whole, else the number of its slate.
        depth: Number of spans around it; its parent is the latest span before it with a lower depth.
        facts: Further attributes.
    """

    name: str
    start: float
    end: float
    track: int = 0
    depth: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def spans(call: Call) -> Iterator[Span]:
    """The spans of a request that was answered, outer ones first."""
    facts = {"request_id": call.id, "status": call.status}
    yield Span(name=call.route, start=call.began, end=call.began + call.seconds, facts=facts)
    for track, (slate, answer) in enumerate(zip(call.slates, call.answers, strict=True), 1):
        batch = {"bundle": slate.bundle, "device": slate.device, "batch": answer.batch}
        yield Span(name="queue", start=answer.arrived, end=answer.started, track=track, depth=1)
        yield Span(name="batch", start=answer.started, end=answer.finished, track=track, depth=1, facts=batch)
        stages: dict[str, dict[str, Any]] = {
            "encode": {"kv": slate.kv, "kv_reason": slate.kv_reason},
            "retrieve": {"exact": slate.exact},
            "rank": {"items": len(slate.items)},
        }
        # A batch is computed in groups, one after another, whose order is not kept: assume that this one was the last.
        at = answer.finished - slate.stages_ms.total / 1e3
        for stage, facts_of_stage in stages.items():
            end = at + getattr(slate.stages_ms, stage) / 1e3
            yield Span(name=stage, start=at, end=end, track=track, depth=2, facts=facts_of_stage)
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
    """The traces of the latest requests with `X-Trace: 1`; their answers name the path of the trace."""

    def __init__(self, keep: int = 64) -> None:
        """Keep the latest `keep` traces."""
        self.keep = keep
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def observe(self, call: Call) -> None:
        """Keep a request's trace if its header says so."""
        if call.request.headers.get(HEADER) != "1":
            return
        name = os.urandom(8).hex()  # not the request's id, which other clients might guess
        self._kept[name] = chrome_trace(call)
        while len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        call.headers[HEADER] = f"{PATH}/{name}"

    def find(self, name: str) -> dict[str, Any] | None:
        """A trace by its name; None if it is not kept."""
        return self._kept.get(name)


def trace_route(server: Server, traces: Traces, everywhere: Callable[[Handler], Handler] | None = None) -> Route:
    """GET /debug/traces/{name}; `everywhere` wraps the handler to look in the other processes too."""

    async def find(_server: Server, call: Call) -> Response:
        trace = traces.find(call.request.path_params["name"])
        if trace is None:
            message = f"there is no such trace; the latest {traces.keep} that X-Trace: 1 asked for are kept"
            raise ApiError(404, "no_such_trace", message)
        return as_json(trace)

    return route(server, TRACE, find if everywhere is None else everywhere(find))


class OtelSpans:
    """Sends the spans of every request to OpenTelemetry, below the caller's span if there is one (traceparent)."""

    def __init__(self, processor: SpanProcessor) -> None:
        """Hand spans to a processor; needs OpenTelemetry."""
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
        """Send in batches to the collector in OpenTelemetry's environment variables (OTEL_EXPORTER_OTLP_ENDPOINT).

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
        """Send the remaining spans."""
        self._provider.shutdown()
