"""The models, and everything about one backend in one precision on one of them: golden requests, invariants, times."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import invariants
import numpy as np
import torch
from common import interleaved, ratio, spread
from costs import require_gpu
from engines import compile_for
from floors import Load, floors_ms
from synthetic import ACTIONS, random_events, random_source
from torch_model import measure

from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.export.protocol import ExportSource
from unipinrec.export.servable import ServableUniPinRec
from unipinrec.models.config import SIZES
from unipinrec.models.model import UniPinRec
from unipinrec.runtime import CacheOptions, Recommender
from unipinrec.runtime.graphs.engine import pad_histories
from unipinrec.runtime.verify import verify_bundle

ITEMS = 2000
REDUCED = ("bf16", "fp16")
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


def export(options: argparse.Namespace) -> dict[str, Any]:
    """The bundle, unless it was carried or exported before."""
    folder = bundle_of(options.work, options.size)
    if not folder.exists():
        export_bundle(source_of(options.size), folder, precisions=REDUCED, options=ExportOptions(accept_loss=True))
    manifest = json.loads((folder / "manifest.json").read_text())
    reduced = {name: spec["agreement"] for name, spec in manifest["precisions"].items()}
    return {"ran": True, "parity": manifest["parity"]["max_abs_diff"], "emulated": reduced, "tools": manifest["tools"]}


def on_torch(options: argparse.Namespace) -> dict[str, Any]:
    """The PyTorch model on the GPU."""
    require_gpu()
    shape = SHAPES[options.size]
    load = Load(events=shape.events, candidates=shape.candidates)
    return measure(model_of(source_of(options.size)), SIZES[options.size], load, "cuda")


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one backend in one precision on one model."""
    bundle, built = bundle_of(options.work, options.size), None
    if options.target:
        precision = options.device.rpartition("-")[2]
        bundle, built = compile_for(bundle, options, precision)
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
