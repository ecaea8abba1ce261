"""The shapes that engines are built for: buckets of sizes, and the optimisation profiles made from them.

A dynamic dimension of a graph has a name, and a bucket gives each name its smallest, usual and largest size. Pure:
needs no TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from unipinrec.errors import MALFORMED, ConfigError
from unipinrec.runtime.bundle.manifest import GraphSpec, ModelSpec
from unipinrec.runtime.graphs.backend import MAX_ROWS, MAX_SLOTS
from unipinrec.runtime.requests import CANDIDATES

Range = tuple[int, int, int]  # smallest, usual, largest
Shape = tuple[int, ...]
ProfileShapes = dict[str, tuple[Shape, Shape, Shape]]  # by input of a graph
NAMES = ("batch", "history", "new", "past", "candidates")
BATCH, MOST_CANDIDATES, USUAL_NEW = 8, 1024, 8


class Bucket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes for one profile, each as (smallest, usual, largest); TensorRT chooses kernels for the usual size.

    Attributes:
        batch: Requests of a run.
        history: Events of a whole history.
        new: Events that extend a history.
        past: Events that are encoded already.
        candidates: Items to rank.
    """

    batch: Range
    history: Range
    new: Range
    past: Range
    candidates: Range

    def __post_init__(self) -> None:
        """Check the order of the sizes.

        Raises:
            ConfigError: Sizes are out of order.
        """
        for name in NAMES:
            smallest, usual, largest = getattr(self, name)
            if not 1 <= smallest <= usual <= largest:
                raise ConfigError(
                    f"{name}={smallest}:{usual}:{largest} is not SMALLEST:USUAL:LARGEST in ascending order, from 1 on"
                )

    def sizes(self, name: str, kv_prefix_slots: int) -> Range:
        """Sizes of a named dimension of a graph, which counts a past in slots."""
        smallest, usual, largest = getattr(self, name)
        prefix = kv_prefix_slots if name == "past" else 0
        return smallest + prefix, usual + prefix, largest + prefix


Buckets = tuple[Bucket, ...]


def default_buckets(model: ModelSpec) -> Buckets:
    """The fewest buckets for all runs of the runtime.

    One request alone, for latency; a few, of any length; and many, of the short histories that the runtime groups.
    """
    longest = model.max_history
    alone = Bucket(batch=(1, 1, 1), candidates=(1, CANDIDATES, MOST_CANDIDATES), **_lengths(longest))
    few = msgspec.structs.replace(alone, batch=(1, BATCH, BATCH))
    short = min(longest, MAX_SLOTS // (BATCH + 1) - model.kv_prefix_slots)  # in a group of more than a few
    many = msgspec.structs.replace(alone, batch=(1, MAX_ROWS // 2, MAX_ROWS), **_lengths(short))
    return (alone, many) if short == longest else (alone, few, many)


def _lengths(longest: int) -> dict[str, Range]:
    """Sizes of the dimensions that count events."""
    history = (1, -(-longest // 2), longest)
    return {"history": history, "past": history, "new": (1, min(USUAL_NEW, longest), longest)}


def parse_bucket(text: str, model: ModelSpec) -> Bucket:
    """Read a bucket such as "batch=1:4:8,candidates=1:200:1024"; missing sizes are the defaults.

    Raises:
        ConfigError: The text is malformed, or does not fit the model.
    """
    ranges: dict[str, Range] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        sizes = value.split(":")
        if name not in NAMES or name in ranges or len(sizes) not in (1, 3) or not all(s.isdecimal() for s in sizes):
            raise ConfigError(
                f"profile {text!r}: {part!r} is not NAME=SMALLEST:USUAL:LARGEST or NAME=SIZE with a NAME of "
                f"{', '.join(NAMES)}, each once"
            )
        smallest, usual, largest = map(int, sizes * 3 if len(sizes) == 1 else sizes)
        ranges[name] = (smallest, usual, largest)
    return _bucket(ranges, model, f"profile {text!r}")


def read_buckets(path: Path, model: ModelSpec) -> Buckets:
    """Read a JSON list of buckets such as `{"batch": [1, 4, 8]}`; missing sizes are the defaults.

    Raises:
        ConfigError: The file is unreadable or malformed, or a bucket does not fit the model.
    """
    try:
        buckets = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Range]])
    except (OSError, *MALFORMED) as error:
        raise ConfigError(
            f'{path}: {error}; it is a list of buckets such as {{"batch": [1, 4, 8]}}, with names of {", ".join(NAMES)}'
        ) from error
    if not buckets:
        raise ConfigError(f"{path}: the list is empty; leave the option out for the default buckets")
    return tuple(_bucket(ranges, model, f"{path}: bucket {index}") for index, ranges in enumerate(buckets))


def _bucket(ranges: Mapping[str, Range], model: ModelSpec, where: str) -> Bucket:
    unknown = sorted(set(ranges) - set(NAMES))
    if unknown:
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}; the names are {', '.join(NAMES)}")
    base = msgspec.structs.replace(default_buckets(model)[0], batch=(1, BATCH, BATCH))
    try:
        bucket = msgspec.structs.replace(base, **ranges)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    for name in ("history", "new", "past"):
        if getattr(bucket, name)[2] > model.max_history:
            raise ConfigError(
                f"{where}: {name} goes up to {getattr(bucket, name)[2]}, histories of this model to {model.max_history}"
            )
    return bucket


def for_graph(buckets: Sequence[Bucket], graph: GraphSpec, kv_prefix_slots: int) -> tuple[ProfileShapes, ...]:
    """The optimisation profiles of a graph: one per bucket, without duplicates.

    Raises:
        ConfigError: A dynamic dimension has an unknown name.
    """
    profiles: list[ProfileShapes] = []
    for bucket in buckets:
        shapes = {
            spec.name: _three([_sizes(bucket, size, spec.name, kv_prefix_slots) for size in spec.shape])
            for spec in graph.inputs
        }
        if shapes not in profiles:
            profiles.append(shapes)
    return tuple(profiles)


def covering(profiles: Sequence[ProfileShapes], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Index of the profile with the nearest usual shapes of those that cover all inputs; None = none does.

    Args:
        profiles: Of one graph.
        shapes: By input.
    """
    fitting = [index for index, profile in enumerate(profiles) if _covers(profile, shapes)]
    return min(fitting, key=lambda index: _distance(profiles[index], shapes), default=None)


def gaps(buckets: Sequence[Bucket], model: ModelSpec) -> list[str]:
    """Sizes of the runtime's requests that no bucket covers, one message per dimension."""
    needed = {"batch": MAX_ROWS, "history": model.max_history, "new": model.max_history, "past": model.max_history}
    messages = []
    for name, most in needed.items():
        smallest, largest = min(getattr(b, name)[0] for b in buckets), max(getattr(b, name)[2] for b in buckets)
        if smallest > 1 or largest < most:
            messages.append(f"{name}: {smallest} to {largest} of 1 to {most}")
    return messages


def _sizes(bucket: Bucket, size: int | str, tensor: str, kv_prefix_slots: int) -> Range:
    if isinstance(size, int):
        return size, size, size
    if size not in NAMES:
        raise ConfigError(
            f"input {tensor} has a dynamic dimension {size!r}, the known ones are {', '.join(NAMES)}; export again"
        )
    return bucket.sizes(size, kv_prefix_slots)


def _three(ranges: Sequence[Range]) -> tuple[Shape, Shape, Shape]:
    """Smallest, usual and largest shape for the ranges of its dimensions."""
    return tuple(r[0] for r in ranges), tuple(r[1] for r in ranges), tuple(r[2] for r in ranges)


def _covers(profile: ProfileShapes, shapes: Mapping[str, Sequence[int]]) -> bool:
    return set(profile) == set(shapes) and all(
        len(smallest) == len(shapes[name])
        and all(low <= size <= high for low, size, high in zip(smallest, shapes[name], largest, strict=True))
        for name, (smallest, _, largest) in profile.items()
    )


def _distance(profile: ProfileShapes, shapes: Mapping[str, Sequence[int]]) -> float:
    """Sum over all dimensions of the logarithm of the ratio to the usual size."""
    return sum(
        abs(math.log(size / usual))
        for name, (_, usuals, _) in profile.items()
        for size, usual in zip(shapes[name], usuals, strict=True)
    )
