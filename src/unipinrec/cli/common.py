"""What every subcommand shares: exit codes, the console on stderr, the one JSON document on stdout."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
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

TRAINING_MODULES = ("accelerate", "onnx", "onnxscript", "polars", "torch")
INSTALL_TRAIN = "run pip install 'unipinrec[cpu,train]'"
SERVER_MODULES = ("prometheus_client", "starlette", "uvicorn")
INSTALL_SERVE = "run pip install 'unipinrec[cpu,serve]'"

stderr = Console(stderr=True)
stdout = Console()

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout; logs go to stderr."
)


def fail(error: BaseException) -> NoReturn:
    """Print why the command failed and leave with exit code 1."""
    stderr.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
    sys.exit(1)


def warn(message: str) -> None:
    """Say on stderr what is likely to go wrong."""
    stderr.print(f"[bold yellow]warning[/]: {escape(message)}", highlight=False, soft_wrap=True)


class FiniteRange(click.FloatRange):
    """A `FloatRange` that takes neither nan nor inf."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors, a missing extra and Ctrl-C into exit code 1 with a message instead of a traceback."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UnipinrecError as error:
            fail(error)
        except ModuleNotFoundError as error:
            if error.name in SERVER_MODULES:
                fail(UnipinrecError(f"this command needs {error.name}, which is an extra; {INSTALL_SERVE}"))
            if error.name not in TRAINING_MODULES:
                raise
            fail(UnipinrecError(f"this command needs {error.name}, which serving does not; {INSTALL_TRAIN}"))
        except KeyboardInterrupt:
            fail(UnipinrecError("interrupted"))

    return guarded


def print_json(document: Any) -> None:
    """Write one JSON document, and nothing else, to stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document)).decode() + "\n")


def machine() -> Machine:
    """Where devices are looked for: here, unless whoever runs the command says otherwise."""
    from unipinrec.runtime.device import THIS_MACHINE

    return click.get_current_context().obj or THIS_MACHINE


def progress() -> Progress:
    """A progress bar on stderr that shows counts and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=stderr,
    )
