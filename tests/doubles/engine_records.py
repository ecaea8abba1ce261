"""Records of engines that nobody built."""

from __future__ import annotations

from typing import Any

from unipinrec.runtime.trt.layers import LayerReport
from unipinrec.runtime.trt.record import BuildOptions, EngineHost, EngineKey, EngineRecord, Need, Verification

KEY = EngineKey(
    graph="ranker",
    graph_sha256="a" * 64,
    precision="bf16",
    profiles=({"x": ((1, 2), (4, 2), (8, 2))},),
    flavor="tensorrt",
    version="11.4.0.106",
    target="sm_90",
    options=BuildOptions(),
)
HERE = EngineHost(id="here", gpu="NVIDIA H200", architecture="sm_90", driver="13.0")


def record_of(key: EngineKey = KEY, machine: EngineHost = HERE, **changes: Any) -> EngineRecord:
    fields: dict[str, Any] = {
        "plan_sha256": "",
        "size_bytes": 0,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "layers": LayerReport(layers=(), tensors={}, fallen={}, attention={}),
        "activation_bytes": (1024,),
        "verified": Verification(passed=True, how="by hand"),
    }
    return EngineRecord(key=key, machine=machine, **(fields | changes))


def need_of(key: EngineKey = KEY, **changes: Any) -> Need:
    fields = {name: getattr(key, name) for name in ("graph", "graph_sha256", "precision", "flavor", "version")}
    return Need(**(fields | changes))
