"""Which device serves, and why."""

from __future__ import annotations

from dataclasses import dataclass

from unipinrec.errors import BackendError

DEVICES = ("auto", "cpu")
GPU_DEVICES = ("cuda", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What really runs, and why it was chosen."""

    name: str
    reason: str


def resolve_device(wanted: str) -> Device:
    """Turn a wanted device into the one that runs.

    Raises:
        BackendError: It does not exist, or this version cannot run on it.
    """
    if wanted == "cpu":
        return Device(name="cpu", reason="asked for")
    if wanted == "auto":
        return Device(name="cpu", reason="auto: this version runs on the CPU only")
    if wanted in GPU_DEVICES:
        raise BackendError(f"device {wanted!r} is not available in this version; use auto or cpu")
    raise BackendError(f"unknown device {wanted!r}; use one of {', '.join(DEVICES)}")
