"""What a run leaves to look at: `log.csv`, one row per step or every so many, and TensorBoard events on request."""

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
    """After one step.

    Attributes:
        epoch: Current epoch, from 0.
        step: Steps of the whole run that are done.
        losses: The losses of the step.
        learning_rate: That the step was made with.
        gradient_norm: Before clipping.
        events: Real history events in the batch, padding not counted.
    """

    epoch: int
    step: int
    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    events: int


class TrainLog:
    """Writes reports of one run; a run that goes on continues its files behind the step it goes on from."""

    def __init__(self, folder: Path, *, every: int, steps_done: int, tensorboard: bool) -> None:
        """Open the log of a run of which `steps_done` steps are done; a row is written for every `every` steps.

        Raises:
            CheckpointError: The rows to keep cannot be read or written.
            ConfigError: TensorBoard is wanted but not installed.
        """
        self.path, self.every = folder / LOG_FILE, every
        self.writer = _tensorboard(folder, steps_done) if tensorboard else None
        if self.path.exists():
            header, *rows = self._rows() or [[]]
            kept = [row for row in rows if len(row) == len(header) and int(row[1]) <= steps_done]
            text = io.StringIO()
            csv.writer(text).writerows([header, *kept] if kept else [])
            write_atomically(self.path, text.getvalue().encode())

    def _rows(self) -> list[list[str]]:
        try:
            with self.path.open(newline="") as file:
                return list(csv.reader(file))
        except OSError as error:
            raise CheckpointError(f"could not read {self.path}: {error}") from error

    def step(self, report: StepReport) -> None:
        """Note a step.

        Raises:
            CheckpointError: The row could not be written.
        """
        if report.step % self.every:
            return
        row = {
            "epoch": report.epoch,
            "step": report.step,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "events": report.events,
            **report.losses,
        }
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
        """Note what an epoch's validation measured; the checkpoint's metrics.json holds it in full."""
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
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - only where it is wanted
    except ImportError as error:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)
