"""TensorRT without a GPU: the part of its API that `runtime/trt/backend.py` uses.

Its engines compute the network that NVIDIA's own parser makes of a graph, as our builder completes it (`network.py`).

A plan is a JSON document that holds an ONNX file. An execution context does what the real one does, on the memory of
`host_cuda`: it reads its inputs and writes its outputs at the addresses it was given, when its stream gets to it. And
it refuses what the real one refuses: shapes outside of its profile, addresses or shapes that were not set.
`tests/runtime/trt/test_contract.py` holds it to the signatures of NVIDIA's own bindings.
"""

from __future__ import annotations

import base64
import functools
import json
import tempfile
import threading
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from host_cuda import HostRuntime, host_cuda
from network import NUMPY as TYPES
from network import Declared, Network
from numpy.typing import NDArray

from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.trt.backend import TensorRtBackend
from unipinrec.runtime.trt.cuda import Cuda
from unipinrec.runtime.trt.library import Flavor, TensorRT, import_tensorrt
from unipinrec.runtime.trt.profiles import Buckets, ProfileShapes, default_buckets, for_graph

VERSIONS: dict[Flavor, str] = {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}
ACTIVATIONS = 4096  # bytes of the device that a context takes
KERNELS = b"kernels of the host"


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 7
    INT64 = 8


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class ProfilingVerbosity(Enum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


NUMPY = {one: TYPES[one.name] for one in DataType}


def make_plan(
    graph: Path | GraphFile,
    profiles: Sequence[ProfileShapes],
    types: Mapping[str, str] | None = None,
    locations: Mapping[str, str] | None = None,
    **options: bool,
) -> bytes:
    """The engine of an ONNX file.

    Args:
        graph: The file.
        profiles: What it is built for.
        types: Of inputs and outputs that are to be of another type than in the network; values are converted.
        locations: Those that are not on the device.
        **options: "stripped" for one without weights, "host_code" for one that holds code for the CPU.
    """
    plan = {"onnx": _with_weights(graph), "profiles": profiles, "types": types or {}, "locations": locations or {}}
    return json.dumps(plan | options).encode()


def fake_tensorrt(memory: HostRuntime, flavor: Flavor = "tensorrt") -> TensorRT:
    """A TensorRT whose device is the double."""
    module = SimpleNamespace(
        __version__=VERSIONS[flavor],
        ILogger=ILogger,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        ProfilingVerbosity=ProfilingVerbosity,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
        CudaGraphStrategy=CudaGraphStrategy,
        Runtime=functools.partial(Runtime, memory=memory, flavor=flavor),
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
    )
    return TensorRT(module=module, flavor=flavor, version=VERSIONS[flavor])


class Runtime:
    def __init__(self, logger: ILogger, *, memory: HostRuntime, flavor: Flavor) -> None:
        self._world = World(memory, logger, flavor)
        self._host_code_allowed = False

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code_allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._host_code_allowed = allowed

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            plan = json.loads(serialized_engine)
            if plan.get("host_code") and not self._host_code_allowed:
                self._world.error("The engine contains host code, which is not allowed.")
                return None
            return ICudaEngine(self._world, plan)
        except ValueError:
            self._world.error("Serialization assertion magicTagRead == kMAGIC_TAG failed.")
        except MemoryError:
            self._world.error("Requested size was too large: cudaMalloc of weights failed.")
        return None


def _setting(name: str, kind: type[Enum]) -> property:
    """A property that takes members of an enumeration alone."""

    def put(owner: Any, value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{name}: incompatible {value!r}")
        setattr(owner, name, value)

    return property(lambda owner: getattr(owner, name), put)


class World:
    """What all objects of a runtime share."""

    def __init__(self, memory: HostRuntime, logger: ILogger, flavor: Flavor) -> None:
        self.memory, self.logger, self.flavor = memory, logger, flavor

    def error(self, message: str) -> None:
        self.logger.log(Severity.ERROR, message)

    def take(self, size: int) -> int:
        address = self.memory.take(size)
        if address is None:
            raise MemoryError
        return address


def _with_weights(graph: Path | GraphFile) -> str:
    with (GraphFile.at(graph) if isinstance(graph, Path) else graph).in_folder() as file:
        return base64.b64encode(onnx.load(file).SerializeToString(deterministic=True)).decode()


@functools.cache
def _network(model: str) -> Network:
    """Of an ONNX file."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, whose parser makes the networks, is not installed")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        file.write_bytes(base64.b64decode(model))
        return Network.of(import_tensorrt("tensorrt_rtx"), file)


class ICudaEngine:
    def __init__(self, world: World, plan: dict[str, Any]) -> None:
        self._world, self._plan = world, plan
        self._network = _network(plan["onnx"])
        self._inputs = self._network.inputs
        self._tensors: dict[str, Declared] = self._inputs | self._network.outputs
        self._weights = world.take(64)
        self._whole = not plan.get("stripped")

    def __del__(self) -> None:
        if hasattr(self, "_weights"):
            self._world.memory.give_back(self._weights)

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return [*self._tensors][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._plan["types"].get(name, self._tensors[name].dtype)]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self._plan["locations"].get(name, "DEVICE")]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._plan["profiles"][profile_index][name]]

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy | IRuntimeConfig
    ) -> IExecutionContext | None:
        if not isinstance(strategy, ExecutionContextAllocationStrategy | IRuntimeConfig):
            raise TypeError("create_execution_context(): incompatible function arguments.")
        try:
            return IExecutionContext(self, strategy)
        except MemoryError:
            self._world.error("IExecutionContext creation failed: out of memory.")
            return None

    def create_runtime_config(self) -> IRuntimeConfig:
        return RtxRuntimeConfig() if self._world.flavor == "tensorrt_rtx" else IRuntimeConfig()


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, how: ExecutionContextAllocationStrategy | IRuntimeConfig) -> None:
        self._engine, self._world, self._how = engine, engine._world, how
        self._profile = 0
        self._nvtx_verbosity = ProfilingVerbosity.DETAILED  # as the engine was built
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._busy = threading.Lock()
        self._activations = self._world.take(ACTIVATIONS)

    def __del__(self) -> None:
        if hasattr(self, "_activations"):
            self._world.memory.give_back(self._activations)

    nvtx_verbosity = _setting("_nvtx_verbosity", ProfilingVerbosity)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._refuse(f"profile {profile_index} does not exist")
        self._profile, self._shapes = profile_index, {}
        self._world.memory.put(stream_handle, lambda: None)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if not isinstance(shape, tuple):
            raise TypeError("set_input_shape(): incompatible function arguments.")
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if not fits:
            return self._refuse(f"set dimensions of {name} do not satisfy profile {self._profile}")
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        sizes: dict[str, int] = {}
        for given, shape in self._shapes.items():
            for want, size in zip(self._engine._tensors[given].shape, shape, strict=True):
                if isinstance(want, str) and sizes.setdefault(want, size) != size:
                    raise RuntimeError(f"{want} is {size} and {sizes[want]}")
        return tuple(
            want if isinstance(want, int) else _evaluate(want, sizes) for want in self._engine._tensors[name].shape
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors or memory % 256:
            return self._refuse(f"{memory:#x} is no address for {name}")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self._engine._whole:
            return self._refuse("the engine has no weights")
        missing = [name for name in self._engine._tensors if name not in self._addresses]
        if missing or self.infer_shapes():
            return self._refuse(f"Address is not set or shape is not specified: {missing + self.infer_shapes()}")
        if not self._busy.acquire(blocking=False):
            self._world.memory.faults.append("a context is used by two threads at once")
            return False
        tensors = {
            name: (address, self._engine.get_tensor_dtype(name), self.get_tensor_shape(name))
            for name, address in self._addresses.items()
        }
        self._world.memory.put(stream_handle, functools.partial(self._compute, tensors))
        return True

    def _compute(self, tensors: Mapping[str, tuple[int, DataType, tuple[int, ...]]]) -> None:
        try:
            views = {name: self._view(*tensor) for name, tensor in tensors.items()}
            inputs = self._engine._inputs.items()
            feeds = {name: views[name].astype(TYPES[tensor.dtype]) for name, tensor in inputs}
            for name, values in self._engine._network.run(feeds).items():
                np.copyto(views[name], values, casting="unsafe")
        finally:
            self._busy.release()

    def _view(self, address: int, dtype: DataType, shape: tuple[int, ...]) -> NDArray[Any]:
        count = int(np.prod(shape)) * NUMPY[dtype].itemsize
        return self._world.memory.view(address, count).view(NUMPY[dtype]).reshape(shape)

    def _refuse(self, message: str) -> bool:
        self._world.error(f"IExecutionContext: Error Code 3: API Usage Error ({message})")
        return False


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._weights = engine, ""

    def refit_cuda_engine(self) -> bool:
        self._engine._whole = self._weights == self._engine._plan["onnx"]
        return self._engine._whole


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, model: str) -> bool:
        if not Path(model).stat().st_size:
            self._logger.log(Severity.ERROR, f"Failed to parse {model}")
            return False
        self._refitter._weights = _with_weights(Path(model))
        return True


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._strategy = strategy


class RtxRuntimeConfig(IRuntimeConfig):
    """As TensorRT-RTX has it: it compiles kernels where they run."""

    _specialization, _graphs = DynamicShapesKernelSpecializationStrategy.LAZY, CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = _setting(
        "_specialization", DynamicShapesKernelSpecializationStrategy
    )
    cuda_graph_strategy = _setting("_graphs", CudaGraphStrategy)

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IRuntimeCache:
    def serialize(self) -> IHostMemory:
        return IHostMemory(KERNELS)

    def deserialize(self, blob: bytes) -> bool:
        return blob == KERNELS


class IHostMemory(bytes):
    """Bytes of TensorRT's; the real one has the buffer protocol as well."""


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """A dimension such as "history + 1"; -1 where it is not known."""
    try:
        return int(eval(expression, {"__builtins__": {}}, dict(sizes)))
    except NameError:
        return -1


def double_backend(
    bundle: Bundle,
    memory: HostRuntime,
    buckets: Buckets | None = None,
    flavor: Flavor = "tensorrt",
    kernels: Mapping[str, bytes] | None = None,
    cuda: Cuda | None = None,
) -> TensorRtBackend:
    """The real backend over the doubles, with an engine for each of a bundle's graphs in fp32."""
    model, specs = bundle.manifest.model, bundle.manifest.graphs_in("fp32")
    files = bundle.graph_files()
    plans = {
        name: make_plan(files[name], for_graph(buckets or default_buckets(model), spec, model.kv_prefix_slots))
        for name, spec in specs.items()
    }
    return TensorRtBackend(fake_tensorrt(memory, flavor), cuda or host_cuda(memory), plans, specs, "fp32", kernels)
