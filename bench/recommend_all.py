"""The lists of all users: `recommend-all` beside a loop over `Recommender.recommend`, and its peak memory.

    python bench/recommend_all.py [--users 3000] [--rounds 5] [--threads 2] [--memory-users 100000]

Card: the `tiny` and the `small` size with random weights over 10,000 items, k = 20; histories as long as those of
KuaiRand-Pure (10th to 90th percentile 8 to 66, `bench/kv_pages.py`), in a prepared data set. Ways, in turn:

    loop   one thread calls `Recommender.recommend` for each user; the engine computes with `--threads` threads
    all    `recommend_all` with as many workers; it also reads the data and writes the file

The peak memory is that of a process that answers `--memory-users` users with the `tiny` size; 0 = not measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from common import card, finish, interleaved, ratio, spread
from serving import with_threads
from synthetic import ACTIONS, NOW_MS, random_bundle

from unipinrec.export.lists.all_users import AllUsersTask, recommend_all
from unipinrec.export.lists.prepared import PreparedHistories
from unipinrec.models.config import SMALL, TINY, ModelConfig
from unipinrec.models.data.schema import (
    FORMAT_VERSION,
    Dataset,
    DatasetSpec,
    event_columns,
    slate_columns,
    write_dataset,
)
from unipinrec.runtime import Recommender, RecommendOptions
from unipinrec.runtime.requests import SOON_MS

ITEMS, K = 10_000, 20
LENGTHS = {"median": 39.0, "sigma": 0.8}
CHILD = """
import resource, sys
from unipinrec.cli import main
main(sys.argv[1:], standalone_mode=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def prepared(folder: Path, users: int, longest: int) -> Path:
    """A data set of so many users."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(LENGTHS["median"]), LENGTHS["sigma"], users), 1, longest).astype(int)
    count = int(lengths.sum())
    user = np.repeat(np.arange(users), lengths)
    times = NOW_MS - rng.integers(1, 10**9, count)
    events = pl.DataFrame(
        {
            "user_id": pl.Series(user).cast(pl.String).str.zfill(7),
            "item_id": pl.Series(rng.integers(0, ITEMS, count)).cast(pl.String),
            "surface": pl.repeat("unknown", count, eager=True),
            "timestamp_ms": times[np.lexsort((times, user))],
            **{f"action_{name}": rng.random(count) < 0.3 for name in ACTIONS},
        },
        schema=event_columns(ACTIONS),
    )
    spec = DatasetSpec(
        format_version=FORMAT_VERSION,
        name="random",
        actions=ACTIONS,
        positive_actions=("save",),
        surfaces=("unknown",),
        dense={},
        categories={},
        split=None,
        dropped={},
        source="random numbers",
    )
    items = pl.DataFrame({"item_id": [str(item) for item in range(ITEMS)], "title": pl.repeat(None, ITEMS, eager=True)})
    items = items.with_columns(pl.col("title").cast(pl.String))
    write_dataset(
        Dataset(spec=spec, events=events, slates=pl.DataFrame(schema=slate_columns(ACTIONS)), items=items), folder
    )
    return folder


def row(name: str, size: ModelConfig, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    bundle = random_bundle(scratch / name, ITEMS, size)
    recommender = Recommender.load(bundle, "cpu")
    data = prepared(scratch / f"data-{name}", options.users, recommender.bundle.manifest.model.max_history)
    histories, out = PreparedHistories.open(data), scratch / "lists.parquet"
    sent = [one for part in histories.parts(1_000, 10**6) for one in histories.read(part)]
    alone, workers = with_threads(recommender, options.threads), with_threads(recommender, 1)
    task = AllUsersTask(
        recommender=workers, histories=histories, k=K, options=RecommendOptions(), workers=options.threads
    )

    def loop() -> None:
        for _, events in sent:
            assert events[-1].timestamp_ms is not None
            alone.recommend(events, K, RecommendOptions(now_ms=events[-1].timestamp_ms + SOON_MS))

    def together() -> None:
        out.unlink(missing_ok=True)
        recommend_all(task, out)

    times = interleaved({"loop": loop, "all": together}, options.rounds)
    rates = {way: spread([1e3 * len(sent) / took for took in values]) for way, values in times.items()}
    padding = {stage: round(part.waste, 4) for stage, part in workers.padding().items()}
    speedup = ratio(times, "loop", "all")
    return {"model": name, "users_per_second": rates, "loop_over_all": speedup, "padding_waste": padding}


def memory(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of the command in a process of its own."""
    bundle, users = scratch / "tiny", options.memory_users
    data = prepared(scratch / "data-memory", users, 512)
    words = ["recommend-all", str(bundle), str(data), "--out", str(scratch / "memory.parquet"), "-k", str(K)]
    command = [sys.executable, "-c", CHILD, *words, "--threads", str(options.threads)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    events = int(pl.scan_parquet(data / "events.parquet", glob=False).select(pl.len()).collect().item())
    return {"users": users, "events": events, "peak_mib": round(int(printed[-1]) / 1024), "printed": printed[0]}


def main() -> None:
    """Measure both ways and the memory; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=3_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-users", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"tiny": TINY, "small": SMALL}
        rows = [row(name, size, Path(folder), options) for name, size in sizes.items()]
        peak = memory(Path(folder), options) if options.memory_users else None
    document = {**card("recommend_all"), **vars(options), "k": K, "items": ITEMS, "rows": rows, "memory": peak}
    finish(document, "recommend_all")


if __name__ == "__main__":
    main()
