"""An index whose numbers lead elsewhere is refused before hnswlib follows them and crashes, or reads foreign memory."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.errors import BundleError
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index_file import HEADER, check_index_file

DIM, M, COUNT = 4, 4, 300
SPEC = IndexSpec(
    space="ip", dim=DIM, count=COUNT, m=M, ef_construction=20, ef_search=20, seed=1, recall=1.0, recall_k=1
)
WORDS = 1 + 2 * M + DIM + 2  # of an item: links at level 0, vector, label
UPPER = HEADER.size + 4 * WORDS * COUNT


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    made = np.random.default_rng(3).normal(size=(COUNT, DIM))
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def whole(vectors: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    hnswlib = pytest.importorskip("hnswlib", reason="hnswlib is not installed")
    index: Any = hnswlib.Index(space="ip", dim=DIM)
    index.init_index(COUNT, M=M, ef_construction=20, random_seed=1)
    index.add_items(vectors, np.arange(COUNT)[::-1].copy(), num_threads=1)
    for row in (7, 8):
        index.mark_deleted(row)
    path = tmp_path_factory.mktemp("index") / "index.hnsw"
    index.save_index(str(path))
    return path


def test_what_hnswlib_writes_is_whole(whole: Path, vectors: NDArray[np.float32]) -> None:
    found = check_index_file(whole, SPEC, vectors[::-1])
    assert sorted(found.tolist()) == [row for row in range(COUNT) if row not in (7, 8)]
    assert HEADER.unpack(whole.read_bytes()[: HEADER.size])[6] > 1, "the test needs more than one level"


def upper(content: bytes) -> int:
    """Place of the first links above level 0."""
    at = UPPER
    while not struct.unpack_from("<I", content, at)[0]:
        at += 4
    return at


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, "Q", 4), "its layout is not that of 4 numbers and M=4"),
        ((8, "Q", 2**62), "it has room for 4611686018427387904 of 300 items"),
        ((8, "Q", 299), "it has room for 299"),
        ((16, "Q", 299), r"it has \(dim, count\) = \(4, 299\)"),
        ((24, "Q", 2**40), "its layout is not"),
        ((32, "Q", 60), r"\(dim, count\)"),
        ((48, "i", 100), "its search begins at an item that is not on the top level"),
        ((48, "i", -1), "its search begins"),
        ((52, "I", 2**32 - 1), "its search begins"),
        ((56, "Q", 2**20), "its layout is not"),
        ((64, "Q", 2**20), "its layout is not"),
        ((80, "d", 0.0), "levels of scale 0.0"),
        ((80, "d", float("nan")), "levels of scale nan"),
        ((HEADER.size, "H", 9), "a link at level 0 leads to no item"),
        ((HEADER.size + 4, "I", COUNT), "a link at level 0 leads to no item"),
        ((HEADER.size + 4 * (WORDS - 2), "Q", COUNT), "a label is not a row of the items"),
        ((HEADER.size + 4 * (WORDS - 2), "q", -1), "a label is not a row of the items"),
        ((HEADER.size + 4 * (1 + 2 * M), "f", float("nan")), "it has other vectors"),
        ((-1, "I", 4), "the links of item .* above level 0 do not fit"),
        ((-1, "I", 2**31), "above level 0 do not fit"),
        ((-1, "I", 0), "bytes follow its end|do not fit|begins at an item"),
        ((-5, "H", M + 1), "a link above level 0 leads to no item"),
        ((-9, "I", COUNT), "a link above level 0 leads to no item"),
    ],
)
def test_numbers_that_lead_elsewhere(
    whole: Path, vectors: NDArray[np.float32], tmp_path: Path, change: tuple[int, str, float], message: str
) -> None:
    index, form, value = change
    content = bytearray(whole.read_bytes())
    at = index if index >= 0 else upper(bytes(content)) - index - 1
    struct.pack_into(f"<{form}", content, at, value)
    (tmp_path / "index.hnsw").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        check_index_file(tmp_path / "index.hnsw", SPEC, vectors[::-1])


def test_a_link_to_an_item_that_is_not_on_its_level(whole: Path, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    low, at = 0, UPPER
    while struct.unpack_from("<I", content, at)[0]:
        low, at = low + 1, at + 4 + struct.unpack_from("<I", content, at)[0]
    struct.pack_into("<HHI", content, upper(bytes(content)) + 4, 1, 0, low)
    (tmp_path / "index.hnsw").write_bytes(content)
    with pytest.raises(BundleError, match="a link above level 0 leads to no item"):
        check_index_file(tmp_path / "index.hnsw", SPEC, vectors[::-1])


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:-4], lambda c: c + b"\0" * 4, lambda c: c[:UPPER]])
def test_a_file_of_another_length(whole: Path, vectors: NDArray[np.float32], tmp_path: Path, change: Any) -> None:
    (tmp_path / "index.hnsw").write_bytes(change(whole.read_bytes()))
    with pytest.raises(BundleError, match="the index is broken"):
        check_index_file(tmp_path / "index.hnsw", SPEC, vectors[::-1])


def test_labels_are_distinct(whole: Path, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    same = np.repeat(vectors[:1], COUNT, axis=0)
    content = bytearray(whole.read_bytes())
    for item in range(COUNT):
        at = HEADER.size + 4 * (WORDS * item + 1 + 2 * M)
        content[at : at + 4 * DIM] = same[0].tobytes()
    struct.pack_into("<Q", content, HEADER.size + 4 * (WORDS - 2), 5)
    (tmp_path / "index.hnsw").write_bytes(content)
    with pytest.raises(BundleError, match="two of its items have the same label"):
        check_index_file(tmp_path / "index.hnsw", SPEC, same)


def test_without_the_check_hnswlib_dies(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(whole, tmp_path / "index.hnsw"))
    content = bytearray(path.read_bytes())
    for item in range(COUNT):
        struct.pack_into("<HHI", content, HEADER.size + 4 * WORDS * item, 1, 0, 2**32 - 2)
    path.write_bytes(content)
    code = (
        "import sys, hnswlib, numpy; index = hnswlib.Index(space='ip', dim=4); index.load_index(sys.argv[1]); "
        "index.knn_query(numpy.ones((1, 4), numpy.float32), k=3)"
    )
    assert run([sys.executable, "-c", code, str(path)], capture_output=True, check=False, timeout=60).returncode != 0
