"""Every error that this package raises on purpose.

    UnipinrecError
    ├── ConfigError             a setting that is unknown, out of range, or contradicts another
    ├── DataError               a data set that cannot be read or is not in the documented format
    │   └── NothingHeldOutError a part of it has nothing to measure
    ├── CheckpointError         a checkpoint folder that is missing, damaged or of another model
    ├── TrainingError           training cannot go on
    ├── TrainingInterrupted     training stopped on request; the state to resume from is on disk
    ├── ExportError             an export that failed; no bundle was left behind, unless it says so
    │   └── ParityError         an exported graph that does not compute what PyTorch computes
    ├── BundleError             a bundle that cannot be served
    │   ├── BundleCorruptError  a file that is missing, truncated or altered
    │   └── BundleVersionError  a bundle written in a format that this version does not read
    ├── BackendError            an inference engine that is missing or failed
    ├── CacheError              a key/value cache that contradicts itself
    ├── SwapError               a bundle that does not take over from the one that serves
    │   └── SwapBusyError       because another one is about to
    └── RequestError            a request that cannot be answered as given
        ├── TooFewItemsError    because fewer items are left than it asks for
        └── ColdStartError      because it has no history and popular items are not to be had

A message names what was given, what is accepted, and what to do. What was given may be of any size; a message is not.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import msgspec

MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


LONGEST_MESSAGE, LONGEST_VALUE = 4_000, 80


class UnipinrecError(Exception):
    """Root of all errors raised on purpose by this package."""

    def __str__(self) -> str:
        """The message; of one longer than `LONGEST_MESSAGE` characters the two ends."""
        text, half = super().__str__(), LONGEST_MESSAGE // 2 - 50
        left_out = f" [... {len(text) - 2 * half:,} characters ...] "
        return text if len(text) <= LONGEST_MESSAGE else text[:half] + left_out + text[-half:]


class ConfigError(UnipinrecError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(UnipinrecError):
    """A data set cannot be read or is not in the documented format."""


class NothingHeldOutError(DataError):
    """The part of a data set that is held out has nothing to measure."""


class CheckpointError(UnipinrecError):
    """A checkpoint folder is missing, damaged, or holds another model."""


class TrainingError(UnipinrecError):
    """Training cannot go on."""


class TrainingInterrupted(UnipinrecError):  # noqa: N818 - an interruption, not a fault
    """Training stopped on request; the state to resume from is on disk."""


class ExportError(UnipinrecError):
    """An export failed; no bundle was left behind, unless the message says so."""


class ParityError(ExportError):
    """An exported graph does not compute what PyTorch computes."""


class BundleError(UnipinrecError):
    """A bundle cannot be served."""


class BundleCorruptError(BundleError):
    """A file of a bundle is missing, truncated or altered."""


class BundleVersionError(BundleError):
    """A bundle is written in a format that this version does not read."""


class BackendError(UnipinrecError):
    """An inference engine is missing or failed."""


class CacheError(UnipinrecError):
    """The key/value cache contradicts itself: a fault of this package."""


class SwapError(UnipinrecError):
    """A bundle does not take over from the one that serves, which serves on."""


class SwapBusyError(SwapError):
    """Another bundle is about to take over."""


class RequestError(UnipinrecError):
    """A request cannot be answered as given."""


class TooFewItemsError(RequestError):
    """Fewer items are left than are asked for, after those that were seen, excluded or filtered out."""


class ColdStartError(RequestError):
    """The history is empty, and the bundle stores no popularity or the operator refuses cold starts."""


def listed(values: Iterable[object], most: int = 20) -> str:
    """Values as a list for a message: not all where they are many, and the beginning of long ones."""
    rest = iter(values)
    shown = [repr(value) for value in islice(rest, most)]
    more = sum(1 for _ in rest)
    short = [text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..." for text in shown]
    return f"[{', '.join(short)}]" + f" and {more:,} more" * bool(more)


@contextmanager
def decoding(error: Callable[[str], UnipinrecError], what: object, remedy: str) -> Iterator[None]:
    """Turn the error of a JSON decoder into one of ours that names `what` was read, the reason and the remedy."""
    try:
        yield
    except MALFORMED as problem:
        raise error(f"{what}: {problem}; {remedy}") from problem
