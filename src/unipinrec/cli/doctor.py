"""`unipinrec doctor` and `unipinrec verify`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unipinrec.cli.common import (
    SHORT,
    any_path,
    bundle_argument,
    gpu_option,
    json_command,
    machine,
    print_json,
    say,
    stderr,
    stdout,
)
from unipinrec.cli.recommend import device_option, engines_option, strict_option
from unipinrec.errors import BackendError, BundleError

if TYPE_CHECKING:
    from unipinrec.runtime.bundle.manifest import Agreement
    from unipinrec.runtime.golden_check import GoldenCheck
    from unipinrec.runtime.tools.diagnosis import Diagnosis, EngineReport, Gpu, Library
    from unipinrec.runtime.verify import VerifyReport

GIB, MIB = 2**30, 2**20


@click.command(
    short_help="Show which devices can serve, and why others cannot.",
    epilog="\b\nExamples:\n  unipinrec doctor\n  unipinrec doctor bundle/ --json",
)
@click.argument("bundle", type=any_path, required=False)
@gpu_option
@json_command
def doctor(bundle: Path | None, gpu: int, as_json: bool) -> None:
    """Show which devices of this machine can serve, and why the others cannot.

    With a BUNDLE, also show its compiled engines and load it as a server would. Exits with 1 if no device can serve it.
    """
    with stderr.status("examining"), _without_warnings():
        from unipinrec.runtime.tools.doctor import examine

        diagnosis = examine(bundle, machine(gpu))
    if as_json:
        print_json(diagnosis)
    else:
        _print(diagnosis)
    if bundle and diagnosis.auto.device is None:
        raise BackendError(f"{bundle} cannot be served here: {diagnosis.auto.problem}")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the warnings of loading a bundle: the diagnosis repeats them."""
    logger = logging.getLogger("unipinrec")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _print(diagnosis: Diagnosis) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, value in _machine(diagnosis):
        table.add_row(name, value)
    for name, problem in diagnosis.devices.items():
        reason = "see GPU" if problem == diagnosis.gpu.problem else problem
        table.add_row(f"device {name}", Text(reason, style="red") if reason else Text("ok", style="green"))
    if diagnosis.bundle:
        for engine in diagnosis.engines:
            table.add_row(f"engine {engine.id[:SHORT]}", _engine(engine))
        if diagnosis.engines_problem or not diagnosis.engines:
            table.add_row("engines", Text(diagnosis.engines_problem or f"none for {diagnosis.bundle}"))
    table.add_row("device=auto", _choice(diagnosis))
    stdout.print(table)


def _machine(diagnosis: Diagnosis) -> list[tuple[str, Text]]:
    """All rows but devices and engines."""
    cpu, memory, cache, gpu = diagnosis.cpu, diagnosis.memory, diagnosis.cache, diagnosis.gpu
    onnxruntime = diagnosis.onnxruntime
    features = ", ".join(name if there else f"no {name}" for name, there in cpu.features.items())
    limit = "" if memory.limit_bytes is None else f", the cgroup allows {memory.limit_bytes / GIB:.1f} GiB"
    sizes = [size / GIB for size in (memory.total_bytes, memory.available_bytes) if size is not None]
    content = f"mode {cache.mode}, {cache.entries} engines, {cache.size_bytes / MIB:.1f} MiB"
    state = cache.problem or (content if cache.mode else "not there yet")
    wheels, providers = ", ".join(onnxruntime.wheels), ", ".join(onnxruntime.providers)
    return [
        ("unipinrec", Text(f"{diagnosis.unipinrec} on Python {diagnosis.python}, {diagnosis.system}")),
        ("CPU", Text(f"{cpu.model}: {features}")),
        ("threads", Text(f"{cpu.threads}: {cpu.threads_reason}")),
        ("memory", Text(f"{' GiB, available '.join(f'{size:.1f}' for size in sizes) or '?'} GiB{limit}")),
        ("GPU", _gpu(gpu)),
        ("CUDA", Text(", ".join(f"{name} {version}" for name, version in gpu.packages.items()) or "no packages")),
        ("ONNX Runtime", _library(onnxruntime, f" ({wheels}): {providers}")),
        *((library.name, _library(library)) for library in (*diagnosis.tensorrt, diagnosis.openvino)),
        ("engine cache", Text(": ".join(filter(None, (cache.path, state))))),
    ]


def _gpu(gpu: Gpu) -> Text:
    info, driver = gpu.info, f"driver {gpu.driver or 'of unknown version'}"
    if info is None:
        return Text(f"{gpu.problem}; {driver}" if gpu.driver else str(gpu.problem))
    memory = f"{info.memory_bytes / GIB:.0f} GiB"
    return Text(f"{info.name}, {info.architecture}, {memory}, {driver} for CUDA up to {info.driver_version}")


def _library(library: Library, more: str = "") -> Text:
    if library.version is None:
        return Text(library.problem or "")
    problem = f"; {library.problem}" if library.problem else ""
    return Text(f"{library.version}{more}{problem}", style="red" if problem else "")


def _engine(engine: EngineReport) -> Text:
    what = "not readable"
    if engine.graph:
        where = f"{(engine.size_bytes or 0) / MIB:.1f} MiB, in the {engine.source}"
        what = f"{engine.graph} in {engine.precision} for {engine.target}, {engine.library}, {where}"
    return Text(f"{what}: {engine.problem or 'usable'}", style="yellow" if engine.problem else "green")


def _choice(diagnosis: Diagnosis) -> Text:
    auto = diagnosis.auto
    if auto.device is None:
        return Text(f"no device can serve: {auto.problem}", style="red")
    known = tuple(problem for problem in diagnosis.devices.values() if problem)
    refused = "".join(f"\nnot {reason}" for reason in auto.device.refused if not reason.endswith(known))
    problem = f"\n{auto.problem}" if auto.problem else ""
    return Text(f"{auto.device.name} ({auto.device.reason}){refused}{problem}", style="red" if problem else "")


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
        say(f"on {report.device.name} ({report.device.reason}), bundle {report.hash}")


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
