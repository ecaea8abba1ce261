"""The shapes that engines are built for: buckets of sizes, and the optimisation profiles that follow from them.

A dynamic dimension of a graph has a name, and a bucket gives each name its smallest, usual and largest size. Pure: no
TensorRT is needed to know what would be built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from unipinrec.errors import MALFORMED, ConfigError
from unipinrec.runtime.bundle.manifest import GraphSpec, ModelSpec
from unipinrec.runtime.graphs.backend import MAX_ROWS, MAX_SLOTS

Range = tuple[int, int, int]  # smallest, usual, largest
Shape = tuple[int, ...]
ProfileShapes = dict[str, tuple[Shape, Shape, Shape]]  # by input of a graph
NAMES = ("batch", "history", "new", "past", "candidates")
BATCH, CANDIDATES, USUAL_CANDIDATES, USUAL_NEW = 8, 1024, 200, 8


class Bucket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes that are served together, each as (smallest, usual, largest); kernels are chosen for the usual one.

    Attributes:
        batch: Requests of a run.
        history: Events of a history that is encoded at once.
        new: Events that extend a history.
        past: Events of a history that was encoded before.
        candidates: Items to rank.
    """

    batch: Range
    history: Range
    new: Range
    past: Range
    candidates: Range

    def __post_init__(self) -> None:
        """Refuse sizes that are out of order.

        Raises:
            ConfigError: They are.
        """
        for name in NAMES:
            smallest, usual, largest = getattr(self, name)
            if not 1 <= smallest <= usual <= largest:
                raise ConfigError(
                    f"{name}={smallest}:{usual}:{largest} is not SMALLEST:USUAL:LARGEST in ascending order, from 1 on"
                )

    def sizes(self, name: str, kv_prefix_slots: int) -> Range:
        """Sizes of a named dimension of a graph, in which a past is counted in slots."""
        smallest, usual, largest = getattr(self, name)
        more = kv_prefix_slots if name == "past" else 0
        return smallest + more, usual + more, largest + more


Buckets = tuple[Bucket, ...]


def default_buckets(model: ModelSpec) -> Buckets:
    """Buckets for everything that the runtime asks for, in as few as that takes.

    One request alone, for latency; a few, of any length; and more, of the shorter histories that are grouped so.
    """
    longest = model.max_history
    usual = -(-longest // 2)
    alone = Bucket(
        batch=(1, 1, 1),
        history=(1, usual, longest),
        new=(1, min(USUAL_NEW, longest), longest),
        past=(1, usual, longest),
        candidates=(1, USUAL_CANDIDATES, CANDIDATES),
    )
    few = msgspec.structs.replace(alone, batch=(1, BATCH, BATCH))
    short = min(longest, MAX_SLOTS // (BATCH + 1) - model.kv_prefix_slots)  # of a group of more than a few
    many = msgspec.structs.replace(
        alone,
        batch=(1, MAX_ROWS // 2, MAX_ROWS),
        history=(1, -(-short // 2), short),
        new=(1, min(USUAL_NEW, short), short),
        past=(1, -(-short // 2), short),
    )
    return (alone, many) if short == longest else (alone, few, many)


def parse_bucket(text: str, model: ModelSpec) -> Bucket:
    """Read a bucket such as "batch=1:4:8,candidates=1:200:1024"; sizes that it does not name are the defaults.

    Raises:
        ConfigError: It is no such text, or does not fit the model.
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
    """Read a JSON list of buckets such as `{"batch": [1, 4, 8]}`; sizes that one does not name are the defaults.

    Raises:
        ConfigError: It is no such file, or a bucket does not fit the model.
    """
    try:
        given = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Range]])
    except (OSError, *MALFORMED) as error:
        raise ConfigError(
            f'{path}: {error}; it is a list of buckets such as {{"batch": [1, 4, 8]}}, with names of {", ".join(NAMES)}'
        ) from error
    if not given:
        raise ConfigError(f"{path}: the list is empty; leave the option out for the default buckets")
    return tuple(_bucket(ranges, model, f"{path}: bucket {place}") for place, ranges in enumerate(given))


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
    """The optimisation profiles of a graph: one per bucket, those that are equal to an earlier one left out.

    Raises:
        ConfigError: A dynamic dimension has a name that no bucket knows.
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
    """Place of the profile that covers the shapes of all inputs, the one whose usual shapes are nearest; None = none.

    Args:
        profiles: Of one graph.
        shapes: By input.
    """
    distances = {
        place: _distance(profile, shapes) for place, profile in enumerate(profiles) if _covers(profile, shapes)
    }
    return min(distances, key=distances.__getitem__, default=None)


def gaps(buckets: Sequence[Bucket], model: ModelSpec) -> list[str]:
    """What the runtime may ask for that no bucket holds, for people; empty where there is nothing."""
    wanted = {"batch": MAX_ROWS, "history": model.max_history, "new": model.max_history, "past": model.max_history}
    found = []
    for name, largest in wanted.items():
        smallest, most = min(getattr(b, name)[0] for b in buckets), max(getattr(b, name)[2] for b in buckets)
        if smallest > 1 or most < largest:
            found.append(f"{name}: {smallest} to {most} of 1 to {largest}")
    return found


def _sizes(bucket: Bucket, size: int | str, tensor: str, kv_prefix_slots: int) -> Range:
    if isinstance(size, int):
        return size, size, size
    if size not in NAMES:
        raise ConfigError(
            f"input {tensor} has a dynamic dimension {size!r}, the known ones are {', '.join(NAMES)}; export again"
        )
    return bucket.sizes(size, kv_prefix_slots)


def _three(ranges: Sequence[Range]) -> tuple[Shape, Shape, Shape]:
    """Smallest, usual and largest shape of dimensions given as ranges."""
    return tuple(r[0] for r in ranges), tuple(r[1] for r in ranges), tuple(r[2] for r in ranges)


def _covers(profile: ProfileShapes, shapes: Mapping[str, Sequence[int]]) -> bool:
    return set(profile) == set(shapes) and all(
        len(smallest) == len(shapes[name])
        and all(low <= size <= high for low, size, high in zip(smallest, shapes[name], largest, strict=True))
        for name, (smallest, _, largest) in profile.items()
    )


def _distance(profile: ProfileShapes, shapes: Mapping[str, Sequence[int]]) -> float:
    """How far shapes are from the usual ones, in orders of magnitude summed over all dimensions."""
    return sum(
        abs(math.log(size / usual))
        for name, (_, usuals, _) in profile.items()
        for size, usual in zip(shapes[name], usuals, strict=True)
    )
