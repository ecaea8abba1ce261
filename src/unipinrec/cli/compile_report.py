"""What `unipinrec compile` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from unipinrec.cli.common import stderr, stdout
from unipinrec.runtime.tools.compile import Compiled
from unipinrec.runtime.tools.compile_plan import GraphPlan
from unipinrec.runtime.tools.engines import ListedEngine
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.record import EngineRecord

SHORT = 12


def print_plans(plans: Sequence[GraphPlan], uncovered: Sequence[str]) -> None:
    """Profiles and memory, graph by graph."""
    for plan in plans:
        stdout.print(f"{plan.graph} in {plan.precision} ({plan.file})", highlight=False)
        for profile in plan.profiles:
            sizes = ", ".join(f"{name} {low}:{usual}:{high}" for name, (low, usual, high) in profile.sizes.items())
            stdout.print(
                f"  {sizes}; at most {_size(profile.kv_in_bytes)} of KV in, {_size(profile.kv_out_bytes)} of KV out, "
                f"{_size(profile.other_bytes)} beside",
                highlight=False,
                soft_wrap=True,
            )
    if uncovered:
        stderr.print(
            f"[bold yellow]warning[/]: requests beyond the profiles are refused: {'; '.join(uncovered)}",
            highlight=False,
            soft_wrap=True,
        )


def document_of(digest: str, trt: TensorRT, done: Sequence[Compiled]) -> dict[str, Any]:
    """The documented JSON form of a compilation."""
    engines = [{**_engine(one.record), "built": one.built} for one in done]
    return {"bundle": digest, "flavor": trt.flavor, "version": trt.version, "engines": engines}


def print_compiled(done: Sequence[Compiled], where: dict[str, str], seconds: float) -> None:
    """One line per engine, then how the golden requests went."""
    for one in done:
        record, key = one.record, one.record.key
        made = f"built in {record.seconds:.1f} s" if one.built else "there already"
        stdout.print(
            f"{key.graph} in {key.precision}: {made}, {_size(record.size_bytes)}, {_layers(record)}; "
            f"{key.digest()[:SHORT]}",
            highlight=False,
            soft_wrap=True,
        )
    for how in dict.fromkeys(one.record.verified.how for one in done):
        stdout.print(f"golden requests: {how}", highlight=False, soft_wrap=True)
    place = where.get("out") or where.get("cache")
    stdout.print(f"{place}: {len(done)} engines, {seconds:.0f} s", highlight=False, soft_wrap=True)


def listed_document(engine: ListedEngine) -> dict[str, Any]:
    """The documented JSON form of a listed engine."""
    told = {"id": engine.id} if engine.record is None else _engine(engine.record)
    return {**told, "source": engine.source, "usable": engine.problem is None, "problem": engine.problem}


def print_listed(engines: Sequence[ListedEngine], root: str) -> None:
    """One line per engine: what it is, and whether it is used."""
    for engine in engines:
        what = "?"
        if engine.record is not None:
            key = engine.record.key
            what = (
                f"{key.graph} in {key.precision} for {key.target}, {key.flavor} {key.version}, {engine.record.created}"
            )
        stdout.print(
            f"{engine.id[:SHORT]} {engine.source}: {what}: {engine.problem or 'usable'}",
            highlight=False,
            soft_wrap=True,
        )
    if not engines:
        stdout.print(f"{root} has no engine of this bundle; run unipinrec compile", highlight=False, soft_wrap=True)


def _engine(record: EngineRecord) -> dict[str, Any]:
    key = record.key
    return {
        "id": key.digest(),
        "graph": key.graph,
        "precision": key.precision,
        "flavor": key.flavor,
        "version": key.version,
        "target": key.target,
        "created": record.created,
        "seconds": record.seconds,
        "size_bytes": record.size_bytes,
        "activation_bytes": record.activation_bytes,
        "profiles": key.profiles,
        "layers": _counts(record),
        "attention": record.layers.attention,
        "verified": record.verified,
    }


def _counts(record: EngineRecord) -> dict[str, int]:
    """Layers by the floating-point types that they read."""
    kinds = ("+".join(sorted({name for name in layer.inputs if "float" in name})) for layer in record.layers.layers)
    return dict(Counter(kind for kind in kinds if kind))


def _layers(record: EngineRecord) -> str:
    counts = ", ".join(f"{count} layers read {kind}" for kind, count in _counts(record).items())
    attention = Counter(record.layers.attention.values())
    return "; ".join([counts, *(f"attention {state} in {count}" for state, count in attention.items())])


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
