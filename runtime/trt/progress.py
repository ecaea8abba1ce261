"""How far a build is, out of the nested phases that TensorRT's progress monitor is told of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[float, str], None]


@dataclass(kw_only=True)
class _Phase:
    """A phase of a build: steps done of all of them, and the share of its present step that phases within it did."""

    steps: int
    parent: str | None
    done: int = 0
    within: float = 0.0


@dataclass(kw_only=True)
class _Phases:
    """The phases that are under way, by name, and how far the whole is."""

    running: dict[str, _Phase] = field(default_factory=dict)
    share: float = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self.running[name] = _Phase(steps=max(1, steps), parent=parent or None)

    def step(self, name: str) -> float:
        phase = self.running.get(name)
        if phase is not None:
            phase.done, phase.within = phase.done + 1, 0.0
            self._climb(phase)
        return self.share

    def finish(self, name: str) -> None:
        self.running.pop(name, None)

    def _climb(self, phase: _Phase) -> None:
        share = min(1.0, (phase.done + phase.within) / phase.steps)
        above = self.running.get(phase.parent) if phase.parent else None
        if above is None:
            self.share = max(self.share, share)
        else:
            above.within = share
            self._climb(above)


def progress_monitor(module: Any, progress: Progress, stop: threading.Event) -> Any:
    """A monitor for a build's configuration, which must not outlive it.

    Args:
        module: TensorRT's module.
        progress: Called from TensorRT's own threads with the share that is done and what is being done.
        stop: Ends the build at its next step once it is set.
    """
    phases, lock = _Phases(), threading.Lock()

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # its base comes with the module
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins."""
            with lock:
                phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """A step is done; False ends the build."""
            with lock:
                share = phases.step(phase_name)
            progress(share, phase_name)
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            """A phase is over."""
            with lock:
                phases.finish(phase_name)

    return Monitor()
