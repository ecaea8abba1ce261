"""The index's recall, measured on requests in service.

A background thread repeats a small share of searches as exact scans, one at a time, with the request's filters. The
request does not wait; a search that arrives during a comparison is skipped.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from unipinrec.errors import ConfigError
from unipinrec.runtime.retrieval.index import recall
from unipinrec.runtime.retrieval.retriever import CandidateSet, Retriever, Search

NICENESS = 10
log = logging.getLogger(__name__)


class RecallSampler:
    """Compares a share of searches with exact scans, in its own thread; close it."""

    def __init__(self, share: float, seed: int | None = None) -> None:
        """Sample a share of searches, from 0 to 1.

        Raises:
            ConfigError: The share is not from 0 to 1.
        """
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"recall_share={share} must be from 0 to 1; 0.001 is one search in a thousand")
        self.share, self.observe = share, _ignore
        self.passed_over = 0
        self._random = random.Random(seed).random
        self._changed = threading.Condition()
        self._next: Callable[[], float] | None = None
        self._busy = self._closed = False
        self._thread = threading.Thread(target=self._work, name="unipinrec-recall", daemon=True)
        self._thread.start()

    observe: Callable[[float], None]
    """Called with the recall of every comparison, in the sampler's thread."""

    def watch(self, retriever: Retriever) -> Retriever:
        """The same retriever with sampled searches."""
        return _WatchedRetriever(**vars(retriever), sampler=self)

    def offer(self, compare: Callable[[], float]) -> None:
        """Run a comparison, which returns a recall, if it is drawn and no other is running."""
        if self._random() >= self.share:
            return
        with self._changed:
            if self._busy or self._closed:
                self.passed_over += 1
                return
            self._next, self._busy = compare, True
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until no comparison is running."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def close(self) -> None:
        """Finish the running comparison, and stop. Closing twice has no effect."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        with suppress(OSError, AttributeError):  # requests come first, if the system has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next is not None)
                compare, self._next = self._next, None
            if compare is None:
                return
            try:
                self.observe(compare())
            except Exception:  # the next search may be of another bundle
                log.exception("a sampled search could not be compared with an exact scan")
            del compare  # it holds a bundle's index, which may have been replaced by now
            with self._changed:
                self._busy = False
                self._changed.notify_all()


@dataclass(frozen=True, kw_only=True, eq=False)
class _WatchedRetriever(Retriever):
    sampler: RecallSampler

    def retrieve(self, searches: Sequence[Search]) -> list[CandidateSet]:
        """See `Retriever.retrieve`."""
        results = super().retrieve(searches)
        for search, candidates in zip(searches, results, strict=True):
            if candidates.exact is None and search.k:  # the index found it
                self.sampler.offer(partial(_recall, super().retrieve, search, candidates))
        return results


def _recall(retrieve: Callable[[Sequence[Search]], list[CandidateSet]], search: Search, result: CandidateSet) -> float:
    (exact,) = retrieve([replace(search, exact=True)])
    return recall(result.similarity[None], exact.similarity[None])


def _ignore(_recall: float) -> None:
    pass
