"""Concurrent requests answered together: collected for a moment, grouped by what they need, computed in fewer runs.

A request waits for company no longer than `max_wait_ms`, and only while a worker is free; while all workers compute,
the next batch collects by itself. What is answered together is answered as it would be alone (`Recommender.answer`).
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from unipinrec.errors import BackendError, ConfigError
from unipinrec.runtime.graphs.backend import MAX_ROWS
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import Request, ResolvedRequest, Slate

LONGEST_WAIT_MS = 60_000


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How requests are collected.

    Attributes:
        max_batch: Most requests of a batch.
        max_wait_ms: Longest that a request waits for others while a worker is free; 0 = never. The
            operating system wakes the worker up to half a millisecond later.
        workers: Batches computed at the same time, which share the backend's threads. A second one computes while the
            first collects what it needs and makes answers: 1.2 to 1.3 times the throughput (`bench/batching.py`).
    """

    max_batch: int = MAX_ROWS
    max_wait_ms: float = 2.0
    workers: int = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.max_batch, int) and isinstance(self.workers, int)
        if not (whole and self.max_batch >= 1 and self.workers >= 1 and 0 <= self.max_wait_ms <= LONGEST_WAIT_MS):
            raise ConfigError(
                f"max_batch={self.max_batch} and workers={self.workers} must be integers of at least 1, "
                f"max_wait_ms={self.max_wait_ms} from 0 to {LONGEST_WAIT_MS}"
            )


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """What was collected since the start.

    Attributes:
        requests: Requests taken from the queue.
        batches: How often.
        largest: Most requests of a batch.
        longest_wait_ms: Longest time that a request waited for company while a worker was free.
        longest_queue_ms: Longest time from submission to the start of its batch, busy workers included.
    """

    requests: int = 0
    batches: int = 0
    largest: int = 0
    longest_wait_ms: float = 0.0
    longest_queue_ms: float = 0.0


class Answer(Future[Slate]):
    """The slate that a request will get, and when what happened to it.

    Attributes:
        arrived, started, finished: When it was queued, its batch began, and its batch ended (`time.perf_counter`).
        batch: Requests that were answered together with it, itself included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrived = self.started = self.finished = time.perf_counter()
        self.batch = 0


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    asked: ResolvedRequest
    answer: Answer


class Batcher:
    """Answers requests from any number of threads in batches. Close it, or use it as a context manager.

    One that is left open when the interpreter ends computes the batch under way, and answers nothing more.
    """

    def __init__(self, recommender: Recommender, options: BatchOptions | None = None) -> None:
        self.recommender, self.options = recommender, options or BatchOptions()
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._statistics = BatchStatistics()
        self._workers = [
            threading.Thread(target=self._work, name=f"unipinrec-batch-{place}", daemon=True)
            for place in range(self.options.workers)
        ]
        # Else a worker that comes back from native code would find no interpreter, which C++ answers with SIGABRT.
        atexit.register(self._end)
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, request: Request) -> Answer:
        """Queue a request; it is checked here, in the caller's thread. Cancelling the future frees its place.

        Raises:
            RequestError: It cannot be answered as given.
            BackendError: The batcher is closed.
        """
        asked = self.recommender.resolve(request)
        waiting = _Waiting(asked=asked, answer=Answer())
        with self._changed:
            if self._closed:
                raise BackendError("the batcher is closed; make a new one")
            self._queue.append(waiting)
            self._changed.notify_all()
        return waiting.answer

    def recommend(self, request: Request) -> Slate:
        """Answer one request together with those of other threads.

        Raises:
            RequestError: It cannot be answered as given.
            BackendError: The backend failed, or the batcher is closed.
        """
        return self.submit(request).result()

    def statistics(self) -> BatchStatistics:
        """A consistent snapshot. What padding cost is in `Recommender.padding`."""
        with self._changed:
            return self._statistics

    def close(self) -> None:
        """Answer what is queued, then stop. Closing twice has no effect."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._join()

    def _end(self) -> None:
        if any(worker.is_alive() for worker in self._workers):  # in a fork none is, and what they hold is held for ever
            self._refuse_queued("the interpreter ends")
            self._join()

    def _join(self) -> None:
        for worker in self._workers:
            worker.join()
        atexit.unregister(self._end)

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._answer(batch)
        except BaseException as error:  # a worker ends that should not
            self._refuse_queued(f"the batcher failed: {error!r}; make a new one")
            raise

    def _answer(self, batch: list[_Waiting]) -> None:
        running = [waiting for waiting in batch if waiting.answer.set_running_or_notify_cancel()]
        started = time.perf_counter()
        try:
            answers = self.recommender.answer([waiting.asked for waiting in running])
        except BaseException as error:  # whatever it is, those who wait must hear of it
            answers = [error if isinstance(error, Exception) else BackendError(repr(error))] * len(running)
        finished = time.perf_counter()
        for waiting, answer in zip(running, answers, strict=True):
            waiting.answer.started, waiting.answer.finished = started, finished
            waiting.answer.batch = len(running)
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result(answer)

    def _refuse_queued(self, why: str) -> None:
        """Take nothing more, and let nobody wait for what nobody will compute."""
        with self._changed:
            self._closed = True
            left, self._queue = self._queue, deque()
            self._changed.notify_all()
        for waiting in left:
            if waiting.answer.set_running_or_notify_cancel():
                waiting.answer.set_exception(BackendError(why))

    def _next_batch(self) -> list[_Waiting]:
        """Wait for requests; empty once the batcher is closed and all are taken."""
        free = time.perf_counter()
        with self._changed:
            while not self._full():
                left = None
                if self._queue:
                    left = self._queue[0].answer.arrived + self.options.max_wait_ms / 1e3 - time.perf_counter()
                if (left is not None and left <= 0) or (left is None and self._closed):
                    break
                self._changed.wait(left)
            batch = list(itertools.islice(self._queue, self.options.max_batch))
            if batch:
                self._count(batch, free)
            for _ in batch:
                self._queue.popleft()
            return batch

    def _full(self) -> bool:
        """Whether a batch need not wait any longer."""
        return len(self._queue) >= self.options.max_batch or (self._closed and bool(self._queue))

    def _count(self, batch: list[_Waiting], free: float) -> None:
        now, before = time.perf_counter(), self._statistics
        oldest = batch[0].answer.arrived
        self._statistics = BatchStatistics(
            requests=before.requests + len(batch),
            batches=before.batches + 1,
            largest=max(before.largest, len(batch)),
            longest_wait_ms=max(before.longest_wait_ms, (now - max(oldest, free)) * 1e3),
            longest_queue_ms=max(before.longest_queue_ms, (now - oldest) * 1e3),
        )
