"""A release holds what it should, byte for byte the same each time, and installs on every Python that is supported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from answers import STORED

from unipinrec.runtime import Recommender

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent  # uv is beside the interpreter
PACKAGES = ("export/", "models/", "runtime/", "src/unipinrec/")
METADATA = ("PKG-INFO", "setup.cfg")
PYTHONS = ("3.11", "3.12", "3.13")
RECOMMEND = """
import sys
from unipinrec.runtime import Recommender
with Recommender.load(sys.argv[1], "cpu") as recommender:
    user, _ = recommender.bundle.sample_users(1)[0]
    print(*(item.item for item in recommender.recommend(recommender.bundle.user_events(user), 5).items))
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_200)]


def ran(*words: str | Path, folder: Path | None = None) -> str:
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2_000:]
    return done.stdout


@pytest.fixture(scope="module")
def commit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository that git does not ignore, as a commit."""
    folder = tmp_path_factory.mktemp("commit") / "unipinrec"
    for name in ran("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT).splitlines():
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    ran("git", "init", "--quiet", folder=folder)
    save(folder)
    return folder


def save(folder: Path) -> None:
    ran("git", "add", "--all", folder=folder)
    ran("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "all", folder=folder)


@pytest.fixture(scope="module")
def release(commit: Path) -> Path:
    ran(".ci/release", folder=commit)
    return commit / "dist"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_sdist_holds_the_package_and_nothing_else(commit: Path, release: Path) -> None:
    tracked = ran("git", "ls-files", folder=commit).splitlines()
    files = {name for name in tracked if name.startswith(PACKAGES) and (commit / name).is_file()}
    assert len(files) > 150
    assert {"src/unipinrec/py.typed", "runtime/server/page.html"} <= files
    with tarfile.open(only(release, "*.tar.gz")) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}
        assert {member.uid for member in archive.getmembers()} == {0}
    names = {name for name in names if not name.startswith("unipinrec.egg-info/")}
    links = {name for name in files if (commit / name).is_symlink()}
    assert names == {*(files - links), *METADATA, "LICENSE", "README.md", "pyproject.toml"}


def test_the_wheel_holds_the_same_modules(release: Path) -> None:
    with tarfile.open(only(release, "*.tar.gz")) as archive:
        sources = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    expected = {f"unipinrec/{name.removeprefix('src/unipinrec/')}" for name in sources if name.startswith(PACKAGES)}
    with zipfile.ZipFile(only(release, "*.whl")) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    extra = {PurePosixPath(name).name for name in names if ".dist-info/" in name}
    assert {"LICENSE", "METADATA", "entry_points.txt"} <= extra


def test_checksums_and_notes_are_those_of_the_release(commit: Path, release: Path) -> None:
    assert ran("sha256sum", "--check", "--strict", "SHA256SUMS", folder=release).count(": OK") == 3
    title, *notes = (release / "RELEASE_NOTES.md").read_text().split("\n", 1)
    assert title.startswith("# unipinrec 0.")
    assert notes[0].strip()
    assert notes[0].strip() in (commit / "CHANGELOG.md").read_text()
    assert "\n## " not in notes[0]


def test_the_same_commit_gives_the_same_bytes(commit: Path, release: Path, tmp_path: Path) -> None:
    ran("git", "clone", "--quiet", commit, tmp_path / "again")
    ran("sh", "-c", "umask 077; .ci/release", folder=tmp_path / "again")
    assert (tmp_path / "again/dist/SHA256SUMS").read_text() == (release / "SHA256SUMS").read_text()


def test_a_version_has_its_own_section_and_is_refused_without(commit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tagged"
    ran("git", "clone", "--quiet", commit, folder)
    version = folder / "src/unipinrec/__init__.py"
    version.write_text(version.read_text().rpartition("__version__")[0] + '__version__ = "0.1.0"\n')
    assert "not committed" in refused(folder)
    save(folder)
    assert "no section '## 0.1.0'" in refused(folder)
    sections = "# Changelog\n\n## Unreleased\n\n- Later.\n\n## 0.1.0 - 2026-12-24\n\n- One.\n\n## 0.0.9\n\n- Before.\n"
    (folder / "CHANGELOG.md").write_text(sections)
    save(folder)
    ran(".ci/release", folder=folder)
    assert (folder / "dist/RELEASE_NOTES.md").read_text() == "# unipinrec 0.1.0\n\n- One.\n"


def refused(folder: Path) -> str:
    done = subprocess.run([".ci/release"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


def interpreter(version: str) -> Path:
    """A Python of this version that runs, from PATH or pyenv; skips where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = shutil.which(f"python{version}")
    for path in [*([Path(named)] if named else []), *sorted(pyenv.glob(f"{version}.*/bin/python3"))]:
        answer = subprocess.run([path, "-c", "import venv"], capture_output=True, check=False)
        if answer.returncode == 0:
            return path
    pytest.skip(f"there is no Python {version} in PATH or {pyenv}")


@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_recommends_on_every_python(release: Path, version: str, tmp_path: Path) -> None:
    python = interpreter(version)
    ran("uv", "--no-config", "venv", "--quiet", "--python", python, tmp_path / "v")
    install = ("uv", "--no-config", "pip", "install", "--quiet", "--python", tmp_path / "v/bin/python")
    ran(*install, f"{only(release, '*.whl')}[cpu,serve]")
    program = tmp_path / "v/bin/unipinrec"
    assert ran(tmp_path / "v/bin/python", "--version").startswith(f"Python {version}.")
    assert ran(program, "--version").split()[-1] in only(release, "*.whl").name
    assert json.loads(ran(program, "verify", STORED, "--device", "cpu", "--json"))["ok"]
    with Recommender.load(STORED, "cpu") as recommender:
        user, _ = recommender.bundle.sample_users(1)[0]
        expected = [item.item for item in recommender.recommend(recommender.bundle.user_events(user), 5).items]
    assert ran(tmp_path / "v/bin/python", "-c", RECOMMEND, STORED).split() == expected
