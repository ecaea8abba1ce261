"""The engines of a bundle, in the private cache and in the bundle itself, and why each is usable or not."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.tools.compile_ahead import carried_records
from unipinrec.runtime.trt.library import NAMES, Flavor, TensorRT
from unipinrec.runtime.trt.record import EngineHost, EngineProblem, EngineRecord, graph_hash, unfit
from unipinrec.runtime.trt.store import EngineStore

CARRIED = "carried by the bundle; it runs with --allow-bundle-engines, after the golden requests"


class ListedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine of a bundle's graphs, or an unreadable entry of the cache.

    Attributes:
        id: Hash of its key; the name of its entry.
        source: "cache" or "bundle".
        record: None where the entry cannot be trusted.
        problem: Why it cannot be used; None where it can.
    """

    id: str
    source: str
    record: EngineRecord | None
    problem: str | None


def list_engines(
    bundle: Bundle, store: EngineStore, machine: EngineHost, installed: Mapping[Flavor, TensorRT]
) -> tuple[ListedEngine, ...]:
    """All engines of a bundle, without entries of other graphs.

    Args:
        bundle: The bundle.
        store: The private cache.
        machine: This machine and its GPU, if it has one.
        installed: The TensorRTs that could run them.
    """
    manifest, engines = bundle.manifest, []
    hashes = {
        (graph, precision): graph_hash(bundle, graph, precision)
        for precision in (manifest.precision, *manifest.precisions)
        for graph in manifest.graphs_in(precision)
    }
    for name, entry in store.entries().items():
        if isinstance(entry, EngineProblem):
            engines.append(ListedEngine(id=name, source="cache", record=None, problem=str(entry)))
        elif hashes.get((entry.key.graph, entry.key.precision)) == entry.key.graph_sha256:
            problem = _problem(entry, machine, installed)
            engines.append(ListedEngine(id=name, source="cache", record=entry, problem=problem))
    for record in carried_records(bundle):
        engines.append(ListedEngine(id=record.key.digest(), source="bundle", record=record, problem=CARRIED))
    return tuple(engines)


def _problem(record: EngineRecord, machine: EngineHost, installed: Mapping[Flavor, TensorRT]) -> str | None:
    trt = installed.get(record.key.flavor)
    if trt is None:
        return f"{NAMES[record.key.flavor]} is not installed"
    problem = unfit(record, msgspec.structs.replace(record.key, version=trt.version), machine)
    return None if problem is None else str(problem)
