from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BLOCK = """
import sys

TRAINING = ("torch", "polars", "onnx", "onnxscript", "accelerate")
SERVER = ("starlette", "uvicorn", "prometheus_client", "opentelemetry", "redis", "huggingface_hub")


class Block:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in TRAINING:
            raise ModuleNotFoundError(f"{name} is not part of a serving installation", name=root)


sys.meta_path.insert(0, Block())
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_block_blocks() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK + "import torch"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "torch is not part of a serving installation" in done.stderr


def test_serving_imports_nothing_of_training() -> None:
    run(
        "import unipinrec.runtime, unipinrec.cli\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {*TRAINING, 'onnxruntime', 'openvino', 'hnswlib', *SERVER}, loaded\n"
        "ours = {name for name in sys.modules if name.startswith('unipinrec.')}\n"
        "assert 'unipinrec.runtime.recommender' in ours\n"
        "assert not any(name.startswith(('unipinrec.models', 'unipinrec.export')) for name in ours), ours\n"
    )


def test_the_runtime_is_imported_in_a_moment() -> None:
    """In processor time, of which it needs 0.2 s: other work on the machine does not count."""
    code = "import time; began = time.process_time(); import unipinrec.runtime; print(time.process_time() - began)"
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    assert min(float(each.stdout) for each in done) < 0.6


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_a_bundle_is_served_without_torch(bundle: Path, device: str) -> None:
    if find_spec(device.replace("cpu", "onnxruntime")) is None:
        pytest.skip(f"{device} is not installed")
    printed = run(
        "from unipinrec.cli import main\n"
        "import json, pathlib\n"
        "user = json.loads(pathlib.Path(sys.argv[1], 'user_ids.json').read_text())[0]\n"
        "main(['recommend', sys.argv[1], '--user', user, '-k', '3', '--json', '--device', sys.argv[2]])\n",
        str(bundle),
        device,
    )
    assert '"retrieval_score"' in printed


def test_items_are_added_and_retired_without_torch(bundle: Path, tmp_path: Path) -> None:
    item = {"item": "late", "dense": {"content": [0.5] * 16, "log_duration": [2.0]}}
    (tmp_path / "items.json").write_text(json.dumps([item]))
    (tmp_path / "gone.txt").write_text("item-3")
    words = ("index", bundle, "--out", tmp_path / "new", "--add", tmp_path / "items.json", "--json")
    code = "from unipinrec.cli import main\nmain(sys.argv[1:])\n"
    printed = run(code, *map(str, (*words, "--retire", tmp_path / "gone.txt")))
    assert '"items_after": 300' in printed


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--data", "data", "--out", "out"),
        ("evaluate", "checkpoint", "--data", "data"),
        ("export", "checkpoint", "bundle"),
        ("prepare", "simulate", "--out", "data"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_needs_training_says_how_to_get_it(words: tuple[str, ...], tmp_path: Path) -> None:
    code = BLOCK + "from unipinrec.cli import main\nmain(sys.argv[1:])\n"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "which is an extra; run pip install 'unipinrec[cpu,train]'" in done.stderr
    assert "Traceback" not in done.stderr
