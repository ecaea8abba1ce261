"""Which device serves, and why."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle import Bundle
from unipinrec.runtime.cpu import has_bf16
from unipinrec.runtime.openvino_session import OpenVinoBackend, import_openvino
from unipinrec.runtime.ort_session import OrtBackend
from unipinrec.runtime.session import Backend

OPENVINO_DEVICES = ("openvino", "openvino-bf16")
DEVICES = ("auto", "cpu", *OPENVINO_DEVICES)
GPU_DEVICES = ("cuda", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What really runs, and why it was chosen."""

    name: str
    reason: str

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """What it computes in."""
        return "bf16" if self.name == "openvino-bf16" else "fp32"


CPU = Device(name="cpu", reason="asked for")


def resolve_device(wanted: str) -> Device:
    """Turn a wanted device into the one that runs.

    Raises:
        BackendError: It does not exist, or this version or this installation cannot run on it.
    """
    if wanted == "auto":
        return Device(name="cpu", reason=f"auto: ONNX Runtime on the CPU; {_others()}")
    if wanted in GPU_DEVICES:
        raise BackendError(f"device {wanted!r} is not available in this version; use one of {', '.join(DEVICES)}")
    if wanted not in DEVICES:
        raise BackendError(f"unknown device {wanted!r}; use one of {', '.join(DEVICES)}")
    if wanted in OPENVINO_DEVICES:
        import_openvino()
    return Device(name=wanted, reason="asked for")


def open_backend(device: Device, bundle: Bundle) -> Backend:
    """Load a bundle's graphs on a device.

    Raises:
        BackendError: It is not installed, does not load a graph, or cannot compute in its precision on this CPU.
    """
    if device.name == "cpu":
        return OrtBackend(bundle.graph_files())
    return OpenVinoBackend(bundle.graph_files(), bundle.manifest.graphs, precision=device.precision)


def _others() -> str:
    """What else could be asked for here."""
    if find_spec("openvino") is None:
        return "openvino is not installed"
    return f"{' and '.join(OPENVINO_DEVICES if has_bf16() else OPENVINO_DEVICES[:1])} can be asked for"
