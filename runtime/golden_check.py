"""Check that a device here computes the outputs that PyTorch computed at export."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BundleError
from unipinrec.runtime.agreement import measure_agreement
from unipinrec.runtime.bundle.bundle import GOLDEN, Bundle
from unipinrec.runtime.bundle.golden import read_golden
from unipinrec.runtime.bundle.manifest import Agreement
from unipinrec.runtime.graphs.engine import Engine, pad_histories

TOLERANCE, ROUNDING = 1e-4, 1e-5
log = logging.getLogger(__name__)
Outputs = dict[str, NDArray[Any]]


def tolerance(expected: NDArray[Any]) -> float:
    """Largest difference that counts as the same: 1e-4, or 1e-5 of the largest value, as fp32 rounds large ones."""
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return max(TOLERANCE, ROUNDING * float(largest))


@dataclass(frozen=True, kw_only=True)
class GoldenCheck:
    """One output compared with PyTorch's at its valid positions; `max_abs_diff` is None if they do not compare."""

    output: str
    max_abs_diff: float | None
    problem: str | None


def require_golden(engine: Engine, bundle: Bundle) -> None:
    """Check that the golden requests' outputs reproduce, or nearly so on a device that rounds.

    Raises:
        BundleError: They do not.
        BackendError: A graph does not run.
    """
    device, kind = engine.device, engine.device.name.partition("-")[0]
    golden, agreement = check_outputs(engine, bundle)
    if agreement is not None:
        log.info("%s on %s agrees with fp32: %s", bundle.path, device.name, agreement)
        if agreement.problem:
            raise BundleError(
                f"{bundle.path}: {device.name} does not recommend what fp32 recommends: {agreement.problem}; "
                f"use device {'tensorrt-fp32' if kind == 'tensorrt' else kind} or cpu"
            )
    wrong = [check for check in golden if check.problem]
    if wrong:
        exported = bundle.manifest.tools.get("onnxruntime", "another version")
        remedy = f"install onnxruntime {exported}, which exported it, or export it again"
        raise BundleError(
            f"{bundle.path}: {len(wrong)} golden outputs do not reproduce on {device.name} of this machine, first "
            f"{wrong[0].output}: {wrong[0].problem}; its scores would be wrong: "
            f"{remedy if kind == 'cpu' else 'use device cpu'}, or see `unipinrec verify`"
        )


def check_outputs(engine: Engine, bundle: Bundle) -> tuple[tuple[GoldenCheck, ...], Agreement | None]:
    """Compare golden outputs if the device computes in fp32, else measure the agreement with fp32.

    Raises:
        BundleError: The golden requests or the sample users cannot be read.
        BackendError: A graph does not run.
    """
    if engine.device.precision == "fp32":
        return compare_golden(engine, bundle), None
    return (), measure_agreement(engine, bundle)


def compare_golden(engine: Engine, bundle: Bundle) -> tuple[GoldenCheck, ...]:
    """Run the golden requests through all graphs and compare every output at its valid positions.

    Raises:
        BundleError: The golden requests cannot be read.
        BackendError: A graph does not run.
    """
    golden, manifest = read_golden(bundle), bundle.manifest
    histories, prefixes, names = golden.histories, golden.prefixes, manifest.model.kv_names("present")
    encoded = engine.encode(pad_histories(histories))
    outcomes = np.tile(manifest.positive.astype(np.float32), (len(histories), 1))
    slots = encoded.lengths + manifest.model.kv_prefix_slots
    checks: list[tuple[str, NDArray[Any], NDArray[np.int64] | None]] = [
        *((f"encoder.{name}", tensor.numpy(), slots) for name, tensor in zip(names, encoded.key_values, strict=True)),
        ("encoder.last_hidden_state", encoded.last_hidden_state.numpy(), None),
        ("retrieval.queries", engine.retrieve(encoded, outcomes), None),
    ]
    if "extend" in manifest.model.graphs:
        before = engine.encode(pad_histories([h.part(0, int(m)) for h, m in zip(histories, prefixes, strict=True)]))
        after = pad_histories([h.part(int(m)) for h, m in zip(histories, prefixes, strict=True)])
        added, last = engine.encode_new(before, after)
        checks += [(f"extend.{name}", tensor.numpy(), after.lengths) for name, tensor in zip(names, added, strict=True)]
        checks.append(("extend.last_hidden_state", last.numpy(), None))
    if "ranker" in manifest.model.graphs:
        logits = engine.rank(encoded, golden.candidates, golden.surfaces, golden.now_ms)
        checks.append(("ranker.logits", logits, None))
    return tuple(_compare(golden.outputs, *check) for check in checks)


def _compare(outputs: Outputs, output: str, values: NDArray[Any], valid: NDArray[np.int64] | None) -> GoldenCheck:
    """Compare an output; of keys/values [B, H_kv, slots, D] only the first `valid` [B] slots."""
    expected = outputs.get(output)
    if expected is None:
        return GoldenCheck(output=output, max_abs_diff=None, problem=f"is missing in {GOLDEN}")
    if expected.shape != values.shape:
        return GoldenCheck(output=output, max_abs_diff=None, problem=f"is {values.shape}, expected {expected.shape}")
    if valid is not None:
        values, expected = (
            np.concatenate([row[:, :count].ravel() for row, count in zip(array, valid, strict=True)])
            for array in (values, expected)
        )
    largest, allowed = float(np.abs(values.astype(np.float64) - expected).max()), tolerance(expected)
    problem = None if largest <= allowed else f"differs by up to {largest:.3g}, at most {allowed:g} is allowed"
    return GoldenCheck(output=output, problem=problem, max_abs_diff=largest)
