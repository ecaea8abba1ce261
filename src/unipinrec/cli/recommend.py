"""`unipinrec recommend`, and the options of a request and of a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
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
from unipinrec.errors import BackendError, RequestError, listed

if TYPE_CHECKING:
    from unipinrec.runtime import Bundle, Recommender, RecommendOptions
    from unipinrec.runtime.requests import Event, Range, Slate

EXAMPLES = """\b
Examples:
  unipinrec recommend bundle/ --user user-17 -k 10
  unipinrec recommend bundle/ --history events.json --weights click=1,save=2 --json
  unipinrec recommend bundle/ --user user-17 --category genre=Drama,Comedy --deny sold-out.txt
  unipinrec recommend bundle/ --user user-17 --rank item-7 --rank item-9"""

TITLE_WIDTH, FACT_WIDTH = 12, 12
SEARCH = (
    "k",
    "candidates",
    "allow",
    "deny",
    "categories",
    "ranges",
    "max_per_category",
    "exclude_seen",
    "exact",
)  # options that --rank excludes
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


def _ranges(_ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]) -> dict[str, Range] | None:
    from unipinrec.runtime.requests import Range

    ranges = {}
    for text in texts:
        name, _, ends = text.partition("=")
        low, colon, high = ends.partition(":")
        try:
            bounds = [float(end) if end.strip() else None for end in (low, high)]
        except ValueError:
            bounds = []
        if not colon or not any(end is not None for end in bounds):
            raise click.BadParameter(f"{text!r} is not NAME=MIN:MAX, such as price=5:20, price=5: or price=:20")
        if name in ranges:
            raise click.BadParameter(f"{name} is named twice; write one range, such as {name}=5:20")
        ranges[name] = Range(min=bounds[0], max=bounds[1])
    return ranges or None


def _most(_ctx: click.Context, _param: click.Parameter, text: str | None) -> dict[str, int] | None:
    name, _, most = (text or "").rpartition("=")
    if text is not None and not (name and most.isdecimal()):
        raise click.BadParameter(f"{text!r} is not NAME=N, such as genre=2")
    return {name: int(most)} if text else None


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
        "--range",
        "ranges",
        multiple=True,
        callback=_ranges,
        metavar="NAME=MIN:MAX",
        help="Only items whose number in a column of metadata is in this range; repeatable. Either end may be empty.",
    ),
    click.option(
        "--max-per",
        "max_per_category",
        callback=_most,
        metavar="NAME=N",
        help="At most N items with one word of a category feature.",
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
@click.option(
    "--rank",
    "named",
    metavar="ID",
    multiple=True,
    help="Rank this item, and others that are named so, instead of a search; repeatable.",
)
@click.option("--rank-file", type=input_file, metavar="IDS.txt", help="Rank the items of this file, one id per line.")
@click.option("--skip-unknown", is_flag=True, help="Leave out items to rank that the bundle lacks or has retired.")
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
    """Recommend items to a user: encode the history once, then use it to retrieve candidates and to rank them.

    With --rank or --rank-file, rank these items and no others, without retrieval and filters.
    """
    if (user is None) == (history is None):
        raise click.UsageError("give exactly one of --user and --history")
    named, rank_file = options.pop("named"), options.pop("rank_file")
    ranks = bool(named or rank_file)
    _refuse(SEARCH if ranks else ("skip_unknown",), f"with{'' if ranks else 'out'} --rank or --rank-file")
    with stderr.status("loading"):
        from unipinrec.runtime import RankOptions, Recommender

        rules = {name: options.pop(name) for name in LOAD_RULES}
        recommender = Recommender.load(bundle, device, machine=machine(options.pop("gpu")), **rules)
    with recommender:
        events = _events(recommender, user, history)
        if user is not None and events and options["now_ms"] is None:
            options["now_ms"] = _soon_after(events[-1])
        wanted = options_of(recommender.bundle, options)
        if ranks:
            how = RankOptions(**{name: getattr(wanted, name) for name in RankOptions.__struct_fields__})
            slate = recommender.rank(events, [*named, *(_ids(rank_file, recommender.bundle) or ())], how)
        else:
            slate = recommender.recommend(events, k, wanted)
    running = recommender.device
    if slate.source == "popular":
        why = f"user {user!r} is not among the sample users of this bundle"
        why = f"{history} holds no events" if user is None else why
        warn(f"{why}: {'items by popularity' if ranks else 'popular items'}", "note")
    if slate.unknown:
        warn(f"{bundle} lacks or has retired {listed(slate.unknown)}; they are left out", "note")
    if as_json:
        print_json({**slate.to_json(), "device_reason": running.reason, "device_refused": running.refused})
    else:
        _print_slate(slate, running.reason)


def _refuse(names: tuple[str, ...], where: str) -> None:
    """Refuse the options of these parameters that the command line has."""
    context = click.get_current_context()
    given = {name for name in names if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    wrong = ["/".join([*one.opts, *one.secondary_opts]) for one in context.command.params if one.name in given]
    if wrong:
        raise click.UsageError(f"{', '.join(wrong)} cannot be used {where}; leave it out")


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
    known = slate.items[0].metadata or {}
    facts = list(known)[: max(0, spare // (FACT_WIDTH + 3))]
    hidden, spare = hidden + list(known)[len(facts) :], spare - len(facts) * (FACT_WIDTH + 3)
    titled = any(item.title for item in slate.items)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("item", no_wrap=True)
    if titled:
        table.add_column("title", no_wrap=True, overflow="ellipsis", max_width=TITLE_WIDTH + spare)
    valued = ["value"] if slate.order in ("blend", "product") else []
    for name in ("share",) if popular else ("score", *valued, *map(escape, shown), "retrieval"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in facts:
        table.add_column(escape(name), no_wrap=True, overflow="ellipsis", max_width=FACT_WIDTH)
    for rank, item in enumerate(slate.items, 1):
        names = [Text(item.item), Text(item.title or "")] if titled else [Text(item.item)]
        chances = (item.actions[name] for name in shown)
        values = [item.score, *[item.value] * len(valued), *chances, item.retrieval_score]
        shares = [f"{item.score:.3%}"] if popular else [f"{value:.3f}" for value in values]
        cells = ((item.metadata or {}).get(name) for name in facts)
        told = [f"{cell:.10g}" if isinstance(cell, float) else cell or "" for cell in cells]
        table.add_row(str(rank), *names, *shares, *map(Text, told))
    stdout.print(table)
    if hidden:
        say(f"not shown for lack of width: {', '.join(hidden)} (--json has all)")
    times, search = slate.stages_ms, f"exact scan: {slate.exact}" if slate.exact else "hnswlib"
    found = "items as named" if slate.items[0].source == "request" else search
    if popular:
        say(f"popular items; {times.total:.1f} ms; bundle {slate.bundle[:SHORT]}")
        return
    say(
        f"encode {times.encode:.1f} ms, retrieve {times.retrieve:.1f} ms, rank {times.rank:.1f} ms, "
        f"total {times.total:.1f} ms; history {slate.kv} ({slate.kv_reason}); "
        f"{found}; ordered by {slate.order}; "
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
