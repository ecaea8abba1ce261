"""The wheel holds every module and nothing else, installs say what is missing, links lead somewhere."""

from __future__ import annotations

import ast
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
    sources = ROOT / "src/unipinrec"
    expected = {f"unipinrec/{path.relative_to(sources)}" for path in [*sources.glob("*.py"), *sources.glob("cli/*.py")]}
    expected |= {"unipinrec/py.typed", "unipinrec/runtime/server/page.html"}
    for folder in FOLDERS:
        expected |= {f"unipinrec/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert len(expected) > 150
    assert names == expected
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == ["click", "ml_dtypes", "msgspec", "numpy", "rich", "safetensors"]


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


FAKE_PYTHON = """#!/bin/sh
[ "$2" = venv ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\necho "$@" >> "%s/arguments"\n' "$3" > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.mark.parametrize(("compiler", "indexed"), [("true", True), ("no-such-compiler", False)])
def test_an_install_without_a_compiler_leaves_only_the_index_out(tmp_path: Path, compiler: str, indexed: bool) -> None:
    python, venv = tmp_path / "python", tmp_path / "venv"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    command = ["make", "--silent", "install", f"PYTHON={python}", f"VENV={venv}"]
    environment = {**os.environ, "CXX": compiler}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    arguments = (venv / "arguments").read_text()
    assert ".[cpu,train,serve,dev]" in arguments
    assert (".[hnsw]" in arguments, "WITHOUT hnswlib" in done.stdout) == (indexed, not indexed)


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def rooms() -> list[Path]:
    """Every package, as a folder."""
    inits = [path for folder in (*FOLDERS, "src/unipinrec/cli") for path in (ROOT / folder).rglob("__init__.py")]
    return [path.parent for path in inits]


def test_every_room_lists_its_files_and_stands_in_the_architecture() -> None:
    architecture = (ROOT / "docs/architecture.md").read_text()
    assert len(rooms()) > 15
    for room in rooms():
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
        listed = set(re.findall(r"^(\w+\.py) ", said, re.MULTILINE))
        assert listed == {path.name for path in room.glob("*.py")} - {"__init__.py"}, room
        assert f"`{room.relative_to(ROOT)}/`" in architecture, room
