"""Which TensorRT is installed: TensorRT proper or TensorRT-RTX, one API, chosen here and nowhere else.

Nothing here needs a GPU. A `Runtime` is never made here: without a driver its constructor ends the process.
"""

from __future__ import annotations

import importlib
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from unipinrec.errors import BackendError

Flavor = Literal["tensorrt", "tensorrt_rtx"]
FLAVORS: tuple[Flavor, ...] = get_args(Flavor)
NAMES: dict[Flavor, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# The bindings alone come without the package that gives them the short name.
MODULES: dict[Flavor, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
VERSIONS: dict[Flavor, tuple[tuple[int, int], tuple[int, int]]] = {
    "tensorrt": ((10, 16), (12, 0)),
    "tensorrt_rtx": ((1, 5), (2, 0)),
}
EXTRAS: dict[Flavor, str] = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}
MAX_ERRORS = 20
KNOWN = ("has Int64 binding",)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorRT:
    """An installed TensorRT.

    Attributes:
        module: Its Python module.
        flavor: Which of the two.
        version: As it names itself.
    """

    module: Any
    flavor: Flavor
    version: str

    def __str__(self) -> str:
        return f"{NAMES[self.flavor]} {self.version}"


def import_tensorrt(flavor: Flavor | None = None) -> TensorRT:
    """Import TensorRT.

    Args:
        flavor: Which; None = TensorRT proper where it is installed, else TensorRT-RTX.

    Raises:
        BackendError: It is not installed, does not load, or is of a version that this package was not written for.
    """
    missing = []
    for wanted in (flavor,) if flavor else FLAVORS:
        module, problem = _import(wanted)
        if module is not None:
            return _checked(wanted, module)
        missing.append(f"{NAMES[wanted]} {problem}; run pip install 'unipinrec[{EXTRAS[wanted]}]'")
    raise BackendError("; ".join(missing))


def _import(flavor: Flavor) -> tuple[Any, str]:
    """The module, or why there is none."""
    problem = "is not installed"
    for name in MODULES[flavor]:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a wheel without its libraries fails with whatever its loader raises
            problem = f"is installed, but does not load ({error})"
        else:
            if hasattr(module, "__version__"):
                return module, ""
            problem = f"is not installed: {name} is something else ({getattr(module, '__file__', None) or 'a folder'})"
    return None, problem


def _checked(flavor: Flavor, module: Any) -> TensorRT:
    version = str(module.__version__)
    first, end = VERSIONS[flavor]
    if not first <= _major_minor(version) < end:
        raise BackendError(
            f"{NAMES[flavor]} {version} is installed; at least {'.'.join(map(str, first))} and less than {end[0]} is "
            f"needed: run pip install 'unipinrec[{EXTRAS[flavor]}]'"
        )
    return TensorRT(module=module, flavor=flavor, version=version)


def _major_minor(version: str) -> tuple[int, int]:
    major, minor, *_ = *version.split("."), "0"
    return int(major), int(minor)


@dataclass(kw_only=True, eq=False)
class LogLines:
    """What TensorRT said while this was held; written to from any thread.

    Attributes:
        errors: The first error messages.
        kept: Other messages that `keep` chose.
    """

    keep: Callable[[str], bool] = lambda line: False
    errors: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, level: int, message: str) -> None:
        """Keep a message where it is wanted."""
        with self._lock:
            if level >= logging.ERROR:
                self.errors += [message] if len(self.errors) < MAX_ERRORS else []
            elif self.keep(message):
                self.kept.append(message)

    def reason(self) -> str:
        """The errors as one line, to be shown to people."""
        return "; ".join(dict.fromkeys(self.errors)) or "it gave no reason"


# All objects of a TensorRT share one logger: the first one that it is given, which it may use until the process ends.
_loggers: dict[int, tuple[Any, Any, weakref.WeakSet[LogLines]]] = {}  # by the identity of the module
_making = threading.Lock()


def tensorrt_logger(module: Any, lines: LogLines) -> Any:
    """The logger to make a module's objects with; from now on `lines` gets what they say, for as long as it is held."""
    with _making:
        if id(module) not in _loggers:
            readers: weakref.WeakSet[LogLines] = weakref.WeakSet()
            _loggers[id(module)] = module, _logger(module, readers), readers
        _, logger, readers = _loggers[id(module)]
        readers.add(lines)
    return logger


def _logger(module: Any, readers: weakref.WeakSet[LogLines]) -> Any:
    severity = module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.CRITICAL,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG,
    }

    class Logger(module.ILogger):  # type: ignore[misc]  # its base comes with the module
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            """Take one message; called by TensorRT."""
            level = levels[severity]
            with _making:
                told = list(readers)
            for lines in told:
                lines.add(level, msg)
            # Whoever reads errors raises them; warnings of what is meant so are left out.
            quiet = (level > logging.WARNING and told) or any(part in msg for part in KNOWN)
            log.log(logging.DEBUG if quiet else min(level, logging.WARNING), "%s", msg)

    return Logger()
