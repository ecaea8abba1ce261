"""Whatever becomes of a bundle's files, and whenever: it is refused, or it answers as it did when it was verified."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from answers import NOW_MS, answer
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import BundleError
from unipinrec.runtime import Bundle, Recommender, RecommendOptions
from unipinrec.runtime.bundle import sealed as sealed_files
from unipinrec.runtime.bundle.manifest import FileSpec
from unipinrec.runtime.bundle.sealed import SealedFile
from unipinrec.runtime.device import Machine
from unipinrec.runtime.verify import verify_bundle

Fault = Callable[[Path, Path], object]


def in_place(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def renamed(path: Path, content: bytes) -> None:
    beside = path.with_name("beside")
    beside.write_bytes(content)
    beside.rename(path)


def linked(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def linked_to_a_copy(path: Path) -> None:
    copy = path.parent.with_name(path.name)
    copy.write_bytes(path.read_bytes())
    linked(path, copy)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARMLESS: dict[str, Fault] = {
    "touched": lambda path, _: os.utime(path, ns=(1, 1)),
    "written again": lambda path, _: in_place(path, path.read_bytes()),
    "replaced by a copy": lambda path, _: renamed(path, path.read_bytes()),
    "linked": lambda path, _: linked_to_a_copy(path),
    "closed to writing": lambda path, _: path.chmod(0o444),
}
HARMFUL: dict[str, Fault] = {
    "other weights in place": lambda path, other: in_place(path, (other / path.name).read_bytes()),
    "other weights": lambda path, other: renamed(path, (other / path.name).read_bytes()),
    "other weights behind a link": lambda path, other: linked(path, other / path.name),
    "a bit": lambda path, _: in_place(path, path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "emptied": lambda path, _: os.truncate(path, 0),
    "halved": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "grown": lambda path, _: in_place(path, path.read_bytes() + b"\0"),
    "gone": lambda path, _: path.unlink(),
    "a folder": lambda path, _: folder_instead(path),
    "all gone": lambda path, _: shutil.rmtree(path.parent),
}


@pytest.fixture(scope="module")
def other(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the same sizes, of which the graphs would take the weights."""
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("other") / "bundle"))
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    weights = np.fromfile(bundle / "weights.bin", np.float32)
    (1.1 * weights).astype(np.float32).tofile(folder / "weights.bin")
    return folder


def answers(recommender: Recommender) -> list[bytes]:
    """What the graphs give, to the bit, and the list of a sample user."""
    bundle = recommender.bundle
    user, _ = bundle.sample_users(1)[0]
    slate = recommender.recommend(bundle.user_events(user), 3, RecommendOptions(now_ms=NOW_MS))
    return [*(array.tobytes() for array in answer(recommender.engine, bundle)), repr(slate.items).encode()]


@contextmanager
def once_sealed(count: int, strike: Callable[[], object]) -> Iterator[None]:
    """A fault that strikes when so many files are in memory."""
    copied, left = sealed_files._copied, [count]

    def counted(path: Path, spec: FileSpec) -> SealedFile | str:
        file = copied(path, spec)
        left[0] -= 1
        if left[0] == 0:
            strike()
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed_files, "_copied", counted)
        patch.setattr(sealed_files, "available_threads", lambda: 1)
        yield


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[bytes]:
    with Recommender.load(bundle, "cpu") as recommender:
        return answers(recommender)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), fault=st.sampled_from([*HARMLESS, *HARMFUL]))
def test_any_fault_of_any_file_at_any_moment(
    bundle: Path, expected: list[bytes], other: Path, data: st.DataObject, fault: str
) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in bundle.iterdir())))
    moment = data.draw(st.one_of(st.sampled_from(["before", "opened", "serving"]), st.integers(1, 14)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(bundle, Path(scratch) / "bundle"))

        def strike() -> None:
            (HARMLESS | HARMFUL)[fault](folder / name, other)

        try:
            if moment == "before":
                strike()
            with once_sealed(moment if isinstance(moment, int) else 0, strike):
                opened = Bundle.open(folder)
            if moment == "opened":
                strike()
            recommender = Recommender.load(opened, "cpu")
        except BundleError:
            assert fault in HARMFUL
            assert moment not in ("opened", "serving")
            return
        assert moment != "before" or fault in HARMLESS
        with recommender:
            if moment == "serving":
                strike()
            assert answers(recommender) == expected


def test_all_faults_of_all_files_on_every_device(
    bundle: Path, device: str, machine: Machine, other: Path, tmp_path: Path
) -> None:
    """One after the other: before the graphs are loaded, and while they serve."""
    with Recommender.load(bundle, device, machine=machine) as recommender:
        expected = answers(recommender)
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    opened = Bundle.open(folder)
    for path in folder.iterdir():
        in_place(path, (other / path.name).read_bytes())
    with Recommender.load(opened, device, machine=machine) as recommender:
        assert answers(recommender) == expected
        for fault in HARMFUL.values():
            shutil.rmtree(folder)
            shutil.copytree(bundle, folder)
            for path in sorted(folder.iterdir()):
                if path.exists():
                    fault(path, other)
            assert answers(recommender) == expected
        with pytest.raises(BundleError):
            Recommender.load(folder, device, machine=machine)


def test_a_bundle_of_symbolic_links(bundle: Path, device: str, machine: Machine, tmp_path: Path) -> None:
    """As a cache of downloads lays them out: names that lead to blobs."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    for number, path in enumerate(bundle.iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (folder / path.name).symlink_to(f"../blobs/{number}")
    with (
        Recommender.load(folder, device, machine=machine) as linked,
        Recommender.load(bundle, device, machine=machine) as plain,
    ):
        assert answers(linked) == answers(plain)
    assert verify_bundle(folder, device, machine=machine).ok
