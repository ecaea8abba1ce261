"""OpenVINO on the CPU, wrapped here and nowhere else.

OpenVINO computes 64-bit integers on the CPU in 32 bits, silently: a Unix time in milliseconds comes out as another
number. What the graphs do with times until they are floats or truth values (differences, remainders, comparisons) is
therefore cut out of each graph and left to OpenVINO's reference interpreter, which is exact; see `_cut_times`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.cpu import available_threads, has_bf16
from unipinrec.runtime.manifest import GraphSpec, TensorSpec
from unipinrec.runtime.session import Tensor
from unipinrec.runtime.tensors import check_inputs, host_array

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # ours: OpenVINO's
ATTENTION = ("ScaledDotProductAttention", "Softmax")
TIME_SUFFIX = "timestamps_ms"  # how the names of all inputs end that hold times
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenVinoTensor:
    """An `ov.Tensor`; see `Tensor`. It and its views keep its memory."""

    value: Any

    def shape(self) -> list[int]:
        """See `Tensor.shape`."""
        return list(self.value.shape)

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`."""
        values: NDArray[Any] = self.value.data
        return values


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """A graph cut in two.

    Attributes:
        inputs: What the whole graph takes.
        times: Interpreted `ov.Model` of the exact part; None where the graph takes no times.
        compiled: `ov.CompiledModel` of everything else. Its last inputs are the outputs of `times`, in order.
    """

    inputs: tuple[TensorSpec, ...]
    times: Any | None
    compiled: Any


class OpenVinoBackend:
    """The graphs of a bundle in OpenVINO on the CPU; see `Backend`.

    No values are copied on the way in or out, except arrays that are read-only or not contiguous: inputs are read
    where they lie, and outputs belong to the infer request that a run makes for itself and lets go, so that nothing
    writes to them again. At bf16 keys, values and all other outputs are still f32 tensors.
    """

    prefill_chunk: int | None = None
    rank_chunk: int | None = None

    def __init__(
        self,
        graphs: Mapping[str, Path],
        specs: Mapping[str, GraphSpec],
        threads: int | None = None,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Load and compile graphs; no file is written.

        Args:
            graphs: File of each graph by name.
            specs: What the manifest says of them; OpenVINO does not keep the names of dimensions.
            threads: Threads of one run; None = what this process may use.
            precision: What matrix products, attention and what lies between them are computed in.

        Raises:
            BackendError: OpenVINO is missing or does not load a graph, or this CPU does not compute in `precision`.
        """
        if precision == "bf16" and not has_bf16():
            raise BackendError(
                "this CPU has no bf16 instructions (AMX or AVX-512 BF16), and OpenVINO would compute in another "
                "precision or emulate it slowly; use device openvino or cpu"
            )
        self._ov = import_openvino()
        self.threads = threads or available_threads()
        self.precision = precision
        self.version: str = self._ov.__version__
        log.info("OpenVINO %s on the CPU, %s, %d threads", self.version, precision, self.threads)
        self._core = self._ov.Core()
        self._graphs = {name: self._load(path, specs[name].inputs) for name, path in graphs.items()}

    def _load(self, path: Path, inputs: tuple[TensorSpec, ...]) -> _Graph:
        wanted = PRECISIONS[self.precision]
        options = {
            "INFERENCE_PRECISION_HINT": wanted,
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Pinned threads of two processes on one machine would wait for the same core beside an idle one.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model = self._core.read_model(path)
            _drop_attention_guards(model)
            times = _cut_times(self._ov, model)
            compiled = self._core.compile_model(model, "CPU", options)
            running = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{path}: OpenVINO {self.version} does not load it: {error}") from error
        if running != wanted:
            raise BackendError(f"{path}: OpenVINO would compute in {running}, not in {wanted}; use device cpu")
        return _Graph(inputs=inputs, times=times, compiled=compiled)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`. Runs of one graph that come in together are computed one after the other."""
        parts = self._graphs[graph]
        check_inputs(graph, parts.inputs, inputs)
        try:
            tensors = {name: self._value(given) for name, given in inputs.items()}
            return self._infer(parts, tensors)
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{graph}: OpenVINO failed: {error}") from error

    def _infer(self, graph: _Graph, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        # Of its own for each run: the next run of a request would overwrite its outputs.
        request = graph.compiled.create_infer_request()
        times = [] if graph.times is None else self._interpret(graph.times, tensors)
        ports = graph.compiled.inputs
        given = len(ports) - len(times)
        for port in ports[:given]:
            request.set_tensor(port, tensors[port.any_name])
        for port, tensor in zip(ports[given:], times, strict=True):
            request.set_tensor(port, tensor)
        request.infer(share_outputs=True)  # else its return value, unused here, is a copy of all outputs
        return {port.any_name: OpenVinoTensor(value=request.get_tensor(port)) for port in graph.compiled.outputs}

    def _interpret(self, times: Any, tensors: Mapping[str, Any]) -> list[Any]:
        """Outputs of the exact part."""
        outputs = [self._ov.Tensor(port.element_type, [0] * len(port.partial_shape)) for port in times.outputs]
        if not times.evaluate(outputs, [tensors[port.any_name] for port in times.inputs]):
            raise RuntimeError("the interpreter cannot evaluate what the graph does with times")
        return outputs

    def _value(self, given: NDArray[Any] | Tensor) -> Any:
        if isinstance(given, OpenVinoTensor):
            return given.value
        array = np.ascontiguousarray(host_array(given))
        return self._ov.Tensor(array, shared_memory=array.flags.writeable)


def _drop_attention_guards(model: Any) -> None:
    """Undo what OpenVINO's ONNX reader puts around attention: zero in place of NaN, for queries that may see nothing.

    It keeps OpenVINO from fusing attention, which then takes more than twice as long. In the bundle's graphs every
    query sees a slot; where one does not, NaN comes out, which neither the golden requests nor `Engine.rank` let pass.
    """
    for node in model.get_ordered_ops():
        guarded = node.input_value(0) if node.get_type_name() == "IsNaN" else None
        if guarded is None or guarded.get_node().get_type_name() not in ATTENTION:
            continue
        for target in node.output(0).get_target_inputs():
            choice = target.get_node()
            if choice.get_type_name() == "Select" and _key(choice.input_value(2)) == _key(guarded):
                for reader in choice.output(0).get_target_inputs():
                    reader.replace_source_output(guarded)


def _cut_times(ov: Any, model: Any) -> Any | None:
    """Take what is computed on 64-bit times out of a model, and return it as a model of its own.

    The cut runs where a value made of times is no longer a 64-bit integer. In `model`, new parameters take the place of
    these values, behind all others; the returned model computes them in that order. Shapes are not cut: they are
    small. None if there is nothing to cut.
    """
    wide = {_key(node.output(0)) for node in model.get_parameters() if node.output(0).any_name.endswith(TIME_SUFFIX)}
    cut: set[str] = set()
    narrow: list[Any] = []
    for node in model.get_ordered_ops():
        sources = set(map(_key, node.input_values()))
        if sources & wide and node.get_type_name() != "ShapeOf":
            cut.add(node.get_name())
            wide.update(_key(port) for port in node.outputs() if port.get_element_type() == ov.Type.i64)
            narrow.extend(port for port in node.outputs() if port.get_element_type() != ov.Type.i64)
    for port in narrow:
        parameter = ov.op.Parameter(port.get_element_type(), port.get_partial_shape())
        for target in port.get_target_inputs():
            if target.get_node().get_name() not in cut:
                target.replace_source_output(parameter.output(0))
        model.add_parameters([parameter])
    model.validate_nodes_and_infer_types()
    return ov.Model(narrow, _parameters_above(narrow)) if narrow else None


def _key(port: Any) -> tuple[str, int]:
    """What tells one value of a model from another: Python's objects for them do not compare."""
    return port.get_node().get_name(), port.get_index()


def _parameters_above(ports: list[Any]) -> list[Any]:
    """The parameters that values are computed from."""
    seen: dict[str, Any] = {}
    waiting = [port.get_node() for port in ports]
    while waiting:
        node = waiting.pop()
        if node.get_name() not in seen:
            seen[node.get_name()] = node
            waiting.extend(port.get_node() for port in node.input_values())
    return [node for node in seen.values() if node.get_type_name() == "Parameter"]


def import_openvino() -> Any:
    """The openvino module, kept from reporting its use.

    Raises:
        BackendError: It is not installed.
    """
    # On import it sends a usage event over the network and writes to ~/intel, unless its reporter cannot be imported.
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)
    try:
        import openvino  # noqa: PLC0415 - an extra; the only place that knows it
    except ImportError as error:
        raise BackendError("OpenVINO is not installed; run pip install 'unipinrec[cpu,openvino]'") from error
    return openvino
