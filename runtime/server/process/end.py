"""The very end of a server process, for which a thread may still load a bundle or compute."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

END_S = 0.5  # for threads that are about to end
log = logging.getLogger(__name__)


@contextmanager
def ending_with_its_threads() -> Iterator[None]:
    """If a thread that was begun within is still at work at the end, end the process here, with the same exit code.

    Such a thread cannot be stopped while it is in a runtime's native code. If the interpreter were taken down beside
    it, the thread would be ended as it comes back, which C++ answers with `std::terminate`: SIGABRT instead of the exit
    code. Everything that must be closed is closed within.
    """
    before = set(threading.enumerate())
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, int):
            _end(before, error.code)
        raise
    _end(before, 0)


def _end(before: set[threading.Thread], code: int) -> None:
    left = _left(before)
    if left:
        log.info("ending while %s is at work", ", ".join(sorted(thread.name for thread in left)))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)


def _left(before: set[threading.Thread]) -> list[threading.Thread]:
    """The daemon threads begun since that do not end in time; for others the interpreter waits by itself."""
    begun = [thread for thread in threading.enumerate() if thread.daemon and thread not in before]
    limit = time.monotonic() + END_S
    for thread in begun:
        thread.join(max(0.0, limit - time.monotonic()))
    return [thread for thread in begun if thread.is_alive()]
