"""Every error that this package raises on purpose.

    UnipinrecError
    ├── ConfigError             a setting that is unknown, out of range, or contradicts another
    ├── DataError               a data set that cannot be read or is not in the documented format
    │   └── NothingHeldOutError a part of it has nothing to measure
    ├── CheckpointError         a checkpoint folder that is missing, damaged or of another model
    ├── TrainingError           training cannot go on
    ├── TrainingInterrupted     training stopped on request; its state is on disk
    ├── ExportError             an export that failed; no bundle was left behind, unless it says so
    │   └── ParityError         an exported graph that does not compute what PyTorch computes
    ├── BundleError             a bundle that cannot be used
    │   ├── BundleCorruptError  a file that is missing, truncated or altered
    │   └── BundleVersionError  a bundle written in a format that this version does not read
    ├── BackendError            an inference engine that is missing or failed
    ├── CacheError              a key/value cache that contradicts itself
    ├── SwapError               a swap of bundles that failed; the active bundle stays
    │   └── SwapBusyError       because another swap is running
    └── RequestError            a request that cannot be answered
        ├── TooFewItemsError    because too few items are left
        └── ColdStartError      because it has no history and there are no popular items

A message names the wrong value, what is accepted, and what to do. A value may be of any size; a message is bounded.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import msgspec

MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
LONGEST_MESSAGE, LONGEST_VALUE = 4_000, 80


class UnipinrecError(Exception):
    """Root of all errors raised on purpose by this package."""

    def __str__(self) -> str:
        """The message; both ends of it where it is longer than `LONGEST_MESSAGE` characters."""
        text, half = super().__str__(), LONGEST_MESSAGE // 2 - 50
        left_out = f" [... {len(text) - 2 * half:,} characters ...] "
        return text if len(text) <= LONGEST_MESSAGE else text[:half] + left_out + text[-half:]


class ConfigError(UnipinrecError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(UnipinrecError):
    """A data set cannot be read or is not in the documented format."""


class NothingHeldOutError(DataError):
    """The held-out part of a data set has nothing to measure."""


class CheckpointError(UnipinrecError):
    """A checkpoint folder is missing, damaged, or holds another model."""


class TrainingError(UnipinrecError):
    """Training cannot go on."""


class TrainingInterrupted(UnipinrecError):  # noqa: N818 - an interruption, not a fault
    """Training stopped on request; its state is on disk, to resume from."""


class ExportError(UnipinrecError):
    """An export failed; no bundle was left behind, unless the message says so."""


class ParityError(ExportError):
    """An exported graph does not compute what PyTorch computes."""


class BundleError(UnipinrecError):
    """A bundle cannot be used."""


class BundleCorruptError(BundleError):
    """A file of a bundle is missing, truncated or altered."""


class BundleVersionError(BundleError):
    """A bundle is written in a format that this version does not read."""


class BackendError(UnipinrecError):
    """An inference engine is missing or failed."""


class CacheError(UnipinrecError):
    """The key/value cache contradicts itself: a fault of this package."""


class SwapError(UnipinrecError):
    """A swap of bundles failed; the active bundle stays."""


class SwapBusyError(SwapError):
    """Another swap is running."""


class RequestError(UnipinrecError):
    """A request cannot be answered."""


class TooFewItemsError(RequestError):
    """Too few items are left after seen items, exclusions and filters."""


class ColdStartError(RequestError):
    """The history is empty, and the bundle stores no popularity or the operator refuses cold starts."""


def listed(values: Iterable[object], most: int = 20) -> str:
    """The first `most` values as text for a message, long ones cut, and the number of the others."""
    rest = iter(values)
    shown = [repr(value) for value in islice(rest, most)]
    more = sum(1 for _ in rest)
    short = [text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..." for text in shown]
    return f"[{', '.join(short)}]" + f" and {more:,} more" * bool(more)


def reason(error: BaseException) -> str:
    """Type, message and place of an error that a user's own code raised; the place is outside installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{type(error).__name__}: {error} ({own[-1].filename}:{own[-1].lineno})"


@contextmanager
def decoding(error: Callable[[str], UnipinrecError], what: object, remedy: str) -> Iterator[None]:
    """Turn an error of a JSON decoder into one of ours that names the source (`what`), the reason and the remedy."""
    try:
        yield
    except MALFORMED as problem:
        raise error(f"{what}: {problem}; {remedy}") from problem
