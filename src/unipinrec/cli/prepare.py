"""`unipinrec prepare`: converts a data set to the input format, and reports kept and dropped rows."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from unipinrec.cli.common import (
    FiniteRange,
    any_path,
    json_command,
    out_option,
    positive,
    print_json,
    progress,
    say,
    stderr,
    stdout,
    warn,
)
from unipinrec.cli.prepare_report import print_summary, summarize
from unipinrec.errors import LONGEST_VALUE, ConfigError, DataError

many = click.IntRange(1, 1_000_000_000)

if TYPE_CHECKING:
    from unipinrec.models.data.download import Archive
    from unipinrec.models.data.schema import Dataset
    from unipinrec.models.data.validate import RawTables

F = TypeVar("F", bound=Callable[..., Any])


def _moment(_ctx: click.Context, _param: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    from unipinrec.models.data.schema import EARLIEST_MS, LATEST_MS

    accepted = "ISO 8601, such as 2022-05-01T00:00+08:00, or Unix ms"
    try:
        if text.isdecimal():
            time_ms = int(text)
        else:
            moment = datetime.fromisoformat(text)
            time_ms = round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    except ValueError as error:
        raise click.BadParameter(f"{text[:LONGEST_VALUE]!r} is not {accepted}") from error
    if not EARLIEST_MS <= time_ms <= LATEST_MS:
        raise click.BadParameter(f"{text[:LONGEST_VALUE]!r} is not between 1990 and 2100; give {accepted}")
    return time_ms


def split_options(function: F) -> F:
    """`--valid-start` and `--test-start`, as Unix ms."""
    for name, part in (("--test-start", "Test"), ("--valid-start", "Validate")):
        text = f"{part} from this time on: ISO 8601 (UTC without an offset) or Unix ms."
        function = click.option(name, callback=_moment, metavar="TIME", help=text)(function)
    return function


source_argument = click.argument("source", type=any_path, required=False)
required_source = click.argument("source", type=any_path)
download_option = click.option(
    "--download", is_flag=True, help="Fetch the data from its owner into SOURCE or a cache, unless it is there."
)
gap_option = click.option(
    "--slate-gap-minutes", type=positive, default=30.0, help="A pause this long ends an impression slate."
)


@click.group()
def prepare() -> None:
    """Convert a data set to the input format.

    \b
    Example:
      unipinrec prepare movielens ml-100k/ --out data/
    """


@prepare.command()
@source_argument
@out_option
@download_option
@gap_option
@split_options
@json_command
def kuairand(source: Path | None, download: bool, slate_gap_minutes: float, **options: Any) -> None:
    """Read KuaiRand: exposures of short videos with eight actions. SOURCE is its folder.

    \b
    Examples:
      unipinrec prepare kuairand KuaiRand-Pure/ --out data/
      unipinrec prepare kuairand --download --out data/
    """
    from unipinrec.models.data.download import KUAIRAND_PURE
    from unipinrec.models.data.kuairand import read_kuairand

    def read() -> RawTables:
        return read_kuairand(_fetched(source, KUAIRAND_PURE, download), _gap_ms(slate_gap_minutes))

    _prepare(read, **options)


@prepare.command()
@source_argument
@out_option
@download_option
@click.option(
    "--edition",
    type=click.Choice(["ml-100k", "ml-1m"]),
    default="ml-100k",
    help="Edition that --download fetches.",
)
@gap_option
@split_options
@json_command
def movielens(source: Path | None, download: bool, edition: str, slate_gap_minutes: float, **options: Any) -> None:
    """Read MovieLens 100K or 1M: ratings, of which 4 and 5 are likes. SOURCE is its folder.

    \b
    Examples:
      unipinrec prepare movielens ml-100k/ --out data/
      unipinrec prepare movielens --download --edition ml-1m --out data/
    """
    from unipinrec.models.data.download import ML_1M, ML_100K
    from unipinrec.models.data.movielens import read_movielens

    def read() -> RawTables:
        archive = ML_1M if edition == "ml-1m" else ML_100K
        return read_movielens(_fetched(source, archive, download), _gap_ms(slate_gap_minutes))

    _prepare(read, **options)


@prepare.command()
@required_source
@out_option
@click.option("--licence", help="Origin and licence of the file; kept in the data set.")
@json_command
def sasrec(source: Path, licence: str | None, **options: Any) -> None:
    """Read a SASRec ("user item") or S3-Rec ("user item item ...") text file, plain or .gz. SOURCE is the file.

    \b
    Example:
      unipinrec prepare sasrec Beauty.txt --out data/
    """
    from unipinrec.models.data.sasrec import read_sasrec

    _prepare(lambda: read_sasrec(source, licence) if licence else read_sasrec(source), **options)


@prepare.command()
@required_source
@click.option("--columns", type=any_path, required=True, help="TOML file that names the columns.")
@out_option
@split_options
@json_command
def table(source: Path, columns: Path, **options: Any) -> None:
    """Read any CSV or Parquet files. SOURCE is the events file, or the folder of the files that --columns names.

    \b
    Example, with a columns.toml as in docs/data.md:
      unipinrec prepare table events.parquet --columns columns.toml --out data/
    """
    from unipinrec.models.data.table import read_column_map, read_mapped

    _prepare(lambda: read_mapped(source, read_column_map(columns)), **options)


@prepare.command()
@required_source
@click.option("--out", type=any_path, help="TOML file to write: the column map, to edit. It must not exist.")
@json_command
def inspect(source: Path, out: Path | None, as_json: bool) -> None:
    """Guess how files are written and what their columns mean. SOURCE is the events file, or the folder of the files.

    \b
    Example:
      unipinrec prepare inspect events.csv --out columns.toml
      unipinrec prepare table events.csv --columns columns.toml --out data/
    """
    from unipinrec.models.data.guess import inspect_source

    if out and out.exists():
        raise click.UsageError(f"--out {out} exists; choose another name or remove it first")
    found = inspect_source(source)
    if out:
        try:
            out.write_text(found.toml, encoding="utf-8")
        except OSError as error:
            raise DataError(f"could not write {out}: {error}") from error
    for note in found.notes:
        warn(note)
    if found.problem:
        warn(f"`prepare table` refuses this map as it is: {found.problem}")
    if as_json:
        print_json(found)
        return
    for name, form in found.files.items():
        say(f"{name}: {form}")
    for row in found.sample:
        say(f"  {row}")
    for reason, count in found.counts.items():
        say(f"{reason}: {count:,}")
    say(f"the column map is in {out}" if out else found.toml)


@prepare.command()
@click.argument("log", type=any_path)
@click.argument("data", type=any_path)
@out_option
@click.option(
    "--within-hours",
    type=FiniteRange(min=0, min_open=True, max=24 * 365),
    default=24.0,
    help="How long after a recommendation an event counts as its effect.",
)
@split_options
@json_command
def served(log: Path, data: Path, within_hours: float, **options: Any) -> None:
    """Turn logged recommendations and the events after them into slates. LOG is the folder of `serve --log-served`.

    DATA is a prepared folder that includes the later events. Its split is kept unless the options give another.

    \b
    Example:
      unipinrec prepare served served/ data/ --out data-with-slates/
    """
    from unipinrec.models.data.served import HOUR_MS, read_served

    _prepare(lambda: read_served(log, data, max(1, round(within_hours * HOUR_MS))), **options)


def _prepare(
    read: Callable[[], RawTables],
    *,
    out: Path,
    as_json: bool,
    valid_start: int | None = None,
    test_start: int | None = None,
) -> None:
    """Read, clean, write, report; `read` runs after all options are checked."""
    from unipinrec.models.data.schema import TimeSplit, require_new, write_dataset
    from unipinrec.models.data.validate import build_dataset

    if (valid_start is None) != (test_start is None):
        raise click.UsageError("--valid-start and --test-start go together; give both or neither")
    require_new(out)
    begin = time.perf_counter()
    raw = read()
    if valid_start is not None and test_start is not None:
        raw = dataclasses.replace(raw, split=TimeSplit(valid_start_ms=valid_start, test_start_ms=test_start))
    with stderr.status(f"cleaning {raw.events.height:,} events"):
        dataset = build_dataset(raw)
        write_dataset(dataset, out)
    prepared = summarize(dataset, raw, out, time.perf_counter() - begin)
    for warning in prepared.warnings:
        warn(warning)
    if as_json:
        print_json(prepared)
    else:
        print_summary(prepared)


def _gap_ms(minutes: float) -> int:
    from unipinrec.models.data.validate import LONGEST_GAP_MINUTES

    if not 0 < minutes <= LONGEST_GAP_MINUTES:
        raise click.BadParameter(f"--slate-gap-minutes {minutes} must be at most {LONGEST_GAP_MINUTES:,}")
    return max(1, round(minutes * 60_000))


def _fetched(source: Path | None, archive: Archive, fetch: bool) -> Path:
    """The folder to read: SOURCE, or with --download the fetched archive."""
    from unipinrec.models.data.download import download

    if not fetch:
        if source is None:
            raise click.UsageError("give SOURCE, the folder of the data, or --download")
        return source
    folder = source or _cache() / "unipinrec" / "downloads" / archive.name
    if folder.exists():
        stderr.print(f"using {escape(str(folder))}, which is already there", soft_wrap=True)
        return folder
    stderr.print(escape(f"{archive.licence}\nfetching {archive.url} into {folder}"), soft_wrap=True)
    with Progress(TextColumn("fetch"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=stderr) as bar:
        task = bar.add_task("fetch", total=None)
        return download(archive, folder, lambda done, total: bar.update(task, completed=done, total=total))


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise click.UsageError(f"no folder to fetch into ({error}); give SOURCE, or set XDG_CACHE_HOME") from error


@prepare.command(epilog="\b\nExample:\n  unipinrec prepare simulate --out demo/data --users 2000 --items 2000 --seed 7")
@out_option
@click.option("--users", type=many, default=2000, help="Number of users.")
@click.option("--items", type=many, default=2000, help="Catalogue size.")
@click.option("--categories", type=click.IntRange(min=1), help="Item categories.  [default: one per 50 items]")
@click.option("--sessions", "sessions_per_user", type=FiniteRange(1), default=4.0, help="Mean sessions per user.")
@click.option("--slates", "slates_per_session", type=FiniteRange(1), default=3.0, help="Mean slates per session.")
@click.option("--slate-size", type=click.IntRange(min=1), default=10, help="Items shown per slate.")
@click.option("--days", type=click.IntRange(1, 36_500), default=28, help="Days of simulated time.")
@click.option("--seed", type=click.IntRange(min=0), default=7, help="Seed of the data.")
@json_command
def simulate(out: Path, as_json: bool, **settings: Any) -> None:
    """Simulate users, their slates and their actions: a data set whose best possible score is known.

    The folder also gets oracle.parquet, oracle_slates.parquet and oracle_items.parquet, the true chances behind the
    labels. Nothing is downloaded.
    """
    from unipinrec.models.data.schema import require_new, write_dataset
    from unipinrec.models.simulator.oracle import write_oracle
    from unipinrec.models.simulator.simulator import simulate as run
    from unipinrec.models.simulator.world import SimulatorConfig

    require_new(out)
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
    train, before_test = (int((time_ms < start).sum()) for start in (split.valid_start_ms, split.test_start_ms))
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
    table = Table(show_header=False)
    for name, value in report.items():
        text = ", ".join(f"{key} {part:,}" for key, part in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), f"{text:,}" if isinstance(text, int) else str(text))
    stdout.print(table)
