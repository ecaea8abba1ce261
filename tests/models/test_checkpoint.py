from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from unipinrec.errors import CheckpointError
from unipinrec.models.checkpoint import (
    ItemList,
    load_checkpoint,
    write_atomically,
    write_catalogue,
    write_model,
    write_tensors,
)
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import sequences_of, vocabulary_of
from unipinrec.models.model import UniPinRec

FILES = ["catalogue.json", "catalogue.safetensors", "config.json", "model.safetensors"]


@pytest.fixture
def model(random_dataset: Callable[..., Dataset], make_model: Callable[..., UniPinRec]) -> UniPinRec:
    dataset = random_dataset(1, features=True)
    return make_model(vocabulary_of(dataset), num_kv_heads=2, outcome_conditioned=True)


@pytest.fixture
def folder(tmp_path: Path, model: UniPinRec, random_dataset: Callable[..., Dataset]) -> Path:
    dataset = random_dataset(1, features=True)
    data = sequences_of(dataset)
    write_catalogue(tmp_path, ItemList(item_ids=data.item_ids, titles=dataset.items["title"].to_list()), data.features)
    write_model(tmp_path, model)
    return tmp_path


def test_a_checkpoint_comes_back_bit_for_bit(
    folder: Path, model: UniPinRec, random_dataset: Callable[..., Dataset]
) -> None:
    loaded = load_checkpoint(folder)
    assert loaded.model.config == model.config
    assert loaded.model.vocabulary == model.vocabulary
    assert not loaded.model.training
    expected, actual = model.state_dict(), loaded.model.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    dataset = random_dataset(1, features=True)
    data = sequences_of(dataset)
    assert loaded.catalogue.item_ids == data.item_ids
    assert loaded.catalogue.titles == dataset.items["title"].to_list()
    assert None in loaded.catalogue.titles
    assert np.array_equal(loaded.features.dense, data.features.dense)
    assert np.array_equal(loaded.features.categories, data.features.categories)
    assert loaded.features.dense.dtype == np.float32
    assert loaded.features.categories.dtype == np.int64


def test_a_checkpoint_holds_json_and_safetensors_and_nothing_pickled(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK")), f"{path.name} looks like a pickle or a torch archive"
        if path.suffix == ".json":
            json.loads(content)
        else:
            header = int.from_bytes(content[:8], "little")
            assert "__metadata__" in json.loads(content[8 : 8 + header]) or content[8:9] == b"{"


def test_features_in_any_memory_order_come_back_the_same(folder: Path, model: UniPinRec) -> None:
    loaded = load_checkpoint(folder)
    turned = type(loaded.features)(
        dense=np.asfortranarray(loaded.features.dense), categories=np.asfortranarray(loaded.features.categories)
    )
    write_catalogue(folder, loaded.catalogue, turned)
    again = load_checkpoint(folder)
    assert np.array_equal(again.features.dense, loaded.features.dense)
    assert np.array_equal(again.features.categories, loaded.features.categories)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error_that_names_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "bytes"])
def test_a_damaged_file_is_an_error(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    content = path.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "noise": b"\xff\xfe\x00" + content[3:]}
    damaged["bytes"] = content.replace(b'"', b'"\xff', 1)  # not UTF-8 within a word
    path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=str(folder)):
        load_checkpoint(folder)


def test_a_folder_that_is_no_checkpoint_says_what_one_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pass a folder that `unipinrec train` wrote"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_newer_format_is_refused_before_anything_else_is_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 2, "news": 1}))
    with pytest.raises(CheckpointError, match="checkpoint format 2, this version reads 1"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 24}, "do not load"),
        ({"num_layers": 3}, "do not load"),
        ({"num_heads": 3}, "hidden_size=16 must be a multiple"),
        ({"depth": 3}, "depth"),
        ({"attention": "full"}, "attention"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    config["model"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("part", ["item_ids", "titles"])
def test_a_catalogue_of_another_run_is_refused(folder: Path, part: str) -> None:
    catalogue = json.loads((folder / "catalogue.json").read_bytes())
    catalogue[part].pop()
    (folder / "catalogue.json").write_text(json.dumps(catalogue))
    with pytest.raises(CheckpointError, match="the folder mixes two runs"):
        load_checkpoint(folder)


@pytest.mark.parametrize("part", ["dense", "categories"])
@pytest.mark.parametrize("axis", [0, 1])
def test_features_of_another_run_are_refused(folder: Path, part: str, axis: int) -> None:
    arrays = load_file(folder / "catalogue.safetensors")
    arrays[part] = np.ascontiguousarray(np.delete(arrays[part], 0, axis=axis))
    save_file(arrays, folder / "catalogue.safetensors")
    with pytest.raises(CheckpointError, match="the folder mixes two runs"):
        load_checkpoint(folder)


def test_features_must_be_there_and_finite(folder: Path) -> None:
    arrays = load_file(folder / "catalogue.safetensors")
    arrays["dense"][3, 1] = np.nan
    save_file(arrays, folder / "catalogue.safetensors")
    with pytest.raises(CheckpointError, match="non-finite item features"):
        load_checkpoint(folder)
    save_file({"dense": arrays["dense"]}, folder / "catalogue.safetensors")
    with pytest.raises(CheckpointError, match="categories"):
        load_checkpoint(folder)


@pytest.mark.parametrize("code", [-1, 999])
def test_category_codes_must_be_those_of_words(folder: Path, code: int) -> None:
    arrays = load_file(folder / "catalogue.safetensors")
    arrays["categories"][3, 0] = code
    save_file(arrays, folder / "catalogue.safetensors")
    with pytest.raises(CheckpointError, match=r"a category code of catalogue\.safetensors stands for no word"):
        load_checkpoint(folder)


def test_a_write_that_fails_leaves_the_old_file(folder: Path, model: UniPinRec) -> None:
    before = (folder / "model.safetensors").read_bytes()
    overlapping = model.log_scale.detach().expand(3)
    write_tensors(folder / "other.safetensors", {"a": overlapping})
    with pytest.raises(AttributeError, match="detach"):
        write_tensors(folder / "model.safetensors", {"a": "not a tensor"})  # type: ignore[dict-item]
    assert (folder / "model.safetensors").read_bytes() == before
    write_atomically(folder / "config.json", b"new")
    assert (folder / "config.json").read_bytes() == b"new"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
