"""A build's nested phases become one share that only grows."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from unipinrec.runtime.trt.build import progress_monitor


@pytest.fixture
def told() -> list[tuple[float, str]]:
    return []


def monitor_of(told: list[tuple[float, str]], stop: threading.Event | None = None) -> Any:
    module = SimpleNamespace(IProgressMonitor=object)
    return progress_monitor(module, lambda share, phase: told.append((share, phase)), stop or threading.Event())


def test_a_phase_fills_the_step_that_it_is_within(told: list[tuple[float, str]]) -> None:
    monitor = monitor_of(told)
    monitor.phase_start("build", None, 2)
    monitor.phase_start("parse", "build", 4)
    for step in range(3):
        monitor.step_complete("parse", step)
    monitor.phase_finish("parse")
    monitor.step_complete("build", 0)
    monitor.phase_start("tactics", "build", 1)
    monitor.phase_start("kernel", "tactics", 2)
    monitor.step_complete("kernel", 0)
    monitor.step_complete("tactics", 0)
    monitor.step_complete("build", 1)
    assert told == [
        (0.125, "parse"),
        (0.25, "parse"),
        (0.375, "parse"),
        (0.5, "build"),
        (0.75, "kernel"),
        (1.0, "tactics"),
        (1.0, "build"),
    ]


def test_the_share_never_falls(told: list[tuple[float, str]]) -> None:
    monitor = monitor_of(told)
    monitor.phase_start("build", None, 2)
    for _ in range(2):  # a phase of the same name, once more within the same step
        monitor.phase_start("again", "build", 2)
        monitor.step_complete("again", 0)
        monitor.phase_finish("again")
    monitor.phase_start("alone", "gone", 10)
    monitor.step_complete("alone", 0)
    monitor.step_complete("unknown", 0)
    assert [share for share, _ in told] == [0.25, 0.25, 0.25, 0.25]


def test_a_build_goes_on_until_it_is_to_stop(told: list[tuple[float, str]]) -> None:
    stop = threading.Event()
    monitor = monitor_of(told, stop)
    monitor.phase_start("build", None, 3)
    assert monitor.step_complete("build", 0) is True
    stop.set()
    assert monitor.step_complete("build", 1) is False
