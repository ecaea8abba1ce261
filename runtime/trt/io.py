"""Inputs and outputs of a TensorRT engine: whether they match its graph, and which shapes it covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from unipinrec.runtime.bundle.manifest import GraphSpec, TensorSpec
from unipinrec.runtime.trt.profiles import ProfileShapes

TYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}  # TensorRT's: numpy's
T = TypeVar("T")


def differences(module: Any, engine: Any, spec: GraphSpec) -> list[str]:
    """How an engine's inputs and outputs differ from those of its graph, one sentence each.

    Args:
        module: TensorRT's module.
        engine: `ICudaEngine`.
        spec: The graph in the manifest.
    """
    actual = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = "input" if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else "output"
        dtype = engine.get_tensor_dtype(name).name
        where = "" if engine.get_tensor_location(name) == module.TensorLocation.DEVICE else " on the host"
        actual[name] = (kind, TYPE_NAMES.get(dtype, dtype) + where, tuple(engine.get_tensor_shape(name)))
    expected = {tensor.name: ("input", tensor.dtype, tensor.shape) for tensor in spec.inputs}
    expected |= {tensor.name: ("output", tensor.dtype, tensor.shape) for tensor in spec.outputs}
    problems = [f"{name} is missing" for name in expected.keys() - actual.keys()]
    problems += [f"{name} is not known" for name in actual.keys() - expected.keys()]
    for name in actual.keys() & expected.keys():
        if not _same(actual[name], expected[name]):
            problems.append(f"{name} is {_described(*actual[name])}, expected {_described(*expected[name])}")
    return sorted(problems)


def _same(actual: tuple[str, str, tuple[int, ...]], expected: tuple[str, str, tuple[int | str, ...]]) -> bool:
    """Whether kind, type and shape agree. A named dimension is -1, or has the same size in all profiles."""
    sizes, dimensions = actual[2], expected[2]
    return (actual[:2], len(sizes)) == (expected[:2], len(dimensions)) and all(
        isinstance(dimension, str) or size == dimension for size, dimension in zip(sizes, dimensions, strict=True)
    )


def _described(kind: str, dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"an {kind} of {dtype} {list(shape)}"


def engine_profiles(engine: Any, spec: GraphSpec) -> tuple[ProfileShapes, ...]:
    """The shapes that an engine was built for, profile by profile."""
    profiles: list[ProfileShapes] = []
    for index in range(engine.num_optimization_profiles):
        shapes = {tensor.name: engine.get_tensor_profile_shape(tensor.name, index) for tensor in spec.inputs}
        profiles.append({name: (tuple(low), tuple(usual), tuple(high)) for name, (low, usual, high) in shapes.items()})
    return tuple(profiles)


def uncovered(
    graph: str, spec: GraphSpec, profiles: Sequence[ProfileShapes], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """The message for shapes that no profile covers, with the command that builds one."""
    request = _named(spec.inputs, shapes)
    covered = []
    for profile in profiles:
        limits = {name: list(zip(low, high, strict=True)) for name, (low, _, high) in profile.items()}
        ranges = _named(spec.inputs, limits).items()
        covered.append(", ".join(f"{name} {low} to {high}" for name, (low, high) in ranges))
    # The default sizes of the other dimensions cover all lengths of a history.
    bucket = ",".join(f"{name}=1:{size}:{size}" for name, size in request.items() if name in ("batch", "candidates"))
    sizes = ", ".join(f"{name} {size}" for name, size in request.items())
    return (
        f"{graph}: no profile of the engine covers {sizes}; they cover {'; or '.join(covered)}. Send less, or compile "
        f"for it as well: unipinrec compile BUNDLE --profile {bucket}"
    )


def _named(inputs: tuple[TensorSpec, ...], shapes: Mapping[str, Sequence[T]]) -> dict[str, T]:
    """Sizes, or ranges of sizes, of the named dimensions."""
    return {
        name: size
        for tensor in inputs
        for name, size in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(name, str)
    }
