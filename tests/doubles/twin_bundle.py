"""A bundle of the stored bundle's shape and items that answers otherwise: other weights, made in a moment."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from answers import STORED
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.golden import read_golden
from unipinrec.runtime.graphs.engine import Engine, pad_histories

GRAPHS = ("encoder", "extend", "retrieval", "ranker")


def twin(folder: Path, seed: int) -> Path:
    """Whatever depends on weights differs from other seeds': keys and values, queries, logits, golden outputs."""
    shutil.copytree(STORED, folder)
    for graph in GRAPHS:
        _change_weights(folder / f"{graph}.onnx", seed)
    seal_again(folder)
    _write_golden(folder)
    seal_again(folder)
    return folder


def with_shares(folder: Path, shares: NDArray[Any]) -> Path:
    """The stored bundle with popular items, and a word for each: "a" for even rows, "b" for odd ones."""
    shutil.copytree(STORED, folder)
    codes = np.arange(24, dtype=np.int32)[:, None] % 2 + 1
    save_file({**load_file(folder / "items.safetensors"), "categories": codes}, folder / "items.safetensors")
    save_file({"share": shares}, folder / "popular.safetensors")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["popular.safetensors"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal_again(folder)
    return folder


def seal_again(folder: Path) -> None:
    """Write the manifest that agrees with the files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, spec in manifest["files"].items():
        content = (folder / name).read_bytes()
        spec |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")


def _change_weights(path: Path, seed: int) -> None:
    """A weight of several graphs has one name, and is changed alike in all of them."""
    model = onnx.load(path)
    for weight in model.graph.initializer:
        if weight.name.startswith("module.model.") and "rotary" not in weight.name:
            rng = np.random.default_rng([seed, zlib.crc32(weight.name.encode())])
            values = numpy_helper.to_array(weight)
            changed = values + rng.normal(size=values.shape).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(model, path)


def _write_golden(folder: Path) -> None:
    bundle = Bundle.open(folder)
    engine, golden, names = Engine.on_cpu(bundle), read_golden(bundle), bundle.manifest.model.kv_names("present")
    parts = list(zip(golden.histories, golden.prefixes.tolist(), strict=True))
    encoded = engine.encode(pad_histories(golden.histories))
    before = engine.encode(pad_histories([history.part(0, count) for history, count in parts]))
    added, last = engine.encode_new(before, pad_histories([history.part(count) for history, count in parts]))
    wanted = [[name in bundle.manifest.positive_actions for name in bundle.manifest.actions]] * len(parts)
    outputs = {
        **{f"encoder.{name}": value.numpy() for name, value in zip(names, encoded.key_values, strict=True)},
        "encoder.last_hidden_state": encoded.last_hidden_state.numpy(),
        **{f"extend.{name}": value.numpy() for name, value in zip(names, added, strict=True)},
        "extend.last_hidden_state": last.numpy(),
        "retrieval.queries": engine.retrieve(encoded, np.array(wanted, np.float32)),
        "ranker.logits": engine.rank(encoded, golden.candidates, golden.surfaces, golden.now_ms),
    }
    engine.close()
    path = folder / "golden.safetensors"
    save_file({**load_file(path), **{name: np.ascontiguousarray(value) for name, value in outputs.items()}}, path)
