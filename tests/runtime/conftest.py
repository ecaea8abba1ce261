"""Damaging a bundle, and a manifest that no bundle stands behind."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import STORED, engine_of
from fake_gpu import CudaOnCpu, HostMachine
from fake_tensorrt import double_backend
from host_cuda import HostRuntime
from hub_server import Hub, hub_server
from twin_bundle import twin, with_shares

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle, Recommender
from unipinrec.runtime.bundle.bundle import CATEGORIES, ITEM_VECTORS, ITEMS
from unipinrec.runtime.bundle.derived import seal_derived
from unipinrec.runtime.bundle.integrity import write_arrays
from unipinrec.runtime.bundle.manifest import IndexSpec, Manifest, ModelSpec, ParityReport
from unipinrec.runtime.device import THIS_MACHINE, Machine
from unipinrec.runtime.graphs.engine import Engine
from unipinrec.runtime.graphs.ort_cpu import OrtBackend, import_onnxruntime
from unipinrec.runtime.graphs.ort_cuda import provider_problem
from unipinrec.runtime.machine import driver_problem, has_bf16
from unipinrec.runtime.trt import network
from unipinrec.runtime.trt.backend import TensorRtBackend
from unipinrec.runtime.trt.library import TensorRT, import_tensorrt

CUDA = "CUDAExecutionProvider"
Reseal = Callable[..., None]


@pytest.fixture(scope="session")
def recommender(bundle: Path) -> Recommender:
    return Recommender.load(bundle)


def needs(device: str) -> None:
    """Skip where a device is not installed, or this CPU does not have it."""
    if device.startswith("openvino") and find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    if device == "openvino-bf16" and not has_bf16():
        pytest.skip("this CPU has no bf16 instructions")


@pytest.fixture(scope="module", params=["cpu", "openvino", "cuda", "tensorrt-fp32"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that computes in fp32.

    Those that need a GPU run our own code all the same: "cuda" on the CPU where there is none, TensorRT on its double.
    """
    needs(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def machine(device: str) -> Iterator[Machine]:
    """Where the device runs."""
    memory = HostRuntime()
    if device == "tensorrt-fp32":
        yield HostMachine(memory, compiled=True)
    elif device == "cuda" and (driver_problem() or provider_problem(import_onnxruntime(), CUDA)):
        yield CudaOnCpu()
    else:
        yield THIS_MACHINE
    assert memory.faults == []


@pytest.fixture(scope="session")
def bf16_device() -> str:
    needs("openvino-bf16")
    return "openvino-bf16"


@pytest.fixture(scope="session")
def trt() -> TensorRT:
    """The installed TensorRT-RTX, which parses and builds without a GPU."""
    try:
        return import_tensorrt("tensorrt_rtx")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture
def without_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attentions take no lengths, as in TensorRT 10.16."""

    class WithoutLengths:
        def __init__(self, attention: Any) -> None:
            vars(self)["_attention"] = attention

        def __getattr__(self, name: str) -> Any:
            if name == "key_value_lengths":
                raise AttributeError(name)
            return getattr(self._attention, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self._attention, name, value)

    attentions = network._attentions
    monkeypatch.setattr(
        network, "_attentions", lambda *given: {name: WithoutLengths(one) for name, one in attentions(*given).items()}
    )


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def reseal() -> Reseal:
    """Writes a manifest that agrees with the files as they are now; keywords replace its entries."""

    def write(folder: Path, **changes: Any) -> None:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for name, spec in manifest["files"].items():
            content = (folder / name).read_bytes()
            spec |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        for name, value in changes.items():
            manifest[name] = {**manifest.get(name, {}), **value} if isinstance(value, dict) else value
        content = json.dumps(manifest).encode()
        (folder / "manifest.json").write_bytes(content)
        (folder / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")

    return write


@pytest.fixture
def manifest() -> Manifest:
    """Five items, histories of at most four events."""
    model = ModelSpec(
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        hidden_size=2,
        item_dim=2,
        max_history=4,
        kv_prefix_slots=1,
        outcome_conditioned=False,
    )
    index = IndexSpec(space="ip", dim=2, count=5, m=4, ef_construction=8, ef_search=8, seed=0, recall=1.0, recall_k=1)
    return Manifest(
        format_version=1,
        created="2026-01-01T00:00:00+00:00",
        model=model,
        config={},
        actions=("click", "save", "hide"),
        positive_actions=("click", "save"),
        surfaces=("unknown", "home", "search"),
        dense={},
        categories={},
        num_items=5,
        missing_timestamp_ms=-1,
        precision="fp32",
        graphs={},
        files={},
        index=index,
        parity=ParityReport(tolerance=1e-4, max_abs_diff=0.0, checks=()),
        metrics=None,
        data_fingerprint="",
        tools={},
    )


@pytest.fixture(scope="session")
def stored() -> Bundle:
    """A very small bundle, as an earlier version wrote it."""
    return Bundle.open(STORED)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two very small bundles of one shape that answer differently: a and b of one folder."""
    folder = tmp_path_factory.mktemp("twins")
    return twin(folder / "a", seed=1), twin(folder / "b", seed=2)


@pytest.fixture(scope="session")
def popular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored bundle with popular items: two of 24 on its surface "home", others in all."""
    shares = np.full((2, 24), 0.25 / 22, np.float32)
    shares[0, [5, 6]] = shares[1, [23, 22]] = 0.5, 0.25
    return with_shares(tmp_path_factory.mktemp("popular") / "bundle", shares)


@pytest.fixture(scope="session")
def shop(popular: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with popular items, and what a shop knows of its 24 items: words, price, page and picture."""
    folder, parent = tmp_path_factory.mktemp("shop") / "bundle", Bundle.open(popular)
    folder.mkdir()
    codes = (np.arange(24, dtype=np.int32) % 7 % 3)[:, None]
    write_arrays(folder / ITEMS, {ITEM_VECTORS: parent.item_vectors, CATEGORIES: codes})
    texts = {"url": [f"https://shop.example/{row}" for row in range(24)], "image": [None] * 24}
    (folder / "item_metadata.json").write_text(
        json.dumps({"price": [None if row == 3 else row for row in range(24)], **texts})
    )
    seal_derived(folder, parent)
    return folder


@pytest.fixture(scope="session")
def exact(stored: Bundle) -> Engine:
    """What answers to its requests are to be."""
    return engine_of(OrtBackend(stored.graph_files(), threads=1), stored)


@pytest.fixture
def memory() -> HostRuntime:
    """A GPU that is none."""
    return HostRuntime()


@pytest.fixture
def backend(stored: Bundle, memory: HostRuntime) -> Iterator[TensorRtBackend]:
    """TensorRT on it; it must leave nothing behind."""
    with double_backend(stored, memory) as opened:
        yield opened
    gc.collect()
    assert memory.left() == {}
    assert memory.faults == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, where the real client finds it; with an empty cache and without a token."""
    if find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed (pip install 'unipinrec[hub]')")
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server() as (hub, endpoint):
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub
