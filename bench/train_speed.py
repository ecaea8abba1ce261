"""Tokens per second of a training step: length buckets and split attention against the naive way, in one run.

    python bench/train_speed.py [--data DATA] [--size tiny] [--rounds 5] [--threads 1] [--device cuda]

Ways: "ours" batches windows of like length and attends in two calls; "dense mask" makes the same batches attend
through one dense (n + k) x slots mask; "naive" does that on batches drawn at random and padded to their longest window.
All three train the same examples. Also measured: making a batch, as a share of the step that consumes it.
Without DATA the simulator makes one.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from common import card, finish, interleaved, milliseconds, ratio, spread

from unipinrec.models.batches import Batch, Batches
from unipinrec.models.config import SIZES
from unipinrec.models.data.schema import Dataset, read_dataset
from unipinrec.models.data.sequences import sequences_of, vocabulary_of
from unipinrec.models.model import UniPinRec
from unipinrec.models.simulator.simulator import simulate
from unipinrec.models.simulator.world import SimulatorConfig
from unipinrec.models.training.config import RunConfig, TrainConfig
from unipinrec.models.training.losses import Objective
from unipinrec.models.training.train import batch_options

STEPS = 6


class Workload:
    """A model, its optimizer, and the same examples batched in two ways."""

    def __init__(self, dataset: Dataset, config: RunConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        data, vocabulary = sequences_of(dataset), vocabulary_of(dataset)
        positive = np.array([name in vocabulary.positive_actions for name in vocabulary.actions])
        self.device, self.batches = device, Batches(data, positive, batch_options(config))
        self.model = UniPinRec(config.model, vocabulary)
        self.objective = Objective(self.model, data.features, config.train).to(device)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-4)
        self.bucketed = list(self.batches.epoch(0, range(min(STEPS, len(self.batches)))))
        self.mixed = self._mixed(config.train.batch_size)

    def _mixed(self, size: int) -> list[Batch]:
        order = np.random.default_rng(0).permutation(len(self.batches.windows))
        return [self.batches.collate(order[i * size : (i + 1) * size].tolist()) for i in range(len(self.bucketed))]

    def train(self, batches: list[Batch], *, dense_mask: bool) -> None:
        """One step per batch."""
        self.model.joint = functools.partial(UniPinRec.joint, self.model, dense_mask=dense_mask)  # type: ignore[method-assign]  # the reference form
        for batch in batches:
            self.objective(batch.to(self.device))["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def tokens(batches: list[Batch]) -> int:
    """Events and candidates, padding not counted."""
    return sum(int(b.lengths.sum()) + int(b.candidate_valid.sum()) for b in batches)


def padding(batches: list[Batch]) -> float:
    """Share of the slots of events and candidates that are padding."""
    return 1.0 - tokens(batches) / sum(b.history_items.numel() + b.candidate_items.numel() for b in batches)


def measure(work: Workload, rounds: int) -> dict[str, Any]:
    """Tokens per second of each way, their ratios, and the time to make the batches."""
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: work.train(work.bucketed, dense_mask=False),
        "dense mask": lambda: work.train(work.bucketed, dense_mask=True),
        "naive": lambda: work.train(work.mixed, dense_mask=True),
    }
    times = interleaved(ways, rounds)
    count = {"ours": tokens(work.bucketed), "dense mask": tokens(work.bucketed), "naive": tokens(work.mixed)}
    rates = {name: [count[name] / t * 1e3 for t in taken] for name, taken in times.items()}
    load = [milliseconds(lambda: list(work.batches.epoch(0, range(len(work.bucketed))))) for _ in range(rounds)]
    return {
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
        "ours_over_dense_mask": ratio(rates, "ours", "dense mask"),
        "ours_over_naive": ratio(rates, "ours", "naive"),
        "padding": {"bucketed": round(padding(work.bucketed), 4), "mixed": round(padding(work.mixed), 4)},
        "loading_share_of_step": spread([a / b for a, b in zip(load, times["ours"], strict=True)]),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--max-history", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = msgspec.structs.replace(SIZES[options.size], max_history=options.max_history)
    config = RunConfig(model=model, train=TrainConfig(batch_size=options.batch_size))
    dataset = read_dataset(options.data) if options.data else simulate(SimulatorConfig(users=2000))[0]
    work = Workload(dataset, config, torch.device(options.device))
    document = {
        **card("train_speed"),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": options.threads,
        "data": dataset.spec.name,
        "model": msgspec.to_builtins(model),
        "batch_size": options.batch_size,
        **measure(work, options.rounds),
    }
    finish(document, "train_speed" if options.device == "cpu" else f"train_speed_{options.device}")


if __name__ == "__main__":
    main()
