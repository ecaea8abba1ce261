"""Bundle to recommendations, without torch. The visible path stays here; rooms hold the rest.

agreement.py     whether bf16 still recommends what fp32 does
batching.py      requests of concurrent threads, answered together
device.py        which device serves, why, and why none before it
golden_check.py  golden requests, replayed on the machine that serves
machine.py       CPU, threads and memory of this machine
popular.py       popular items, where there is no history
ranking.py       from logits to the order of a slate
recommender.py   the visible path: encode, retrieve, rank
requests.py      what a caller asks and gets: types only
sample.py        whether the sample users are served what they did next
serve.py         from the options of `unipinrec serve` to a running server
validation.py    a request checked against a bundle
verify.py        files, golden requests and sample users of a bundle, checked
"""

from unipinrec.runtime.batching import Batcher, BatchOptions
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.graphs.mock import MockBackend
from unipinrec.runtime.kv.cache import KvCache
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import Event, RecommendOptions, Request, Slate, SlateItem, StageTimes, parse_events
from unipinrec.runtime.verify import VerifyReport, verify_bundle

__all__ = [
    "BatchOptions",
    "Batcher",
    "Bundle",
    "CacheOptions",
    "Event",
    "KvCache",
    "MockBackend",
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
