"""ONNX Runtime on the CPU, wrapped here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.cpu import available_threads, flush_denormals
from unipinrec.runtime.session import Tensor

PROVIDER = "CPUExecutionProvider"
log = logging.getLogger(__name__)


class OrtBackend:
    """The graphs of a bundle in ONNX Runtime on the CPU; see `Backend`. Tensors are `OrtValue`s, never copied."""

    def __init__(self, graphs: Mapping[str, Path], threads: int | None = None) -> None:
        """Load graphs.

        Args:
            graphs: File of each graph by name.
            threads: Threads of one run; None = what this process may use.

        Raises:
            BackendError: ONNX Runtime is missing, or does not load a graph on the CPU.
        """
        self._ort = import_onnxruntime()
        self.threads = threads or available_threads()
        self.version: str = self._ort.__version__
        log.info("ONNX Runtime %s on the CPU, %d threads", self.version, self.threads)
        with flush_denormals():
            self._sessions = {name: self._load(path) for name, path in graphs.items()}
        self._inputs = {name: session.get_inputs() for name, session in self._sessions.items()}
        self._outputs = {
            name: [output.name for output in session.get_outputs()] for name, session in self._sessions.items()
        }

    def _load(self, path: Path) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # The idle threads of one graph must not spin on the cores while the next graph runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = self._ort.InferenceSession(str(path), options, providers=[PROVIDER])
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{path}: ONNX Runtime {self.version} does not load it: {error}") from error
        if session.get_providers()[0] != PROVIDER:
            raise BackendError(f"{path}: runs on {session.get_providers()[0]}, not on {PROVIDER}")
        return session

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`."""
        values = self._checked(graph, inputs)
        try:
            with flush_denormals():
                outputs = self._sessions[graph].run_with_ort_values(self._outputs[graph], values)
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{graph}: ONNX Runtime failed: {error}") from error
        return dict(zip(self._outputs[graph], outputs, strict=True))

    def append(
        self, past: Tensor, added: Tensor, past_slots: NDArray[np.int64], added_slots: NDArray[np.int64]
    ) -> Tensor:
        """See `Backend.append`."""
        old, new = past.numpy(), added.numpy()
        batch, heads, _, dim = old.shape
        slots = past_slots + added_slots
        # Allocated by ONNX Runtime: a view of an OrtValue made from an array dangles once the OrtValue is gone.
        joined: Tensor = self._ort.OrtValue.ortvalue_from_shape_and_type(
            [batch, heads, int(slots.max()), dim], old.dtype.type
        )
        values = joined.numpy()
        for row, (kept, total) in enumerate(zip(past_slots, slots, strict=True)):
            values[row, :, :kept] = old[row, :, :kept]
            values[row, :, kept:total] = new[row, :, : total - kept]
            values[row, :, total:] = 0.0
        return joined

    def _checked(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Any]:
        """All inputs as OrtValues whose names, types and shapes fit the graph."""
        wanted = [spec.name for spec in self._inputs[graph]]
        if set(inputs) != set(wanted):
            raise BackendError(f"{graph}: the inputs are {sorted(inputs)}, expected {sorted(wanted)}")
        sizes: dict[str, int] = {}
        values = {}
        for spec in self._inputs[graph]:
            value = self._value(graph, spec.name, inputs[spec.name])
            shape = value.shape()
            if value.data_type() != spec.type or not _fits(shape, spec.shape, sizes):
                raise BackendError(
                    f"{graph}: {spec.name} is {value.data_type()} {shape}, expected {spec.type} {spec.shape} "
                    f"with {sizes}"
                )
            values[spec.name] = value
        return values

    def _value(self, graph: str, name: str, given: NDArray[Any] | Tensor) -> Any:
        if not isinstance(given, np.ndarray):
            return given
        if given.dtype.kind == "f" and not np.isfinite(given).all():
            raise BackendError(f"{graph}: {name} holds values that are not finite; send finite numbers")
        try:
            return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(given))
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{graph}: {name} of type {given.dtype} is not accepted: {error}") from error


def _fits(shape: list[int], expected: list[int | str | None], sizes: dict[str, int]) -> bool:
    """Whether a shape without empty dimensions fits; binds each named dimension to the first size it meets."""
    if len(shape) != len(expected) or 0 in shape:
        return False
    bound = [
        sizes.setdefault(want, size) if isinstance(want, str) and want.isidentifier() else want
        for size, want in zip(shape, expected, strict=True)
    ]
    return all(size == want or not isinstance(want, int) for size, want in zip(shape, bound, strict=True))


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        BackendError: Neither of its wheels is installed.
    """
    try:
        import onnxruntime  # noqa: PLC0415 - an extra; the only place that knows it
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed; run pip install 'unipinrec[cpu]', or 'unipinrec[gpu]' on a machine with an "
            "NVIDIA GPU, but never both: the two overwrite each other"
        ) from error
    return onnxruntime
