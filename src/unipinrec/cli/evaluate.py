"""`unipinrec evaluate`, and the printed form of an evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.table import Table

from unipinrec.cli.common import any_path, data_option, json_command, print_json, progress, say, stderr, stdout, warn

if TYPE_CHECKING:
    from unipinrec.runtime.bundle.quality import Estimate, Evaluation

COLUMNS = {
    "hit_rate": "HR@10",
    "ndcg": "NDCG@10",
    "value": "value@10",
    "true_value": "true value",
    "served_ahead": "served ahead",
}


@click.command(
    short_help="Measure recommendations on held-out requests.",
    epilog="Example: unipinrec evaluate bundle/ --data data/",
)
@click.argument("model", type=any_path, metavar="CHECKPOINT|BUNDLE")
@data_option
@click.option("--split", type=click.Choice(["test", "valid"]), default="test", help="The part of the data to measure.")
@click.option("--limit", type=click.IntRange(min=1), help="Measure at most this many requests, drawn evenly.")
@click.option(
    "--repeats",
    is_flag=True,
    help="Also recommend and count items that the user had before, as for shops where people buy the same again.",
)
@json_command
def evaluate(model: Path, data: Path, split: Any, limit: int | None, repeats: bool, as_json: bool) -> None:
    """Measure a bundle's recommendations on held-out requests, next to other orders and simple baselines.

    A checkpoint is first exported to a temporary bundle. docs/ranking.md explains the figures.
    """
    with stderr.status("loading"):
        from unipinrec.export.lists.evaluation import evaluate as measure
        from unipinrec.runtime import Recommender
        from unipinrec.runtime.bundle.integrity import MANIFEST

    exported = (model / MANIFEST).exists()
    with nullcontext() if exported else tempfile.TemporaryDirectory() as scratch:
        bundle = model if scratch is None else _exported(model, data, Path(scratch) / "bundle")
        with Recommender.load(bundle, "cpu") as recommender, progress() as bar:
            task = bar.add_task("evaluate", total=None, note="")
            evaluation = measure(
                recommender,
                data,
                split,
                limit,
                repeats=repeats,
                on_batch=lambda done, total: bar.update(task, completed=done, total=total),
            )
    if as_json:
        print_json({"model": str(model), "data": str(data), "evaluation": evaluation})
    else:
        print_evaluation(evaluation)


def _exported(checkpoint: Path, data: Path, bundle: Path) -> Path:
    from unipinrec.export.bundle_writer import ExportOptions, export_bundle
    from unipinrec.export.checkpoint_source import source_from_checkpoint
    from unipinrec.export.data_histories import histories_from_data

    with stderr.status("exporting to a temporary bundle") as status:
        source = source_from_checkpoint(checkpoint, data)
        histories = histories_from_data(data, source, 100)
        export_bundle(
            source,
            bundle,
            histories=histories,
            options=ExportOptions(users=0, data=data),
            progress=lambda stage: status.update(f"exporting to a temporary bundle: {stage}"),
        )
    return bundle


def print_evaluation(evaluation: Evaluation) -> None:
    """Print a row with standard errors per list, then a row per action; warnings go to stderr."""
    from unipinrec.runtime.bundle.quality import named

    title = f"lists of ten, {evaluation.requests} {evaluation.split} requests, served by {evaluation.order}"
    columns = [name for name in COLUMNS if any(getattr(row, name) for row in evaluation.lists.values())]
    headers = [COLUMNS[name] for name in columns]
    table = Table("list", *headers, title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, quality in evaluation.lists.items():
        table.add_row(named(name), *(_with_error(getattr(quality, column)) for column in columns))
    if columns:
        stdout.print(table)
    if evaluation.actions:
        actions = Table("action", "AUC", "GAUC", "AUC in slates", "log loss", title="probabilities of shown items")
        for name, action in evaluation.actions.items():
            values = (action.auc, action.gauc, action.slate_auc, action.logloss)
            actions.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
        stdout.print(actions)
    for line in _lines(evaluation):
        say(line)
    for warning in evaluation.warnings:
        warn(warning)


def _lines(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.found is not None:
        yield (
            f"{evaluation.found.mean:.1%} of the {evaluation.targets} logged next items are among the "
            f"{min(evaluation.candidates, evaluation.items)} candidates of {evaluation.items} items"
        )
    if evaluation.data["repeats"]:
        counted = "counted" if evaluation.repeats else "not counted"
        share = f"{evaluation.data['repeats']:.1%} of the held-out events"
        yield f"{share} are of items that the user had before: {counted}"
    if evaluation.gap_closed is not None:
        yield (
            f"the served list closes {evaluation.gap_closed:.0%} of the gap in true value between popularity and the "
            "best ten; HR@10 favors the items that the logged policy showed, true value does not"
        )


def _with_error(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.mean:.4f}±{estimate.error:.4f}"
