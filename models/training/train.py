"""The training loop: one stage, one summed loss. Keeps the best checkpoint by validation; can resume at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import nn

from unipinrec.errors import CheckpointError, ConfigError, TrainingError, TrainingInterrupted
from unipinrec.models.batches import Batch, Batches, TrainBatchOptions
from unipinrec.models.checkpoint import ItemList, read_json, write_atomically, write_catalogue, write_model
from unipinrec.models.config import Vocabulary
from unipinrec.models.data.schema import METADATA_PREFIX, Dataset
from unipinrec.models.data.sequences import Sequences, fingerprint, sequences_of, vocabulary_of
from unipinrec.models.evaluate import EVALUATION_BATCH, gather_scores, held_out_requests, metrics_of, model_scores
from unipinrec.models.metrics import Metrics
from unipinrec.models.model import UniPinRec
from unipinrec.models.training.config import RunConfig, TrainConfig
from unipinrec.models.training.log import StepReport, TrainLog
from unipinrec.models.training.losses import Objective
from unipinrec.models.training.sheet import TrainingFacts, training_facts, training_warnings
from unipinrec.models.training.state import STATE_FILE, Position, read_state, write_state


class EpochReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of one epoch: mean losses, validation metrics, whether they are the best so far, training seconds."""

    epoch: int
    losses: dict[str, float]
    metrics: Metrics
    best: bool
    seconds: float


class RunMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `metrics.json`; runs of earlier versions have no facts."""

    config: RunConfig
    parameters: int
    epochs: list[EpochReport]
    facts: TrainingFacts | None = None


class Trainer:
    """Trains one model on one data set and writes a checkpoint folder as it goes.

    A subclass may train a variant of the model or of the losses with the same weights.
    """

    model_type: type[UniPinRec] = UniPinRec
    objective_type: type[Objective] = Objective

    def __init__(
        self, dataset: Dataset, config: RunConfig, out: Path, *, resume: bool = False, tensorboard: bool = False
    ) -> None:
        """Set up a run, or resume one; `tensorboard` writes events beside `log.csv`.

        Raises:
            CheckpointError: `out` holds a run and `resume` is False, there is no run to resume, or `out` cannot be
                written.
            ConfigError: The settings do not fit the data or the machine, or TensorBoard is not installed.
            DataError: No positive action ever happens in the training part.
        """
        self.config, self.out, self.stop_requested = config, out, False
        self.accelerator = Accelerator(mixed_precision=_precision(config.train))
        self.data = sequences_of(dataset)
        self.vocabulary = vocabulary_of(dataset)
        self.positive = self.vocabulary.positive
        self.batches = Batches(self.data, self.positive, batch_options(config))
        self.steps_per_epoch: int = len(self.batches) // self.accelerator.num_processes
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{len(self.batches.windows)} training windows make no batch for each of "
                f"{self.accelerator.num_processes} processes; the data has too few events before its split"
            )
        self.facts = training_facts(
            self.data, self.positive, self.vocabulary.actions, fit_validation=config.train.fit_validation
        )
        self.warnings = training_warnings(self.facts, config.train, self.total_steps)
        if not self.facts.shown:  # all events would carry the mark, so that candidates, without it, stay untrained
            model = msgspec.structs.replace(config.model, mark_masked=False)
            config = self.config = RunConfig(model=model, train=config.train)
        set_seed(config.train.seed)
        self.model = self.model_type(config.model, self.vocabulary)
        _standardise(self.model, self.data)
        groups = _parameter_groups(self.model, config.train.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.train.learning_rate)
        objective = self.objective_type(self.model, self.data.features, config.train)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.reports: list[EpochReport] = []
        self.position = Position(settings=_settings(config, self.data, self.vocabulary))
        # A position counts steps, and the batch of a step depends on the number of processes.
        self.position.settings["processes"] = self.accelerator.num_processes
        self._open(dataset, resume)
        self.log: TrainLog | None = None
        if self.accelerator.is_main_process:
            every, done = config.train.log_every, self._steps_done()
            self.log = TrainLog(out, every=every, steps_done=done, tensorboard=tensorboard)

    def _open(self, dataset: Dataset, resume: bool) -> None:
        if resume:
            settings = self.position.settings
            self.position = read_state(self.out, self.model, self.optimizer)
            _require_same(self.out, self.position.settings, settings)
            if self.position.epoch:
                self.reports = read_json(self.out / "metrics.json", RunMetrics).epochs[: self.position.epoch]
                self._write_best()
            return
        if (self.out / STATE_FILE).exists():
            raise CheckpointError(f"{self.out} holds a run already; pass --resume to go on, or choose another --out")
        if (self.out / "config.json").exists():
            raise CheckpointError(f"{self.out} holds a model, but no run to resume; choose another --out")
        if self.accelerator.is_main_process:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"--out {self.out} cannot be made a folder: {error}; choose another") from error
            items, kept = dataset.items, dataset.spec.metadata
            metadata = {name: items[METADATA_PREFIX + name].to_list() for name in kept}
            catalogue = ItemList(item_ids=self.data.item_ids, titles=items["title"].to_list(), metadata=metadata)
            write_catalogue(self.out, catalogue, self.data.features)

    def _write_best(self) -> None:
        """Write the checkpoint if the weights are those of the best epoch's end."""
        if self.accelerator.is_main_process and not self.position.stale_epochs and not self.position.batch:
            write_model(self.out, self.model)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or patience has run out."""
        patience = self.config.train.patience
        stale = patience is not None and self.position.stale_epochs >= patience
        return stale or self.position.epoch >= self.config.train.epochs

    def run(self) -> Iterator[StepReport | EpochReport]:
        """Train; yields after every step and every epoch. Set `stop_requested` to stop after the current step.

        A validation ends after its current batch, and is done again when the run is resumed.

        Raises:
            TrainingInterrupted: `stop_requested` was set; the state is on disk.
            TrainingError: The loss, its gradient or a validation score is not finite.
            CheckpointError: The checkpoint could not be written.
        """
        while not self.finished:
            began = time.monotonic()
            for batch in self._epoch_batches():
                report = self._step(batch)
                self.position.add(report.losses)
                if self.log is not None:
                    self.log.step(report)
                yield report
                self._stop_if_requested()
            yield self._finish_epoch(time.monotonic() - began)

    def _stop_if_requested(self) -> None:
        if self.stop_requested:
            self._save_state()
            raise TrainingInterrupted(
                f"stopped after step {self._steps_done()} of {self.total_steps}; go on with --resume --out {self.out}"
            )

    def _epoch_batches(self) -> Iterator[Batch]:
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        indices = [step * processes + rank for step in range(self.position.batch, self.steps_per_epoch)]
        return self.batches.epoch(self.position.epoch, indices)

    def _steps_done(self) -> int:
        return self.position.epoch * self.steps_per_epoch + self.position.batch

    def _step(self, batch: Batch) -> StepReport:
        train, done = self.config.train, self._steps_done()
        torch.manual_seed(int(np.random.SeedSequence([train.seed, done]).generate_state(1)[0]))
        rate = _learning_rate(train, done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.train()
        with self.accelerator.autocast():
            losses = self.objective(batch.to(self.accelerator.device))
        self.accelerator.backward(losses["loss"])
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), train.grad_clip)
        values = {name: float(value.detach()) for name, value in losses.items()}
        self._require_finite(f"loss is {values['loss']} at step {done + 1}", values["loss"])
        # The scaler of fp16 tries too large scales on purpose, and skips such steps.
        if norm is not None and self.accelerator.scaler is None:
            self._require_finite(f"gradient's norm is {float(norm)} at step {done + 1}", float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepReport(
            epoch=self.position.epoch,
            step=done + 1,
            losses=values,
            learning_rate=rate,
            gradient_norm=float(norm) if norm is not None else math.nan,
            events=int(batch.lengths.sum()),
        )

    def _require_finite(self, problem: str, values: float | NDArray[np.float64]) -> None:
        if not np.isfinite(values).all():
            raise TrainingError(
                f"the {problem}; the checkpoint of the last good epoch is untouched. "
                f"Lower the learning rate (now {self.config.train.learning_rate}) or use --precision fp32"
            )

    def _finish_epoch(self, seconds: float) -> EpochReport:
        metrics = self._validate()
        score, previous = metrics.selection_score(), self.position.best_score
        judged = [action for action in (metrics.ranking or {}).values() if action.auc is not None]
        measured = metrics.retrieval is not None or judged
        # Without any measurement, the latest weights are the best.
        best = not measured or previous is None or score > previous
        report = EpochReport(
            epoch=self.position.epoch,
            losses=self.position.mean_losses(),
            metrics=metrics,
            best=best,
            seconds=round(seconds, 2),
        )
        self.reports.append(report)
        self.position = Position(
            epoch=self.position.epoch + 1,
            best_score=score if best else previous,
            settings=self.position.settings,
            stale_epochs=0 if best else self.position.stale_epochs + 1,
        )
        if self.accelerator.is_main_process:
            parameters = sum(p.numel() for p in self.model.parameters())
            document = RunMetrics(config=self.config, parameters=parameters, epochs=self.reports, facts=self.facts)
            write_atomically(self.out / "metrics.json", msgspec.json.format(msgspec.json.encode(document)))
        # The state before the model: a folder with a model and no state can neither be resumed nor started anew.
        self._save_state()
        self._write_best()
        if self.log is not None:
            self.log.epoch(metrics, self._steps_done())
        self.accelerator.wait_for_everyone()
        return report

    def _validate(self) -> Metrics:
        """Metrics on validation requests; every process computes the same, so all agree on when to stop."""
        train, actions = self.config.train, self.vocabulary.actions
        limit = EVALUATION_BATCH if train.fit_validation else train.valid_requests
        requests = held_out_requests(self.data, self.positive, "valid", limit)
        parts = []
        for part in model_scores(self.model, self.data, requests):
            parts.append(part)
            self._stop_if_requested()
        scores = gather_scores(parts)
        # A target whose score is not a number ranks behind the whole catalogue.
        ranked = np.where(scores.ranks < self.data.num_items, scores.ranks, np.nan)
        for values in (scores.probabilities, ranked):
            self._require_finite(f"validation after step {self._steps_done()} gives scores that are no numbers", values)
        if train.fit_validation:  # those requests were trained on
            return Metrics(retrieval=None, ranking=None)
        metrics = metrics_of(scores, self.data, requests, actions)
        weights = zip(actions, train.weights_of(actions), strict=True)
        return metrics.trained_part(
            retrieval=train.retrieval_weight > 0,
            actions=[name for name, weight in weights if weight * train.ranking_weight > 0],
        )

    def _save_state(self) -> None:
        if self.accelerator.is_main_process:
            write_state(self.out, self.position, self.model, self.optimizer)


def _settings(config: RunConfig, data: Sequences, vocabulary: Vocabulary) -> dict[str, Any]:
    """Settings that must be the same when a run is resumed; its length, validation and log may change."""
    free = ("epochs", "patience", "valid_requests", "precision", "log_every")
    train = {name: value for name, value in msgspec.to_builtins(config.train).items() if name not in free}
    sizes = {"items": data.num_items, "events": len(data.rows), "slate items": len(data.slate_rows)}
    return {**msgspec.to_builtins(config.model), **train, **sizes, "data fingerprint": fingerprint(data, vocabulary)}


def _require_same(out: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in now if then.get(name) != now[name]]
    if changed:
        raise CheckpointError(
            f"{out}: the run was started with other settings or data: {'; '.join(changed)}; "
            "resume with the same ones, or start a new run with another --out"
        )


def _standardise(model: UniPinRec, data: Sequences) -> None:
    """Give the item embedder mean and spread of the dense features; a nearly constant feature keeps spread 1."""
    dense = data.features.dense
    if dense.shape[1]:
        mean, spread = dense.mean(axis=0, dtype=np.float64), dense.std(axis=0, dtype=np.float64)
        spread[spread <= 1e-6 * np.abs(mean)] = 1.0
        model.item_embedder.dense_mean.copy_(torch.from_numpy(mean))
        model.item_embedder.dense_std.copy_(torch.from_numpy(spread))


def batch_options(config: RunConfig) -> TrainBatchOptions:
    """Batch options of a run."""
    settings = {**msgspec.structs.asdict(config.train), "max_history": config.model.max_history}
    return msgspec.convert(settings, TrainBatchOptions)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; embeddings, norms, biases and scalars do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _learning_rate(train: TrainConfig, done: int, total: int) -> float:
    warm = min(1.0, (done + 1) / max(1, train.warmup_steps))
    if train.schedule == "constant":
        return train.learning_rate * warm
    cosine = 0.55 + 0.45 * math.cos(math.pi * min(1.0, done / max(1, total)))
    return train.learning_rate * warm * cosine


def _precision(train: TrainConfig) -> str:
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision fp16 needs a CUDA GPU, and there is none; use fp32, bf16 or auto")
    if train.precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return "no" if train.precision == "fp32" else train.precision
