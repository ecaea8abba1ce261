"""The effect of less precision on logits, the best ten and AUC, measured through the emulated graphs.

    python bench/precision.py BUNDLE [--users 1000]

BUNDLE must carry sample users (`unipinrec export --data`). For bf16, fp16 and fp8 (calibrated on some of these users),
against fp32:

    logit error   of each action over the last events of each user, predicted from the events before them
    AUC change    of each action over the same events
    agreement     the check of `export --precision`: golden requests and the first users
    conversions   how many Cast nodes the three graphs have more than in fp32

`rounded_sums` is the same with the sums between blocks rounded too, as most tools for mixed precision would have it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from common import card, finish
from numpy.typing import NDArray

from unipinrec.export.lists.held_out import LAST_EVENTS, auc_by_action, held_out_logits
from unipinrec.export.precision.check import LOW_TYPES, emulation, sources_of
from unipinrec.export.precision.typed import LowType, PrecisionPlan, rewritten
from unipinrec.runtime.agreement import measure_agreement
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.graphs.engine import Engine

PlanOf = Callable[[onnx.ModelProto, LowType], PrecisionPlan]


class RoundedSums(PrecisionPlan):
    """Cheap operators compute in the type of their inputs."""

    def _follow_readers(self) -> None:
        pass


def casts(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "Cast" for node in model.graph.node)


class Judge:
    """Compares engines with fp32 on a bundle's sample users."""

    def __init__(self, bundle: Bundle, users: int) -> None:
        self.bundle = bundle
        self.histories = [h for h in bundle.sample_histories(users) if len(h) > LAST_EVENTS]
        with closing(Engine.on_cpu(bundle)) as exact:
            self.exact = self._logits(exact)
        self.auc = auc_by_action(bundle.manifest.actions, self.histories, self.exact)

    def _logits(self, engine: Engine) -> list[NDArray[np.float32]]:
        return [held_out_logits(engine, history) for history in self.histories]

    def measure(self, graphs: Mapping[str, onnx.ModelProto], low: LowType, plan: PlanOf) -> dict[str, Any]:
        """Figures of fp32 graphs rewritten by a plan."""
        emulated = {name: rewritten(plan(model, low), emulate=True) for name, model in graphs.items()}
        with (
            tempfile.TemporaryDirectory() as scratch,
            closing(emulation(self.bundle, emulated, Path(scratch))) as engine,
        ):
            logits = self._logits(engine)
            agreement = measure_agreement(engine, self.bundle)
        errors = np.abs(np.concatenate(logits) - np.concatenate(self.exact))
        auc = auc_by_action(self.bundle.manifest.actions, self.histories, logits)
        return {
            "logit_error": {
                "mean": float(errors.mean()),
                "p99": float(np.percentile(errors, 99)),
                "max": float(errors.max()),
            },
            "auc_change": {action: auc[action] - exact for action, exact in self.auc.items()},
            "agreement": msgspec.to_builtins(agreement),
        }


def conversions(graphs: Mapping[str, onnx.ModelProto], low: LowType) -> dict[str, int]:
    return {
        name: casts(rewritten(PrecisionPlan(model, low), emulate=False)) - casts(model)
        for name, model in graphs.items()
    }


def compare(judge: Judge) -> dict[str, Any]:
    """Every precision, and both types with rounded sums."""
    precisions, rounded = {}, {}
    for precision, low in LOW_TYPES.items():
        graphs = sources_of(judge.bundle, precision, judge.histories)
        precisions[precision] = {**judge.measure(graphs, low, PrecisionPlan), "conversions": conversions(graphs, low)}
        if precision != "fp8":
            rounded[precision] = judge.measure(graphs, low, RoundedSums)
    return {"precisions": precisions, "rounded_sums": rounded}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--users", type=int, default=1000)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    judge = Judge(bundle, options.users)
    spec = bundle.manifest.model
    described = {
        **{name: getattr(spec, name) for name in ("num_layers", "hidden_size", "max_history")},
        "users": len(judge.histories),
        "events": sum(map(len, judge.histories)),
        "held_out_events": LAST_EVENTS * len(judge.histories),
        "auc": judge.auc,
    }
    finish({**card("precision"), "bundle": described, **compare(judge)}, "precision")


if __name__ == "__main__":
    main()
