"""What a TensorRT engine takes and gives: whether that is what its graph says, and which shapes it covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unipinrec.runtime.bundle.manifest import GraphSpec, TensorSpec
from unipinrec.runtime.trt.profiles import ProfileShapes

TYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}  # TensorRT's: numpy's


def differences(module: Any, engine: Any, spec: GraphSpec) -> list[str]:
    """How an engine's inputs and outputs differ from those of its graph, for people.

    Args:
        module: TensorRT's module.
        engine: `ICudaEngine`.
        spec: What the manifest says of the graph.
    """
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = "input" if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else "output"
        dtype = engine.get_tensor_dtype(name).name
        where = "" if engine.get_tensor_location(name) == module.TensorLocation.DEVICE else " on the host"
        found[name] = (kind, TYPE_NAMES.get(dtype, dtype) + where, tuple(engine.get_tensor_shape(name)))
    wanted = {
        tensor.name: (kind, tensor.dtype, tensor.shape)
        for kind, tensors in (("input", spec.inputs), ("output", spec.outputs))
        for tensor in tensors
    }
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not known" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        if not _same(found[name], wanted[name]):
            problems.append(f"{name} is {_described(*found[name])}, expected {_described(*wanted[name])}")
    return sorted(problems)


def _same(found: tuple[str, str, tuple[int, ...]], wanted: tuple[str, str, tuple[int | str, ...]]) -> bool:
    """Whether kind, type and shape agree. A named dimension is -1, or the one size that all profiles give it."""
    return (
        found[:2] == wanted[:2]
        and len(found[2]) == len(wanted[2])
        and all(isinstance(want, str) or size == want for size, want in zip(found[2], wanted[2], strict=True))
    )


def _described(kind: str, dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"an {kind} of {dtype} {list(shape)}"


def engine_profiles(engine: Any, spec: GraphSpec) -> tuple[ProfileShapes, ...]:
    """The shapes that an engine was built for, profile by profile."""
    return tuple(
        {tensor.name: _three(engine.get_tensor_profile_shape(tensor.name, index)) for tensor in spec.inputs}
        for index in range(engine.num_optimization_profiles)
    )


def _three(shapes: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    smallest, usual, largest = (tuple(shape) for shape in shapes)
    return smallest, usual, largest


def uncovered(
    graph: str, spec: GraphSpec, profiles: Sequence[ProfileShapes], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """What is wrong with shapes that no profile covers, and the command that makes one."""
    given = _named(spec.inputs, shapes)
    covered = [
        ", ".join(f"{name} {low} to {high}" for name, (low, high) in _ranges(spec.inputs, profile).items())
        for profile in profiles
    ]
    # All lengths of a history are covered unless a profile says otherwise.
    bucket = ",".join(f"{name}=1:{given[name]}:{given[name]}" for name in ("batch", "candidates") if name in given)
    sizes = ", ".join(f"{name} {size}" for name, size in given.items())
    return (
        f"{graph}: no profile of the engine covers {sizes}; they cover {'; or '.join(covered)}. Send less, or compile "
        f"for it as well: unipinrec compile BUNDLE --profile {bucket}"
    )


def _ranges(inputs: tuple[TensorSpec, ...], profile: ProfileShapes) -> dict[str, tuple[int, int]]:
    smallest = _named(inputs, {name: shapes[0] for name, shapes in profile.items()})
    largest = _named(inputs, {name: shapes[2] for name, shapes in profile.items()})
    return {name: (low, largest[name]) for name, low in smallest.items()}


def _named(inputs: tuple[TensorSpec, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the named dimensions."""
    return {
        name: size
        for tensor in inputs
        for name, size in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(name, str)
    }
