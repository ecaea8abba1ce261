from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from answers import STORED

from unipinrec.errors import BackendError, BundleCorruptError
from unipinrec.runtime import Bundle, Recommender
from unipinrec.runtime.bundle.files import fingerprint
from unipinrec.runtime.bundle.sealed import NOEXEC, SEALS, SealedFiles

OPEN = """
import os, sys
from pathlib import Path
from unipinrec.runtime import Bundle
bundle = Bundle.open(sys.argv[1], Path(sys.argv[2]))
print(os.stat(bundle.files["items.safetensors"]).st_ino, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    for name in ("one", "two"):
        (tmp_path / "folder" / name).write_text(f"content of {name}")
    return tmp_path / "folder"


def sealed(folder: Path, shared: Path | None = None) -> SealedFiles:
    return SealedFiles(folder, {path.name: fingerprint(path) for path in folder.iterdir()}, shared)


def inode(files: SealedFiles, name: str) -> int:
    return Path(files[name]).stat().st_ino


def test_nobody_can_change_a_sealed_file(folder: Path) -> None:
    file = sealed(folder)["one"]
    assert fcntl.fcntl(file.descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
    with Path(file).open("r+b", buffering=0) as opened:
        with pytest.raises(PermissionError):
            opened.write(b"x")
        for size in (0, 1_000):
            with pytest.raises(PermissionError):
                opened.truncate(size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(file.descriptor, fcntl.F_ADD_SEALS, 0)
    assert file.read_bytes() == b"content of one"
    assert str(file) == str(folder / "one")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "one is missing"),
        (fifo, "one is missing"),
        (lambda path: path.write_text("short"), "one is truncated or altered: 5 bytes, expected 14"),
        (lambda path: path.write_text("content of ONE"), "one is altered: its sha256 is "),
        (lambda path: path.with_name("two").rename(path), "one is altered: its sha256 is .*; two is missing"),
    ],
)
def test_what_is_damaged_is_not_sealed(folder: Path, damage: Callable[[Path], object], told: str) -> None:
    specs = {path.name: fingerprint(path) for path in folder.iterdir()}
    damage(folder / "one")
    with pytest.raises(BundleCorruptError, match=rf"^{folder}: {told}.*; copy the bundle again, or export it again$"):
        SealedFiles(folder, specs)


def test_a_file_that_changes_while_it_is_copied_is_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def overtaken(source: Path, target: os.PathLike[str]) -> None:
        (folder / "one").write_text("content of ONE")
        copy(source, target)

    specs = {path.name: fingerprint(path) for path in folder.iterdir()}
    monkeypatch.setattr("unipinrec.runtime.bundle.sealed.shutil.copyfile", overtaken)
    with pytest.raises(BundleCorruptError, match="one is altered"):
        SealedFiles(folder, specs)


def test_what_was_let_go_is_read_and_checked_again(folder: Path) -> None:
    files = sealed(folder)
    before = {name: files[name].descriptor for name in ("one", "two")}
    files.let_go(["two"])
    gc.collect()
    assert files["two"].descriptor == before["two"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(before["one"])
    assert files["one"].read_bytes() == b"content of one"
    files.let_go(["two"])
    (folder / "one").write_text("content of ONE")
    with pytest.raises(BundleCorruptError, match="one is altered"):
        files["one"]


def test_private_copies_lie_together_and_go(folder: Path) -> None:
    files = sealed(folder)
    one, two = files.unpacked(["one", "two"]).values()
    assert (one.parent, one.name, one.read_text()) == (two.parent, "one", "content of one")
    assert oct(one.parent.stat().st_mode)[-3:] == "700"
    assert files.unpacked(["one"]) == {"one": one}
    files.let_go([])
    assert not one.parent.exists()
    (again,) = files.unpacked(["one"]).values()
    del files
    gc.collect()
    assert not again.parent.exists()


def test_no_room_for_private_copies(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(BackendError, match=r"cannot be copied to a private folder .*gone.*; set TMPDIR"):
        sealed(folder).unpacked(["one"])


def test_files_in_one_process_with_a_shared_folder_are_held_once(folder: Path, tmp_path: Path) -> None:
    first, second, alone = sealed(folder, tmp_path), sealed(folder, tmp_path), sealed(folder)
    assert inode(first, "one") == inode(second, "one") != inode(alone, "one")
    del first
    gc.collect()
    assert second["one"].read_bytes() == b"content of one"
    assert len(list(tmp_path.glob("*.sealed"))) == 1
    del second
    gc.collect()
    assert list(tmp_path.glob("*.sealed")) == []


@pytest.mark.parametrize("offer", ["gone", "unsealed", "other", "nonsense", "pipe", "process"])
def test_an_offer_is_proved_before_it_is_taken(folder: Path, tmp_path: Path, offer: str) -> None:
    digest = hashlib.sha256(b"content of one").hexdigest()
    other = sealed(folder)["two"]
    unsealed, pipe = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING), os.pipe()
    os.write(unsealed, b"content of one")
    numbers = {"gone": 9_999, "unsealed": unsealed, "other": other.descriptor, "pipe": pipe[0], "process": 3}
    pid = 2**22 + 1 if offer == "process" else os.getpid()
    note = b"{" if offer == "nonsense" else msgspec.json.encode({digest: numbers[offer]})
    (tmp_path / f"{pid}-1.sealed").write_bytes(note)
    files = sealed(folder, tmp_path)
    assert files["one"].read_bytes() == b"content of one"
    assert inode(files, "one") not in {os.fstat(unsealed).st_ino, os.fstat(other.descriptor).st_ino}
    for descriptor in (unsealed, *pipe):
        os.close(descriptor)


def test_processes_hold_items_once_and_one_that_dies_takes_nothing_along(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN, str(STORED), str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    held = {int(process.stdout.readline()) for process in processes if process.stdout}
    assert len(held) == 1
    processes[0].kill()
    processes[0].wait()
    with Recommender.load(Bundle.open(STORED, tmp_path), "cpu") as late:
        assert inode(late.bundle.files, "items.safetensors") in held
    for process in processes:
        with suppress(BrokenPipeError):
            process.communicate()


def test_a_recommender_holds_what_it_reads_while_it_serves() -> None:
    with Recommender.load(STORED, "cpu") as recommender:
        held = set(recommender.bundle.files._files)
        assert held == {"items.safetensors", "golden.safetensors", "users.safetensors", "user_ids.json"}
        assert recommender.bundle.files._unpacked == {}


def test_a_system_that_allows_only_files_that_cannot_be_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that knows no such files."""
    make = os.memfd_create

    def hardened(name: str, flags: int) -> int:
        if not flags & NOEXEC:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return make(name, flags & ~NOEXEC)

    def older(name: str, flags: int) -> int:
        if flags & NOEXEC:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return make(name, flags)

    for system in (hardened, older):
        monkeypatch.setattr(os, "memfd_create", system)
        assert sealed(folder)["one"].read_bytes() == b"content of one"


def test_no_memory_for_a_bundle_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", full)
    with pytest.raises(BundleCorruptError, match="one cannot be read into memory: Too many open files"):
        sealed(folder)
