"""`unipinrec doctor`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.table import Table
from rich.text import Text

from unipinrec.cli.common import SHORT, any_path, gpu_option, json_command, machine, print_json, stderr, stdout
from unipinrec.errors import BackendError

if TYPE_CHECKING:
    from unipinrec.runtime.tools.diagnosis import Diagnosis, EngineReport, Gpu, Library

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
    if diagnosis.auto.retrieval:
        table.add_row("retrieval", Text(diagnosis.auto.retrieval))
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
        *(
            (library.name, _library(library))
            for library in (*diagnosis.tensorrt, diagnosis.openvino, diagnosis.hnswlib)
        ),
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
