"""How much of what it should find the index finds, measured on requests in service.

A small share of searches is repeated exactly, in the background and one at a time, with the filters that the request
had. The request does not wait for it; a search that comes while another is compared is passed over.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from unipinrec.errors import ConfigError
from unipinrec.runtime.retrieval.index import recall
from unipinrec.runtime.retrieval.retriever import CandidateSet, Retriever, Search

NICENESS = 10
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sampled:
    """A search by the index, and all that it depends on."""

    retriever: Retriever
    search: Search
    found: CandidateSet

    def recall(self) -> float:
        """Share of the true candidates that were found."""
        (true,) = Retriever.retrieve(self.retriever, [replace(self.search, exact=True)])
        return recall(self.found.similarity[None], true.similarity[None])


class RecallSampler:
    """Compares a share of searches with exact ones in a thread of its own; close it."""

    def __init__(self, share: float, seed: int | None = None) -> None:
        """Watch a share of searches, from 0 to 1.

        Raises:
            ConfigError: The share is something else.
        """
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"recall_share={share} must be from 0 to 1; 0.001 is one search in a thousand")
        self.share, self.observe = share, _ignore
        self.passed_over = 0
        self._random = random.Random(seed).random
        self._changed = threading.Condition()
        self._next: _Sampled | None = None
        self._busy = self._closed = False
        self._thread = threading.Thread(target=self._work, name="unipinrec-recall", daemon=True)
        self._thread.start()

    observe: Callable[[float], None]
    """Told the recall of every comparison, in the sampler's thread."""

    def watch(self, retriever: Retriever) -> Retriever:
        """The same retriever, whose searches are sampled."""
        return _WatchedRetriever(
            index=retriever.index,
            scan=retriever.scan,
            item_vectors=retriever.item_vectors,
            live=retriever.live,
            visit_cost=retriever.visit_cost,
            sampler=self,
        )

    def offer(self, search: _Sampled) -> None:
        """Compare a search, if chance wants it and no other is being compared."""
        if self._random() >= self.share:
            return
        with self._changed:
            if self._busy or self._closed:
                self.passed_over += 1
                return
            self._next, self._busy = search, True
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until nothing is being compared."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def close(self) -> None:
        """Finish the comparison under way, and stop; twice has no effect."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        with suppress(OSError, AttributeError):  # requests come first, where the system lets a thread say so
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next is not None)
                search, self._next = self._next, None
            if search is None:
                return
            try:
                self.observe(search.recall())
            except Exception:  # the next one may be of another bundle
                log.exception("a sampled search could not be compared with an exact one")
            del search  # it holds a bundle's index, which may have been replaced by now
            with self._changed:
                self._busy = False
                self._changed.notify_all()


@dataclass(frozen=True, kw_only=True, eq=False)
class _WatchedRetriever(Retriever):
    sampler: RecallSampler

    def retrieve(self, searches: Sequence[Search]) -> list[CandidateSet]:
        """See `Retriever.retrieve`."""
        found = super().retrieve(searches)
        for search, candidates in zip(searches, found, strict=True):
            if candidates.exact is None:  # the index found it
                self.sampler.offer(_Sampled(retriever=self, search=search, found=candidates))
        return found


def _ignore(_recall: float) -> None:
    pass
