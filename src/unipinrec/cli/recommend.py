"""`unipinrec verify` and `unipinrec recommend`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unipinrec.cli.common import (
    SHORT,
    bundle_argument,
    gpu_option,
    input_file,
    json_command,
    machine,
    print_json,
    say,
    stderr,
    stdout,
    warn,
)
from unipinrec.errors import BackendError, BundleError, RequestError

if TYPE_CHECKING:
    from unipinrec.runtime import Bundle, Recommender, RecommendOptions
    from unipinrec.runtime.bundle.manifest import Agreement
    from unipinrec.runtime.golden_check import GoldenCheck
    from unipinrec.runtime.requests import Event, Slate
    from unipinrec.runtime.verify import VerifyReport

EXAMPLES = """\b
Examples:
  unipinrec recommend bundle/ --user user-17 -k 10
  unipinrec recommend bundle/ --history events.json --weights click=1,save=2 --json
  unipinrec recommend bundle/ --user user-17 --category genre=Drama,Comedy --deny sold-out.txt"""

TITLE_WIDTH = 12
LOAD_RULES = ("strict", "allow_bundle_engines", "cold_start")


def _device(_ctx: click.Context, _param: click.Parameter, name: str) -> str:
    from unipinrec.runtime.device import require_device

    try:
        require_device(name)
    except BackendError as error:
        raise click.BadParameter(str(error)) from error
    return name


device_option = click.option(
    "--device",
    callback=_device,
    default="auto",
    help="auto, cpu or cuda (both with ONNX Runtime), tensorrt or openvino; with a precision as in tensorrt-bf16. The "
    "output names the device that was used.",
)
strict_option = click.option(
    "--strict",
    is_flag=True,
    help="Fail instead of falling back to another device. With auto, fail if there is an NVIDIA driver but TensorRT "
    "does not run.",
)
cold_start_option = click.option(
    "--cold-start",
    type=click.Choice(["popular", "refuse"]),
    default="popular",
    help="Answer for users without events: popular items, or an error. A bundle exported without --data has no popular "
    "items.",
)
engines_option = click.option(
    "--allow-bundle-engines",
    is_flag=True,
    help="Run TensorRT engines that are part of the bundle. They are executable code: allow them only if you trust "
    "their source.",
)


@click.command(short_help="Check a bundle on this machine.", epilog="Example: unipinrec verify bundle/")
@bundle_argument
@device_option
@strict_option
@engines_option
@gpu_option
@json_command
def verify(bundle: Path, device: str, as_json: bool, gpu: int, **rules: bool) -> None:
    """Check that a bundle is complete and computes the same on this machine as PyTorch did at export."""
    with stderr.status("verifying"):
        from unipinrec.runtime.verify import verify_bundle

        report = verify_bundle(bundle, device, machine=machine(gpu), **rules)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    if not report.ok:
        computed = (report.agreement,) if report.agreement else report.golden
        checks = [check for check in (*report.files, *computed, report.sample, report.cache) if check]
        failed = sum(check.problem is not None for check in checks)
        raise BundleError(f"{bundle}: {failed} of {len(checks)} checks failed; copy or export the bundle again")


def _print_report(report: VerifyReport) -> None:
    files = Table("file", "", title=f"files of {escape(report.bundle)}")
    for check in report.files:
        files.add_row(Text(check.file), _state(check.problem))
    stdout.print(files)
    if report.agreement:
        _print_agreement(report.agreement)
    elif report.golden:
        _print_golden(report)
    if report.sample:
        here = report.sample.here
        measured = f"{here.served} served, {here.retrieved} by retrieval alone, of {here.users} sample users"
        state = _state(report.sample.problem, "as at export")
        stdout.print(f"last item among the best ten: {measured}:", state, highlight=False, soft_wrap=True)
    if report.cache:
        cache = report.cache
        measured = f"{cache.here.overlap:.4f}, {cache.exported.overlap:.4f} at export"
        stdout.print(
            f"ten best items with a cache in {cache.dtype} as without: {measured}:",
            _state(cache.problem),
            highlight=False,
            soft_wrap=True,
        )
    if report.device is None:
        say("golden outputs were not compared: the bundle is damaged")
    else:
        say(f"on {report.device.name} ({report.device.reason}), {report.retrieval}; bundle {report.hash}")


def _print_golden(report: VerifyReport) -> None:
    golden = Table("output", "largest difference", "", title=f"golden outputs, allowed {report.tolerance:g}")
    groups: dict[str, list[GoldenCheck]] = {}
    for check in report.golden:  # one row for all keys and values of a graph
        graph, _, name = check.output.partition(".")
        groups.setdefault(f"{graph}.present.*" if name.startswith("present.") else check.output, []).append(check)
    for name, checks in groups.items():
        differences = [check.max_abs_diff for check in checks if check.max_abs_diff is not None]
        problems = [f"{check.output} {check.problem}" for check in checks if check.problem]
        largest = f"{max(differences):.1e}" if differences else "-"
        golden.add_row(name, largest, _state("; ".join(problems) or None))
    stdout.print(golden)


def _print_agreement(agreement: Agreement) -> None:
    from unipinrec.runtime.agreement import MAX_LOGIT_DIFF, MIN_COSINE, MIN_OVERLAP, TOP

    table = Table("", "measured", "required", title=f"agreement with fp32 on {agreement.requests} requests")
    for stage in ("ranked", "retrieved"):
        overlap, strict = getattr(agreement, f"{stage}_overlap"), getattr(agreement, f"{stage}_overlap_strict")
        measured = f"{overlap:.4f} ({strict:.4f} without ties)"
        table.add_row(f"overlap of {TOP} {stage}", measured, f"at least {MIN_OVERLAP:g}")
    table.add_row("cosine of queries", f"{agreement.min_query_cosine:.6f}", f"at least {MIN_COSINE:g}")
    table.add_row("difference of logits, 1/64 aside", f"{agreement.max_logit_diff:.2g}", f"at most {MAX_LOGIT_DIFF:g}")
    stdout.print(table, _state(agreement.problem))


def _state(problem: str | None, passed: str = "ok") -> Text:
    return Text(problem, style="red") if problem else Text(passed, style="green")


def _weights(_ctx: click.Context, _param: click.Parameter, text: str | None) -> dict[str, float] | None:
    weights = {}
    for part in text.split(",") if text is not None else ():
        name, _, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError as error:
            raise click.BadParameter(f"{part!r} is not ACTION=NUMBER, such as click=1,save=2") from error
    return weights or None


def _ids(path: Path | None, bundle: Bundle) -> tuple[str, ...] | None:
    from unipinrec.runtime.bundle.catalogue import as_known, parse_ids

    if path is None:
        return None
    return tuple(as_known(item, bundle.rows) for item in parse_ids(path.read_bytes(), str(path)).values())


def _categories(
    _ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]
) -> dict[str, tuple[str, ...]] | None:
    categories: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, words = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not NAME=WORD[,WORD], such as genre=Drama,Comedy")
        categories[name] = (*categories.get(name, ()), words)
    return categories or None


def _words(texts: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The words of these texts: a text that is no known word is split at its commas."""
    return tuple(word for text in texts for word in ([text] if text in known else text.split(",")))


REQUEST_OPTIONS = (
    click.option("-k", type=click.IntRange(1), default=20, help="Number of items to recommend."),
    click.option("--surface", default="unknown", help="Name of the place where the items are shown."),
    click.option(
        "--now",
        "now_ms",
        type=int,
        metavar="MS",
        help="Time of the request in Unix ms.  [default: a minute after the last event; with --history the current "
        "time, or unknown if no event has a time]",
    ),
    click.option("--candidates", type=click.IntRange(1), default=200, help="Items that retrieval passes to ranking."),
    click.option(
        "--order",
        type=click.Choice(["value", "blend", "product", "retrieval"]),
        help="Score that orders the list; with retrieval the ranker does not run.  [default: the bundle's order]",
    ),
    click.option(
        "--weights",
        callback=_weights,
        metavar="ACTION=W,...",
        help="Weight of each action's probability in the value of an item.  [default: 1 for each positive action]",
    ),
    click.option("--allow", type=input_file, metavar="IDS.txt", help="Recommend only these items, one id per line."),
    click.option("--deny", type=input_file, metavar="IDS.txt", help="Recommend none of these items, one id per line."),
    click.option(
        "--category",
        "categories",
        multiple=True,
        callback=_categories,
        metavar="NAME=WORD[,WORD]",
        help="Only items with one of these words of a category feature; repeatable. A known word may hold commas.",
    ),
    click.option(
        "--exclude-seen/--include-seen",
        default=True,
        help="Exclude the items of the history, or include them.",
    ),
    click.option("--exact", is_flag=True, help="Scan all items instead of searching the index."),
    click.option(
        "--truncate/--no-truncate",
        default=True,
        help="Shorten a history that is too long to its newest events, or reject it.",
    ),
    cold_start_option,
    device_option,
    strict_option,
    engines_option,
    gpu_option,
)


def request_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `RecommendOptions` and of the device, in the order of the help."""
    for option in reversed(REQUEST_OPTIONS):
        function = option(function)
    return function


def options_of(opened: Bundle, options: dict[str, Any]) -> RecommendOptions:
    """The options of a request from those of the command, without those of the device."""
    from unipinrec.runtime import RecommendOptions

    options["allow"], options["exclude"] = _ids(options["allow"], opened), _ids(options.pop("deny"), opened) or ()
    if options["categories"]:
        known, categories = opened.manifest.categories, options["categories"].items()
        options["categories"] = {name: _words(texts, known.get(name, ())) for name, texts in categories}
    spec = opened.manifest.order
    if spec is not None and spec.by == "retrieval" and options["order"] in ("value", "product"):
        warn(f"this bundle orders by retrieval ({spec.reason}); an order by {options['order']} may be random")
    return RecommendOptions(**options)


@click.command(short_help="Recommend items to a user.", epilog=EXAMPLES)
@bundle_argument
@click.option("--user", metavar="ID", help="A sample user of the bundle. Any other id gets popular items.")
@click.option(
    "--history",
    type=input_file,
    metavar="EVENTS.json",
    help='A list of {"item", "actions", "surface", "timestamp_ms"}, oldest first. An empty list gets popular items.',
)
@request_options
@json_command
def recommend(
    bundle: Path,
    user: str | None,
    history: Path | None,
    k: int,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Recommend items to a user: encode the history once, then use it to retrieve candidates and to rank them."""
    if (user is None) == (history is None):
        raise click.UsageError("give exactly one of --user and --history")
    with stderr.status("loading"):
        from unipinrec.runtime import Recommender

        rules = {name: options.pop(name) for name in LOAD_RULES}
        recommender = Recommender.load(bundle, device, machine=machine(options.pop("gpu")), **rules)
    with recommender:
        events = _events(recommender, user, history)
        if user is not None and events and options["now_ms"] is None:
            options["now_ms"] = _soon_after(events[-1])
        slate = recommender.recommend(events, k, options_of(recommender.bundle, options))
    running = recommender.device
    if slate.source == "popular":
        unknown = f"user {user!r} is not among the sample users of this bundle"
        warn(f"{f'{history} holds no events' if user is None else unknown}: popular items", "note")
    if as_json:
        print_json({**slate.to_json(), "device_reason": running.reason, "device_refused": running.refused})
    else:
        _print_slate(slate, running.reason)


def _events(recommender: Recommender, user: str | None, history: Path | None) -> tuple[Event, ...]:
    from unipinrec.runtime import parse_events

    if history is not None:
        return parse_events(history.read_bytes(), str(history))
    assert user is not None
    try:
        return recommender.bundle.user_events(user)
    except RequestError:
        if recommender.popular is None:
            raise
        return ()


def _soon_after(event: Event) -> int | None:
    from unipinrec.runtime.requests import SOON_MS

    return None if event.timestamp_ms is None else event.timestamp_ms + SOON_MS


def _print_slate(slate: Slate, reason: str) -> None:
    popular = slate.source == "popular"
    shown, hidden, spare = _fitting_actions(slate)
    titled = any(item.title for item in slate.items)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("item", no_wrap=True)
    if titled:
        table.add_column("title", no_wrap=True, overflow="ellipsis", max_width=TITLE_WIDTH + spare)
    valued = ["value"] if slate.order in ("blend", "product") else []
    for name in ("share",) if popular else ("score", *valued, *map(escape, shown), "retrieval"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, item in enumerate(slate.items, 1):
        names = [Text(item.item), Text(item.title or "")] if titled else [Text(item.item)]
        chances = (item.actions[name] for name in shown)
        values = [item.score, *[item.value] * len(valued), *chances, item.retrieval_score]
        shares = [f"{item.score:.3%}"] if popular else [f"{value:.3f}" for value in values]
        table.add_row(str(rank), *names, *shares)
    stdout.print(table)
    if hidden:
        say(f"not shown for lack of width: {', '.join(hidden)} (--json has all)")
    times = slate.stages_ms
    if popular:
        say(f"popular items; {times.total:.1f} ms; bundle {slate.bundle[:SHORT]}")
        return
    say(
        f"encode {times.encode:.1f} ms, retrieve {times.retrieve:.1f} ms, rank {times.rank:.1f} ms, "
        f"total {times.total:.1f} ms; history {slate.kv} ({slate.kv_reason}); "
        f"{'exact scan: ' + slate.exact if slate.exact else 'hnswlib'}; ordered by {slate.order}; "
        f"{slate.device} ({reason}); bundle {slate.bundle[:SHORT]}"
    )


def _fitting_actions(slate: Slate) -> tuple[list[str], list[str], int]:
    """Actions whose columns fit the terminal beside the other columns; the other actions; the spare width."""
    titled = any(item.title for item in slate.items)
    ids = max(len(item.item) for item in slate.items)
    value = len("value") if slate.order in ("blend", "product") else 0
    fixed = (len("10"), ids, TITLE_WIDTH if titled else 0, len("score"), value, len("retrieval"))
    room = stdout.width - sum(width + 3 for width in fixed)
    shown: list[str] = []
    hidden: list[str] = []
    for name in slate.items[0].actions:
        room -= max(5, len(name)) + 3
        (shown if room >= 0 else hidden).append(name)
    return shown, hidden, 0 if hidden else room
