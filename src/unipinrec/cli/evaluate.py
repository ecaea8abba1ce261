"""`unipinrec evaluate`, the printed form of an evaluation, and `unipinrec recommend-all`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.table import Table

from unipinrec.cli.common import (
    any_path,
    bundle_argument,
    bundle_path,
    data_option,
    json_command,
    machine,
    print_json,
    progress,
    say,
    stderr,
    stdout,
    warn,
)
from unipinrec.cli.recommend import LOAD_RULES, options_of, request_options
from unipinrec.errors import listed

if TYPE_CHECKING:
    from unipinrec.runtime.bundle.quality import Estimate, Evaluation

GPU_WORKERS = 2  # one computes while the other prepares inputs and writes rows
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
@click.argument("model", type=bundle_path, metavar="CHECKPOINT|BUNDLE")
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


@click.command(
    name="recommend-all",
    short_help="Recommend items to all users of prepared data.",
    epilog="Example: unipinrec recommend-all bundle/ data/ --out lists.parquet -k 50",
)
@bundle_argument
@click.argument("data", type=any_path)
@click.option("--out", type=any_path, required=True, help="Parquet file to write; it must not exist.")
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: all that this process may use]")
@request_options
@json_command
def recommend_all(
    bundle: Path, data: Path, out: Path, threads: int | None, k: int, as_json: bool, **options: Any
) -> None:
    """Recommend items to each user with an event, and write the lists as rows of user, position, item and score.

    The list of a user is that of `recommend` with all events as the history. Without --now, the time of a request is a
    minute after the user's last event. Run the same command again to go on after an interruption.
    """
    with stderr.status("loading"):
        from unipinrec.export.lists.all_users import AllUsersTask
        from unipinrec.export.lists.all_users import recommend_all as answer_all
        from unipinrec.export.lists.prepared import PreparedHistories
        from unipinrec.runtime import Recommender
        from unipinrec.runtime.machine import thread_count

        histories = PreparedHistories.open(data)
        rules = {name: options.pop(name) for name in LOAD_RULES}
        recommender = Recommender.load(
            bundle, options.pop("device"), machine=machine(options.pop("gpu")), threads=1, **rules
        )
    with recommender, progress() as bar:
        wanted = options_of(recommender.bundle, options)
        for kind, values in histories.unknown_to(recommender.bundle).items():
            warn(
                f"{bundle} does not know {len(values)} {kind} of {data}, such as {listed(values, 3)}; they are skipped"
            )
        cores = thread_count(threads) if recommender.device.name.startswith(("cpu", "openvino")) else GPU_WORKERS
        task = AllUsersTask(recommender=recommender, histories=histories, k=k, options=wanted, workers=cores)
        shown = bar.add_task("users", total=len(histories.users), note="")
        written = answer_all(task, out, lambda users: bar.update(shown, completed=users))
    users_per_s = (written.users - written.resumed) / written.seconds
    if written.lists < written.users:
        first = "; the first one, {!r}: {}".format(*written.refused[0]) if written.refused else ""
        warn(f"{written.users - written.lists} of {written.users} users have no list{first}")
    if as_json:
        document = {"users": written.users, "lists": written.lists, "resumed": written.resumed}
        print_json({**document, "seconds": written.seconds, "users_per_s": users_per_s, "device": recommender.device})
        return
    say(
        f"{written.lists} lists in {out}: {users_per_s:,.1f} users/s in {written.seconds:.1f} s on "
        f"{recommender.device.name}" + f"; {written.resumed} users were there" * bool(written.resumed)
    )
