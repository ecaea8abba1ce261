"""The log of a run: `log.csv`, one row every few steps, and TensorBoard events on request."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from unipinrec.errors import CheckpointError, ConfigError
from unipinrec.models.checkpoint import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from unipinrec.models.metrics import Metrics

LOG_FILE = "log.csv"


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of one step.

    Attributes:
        epoch: Current epoch, from 0.
        step: Number of steps since the start of the run.
        losses: Losses of the step.
        learning_rate: Learning rate of the step.
        gradient_norm: Norm before clipping.
        events: History events in the batch, without padding.
    """

    epoch: int
    step: int
    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    events: int


class TrainLog:
    """Writes the reports of one run; a resumed run continues the files after its last saved step."""

    def __init__(self, folder: Path, *, every: int, steps_done: int, tensorboard: bool) -> None:
        """Open the log of a run after `steps_done` steps; writes a row every `every` steps.

        Raises:
            CheckpointError: The earlier rows cannot be read or written.
            ConfigError: TensorBoard is not installed.
        """
        self.path, self.every = folder / LOG_FILE, every
        self.writer = _tensorboard(folder, steps_done) if tensorboard else None
        if self.path.exists():
            try:
                with self.path.open(newline="") as file:
                    header, *rows = list(csv.reader(file)) or [[]]
            except OSError as error:
                raise CheckpointError(f"could not read {self.path}: {error}; move it away to go on") from error
            kept = [row for row in rows if len(row) == len(header) and int(row[1]) <= steps_done]
            text = io.StringIO()
            csv.writer(text).writerows([header, *kept] if kept else [])
            write_atomically(self.path, text.getvalue().encode())

    def step(self, report: StepReport) -> None:
        """Write a step.

        Raises:
            CheckpointError: The row could not be written.
        """
        if report.step % self.every:
            return
        row = msgspec.structs.asdict(report)
        row |= row.pop("losses")
        try:
            fresh = not self.path.exists() or not self.path.stat().st_size
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows([list(row), list(row.values())] if fresh else [list(row.values())])
        except OSError as error:
            raise CheckpointError(
                f"could not write {self.path}: {error}; make room and go on with --resume from the last saved state"
            ) from error
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(f"train/{name}", value, report.step)

    def epoch(self, metrics: Metrics, step: int) -> None:
        """Write the validation metrics of an epoch; the checkpoint's metrics.json holds all of them."""
        if self.writer is None:
            return
        if metrics.retrieval is not None:
            self.writer.add_scalar("valid/hit_rate_10", metrics.retrieval.hit_rate[10], step)
            self.writer.add_scalar("valid/ndcg_10", metrics.retrieval.ndcg[10], step)
        for action, measured in (metrics.ranking or {}).items():
            if measured.auc is not None:
                self.writer.add_scalar(f"valid/auc_{action}", measured.auc, step)
        self.writer.flush()


def _tensorboard(folder: Path, steps_done: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)
