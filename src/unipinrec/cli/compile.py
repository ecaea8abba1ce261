"""`unipinrec compile`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unipinrec.cli.common import FiniteRange, command, json_option, machine, print_json, progress, stderr, stdout
from unipinrec.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from unipinrec.runtime import Bundle
    from unipinrec.runtime.bundle.manifest import Manifest
    from unipinrec.runtime.tools.compile import Compiled, GraphProgress
    from unipinrec.runtime.tools.compile_plan import CompileTask, GraphPlan
    from unipinrec.runtime.tools.engines import ListedEngine
    from unipinrec.runtime.trt.library import Flavor, TensorRT
    from unipinrec.runtime.trt.record import EngineRecord

SHORT = 12
EXAMPLES = """\b
Examples:
  unipinrec compile bundle/
  unipinrec compile bundle/ --precision fp32 --profile batch=1,candidates=1:200:500 --dry-run
  unipinrec compile bundle/ --flavor tensorrt_rtx --target sm_89,sm_120 --out bundle-ahead/
  unipinrec compile bundle/ --list"""

STEPS = 1000
DRY, LIST, REMOVE = "--dry-run", "--list", "--remove"


@click.command("compile", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp32", "bf16", "fp16", "fp8"]),
    help="Precision to compile, of those that the bundle holds; repeatable.  [default: bf16, else fp32]",
)
@click.option(
    "--flavor", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="Which TensorRT.  [default: the installed one]"
)
@click.option(
    "--target",
    metavar="SM[,SM..]",
    help="With TensorRT-RTX: GPU architectures to build for without a GPU, as sm_89, or portable; with --out.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write: a new bundle that carries the engines.")
@click.option(
    "--profile",
    "profile_texts",
    multiple=True,
    metavar="NAME=MIN:OPT:MAX,..",
    help="Sizes to build for instead of the default ones: batch, history, new, past, candidates; repeatable.",
)
@click.option(
    "--profiles",
    "profile_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help='Or a JSON list of such: [{"batch": [1, 4, 8]}, ..].',
)
@click.option("--optimization-level", type=click.IntRange(0, 5), help="How long to look for fast kernels.")
@click.option("--workspace-gib", type=FiniteRange(0, min_open=True), help="Most scratch memory of one kernel.")
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="Kernel timings to use and keep.")
@click.option("--strip-weights", is_flag=True, help="Leave the weights out of the engines; loading puts them back.")
@click.option("--version-compatible", is_flag=True, help="Engines that later TensorRTs of the same major version load.")
@click.option("--force", is_flag=True, help="Build anew what is there already.")
@click.option(DRY, is_flag=True, help="Show profiles and memory; build nothing. Needs no TensorRT.")
@click.option(LIST, "list_them", is_flag=True, help="Show the engines of this bundle, and why each is usable or not.")
@click.option(REMOVE, metavar="ID", help="Remove an engine from the cache, by the beginning of its id.")
@json_option
@command
def compile_engines(bundle: Path, as_json: bool, **options: Any) -> None:
    """Compile a bundle's graphs into TensorRT engines for this machine's GPU.

    They go to the private cache (~/.cache/unipinrec/engines) once the golden requests have passed through them. With
    --target and --out they are built ahead of time, without a GPU, into a new bundle.
    """
    _check(options)
    from unipinrec.runtime import Bundle

    with stderr.status("loading"):
        opened = Bundle.open(bundle)
    if options["list_them"]:
        _list(opened, as_json)
    elif options["remove"]:
        _remove(options["remove"])
    elif options["dry_run"]:
        _dry_run(opened, options, as_json)
    elif options["out"]:
        _ahead(opened, options, as_json)
    else:
        _here(opened, options, as_json)


def _check(options: dict[str, Any]) -> None:
    modes = [name for name, key in ((DRY, "dry_run"), (LIST, "list_them"), (REMOVE, "remove")) if options[key]]
    if len(modes) > 1:
        raise click.UsageError(f"give one of {', '.join(modes)}")
    if options["profile_texts"] and options["profile_file"]:
        raise click.UsageError("give --profile or --profiles, not both")
    if options["out"] and not options["target"]:
        raise click.UsageError("--out writes a bundle with engines built ahead of time: say for what with --target")
    if options["target"] and not options["out"] and options["target"] != "portable" and not modes:
        raise click.UsageError("engines for other GPUs belong into a bundle: give --out, or leave --target out")


def _tasks(manifest: Manifest, options: dict[str, Any]) -> list[CompileTask]:
    """One per precision."""
    from unipinrec.runtime.tools.compile_plan import CompileTask
    from unipinrec.runtime.trt.profiles import default_buckets, parse_bucket, read_buckets
    from unipinrec.runtime.trt.record import BuildOptions

    try:
        buckets = tuple(parse_bucket(text, manifest.model) for text in options["profile_texts"])
        if options["profile_file"]:
            buckets = read_buckets(options["profile_file"], manifest.model)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    workspace, target = options["workspace_gib"], options["target"]
    build = BuildOptions(
        optimization_level=options["optimization_level"],
        workspace_bytes=None if workspace is None else int(workspace * 2**30),
        strip_weights=options["strip_weights"],
        version_compatible=options["version_compatible"],
    )
    default = "bf16" if "bf16" in manifest.precisions else manifest.precision
    return [
        CompileTask(
            precision=precision,
            buckets=buckets or default_buckets(manifest.model),
            targets=tuple(target.split(",")) if target else None,
            options=build,
            timing_cache=options["timing_cache"],
            force=options["force"],
        )
        for precision in dict.fromkeys(options["precisions"] or (default,))
    ]


def _dry_run(bundle: Bundle, options: dict[str, Any], as_json: bool) -> None:

    from unipinrec.runtime.tools.compile_plan import plan_compile
    from unipinrec.runtime.trt.profiles import gaps

    tasks = _tasks(bundle.manifest, options)
    plans = [plan for task in tasks for plan in plan_compile(bundle.manifest, task)]
    uncovered = gaps(tasks[0].buckets, bundle.manifest.model)
    if as_json:
        print_json({"bundle": bundle.hash, "graphs": plans, "uncovered": uncovered})
    else:
        print_plans(plans, uncovered)


def _here(bundle: Bundle, options: dict[str, Any], as_json: bool) -> None:
    from unipinrec.runtime.tools.compile import compile_bundle
    from unipinrec.runtime.trt.store import EngineStore

    began, tasks = time.monotonic(), _tasks(bundle.manifest, options)
    here = machine()
    trt, store = here.tensorrt(options["flavor"]), EngineStore()
    missing = here.driver_problem()
    if missing:
        raise BackendError(f"{missing}; TensorRT-RTX builds for other machines without one: give --target and --out")
    with here.cuda() as cuda, _bars(f"{trt} on {cuda.info.name}") as show:
        done = [one for task in tasks for one in compile_bundle(bundle, task, trt, cuda, store, show)]
        where = {"gpu": cuda.info.name, "cache": str(store.root)}
    _report(bundle.hash, trt, done, where, as_json, began)


def _ahead(bundle: Bundle, options: dict[str, Any], as_json: bool) -> None:
    from unipinrec.runtime.tools.compile_ahead import compile_ahead

    began, tasks = time.monotonic(), _tasks(bundle.manifest, options)
    trt = machine().tensorrt(options["flavor"] or "tensorrt_rtx")
    with _bars(f"{trt} for {options['target']}") as show:
        digest, done = compile_ahead(bundle, options["out"], tasks, trt, show)
    _report(digest, trt, done, {"out": str(options["out"]), "parent": bundle.hash}, as_json, began)


@contextmanager
def _bars(title: str) -> Iterator[GraphProgress]:
    """Progress bars on stderr, one per engine."""
    stderr.print(title, highlight=False)
    rows: dict[str, Any] = {}
    with progress() as bar:

        def show(what: str, share: float, phase: str) -> None:
            if what not in rows:
                rows[what] = bar.add_task(what, total=STEPS, note="")
            bar.update(rows[what], completed=int(share * STEPS), note=phase)

        yield show


def _report(
    digest: str, trt: TensorRT, done: Sequence[Compiled], where: dict[str, str], as_json: bool, began: float
) -> None:

    seconds = round(time.monotonic() - began, 1)
    if as_json:
        print_json({**document_of(digest, trt, done), **where, "seconds": seconds})
    else:
        print_compiled(done, where, seconds)


def _list(bundle: Bundle, as_json: bool) -> None:

    from unipinrec.runtime.tools.engines import list_engines
    from unipinrec.runtime.trt.cuda import GpuInfo
    from unipinrec.runtime.trt.record import engine_host
    from unipinrec.runtime.trt.store import EngineStore

    gpu, store = machine().gpu(), EngineStore()
    host = engine_host(gpu if isinstance(gpu, GpuInfo) else None)
    engines = list_engines(bundle, store, host, _installed())
    if as_json:
        print_json({"bundle": bundle.hash, "cache": str(store.root), "engines": list(map(listed_document, engines))})
    else:
        print_listed(engines, str(store.root))


def _installed() -> dict[Flavor, TensorRT]:
    from unipinrec.runtime.trt.library import FLAVORS

    found: dict[Flavor, TensorRT] = {}
    for flavor in FLAVORS:
        with suppress(BackendError):
            found[flavor] = machine().tensorrt(flavor)
    return found


def _remove(beginning: str) -> None:
    from unipinrec.runtime.trt.store import EngineStore

    store = EngineStore()
    found = [name for name in store.entries() if name.startswith(beginning)]
    if len(found) != 1:
        raise BackendError(f"{len(found)} engines of {store.root} begin with {beginning!r}; see {LIST}")
    store.remove(found[0])
    stdout.print(f"removed {found[0]}", highlight=False)


def print_plans(plans: Sequence[GraphPlan], uncovered: Sequence[str]) -> None:
    """Profiles and memory, graph by graph."""
    for plan in plans:
        stdout.print(f"{plan.graph} in {plan.precision} ({plan.file})", highlight=False)
        for profile in plan.profiles:
            sizes = ", ".join(f"{name} {low}:{usual}:{high}" for name, (low, usual, high) in profile.sizes.items())
            stdout.print(
                f"  {sizes}; at most {_size(profile.kv_in_bytes)} of KV in, {_size(profile.kv_out_bytes)} of KV out, "
                f"{_size(profile.other_bytes)} beside",
                highlight=False,
                soft_wrap=True,
            )
    if uncovered:
        stderr.print(
            f"[bold yellow]warning[/]: requests beyond the profiles are refused: {'; '.join(uncovered)}",
            highlight=False,
            soft_wrap=True,
        )


def document_of(digest: str, trt: TensorRT, done: Sequence[Compiled]) -> dict[str, Any]:
    """The documented JSON form of a compilation."""
    engines = [{**_engine(one.record), "built": one.built} for one in done]
    return {"bundle": digest, "flavor": trt.flavor, "version": trt.version, "engines": engines}


def print_compiled(done: Sequence[Compiled], where: dict[str, str], seconds: float) -> None:
    """One line per engine, then how the golden requests went."""
    for one in done:
        record, key = one.record, one.record.key
        made = f"built in {record.seconds:.1f} s" if one.built else "there already"
        stdout.print(
            f"{key.graph} in {key.precision}: {made}, {_size(record.size_bytes)}, {_layers(record)}; "
            f"{key.digest()[:SHORT]}",
            highlight=False,
            soft_wrap=True,
        )
    for how in dict.fromkeys(one.record.verified.how for one in done):
        stdout.print(f"golden requests: {how}", highlight=False, soft_wrap=True)
    folder = where.get("out") or where.get("cache")
    stdout.print(f"{folder}: {len(done)} engines, {seconds:.0f} s", highlight=False, soft_wrap=True)


def listed_document(engine: ListedEngine) -> dict[str, Any]:
    """The documented JSON form of a listed engine."""
    told = {"id": engine.id} if engine.record is None else _engine(engine.record)
    return {**told, "source": engine.source, "usable": engine.problem is None, "problem": engine.problem}


def print_listed(engines: Sequence[ListedEngine], root: str) -> None:
    """One line per engine: what it is, and whether it is used."""
    for engine in engines:
        what = "?"
        if engine.record is not None:
            key = engine.record.key
            what = (
                f"{key.graph} in {key.precision} for {key.target}, {key.flavor} {key.version}, {engine.record.created}"
            )
        stdout.print(
            f"{engine.id[:SHORT]} {engine.source}: {what}: {engine.problem or 'usable'}",
            highlight=False,
            soft_wrap=True,
        )
    if not engines:
        stdout.print(f"{root} has no engine of this bundle; run unipinrec compile", highlight=False, soft_wrap=True)


def _engine(record: EngineRecord) -> dict[str, Any]:
    key = record.key
    return {
        "id": key.digest(),
        "graph": key.graph,
        "precision": key.precision,
        "flavor": key.flavor,
        "version": key.version,
        "target": key.target,
        "created": record.created,
        "seconds": record.seconds,
        "size_bytes": record.size_bytes,
        "activation_bytes": record.activation_bytes,
        "profiles": key.profiles,
        "layers": _counts(record),
        "attention": record.layers.attention,
        "verified": record.verified,
    }


def _counts(record: EngineRecord) -> dict[str, int]:
    """Layers by the floating-point types that they read."""
    kinds = ("+".join(sorted({name for name in layer.inputs if "float" in name})) for layer in record.layers.layers)
    return dict(Counter(kind for kind in kinds if kind))


def _layers(record: EngineRecord) -> str:
    counts = ", ".join(f"{count} layers read {kind}" for kind, count in _counts(record).items())
    attention = Counter(record.layers.attention.values())
    return "; ".join([counts, *(f"attention {state} in {count}" for state, count in attention.items())])


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
