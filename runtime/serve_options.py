"""The options of `unipinrec serve`, and the memory that they grant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from unipinrec.errors import ConfigError
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.graphs.engine import WORK_BYTES
from unipinrec.runtime.popular import ColdStart
from unipinrec.runtime.server.admin import CURRENT
from unipinrec.runtime.server.process.lifecycle import RunOptions

MEBIBYTE = 1 << 20
ORIGIN = re.compile(r"https?://[^/\s?#]+")
CACHE_BYTES = 1024 * MEBIBYTE


@dataclass(frozen=True, kw_only=True)
class ServeOptions(RunOptions):
    """The options of `unipinrec serve`, whose help explains each; some of them are those of `RunOptions`.

    Attributes:
        processes: Number of processes; they share the CPU's threads, `cache_mib` and `state`.
        threads: CPU threads of a process; None = its share of the available ones.
        device, strict, allow_bundle_engines, cold_start: See `Recommender.load`.
        gpu: Number of the GPU.
        state: A folder or URL for users' events; None = memory. See `open_store`.
        max_users, events_mib, kept_events: Most users, memory for their events, and most events of a user; None =
            twice the longest history of the model.
        cache_mib, cache_dtype, cache_ttl_s: See `CacheOptions`; 0 MiB = no cache, None = see `memory_of`.
        work_mib: Memory for a batch, and for a request to /v2; None = see `memory_of`.
        v2: Whether there is /v2.
        window_slack: See `Recommender.load`.
        max_batch, batches, max_wait_ms: See `BatchOptions`; None = derived from the threads.
        queue, deadline_ms, max_deadline_ms: See `ServerOptions`.
        bundles: The folder of all bundles; None = the folder that holds the bundle.
        watch: Swap to the bundle that `current.json` names.
        tokens: TOML file of the tokens that clients need, read again when it changes; None = all may send requests.
        admin_token_file, admin_token_env: File or environment variable of one more token, for /admin.
        rate_limit, rate_burst: Requests a second, and at once, of each token, or without `tokens` of each address;
            each process counts its own. None = no limit; for `rate_burst` those of a second.
        page, page_images: Whether there is a page at /, and whether it loads pictures of items from other servers.
        cors: Origins whose pages may read answers; "*" = all.
        gzip: Compress answers for clients that accept it.
        log_format, log_level, log_users: See `LogOptions`.
        log_served, log_served_mib: Folder of the log of recommendations, and its largest size.
        recall_share: Share of the index's searches that are compared with a scan.
        traces, otel: Whether traces of requests are kept, and spans sent.
    """

    processes: int = 1
    threads: int | None = None
    device: str = "auto"
    strict: bool = False
    allow_bundle_engines: bool = False
    gpu: int = 0
    cold_start: ColdStart = "popular"
    state: str | None = None
    max_users: int = 100_000
    events_mib: int = 512
    kept_events: int | None = None
    cache_mib: int | None = None
    work_mib: int | None = None
    v2: bool = True
    cache_dtype: KvDtype | None = None
    cache_ttl_s: float | None = None
    window_slack: int | None = None
    max_batch: int | None = None
    batches: int | None = None
    max_wait_ms: float = 0.0
    queue: int = 256
    deadline_ms: float = 2000.0
    max_deadline_ms: float = 30_000.0
    bundles: Path | None = None
    watch: bool = False
    tokens: Path | None = None
    rate_limit: float | None = None
    rate_burst: int | None = None
    admin_token_file: Path | None = None
    admin_token_env: str | None = None
    page: bool = True
    cors: tuple[str, ...] = ()
    gzip: bool = False
    page_images: bool = False
    log_format: Literal["json", "human"] = "json"
    log_level: str = "info"
    log_users: bool = False
    log_served: Path | None = None
    log_served_mib: int = 1024
    recall_share: float = 0.001
    traces: bool = False
    otel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("processes", "threads", "kept_events", "window_slack", "max_batch", "batches", "work_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.cold_start not in get_args(ColdStart):
            raise ConfigError(f"cold_start={self.cold_start!r} must be one of {', '.join(get_args(ColdStart))}")
        if self.state == "":
            raise ConfigError("state='' names no folder; leave it out to keep users' events in memory")
        if self.bundles is not None and not Path(self.bundles).is_dir():
            raise ConfigError(f"bundles={str(self.bundles)!r} is not a folder")
        for origin in self.cors:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ConfigError(f"cors={origin[:100]!r} is no origin; write https://HOST[:PORT] without a path, or *")
        if self.processes > 1 and self.state is None:
            raise ConfigError(f"{self.processes} processes need a --state, so that all read the same events of a user")
        if self.rate_burst is not None and self.rate_limit is None:
            raise ConfigError(f"rate_burst={self.rate_burst} has no effect without rate_limit; give both")
        if self.processes > 1 and (self.admin_token_file or self.admin_token_env):
            raise ConfigError(
                f"{self.processes} processes swap by --watch, not by /admin: a restarted process must find the active "
                f"bundle in {CURRENT}; leave the admin token out"
            )


def memory_of(options: ServeOptions, runs: int, usable: int | None) -> tuple[int, int]:
    """Bytes of the cache of all processes, and of each of `runs` computations that run at the same time.

    By default the cache takes a gibibyte, at most a quarter of the `usable` bytes; the runs take half a gibibyte each,
    together at most a quarter.

    Raises:
        ConfigError: They do not fit.
    """
    quarter = (usable or 1 << 62) // 4
    cache = min(CACHE_BYTES, quarter) if options.cache_mib is None else options.cache_mib * MEBIBYTE
    work = min(WORK_BYTES, quarter // runs) if options.work_mib is None else options.work_mib * MEBIBYTE
    if usable is not None and cache + runs * work > usable:
        raise ConfigError(
            f"a cache of {cache >> 20:,} MiB and {runs} computations of {work >> 20:,} MiB take more than the "
            f"{usable >> 20:,} MiB that this process may use (cgroup or machine), without the bundle; lower "
            "--cache-mib or --work-mib, or leave them out"
        )
    return cache, work
