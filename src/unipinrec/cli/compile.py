"""`unipinrec compile`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unipinrec.cli import common
from unipinrec.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from unipinrec.runtime import Bundle
    from unipinrec.runtime.bundle.manifest import Manifest
    from unipinrec.runtime.tools.compile import Compiled, GraphProgress
    from unipinrec.runtime.tools.compile_plan import CompileTask, GraphPlan
    from unipinrec.runtime.tools.engines import ListedEngine
    from unipinrec.runtime.trt.library import Flavor, TensorRT
    from unipinrec.runtime.trt.record import EngineRecord

EXAMPLES = """\b
Examples:
  unipinrec compile bundle/
  unipinrec compile bundle/ --precision fp32 --profile batch=1,candidates=1:200:500 --dry-run
  unipinrec compile bundle/ --flavor tensorrt_rtx --target sm_89,sm_120 --out bundle-ahead/
  unipinrec compile bundle/ --list"""

STEPS = 1000
DRY, LIST, REMOVE = "--dry-run", "--list", "--remove"


@click.command("compile", short_help="Compile TensorRT engines.", epilog=EXAMPLES)
@common.bundle_argument
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp32", "bf16", "fp16", "fp8"]),
    help="Precision to compile, which the bundle must hold; repeatable.  [default: bf16, else fp32]",
)
@click.option(
    "--flavor",
    type=click.Choice(["tensorrt", "tensorrt_rtx"]),
    help="TensorRT library to build with.  [default: the installed one]",
)
@click.option(
    "--target",
    metavar="SM[,SM..]",
    help="With TensorRT-RTX and --out: GPU architectures to build for without a GPU, such as sm_89, or portable.",
)
@click.option("--out", type=common.any_path, help="Folder to write: a new bundle that contains the engines.")
@click.option(
    "--profile",
    "profile_texts",
    multiple=True,
    metavar="NAME=MIN:OPT:MAX,..",
    help="Input sizes to build for, instead of the defaults: batch, history, new, past, candidates; repeatable.",
)
@click.option(
    "--profiles",
    "profile_file",
    type=common.input_file,
    help='A JSON file of such profiles: [{"batch": [1, 4, 8]}, ..].',
)
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Effort of the search for fast kernels.")
@click.option("--workspace-gib", type=common.positive, help="Largest scratch memory of one kernel.")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="File of kernel timings to use and update."
)
@click.option(
    "--strip-weights", is_flag=True, help="Build engines without weights; they are added when an engine is loaded."
)
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Build engines that later TensorRT releases of the same major version can load.",
)
@click.option("--force", is_flag=True, help="Rebuild existing engines.")
@click.option(DRY, is_flag=True, help="Show profiles and memory, and build nothing. Needs no TensorRT.")
@click.option(LIST, "list_them", is_flag=True, help="Show the engines of this bundle, and why an engine is not usable.")
@click.option(REMOVE, metavar="ID", help="Remove the engine whose id begins with ID from the cache.")
@common.gpu_option
@common.json_command
def compile_engines(bundle: Path, as_json: bool, **options: Any) -> None:
    """Compile a bundle's graphs into TensorRT engines for this machine's GPU.

    Engines that pass the golden requests are stored in the private cache (~/.cache/unipinrec/engines). With --target
    and --out they are built ahead of time into a new bundle, without a GPU.
    """
    _check(options)
    from unipinrec.runtime import Bundle

    with common.stderr.status("loading"):
        opened = Bundle.open(bundle)
    if options["list_them"]:
        _list(opened, options, as_json)
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
        raise click.UsageError("--out writes a bundle with engines built ahead of time: name their GPUs with --target")
    if options["target"] and not options["out"] and options["target"] != "portable" and not modes:
        raise click.UsageError("engines for other GPUs belong into a bundle: give --out, or omit --target")


def _tasks(manifest: Manifest, options: dict[str, Any]) -> list[CompileTask]:
    """A task per precision."""
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
        common.print_json({"bundle": bundle.hash, "graphs": plans, "uncovered": uncovered})
    else:
        _print_plans(plans, uncovered)


def _here(bundle: Bundle, options: dict[str, Any], as_json: bool) -> None:
    from unipinrec.runtime.tools.compile import compile_bundle
    from unipinrec.runtime.trt.store import EngineStore

    began, tasks = time.monotonic(), _tasks(bundle.manifest, options)
    here = common.machine(options["gpu"])
    trt, store = here.tensorrt(options["flavor"]), EngineStore()
    if missing := here.driver_problem():
        raise BackendError(
            f"{missing}; TensorRT-RTX can build for other machines without a GPU: give --target and --out"
        )
    with here.cuda() as cuda, _bars(f"{trt} on {cuda.info.name}") as show:
        done = [engine for task in tasks for engine in compile_bundle(bundle, task, trt, cuda, store, show)]
        where = {"gpu": cuda.info.name, "cache": str(store.root)}
    _report(bundle.hash, trt, done, where, as_json, began)


def _ahead(bundle: Bundle, options: dict[str, Any], as_json: bool) -> None:
    from unipinrec.runtime.tools.compile_ahead import compile_ahead

    began, tasks = time.monotonic(), _tasks(bundle.manifest, options)
    trt = common.machine().tensorrt(options["flavor"] or "tensorrt_rtx")
    with _bars(f"{trt} for {options['target']}") as show:
        digest, done = compile_ahead(bundle, options["out"], tasks, trt, show)
    _report(digest, trt, done, {"out": str(options["out"]), "parent": bundle.hash}, as_json, began)


@contextmanager
def _bars(title: str) -> Iterator[GraphProgress]:
    """A progress bar on stderr per engine."""
    common.stderr.print(title, highlight=False)
    rows: dict[str, Any] = {}
    with common.progress() as bar:

        def show(name: str, share: float, phase: str) -> None:
            if name not in rows:
                rows[name] = bar.add_task(name, total=STEPS, note="")
            bar.update(rows[name], completed=int(share * STEPS), note=phase)

        yield show


def _report(
    digest: str, trt: TensorRT, done: Sequence[Compiled], where: dict[str, str], as_json: bool, began: float
) -> None:
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        engines = [{**_engine(compiled.record), "built": compiled.built} for compiled in done]
        made = {"bundle": digest, "flavor": trt.flavor, "version": trt.version, "engines": engines}
        common.print_json({**made, **where, "seconds": seconds})
        return
    for compiled in done:
        record, key = compiled.record, compiled.record.key
        state = f"built in {record.seconds:.1f} s" if compiled.built else "there already"
        size = f"{_size(record.size_bytes)}, {_layers(record)}; {key.digest()[: common.SHORT]}"
        common.say(f"{key.graph} in {key.precision}: {state}, {size}")
    for how in dict.fromkeys(compiled.record.verified.how for compiled in done):
        common.say(f"golden requests: {how}")
    common.say(f"{where.get('out') or where.get('cache')}: {len(done)} engines, {seconds:.0f} s")


def _list(bundle: Bundle, options: dict[str, Any], as_json: bool) -> None:
    from unipinrec.runtime.tools.engines import list_engines
    from unipinrec.runtime.trt.cuda import GpuInfo
    from unipinrec.runtime.trt.record import engine_host
    from unipinrec.runtime.trt.store import EngineStore

    gpu, store = common.machine(options["gpu"]).gpu(), EngineStore()
    host = engine_host(gpu if isinstance(gpu, GpuInfo) else None)
    engines = list_engines(bundle, store, host, _installed())
    if as_json:
        common.print_json({"bundle": bundle.hash, "cache": str(store.root), "engines": list(map(_listed, engines))})
        return
    for engine in engines:
        what = "?"
        if engine.record is not None:
            key = engine.record.key
            made = f"{key.flavor} {key.version}, {engine.record.created}"
            what = f"{key.graph} in {key.precision} for {key.target}, {made}"
        common.say(f"{engine.id[: common.SHORT]} {engine.source}: {what}: {engine.problem or 'usable'}")
    if not engines:
        common.say(f"{store.root} has no engine of this bundle; run unipinrec compile")


def _installed() -> dict[Flavor, TensorRT]:
    from unipinrec.runtime.trt.library import FLAVORS

    installed: dict[Flavor, TensorRT] = {}
    for flavor in FLAVORS:
        with suppress(BackendError):
            installed[flavor] = common.machine().tensorrt(flavor)
    return installed


def _remove(beginning: str) -> None:
    from unipinrec.runtime.trt.store import EngineStore

    store = EngineStore()
    matches = [name for name in store.entries() if name.startswith(beginning)]
    if len(matches) != 1:
        raise BackendError(f"{len(matches)} engines of {store.root} begin with {beginning!r}; see {LIST}")
    store.remove(matches[0])
    common.say(f"removed {matches[0]}")


def _print_plans(plans: Sequence[GraphPlan], uncovered: Sequence[str]) -> None:
    """Profiles and memory, graph by graph."""
    for plan in plans:
        common.say(f"{plan.graph} in {plan.precision} ({plan.file})")
        for profile in plan.profiles:
            sizes = ", ".join(f"{name} {low}:{usual}:{high}" for name, (low, usual, high) in profile.sizes.items())
            common.say(
                f"  {sizes}; at most {_size(profile.kv_in_bytes)} of KV in, {_size(profile.kv_out_bytes)} of KV out, "
                f"{_size(profile.other_bytes)} of other tensors"
            )
    if uncovered:
        common.warn(f"requests beyond the profiles are rejected: {'; '.join(uncovered)}")


def _listed(engine: ListedEngine) -> dict[str, Any]:
    """The documented JSON form of a listed engine."""
    known = {"id": engine.id} if engine.record is None else _engine(engine.record)
    return {**known, "source": engine.source, "usable": engine.problem is None, "problem": engine.problem}


def _engine(record: EngineRecord) -> dict[str, Any]:
    key = record.key
    named = ("graph", "precision", "flavor", "version", "target")
    return {
        "id": key.digest(),
        **{name: getattr(key, name) for name in named},
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
    """Number of layers by the floating-point types that they read."""
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
