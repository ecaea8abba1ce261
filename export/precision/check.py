"""Write graphs in further precisions, measure them by their emulation, and reject those that stray from fp32.

Two figures are measured. Agreement with fp32 on golden requests and sample users is measured again on every machine
that serves in this precision. The change of each action's AUC is measured on held-out events of real users.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from unipinrec.errors import BackendError, ExportError, ParityError
from unipinrec.export.checks.parity import format_problem, graph_spec
from unipinrec.export.lists.held_out import LAST_EVENTS, auc_by_action, held_out_logits
from unipinrec.export.precision.fp8 import quantized_graphs
from unipinrec.export.precision.masks import with_masks
from unipinrec.export.precision.typed import LowType, emulated_graph, typed_graph
from unipinrec.export.weights import SharedWeights
from unipinrec.runtime.agreement import measure_agreement
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.derived import seal_derived
from unipinrec.runtime.bundle.manifest import GraphSpec, Manifest, PrecisionSpec
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.graphs.engine import Engine
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.requests import History

Precision = Literal["bf16", "fp16", "fp8"]
LOW_TYPES: dict[Precision, LowType] = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp8": "bf16",
}  # of all values that are not quantised
GRAPHS = ("encoder", "extend", "ranker")  # the others stay fp32: they are small, and they order the items
HELD_OUT_EVENTS = 32_768
REMEDY = "no bundle was written; leave this precision out, or try bf16, which has the range of fp32"
LOSS_REMEDY = "no bundle was written; leave this precision out, or pass --accept-loss if that is good enough for you"
Sources = Mapping[str, onnx.ModelProto]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The fp32 side of a comparison.

    Attributes:
        bundle: The bundle in fp32 alone.
        histories: Histories of real users, if any.
        exact_auc: AUC of each action in fp32.
    """

    bundle: Bundle
    histories: list[History]
    exact_auc: dict[str, float]


def known_precisions(names: Sequence[str], histories: Sequence[History]) -> list[Precision]:
    """Check the names of precisions, and remove repeats.

    Args:
        names: Requested precisions.
        histories: Histories of real users, if any.

    Raises:
        ExportError: A name is unknown, or fp8 has no histories, or only short ones.
    """
    unknown = sorted(set(names) - set(LOW_TYPES))
    if unknown:
        raise ExportError(f"unknown precision {unknown[0]!r}; beside fp32 there are {', '.join(LOW_TYPES)}")
    if "fp8" in names and not histories:
        raise ExportError("precision fp8 is calibrated on histories of real users; pass --data")
    longest = max(map(len, histories), default=0)
    if "fp8" in names and longest <= LAST_EVENTS:
        raise ExportError(
            f"precision fp8 is calibrated on users with more than {LAST_EVENTS} events, and the longest history has "
            f"{longest}; leave fp8 out, or pass --data with more events"
        )
    return [precision for precision in LOW_TYPES if precision in names]


def add_precisions(
    folder: Path,
    precisions: Sequence[Precision],
    histories: Sequence[History],
    *,
    accept_loss: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Add graphs in further precisions to a sealed fp32 bundle that is still being written, and seal it again.

    Args:
        folder: The bundle.
        precisions: From `known_precisions`.
        histories: Histories of real users, if any. Uses the first ones that are long enough.
        accept_loss: Accept a precision that recommends other items than fp32; the manifest names the problem.
        progress: Called with the name of each stage as it begins.

    Returns:
        The new manifest.

    Raises:
        ParityError: A precision recommends other items than fp32.
        ExportError: A graph cannot be written in a precision.
    """
    bundle = Bundle.open(folder)
    long_enough = [history for history in histories if len(history) > LAST_EVENTS]
    events = itertools.accumulate(map(len, long_enough))
    chosen = [history for history, total in zip(long_enough, events, strict=True) if total <= HELD_OUT_EVENTS]
    progress("held-out events in fp32")
    with closing(Engine.on_cpu(bundle)) as exact:
        judged = Judged(bundle=bundle, histories=chosen, exact_auc=_auc(exact, bundle, chosen))
    specs = {}
    for precision in precisions:
        progress(f"graphs in {precision}")
        sources = sources_of(bundle, precision, chosen)
        graphs = _write_graphs(folder, precision, sources)
        progress(f"agreement of {precision}")
        specs[precision] = _measured(judged, precision, sources, graphs)
        problem = specs[precision].agreement.problem
        if problem and not accept_loss:
            raise ParityError(f"{precision} does not recommend what fp32 recommends: {problem}; {LOSS_REMEDY}")
    return seal_derived(folder, bundle, precisions=specs)


def sources_of(bundle: Bundle, precision: Precision, histories: Sequence[History]) -> dict[str, onnx.ModelProto]:
    """The fp32 graphs to convert to a precision; for fp8 they are quantised, on `histories`.

    Raises:
        ExportError: No graph has a layer to quantise.
    """
    sources = {}
    for name in (name for name in GRAPHS if name in bundle.manifest.model.graphs):
        with bundle.graph_files()[name].in_folder() as file:
            sources[name] = with_masks(onnx.load(file))
    return quantized_graphs(bundle, sources, histories) if precision == "fp8" else sources


def _write_graphs(folder: Path, precision: Precision, sources: Sources) -> dict[str, GraphSpec]:
    weights = SharedWeights(folder, f"weights_{precision}.bin")
    specs = {}
    for name, model in sources.items():
        path = folder / f"{name}_{precision}.onnx"
        weights.put(typed_graph(model, LOW_TYPES[precision]), path.name)
        problem = format_problem(path)
        if problem:
            raise ExportError(f"{path.name} is not valid: {problem}; export without --precision {precision}")
        specs[name] = graph_spec(path)
    return specs


def _measured(judged: Judged, precision: Precision, sources: Sources, graphs: dict[str, GraphSpec]) -> PrecisionSpec:
    emulated = {name: emulated_graph(model, LOW_TYPES[precision]) for name, model in sources.items()}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with closing(emulation(judged.bundle, emulated, Path(scratch))) as engine:
                agreement = measure_agreement(engine, judged.bundle)
                auc = _auc(engine, judged.bundle, judged.histories)
        except BackendError as error:
            raise ParityError(f"{precision}: {error}; {REMEDY}") from error
    change = {action: auc[action] - exact for action, exact in judged.exact_auc.items()}
    return PrecisionSpec(graphs=graphs, agreement=agreement, auc_change=change)


def emulation(bundle: Bundle, graphs: Mapping[str, onnx.ModelProto], scratch: Path) -> Engine:
    """An engine on the CPU with emulated graphs, written to `scratch`, in place of fp32 graphs of the same name."""
    files = bundle.graph_files()
    for name, model in graphs.items():
        path = scratch / f"{name}.onnx"
        onnx.save(model, path, save_as_external_data=True, location=f"{name}.bin")
        files[name] = GraphFile.at(path)
    return Engine(OrtBackend(files), bundle.manifest.model, bundle.item_vectors)


def _auc(engine: Engine, bundle: Bundle, histories: Sequence[History]) -> dict[str, float]:
    model = bundle.manifest.model
    if not histories or model.ranker is None or model.cache == "none":  # then later events change earlier ones
        return {}
    logits = [held_out_logits(engine, history) for history in histories]
    return auc_by_action(bundle.manifest.actions, histories, logits)
