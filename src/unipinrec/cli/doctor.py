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

from unipinrec.cli.common import command, json_option, machine, print_json, stderr, stdout
from unipinrec.errors import BackendError

if TYPE_CHECKING:
    from unipinrec.runtime.tools.diagnosis import Diagnosis, Engine, Gpu, Library

EXAMPLES = """\b
Examples:
  unipinrec doctor
  unipinrec doctor bundle/ --json"""

GIB, MIB = 2**30, 2**20
SHORT = 12


@click.command(epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@json_option
@command
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Show what this machine can serve on, and why not on more.

    With a BUNDLE it also shows the bundle's compiled engines, loads it as a server would, and fails if nothing serves
    it.
    """
    with stderr.status("examining"), _without_warnings():
        from unipinrec.runtime.tools.doctor import examine

        found = examine(bundle, machine())
    if as_json:
        print_json(found)
    else:
        _print(found)
    if bundle and found.auto.device is None:
        raise BackendError(f"{bundle} cannot be served here: {found.auto.problem}")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep back what loading a bundle warns of: the diagnosis has all of it."""
    logger = logging.getLogger("unipinrec")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _print(found: Diagnosis) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, value in _machine(found):
        table.add_row(name, value)
    for name, problem in found.devices.items():
        told = "see GPU" if problem == found.gpu.problem else problem
        table.add_row(f"device {name}", Text(told, style="red") if told else Text("ok", style="green"))
    if found.bundle:
        for engine in found.engines:
            table.add_row(f"engine {engine.id[:SHORT]}", _engine(engine))
        if found.engines_problem or not found.engines:
            table.add_row("engines", Text(found.engines_problem or f"none for {found.bundle}"))
    table.add_row("device=auto", _choice(found))
    stdout.print(table)


def _machine(found: Diagnosis) -> list[tuple[str, Text]]:
    """Everything but devices and engines."""
    cpu, memory, cache = found.cpu, found.memory, found.cache
    features = ", ".join(name if there else f"no {name}" for name, there in cpu.features.items())
    limit = "" if memory.limit_bytes is None else f", the cgroup allows {memory.limit_bytes / GIB:.1f} GiB"
    sizes = [size / GIB for size in (memory.total_bytes, memory.available_bytes) if size is not None]
    state = (
        f"mode {cache.mode}, {cache.entries} engines, {cache.size_bytes / MIB:.1f} MiB"
        if cache.mode
        else "not there yet"
    )
    wheels, providers = ", ".join(found.onnxruntime.wheels), ", ".join(found.onnxruntime.providers)
    return [
        ("unipinrec", Text(f"{found.unipinrec} on Python {found.python}, {found.system}")),
        ("CPU", Text(f"{cpu.model}: {features}")),
        ("threads", Text(f"{cpu.threads}: {cpu.threads_reason}")),
        ("memory", Text(f"{' GiB, available '.join(f'{size:.1f}' for size in sizes) or '?'} GiB{limit}")),
        ("GPU", _gpu(found.gpu)),
        ("CUDA", Text(", ".join(f"{name} {version}" for name, version in found.gpu.packages.items()) or "no packages")),
        ("ONNX Runtime", _library(found.onnxruntime, f" ({wheels}): {providers}")),
        *((library.name, _library(library)) for library in (*found.tensorrt, found.openvino)),
        ("engine cache", Text(": ".join(filter(None, (cache.path, cache.problem or state))))),
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


def _engine(engine: Engine) -> Text:
    what = "cannot be told"
    if engine.graph:
        size = (engine.size_bytes or 0) / MIB
        what = (
            f"{engine.graph} in {engine.precision} for {engine.target}, {engine.library}, {size:.1f} MiB, in the "
            f"{engine.source}"
        )
    return Text(f"{what}: {engine.problem or 'usable'}", style="yellow" if engine.problem else "green")


def _choice(found: Diagnosis) -> Text:
    auto = found.auto
    if auto.device is None:
        return Text(f"nothing serves: {auto.problem}", style="red")
    known = tuple(problem for problem in found.devices.values() if problem)
    refused = "".join(f"\nnot {reason}" for reason in auto.device.refused if not reason.endswith(known))
    problem = f"\n{auto.problem}" if auto.problem else ""
    return Text(f"{auto.device.name} ({auto.device.reason}){refused}{problem}", style="red" if problem else "")
