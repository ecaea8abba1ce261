"""`unipinrec prepare simulate`: a data set of simulated users, with the truth behind it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unipinrec.cli.common import FiniteRange, command, json_option, print_json, progress, stdout
from unipinrec.errors import ConfigError, DataError

if TYPE_CHECKING:
    from unipinrec.models.data.schema import Dataset

EXAMPLE = """\b
Example:
  unipinrec prepare simulate --out demo/data --users 2000 --items 2000 --seed 7"""

many = click.IntRange(1, 1_000_000_000)


@click.command(epilog=EXAMPLE)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--users", type=many, default=2000, show_default=True, help="Number of users.")
@click.option("--items", type=many, default=2000, show_default=True, help="Catalogue size.")
@click.option(
    "--categories",
    type=click.IntRange(min=1),
    default=None,
    help="Item categories.  [default: one per 50 items]",
)
@click.option(
    "--sessions",
    "sessions_per_user",
    type=FiniteRange(min=1),
    default=4.0,
    show_default=True,
    help="Mean sessions per user.",
)
@click.option(
    "--slates",
    "slates_per_session",
    type=FiniteRange(min=1),
    default=3.0,
    show_default=True,
    help="Mean slates per session.",
)
@click.option("--slate-size", type=click.IntRange(min=1), default=10, show_default=True, help="Items shown per slate.")
@click.option("--days", type=click.IntRange(1, 36_500), default=28, show_default=True, help="Simulated time.")
@click.option("--seed", type=click.IntRange(min=0), default=7, show_default=True, help="Same seed, same data.")
@json_option
@command
def simulate(out: Path, as_json: bool, **settings: Any) -> None:
    """Simulate users, what they were shown and what they did: a data set whose best possible score is known.

    Besides the tables of every data set, the folder gets oracle.parquet, oracle_slates.parquet and
    oracle_items.parquet: the true chances behind the labels. Nothing is downloaded.
    """
    from unipinrec.models.data.schema import write_dataset
    from unipinrec.models.simulator.oracle import write_oracle
    from unipinrec.models.simulator.simulator import SimulatorConfig
    from unipinrec.models.simulator.simulator import simulate as run

    if out.exists():
        raise DataError(f"{out} exists; choose another --out or remove it first")
    settings["categories"] = settings["categories"] or max(1, settings["items"] // 50)
    try:
        config = SimulatorConfig(**settings)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    started = time.monotonic()
    with progress() as bar:
        task = bar.add_task("simulating users", total=config.users, note="")
        dataset, oracle = run(config, on_users=lambda users: bar.advance(task, users))
    write_dataset(dataset, out, also=lambda folder: write_oracle(oracle, folder))
    report = {"out": str(out), **_summary(dataset), "seconds": round(time.monotonic() - started, 2)}
    if as_json:
        print_json(report)
    else:
        _print_table(report)


def _summary(dataset: Dataset) -> dict[str, Any]:
    slates, split = dataset.slates, dataset.spec.split
    assert split is not None
    time_ms = slates["timestamp_ms"]
    train, before_test = (
        int((time_ms < split.valid_start_ms).sum()),
        int((time_ms < split.test_start_ms).sum()),
    )
    return {
        "slate_rows": len(slates),
        "slates": slates["slate_id"].n_unique(),
        "events": len(dataset.events),
        "users": slates["user_id"].n_unique(),
        "items": len(dataset.items),
        "action_rates": {
            name: round(int(slates[f"action_{name}"].sum()) / len(slates), 4) for name in dataset.spec.actions
        },
        "split_rows": {"train": train, "valid": before_test - train, "test": len(slates) - before_test},
    }


def _print_table(report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in report.items():
        text = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), f"{text:,}" if isinstance(text, int) else str(text))
    stdout.print(table)
