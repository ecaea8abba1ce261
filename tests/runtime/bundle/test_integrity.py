from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from unipinrec.errors import ExportError
from unipinrec.runtime.bundle.integrity import file_problems, fingerprint, write_arrays, written_whole
from unipinrec.runtime.bundle.manifest import FileSpec

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert fingerprint(tmp_path / "f") == FileSpec(sha256=ABC, size_bytes=3)


def test_problems_are_named_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    for name in ("whole", "longer", "other"):
        (tmp_path / name).write_bytes(b"abc")
    specs = {"gone": (ABC, 3), "whole": (ABC, 3), "longer": (ABC, 9), "other": ("0" * 64, 3)}
    found = file_problems(tmp_path, {n: FileSpec(sha256=s, size_bytes=b) for n, (s, b) in specs.items()})
    assert list(found.items()) == [
        ("gone", "is missing"),
        ("longer", "is truncated or altered: 3 bytes, expected 9"),
        ("other", f"is altered: its sha256 is {ABC}, expected {'0' * 64}"),
    ]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with written_whole(tmp_path / "deep/out") as folder:
        (folder / "f").write_text("x")
        assert not (tmp_path / "deep/out").exists()
        assert folder.parent == tmp_path / "deep"
    assert (tmp_path / "deep/out/f").read_text() == "x"
    assert oct((tmp_path / "deep/out").stat().st_mode)[-3:] == "755"
    with (
        pytest.raises(ExportError, match="out exists; a bundle is never overwritten"),
        written_whole(tmp_path / "deep/out"),
    ):
        pass
    with pytest.raises(ZeroDivisionError, match="by zero"), written_whole(tmp_path / "deep/other") as folder:
        (folder / "f").write_text(str(1 // 0))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_link_that_leads_nowhere_is_not_overwritten_either(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(ExportError, match="out exists; a bundle is never overwritten"), written_whole(tmp_path / "out"):
        pytest.fail("it was noticed only after the work was done")


def test_a_name_that_cannot_be_is_an_error_of_ours(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 300)
    with (
        pytest.raises(ExportError, match=r"could not write .*File name too long.*nothing was left"),
        written_whole(out),
    ):
        pytest.fail("it was noticed only after the work was done")


def test_what_fails_once_the_folder_is_in_place_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that may be written to but not listed; root, as whom tests may run, may do either."""
    opened = os.open

    def refuse(path: Any, *more: Any, **options: Any) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    match = r"out is complete and in place, but .*Permission denied"
    with pytest.raises(ExportError, match=match) as caught, written_whole(tmp_path / "out") as folder:
        (folder / "f").touch()
    monkeypatch.undo()
    assert "left behind" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "f"]


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (OSError(errno.ENOSPC, "full"), "could not write .*out: no space left on the disk; nothing was left behind"),
        (OSError(errno.EIO, "broken"), r"could not write .*out: \[Errno 5\] broken; nothing was left behind"),
    ],
)
def test_a_write_error_is_named(tmp_path: Path, error: OSError, match: str) -> None:
    with pytest.raises(ExportError, match=match), written_whole(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_arrays_in_any_memory_order_are_stored_the_same(tmp_path: Path) -> None:
    rows = np.arange(12).reshape(3, 4)
    write_arrays(tmp_path / "f", {"columns": np.asfortranarray(rows), "back": rows[::-1], "turned": rows.T})
    stored = load_file(tmp_path / "f")
    assert stored["columns"].tolist() == rows.tolist()
    assert stored["back"].tolist() == rows[::-1].tolist()
    assert stored["turned"].tolist() == rows.T.tolist()


def test_files_of_a_folder_can_be_read_by_all(tmp_path: Path) -> None:
    with written_whole(tmp_path / "out") as folder:
        (folder / "own").write_text("y")
        (folder / "own").chmod(0o600)
    assert oct((tmp_path / "out/own").stat().st_mode)[-3:] == "644"
