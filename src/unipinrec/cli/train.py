"""`unipinrec train`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from unipinrec.cli.common import (
    any_path,
    data_option,
    handled,
    json_command,
    print_json,
    progress,
    stderr,
    stdout,
    warn,
)

if TYPE_CHECKING:
    from unipinrec.models.training.config import RunConfig
    from unipinrec.models.training.train import EpochReport, Trainer


@click.command(epilog="Example: unipinrec train --data data/ --config tiny --out checkpoint/ --epochs 10")
@data_option
@click.option("--config", default="tiny", help="Settings of model and training: tiny, small, paper, or a TOML file.")
@click.option("--out", type=any_path, help="The checkpoint folder to write.")
@click.option("--dry-run", is_flag=True, help="Print parameters, FLOPs and memory; train and write nothing.")
@click.option("--resume", is_flag=True, help="Resume the run in --out.")
@click.option("--epochs", type=int, help="Overrides --config, as do the next four options.")
@click.option("--batch-size", type=int, help="Windows per training step.")
@click.option("--learning-rate", type=float, help="Highest learning rate, after warm-up.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="Precision of the computation.")
@click.option("--seed", type=int, help="Seed of all random numbers.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events beside log.csv.")
@json_command
def train(
    *,
    data: Path,
    config: str,
    out: Path | None,
    dry_run: bool,
    resume: bool,
    tensorboard: bool,
    as_json: bool,
    **overrides: Any,
) -> None:
    """Train a model. Ctrl-C or SIGTERM stops after the current step; --resume continues from there.

    The checkpoint folder holds log.csv (a row per ten steps) and metrics.json (an entry per epoch).
    For several GPUs: torchrun --nproc-per-node 4 -m unipinrec train ...
    """
    from unipinrec.models.data.schema import read_dataset
    from unipinrec.models.training.config import load_run_config
    from unipinrec.models.training.train import Trainer

    run_config = load_run_config(config, overrides)
    if dry_run:
        _print_cost(data, run_config, as_json)
        return
    if out is None:
        raise click.UsageError("give --out, the checkpoint folder to write, or --dry-run")
    trainer = Trainer(read_dataset(data), run_config, out, resume=resume, tensorboard=tensorboard)
    for warning in trainer.warnings if trainer.accelerator.is_main_process and not trainer.finished else []:
        warn(warning)
    with handled(lambda *_: _request_stop(trainer), signal.SIGINT, signal.SIGTERM):
        last = _follow(trainer)
    if as_json and trainer.accelerator.is_main_process:
        print_json({"checkpoint": str(out), "epochs": trainer.reports})
    elif last is not None:
        stderr.print(f"checkpoint: {out}")


def _print_cost(data: Path, config: RunConfig, as_json: bool) -> None:
    from unipinrec.models.data.schema import read_dataset
    from unipinrec.models.training.cost import training_cost

    cost = training_cost(read_dataset(data), config)
    for warning in cost.warnings:
        warn(warning)
    if as_json:
        print_json(cost)
        return
    table = Table("training would take", "")
    for part, count in cost.parameters.items():
        table.add_row(f"parameters, {part}", f"{count:,}")
    table.add_row("windows", f"{cost.windows:,}, {cost.events_per_window:.1f} events each on average")
    table.add_row("steps per epoch", f"{cost.steps_per_epoch:,}, {cost.padding:.1%} of the event slots padded")
    example = f"{cost.example_events} events, {cost.example_candidates} candidates"
    table.add_row(f"FLOPs per example ({example})", f"{cost.flops_per_example / 1e9:.3g} G")
    table.add_row("memory: weights, gradients, AdamW", f"{cost.state_bytes / 2**20:,.1f} MiB")
    table.add_row("memory: activations per example", f"{cost.activation_bytes_per_example / 2**20:,.1f} MiB")
    table.add_row("memory of a step", f"{cost.step_bytes / 2**20:,.1f} MiB")
    stdout.print(table)


def _request_stop(trainer: Trainer) -> None:
    """The first signal: stop after the step. The second: stop at once, without its state."""
    if trainer.stop_requested:
        raise KeyboardInterrupt
    trainer.stop_requested = True
    stderr.print("stopping after this step ...")


def _follow(trainer: Trainer) -> EpochReport | None:
    from unipinrec.models.training.train import EpochReport

    last = None
    if trainer.finished and trainer.accelerator.is_main_process:
        stderr.print(f"already finished: {trainer.position.epoch} epochs are done", highlight=False)
    with progress() as bar:
        bar.disable = not trainer.accelerator.is_main_process or trainer.finished
        task = bar.add_task("train", total=trainer.total_steps, note="")
        for report in trainer.run():
            if isinstance(report, EpochReport):
                last = report
                if not bar.disable:
                    bar.console.print(_epoch_line(report), highlight=False, soft_wrap=True)
            else:
                note = f"epoch {report.epoch + 1} loss {report.losses['loss']:.3f}"
                bar.update(task, completed=report.step, note=note)
    return last


def _epoch_line(report: EpochReport) -> str:
    parts = [f"epoch {report.epoch + 1}", f"{report.seconds:.0f} s", f"loss {report.losses['loss']:.3f}"]
    if report.metrics.retrieval:
        parts.append(f"HR@10 {report.metrics.retrieval.hit_rate[10]:.4f}")
    ranking = (report.metrics.ranking or {}).items()
    if aucs := [f"{name} {metrics.auc:.3f}" for name, metrics in ranking if metrics.auc is not None]:
        parts.append("AUC " + " ".join(aucs))
    return "  ".join([*parts, *["best"] * report.best])
