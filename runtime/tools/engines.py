"""The engines of a bundle, in the private cache and in the bundle itself, and why each is usable or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.tools.compile_ahead import carried_records
from unipinrec.runtime.trt.library import NAMES, Flavor, TensorRT
from unipinrec.runtime.trt.record import EngineHost, EngineRecord, Need, Refusal, graph_hash, unfit
from unipinrec.runtime.trt.store import EngineStore

CARRIED = "carried by the bundle; it runs with --allow-bundle-engines, after the golden requests"


class ListedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that was built from a bundle's graphs, or an entry that cannot be told.

    Attributes:
        id: Hash of its key; the name of its entry.
        source: "cache" or "bundle".
        record: What it is; None where the entry cannot be trusted.
        problem: Why it is not used; None where it is.
    """

    id: str
    source: str
    record: EngineRecord | None
    problem: str | None


def list_engines(
    bundle: Bundle, store: EngineStore, machine: EngineHost, installed: Mapping[Flavor, TensorRT]
) -> tuple[ListedEngine, ...]:
    """All engines of a bundle; entries that were built from other graphs are left out.

    Args:
        bundle: The bundle.
        store: The private cache.
        machine: This one, with its GPU if it has one.
        installed: What could run them.
    """
    return (*_cached(bundle, store, machine, installed), *_carried(bundle))


def _cached(
    bundle: Bundle, store: EngineStore, machine: EngineHost, installed: Mapping[Flavor, TensorRT]
) -> Iterator[ListedEngine]:
    manifest = bundle.manifest
    hashes = {
        (graph, precision): graph_hash(bundle, graph, precision)
        for precision in (manifest.precision, *manifest.precisions)
        for graph in manifest.graphs_in(precision)
    }
    for name, entry in store.entries().items():
        if isinstance(entry, Refusal):
            yield ListedEngine(id=name, source="cache", record=None, problem=str(entry))
        elif hashes.get((entry.key.graph, entry.key.precision)) == entry.key.graph_sha256:
            yield ListedEngine(id=name, source="cache", record=entry, problem=_problem(entry, machine, installed))


def _problem(record: EngineRecord, machine: EngineHost, installed: Mapping[Flavor, TensorRT]) -> str | None:
    key = record.key
    trt = installed.get(key.flavor)
    if trt is None:
        return f"{NAMES[key.flavor]} is not installed"
    need = Need(
        graph=key.graph,
        graph_sha256=key.graph_sha256,
        precision=key.precision,
        flavor=trt.flavor,
        version=trt.version,
    )
    refusal = unfit(record, need, machine)
    return None if refusal is None else str(refusal)


def _carried(bundle: Bundle) -> Iterator[ListedEngine]:
    for record in carried_records(bundle):
        yield ListedEngine(id=record.key.digest(), source="bundle", record=record, problem=CARRIED)
