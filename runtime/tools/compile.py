"""`compile_bundle`: profiles -> build -> layer check -> golden requests through the engines -> installation.

An engine that fails any check is not installed. A running server calls nothing here.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial

import msgspec

from unipinrec.errors import BackendError
from unipinrec.runtime.agreement import measure_agreement
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.device import precision_of
from unipinrec.runtime.golden_check import compare_golden
from unipinrec.runtime.graphs.backend import Device
from unipinrec.runtime.graphs.engine import Engine
from unipinrec.runtime.tools.compile_plan import CompileTask, keys_of, require_golden_covered
from unipinrec.runtime.trt.backend import TensorRtBackend
from unipinrec.runtime.trt.build import BuildTask, Progress, build_engine
from unipinrec.runtime.trt.cuda import Cuda
from unipinrec.runtime.trt.layers import require_precision
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.load import EnginePlan
from unipinrec.runtime.trt.record import EngineKey, EngineRecord, Verification, engine_host, needs_of, unfit
from unipinrec.runtime.trt.store import EngineStore

GOLDEN = "golden requests"
NOT_YET = Verification(passed=False, how="they have not run yet")
GraphProgress = Callable[[str, float, str], None]  # engine, finished share, phase


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """An engine of a compilation, and whether it is new."""

    record: EngineRecord
    built: bool


def compile_bundle(
    bundle: Bundle,
    task: CompileTask,
    trt: TensorRT,
    cuda: Cuda,
    store: EngineStore,
    progress: GraphProgress = lambda graph, share, phase: None,
) -> tuple[Compiled, ...]:
    """Compile the graphs of a bundle for this machine's GPU and install them in the private cache.

    Stored engines that fit are kept. If the engine of one graph fails, none is installed.

    Raises:
        ConfigError: The bundle has no such precision, or the profiles do not cover the golden requests.
        BackendError: A graph cannot be built, an engine does not compute in its precision, its answers to the golden
            requests differ from PyTorch's, or the cache cannot be written.
    """
    keys = keys_of(bundle, task, trt, cuda.info.architecture)
    require_golden_covered(bundle, task)
    needs = needs_of(bundle, task.precision, trt)
    machine = engine_host(cuda.info)
    store.prepare()
    stored = {} if task.force else {graph: store.sound(key) for graph, key in keys.items()}
    kept = {graph: record for graph, record in stored.items() if record and not unfit(record, needs[graph], machine)}
    records, contents = dict(kept), {graph: store.plan(record) for graph, record in kept.items()}
    for graph, key in keys.items():
        name = f"{graph} in {task.precision}"
        if graph not in kept:
            records[graph], contents[graph] = build_graph(bundle, key, trt, task, partial(progress, name))
        progress(name, 1.0, "there already" if graph in kept else "built")
    if len(kept) < len(keys):
        progress(f"{GOLDEN} in {task.precision}", 0.0, "running")
        files = bundle.graph_files(task.precision)
        plans = {graph: EnginePlan.of(contents[graph], task.options, files[graph]) for graph in keys}
        verified, kernels = verify_engines(bundle, task.precision, trt, cuda, plans)
        for graph in keys.keys() - kept.keys():
            record = msgspec.structs.replace(records[graph], machine=machine, verified=verified)
            records[graph] = store.put(record, contents[graph], kernels.get(graph), replace=task.force)
    progress(f"{GOLDEN} in {task.precision}", 1.0, "passed")
    return tuple(Compiled(record=records[graph], built=graph not in kept) for graph in keys)


def build_graph(
    bundle: Bundle, key: EngineKey, trt: TensorRT, task: CompileTask, progress: Progress
) -> tuple[EngineRecord, bytes]:
    """Build one engine and check its precision: its record, without the golden requests, and its plan.

    Raises:
        BackendError: It cannot be built, or does not compute in its precision.
    """
    build = BuildTask(
        profiles=key.profiles,
        targets=task.targets,
        options=task.options,
        timing_cache=task.timing_cache,
        progress=progress,
    )
    with bundle.graph_files(key.precision)[key.graph].in_folder() as file:
        built = build_engine(trt, file, build)
    require_precision(built.layers, task.precision)
    record = EngineRecord(
        key=key,
        plan_sha256=hashlib.sha256(built.plan).hexdigest(),
        size_bytes=len(built.plan),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(built.seconds, 3),
        machine=engine_host(),
        layers=built.layers,
        activation_bytes=built.activation_bytes,
        verified=NOT_YET,
    )
    return record, built.plan


def verify_engines(
    bundle: Bundle, precision: str, trt: TensorRT, cuda: Cuda, plans: Mapping[str, EnginePlan]
) -> tuple[Verification, dict[str, bytes]]:
    """Send the golden requests through engines: the result, and the kernels that TensorRT-RTX compiled for this GPU.

    Raises:
        BackendError: The golden requests fail, or an engine does not run.
        BundleError: The golden requests cannot be read.
    """
    manifest = bundle.manifest
    name = f"tensorrt-{precision}"
    device = Device(name=name, reason="compiled for it", precision=precision_of(name))
    backend = TensorRtBackend(trt, cuda, plans, manifest.graphs_in(precision), precision)
    with closing(Engine(backend, manifest.model, bundle.item_vectors, device)) as engine:
        verified = _golden(engine, bundle, exact=precision == manifest.precision)
        kernels = backend.compiled_kernels()
    if not verified.passed:
        raise BackendError(
            f"{bundle.path}: the engines of {trt} on {cuda.info.name} in {precision} were not installed: {verified.how}"
        )
    return verified, kernels


def _golden(engine: Engine, bundle: Bundle, *, exact: bool) -> Verification:
    if not exact:
        agreed = measure_agreement(engine, bundle)
        figures = (
            f"over {agreed.requests} requests the best ten overlap with fp32 by {agreed.ranked_overlap:.4f} ranked and "
            f"{agreed.retrieved_overlap:.4f} retrieved; a logit differs by up to {agreed.max_logit_diff:.3g}"
        )
        return Verification(passed=agreed.problem is None, how=agreed.problem or figures)
    checks = compare_golden(engine, bundle)
    wrong = [f"{check.output} {check.problem}" for check in checks if check.problem]
    largest = max((check.max_abs_diff or 0.0 for check in checks), default=0.0)
    figures = f"{len(checks)} outputs of the golden requests differ from PyTorch's by at most {largest:.3g}"
    return Verification(passed=not wrong, how="; ".join(wrong) or figures)
