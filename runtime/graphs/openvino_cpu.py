"""OpenVINO on the CPU, wrapped here and nowhere else.

Two things it gets wrong on the CPU, both without a word. It computes 64-bit integers in 32 bits, so that a Unix time in
milliseconds comes out as another number. And at bf16 it multiplies positions and times into angles in bf16, which is
off by a radian at the five hundredth event. So all that is computed on 64-bit times, and all sines and cosines, are cut
out of each graph and left to OpenVINO's reference interpreter, which is exact (`_cut_exact`): 0.2 to 0.7 ms per run.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec, Tensor, TensorSpec, check_inputs
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.graphs.backend import host_array, opened
from unipinrec.runtime.machine import has_bf16, thread_count

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # ours: OpenVINO's
ATTENTION = ("ScaledDotProductAttention", "Softmax")
NO_BF16 = (
    "this CPU has no bf16 instructions (AMX or AVX-512 BF16), and OpenVINO would compute in another precision or "
    "emulate it slowly; use device openvino or cpu"
)
TIME_SUFFIX = "timestamps_ms"  # how the names of all inputs end that hold times
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenVinoTensor:
    """An `ov.Tensor`; see `Tensor`. It and its views keep its memory."""

    value: Any

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        return str(self.value.data.dtype)

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
        exact: `ov.Model` that is interpreted; None where there is nothing that has to be.
        compiled: `ov.CompiledModel` of everything else. Its last inputs are the outputs of `exact`, in order.
    """

    inputs: tuple[TensorSpec, ...]
    exact: Any | None
    compiled: Any


class OpenVinoBackend:
    """The graphs of a bundle in OpenVINO on the CPU; see `Backend`.

    No values are copied on the way in or out, except arrays that are read-only or not contiguous: inputs are read
    where they lie, and outputs belong to the infer request that a run makes for itself and lets go, so that nothing
    writes to them again. At bf16 keys, values and all other outputs are still f32 tensors.
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
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Load and compile graphs; no file is written.

        Args:
            graphs: Each graph by name.
            specs: What the manifest says of them; OpenVINO does not keep the names of dimensions.
            threads: Threads of one run; None = what this process may use.
            precision: What matrix products, attention and what lies between them are computed in.

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
        self._core.set_property({"ENABLE_MMAP": False})  # the files are gone when it has read them
        with _own_signal_stack():
            self._graphs = {name: self._load(graph, specs[name].inputs) for name, graph in graphs.items()}

    def _load(self, graph: GraphFile, inputs: tuple[TensorSpec, ...]) -> _Graph:
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
            with graph.in_folder() as file:
                model = self._core.read_model(file)
            _drop_attention_guards(model)
            exact = _cut_exact(self._ov, model)
            compiled = self._core.compile_model(model, "CPU", options)
            running = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        except BackendError:
            raise
        except Exception as error:  # its exceptions share no base class
            said = " ".join(str(error).split())
            raise BackendError(f"{graph.name}: OpenVINO {self.version} does not load it: {said}") from error
        if running != wanted:
            raise BackendError(f"{graph.name}: OpenVINO would compute in {running}, not in {wanted}; use device cpu")
        return _Graph(inputs=inputs, exact=exact, compiled=compiled)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`. Runs of one graph that come in together are computed one after the other."""
        parts = opened(self._graphs, graph)
        check_inputs(graph, parts.inputs, inputs)
        try:
            tensors = {name: self._value(given) for name, given in inputs.items()}
            return self._infer(parts, tensors)
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{graph}: OpenVINO failed: {error}") from error

    def close(self) -> None:
        """See `Backend.close`."""
        self._graphs = {}

    def _infer(self, graph: _Graph, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        # Of its own for each run: the next run of a request would overwrite its outputs.
        request = graph.compiled.create_infer_request()
        exact = [] if graph.exact is None else self._interpret(graph.exact, tensors)
        ports = graph.compiled.inputs
        given = len(ports) - len(exact)
        for port in ports[:given]:
            request.set_tensor(port, tensors[port.any_name])
        for port, tensor in zip(ports[given:], exact, strict=True):
            request.set_tensor(port, tensor)
        request.infer(share_outputs=True)  # else its return value, unused here, is a copy of all outputs
        return {port.any_name: OpenVinoTensor(value=request.get_tensor(port)) for port in graph.compiled.outputs}

    def _interpret(self, model: Any, tensors: Mapping[str, Any]) -> list[Any]:
        """Outputs of the exact part."""
        outputs = [self._ov.Tensor(port.element_type, [0] * len(port.partial_shape)) for port in model.outputs]
        if not model.evaluate(outputs, [tensors[port.any_name] for port in model.inputs]):
            raise RuntimeError("the interpreter cannot evaluate what the graph does with times and positions")
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


def _cut_exact(ov: Any, model: Any) -> Any | None:
    """Take out of a model what has to be exact, and return it as a model of its own; None if there is nothing.

    That is all that is computed on 64-bit times until it is no 64-bit integer any more, and all sines and cosines with
    what leads to them. In `model`, new parameters take the place of the values that are read beyond the cut, behind
    all others; the returned model computes these in that order.
    """
    times = _read_times(ov, model)
    waves = [node for node in model.get_ops() if node.get_type_name() in ("Sin", "Cos")]
    inside = times.keys() | _above(waves).keys()
    ports = [
        port for node in (*times.values(), *waves) for port in node.outputs() if port.get_element_type() != ov.Type.i64
    ]
    narrow = []
    for port in ports:
        readers = [target for target in port.get_target_inputs() if target.get_node().get_name() not in inside]
        if readers:
            parameter = ov.op.Parameter(port.get_element_type(), port.get_partial_shape())
            for target in readers:
                target.replace_source_output(parameter.output(0))
            model.add_parameters([parameter])
            narrow.append(port)
    model.validate_nodes_and_infer_types()
    given = [
        node for node in _above([port.get_node() for port in narrow]).values() if node.get_type_name() == "Parameter"
    ]
    return ov.Model(narrow, given) if narrow else None


def _read_times(ov: Any, model: Any) -> dict[str, Any]:
    """The nodes that read 64-bit times, or 64-bit values made of them, by name; not those that read their shape."""
    wide = {_key(node.output(0)) for node in model.get_parameters() if node.output(0).any_name.endswith(TIME_SUFFIX)}
    readers = {}
    for node in model.get_ordered_ops():
        if not wide.isdisjoint(map(_key, node.input_values())) and node.get_type_name() != "ShapeOf":
            readers[node.get_name()] = node
            wide.update(_key(port) for port in node.outputs() if port.get_element_type() == ov.Type.i64)
    return readers


def _key(port: Any) -> tuple[str, int]:
    """What tells one value of a model from another: Python's objects for them do not compare."""
    return port.get_node().get_name(), port.get_index()


def _above(nodes: list[Any]) -> dict[str, Any]:
    """Nodes and all that they are computed from, by name."""
    found: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.get_name() not in found:
            found[node.get_name()] = node
            waiting.extend(port.get_node() for port in node.input_values())
    return found


class _SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Take from the calling thread the stack for signals that OpenVINO gives it with each `Core`.

    Of two, the first to go frees its stack and the second gives it back to the thread: the next signal, such as Ctrl-C,
    then ends the process with SIGSEGV.
    """
    library, before = ctypes.CDLL(None), _SignalStack()
    if not hasattr(library, "sigaltstack"):
        yield
        return
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


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
