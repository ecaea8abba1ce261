"""One bundle in service: opened, verified, warmed up, with its batcher."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path

from unipinrec.runtime.batching import Batcher, BatchOptions
from unipinrec.runtime.bundle.bundle import READ_WHILE_SERVING, Bundle
from unipinrec.runtime.bundle.golden import read_golden
from unipinrec.runtime.device import Machine
from unipinrec.runtime.graphs.engine import WORK_BYTES
from unipinrec.runtime.kv.cache import KvCache
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.kv.pages import KvGeometry
from unipinrec.runtime.popular import ColdStart
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import RecommendOptions, Request
from unipinrec.runtime.retrieval.sampling import RecallSampler
from unipinrec.runtime.server.events.seen import ItemsByHash

WARM_UP_BATCH = 8  # more would only take time from requests


@dataclass(frozen=True, kw_only=True)
class DeploymentOptions:
    """How bundles are opened for serving; see `Recommender.load` and `BatchOptions`.

    `cache.dtype` and `window_slack` are None = as each bundle states. `sampler` compares a share of the index's
    searches with exact ones. `shared` is the folder in which processes that serve together find each other's files;
    None = there is only one process.
    """

    device: str = "auto"
    strict: bool = False
    allow_bundle_engines: bool = False
    threads: int | None = None
    gpu: int = 0
    cache: CacheOptions | None = None
    window_slack: int | None = None
    cold_start: ColdStart = "popular"
    batching: BatchOptions = field(default_factory=BatchOptions)
    sampler: RecallSampler | None = None
    shared: Path | None = None
    work_bytes: int = WORK_BYTES


@dataclass(frozen=True, kw_only=True, eq=False)
class Deployment:
    """One bundle in service.

    Attributes:
        recommender: Answers requests.
        batcher: Passes concurrent requests to the recommender, in batches.
        version: The bundle's hash.
        path: The bundle's folder.
        options: How it was opened; the next deployment is opened in the same way.
        items_by_hash: Its items, to leave out those of a user's dropped events.
    """

    recommender: Recommender
    batcher: Batcher
    version: str
    path: Path
    options: DeploymentOptions = field(default_factory=DeploymentOptions)
    items_by_hash: ItemsByHash

    @classmethod
    def open(
        cls, path: Path | str, options: DeploymentOptions | None = None, *, cache: KvCache | None = None
    ) -> Deployment:
        """Open a bundle, verify that it computes here what PyTorch computed, and warm it up.

        Args:
            path: The bundle's folder.
            options: How to open it.
            cache: The cache of the deployment that this one replaces. It is used, with its entries, where keys and
                values of this model fit its pages, in the type that the options or this bundle state; else a new one
                is made from the options.

        Raises:
            BundleError: See `Recommender.load`.
            BackendError: See `Recommender.load`.
            ConfigError: See `Recommender.load`.
        """
        options, folder = options or DeploymentOptions(), Path(path).absolute()
        bundle = Bundle.open(folder, options.shared)
        if cache is not None:
            manifest, pages = bundle.manifest, cache.geometry
            dtype = (options.cache and options.cache.dtype) or manifest.cache_dtype
            cache = cache if KvGeometry.of(manifest.model, dtype, pages.page_slots) == pages else None
        recommender = Recommender.load(
            bundle,
            options.device,
            cache=cache or options.cache,
            window_slack=options.window_slack,
            cold_start=options.cold_start,
            strict=options.strict,
            allow_bundle_engines=options.allow_bundle_engines,
            machine=Machine(options.gpu),
            threads=options.threads,
            work_bytes=options.work_bytes,
        )
        with ExitStack() as unless_ready:
            unless_ready.callback(recommender.close)
            bundle.files.let_go(READ_WHILE_SERVING)
            warm_up(recommender, min(WARM_UP_BATCH, options.batching.max_batch))
            unless_ready.pop_all()
        if options.sampler is not None:
            recommender = replace(recommender, retriever=options.sampler.watch(recommender.retriever))
        batcher = Batcher(recommender, options.batching)
        version = recommender.bundle.hash
        items = ItemsByHash(list(bundle.rows))
        return cls(
            recommender=recommender,
            batcher=batcher,
            version=version,
            path=folder,
            options=options,
            items_by_hash=items,
        )

    def close(self) -> None:
        """Answer queued requests, then release graphs and memory; another deployment may go on to use the cache."""
        self.batcher.close()
        self.recommender.close()


def warm_up(recommender: Recommender, together: int) -> None:
    """Answer golden requests alone and in a batch of `together`, so that memory is ready for the first real ones.

    Raises:
        BackendError: The golden requests cannot be answered.
    """
    bundle = recommender.bundle
    # Without a user, so that the cache does not keep them.
    requests = [
        Request(history=bundle.events_of(history), k=1, options=RecommendOptions(exclude_seen=False))
        for history in read_golden(bundle).histories
    ]
    for request in requests:
        recommender.recommend_many([request])
    recommender.recommend_many(list(islice(cycle(requests), together)))
