"""Batch concurrent requests: collect them for a moment, then compute them in fewer runs.

An idle worker holds a request for at most `max_wait_ms` to batch it with others. While all workers are busy, the next
batch collects anyway. Each answer is the same as alone (`Recommender.answer`).
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from unipinrec.errors import BackendError, ConfigError
from unipinrec.runtime.graphs.backend import MAX_ROWS
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import RankRequest, Request, ResolvedRequest, Slate

LONGEST_WAIT_MS = 60_000


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Options of a `Batcher`.

    Attributes:
        max_batch: Most requests of a batch.
        max_wait_ms: Longest time that an idle worker holds a request to batch it with others; 0 = none. The operating
            system adds up to half a millisecond.
        workers: Batches computed at the same time, which share the backend's threads. A second worker computes while
            the first prepares inputs and answers: 1.2 to 1.3 times the throughput (`bench/batching.py`).
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
    """Counts since the start.

    Attributes:
        requests: Requests taken from the queue.
        batches: Number of batches.
        largest: Most requests of a batch.
        longest_wait_ms: Longest time that an idle worker held a request.
        longest_queue_ms: Longest time from submission to the start of the batch, including busy workers.
    """

    requests: int = 0
    batches: int = 0
    largest: int = 0
    longest_wait_ms: float = 0.0
    longest_queue_ms: float = 0.0


class Answer(Future[Slate]):
    """The slate that a request will get, and the times of its batch.

    Attributes:
        request: The request.
        arrived, started, finished: `time.perf_counter` when it was queued, and around its batch.
        batch: Number of requests in its batch.
    """

    def __init__(self, request: ResolvedRequest) -> None:
        super().__init__()
        self.request, self.batch = request, 0
        self.arrived = self.started = self.finished = time.perf_counter()


class Batcher:
    """Answers requests from any number of threads in batches. Close it, or use it as a context manager.

    If it is still open when the interpreter ends, it finishes the running batch and answers nothing more.
    """

    def __init__(self, recommender: Recommender, options: BatchOptions | None = None) -> None:
        self.recommender, self.options = recommender, options or BatchOptions()
        self._queue: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._statistics = BatchStatistics()
        self._workers = [
            threading.Thread(target=self._work, name=f"unipinrec-batch-{index}", daemon=True)
            for index in range(self.options.workers)
        ]
        # Otherwise a worker may return from native code after the interpreter's end, and C++ ends it with SIGABRT.
        atexit.register(self._end)
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request | RankRequest) -> Answer:
        """Check a request in the caller's thread and queue it. One that is cancelled takes no place in a batch.

        Raises:
            RequestError: The request is invalid.
            BackendError: The batcher is closed.
        """
        answer = Answer(self.recommender.resolve(request))
        with self._changed:
            if self._closed:
                raise BackendError("the batcher is closed; make a new one")
            self._queue.append(answer)
            self._changed.notify_all()
        return answer

    def recommend(self, request: Request | RankRequest) -> Slate:
        """Answer one request together with those of other threads.

        Raises:
            RequestError: The request is invalid.
            BackendError: The backend failed, or the batcher is closed.
        """
        return self.submit(request).result()

    def statistics(self) -> BatchStatistics:
        """A consistent snapshot. `Recommender.padding` has the cost of padding."""
        with self._changed:
            return self._statistics

    def close(self) -> None:
        """Answer the queued requests, then stop. Closing twice has no effect."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._join()

    def _end(self) -> None:
        if any(worker.is_alive() for worker in self._workers):  # none is in a fork, where their locks stay locked
            self._reject_queued("the interpreter ends")
            self._join()

    def _join(self) -> None:
        for worker in self._workers:
            worker.join()
        atexit.unregister(self._end)

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._answer(batch)
        except BaseException as error:  # the worker ends although the batcher is open
            self._reject_queued(f"the batcher failed: {error!r}; make a new one")
            raise

    def _answer(self, batch: list[Answer]) -> None:
        running = [answer for answer in batch if answer.set_running_or_notify_cancel()]
        started = time.perf_counter()
        try:
            results = self.recommender.answer([answer.request for answer in running])
        except BaseException as error:  # the callers must learn of any failure
            results = [error if isinstance(error, Exception) else BackendError(repr(error))] * len(running)
        finished = time.perf_counter()
        for answer, result in zip(running, results, strict=True):
            answer.started, answer.finished, answer.batch = started, finished, len(running)
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)

    def _reject_queued(self, why: str) -> None:
        """Accept no more requests, and reject those in the queue."""
        with self._changed:
            self._closed = True
            queued, self._queue = self._queue, deque()
            self._changed.notify_all()
        for answer in queued:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(BackendError(why))

    def _next_batch(self) -> list[Answer]:
        """Wait for requests that are not cancelled; empty once the batcher is closed and its queue is empty."""
        free = time.perf_counter()
        with self._changed:
            while True:
                self._collect()
                self._queue = deque(answer for answer in self._queue if not answer.cancelled())
                batch = list(itertools.islice(self._queue, self.options.max_batch))
                if batch or self._closed:
                    break
            if batch:
                self._count(batch, free)
            for _ in batch:
                self._queue.popleft()
            return batch

    def _collect(self) -> None:
        """Wait until a batch may begin."""
        while len(self._queue) < self.options.max_batch and not self._closed:
            left = None
            if self._queue:
                left = self._queue[0].arrived + self.options.max_wait_ms / 1e3 - time.perf_counter()
                if left <= 0:
                    return
            self._changed.wait(left)

    def _count(self, batch: list[Answer], free: float) -> None:
        now, before = time.perf_counter(), self._statistics
        oldest = batch[0].arrived
        self._statistics = BatchStatistics(
            requests=before.requests + len(batch),
            batches=before.batches + 1,
            largest=max(before.largest, len(batch)),
            longest_wait_ms=max(before.longest_wait_ms, (now - max(oldest, free)) * 1e3),
            longest_queue_ms=max(before.longest_queue_ms, (now - oldest) * 1e3),
        )
