"""The wheel holds every module and nothing else, installs say what is missing, links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("export", "models", "runtime")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_sees_the_top_level_folder(folder: str) -> None:
    link = ROOT / "src/unipinrec" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder


def test_the_wheel_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    # A copy: setuptools would put stale modules of an earlier build/ into the wheel.
    leave_out = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=leave_out)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
    expected = {f"unipinrec/{path.name}" for path in (ROOT / "src/unipinrec").glob("*.py")} | {"unipinrec/py.typed"}
    expected |= {"unipinrec/runtime/page.html"}
    for folder in FOLDERS:
        expected |= {f"unipinrec/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    assert names == expected
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == ["click", "hnswlib", "ml_dtypes", "msgspec", "numpy", "rich", "safetensors"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("CXX", "no-such-compiler", "no C++ compiler was found"), ("PYTHON", "no-such-python", "needs the headers of")],
)
def test_an_install_says_what_is_missing(variable: str, value: str, message: str) -> None:
    command = ["make", "--silent", "compiler", *([f"PYTHON={value}"] if variable == "PYTHON" else [])]
    environment = {**os.environ, variable: value}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stdout
    assert "apt-get install" in done.stdout


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_module_has_its_line_in_the_documents() -> None:
    architecture, readme = (ROOT / "docs/architecture.md").read_text(), (ROOT / "README.md").read_text()
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            if path.name != "__init__.py":
                assert f"`{path.name}`" in architecture, path.name
                assert f"  {path.name} " in readme, path.name
