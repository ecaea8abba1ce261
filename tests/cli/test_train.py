from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import polars as pl
import pytest
from click.testing import CliRunner, Result

from unipinrec.cli import main
from unipinrec.cli.export import _print_report
from unipinrec.runtime import Bundle


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every subcommand, nested ones included."""
    found = []
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.mark.parametrize("words", commands(main), ids=" ".join)
def test_every_help_has_an_example(words: tuple[str, ...]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert f"unipinrec {' '.join(words)}" in result.stdout


def test_train_json_is_one_document(dataset: Path, tmp_path: Path) -> None:
    result = run("train", "--data", dataset, "--out", tmp_path / "ck", "--epochs", "1", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["checkpoint"] == str(tmp_path / "ck")
    assert [epoch["epoch"] for epoch in document["epochs"]] == [0]
    assert re.search(r"epoch 1  \d+ s  loss \d+\.\d+  HR@10 0\.\d+  AUC click 0\.\d+ save", result.stderr)
    again = run("train", "--data", dataset, "--out", tmp_path / "ck", "--epochs", "1")
    assert again.exit_code == 1
    assert "holds a run already; pass --resume" in again.stderr


def test_train_from_a_file(dataset: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('size = "tiny"\n[model]\nnum_layers = 1\n[train]\nepochs = 1\nbatch_size = 64\n')
    assert run("train", "--data", dataset, "--config", config, "--out", tmp_path / "ck").exit_code == 0
    written = json.loads((tmp_path / "ck/config.json").read_bytes())
    assert (written["model"]["num_layers"], written["model"]["hidden_size"]) == (1, 64)
    config.write_text("[train]\nepoch = 1\n")
    refused = run("train", "--data", dataset, "--config", config, "--out", tmp_path / "other")
    assert refused.exit_code == 1
    assert "unknown field `epoch`" in refused.stderr


def test_wrong_use_and_missing_data(tmp_path: Path) -> None:
    assert run("train", "--out", tmp_path).exit_code == 2
    missing = run("train", "--data", tmp_path / "none", "--out", tmp_path / "ck")
    assert missing.exit_code == 1
    assert "is not a prepared data set" in missing.stderr
    assert not (tmp_path / "ck").exists()


def test_a_dry_run_prints_the_cost_and_writes_nothing(dataset: Path, tmp_path: Path) -> None:
    table = run("train", "--data", dataset, "--dry-run")
    assert table.exit_code == 0, table.stderr
    for words in ("parameters, blocks", "FLOPs per example", "memory of a step"):
        assert words in table.stdout
    document = json.loads(run("train", "--data", dataset, "--dry-run", "--out", tmp_path / "ck", "--json").stdout)
    assert document["parameters"]["total"] > document["parameters"]["blocks"] == 107008
    assert not (tmp_path / "ck").exists()
    missing = run("train", "--data", dataset)
    assert missing.exit_code == 2
    assert "give --out, the checkpoint folder to write, or --dry-run" in missing.stderr


def test_training_warns_before_the_first_epoch_and_in_a_dry_run(dataset: Path, tmp_path: Path) -> None:
    said = "warning: training ends after 5 steps, inside its warm-up of 50: it never reaches its learning rate; train"
    trained = run("train", "--data", dataset, "--out", tmp_path / "ck", "--epochs", "1")
    assert trained.exit_code == 0, trained.stderr
    assert trained.stderr.index(said) < trained.stderr.index("epoch 1 ")
    dry = run("train", "--data", dataset, "--dry-run", "--epochs", "1", "--json")
    assert said in dry.stderr
    [warning] = json.loads(dry.stdout)["warnings"]
    assert f"warning: {warning}\n" in dry.stderr
    assert run("train", "--data", dataset, "--dry-run", "--epochs", "11").stderr == ""


def test_ctrl_c_leaves_a_state_to_resume_from(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "ck"
    train = [sys.executable, "-m", "unipinrec", "train", "--data", str(dataset), "--out", str(out)]
    with subprocess.Popen([*train, "--epochs", "200"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 1 "):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 1
    assert "stopping after this step" in rest
    assert "go on with --resume" in rest
    assert "Traceback" not in rest
    resumed = run("train", "--data", dataset, "--out", out, "--resume", "--epochs", "2", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert [epoch["epoch"] for epoch in json.loads(resumed.stdout)["epochs"]][:1] == [0]


def test_a_run_that_is_done_says_so(dataset: Path, tmp_path: Path) -> None:
    train = ("train", "--data", dataset, "--out", tmp_path / "ck")
    assert run(*train, "--epochs", "2").exit_code == 0
    again = run(*train, "--resume", "--epochs", "1")
    assert again.exit_code == 0
    assert again.stdout == ""
    assert again.stderr == "already finished: 2 epochs are done\n"
    longer = run(*train, "--resume", "--epochs", "3")
    assert "already finished" not in longer.stderr
    assert "epoch 3 " in longer.stderr


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_evaluate_needs_a_request(checkpoint: Path, dataset: Path, limit: str) -> None:
    refused = run("evaluate", checkpoint, "--data", dataset, "--limit", limit)
    assert refused.exit_code == 2
    assert f"{limit} is not in the range x>=1" in refused.stderr


def test_evaluate_of_engagements_alone(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    engagements = tmp_path / "data"
    shutil.copytree(dataset, engagements, ignore=shutil.ignore_patterns("oracle*"))
    slates = pl.read_parquet(engagements / "slates.parquet")
    slates.clear().write_parquet(engagements / "slates.parquet")
    result = run("evaluate", checkpoint, "--data", engagements)
    assert result.exit_code == 0, result.stderr
    assert "HR@10" in result.stdout
    assert "auc" not in result.stdout
    spec = json.loads((engagements / "dataset.json").read_bytes())
    spec["split"]["valid_start_ms"] = spec["split"]["test_start_ms"]
    (engagements / "dataset.json").write_text(json.dumps(spec))
    refused = run("evaluate", checkpoint, "--data", engagements, "--split", "valid")
    assert refused.exit_code == 1
    assert "nothing to measure in the valid part: no positive event of that part" in refused.stderr


def test_export_refuses_what_exists(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    refused = run("export", checkpoint, bundle)
    assert refused.exit_code == 1
    assert "exists; a bundle is never overwritten" in refused.stderr
    missing = run("export", tmp_path, tmp_path / "bundle")
    assert missing.exit_code == 1
    assert "pass a folder that `unipinrec train` wrote" in missing.stderr


def test_the_name_of_a_bundle_is_no_markup(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _print_report(Path("b[v2]/[/b]"), Bundle.open(bundle).manifest, 1.0)
    assert "b[v2]/[/b]: 300 items, " in capsys.readouterr().out


def test_export_json(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    asked = ("--data", dataset, "--users", "5", "--precision", "fp32", "--precision", "bf16", "--json")
    result = run("export", checkpoint, tmp_path / "bundle", *asked)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["parity"]["max_abs_diff"] < 1e-4
    assert list(document["precisions"]) == ["bf16"]
    assert document["precisions"]["bf16"]["agreement"]["problem"] is None
    assert set(document["precisions"]["bf16"]["auc_change"]) == {"click", "save", "share", "hide"}
    users = json.loads((tmp_path / "bundle/user_ids.json").read_bytes())
    assert len(users) == 5
    served = run("recommend", tmp_path / "bundle", "--user", users[4], "-k", "3", "--json")
    assert len(json.loads(served.stdout)["items"]) == 3


def test_demo_names_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    result = run("demo", "--data", tmp_path, "--out", tmp_path / "demo")
    assert result.exit_code == 1
    assert "holds none of dataset.json, u.data" in result.stderr


SPINNING = """
import time
from unipinrec.cli import main
main(["train", "--help"], standalone_mode=False)
import torch
torch.set_num_threads(2)
values, spent = torch.ones(1_000_000), 0.0
for _ in range(20):
    values.exp()
    before = time.process_time()
    time.sleep(0.02)
    spent += time.process_time() - before
print(spent)
"""


def test_waiting_threads_leave_their_core_to_others() -> None:
    """By default OpenMP's threads spin after each piece of work; then .2 s of processor time are spent asleep here."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", SPINNING], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 0.05
