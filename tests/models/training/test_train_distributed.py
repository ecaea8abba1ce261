"""Training by two processes on one machine, over the loopback interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from unipinrec.errors import CheckpointError
from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.data.schema import Dataset, write_dataset
from unipinrec.models.training.config import load_run_config
from unipinrec.models.training.train import Trainer

Make = Callable[..., Dataset]
T = 1_600_000_000_000  # a folder holds times of our days

WORKER = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from unipinrec.models.data.schema import read_dataset
from unipinrec.models.training.train import Trainer
from unipinrec.models.training.config import load_run_config
data, config, out = sys.argv[1:]
trainer = Trainer(read_dataset(Path(data)), load_run_config(config, {}), Path(out) / "run")
before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
steps = sum(1 for _ in trainer.run())
rank = os.environ["RANK"]
save_file(dict(trainer.model.state_dict()), Path(out) / f"after-{rank}.safetensors")
save_file(before, Path(out) / f"before-{rank}.safetensors")
(Path(out) / f"steps-{rank}").write_text(f"{trainer.accelerator.num_processes} {trainer.steps_per_epoch} {steps}")
torch.distributed.destroy_process_group()
"""


def _two_processes(dataset: Dataset, train: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    write_dataset(dataset, folder / "data")
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in train.items())
    (folder / "run.toml").write_text(f'size = "tiny"\n[train]\n{settings}\n')
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(folder / "worker.py")]
    command += [str(folder / "data"), str(folder / "run.toml"), str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("silent_head", [False, True])
def test_two_processes_train_one_model(
    random_dataset: Make, make_dataset: Make, tmp_path: Path, silent_head: bool
) -> None:
    """Also where a head has nothing to learn, in which case its parameters still have to reach the wrapper."""
    train: dict[str, Any] = {"epochs": 1, "batch_size": 4, "num_negatives": 4, "precision": "fp32"}
    dataset = random_dataset(7, users=16, slates=60, features=True, split=(T + 60, T + 80))
    if silent_head:
        train["mask_probability"] = 0.0
        events = [(f"u{u:02d}", "abcdef"[(u + t) % 6], "feed", None, "click") for u in range(20) for t in range(6)]
        dataset = make_dataset(events)
    later = pl.col("timestamp_ms") + T
    dataset = replace(dataset, events=dataset.events.with_columns(later), slates=dataset.slates.with_columns(later))
    folder = tmp_path / "two"
    _two_processes(dataset, train, folder)
    assert (folder / "steps-0").read_text() == (folder / "steps-1").read_text()
    processes, steps_per_epoch, reports = map(int, (folder / "steps-0").read_text().split())
    assert processes == 2
    assert steps_per_epoch >= 2
    assert reports == steps_per_epoch + 1
    first, second = (load_file(folder / f"after-{rank}.safetensors") for rank in range(2))
    before = load_file(folder / "before-0.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], before[name]) for name in first)
    kept = load_checkpoint(folder / "run").model.state_dict()
    assert all(torch.equal(kept[name], first[name]) for name in first)
    alone = load_run_config(str(folder / "run.toml"), {})
    with pytest.raises(CheckpointError, match="processes was 2, is 1; resume with the same ones"):
        Trainer(dataset, alone, folder / "run", resume=True)
