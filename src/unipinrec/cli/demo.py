"""`unipinrec demo`: all steps from data to recommendations, each printed as the command that a user would type."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import click

from unipinrec.cli.common import any_path, command, say, stderr
from unipinrec.errors import DataError

SOURCES = {
    "dataset.json": None,
    "u.data": "movielens",
    "ratings.dat": "movielens",
    "impressions*.csv*": "kuairand",
    "log_standard*.csv*": "kuairand",
}


@click.command(
    short_help="Run all steps in one folder.",
    epilog="Example: unipinrec demo --out demo/   or, on real data:   unipinrec demo --data KuaiRand-Pure/",
)
@click.option(
    "--data",
    type=any_path,
    help="A folder of KuaiRand or MovieLens files, or one that `prepare` wrote.  [default: simulated data]",
)
@click.option("--out", type=any_path, default=Path("demo"), help="Folder for data, checkpoint and bundle.")
@click.option("--config", default="tiny", help="Size of the model, as for `train`.")
@click.option("--epochs", type=int, default=12, help="Epochs of training.")
@command
def demo(data: Path | None, out: Path, config: str, epochs: int) -> None:
    """Run all steps in one folder: prepare, train, export with an evaluation, verify and recommend."""
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
        *("train", "--data", prepared, "--out", checkpoint), *("--config", config, "--epochs", epochs)
    )
    seconds["export"] = _run("export", checkpoint, bundle, "--data", prepared, "--evaluate", "20000")
    seconds["verify"] = _run("verify", bundle)
    user = json.loads((bundle / "user_ids.json").read_text())[0]
    seconds["recommend"] = _run("recommend", bundle, "--user", user, "-k", "10")
    say("  ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))
    say(f"all steps: {time.monotonic() - began:.0f} s; all files are in {out}")


def _run(*words: object) -> float:
    """Run one subcommand in this process; a failure ends the demo with its exit code."""
    root = click.get_current_context().find_root().command
    arguments = [str(word) for word in words]
    stderr.print(f"[bold]$ unipinrec {shlex.join(arguments)}[/]", highlight=False, soft_wrap=True)
    began = time.monotonic()
    root.main(arguments, standalone_mode=False)
    return time.monotonic() - began


def _kind_of(folder: Path) -> str | None:
    """The `prepare` subcommand that reads this folder; None if the folder is prepared already."""
    for pattern, kind in SOURCES.items():
        if any(folder.glob(pattern)) or any(folder.glob(f"data/{pattern}")):
            return kind
    raise DataError(
        f"{folder} holds none of {', '.join(SOURCES)}; read other files with `unipinrec prepare table`, "
        "then pass its output as --data"
    )
