"""The steps of the acceptance, each in a process of its own: prints one JSON document as the last line of stdout.

    machine                                  the machine
    model --size SIZE                        a model with random weights, exported in three precisions
    tests --file FILE                        the tests of a file that are marked `gpu`
    costs, ipc, kv-copies                    memory, copies, launches (costs.py)
    torch --size SIZE                        the PyTorch model on the GPU (torch_model.py)
    probe --device D [--flavor F --target T] whether a backend runs the stored bundle
    validity                                 what TensorRT-RTX says of its engines on this card
    check --size SIZE --device D [...]       build, golden requests, invariants, times (checks.py)
    joint-attention                          bench/joint_attention.py

`ran` says whether the step ran, `refused` the error if not; `problems` lists the failed checks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checks
import costs
import torch
import torch_model
from common import card
from floors import Load

from unipinrec.errors import UnipinrecError
from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.models.config import SIZES
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.trt.build import BuildTask, build_engine
from unipinrec.runtime.trt.library import LogLines, import_tensorrt, tensorrt_logger
from unipinrec.runtime.trt.profiles import default_buckets, for_graph

ROOT = Path(__file__).resolve().parent.parent.parent
STORED = ROOT / "tests" / "fixtures" / "bundle_v1"
REDUCED = ("bf16", "fp16")
PACKAGES = (
    "onnxscript",
    "msgspec",
    "cuda-bindings",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13-libs",
    "safetensors",
    "triton",
)
QUERY = (
    "name,driver_version,memory.total,compute_cap,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,clocks.max.memory"
)


def machine() -> dict[str, Any]:
    """GPU, driver and versions."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        gpu = f"nvidia-smi: {error}"
    found = {name: version_of(name) for name in PACKAGES}
    return {
        "ran": True,
        **card("accept"),
        "gpu": gpu,
        "driver_problem": driver_problem(),
        "torch_cuda": torch.version.cuda,
        "torch_sees_gpu": torch.cuda.is_available(),
        "packages": found,
    }


def version_of(package: str) -> str | None:
    """Its installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def export(work: Path, size: str) -> dict[str, Any]:
    """The bundle, unless it was carried or exported before."""
    folder = checks.bundle_of(work, size)
    if not folder.exists():
        export_bundle(checks.source_of(size), folder, precisions=REDUCED, options=ExportOptions(accept_loss=True))
    manifest = json.loads((folder / "manifest.json").read_text())
    reduced = {name: spec["agreement"] for name, spec in manifest["precisions"].items()}
    return {"ran": True, "parity": manifest["parity"]["max_abs_diff"], "emulated": reduced, "tools": manifest["tools"]}


def tests(file: str) -> dict[str, Any]:
    """Run the tests of a file that are marked `gpu`."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", file]
        done = subprocess.run(
            [*command, f"--junit-xml={report}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    sys.stderr.write(done.stdout)
    passed, skipped, failed = [], dict[str, str](), dict[str, str]()
    for case in cases:
        name, outcome = case.get("name", ""), next((e for e in case if e.tag in ("skipped", "failure", "error")), None)
        if outcome is None:
            passed.append(name)
        else:
            (skipped if outcome.tag == "skipped" else failed)[name] = outcome.get("message", "").strip()[:500]
    if not passed and not failed:
        reasons = "; ".join(dict.fromkeys(skipped.values())) or f"no test was collected (exit code {done.returncode})"
        return {"ran": False, "refused": reasons}
    return {"ran": True, "passed": passed, "skipped": skipped, "problems": [f"{n}: {m}" for n, m in failed.items()]}


def on_torch(size: str) -> dict[str, Any]:
    """The PyTorch model on the GPU."""
    costs.require_gpu()
    shape = checks.SHAPES[size]
    load = Load(events=shape.events, candidates=shape.candidates)
    return torch_model.measure(checks.model_of(checks.source_of(size)), SIZES[size], load, "cuda")


def probe(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The stored bundle in fp32: built where the backend needs engines, and its golden requests."""
    served, trusted, device = STORED, [], options.device
    if options.target:
        served, built = checks.compile_for(STORED, options, "fp32", work)
        if not built["ran"]:
            return built
        device += "-fp32"
        trusted = checks.trusted(options.target)
    return checks.command("verify", str(served), "--device", device, "--strict", *trusted)


def validity() -> dict[str, Any]:
    """What TensorRT-RTX says of engines for this card, and of portable ones, before it runs any."""
    trt = import_tensorrt("tensorrt_rtx")
    if problem := driver_problem():
        return {"ran": False, "refused": problem}  # TensorRT's runtime ends the process without a driver
    bundle = Bundle.open(STORED)
    specs, model = bundle.manifest.graphs_in("fp32"), bundle.manifest.model
    profiles = for_graph(default_buckets(model), specs["encoder"], model.kv_prefix_slots)
    lines, found = LogLines(), dict[str, Any]()
    runtime = trt.module.Runtime(tensorrt_logger(trt.module, lines))
    for target in ("current", "portable"):
        try:
            file = STORED / specs["encoder"].file
            targets = None if target == "current" else (target,)
            plan = build_engine(trt, file, BuildTask(profiles=profiles, targets=targets)).plan
            valid, diagnostics = runtime.get_engine_validity(plan)
            found[target] = {"validity": str(valid), "diagnostics": str(diagnostics), "log": lines.errors[-3:]}
        except Exception as error:  # the refusal is the finding
            found[target] = {"refused": f"{type(error).__name__}: {error}"}
    return {"ran": True, "version": trt.version, **found}


def joint_attention() -> dict[str, Any]:
    """Attention of a training step on the GPU."""
    costs.require_gpu()
    command = [sys.executable, str(ROOT / "bench" / "joint_attention.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"ran": False, "refused": done.stderr.strip()[-2000:]}
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    wrong = [
        f"{way} at n={row['n']}: {row[way]}"
        for row in rows
        for way in ("split", "dense", "flex")
        if "cannot run" in row[way]
    ]
    return {"ran": True, "rows": rows, "problems": wrong}


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=list(checks.SHAPES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flavor", default="tensorrt_rtx")
    parser.add_argument("--target", default="")
    parser.add_argument("--file", default="")
    options = parser.parse_args()
    # A separate cache for each backend: else one backend would use another's engines.
    os.environ["UNIPINREC_CACHE"] = str(options.work / "cache" / f"{options.flavor}-{options.target or 'none'}")
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "machine": machine,
        "model": partial(export, options.work, options.size),
        "tests": partial(tests, options.file),
        "costs": costs.costs,
        "ipc": costs.ipc,
        "kv-copies": costs.kv_copies,
        "torch": partial(on_torch, options.size),
        "probe": partial(probe, options.work, options),
        "validity": validity,
        "check": partial(checks.check, options.work, options),
        "joint-attention": joint_attention,
    }
    if options.step not in steps:
        parser.error(f"unknown step {options.step!r}; there are {', '.join(steps)}")
    try:
        found = steps[options.step]()
    except UnipinrecError as error:
        found = {"ran": False, "refused": str(error)}
    sys.stdout.write(json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    main()
