"""`unipinrec demo`: every step from data to recommendations, each shown as the command that one would type."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import click

from unipinrec.cli.common import command, stderr, stdout
from unipinrec.errors import DataError

SOURCES = {
    "dataset.json": None,
    "u.data": "movielens",
    "ratings.dat": "movielens",
    "impressions*.csv*": "kuairand",
    "log_standard*.csv*": "kuairand",
}


@click.command(epilog="Example: unipinrec demo --out demo/   or, on real data:   unipinrec demo --data KuaiRand-Pure/")
@click.option("--data", type=click.Path(path_type=Path), help="KuaiRand or MovieLens files, or a prepared folder.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option("--config", default="tiny", show_default=True, help="As for `train`.")
@click.option("--epochs", type=int, default=12, show_default=True)
@command
def demo(data: Path | None, out: Path, config: str, epochs: int) -> None:
    """Prepare, train, export with an evaluation of the lists, verify and recommend, in one folder."""
    prepared, checkpoint, bundle = out / "data", out / "checkpoint", out / "bundle"
    began = time.monotonic()
    seconds = {}
    if data is None:
        seconds["prepare"] = _run("prepare", "simulate", "--out", prepared)
    elif (kind := _kind_of(data)) is not None:
        seconds["prepare"] = _run("prepare", kind, data, "--out", prepared)
    else:
        prepared = data
    seconds["train"] = _run(
        "train", "--data", prepared, "--config", config, "--out", checkpoint, "--epochs", str(epochs)
    )
    seconds["export"] = _run("export", checkpoint, bundle, "--data", prepared, "--evaluate", "20000")
    seconds["verify"] = _run("verify", bundle)
    user = json.loads((bundle / "user_ids.json").read_text())[0]
    seconds["recommend"] = _run("recommend", bundle, "--user", user, "-k", "10")
    stdout.print("  ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()), highlight=False)
    stdout.print(f"all steps: {time.monotonic() - began:.0f} s; everything is in {out}", highlight=False)


def _run(*words: str | Path) -> float:
    """Run one subcommand in this process; a failure ends the demo with its exit code."""
    root = click.get_current_context().find_root().command
    arguments = [str(word) for word in words]
    stderr.print(f"[bold]$ unipinrec {shlex.join(arguments)}[/]", highlight=False, soft_wrap=True)
    began = time.monotonic()
    root.main(arguments, standalone_mode=False)
    return time.monotonic() - began


def _kind_of(folder: Path) -> str | None:
    """Which `prepare` subcommand reads this folder; None if it is prepared already."""
    for pattern, kind in SOURCES.items():
        if any(folder.glob(pattern)) or any(folder.glob(f"data/{pattern}")):
            return kind
    raise DataError(
        f"{folder} holds none of {', '.join(SOURCES)}; bring other files in with `unipinrec prepare table`, "
        "then pass its output as --data"
    )
