"""`unipinrec verify` and `unipinrec recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unipinrec.cli.common import command, json_option, print_json, stderr, stdout, warn
from unipinrec.errors import BackendError, BundleError, RequestError

if TYPE_CHECKING:
    from unipinrec.runtime import Bundle, Recommender
    from unipinrec.runtime.bundle.manifest import Agreement
    from unipinrec.runtime.device import DeviceRules
    from unipinrec.runtime.golden_check import GoldenCheck
    from unipinrec.runtime.requests import Event, Slate
    from unipinrec.runtime.verify import VerifyReport

RECOMMEND_EXAMPLES = """\b
Examples:
  unipinrec recommend bundle/ --user user-17 -k 10
  unipinrec recommend bundle/ --history events.json --weights click=1,save=2 --json
  unipinrec recommend bundle/ --user user-17 --category genre=Drama,Comedy --deny sold-out.txt"""

SOON_MS = 60_000
TITLE_WIDTH = 12


def _device(_ctx: click.Context, _param: click.Parameter, name: str) -> str:
    from unipinrec.runtime.device import require_device

    try:
        require_device(name)
    except BackendError as error:
        raise click.BadParameter(str(error)) from error
    return name


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
ids_file = click.Path(path_type=Path, exists=True, dir_okay=False)
device_option = click.option(
    "--device",
    callback=_device,
    default="auto",
    show_default=True,
    help="auto, cpu, cuda (both ONNX Runtime), tensorrt or openvino, with a precision if wanted (tensorrt-bf16); what "
    "really runs is in the output.",
)
strict_option = click.option(
    "--strict",
    is_flag=True,
    help="Fail where another device than the wanted one would have to run; with auto, where there is an NVIDIA driver "
    "and TensorRT does not run.",
)
cold_start_option = click.option(
    "--cold-start",
    type=click.Choice(["popular", "refuse"]),
    default="popular",
    show_default=True,
    help="What a user without events gets: popular items, or an error. A bundle that was exported without --data knows "
    "none.",
)
engines_option = click.option(
    "--allow-bundle-engines",
    is_flag=True,
    help="Run TensorRT engines that travel in the bundle. They are executable code: allow them only if you trust who "
    "built them.",
)


@click.command(epilog="Example: unipinrec verify bundle/")
@bundle_argument
@device_option
@strict_option
@engines_option
@json_option
@command
def verify(bundle: Path, device: str, strict: bool, allow_bundle_engines: bool, as_json: bool) -> None:
    """Prove that a bundle is whole and computes on this machine what PyTorch computed at export."""
    with stderr.status("verifying"):
        from unipinrec.runtime.verify import verify_bundle

        report = verify_bundle(bundle, device, strict=strict, allow_bundle_engines=allow_bundle_engines)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    if not report.ok:
        judged = (report.agreement,) if report.agreement else report.golden
        sample = (report.sample,) if report.sample else ()
        problems = [check.problem for check in (*report.files, *judged, *sample)]
        failed = sum(problem is not None for problem in problems)
        raise BundleError(f"{bundle}: {failed} of {len(problems)} checks failed; copy or export the bundle again")


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
        said = _state(report.sample.problem) if report.sample.problem else Text("as at export", style="green")
        stdout.print(f"last item among the best ten: {measured}:", said, highlight=False, soft_wrap=True)
    if report.device is None:
        stdout.print("golden outputs were not compared: the bundle is damaged")
        return
    stdout.print(f"on {report.device.name} ({report.device.reason}), bundle {report.hash}", highlight=False)


def _print_golden(report: VerifyReport) -> None:
    golden = Table("output", "largest difference", "", title=f"golden outputs, allowed {report.tolerance:g}")
    for name, checks in _grouped(report.golden).items():
        differences = [check.max_abs_diff for check in checks if check.max_abs_diff is not None]
        problems = [f"{check.output} {check.problem}" for check in checks if check.problem]
        largest = f"{max(differences):.1e}" if differences else "-"
        golden.add_row(name, largest, _state("; ".join(problems) or None))
    stdout.print(golden)


def _print_agreement(agreement: Agreement) -> None:
    from unipinrec.runtime.agreement import MAX_LOGIT_DIFF, MIN_COSINE, MIN_OVERLAP, TOP

    table = Table("", "measured", "needed", title=f"agreement with fp32 on {agreement.requests} requests")
    for stage in ("ranked", "retrieved"):
        overlap, strict = getattr(agreement, f"{stage}_overlap"), getattr(agreement, f"{stage}_overlap_strict")
        measured = f"{overlap:.4f} ({strict:.4f} without ties)"
        table.add_row(f"overlap of {TOP} {stage}", measured, f"at least {MIN_OVERLAP:g}")
    table.add_row("cosine of queries", f"{agreement.min_query_cosine:.6f}", f"at least {MIN_COSINE:g}")
    table.add_row("difference of logits, 1/64 aside", f"{agreement.max_logit_diff:.2g}", f"at most {MAX_LOGIT_DIFF:g}")
    stdout.print(table, _state(agreement.problem))


def _grouped(checks: tuple[GoldenCheck, ...]) -> dict[str, list[GoldenCheck]]:
    """One group for all keys and values of a graph."""
    groups: dict[str, list[GoldenCheck]] = {}
    for check in checks:
        graph, _, rest = check.output.partition(".")
        groups.setdefault(f"{graph}.present.*" if rest.startswith("present.") else check.output, []).append(check)
    return groups


def _state(problem: str | None) -> Text:
    return Text(problem, style="red") if problem else Text("ok", style="green")


def _weights(_ctx: click.Context, _param: click.Parameter, text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    weights = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError as error:
            raise click.BadParameter(f"{part!r} is not ACTION=NUMBER, such as click=1,save=2") from error
    return weights


def _ids(path: Path, bundle: Bundle) -> tuple[str, ...]:
    from unipinrec.runtime.bundle.catalogue import as_known, parse_ids

    return tuple(as_known(item, bundle.rows) for item in parse_ids(path.read_bytes(), str(path)).values())


def _categories(
    _ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]
) -> dict[str, tuple[str, ...]] | None:
    categories: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, equals, words = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not NAME=WORD[,WORD], such as genre=Drama,Comedy")
        categories[name] = (*categories.get(name, ()), words)
    return categories or None


def _words(given: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Each text as the word that it is, or else as several words with commas between."""
    return tuple(word for text in given for word in ([text] if text in known else text.split(",")))


@click.command(epilog=RECOMMEND_EXAMPLES)
@bundle_argument
@click.option(
    "--user", metavar="ID", help="One of the sample users that the bundle carries; another gets popular items."
)
@click.option(
    "--history",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="EVENTS.json",
    help='A list of {"item", "actions", "surface", "timestamp_ms"}, oldest first; an empty list gets popular items.',
)
@click.option("-k", type=click.IntRange(1), default=20, show_default=True, help="How many items.")
@click.option("--surface", default="unknown", show_default=True, help="Where the items will be shown.")
@click.option(
    "--now",
    "now_ms",
    type=int,
    metavar="MS",
    help="Time of the request, Unix ms.  [default: the current time, unknown where no event has a time; with --user, "
    "whose history may be old, a minute after the last event]",
)
@click.option(
    "--candidates", type=click.IntRange(1), default=200, show_default=True, help="Items that retrieval hands on."
)
@click.option(
    "--order",
    type=click.Choice(["value", "blend", "product", "retrieval"]),
    help="What the list is ordered by; retrieval does not run the ranker.  [default: what the bundle says]",
)
@click.option(
    "--weights",
    callback=_weights,
    metavar="ACTION=W,...",
    help="Weight of each action's probability in the value.  [default: 1 for each positive action]",
)
@click.option("--allow", type=ids_file, metavar="IDS.txt", help="Recommend only these items, one id a line.")
@click.option("--deny", type=ids_file, metavar="IDS.txt", help="Recommend none of these items.")
@click.option(
    "--category",
    "categories",
    multiple=True,
    callback=_categories,
    metavar="NAME=WORD[,WORD]",
    help="Recommend only items that have one of these words; may be given again, for the same or another feature. A "
    "word may hold commas.",
)
@click.option(
    "--exclude-seen/--include-seen",
    default=True,
    show_default=True,
    help="Leave out the items of the history, or recommend them again.",
)
@click.option("--exact", is_flag=True, help="Scan all items instead of asking the index.")
@click.option(
    "--truncate/--no-truncate",
    default=True,
    show_default=True,
    help="Of a history that is too long keep a window of the newest events, or refuse it.",
)
@cold_start_option
@device_option
@strict_option
@engines_option
@json_option
@command
def recommend(
    bundle: Path,
    user: str | None,
    history: Path | None,
    k: int,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Recommend items to a user: encode the history once, retrieve candidates with it, rank them with it."""
    if (user is None) == (history is None):
        raise click.UsageError("give exactly one of --user and --history")
    with stderr.status("loading"):
        from unipinrec.runtime import Recommender, RecommendOptions

        rules: DeviceRules = {
            "strict": options.pop("strict"),
            "allow_bundle_engines": options.pop("allow_bundle_engines"),
        }
        recommender = Recommender.load(bundle, device, cold_start=options.pop("cold_start"), **rules)
    with recommender:
        events = _events(recommender, user, history)
        if user is not None and events and options["now_ms"] is None:
            options["now_ms"] = _soon_after(events[-1])
        allow, deny = options.pop("allow"), options.pop("deny")
        opened = recommender.bundle
        options |= {"allow": _ids(allow, opened) if allow else None, "exclude": _ids(deny, opened) if deny else ()}
        if options["categories"]:
            known = opened.manifest.categories
            options["categories"] = {
                name: _words(given, known.get(name, ())) for name, given in options["categories"].items()
            }
        spec = opened.manifest.order
        if spec is not None and spec.by == "retrieval" and options["order"] in ("value", "product"):
            warn(f"the bundle is ordered by retrieval, for {spec.reason}; by {options['order']} it may order by chance")
        slate = recommender.recommend(events, k, RecommendOptions(**options))
    running = recommender.device
    if slate.source == "popular":
        why = (
            f"{history} holds no events"
            if user is None
            else f"user {user!r} is not among the sample users of this bundle"
        )
        stderr.print(f"[bold yellow]note[/]: {escape(why)}: popular items", highlight=False, soft_wrap=True)
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
        stdout.print(f"not shown for lack of width: {', '.join(hidden)} (--json has all)", markup=False)
    times = slate.stages_ms
    if popular:
        stdout.print(
            f"popular items; {times.total:.1f} ms; bundle {slate.bundle[:12]}", highlight=False, soft_wrap=True
        )
        return
    stdout.print(
        f"encode {times.encode:.1f} ms, retrieve {times.retrieve:.1f} ms, rank {times.rank:.1f} ms, "
        f"total {times.total:.1f} ms; history {slate.kv} ({slate.kv_reason}); "
        f"{'exact scan: ' + slate.exact if slate.exact else 'hnswlib'}; ordered by {slate.order}; "
        f"{slate.device} ({reason}); bundle {slate.bundle[:12]}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _fitting_actions(slate: Slate) -> tuple[list[str], list[str], int]:
    """Actions whose columns fit the terminal beside rank, id, title, score and retrieval; the others; spare width."""
    titled = any(item.title for item in slate.items)
    fixed = [
        2,
        max(len(item.item) for item in slate.items),
        TITLE_WIDTH if titled else 0,
        len("score"),
        5 if slate.order in ("blend", "product") else 0,
        len("retrieval"),
    ]
    room = stdout.width - sum(width + 3 for width in fixed)
    shown: list[str] = []
    hidden: list[str] = []
    for name in slate.items[0].actions:
        room -= max(5, len(name)) + 3
        (shown if room >= 0 else hidden).append(name)
    return shown, hidden, 0 if hidden else room
