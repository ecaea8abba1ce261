"""Steps that need neither PyTorch nor an export: the tests, and what each backend says of the stored bundle."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from engines import command, compile_for, trusted

from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.trt.build import BuildTask, build_engine
from unipinrec.runtime.trt.library import LogLines, import_tensorrt, tensorrt_logger
from unipinrec.runtime.trt.profiles import default_buckets, for_graph

ROOT = Path(__file__).resolve().parent.parent.parent
STORED = ROOT / "tests" / "fixtures" / "bundle_v1"


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Run the tests of a file that are marked `gpu`."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", options.file]
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


def probe(options: argparse.Namespace) -> dict[str, Any]:
    """The stored bundle in fp32: built where the backend needs engines, and its golden requests."""
    served, device = STORED, options.device
    allowed: list[str] = []
    if options.target:
        served, built = compile_for(STORED, options, "fp32")
        if not built["ran"]:
            return built
        device += "-fp32"
        allowed = trusted(options.target)
    return command("verify", str(served), "--device", device, "--strict", *allowed)


def validity(_: argparse.Namespace) -> dict[str, Any]:
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


def joint_attention(_: argparse.Namespace) -> dict[str, Any]:
    """Attention of a training step on the GPU."""
    if problem := driver_problem():
        return {"ran": False, "refused": problem}
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
