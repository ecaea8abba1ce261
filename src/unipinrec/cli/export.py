"""`unipinrec export` and `unipinrec push`."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from unipinrec.cli.common import SHORT, any_path, bundle_argument, json_command, print_json, say, stderr, stdout
from unipinrec.cli.evaluate import print_evaluation
from unipinrec.cli.index import describe, recall_option, warn_of_low_recall
from unipinrec.errors import ExportError, UnipinrecError, listed, reason

if TYPE_CHECKING:
    from unipinrec.export.histories import Histories
    from unipinrec.export.protocol import ExportSource
    from unipinrec.runtime.bundle.manifest import Manifest

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
REPORTED = ("parity", "precisions", "index", "order", "evaluation", "cache", "files")
SAMPLED_USERS = 100  # enough for golden requests and for the recall of the index


@click.command(
    short_help="Write a checkpoint, or a model of your own, as a bundle.",
    epilog="Examples: unipinrec export checkpoint/ bundle/ --data data/ --precision bf16; "
    "unipinrec export --source shop.model:source bundle/",
)
@click.argument("paths", type=any_path, nargs=-1, required=True, metavar="[CHECKPOINT] BUNDLE")
@click.option(
    "--source",
    metavar="MODULE:FUNCTION",
    help="Instead of CHECKPOINT: a Python function without arguments that returns an ExportSource, or (ExportSource, "
    "Histories). The current directory is searched first.",
)
@click.option("--data", type=any_path, help="The prepared data, for real golden requests, sample users and popularity.")
@click.option(
    "--users",
    type=click.IntRange(0),
    default=1000,
    help="Number of sample users whose histories go into the bundle, for `recommend --user`; 0 = none. They are "
    "personal data. With --data, golden.safetensors always holds up to four real histories, without user ids.",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Also write the graphs in this precision, for GPUs; repeatable. fp32 is always written. If a precision does "
    "not recommend the same items as fp32, nothing is written. fp8 covers linear layers, the rest is bf16; it needs "
    "--data.",
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="Write a precision even if it recommends other items than fp32, as fp8 may. Report and manifest hold the "
    "measured difference.",
)
@click.option(
    "--evaluate",
    "evaluated",
    type=click.IntRange(0),
    help="With --data, measure the bundle's recommendations on this many test requests; 0 = none.  [default: 2000]",
)
@click.option(
    "--window-slack",
    type=click.IntRange(1),
    help="Events by which the window over a long history moves at a time; 1 = always the newest events.  "
    "[default: an eighth of the model's limit]",
)
@click.option(
    "--index/--no-index",
    default=True,
    help="Build an index, or let requests scan all items. An index needs hnswlib, an extra.",
)
@recall_option
@json_command
def export(
    paths: tuple[Path, ...],
    *,
    source: str | None,
    data: Path | None,
    users: int,
    precisions: tuple[str, ...],
    accept_loss: bool,
    evaluated: int | None,
    window_slack: int | None,
    index: bool,
    recall: float | None,
    as_json: bool,
) -> None:
    """Write a trained checkpoint as a bundle, and check that its graphs compute the same as PyTorch.

    With --source, the model comes from Python code of yours, and BUNDLE is the only argument.
    """
    if len(paths) != (2 if source is None else 1):
        wanted = "CHECKPOINT and BUNDLE" if source is None else "BUNDLE alone, since --source replaces CHECKPOINT"
        raise click.UsageError(f"{len(paths)} argument{'s' * (len(paths) != 1)}; pass {wanted}")
    if evaluated and data is None:
        raise click.UsageError("--evaluate measures on prepared data; pass --data too")
    if recall is not None and not index:
        raise click.UsageError("--recall is the target of an index, and --no-index builds none; pass one of them")
    bundle = paths[-1]
    with stderr.status("loading"):
        from unipinrec.export.bundle_writer import ExportOptions, export_bundle
        from unipinrec.export.checkpoint_source import source_from_checkpoint
        from unipinrec.export.data_histories import histories_from_data
        from unipinrec.runtime.retrieval.index_build import RECALL_TARGET

        model, histories = (source_from_checkpoint(paths[0], data), None) if source is None else _own(source)
        if data and histories:
            raise ExportError(f"{source} returned histories, and --data has others; leave one of them out")
        if data:
            histories = histories_from_data(data, model, max(users, SAMPLED_USERS))
    began = time.monotonic()
    with stderr.status("exporting") as status:
        manifest = export_bundle(
            model,
            bundle,
            histories=histories,
            precisions=[name for name in PRECISIONS[1:] if name in precisions],
            options=ExportOptions(
                users=users,
                recall=(recall or RECALL_TARGET) if index else None,
                accept_loss=accept_loss,
                data=data,
                evaluated=2000 if evaluated is None else evaluated,
                window_slack=window_slack,
            ),
            progress=lambda stage: status.update(f"exporting: {stage}"),
        )
    warn_of_low_recall(manifest.index)
    if as_json:
        print_json({"bundle": str(bundle), **{name: getattr(manifest, name) for name in REPORTED}})
    else:
        _print_report(bundle, manifest, time.monotonic() - began)


@click.command(
    short_help="Upload a bundle to the Hugging Face Hub.",
    epilog="Example: unipinrec push bundle/ hf://org/name --license apache-2.0",
)
@bundle_argument
@click.argument("target", metavar="hf://ORG/NAME[@BRANCH]")
@click.option("--license", "license_id", default="unknown", metavar="ID", help="The Hub's identifier, or other.")
@click.option("--with-users", is_flag=True, help="Upload the sample users' histories and ids too: personal data.")
@json_command
def push(bundle: Path, target: str, license_id: str, with_users: bool, as_json: bool) -> None:
    """Upload a bundle as one commit of an existing repository, with a model card made from its manifest.

    Engines and sample users are left out. Other files of the repository are deleted; its history keeps them. Up to
    four real histories without user ids stay in golden.safetensors if the bundle was exported with --data.
    """
    with stderr.status("pushing"):
        from unipinrec.runtime.tools.push import push_bundle

        pushed = push_bundle(bundle, target, license_id=license_id, with_users=with_users)
    if as_json:
        print_json(pushed)
        return
    left_out = f", without {', '.join(pushed.left_out)}" * bool(pushed.left_out)
    say(f"bundle {pushed.bundle[:SHORT]}{left_out}, is commit {pushed.commit}; load it with")
    say(f'Recommender.load("{pushed.load}")')


def _own(reference: str) -> tuple[ExportSource, Histories | None]:
    """What the user's MODULE:FUNCTION returns. Its output goes to stderr."""
    from unipinrec.export.histories import Histories
    from unipinrec.export.protocol import ExportSource

    name, _, function = reference.partition(":")
    if not all(part.isidentifier() for part in [*name.split("."), function]):
        raise ExportError(f"--source {reference} is not of the form package.module:function")
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(name)
            make = getattr(module, function, None)
            result = make() if callable(make) else None
    except UnipinrecError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ExportError(
                f"--source: there is no module {error.name} in {Path.cwd()} or on Python's path; run the command in "
                "the folder that holds it, or set PYTHONPATH"
            ) from error
        raise ExportError(f"{reference} raised {reason(error)}") from error
    if not callable(make):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
        raise ExportError(f"--source: {module.__file__} has no function {function}; it defines {listed(own)}")
    parts = result if isinstance(result, tuple) else (result, None)
    if len(parts) == 2 and isinstance(parts[0], ExportSource) and isinstance(parts[1], Histories | None):
        return parts
    returned = ", ".join(type(part).__name__ for part in parts) if isinstance(result, tuple) else type(result).__name__
    raise ExportError(f"{reference} returned {returned}; return an ExportSource, or (ExportSource, Histories)")


def _print_report(bundle: Path, manifest: Manifest, seconds: float) -> None:
    table = Table(
        "graph", "checks", "largest difference from PyTorch", title=f"parity, allowed {manifest.parity.tolerance:g}"
    )
    for name in manifest.graphs:
        checks = [check for check in manifest.parity.checks if check.graph == name]
        largest = max(check.max_abs_diff or 0.0 for check in checks)
        table.add_row(name, f"{len(checks)} passed", f"{largest:.1e}")
    stdout.print(table)
    if manifest.evaluation:
        print_evaluation(manifest.evaluation)
    if manifest.order:
        say(f"slates are ordered by {manifest.order.by}: {manifest.order.reason}")
    if manifest.cache:
        kept = f"{manifest.cache.agreement.overlap:.4f} of the ten best items are those without a cache"
        say(f"a cache stores {manifest.cache.dtype}: {kept}")
    if found := manifest.config.get("reference"):
        for way, one in found["served"].items():
            say(
                f"{way}: scores are within {one['max_score_diff']:.1e} of the library's; its ten best items are served "
                f"for {one['same_top_ten']:.1%} of {found['histories']} histories"
            )
    if manifest.precisions:
        stdout.print(_precision_table(manifest))
    for name, spec in manifest.precisions.items():
        if spec.agreement.problem:
            say(f"{name} does not recommend what fp32 recommends: {spec.agreement.problem} (--accept-loss)")
    size = sum(file.size_bytes for file in manifest.files.values()) / 2**20
    say(f"{bundle}: {manifest.num_items} items, {size:.1f} MiB, {describe(manifest.index)}, {seconds:.0f} s")


def _precision_table(manifest: Manifest) -> Table:
    table = Table(
        *("precision", "logit error", "best ten ranked", "retrieved", "lowest cosine", "largest AUC change"),
        title="agreement with fp32",
    )
    for name, spec in manifest.precisions.items():
        agreement = spec.agreement
        change = max(spec.auc_change.items(), key=lambda item: abs(item[1]), default=None)
        table.add_row(
            name,
            f"{agreement.max_logit_diff:.1e}",
            f"{agreement.ranked_overlap:.4f}",
            f"{agreement.retrieved_overlap:.4f}",
            f"{agreement.min_query_cosine:.6f}",
            f"{change[1]:+.4f} {change[0]}" if change else "needs --data",
        )
    return table
