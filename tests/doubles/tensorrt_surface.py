"""All that our code uses of TensorRT's Python API, in one place.

`tests/runtime/trt/test_contract.py` compares it with three things: with our source, which may use nothing else and
must use all of it; with the bindings of NVIDIA's own wheels; and with the double, which must be no wider.
"""

from __future__ import annotations

MODULE = "module"
CLASS, MEMBER = "class", "member"

# By class and member: a method's signature as the bindings' docstrings have it, in plain types; a property's type;
# CLASS for a class within a class; MEMBER for one of an enumeration. Several signatures are overloads.
SURFACE: dict[str, dict[str, str | tuple[str, ...]]] = {
    "Builder": {
        "__init__": "(logger: ILogger) -> None",
        "build_serialized_network": "(network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory",
        "create_builder_config": "() -> IBuilderConfig",
        "create_network": "(flags: int = ...) -> INetworkDefinition",
        "create_optimization_profile": "() -> IOptimizationProfile",
    },
    "BuilderFlag": {
        "STRIP_PLAN": MEMBER,
        "TF32": MEMBER,
        "VERSION_COMPATIBLE": MEMBER,
    },
    "CudaGraphStrategy": {
        "WHOLE_GRAPH_CAPTURE": MEMBER,
    },
    "DataType": {
        "INT32": MEMBER,
        "INT64": MEMBER,
        "name": "str",
    },
    "EngineInspector": {
        "get_engine_information": "(format: LayerInformationFormat) -> str",
    },
    "ExecutionContextAllocationStrategy": {
        "ON_PROFILE_CHANGE": MEMBER,
    },
    "DynamicShapesKernelSpecializationStrategy": {
        "NONE": MEMBER,
    },
    "ElementWiseOperation": {
        "LESS": MEMBER,
    },
    "FillOperation": {
        "LINSPACE": MEMBER,
    },
    "IAttention": {
        "decomposable": "bool",
        "get_input": "(index: int) -> ITensor",
        "key_value_lengths": "ITensor",
        "mask": "ITensor",
    },
    "IAttentionInputLayer": {
        "attention": "IAttention",
        "name": "str",
    },
    "IBuilderConfig": {
        "add_optimization_profile": "(profile: IOptimizationProfile) -> int",
        "builder_optimization_level": "int",
        "clear_flag": "(flag: BuilderFlag) -> None",
        "create_timing_cache": "(serialized_timing_cache: Buffer) -> ITimingCache",
        "get_timing_cache": "() -> ITimingCache",
        "num_compute_capabilities": "int",
        "profiling_verbosity": "ProfilingVerbosity",
        "progress_monitor": "IProgressMonitor",
        "set_compute_capability": "(compute_capability: ComputeCapability, index: int) -> bool",
        "set_flag": "(flag: BuilderFlag) -> None",
        "set_memory_pool_limit": "(pool: MemoryPoolType, pool_size: int) -> None",
        "set_timing_cache": "(cache: ITimingCache, ignore_mismatch: bool) -> bool",
    },
    "ICudaEngine": {
        "create_engine_inspector": "() -> EngineInspector",
        "create_execution_context": (
            "(strategy: ExecutionContextAllocationStrategy = ...) -> IExecutionContext",
            "(runtime_config: IRuntimeConfig = ...) -> IExecutionContext",
        ),
        "create_runtime_config": "() -> IRuntimeConfig",
        "get_tensor_dtype": "(name: str) -> DataType",
        "get_tensor_location": "(name: str) -> TensorLocation",
        "get_tensor_mode": "(name: str) -> TensorIOMode",
        "get_tensor_name": "(index: int) -> str",
        "get_tensor_profile_shape": "(name: str, profile_index: int) -> list[Dims]",
        "get_tensor_shape": "(name: str) -> Dims",
        "num_io_tensors": "int",
        "num_optimization_profiles": "int",
    },
    "IExecutionContext": {
        "execute_async_v3": "(stream_handle: int) -> bool",
        "get_tensor_shape": "(name: str) -> Dims",
        "infer_shapes": "() -> list[str]",
        "nvtx_verbosity": "ProfilingVerbosity",
        "set_input_shape": "(name: str, shape: tuple) -> bool",
        "set_optimization_profile_async": "(profile_index: int, stream_handle: int) -> bool",
        "set_tensor_address": "(name: str, memory: int) -> bool",
    },
    "ILayer": {
        "get_input": "(index: int) -> ITensor",
        "get_output": "(index: int) -> ITensor",
        "name": "str",
        "num_inputs": "int",
        "num_outputs": "int",
        "set_input": "(index: int, tensor: ITensor) -> None",
        "type": "LayerType",
    },
    "ILogger": {
        "Severity": CLASS,
        "log": "(severity: ILogger.Severity, msg: str) -> None",
    },
    "ILogger.Severity": {
        "ERROR": MEMBER,
        "INTERNAL_ERROR": MEMBER,
        "WARNING": MEMBER,
    },
    "INetworkDefinition": {
        "add_cast": "(input: ITensor, to_type: DataType) -> ICastLayer",
        "add_constant": "(shape: Dims, weights: Weights) -> IConstantLayer",
        "add_elementwise": "(input1: ITensor, input2: ITensor, op: ElementWiseOperation) -> IElementWiseLayer",
        "add_fill": "(shape: Dims, op: FillOperation, output_type: DataType) -> IFillLayer",
        "add_gather": "(input: ITensor, indices: ITensor, axis: int) -> IGatherLayer",
        "add_shape": "(input: ITensor) -> IShapeLayer",
        "add_unsqueeze": "(input: ITensor, axes: ITensor) -> IUnsqueezeLayer",
        "get_input": "(index: int) -> ITensor",
        "get_layer": "(index: int) -> ILayer",
        "get_output": "(index: int) -> ITensor",
        "num_inputs": "int",
        "num_layers": "int",
        "num_outputs": "int",
    },
    "IOptimizationProfile": {
        "set_shape": "(input: str, min: Dims, opt: Dims, max: Dims) -> None",
    },
    "IProgressMonitor": {
        "phase_finish": "(phase_name: str) -> None",
        "phase_start": "(phase_name: str, parent_phase: str, num_steps: int) -> None",
        "step_complete": "(phase_name: str, step: int) -> bool",
    },
    "IRuntimeCache": {
        "deserialize": "(blob: Buffer) -> bool",
        "serialize": "() -> IHostMemory",
    },
    "IRuntimeConfig": {
        "create_runtime_cache": "() -> IRuntimeCache",
        "cuda_graph_strategy": "CudaGraphStrategy",
        "dynamic_shapes_kernel_specialization_strategy": "DynamicShapesKernelSpecializationStrategy",
        "set_execution_context_allocation_strategy": "(strategy: ExecutionContextAllocationStrategy = ...) -> None",
        "set_runtime_cache": "(cache: IRuntimeCache = ...) -> bool",
    },
    "ITensor": {
        "dtype": "DataType",
        "name": "str",
        "shape": "Dims",
    },
    "ITimingCache": {
        "serialize": "() -> IHostMemory",
    },
    "LayerInformationFormat": {
        "ONELINE": MEMBER,
    },
    "LayerType": {
        "ATTENTION_INPUT": MEMBER,
        "CONSTANT": MEMBER,
        "DEQUANTIZE": MEMBER,
        "MATRIX_MULTIPLY": MEMBER,
        "SHAPE": MEMBER,
        "SHUFFLE": MEMBER,
    },
    "MemoryPoolType": {
        "WORKSPACE": MEMBER,
    },
    "NetworkDefinitionCreationFlag": {
        "STRONGLY_TYPED": MEMBER,
    },
    "OnnxParser": {
        "__init__": "(network: INetworkDefinition, logger: ILogger) -> None",
        "get_error": "(index: int) -> ParserError",
        "num_errors": "int",
        "parse_from_file": "(model: str) -> bool",
    },
    "OnnxParserRefitter": {
        "__init__": "(refitter: Refitter, logger: ILogger) -> None",
        "refit_from_file": "(model: str) -> bool",
    },
    "ParserError": {
        "desc": "() -> str",
    },
    "ProfilingVerbosity": {
        "DETAILED": MEMBER,
        "NONE": MEMBER,
    },
    "Refitter": {
        "__init__": "(engine: ICudaEngine, logger: ILogger) -> None",
        "refit_cuda_engine": "() -> bool",
    },
    "Runtime": {
        "__init__": "(logger: ILogger) -> None",
        "deserialize_cuda_engine": "(serialized_engine: Buffer) -> ICudaEngine",
        "engine_host_code_allowed": "bool",
    },
    "TensorIOMode": {
        "INPUT": MEMBER,
    },
    "TensorLocation": {
        "DEVICE": MEMBER,
    },
    "Weights": {
        "__init__": "(a: numpy.ndarray) -> None",
    },
}

SINCE_11 = {"IAttention.key_value_lengths"}  # and in TensorRT-RTX

RTX_ONLY = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeCache",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}

# What parameters and attributes hold, by file and function, "*" for all of a file.
SEEDS: dict[str, dict[str, dict[str, str]]] = {
    "library.py": {"*": {"module": MODULE}},
    "network.py": {
        "*": {
            "module": MODULE,
            "network": "INetworkDefinition",
            "attention": "IAttention",
            "layer": "ILayer",
            "key": "ITensor",
            "lengths": "ITensor",
            "tensor": "ITensor",
        },
        "parse_graph": {"builder": "Builder"},
        "_mask": {"layer": "ILayer"},
    },
    "build.py": {
        "*": {"module": MODULE},
        "run": {"config": "IBuilderConfig"},
        "_config": {"builder": "Builder"},
        "_set_targets": {"config": "IBuilderConfig"},
        "_use_timings": {"config": "IBuilderConfig"},
        "_keep_timings": {"config": "IBuilderConfig"},
        "_allow_decomposed_attention": {"network": "INetworkDefinition"},
    },
    "layers.py": {
        "*": {"module": MODULE},
        "products_of": {"network": "INetworkDefinition"},
        "network_type": {"tensor": "ITensor"},
        "_type_read": {"tensor": "ITensor", "producer": "ILayer"},
    },
    "runner.py": {"*": {"context": "IExecutionContext"}},
    "load.py": {
        "*": {"module": MODULE, "engine": "ICudaEngine", "context": "IExecutionContext", "cache": "IRuntimeCache"},
    },
    "backend.py": {"*": {"cache": "IRuntimeCache"}},
}


def overloads(owner: str, member: str) -> tuple[str, ...]:
    """Signatures of a method; empty for all else."""
    listed = SURFACE.get(owner, {}).get(member, "")
    return tuple(one for one in ((listed,) if isinstance(listed, str) else listed) if one.startswith("("))


def result_of(owner: str, member: str) -> str | None:
    """What a method returns or a property holds, where that is a class of TensorRT or a list of one."""
    listed = SURFACE.get(owner, {}).get(member)
    if listed == CLASS:
        return f"type:{owner}.{member}"
    if listed == MEMBER:
        return owner
    signatures = overloads(owner, member)
    found = signatures[0].rpartition(" -> ")[2] if signatures else listed
    known = isinstance(found, str) and found.removeprefix("list[").removesuffix("]") in SURFACE
    return found if isinstance(found, str) and known else None
