from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unipinrec.errors import BundleCorruptError, BundleError, BundleVersionError, RequestError
from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.manifest import Agreement

Reseal = Callable[..., None]
FILES = (
    "encoder.onnx",
    "weights.bin",
    "items.safetensors",
    "item_ids.json",
    "item_titles.json",
    "index.hnsw",
    "golden.safetensors",
    "users.safetensors",
    "user_ids.json",
)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_opened_bundle(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.hash == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert opened.item_vectors.shape == (300, 64)
    assert opened.rows[opened.item_ids[17]] == 17
    assert "no such item" not in opened.rows
    assert len(opened.titles) == 300
    assert isinstance(opened.item_vectors.base, np.memmap)
    assert not opened.item_vectors.flags.writeable
    expected = load_file(bundle / "items.safetensors")["item_vectors"]
    np.testing.assert_array_equal(opened.item_vectors, expected)


@pytest.mark.hnswlib
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(copy: Path, name: str) -> None:
    flip_byte(copy / name)
    with pytest.raises(BundleCorruptError, match=rf"{name} is altered: .*copy the bundle again, or export it again"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_one_flipped_bit_in_the_manifest_is_found(copy: Path, name: str) -> None:
    flip_byte(copy / name)
    with pytest.raises(BundleCorruptError, match=r"manifest\.json is altered: sha256 "):
        Bundle.open(copy)


def test_a_truncated_file_is_found(copy: Path) -> None:
    path = copy / "ranker.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleCorruptError, match=r"ranker\.onnx is truncated or altered: \d+ bytes, expected \d+"):
        Bundle.open(copy)


@pytest.mark.hnswlib
@pytest.mark.parametrize("name", ["index.hnsw", "extend.onnx"])
def test_a_missing_file_is_found(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleCorruptError, match=f"{name} is missing"):
        Bundle.open(copy)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match=r"is not a bundle .*`unipinrec export` writes one"):
        Bundle.open(tmp_path)


def test_a_newer_format_is_named_before_its_new_fields_are(copy: Path, reseal: Reseal) -> None:
    reseal(copy, format_version=4, invention="new")
    with pytest.raises(
        BundleVersionError, match="bundle format 4, this version reads 1 to 3; use the unipinrec that wrote"
    ):
        Bundle.open(copy)


def test_an_unknown_field_is_an_error(copy: Path, reseal: Reseal) -> None:
    reseal(copy, invention="new")
    with pytest.raises(BundleError, match="unknown field `invention`"):
        Bundle.open(copy)


def test_a_file_that_is_not_listed_is_ignored(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert len(Bundle.open(copy).item_ids) == 300


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "..", ""])
def test_file_names_stay_inside_the_folder(copy: Path, reseal: Reseal, name: str) -> None:
    reseal(copy, files={name: {"sha256": "0" * 64, "size_bytes": 1}})
    with pytest.raises(BundleError, match="use a plain name inside the bundle's folder"):
        Bundle.open(copy)


@pytest.mark.hnswlib
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"graphs": {"ranker": None}}, "Expected `object`, got `null`"),
        ({"index": {"dim": 32}}, r"the index does not match the items: .*\('ip', 32, 300\).*\('ip', 64, 300\)"),
        ({"index": {"space": "l2"}}, "the index does not match the items"),
        ({"num_items": 299}, "the index does not match the items"),
        ({"model": {"num_layers": 0}}, "has num_layers=0, which leaves nothing to cache"),
        ({"positive_actions": ["like"]}, r"positive_actions \['like'\] are not all among"),
    ],
)
def test_a_manifest_that_contradicts_itself(copy: Path, reseal: Reseal, changes: dict[str, Any], match: str) -> None:
    reseal(copy, **changes)
    with pytest.raises(BundleError, match=match):
        Bundle.open(copy)


@pytest.mark.hnswlib
def test_a_manifest_that_lacks_what_serving_needs(copy: Path, reseal: Reseal) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    del manifest["files"]["index.hnsw"], manifest["files"]["weights.bin"]
    agreement = {**dict.fromkeys(Agreement.__struct_fields__, 1), "problem": None}
    manifest["precisions"] = {"bf16": {"graphs": {}, "agreement": agreement, "auc_change": {}}}
    names = dict.fromkeys(("key", "graph", "precision", "flavor", "version"), "")
    manifest["engines"] = [{"file": "ranker.plan", **names, "targets": []}]
    (copy / "ranker.plan").write_bytes(b"code")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    reseal(copy)
    with pytest.raises(BundleError, match=r"does not list index\.hnsw, ranker\.plan, weights\.bin, weights_bf16\.bin"):
        Bundle.open(copy)
    del manifest["graphs"]["extend"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    reseal(copy)
    with pytest.raises(BundleError, match="lacks the graphs extend"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (["a"] * 300, "299 item ids occur twice"),
        (["a"], "1 entries for 300 items"),
        ([1] * 300, "Expected `str`, got `int`"),
    ],
)
def test_item_ids_that_do_not_fit(copy: Path, reseal: Reseal, ids: list[Any], match: str) -> None:
    (copy / "item_ids.json").write_text(json.dumps(ids))
    reseal(copy)
    with pytest.raises(BundleError, match=match):
        Bundle.open(copy)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0])
def test_item_vectors_are_finite_and_of_unit_length(copy: Path, reseal: Reseal, value: float) -> None:
    vectors = load_file(copy / "items.safetensors")["item_vectors"]
    vectors[41] *= value
    save_file({"item_vectors": vectors}, copy / "items.safetensors")
    reseal(copy)
    with pytest.raises(BundleError, match="item row 41 is not of unit length"):
        Bundle.open(copy)


@pytest.mark.parametrize("feature", [0, 1])
def test_a_category_code_is_that_of_a_word(copy: Path, reseal: Reseal, feature: int) -> None:
    words, stored = list(Bundle.open(copy).catalogue.words.values())[feature], load_file(copy / "items.safetensors")
    for code, valid in ((0, True), (len(words), True), (len(words) + 1, False), (-1, False)):
        stored["categories"][41, feature] = code
        save_file(stored, copy / "items.safetensors")
        reseal(copy)
        with nullcontext() if valid else pytest.raises(BundleError, match="a category code stands for no word"):
            Bundle.open(copy)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"item_vectors": np.ones((300, 32), np.float32)}, r"item_vectors is .*\(300, 32\).*expected .*\(300, 64\)"),
        ({"item_vectors": np.ones((300, 64), np.float16)}, "item_vectors is .*F16"),
        ({"vectors": np.ones((300, 64), np.float32)}, "does not contain tensor item_vectors"),
    ],
)
def test_an_item_table_of_another_shape(copy: Path, reseal: Reseal, tensors: dict[str, Any], match: str) -> None:
    save_file(tensors, copy / "items.safetensors")
    reseal(copy)
    with pytest.raises(BundleError, match=match):
        Bundle.open(copy)


def test_sample_users(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    users = json.loads((bundle / "user_ids.json").read_bytes())
    stored = load_file(bundle / "users.safetensors")
    events = opened.user_events(users[1])
    start, stop = stored["offsets"][1:3]
    assert [opened.rows[str(event.item)] for event in events] == stored["item_rows"][start:stop].tolist()
    assert [event.timestamp_ms for event in events] == stored["timestamps_ms"][start:stop].tolist()
    assert [len(event.actions) for event in events] == stored["actions"][start:stop].sum(axis=1).tolist()
    with pytest.raises(RequestError, match=rf"'nobody' is not among the {len(users)} sample users.*--history"):
        opened.user_events("nobody")


def test_a_bundle_without_sample_users(copy: Path, reseal: Reseal) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    del manifest["files"]["users.safetensors"], manifest["files"]["user_ids.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    reseal(copy)
    with pytest.raises(RequestError, match="not among the 0 sample users"):
        Bundle.open(copy).user_events("user-0")
