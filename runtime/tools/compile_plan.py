"""What a compilation would do, before it does it: profiles, memory and keys. Needs neither a GPU nor TensorRT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from unipinrec.errors import ConfigError
from unipinrec.runtime.agreement import MAX_USERS
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.golden import read_golden
from unipinrec.runtime.bundle.manifest import GraphSpec, Manifest, TensorSpec
from unipinrec.runtime.requests import CANDIDATES
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.profiles import NAMES, Bucket, Range, covering, for_graph
from unipinrec.runtime.trt.record import DEFAULT_OPTIONS, BuildOptions, EngineKey, needs_of

KEY_VALUES = ("past_key_values.", "present.")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
SUM = re.compile(r"^(\w+) \+ (\d+)$")
Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class CompileTask:
    """What to compile.

    Attributes:
        precision: One that the bundle holds.
        buckets: Shapes to cover.
        targets: GPU architectures to build for without a GPU, or "portable"; None = the GPU of this machine.
        options: See `BuildOptions`.
        timing_cache: See `BuildTask`.
        force: Build anew what is there already.
    """

    precision: str
    buckets: tuple[Bucket, ...]
    targets: tuple[str, ...] | None = None
    options: BuildOptions = DEFAULT_OPTIONS
    timing_cache: Path | None = None
    force: bool = False


class ProfilePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One optimisation profile of a graph.

    Attributes:
        sizes: Smallest, usual and largest of each named dimension; a past is counted in slots.
        kv_in_bytes, kv_out_bytes: Keys and values that a run of the largest size reads and leaves on the GPU.
        other_bytes: All other inputs and outputs of such a run.
    """

    sizes: dict[str, Range]
    kv_in_bytes: int
    kv_out_bytes: int
    other_bytes: int


class GraphPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is built from one graph."""

    graph: str
    precision: str
    file: str
    profiles: tuple[ProfilePlan, ...]


def plan_compile(manifest: Manifest, task: CompileTask) -> tuple[GraphPlan, ...]:
    """What a task builds, graph by graph.

    Raises:
        ConfigError: The bundle has no such precision, or a graph has a dimension that no bucket knows.
    """
    prefix = manifest.model.kv_prefix_slots
    return tuple(
        GraphPlan(
            graph=name,
            precision=task.precision,
            file=graph.file,
            profiles=tuple(_profile(bucket, graph, prefix) for bucket in _distinct(task.buckets, graph, prefix)),
        )
        for name, graph in graphs_of(manifest, task.precision).items()
    )


def graphs_of(manifest: Manifest, precision: str) -> dict[str, GraphSpec]:
    """The graphs of a bundle in a precision.

    Raises:
        ConfigError: The bundle does not hold it.
    """
    held = (manifest.precision, *manifest.precisions)
    if precision not in held:
        raise ConfigError(
            f"the bundle holds graphs in {', '.join(held)}, not in {precision}; export it again with "
            f"--precision {precision}"
        )
    return manifest.graphs_in(precision)


def keys_of(bundle: Bundle, task: CompileTask, trt: TensorRT, architecture: str) -> dict[str, EngineKey]:
    """The keys of what a task builds, by graph; `architecture` is that of this machine's GPU."""
    graphs, prefix = graphs_of(bundle.manifest, task.precision), bundle.manifest.model.kv_prefix_slots
    return {
        name: EngineKey(
            graph=name,
            graph_sha256=need.graph_sha256,
            precision=task.precision,
            profiles=for_graph(task.buckets, graphs[name], prefix),
            flavor=trt.flavor,
            version=trt.version,
            target=architecture if task.targets is None else ",".join(task.targets),
            options=task.options,
        )
        for name, need in needs_of(bundle, task.precision, trt).items()
    }


def require_golden_covered(bundle: Bundle, task: CompileTask) -> None:
    """Refuse profiles that the golden requests do not fit, since no engine is installed without them.

    Raises:
        ConfigError: A shape of theirs is covered by no profile.
        BundleError: They cannot be read.
    """
    prefix = bundle.manifest.model.kv_prefix_slots
    for name, graph in graphs_of(bundle.manifest, task.precision).items():
        profiles = for_graph(task.buckets, graph, prefix)
        for sizes in _golden_sizes(bundle, exact=task.precision == bundle.manifest.precision):
            dimensions = {**sizes, "past": sizes["past"] + prefix}
            shapes = {spec.name: [_size(size, dimensions) for size in spec.shape] for spec in graph.inputs}
            if covering(profiles, shapes) is None:
                needed = ", ".join(f"{key}={sizes[key]}" for key in _names(graph))
                raise ConfigError(
                    f"{name}: the profiles do not cover the golden requests, which need {needed}; no engine is "
                    "installed before it has answered them: add a profile that covers them"
                )


def _golden_sizes(bundle: Bundle, *, exact: bool) -> tuple[Sizes, Sizes]:
    """The smallest and largest sizes of the requests that judge engines: in fp32 all golden ones in one batch."""
    golden = read_golden(bundle)
    lengths, splits = [len(history) for history in golden.histories], [int(split) for split in golden.prefixes]
    new, candidates = (
        [length - split for length, split in zip(lengths, splits, strict=True)],
        golden.candidates.shape[1],
    )
    if exact:
        part = {"batch": len(lengths), "history": max(splits), "past": max(splits)}
        whole = {"batch": len(lengths), "history": max(lengths), "past": max(lengths)}
        rest = {"new": max(new), "candidates": candidates}
        return {**part, **rest}, {**whole, **rest}
    users = [len(history) for history in bundle.sample_histories(MAX_USERS)]
    fewest, most = min(splits), max(lengths + users)
    new += [users_events - users_events // 2 for users_events in users if users_events > 1]
    asked = (candidates, min(CANDIDATES, bundle.manifest.num_items))
    return (
        {"batch": 1, "history": fewest, "past": fewest, "new": min(new), "candidates": min(asked)},
        {"batch": 1, "history": most, "past": most, "new": max(new), "candidates": max(asked)},
    )


def _distinct(buckets: Sequence[Bucket], graph: GraphSpec, prefix: int) -> list[Bucket]:
    """The buckets that give a graph different profiles, as `for_graph` does."""
    seen: dict[tuple[Range, ...], Bucket] = {}
    for bucket in buckets:
        seen.setdefault(tuple(bucket.sizes(name, prefix) for name in _names(graph)), bucket)
    return list(seen.values())


def _profile(bucket: Bucket, graph: GraphSpec, prefix: int) -> ProfilePlan:
    sizes = {name: bucket.sizes(name, prefix) for name in _names(graph)}
    largest = {name: most for name, (_, _, most) in sizes.items()}
    kv_in, others_in = _bytes(graph.inputs, largest)
    kv_out, others_out = _bytes(graph.outputs, largest)
    return ProfilePlan(sizes=sizes, kv_in_bytes=kv_in, kv_out_bytes=kv_out, other_bytes=others_in + others_out)


def _names(graph: GraphSpec) -> list[str]:
    """Names of the dynamic dimensions of a graph's inputs."""
    found = {size for spec in graph.inputs for size in spec.shape if isinstance(size, str)}
    return [name for name in NAMES if name in found]


def _bytes(tensors: Sequence[TensorSpec], sizes: Sizes) -> tuple[int, int]:
    """Bytes of the keys and values, and of the other tensors."""
    totals = [0, 0]
    for spec in tensors:
        count = math.prod(_size(size, sizes) for size in spec.shape)
        totals[not spec.name.startswith(KEY_VALUES)] += count * ITEM_BYTES[spec.dtype]
    return totals[0], totals[1]


def _size(size: int | str, sizes: Sizes) -> int:
    """A dimension as a number; outputs have such as "history + 1" beside names.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(size, int):
        return size
    name, more = size, 0
    if found := SUM.match(size):
        name, more = found[1], int(found[2])
    if name not in sizes:
        raise ConfigError(f"a tensor has a dimension {size!r}, the known ones are {', '.join(NAMES)}; export again")
    return sizes[name] + more
