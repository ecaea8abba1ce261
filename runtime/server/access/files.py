"""Files of an operator that are read again when they change, while the server runs."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from unipinrec.errors import ConfigError

T = TypeVar("T")
OTHERS = 0o006  # may read or write
log = logging.getLogger(__name__)


class Reloaded(Generic[T]):
    """The content of some files. If they change to something that cannot be used, the former content stays.

    A change counts when the files have looked the same at two checks, so that none is read half written.

    Attributes:
        current: The content in use.
        stale: Whether the files now hold something else, which cannot be used.
        reloads: Later reads, by result: loaded or failed.
    """

    def __init__(self, read: Callable[[], T], paths: Sequence[Path], every_s: float = 1.0) -> None:
        """Read for the first time. As a context it checks `paths` every `every_s` seconds; the first one is secret.

        Raises:
            ConfigError: Raised by `read`.
        """
        self._read, self._paths, self._every_s = read, paths, every_s
        self._read_at = self._looked = self._look()
        self.current, self.stale = read(), False
        self.reloads: Counter[str] = Counter()
        self._stopped = threading.Event()
        self._warn_of_mode()

    def __enter__(self) -> Reloaded[T]:
        threading.Thread(target=self._watch, name=f"unipinrec-{self._paths[0].name}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def check(self) -> None:
        """Read the files again if they have changed."""
        before, self._looked = self._looked, self._look()
        if self._looked == self._read_at or self._looked != before:
            return
        self._read_at, names = self._looked, " and ".join(map(str, self._paths))
        try:
            self.current, self.stale = self._read(), False
        except Exception as error:  # whatever it is, requests must go on
            self.stale = True
            self.reloads["failed"] += 1
            log.error(
                "%s changed, but cannot be used; the former content stays in use until this is corrected: %s",
                names,
                error,
                exc_info=None if isinstance(error, ConfigError) else error,
            )
        else:
            self.reloads["loaded"] += 1
            log.info("%s changed, and is in use", names)
            self._warn_of_mode()

    def _look(self) -> list[tuple[int, int, int] | None]:
        seen: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            seen.append(None)
            with suppress(OSError):
                status = path.stat()
                seen[-1] = status.st_ino, status.st_size, status.st_mtime_ns
        return seen

    def _warn_of_mode(self) -> None:
        with suppress(OSError):
            mode = self._paths[0].stat().st_mode & 0o777
            if mode & OTHERS:
                message = "%s has mode %03o: every user of this machine can read or change it; chmod 640 it"
                log.warning(message, self._paths[0], mode)

    def _watch(self) -> None:
        while not self._stopped.wait(self._every_s):
            self.check()
