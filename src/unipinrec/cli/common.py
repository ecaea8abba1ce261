"""Shared by all subcommands: exit codes, common options, text on stdout and stderr, JSON on stdout."""

from __future__ import annotations

import errno
import functools
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unipinrec.errors import UnipinrecError

if TYPE_CHECKING:
    from unipinrec.runtime.device import Machine

P = ParamSpec("P")
R = TypeVar("R")

EXTRAS = {
    **dict.fromkeys(("accelerate", "onnx", "onnxscript", "polars", "torch"), "train"),
    **dict.fromkeys(("prometheus_client", "starlette", "uvicorn"), "serve"),
}
NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
SHORT = 12  # digits of a hash that tell bundles and engines apart

stderr = Console(stderr=True)
stdout = Console()


def fail(error: object) -> NoReturn:
    """Print why the command failed, and exit with code 1."""
    stderr.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
    sys.exit(1)


def warn(message: str, kind: str = "warning") -> None:
    """Print a warning on stderr."""
    stderr.print(f"[bold yellow]{kind}[/]: {escape(message)}", highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line on stdout: not wrapped, not highlighted, and no markup."""
    stdout.print(line, highlight=False, markup=False, soft_wrap=True)


class Commands(click.Group):
    """A group of commands whose output may be in any encoding, and on a full disk."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """See `click.Command.main`."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except OSError as error:
            if error.filename is not None or error.errno not in NOT_WRITTEN:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's end writes the rest again
            fail(f"the output could not be written: {error.strerror}")


class FiniteRange(click.FloatRange):
    """A `FloatRange` that accepts neither nan nor inf."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class BundlePath(click.Path):
    """A bundle's folder, or `hf://org/name[@revision]`, which is downloaded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        if not str(value).startswith("hf:/"):
            return super().convert(value, param, ctx)
        from unipinrec.runtime.bundle.hub import local_folder

        try:
            folder = local_folder(value)
        except UnipinrecError as error:
            fail(error)
        stderr.print(f"{value} is commit {folder.name}, in {folder}", highlight=False, markup=False, soft_wrap=True)
        return folder


class LocalPath(click.Path):
    """A path on this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        if "://" in str(value):
            self.fail(f"{value} is an address, and this takes a path; `unipinrec push` uploads bundles", param, ctx)
        return super().convert(value, param, ctx)


any_path = LocalPath(path_type=Path)
bundle_path = BundlePath(path_type=Path)
input_file = click.Path(path_type=Path, exists=True, dir_okay=False)
positive = FiniteRange(0, min_open=True)
bundle_argument = click.argument("bundle", type=bundle_path)
data_option = click.option("--data", type=any_path, required=True, help="A folder that `prepare` wrote.")
out_option = click.option("--out", type=any_path, required=True, help="Folder to write; it must not exist.")


@contextmanager
def handled(handler: Callable[..., object], *numbers: int) -> Iterator[None]:
    """Handle signals in the block, which may run in another thread than the main one: that gets none."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if main}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors, a missing extra, Ctrl-C and SIGTERM into a message and exit code 1, without a traceback."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with handled(signal.default_int_handler, signal.SIGTERM):
                return function(*args, **kwargs)
        except UnipinrecError as error:
            fail(error)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            install = f"run pip install 'unipinrec[cpu,{EXTRAS[error.name]}]'"
            fail(f"this command needs {error.name}, which is an extra; {install}")
        except KeyboardInterrupt:
            fail("interrupted")

    return guarded


def json_command(function: Callable[P, R]) -> Callable[P, R]:
    """A `command` with the option --json."""
    option = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout; logs go to stderr."
    )
    return option(command(function))


def print_json(document: Any) -> None:
    """Write one JSON document, and nothing else, to stdout."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(document)) + b"\n")


gpu_option = click.option("--gpu", type=click.IntRange(0), default=0, help="Number of the GPU.")


def machine(gpu: int = 0) -> Machine:
    """This machine with a GPU by its number, unless the caller of `main` passes another as `obj`."""
    from unipinrec.runtime.device import Machine

    return click.get_current_context().obj or Machine(gpu)


def progress() -> Progress:
    """A progress bar on stderr with counts and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=stderr,
    )
