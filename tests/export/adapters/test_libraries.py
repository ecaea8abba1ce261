"""The libraries themselves, each beside this environment: oldest and newest transformers, and RecTools.

RecTools needs a numpy below 2. torch is that of this environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unipinrec.export.adapters.sasrec import source_from_sasrec
from unipinrec.export.bundle_writer import export_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[3]
UV = str(Path(sys.executable).with_name("uv"))
FITTED = """
import sys
import torch
from pathlib import Path
from rectools.models import SASRecModel
from unipinrec.export.adapters.sasrec import source_from_sasrec

for path in map(Path, sys.argv[1:]):
    fitted, stored = source_from_sasrec(SASRecModel.load_from_checkpoint(path)), source_from_sasrec(path)
    assert fitted.model == stored.model and fitted.item_ids == stored.item_ids
    theirs, ours = fitted.module.state_dict(), stored.module.state_dict()
    assert len(theirs) > 10 and theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert torch.equal(fitted.module.items, stored.module.items)
"""


def beside(folder: Path, *requirements: str) -> dict[str, str]:
    """The variables of a process that finds these packages before those of this environment."""
    (folder / "none.txt").write_text("torch; sys_platform == 'none'\n")
    install = [UV, "--no-config", "--quiet", "pip", "install", "--python", sys.executable, "--no-cache"]
    target = ["--target", str(folder / "packages"), "--overrides", str(folder / "none.txt")]
    subprocess.run([*install, *target, *requirements], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "packages"), str(ROOT / "src")])}


def run(*arguments: str | Path, env: dict[str, str]) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3_000:]
    return done.stdout


@pytest.mark.parametrize("version", ["==4.48.0", ""])
def test_decoders_of_transformers(version: str, tmp_path: Path) -> None:
    environment = beside(tmp_path, f"transformers{version}")
    tests = ROOT / "tests" / "export" / "adapters" / "test_hugging_face.py"
    printed = run(
        "-m", "pytest", "-q", "-rP", "--show-capture=stdout", "-p", "no:cacheprovider", tests, env=environment
    )
    print(printed)
    assert "20 passed" in printed
    assert "skipped" not in printed


def test_models_that_rectools_trains_now(differences: Any, tmp_path: Path) -> None:
    environment = beside(tmp_path, "rectools[torch]")
    models = tmp_path / "models"
    run(ROOT / "tests" / "fixtures" / "make_sasrec.py", models, "--users", "100", "--whole", env=environment)
    run("-c", FITTED, *sorted(models.glob("*.ckpt")), env=environment)
    for variant in ("default", "categories", "cosine", "masked"):
        source, stored = (
            source_from_sasrec(models / f"{variant}.ckpt"),
            json.loads((models / f"{variant}.json").read_text()),
        )
        export_bundle(source, tmp_path / variant)
        histories = [one[-source.model.max_history :] for one in stored["histories"]]
        found = differences(tmp_path / variant, histories, stored["scores"])
        print(variant, found)
        assert {way: same for way, (_, same) in found.items()} == {"fresh": 100, "http": 100}
        assert max(largest for largest, _ in found.values()) < 1e-4
