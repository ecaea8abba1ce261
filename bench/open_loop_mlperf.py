"""MLCommons LoadGen in its Server scenario, over the connections of `bench/open_loop.py`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlperf_loadgen
from open_loop import Answer, Connections, Sample

SAMPLE = re.compile(r'"ph":"b".*"sample_seq":(\d+),.*"sample_idx":(\d+),"issue_start_ns":(\d+),"complete_ns":(\d+)')


def loadgen(port: int, messages: Sequence[bytes], qps: float, seconds: float, folder: Path) -> list[Sample]:
    """The same by MLCommons LoadGen, which leaves its own log in `folder`.

    Latencies are from LoadGen's trace. LoadGen counts every answer as a success, so that the answers are kept here.
    """
    answers: list[tuple[int, list[Answer]]] = []

    def issue(queries: list[Any]) -> None:
        for query in queries:
            got: list[Answer] = []
            answers.append((query.index, got))

            def done(answer: Answer, number: int = query.id, got: list[Answer] = got) -> None:
                got.append(answer)
                mlperf_loadgen.QuerySamplesComplete([mlperf_loadgen.QuerySampleResponse(number, 0, 0)])

            connections.send(messages[query.index], done)

    with Connections(port) as connections:
        sut = mlperf_loadgen.ConstructSUT(issue, lambda: None)
        library = mlperf_loadgen.ConstructQSL(len(messages), len(messages), lambda _: None, lambda _: None)
        mlperf_loadgen.StartTestWithLogSettings(sut, library, _scenario(qps, seconds), _logs(folder))
        mlperf_loadgen.DestroyQSL(library)
        mlperf_loadgen.DestroySUT(sut)
    return _traced(folder / "mlperf_log_trace.json", answers)


def _scenario(qps: float, seconds: float) -> Any:
    settings = mlperf_loadgen.TestSettings()
    settings.scenario, settings.mode = mlperf_loadgen.TestScenario.Server, mlperf_loadgen.TestMode.PerformanceOnly
    settings.server_target_qps, settings.server_target_latency_ns = qps, 100_000_000
    settings.server_target_latency_percentile, settings.min_query_count = 0.99, 1
    settings.min_duration_ms = settings.max_duration_ms = int(seconds * 1e3)
    settings.qsl_rng_seed, settings.sample_index_rng_seed, settings.schedule_rng_seed = 1, 2, 3
    return settings


def _logs(folder: Path) -> Any:
    settings = mlperf_loadgen.LogSettings()
    settings.enable_trace = True
    settings.log_output.outdir = str(folder)
    settings.log_output.copy_summary_to_stdout = False
    return settings


def _traced(path: Path, answers: Sequence[tuple[int, list[Answer]]]) -> list[Sample]:
    """LoadGen numbers samples in the order in which it issues them."""
    samples = []
    for line in path.read_text().splitlines():
        found = SAMPLE.search(line)
        if found is not None:
            number, position, late_ns, latency_ns = map(int, found.groups())
            index, got = answers[number]
            assert index == position, f"LoadGen's sample {number} is {position}, ours {index}"
            samples.append(Sample(position, late_ns / 1e6, latency_ns / 1e6, got[0]))
    return samples
