"""`unipinrec index`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from unipinrec.cli import common

if TYPE_CHECKING:
    from unipinrec.runtime.bundle.manifest import IndexSpec
    from unipinrec.runtime.tools.update_bundle import UpdateReport

EXAMPLES = """\b
Examples:
  unipinrec index bundle/ --out bundle-2/ --add items.jsonl --retire gone.txt
  unipinrec index bundle/ --out bundle-3/ --add items.jsonl --recall 0.995 --json"""

recall_option = click.option(
    "--recall",
    type=common.FiniteRange(0.0, 1.0, min_open=True),
    help="Share of the 100 nearest items that the index must find.  [default: 0.99; in an update, the bundle's own; an "
    "update of a bundle without an index builds one only with this option]",
)


@click.command(short_help="Add and retire items, in a new bundle.", epilog=EXAMPLES)
@common.bundle_argument
@common.out_option
@click.option(
    "--add",
    type=common.input_file,
    metavar="ITEMS.json[l]",
    help='Items to add, as a list or one per line: {"item", "title", "dense": {feature: [..]}, "categories": '
    '{feature: word}, "metadata": {column: value}}.',
)
@click.option(
    "--retire", type=common.input_file, metavar="IDS.txt", help="Items to remove from the index, one id per line."
)
@recall_option
@common.json_command
def index(bundle: Path, out: Path, add: Path | None, retire: Path | None, recall: float | None, as_json: bool) -> None:
    """Add and retire items without another export, and write the result as a new bundle.

    Cached histories stay valid for the new bundle. To replace an item, retire it and add it.
    """
    if add is None and retire is None:
        raise click.UsageError("give --add, --retire or both")
    began = time.monotonic()
    with common.stderr.status("loading") as status:
        from unipinrec.runtime.bundle.catalogue import parse_ids
        from unipinrec.runtime.tools.item_input import parse_items
        from unipinrec.runtime.tools.update_bundle import update_bundle

        report = update_bundle(
            bundle,
            out,
            add=parse_items(add.read_bytes(), str(add)) if add else {},
            retire=parse_ids(retire.read_bytes(), str(retire)) if retire else {},
            recall=recall,
            progress=lambda stage: status.update(f"updating: {stage}"),
        )
    warn_of_low_recall(report.index)
    if as_json:
        common.print_json(_document(report))
    else:
        _print_report(out, report, time.monotonic() - began)


def warn_of_low_recall(index: IndexSpec | None) -> None:
    """Warn if an index misses its target."""
    if index is not None and index.scan:
        common.warn(
            f"the index finds {index.recall:.4f} of the nearest {index.recall_k} items, not "
            f"{index.recall_target:g}, even with M={index.m} and ef={index.ef_search}; "
            "requests will scan all items; a lower --recall would use the index"
        )


def _document(report: UpdateReport) -> dict[str, object]:
    """The documented JSON form."""
    document = msgspec.structs.asdict(report)
    names = {"recall": "recall", "recall_target": "recall_target", "ef": "ef_search", "m": "m"}
    index = document.pop("index")
    return {**document, **{name: getattr(index, field, None) for name, field in names.items()}}


def describe(index: IndexSpec | None, way: str = "") -> str:
    """The index in words, with the way that it was made, such as "rebuilt, "."""
    if index is None:
        return "no index: requests scan all items"
    return f"index {way}recall@{index.recall_k} {index.recall:.4f} at ef={index.ef_search}"


def _print_report(out: Path, report: UpdateReport, seconds: float) -> None:
    for feature, count in report.unknown_words.items():
        common.warn(
            f"{count} of {report.added} added items have a {feature} that the model does not know; it counts as unknown"
        )
    made = describe(report.index, f"{report.way}, ")
    common.say(
        f"{out}: {report.items_before} items before, {report.added} added, {report.retired} retired "
        f"({report.already_retired} were already), {report.items_after} now; {made}, {seconds:.0f} s; "
        f"bundle {report.bundle[: common.SHORT]} from {report.parent[: common.SHORT]}"
    )
