"""One optimisation profile of a loaded engine, for one run at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec, Tensor, host_array
from unipinrec.runtime.trt.cuda import Cuda, suppressed
from unipinrec.runtime.trt.library import LogLines
from unipinrec.runtime.trt.memory import DeviceBlock, DeviceTensor, Reader, Staging, layout, size_bytes

Shapes = dict[str, tuple[int, ...]]
Inputs = Mapping[str, NDArray[Any] | Tensor]


class ProfileRunner:
    """An execution context with a stream and staging memory of its own. A run ends with the GPU done."""

    def __init__(self, graph: str, spec: GraphSpec, context: Any, cuda: Cuda, stream: int, lines: LogLines) -> None:
        self._graph, self._cuda, self._stream, self._lines = graph, cuda, stream, lines
        self._inputs = {tensor.name: tensor.dtype for tensor in spec.inputs}
        self._outputs = {tensor.name: tensor.dtype for tensor in spec.outputs}
        self._context: Any | None = context
        self._staging = Staging(cuda, stream)
        self._shapes: Shapes = {}  # the context's present input shapes
        self._sizes: Shapes = {}  # the output shapes that follow from them
        self._lock = threading.Lock()

    def run(self, inputs: Inputs, shapes: Shapes, reader: Reader) -> dict[str, Tensor]:
        """Run the graph on checked inputs, of shapes that the profile covers.

        Raises:
            BackendError: The run failed, or the runner was released.
        """
        with self._lock:
            context = self._context
            if context is None:
                raise BackendError(f"{self._graph}: the graphs were closed; load the bundle again")
            try:
                return self._execute(context, inputs, shapes, reader)
            except BaseException as error:
                self._shapes = {}
                # The GPU may still read inputs that may be freed or overwritten from here on.
                with suppressed(f"{self._graph}: after a failure"):
                    self._cuda.synchronize(self._stream)
                if isinstance(error, Exception) and not isinstance(error, BackendError):
                    raise BackendError(f"{self._graph}: TensorRT failed: {error}{self._reason()}") from error
                raise

    def _execute(self, context: Any, inputs: Inputs, shapes: Shapes, reader: Reader) -> dict[str, Tensor]:
        if shapes != self._shapes:
            self._sizes = self._set_shapes(context, shapes)
            self._shapes = shapes
        addresses = self._addresses(inputs)
        offsets, total = layout(size_bytes(self._outputs[name], shape) for name, shape in self._sizes.items())
        block = DeviceBlock(self._cuda, total, self._stream)
        outputs = {name: block.address + offset for name, offset in zip(self._sizes, offsets, strict=True)}
        try:
            for name, address in (addresses | outputs).items():
                self._require(context.set_tensor_address(name, address), f"takes no address for {name}")
            self._require(context.execute_async_v3(self._stream), "does not run")
            self._cuda.synchronize(self._stream)
        except BaseException:
            block.free()  # the traceback may keep it for long
            raise
        return {
            name: DeviceTensor(
                dtype=self._outputs[name], shape=self._sizes[name], address=address, block=block, reader=reader
            )
            for name, address in outputs.items()
        }

    def _set_shapes(self, context: Any, shapes: Shapes) -> Shapes:
        """Set the shapes of all inputs; returns those of the outputs."""
        for name, shape in shapes.items():
            self._require(context.set_input_shape(name, shape), f"takes no {list(shape)} for {name}")
        unknown = context.infer_shapes()
        self._require(not unknown, f"cannot tell the shapes of {', '.join(unknown)}")
        sizes = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        unknown = [name for name, shape in sizes.items() if any(size < 1 for size in shape)]
        self._require(not unknown, f"cannot tell the shapes of {', '.join(unknown)}")
        return sizes

    def _addresses(self, inputs: Inputs) -> dict[str, int]:
        """The address of each input on the GPU; copies the others there."""
        on_gpu, elsewhere = {}, {}
        for name, value in inputs.items():
            if isinstance(value, DeviceTensor) and value.lies_on(self._cuda) and value.dtype == self._inputs[name]:
                on_gpu[name] = value.address
            else:
                elsewhere[name] = host_array(value)
        return on_gpu | self._staging.put(elsewhere, self._inputs)

    def _require(self, done: bool, problem: str) -> None:
        if not done:
            raise BackendError(f"{self._graph}: TensorRT {problem}{self._reason()}")

    def _reason(self) -> str:
        """TensorRT's errors, for a message."""
        reason = f": {self._lines.reason()}" if self._lines.errors else ""
        self._lines.errors.clear()
        return reason

    def release(self) -> None:
        """Wait for the present run and release everything; may be called again."""
        with self._lock:
            self._context = None  # first, because it uses the stream
            self._staging.release()
            with suppressed(f"{self._graph}: a stream may be lost"):
                self._cuda.destroy(self._stream)
