"""From a bundle to recommendations, without torch. These modules are the request path; folders hold the rest.

agreement.py      agreement of devices that round with fp32
batching.py       batches of concurrent requests
device.py         choice of the device, and why the devices before it do not run
golden_check.py   golden requests, replayed on this machine
machine.py        CPU, threads and memory of this machine
popular.py        popular items, for requests without a history
ranking.py        from logits to the order of a slate
recommender.py    the request path: encode, retrieve, rank
requests.py       types of requests and answers
sample.py         hits of the sample users' next items
serve.py          from the options of `unipinrec serve` to a running server
serve_options.py  the options of `unipinrec serve`, and the memory that they grant
validation.py     checks of a request against a bundle
verify.py         checks of a bundle: files, golden requests, sample users
"""

from unipinrec.runtime.batching import Batcher, BatchOptions
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.graphs.mock import MockBackend
from unipinrec.runtime.kv.cache import KvCache
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import (
    Event,
    RankOptions,
    RankRequest,
    RecommendOptions,
    Request,
    Slate,
    SlateItem,
    StageTimes,
    parse_events,
)
from unipinrec.runtime.verify import VerifyReport, verify_bundle

__all__ = [
    "BatchOptions",
    "Batcher",
    "Bundle",
    "CacheOptions",
    "Event",
    "KvCache",
    "MockBackend",
    "RankOptions",
    "RankRequest",
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
