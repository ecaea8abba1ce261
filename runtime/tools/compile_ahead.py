"""Engines built ahead of time, without a GPU, for other machines: a new bundle beside the old one carries them.

Only TensorRT-RTX can do this. The golden requests cannot run here: `Recommender.load` sends them through such an engine
first, and runs it only if the operator allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from unipinrec.errors import BundleError, ConfigError, decoding
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.derived import seal_derived
from unipinrec.runtime.bundle.integrity import written_whole
from unipinrec.runtime.bundle.manifest import EngineSpec
from unipinrec.runtime.tools.compile import Compiled, GraphProgress, build_graph
from unipinrec.runtime.tools.compile_plan import CompileTask, keys_of, require_golden_covered
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.record import EngineRecord, Verification

RECORDS = "engines.json"
AHEAD = Verification(passed=False, how="built ahead of time, where they cannot run; they run when it is first loaded")


def compile_ahead(
    bundle: Bundle,
    out: Path,
    tasks: Sequence[CompileTask],
    trt: TensorRT,
    progress: GraphProgress = lambda graph, share, phase: None,
) -> tuple[str, tuple[Compiled, ...]]:
    """Build engines without a GPU and write a bundle that carries them, whole or not at all. Its parent stays as it is.

    Args:
        bundle: The parent; the new bundle also carries its engines, unless they are built again.
        out: Folder to create; it must not exist.
        tasks: One per precision, each with targets.
        trt: TensorRT-RTX.
        progress: See `GraphProgress`.

    Returns:
        The hash of the new bundle, and its new engines.

    Raises:
        ConfigError: The bundle has no such precision, a task has no target, or the profiles do not cover the golden
            requests.
        BackendError: A graph cannot be built.
        ExportError: The new bundle cannot be written, for example because the disk is full; nothing was left behind.
    """
    with written_whole(out) as folder:
        for task in tasks:
            if task.targets is None:
                raise ConfigError(f"{task.precision}: a bundle carries engines for named targets; give them")
            require_golden_covered(bundle, task)
        records = []
        for task in tasks:
            for graph, key in keys_of(bundle, task, trt, "").items():
                name = f"{graph} in {task.precision}"
                record, plan = build_graph(bundle, key, trt, task, partial(progress, name))
                records.append(msgspec.structs.replace(record, verified=AHEAD))
                (folder / plan_file(record)).write_bytes(plan)
                progress(name, 1.0, "built")
        _write(bundle, records, folder)
        digest = Bundle.open(folder).hash
    return digest, tuple(Compiled(record=record, built=True) for record in records)


def plan_file(record: EngineRecord) -> str:
    """Name of an engine's file in a bundle."""
    return f"{record.key.graph}_{record.key.precision}_{record.key.digest()[:12]}.plan"


def carried_records(bundle: Bundle) -> list[EngineRecord]:
    """The records of the engines that a bundle carries.

    Raises:
        BundleError: They are not readable.
    """
    if RECORDS not in bundle.manifest.files:
        return []
    with decoding(BundleError, bundle.path / RECORDS, "compile its engines again"):
        return msgspec.json.decode(bundle.files[RECORDS].read_bytes(), type=list[EngineRecord])


def _write(parent: Bundle, built: Sequence[EngineRecord], folder: Path) -> None:
    """Copy the parent's files beside the engines and seal the bundle."""
    rebuilt = {_replaceable(record) for record in built}
    before = [record for record in carried_records(parent) if _replaceable(record) not in rebuilt]
    records = [*before, *built]
    (folder / RECORDS).write_bytes(msgspec.json.format(msgspec.json.encode(records)))
    dropped = {engine.file for engine in parent.manifest.engines} - {plan_file(record) for record in before}
    seal_derived(folder, parent, dropped=dropped, engines=tuple(map(_spec, records)))


def _replaceable(record: EngineRecord) -> tuple[str, ...]:
    """A later build replaces an earlier one that is equal in this."""
    key = record.key
    return key.graph, key.precision, key.flavor, key.version, key.target


def _spec(record: EngineRecord) -> EngineSpec:
    key = record.key
    return EngineSpec(
        file=plan_file(record),
        key=key.digest(),
        graph=key.graph,
        precision=key.precision,
        flavor=key.flavor,
        version=key.version,
        targets=tuple(key.target.split(",")),
    )
