from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from answers import STORED

from unipinrec.errors import BackendError, BundleCorruptError
from unipinrec.runtime import Bundle, Recommender
from unipinrec.runtime.bundle import sealed as sealed_files
from unipinrec.runtime.bundle.integrity import fingerprint
from unipinrec.runtime.bundle.sealed import NOEXEC, SEALS, GraphFile, SealedFiles

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
    make = os.memfd_create

    def overtaken(name: str, flags: int) -> int:
        (folder / "one").write_text("content of ONE")
        return make(name, flags)

    specs = {path.name: fingerprint(path) for path in folder.iterdir()}
    monkeypatch.setattr(os, "memfd_create", overtaken)
    with pytest.raises(BundleCorruptError, match=r"one is (altered|truncated)"):
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
    (folder / "graph").write_text("it names one, and nothing else")
    graph = sealed(folder).graph("graph")
    assert set(graph.weights) == {"one"}
    with graph.in_folder() as path:
        assert (path.name, path.read_bytes()) == ("graph", graph.content)
        assert (path.parent / "one").read_text() == "content of one"
        assert oct(path.parent.stat().st_mode)[-3:] == "700"
    assert not path.parent.exists()
    assert GraphFile.at(folder / "graph").weights == {"one": folder / "one"}


def test_no_room_for_private_copies(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with (
        pytest.raises(BackendError, match=r"^one cannot be copied to a private folder .*: No such .*; set TMPDIR"),
        sealed(folder).graph("one").in_folder(),
    ):
        pytest.fail("there is a folder")


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


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EFBIG])
def test_no_memory_for_a_bundle_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "memfd_create", full)
    told = rf"(one|two): 14 bytes cannot be held in memory: {os.strerror(code)}; allow this process more memory"
    with pytest.raises(BackendError, match=told):
        sealed(folder)


def test_without_proc_it_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sealed_files, "OWN_FILES", tmp_path / "proc")
    with pytest.raises(BackendError, match="proc is missing, but bundles are read through it; mount /proc"):
        sealed(folder)


def test_a_device_without_end_is_not_copied(folder: Path) -> None:
    (folder / "one").write_bytes(b"")
    specs = {path.name: fingerprint(path) for path in folder.iterdir()}
    (folder / "one").unlink()
    (folder / "one").symlink_to("/dev/zero")
    with pytest.raises(BundleCorruptError, match="one is missing"):
        SealedFiles(folder, specs)


def test_a_process_that_stands_still_while_it_seals_holds_up_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sealed_files, "WAIT_S", 0.05)
    with (tmp_path / "sealing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = sealed(folder, tmp_path)
    assert files["one"].read_bytes() == b"content of one"
    assert list(tmp_path.glob("*.sealed")) == []
    assert "another process has been sealing for" in caplog.text


def test_a_fork_that_ends_takes_nothing_along(folder: Path, tmp_path: Path) -> None:
    files = sealed(folder, tmp_path)
    child = os.fork()
    if not child:
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # what Python does at the end of a process
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob("*.sealed"))) == 1
    assert files["one"].read_bytes() == b"content of one"


def test_notes_of_processes_that_died_go(folder: Path, tmp_path: Path) -> None:
    (tmp_path / f"{2**22 + 1}-1.sealed").write_bytes(b"{}")
    files = sealed(folder, tmp_path)
    assert [path.name.partition("-")[0] for path in tmp_path.glob("*.sealed")] == [str(os.getpid())]
    assert files["one"].read_bytes() == b"content of one"
