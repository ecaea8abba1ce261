"""The installed TensorRT: TensorRT proper or TensorRT-RTX, which share one API.

This module needs no GPU and creates no `Runtime`: without a driver its constructor ends the process.
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
# The second name is that of the bindings, installed without the package with the short name.
MODULES: dict[Flavor, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
# The first supported version, and the first that is not supported any more.
VERSIONS: dict[Flavor, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tensorrt": ((10, 16), (12,)),
    "tensorrt_rtx": ((1, 5), (2,)),
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
        version: Such as "11.4.0.106".
    """

    module: Any
    flavor: Flavor
    version: str

    def __str__(self) -> str:
        return f"{NAMES[self.flavor]} {self.version}"


def import_tensorrt(flavor: Flavor | None = None) -> TensorRT:
    """Import TensorRT.

    Args:
        flavor: None = TensorRT proper where it is installed, else TensorRT-RTX.

    Raises:
        BackendError: It is not installed, does not load, or its version is not supported.
    """
    missing = []
    for candidate in (flavor,) if flavor else FLAVORS:
        module, problem = _import(candidate)
        remedy = f"run pip install 'unipinrec[{EXTRAS[candidate]}]'"
        if module is not None:
            version, (first, end) = str(module.__version__), VERSIONS[candidate]
            if first <= tuple(map(int, version.split(".")[:2])) < end:
                return TensorRT(module=module, flavor=candidate, version=version)
            bounds = f"at least {'.'.join(map(str, first))} and less than {end[0]}"
            raise BackendError(f"{NAMES[candidate]} {version} is installed; {bounds} is needed: {remedy}")
        missing.append(f"{NAMES[candidate]} {problem}; {remedy}")
    raise BackendError("; ".join(missing))


def _import(flavor: Flavor) -> tuple[Any, str]:
    """The module, or why it cannot be imported."""
    problem = "is not installed"
    for name in MODULES[flavor]:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a wheel without its libraries may raise anything
            problem = f"is installed, but does not load ({error})"
        else:
            if hasattr(module, "__version__"):
                return module, ""
            problem = f"is not installed: {name} is something else ({getattr(module, '__file__', None) or 'a folder'})"
    return None, problem


@dataclass(kw_only=True, eq=False)
class LogLines:
    """TensorRT's log messages for as long as this object lives; thread-safe.

    Attributes:
        keep: Chooses other messages than errors.
        errors: The first error messages.
        kept: The messages that `keep` chose.
    """

    keep: Callable[[str], bool] = lambda line: False
    errors: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, level: int, message: str) -> None:
        """Store an error, or a message that `keep` chooses."""
        with self._lock:
            if level >= logging.ERROR:
                self.errors += [message] if len(self.errors) < MAX_ERRORS else []
            elif self.keep(message):
                self.kept.append(message)

    def reason(self) -> str:
        """The errors as one line."""
        return "; ".join(dict.fromkeys(self.errors)) or "it gave no reason"


# All objects of a TensorRT share the first logger that it gets, and may use it until the process ends.
_loggers: dict[int, tuple[Any, Any, weakref.WeakSet[LogLines]]] = {}  # by the identity of the module
_making = threading.Lock()


def tensorrt_logger(module: Any, lines: LogLines) -> Any:
    """The logger for a module's objects; from now on `lines` gets its messages, for as long as `lines` lives."""
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
    }

    class Logger(module.ILogger):  # type: ignore[misc]  # its base comes with the module
        def log(self, severity: Any, msg: str) -> None:
            """Take one message; called by TensorRT."""
            level = levels.get(severity, logging.DEBUG)
            with _making:
                listening = list(readers)
            for lines in listening:
                lines.add(level, msg)
            # A reader raises its errors as exceptions; the known warnings are harmless.
            quiet = (level > logging.WARNING and listening) or any(part in msg for part in KNOWN)
            log.log(logging.DEBUG if quiet else min(level, logging.WARNING), "%s", msg)

    return Logger()
