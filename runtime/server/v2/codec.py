"""The bodies of the Open Inference Protocol v2, with its binary tensor extension: bytes to arrays, arrays to bytes.

Knows the protocol and not the graphs; every error is a `RequestError` for the client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from unipinrec.errors import MALFORMED, RequestError
from unipinrec.runtime.server.bodies import ErrorDetail

INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
# Numbers of lower precision travel as FP32 (`Tensor.numpy`, `Backend.run`).
DATATYPES = {"float32": "FP32", "float16": "FP32", "bfloat16": "FP32", "int64": "INT64"}
WIRE: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}
# JSON of a tensor, flat or nested as its shape is, by type and depth.
JSON_TYPES: dict[str, list[Any]] = {
    "FP32": [list[float], list[list[float]], list[list[list[float]]], list[list[list[list[float]]]]],
    "INT64": [list[INT64], list[list[INT64]], list[list[list[INT64]]], list[list[list[list[INT64]]]]],
}
MAX_RANK = 4
JSON_VALUES = 1 << 20  # of one request: reading them holds up all other requests for a tenth of a second
UNSUPPORTED = ("shared_memory_region", "classification")  # parameters of other extensions
HEADER_LENGTH = "Inference-Header-Content-Length"
Parameters = dict[str, bool | int | float | str | None]


class RequestInput(msgspec.Struct, frozen=True, kw_only=True):
    """An input tensor; `data` has its numbers, flat or nested, or `binary_data_size` bytes of them follow the JSON."""

    name: str
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1)], ...], msgspec.Meta(max_length=MAX_RANK)]
    datatype: str
    parameters: Parameters = {}
    data: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "array"})] = msgspec.field(
        default_factory=msgspec.Raw
    )


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output to return; if `binary_data` is true, its numbers follow the JSON."""

    name: str
    parameters: Parameters = {}


class InferRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An inference request; without `outputs` it gets all. Unknown members are ignored, as the protocol demands."""

    inputs: tuple[RequestInput, ...]
    id: str | None = None
    parameters: Parameters = {}
    outputs: tuple[RequestOutput, ...] | None = None


class TensorMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a model; -1 is a size that the client chooses."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """A graph of the bundle; its version is the bundle's hash."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class ServerMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The server and its extensions of the protocol."""

    name: str
    version: str
    extensions: tuple[str, ...]


class ServerLive(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the server answers."""

    live: bool


class ServerReady(msgspec.Struct, frozen=True, kw_only=True):
    """Whether all models are ready."""

    ready: bool


class ModelReady(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a model is ready."""

    name: str
    ready: bool


class ResponseOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An output tensor; without `data` its numbers follow the JSON, `binary_data_size` bytes of them."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Parameters = {}
    data: list[float | int] | None = None


class InferResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to an inference request."""

    model_name: str
    model_version: str
    outputs: tuple[ResponseOutput, ...]
    id: str | None = None


class InferError(msgspec.Struct, frozen=True, kw_only=True):
    """An error, in the protocol's format."""

    error: str

    @classmethod
    def of(cls, detail: ErrorDetail) -> InferError:
        """An error as a body."""
        return cls(error=detail.message)


def decode_infer(body: bytes, header_length: str | None) -> tuple[InferRequest, dict[str, NDArray[Any]]]:
    """Read an inference request.

    Args:
        body: JSON, then the binary tensors in the order of the inputs.
        header_length: `Inference-Header-Content-Length`, the bytes of the JSON; None = all.

    Returns:
        The request, and its inputs by name: aligned read-only arrays in the machine's byte order.

    Raises:
        RequestError: The body is not such a request.
    """
    header_length = str(len(body)) if header_length is None else header_length
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 20):
        raise RequestError(f"{HEADER_LENGTH}={header_length!r} must be the length of the JSON in bytes")
    offset = json_bytes = int(header_length)
    if json_bytes > len(body):
        raise RequestError(f"{HEADER_LENGTH}={header_length} is more than the {len(body)} bytes of the body")
    if body.count(b",", 0, json_bytes) > JSON_VALUES:
        raise RequestError(f"the JSON has more than {JSON_VALUES} values; send large tensors as binary after it")
    try:
        request = msgspec.json.decode(memoryview(body)[:json_bytes], type=InferRequest)
    except MALFORMED as error:
        raise RequestError(f"the inference request is not valid: {error or 'nested too deeply'}") from error
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in request.inputs:
        if tensor.name in arrays:
            raise RequestError(f"input {tensor.name!r} is given twice; send each input once")
        _reject_extensions(tensor.name, tensor.parameters)
        if tensor.datatype not in WIRE:
            raise RequestError(f"input {tensor.name!r} is {tensor.datatype!r}; send {' or '.join(WIRE)}")
        size = tensor.parameters.get("binary_data_size")
        arrays[tensor.name] = _from_json(tensor) if size is None else _from_bytes(tensor, size, body, offset)
        offset += 0 if size is None else arrays[tensor.name].nbytes
    if offset != len(body):
        raise RequestError(
            f"{len(body) - offset} bytes follow the inputs; {HEADER_LENGTH} must be the length of the JSON, "
            "and binary_data_size the length of each binary input"
        )
    return request, arrays


def encode_infer(request: InferRequest, model: str, version: str, outputs: Mapping[str, NDArray[Any]]) -> Response:
    """The answer: the outputs in the order of the request, each as JSON or binary as it says.

    Raises:
        RequestError: See `wanted_outputs`.
    """
    all_binary = request.parameters.get("binary_data_output") is True
    described, binary = [], []
    for output in wanted_outputs(request, tuple(outputs)):
        array = np.ascontiguousarray(outputs[output.name])
        datatype = DATATYPES[array.dtype.name]
        size: Parameters = {}
        if output.parameters.get("binary_data", all_binary) is True:
            binary.append(array.astype(WIRE[datatype], copy=False).tobytes())
            size = {"binary_data_size": len(binary[-1])}
        data = None if size else array.ravel().tolist()
        described.append(
            ResponseOutput(name=output.name, datatype=datatype, shape=array.shape, parameters=size, data=data)
        )
    response = InferResponse(id=request.id, model_name=model, model_version=version, outputs=tuple(described))
    json = msgspec.json.encode(response)
    if not binary:
        return Response(json, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(json))}
    return Response(b"".join((json, *binary)), headers=headers, media_type="application/octet-stream")


def wanted_outputs(request: InferRequest, known: Sequence[str]) -> tuple[RequestOutput, ...]:
    """The outputs that a request lists, or all of a model, in the order of the answer.

    Raises:
        RequestError: The request lists an output that does not exist, or one twice.
    """
    outputs = request.outputs or tuple(RequestOutput(name=name) for name in known)
    names = [output.name for output in outputs]
    for output in outputs:
        if output.name not in known:
            raise RequestError(f"there is no output {output.name!r}; this model gives {', '.join(known)}")
        if names.count(output.name) > 1:
            raise RequestError(f"output {output.name!r} is listed twice; list each output once")
        _reject_extensions(output.name, output.parameters)
    return outputs


def _reject_extensions(name: str, parameters: Parameters) -> None:
    for extension in UNSUPPORTED:
        if extension in parameters:
            raise RequestError(f"{name}: {extension} is not supported; send tensors as JSON, or binary after the JSON")


def _from_bytes(tensor: RequestInput, size: Any, body: bytes, offset: int) -> NDArray[Any]:
    wire = WIRE[tensor.datatype]
    need = math.prod(tensor.shape) * wire.itemsize
    if tensor.data != msgspec.Raw():
        raise RequestError(f"input {tensor.name!r} has both data and binary_data_size; send one of them")
    if type(size) is not int or size != need:
        raise RequestError(
            f"input {tensor.name!r}: binary_data_size={size!r}, but {tensor.datatype} {list(tensor.shape)} takes {need}"
        )
    if offset + need > len(body):
        raise RequestError(
            f"input {tensor.name!r} needs {need} bytes after the JSON, {len(body) - offset} are left; "
            f"{HEADER_LENGTH} must be the length of the JSON"
        )
    flat = np.frombuffer(body, wire, math.prod(tensor.shape), offset)
    # Graphs read aligned numbers in this machine's byte order.
    return np.require(flat, wire.newbyteorder("="), ["ALIGNED"]).reshape(tensor.shape)


def _from_json(tensor: RequestInput) -> NDArray[Any]:
    wire = WIRE[tensor.datatype]
    if tensor.data == msgspec.Raw():
        raise RequestError(f"input {tensor.name!r} has neither data nor binary_data_size; send one of them")
    raw = memoryview(tensor.data)
    nested = bytes(raw[:256]).translate(None, b" \t\r\n").startswith(b"[[")
    depth = max(1, len(tensor.shape)) if nested else 1
    try:
        values = msgspec.json.decode(raw, type=JSON_TYPES[tensor.datatype][depth - 1])
        with np.errstate(over="ignore"):  # too large numbers become infinite, which no graph accepts
            array = np.array(values, wire.newbyteorder("="))
    except (*MALFORMED, ValueError, OverflowError) as error:
        raise RequestError(
            f"input {tensor.name!r}: data is not {tensor.datatype} {list(tensor.shape)}, flat or nested: {error}"
        ) from error
    if array.size != math.prod(tensor.shape) or (nested and array.shape != tensor.shape):
        raise RequestError(f"input {tensor.name!r}: data is {list(array.shape)}, its shape is {list(tensor.shape)}")
    return array.reshape(tensor.shape)
