"""Serving a bundle: encode, retrieve, rank. Runs without torch and imports nothing of `models` or `export`.

rec = Recommender.load("bundle/")
slate = rec.recommend([Event(item="42", actions=("click",))], k=20)
"""

from unipinrec.runtime.batching import Batcher, BatchOptions
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.kv.cache import KvCache
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import Event, RecommendOptions, Request, parse_events
from unipinrec.runtime.slate import Slate, SlateItem, StageTimes
from unipinrec.runtime.verify import VerifyReport, verify_bundle

__all__ = [
    "BatchOptions",
    "Batcher",
    "Bundle",
    "CacheOptions",
    "Event",
    "KvCache",
    "RecommendOptions",
    "Recommender",
    "Request",
    "Slate",
    "SlateItem",
    "StageTimes",
    "VerifyReport",
    "parse_events",
    "verify_bundle",
]
