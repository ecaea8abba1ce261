"""The end of a server process, while a thread may still load a bundle or compute."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

END_S = 0.5  # for threads to end
log = logging.getLogger(__name__)


@contextmanager
def ending_with_its_threads() -> Iterator[None]:
    """End the process at the end of the block, with its exit code, if a thread that began in it is still at work.

    Native code of a runtime cannot be interrupted. If the interpreter shut down meanwhile, the thread would be killed
    on its return, and C++ would call `std::terminate`: SIGABRT instead of the exit code. The block must close all that
    needs closing.
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
    """Exit at once if a daemon thread is still at work; the interpreter waits for other threads by itself."""
    begun = [thread for thread in threading.enumerate() if thread.daemon and thread not in before]
    limit = time.monotonic() + END_S
    for thread in begun:
        thread.join(max(0.0, limit - time.monotonic()))
    if alive := sorted(thread.name for thread in begun if thread.is_alive()):
        log.info("ending while %s is at work", ", ".join(alive))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
