"""OpenVINO on the CPU; no other module uses it.

On the CPU OpenVINO silently computes two things wrongly. It computes 64-bit integers in 32 bits, which corrupts Unix
times in milliseconds. At bf16 it also computes the angles of positions and times in bf16, which is wrong by a radian
at the five hundredth event. So `_cut_exact` cuts all computation on 64-bit times, and all sines and cosines, out of
each graph. OpenVINO's reference interpreter runs that part exactly, in 0.2 to 0.7 ms per run.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec, Tensor, check_inputs, host_array
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.graphs.backend import Graphs, Precision
from unipinrec.runtime.machine import LIBC, has_bf16, thread_count

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names
ATTENTION = ("ScaledDotProductAttention", "Softmax")
NO_BF16 = (
    "this CPU has no bf16 instructions (AMX or AVX-512 BF16), so OpenVINO would compute in another precision or "
    "emulate bf16 slowly; use device openvino or cpu"
)
KEPT_KERNELS = 16
TIME_SUFFIX = "timestamps_ms"  # of the names of all inputs that hold times
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenVinoTensor:
    """An `ov.Tensor`; see `Tensor`. It and its views keep its memory alive."""

    value: Any

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        return str(self.value.data.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Tensor.shape`."""
        return tuple(self.value.shape)

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`."""
        values: NDArray[Any] = self.value.data
        return values


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """A graph cut in two.

    Attributes:
        spec: Inputs and outputs of the whole graph, in their order. OpenVINO may give a value other names as well.
        exact: The interpreted `ov.Model`; None if no part must be exact.
        compiled: `ov.CompiledModel` of the rest. Its last inputs are the outputs of `exact`, in order.
    """

    spec: GraphSpec
    exact: Any | None
    compiled: Any


class OpenVinoBackend:
    """The graphs of a bundle in OpenVINO on the CPU; see `Backend`.

    Inputs are not copied, unless they are read-only or not contiguous. Outputs are not copied either: each run makes
    its own infer request, which owns them, so no later run overwrites them. At bf16 all outputs are still f32.
    """

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs: int = 1

    def __init__(
        self,
        graphs: Mapping[str, GraphFile],
        specs: Mapping[str, GraphSpec],
        threads: int | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        """Load and compile graphs; no file is written.

        Args:
            graphs: Each graph by name.
            specs: Their specs in the manifest; OpenVINO does not keep the names of dimensions.
            threads: Threads of one run; None = all that this process may use.
            precision: Precision of matrix products, attention and the operators between them: fp32 or bf16.

        Raises:
            BackendError: OpenVINO is missing or does not load a graph, or this CPU does not compute in `precision`.
        """
        if precision == "bf16" and not has_bf16():
            raise BackendError(NO_BF16)
        self._ov = import_openvino()
        self.threads = thread_count(threads)
        self.precision = precision
        self.version: str = self._ov.__version__
        log.info("OpenVINO %s on the CPU, %s, %d threads", self.version, precision, self.threads)
        self._core = self._ov.Core()
        self._core.set_property({"ENABLE_MMAP": False})  # the files are deleted after loading
        with _own_signal_stack():
            self._graphs = Graphs({name: self._load(graph, specs[name]) for name, graph in graphs.items()})

    def _load(self, graph: GraphFile, spec: GraphSpec) -> _Graph:
        precision = PRECISIONS[self.precision]
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Pinned threads of two processes on one machine would share a core and leave another one idle.
            "ENABLE_CPU_PINNING": False,
            # By default 5,000 kernels are kept for each graph, some for each new shape: bench/memory.py.
            "CPU_RUNTIME_CACHE_CAPACITY": KEPT_KERNELS,
        }
        try:
            with graph.in_folder() as file:
                model = self._core.read_model(file)
                _drop_attention_guards(model)
                _truncate_quotients(model)
                exact = _cut_exact(self._ov, model)
                compiled = self._core.compile_model(model, "CPU", options)
            running = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        except BackendError:
            raise
        except Exception as error:  # its exceptions share no base class
            message = " ".join(str(error).split())
            raise BackendError(f"{graph.name}: OpenVINO {self.version} does not load it: {message}") from error
        if running != precision:
            raise BackendError(f"{graph.name}: OpenVINO would compute in {running}, not in {precision}; use device cpu")
        return _Graph(spec=spec, exact=exact, compiled=compiled)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`. Concurrent runs of one graph are computed one after the other."""
        parts = self._graphs[graph]
        check_inputs(graph, parts.spec.inputs, inputs)
        try:
            return self._infer(parts, {name: self._value(tensor) for name, tensor in inputs.items()})
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{graph}: OpenVINO failed: {error}") from error

    def close(self) -> None:
        """See `Backend.close`."""
        self._graphs = Graphs()

    def _infer(self, graph: _Graph, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        # A new one for each run: a second run would overwrite its outputs.
        request = graph.compiled.create_infer_request()
        exact = [] if graph.exact is None else self._interpret(graph.exact, tensors)
        ports = graph.compiled.inputs
        outside = [_given(tensors, port) for port in ports[: len(ports) - len(exact)]]
        for port, tensor in zip(ports, [*outside, *exact], strict=True):
            request.set_tensor(port, tensor)
        request.infer(share_outputs=True)  # else it returns a copy of all outputs, unused here
        outputs = zip(graph.spec.outputs, graph.compiled.outputs, strict=True)
        return {spec.name: OpenVinoTensor(value=request.get_tensor(port)) for spec, port in outputs}

    def _interpret(self, model: Any, tensors: Mapping[str, Any]) -> list[Any]:
        """Outputs of the exact part."""
        outputs = [self._ov.Tensor(port.element_type, [0] * len(port.partial_shape)) for port in model.outputs]
        if not model.evaluate(outputs, [_given(tensors, port) for port in model.inputs]):
            raise RuntimeError("the interpreter cannot evaluate the graph's part for times and positions")
        return outputs

    def _value(self, tensor: NDArray[Any] | Tensor) -> Any:
        if isinstance(tensor, OpenVinoTensor):
            return tensor.value
        array = np.ascontiguousarray(host_array(tensor))
        return self._ov.Tensor(array, shared_memory=array.flags.writeable)


def _given(tensors: Mapping[str, Any], port: Any) -> Any:
    return tensors[next(name for name in port.names if name in tensors)]


def _drop_attention_guards(model: Any) -> None:
    """Remove the guard of OpenVINO's ONNX reader around attention: zero instead of NaN if a query attends to nothing.

    The guard keeps OpenVINO from fusing attention, which then takes more than twice as long. In a bundle's graphs every
    query attends to a slot. If one did not, the golden requests and `Engine.rank` would reject the NaN.
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


def _truncate_quotients(model: Any) -> None:
    """Round quotients of integers towards zero, as ONNX says; OpenVINO's interpreter would round them down."""
    for node in model.get_ops():
        if node.get_type_name() == "Divide":
            node.set_attribute("m_pythondiv", False)


def _cut_exact(ov: Any, model: Any) -> Any | None:
    """Cut the part that must be exact out of a model and return it as a model; None if there is no such part.

    It holds all computation on 64-bit times while they are 64-bit integers, all sines and cosines, and every node
    between two of these. `model` gets a new parameter for each value of that part that it reads, after its other
    parameters. The returned model computes these values in that order, from the other parameters alone.
    """
    waves = {node.get_name(): node for node in model.get_ops() if node.get_type_name() in ("Sin", "Cos")}
    inside = _read_times(ov, model) | waves
    needed = _above(list(inside.values()))
    for node in model.get_ordered_ops():
        reads = any(port.get_node().get_name() in inside for port in node.input_values())
        if reads and node.get_name() in needed and node.get_type_name() != "ShapeOf":
            inside[node.get_name()] = node
    narrow = []
    for port in (port for node in inside.values() for port in node.outputs()):
        readers = [target for target in port.get_target_inputs() if target.get_node().get_name() not in needed]
        if readers:
            parameter = ov.op.Parameter(port.get_element_type(), port.get_partial_shape())
            for target in readers:
                target.replace_source_output(parameter.output(0))
            model.add_parameters([parameter])
            narrow.append(port)
    model.validate_nodes_and_infer_types()
    sources = _above([port.get_node() for port in narrow]).values()
    return ov.Model(narrow, [node for node in sources if node.get_type_name() == "Parameter"]) if narrow else None


def _read_times(ov: Any, model: Any) -> dict[str, Any]:
    """The nodes that read 64-bit times or 64-bit values computed from them, by name; not those that read a shape."""
    wide = {_key(node.output(0)) for node in model.get_parameters() if node.output(0).any_name.endswith(TIME_SUFFIX)}
    readers = {}
    for node in model.get_ordered_ops():
        if not wide.isdisjoint(map(_key, node.input_values())) and node.get_type_name() != "ShapeOf":
            readers[node.get_name()] = node
            wide.update(_key(port) for port in node.outputs() if port.get_element_type() == ov.Type.i64)
    return readers


def _key(port: Any) -> tuple[str, int]:
    """Key of a value of a model: OpenVINO's objects for one value do not compare as equal."""
    return port.get_node().get_name(), port.get_index()


def _above(nodes: list[Any]) -> dict[str, Any]:
    """The nodes and all nodes that they depend on, by name."""
    by_name: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.get_name() not in by_name:
            by_name[node.get_name()] = node
            waiting.extend(port.get_node() for port in node.input_values())
    return by_name


class _SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Restore the calling thread's stack for signals, which OpenVINO replaces for each `Core`.

    Otherwise, with two cores, the first to be freed frees its stack and the second hands that stack back to the thread.
    The next signal, such as Ctrl-C, then ends the process with SIGSEGV.
    """
    before = _SignalStack()
    LIBC.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        LIBC.sigaltstack(ctypes.byref(before), None)


def import_openvino() -> Any:
    """The openvino module, with its usage reports switched off.

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
