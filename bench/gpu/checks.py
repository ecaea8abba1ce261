"""Everything about one backend in one precision on one model: build, golden requests, invariants, times."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import invariants
import numpy as np
import torch
from common import interleaved, ratio, spread
from floors import Load, floors_ms
from synthetic import ACTIONS, random_events, random_source

from unipinrec.export.checkpoint_source import ServableUniPinRec
from unipinrec.export.protocol import ExportSource
from unipinrec.models.config import SIZES
from unipinrec.models.model import UniPinRec
from unipinrec.runtime import CacheOptions, Recommender
from unipinrec.runtime.graphs.engine import pad_histories
from unipinrec.runtime.trt.library import import_tensorrt
from unipinrec.runtime.verify import verify_bundle

ITEMS = 2000
SHAPES = {
    "tiny": invariants.Shape(events=64, candidates=40, cases=3),
    "small": invariants.Shape(events=992, candidates=656, cases=4),
    "paper": invariants.Shape(events=992, candidates=656, cases=3),
}
FP32_TOLERANCE, INDEPENDENT = 1e-4, 1e-5
ROUNDS = 31


def source_of(size: str) -> ExportSource:
    """Random weights, large enough that every event moves the logits."""
    source = random_source("sink", ITEMS, SIZES[size])
    noise = torch.Generator().manual_seed(0)
    model = model_of(source)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.data = torch.randn(parameter.shape, generator=noise) / parameter.shape[-1] ** 0.5
    return source


def model_of(source: ExportSource) -> UniPinRec:
    """The PyTorch model itself."""
    assert isinstance(source.module, ServableUniPinRec)
    return source.module.model


def bundle_of(work: Path, size: str) -> Path:
    """Where the bundle of a size lies."""
    return work / "models" / size


def command(*arguments: str) -> dict[str, Any]:
    """Run one of our commands; its JSON document, or its error message."""
    done = subprocess.run(
        [sys.executable, "-m", "unipinrec", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"ran": False, "refused": done.stderr.strip()[-2000:]}
    return {"ran": True, "said": json.loads(done.stdout)}


def compile_for(bundle: Path, options: argparse.Namespace, precision: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """Build engines for this card, or ahead of time for a target: the bundle to serve, and the command's document."""
    asked = ["compile", str(bundle), "--flavor", options.flavor, "--precision", precision]
    if options.target == "current":
        return bundle, command(*asked)
    ahead = work / "models" / f"{bundle.name}-{flavor_version(options.flavor)}-{options.target}-{precision}"
    if ahead.exists():
        return ahead, {"ran": True}
    return ahead, command(*asked, "--target", options.target, "--out", str(ahead))


def flavor_version(flavor: str) -> str:
    """The installed TensorRT, in a file name: engines built ahead of time by one version are no use to another."""
    trt = import_tensorrt("tensorrt" if flavor == "tensorrt" else "tensorrt_rtx")
    return f"{trt.flavor}-{trt.version}"


def trusted(target: str) -> list[str]:
    """The option that allows a bundle's own engines."""
    return [] if target == "current" else ["--allow-bundle-engines"]


def check(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one backend in one precision on one model."""
    bundle, built = bundle_of(work, options.size), None
    if options.target:
        precision = options.device.rpartition("-")[2]
        bundle, built = compile_for(bundle, options, precision, work)
        if not built["ran"]:
            return built
    allow = bool(options.target) and options.target != "current"
    verified = verify_bundle(bundle, options.device, strict=True, allow_bundle_engines=allow)
    recommender = Recommender.load(
        bundle,
        options.device,
        verify=False,
        strict=True,
        allow_bundle_engines=allow,
        cache=CacheOptions(budget_bytes=2**28, dtype="fp32"),
    )
    shape = SHAPES[options.size]
    found = {
        "golden": {check.output: check.max_abs_diff for check in verified.golden},
        "agreement": verified.agreement
        and {n: getattr(verified.agreement, n) for n in verified.agreement.__struct_fields__},
        **checked(recommender, shape, options.size),
    }
    fp32 = recommender.device.precision == "fp32"
    return {
        "ran": True,
        "device": recommender.device.name,
        "reason": recommender.device.reason,
        "built": built and built.get("said"),
        **found,
        "problems": problems(found, verified.ok) if fp32 else reduced_problems(found, verified.ok),
        "times_ms": times(recommender, shape, options.size),
    }


def checked(recommender: Recommender, shape: invariants.Shape, size: str) -> dict[str, invariants.Differences]:
    """The invariants, but for the golden requests."""
    engine, actions = recommender.engine, len(ACTIONS)
    return {
        "split": invariants.split(engine, model_of(source_of(size)), actions, shape),
        "extend": invariants.extend(engine, actions, shape),
        "independent": invariants.independent(engine, actions, shape),
        "same": invariants.same(recommender, random_events(min(200, shape.events), ITEMS, seed=3)),
    }


def problems(found: dict[str, Any], verified: bool) -> list[str]:
    """Violations in fp32."""
    bounds = {"split": FP32_TOLERANCE, "extend": FP32_TOLERANCE, "independent": INDEPENDENT, "same": FP32_TOLERANCE}
    over = [
        f"{name} {part} is {value:.3g}, allowed {bound:g}"
        for name, bound in bounds.items()
        for part, value in found[name].items()
        if not value <= bound
    ]
    return over if verified else ["the golden requests do not reproduce", *over]


def reduced_problems(found: dict[str, Any], verified: bool) -> list[str]:
    """Violations in bf16 or fp16; the agreement covers rounding."""
    wrong = [] if verified else ["it does not recommend what fp32 recommends"]
    finite = all(np.isfinite(value) for name in ("split", "extend", "independent") for value in found[name].values())
    return wrong if finite else [*wrong, "values are not finite"]


def times(recommender: Recommender, shape: invariants.Shape, size: str) -> dict[str, Any]:
    """Encoding and ranking at the full shape for one request and for eight, their floors on a GPU, and the gain of one
    shared encode."""
    engine, precision = recommender.engine, recommender.device.precision
    rng = np.random.default_rng(5)
    measured: dict[str, Any] = {}
    for batch in (1, 8):
        made = [invariants.random_history(rng, engine, len(ACTIONS), shape.events) for _ in range(batch)]
        histories = pad_histories(made)
        rows = rng.integers(0, ITEMS, (batch, shape.candidates))
        context = np.zeros(batch, np.int64), np.full(batch, invariants.NOW_MS)
        encoded = engine.encode(histories)
        took = interleaved(
            {"encode": partial(engine.encode, histories), "rank": partial(engine.rank, encoded, rows, *context)}, ROUNDS
        )
        shared = {
            "two models": [2 * e + r for e, r in zip(took["encode"], took["rank"], strict=True)],
            "shared": [e + r for e, r in zip(took["encode"], took["rank"], strict=True)],
        }
        measured[f"batch {batch}"] = {
            "n": shape.events,
            "k": shape.candidates,
            "floors": floors_ms(
                SIZES[size], precision, Load(events=shape.events, candidates=shape.candidates, batch=batch)
            ),
            **{name: spread(values) for name, values in took.items()},
            "two_models_over_shared": ratio(shared, "two models", "shared"),
        }
    return measured
