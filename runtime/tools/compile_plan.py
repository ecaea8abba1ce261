"""The profiles, memory and keys of a compilation. Needs neither a GPU nor TensorRT."""

from __future__ import annotations

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
from unipinrec.runtime.trt.memory import size_bytes
from unipinrec.runtime.trt.profiles import NAMES, Bucket, Range, covering, for_graph
from unipinrec.runtime.trt.record import DEFAULT_OPTIONS, BuildOptions, EngineKey, needs_of

KEY_VALUES = ("past_key_values.", "present.")
Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class CompileTask:
    """What to compile, and how.

    Attributes:
        precision: One of the bundle's.
        buckets: Shapes to cover.
        targets: GPU architectures to build for without a GPU, or "portable"; None = the GPU of this machine.
        options: See `BuildOptions`.
        timing_cache: See `BuildTask`.
        force: Build stored engines again.
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
        sizes: Smallest, usual and largest size of each named dimension; a past is counted in slots.
        kv_in_bytes, kv_out_bytes: Keys and values that a run of the largest size reads and writes.
        other_bytes: All other inputs and outputs of such a run.
    """

    sizes: dict[str, Range]
    kv_in_bytes: int
    kv_out_bytes: int
    other_bytes: int


class GraphPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The engine to build from one graph."""

    graph: str
    precision: str
    file: str
    profiles: tuple[ProfilePlan, ...]


def plan_compile(manifest: Manifest, task: CompileTask) -> tuple[GraphPlan, ...]:
    """The engines of a task, graph by graph.

    Raises:
        ConfigError: The bundle has no such precision, or a graph has a dimension of an unknown name.
    """
    prefix = manifest.model.kv_prefix_slots
    return tuple(
        GraphPlan(
            graph=name,
            precision=task.precision,
            file=graph.file,
            profiles=_profiles(task.buckets, graph, prefix),
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
    """The keys of a task's engines, by graph; `architecture` is that of this machine's GPU."""
    graphs, prefix = graphs_of(bundle.manifest, task.precision), bundle.manifest.model.kv_prefix_slots
    return {
        name: EngineKey(
            **msgspec.structs.asdict(need),
            profiles=for_graph(task.buckets, graphs[name], prefix),
            target=architecture if task.targets is None else ",".join(task.targets),
            options=task.options,
        )
        for name, need in needs_of(bundle, task.precision, trt).items()
    }


def require_golden_covered(bundle: Bundle, task: CompileTask) -> None:
    """Check that the profiles cover the golden requests, which every engine must pass before it is installed.

    Raises:
        ConfigError: No profile covers one of their shapes.
        BundleError: The golden requests cannot be read.
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
                    f"{name}: the profiles do not cover the golden requests, which need {needed}; an engine must pass "
                    "them before it is installed: add a profile that covers them"
                )


def _golden_sizes(bundle: Bundle, *, exact: bool) -> tuple[Sizes, Sizes]:
    """The smallest and largest sizes of the requests that test engines; in fp32 all golden requests are one batch."""
    golden = read_golden(bundle)
    lengths, splits = [len(history) for history in golden.histories], [int(split) for split in golden.prefixes]
    new = [length - split for length, split in zip(lengths, splits, strict=True)]
    candidates = golden.candidates.shape[1]
    if exact:
        sizes = {"batch": len(lengths), "new": max(new), "candidates": candidates}
        part, whole = max(splits), max(lengths)
        return {**sizes, "history": part, "past": part}, {**sizes, "history": whole, "past": whole}
    users = [len(history) for history in bundle.sample_histories(MAX_USERS)]
    fewest, most = min(splits), max(lengths + users)
    new += [events - events // 2 for events in users if events > 1]
    counts = (candidates, min(CANDIDATES, bundle.manifest.num_items))
    return (
        {"batch": 1, "history": fewest, "past": fewest, "new": min(new), "candidates": min(counts)},
        {"batch": 1, "history": most, "past": most, "new": max(new), "candidates": max(counts)},
    )


def _profiles(buckets: Sequence[Bucket], graph: GraphSpec, prefix: int) -> tuple[ProfilePlan, ...]:
    """One profile per bucket, without duplicates, as in `for_graph`."""
    profiles: list[ProfilePlan] = []
    for bucket in buckets:
        sizes = {name: bucket.sizes(name, prefix) for name in _names(graph)}
        largest = {name: most for name, (_, _, most) in sizes.items()}
        kv_in, others_in = _bytes(graph.inputs, largest)
        kv_out, others_out = _bytes(graph.outputs, largest)
        profile = ProfilePlan(sizes=sizes, kv_in_bytes=kv_in, kv_out_bytes=kv_out, other_bytes=others_in + others_out)
        if profile not in profiles:
            profiles.append(profile)
    return tuple(profiles)


def _names(graph: GraphSpec) -> list[str]:
    """Names of the dynamic dimensions of a graph's inputs."""
    used = {size for spec in graph.inputs for size in spec.shape}
    return [name for name in NAMES if name in used]


def _bytes(tensors: Sequence[TensorSpec], sizes: Sizes) -> tuple[int, int]:
    """Bytes of the keys and values, and of the other tensors."""
    totals = [0, 0]
    for spec in tensors:
        shape = [_size(size, sizes) for size in spec.shape]
        totals[not spec.name.startswith(KEY_VALUES)] += size_bytes(spec.dtype, shape)
    return totals[0], totals[1]


def _size(size: int | str, sizes: Sizes) -> int:
    """A dimension as a number; it is a number, a name, or a sum such as "history + 1".

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(size, int):
        return size
    name, _, addend = size.partition(" + ")
    if name not in sizes or not (addend or "0").isdecimal():
        raise ConfigError(f"a tensor has a dimension {size!r}, the known ones are {', '.join(NAMES)}; export again")
    return sizes[name] + int(addend or 0)
