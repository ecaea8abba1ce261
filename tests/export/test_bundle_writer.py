"""A bundle is complete or absent, the same twice, and says truthfully what is in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from unipinrec.errors import ExportError
from unipinrec.export.bundle_writer import ExportOptions, _data_fingerprint, export_bundle
from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.data_histories import histories_from_data
from unipinrec.runtime.bundle.manifest import Manifest

GRAPHS = ["encoder", "extend", "item_embedder", "ranker", "retrieval"]
EXPORT = """
import resource, sys
from pathlib import Path
from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.data_histories import histories_from_data
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
source = source_from_checkpoint(Path(sys.argv[1]))
given = {"histories": histories_from_data(Path(sys.argv[4]), source, 200)} if sys.argv[4:] else {}
options = ExportOptions(users=2)
export_bundle(source, Path(sys.argv[2]), **given, options=options, progress=lambda stage: print(stage, flush=True))
"""


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return msgspec.json.decode((bundle / "manifest.json").read_bytes(), type=Manifest)


@pytest.mark.hnswlib
def test_the_files_of_the_format_are_there(bundle: Path, manifest: Manifest) -> None:
    expected = {f"{name}.onnx" for name in GRAPHS} | {
        "golden.safetensors",
        "index.hnsw",
        "item_ids.json",
        "item_titles.json",
        "items.safetensors",
        "popular.safetensors",
        "user_ids.json",
        "users.safetensors",
        "weights.bin",
    }
    assert set(manifest.files) == expected
    assert {path.name for path in bundle.iterdir()} == expected | {"manifest.json", "manifest.sha256"}


def test_every_hash_is_true(bundle: Path, manifest: Manifest) -> None:
    for name, spec in manifest.files.items():
        content = (bundle / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (spec.sha256, spec.size_bytes)
    digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert (bundle / "manifest.sha256").read_text() == digest + "\n"


def test_graph_signatures(manifest: Manifest) -> None:
    def shapes(name: str, side: str) -> dict[str, tuple[int | str, ...]]:
        return {t.name: t.shape for t in getattr(manifest.graphs[name], side)}

    assert shapes("encoder", "inputs") == {
        "item_vectors": ("batch", "history", 64),
        "actions": ("batch", "history", 4),
        "surfaces": ("batch", "history"),
        "timestamps_ms": ("batch", "history"),
        "lengths": ("batch",),
    }
    assert shapes("encoder", "outputs")["present.1.value"] == ("batch", 2, "history + 1", 32)
    assert shapes("extend", "outputs")["present.0.key"] == ("batch", 2, "new", 32)
    assert shapes("ranker", "inputs")["past_key_values.0.key"] == ("batch", 2, "past", 32)
    assert shapes("ranker", "outputs") == {"logits": ("batch", "candidates", 4)}
    assert shapes("retrieval", "outputs") == {"queries": ("batch", 1, 64)}
    assert shapes("item_embedder", "outputs") == {"item_vectors": ("items", 64)}


def test_parity_covers_every_graph_and_its_edges(manifest: Manifest) -> None:
    cases = {(check.graph, check.case) for check in manifest.parity.checks}
    assert {
        ("encoder", "lengths=[1]"),
        ("encoder", "lengths=[64, 1]"),
        ("ranker", "past=[1], candidates=1"),
        ("ranker", "past=[64, 1], candidates=64"),
        ("extend", "past=[3, 1, 2], new=[1, 4, 2]"),
    } <= cases
    assert {check.graph for check in manifest.parity.checks} == set(GRAPHS)
    assert 0 < manifest.parity.max_abs_diff < 2e-5


def test_weights_are_stored_once_for_all_graphs(bundle: Path, checkpoint: Path) -> None:
    graphs = [onnx.load(bundle / f"{name}.onnx", load_external_data=False) for name in ("encoder", "extend", "ranker")]
    offsets = [
        {entry.value for t in graph.graph.initializer for entry in t.external_data if entry.key == "offset"}
        for graph in graphs
    ]
    # Every block's four matrices serve all three graphs.
    assert len(offsets[0] & offsets[1] & offsets[2]) >= 8
    assert (bundle / "weights.bin").stat().st_size < 2 * (checkpoint / "model.safetensors").stat().st_size


def test_no_trace_of_the_exporting_machine(bundle: Path) -> None:
    for name in GRAPHS:
        content = (bundle / f"{name}.onnx").read_bytes()
        assert b".py" not in content
        assert str(Path.home()).encode() not in content


def test_the_item_table_is_unit_length_and_in_row_order(bundle: Path, checkpoint: Path) -> None:
    vectors = load_file(bundle / "items.safetensors")["item_vectors"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    ids = msgspec.json.decode((bundle / "item_ids.json").read_bytes())
    assert ids == msgspec.json.decode((checkpoint / "catalogue.json").read_bytes())["item_ids"]
    assert vectors.shape == (len(ids), 64)


def test_the_category_codes_are_those_of_the_catalogue(bundle: Path, checkpoint: Path, manifest: Manifest) -> None:
    codes = load_file(bundle / "items.safetensors")["categories"]
    assert (codes.shape, codes.dtype.name) == ((300, 2), "int32")
    np.testing.assert_array_equal(codes, source_from_checkpoint(checkpoint).item_categories)
    assert codes.max(axis=0).tolist() == [len(words) for words in manifest.categories.values()]


@pytest.mark.hnswlib
def test_recall_of_the_index_is_measured(manifest: Manifest) -> None:
    assert manifest.index is not None
    assert manifest.index.count == 300
    assert manifest.index.recall_k == 100
    assert manifest.index.recall >= 0.99


@pytest.mark.hnswlib
def test_the_same_checkpoint_gives_the_same_bytes_and_users_and_recall_can_be_chosen(
    bundle: Path, checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    stored, again = source_from_checkpoint(checkpoint), tmp_path / "again"
    # Arrays of data frames are stored by column.
    dense, categories = map(np.asfortranarray, (stored.item_dense, stored.item_categories))
    source = replace(stored, item_dense=dense, item_categories=categories)
    options, histories = ExportOptions(users=0, recall=0.5, window_slack=4), histories_from_data(dataset, source, 200)
    before, threads = torch.get_num_threads(), set[int]()
    torch.set_num_threads(2)
    try:
        manifest = export_bundle(
            source,
            again,
            histories=histories,
            options=options,
            progress=lambda _: threads.add(torch.get_num_threads()),
        )
        # Sums of larger models differ in their last bits with the number of threads.
        assert (threads, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)
    assert manifest.index is not None
    assert (manifest.index.recall_target, manifest.index.ef_search) == (0.5, 100)
    assert manifest.window_slack == 4
    names = {path.name for path in again.iterdir()}
    assert names == {path.name for path in bundle.iterdir()} - {"users.safetensors", "user_ids.json"}
    for name in names - {"manifest.json", "manifest.sha256"}:  # the manifest carries the date
        assert (bundle / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.hnswlib
def test_another_process_with_other_threads_writes_the_same_bytes_and_as_few_users_as_wanted(
    checkpoint: Path, dataset: Path, bundle: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(tmp_path / "again"), "0", str(dataset)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "3"})
    manifests, tensors, ids = [], [], []
    for folder in (bundle, tmp_path / "again"):
        described = json.loads((folder / "manifest.json").read_bytes())
        del described["created"], described["sample"], described["cache"]
        del described["files"]["users.safetensors"]
        del described["files"]["user_ids.json"]
        manifests.append(described)
        tensors.append(load_file(folder / "users.safetensors"))
        ids.append(json.loads((folder / "user_ids.json").read_bytes()))
    assert manifests[0] == manifests[1]  # the hashes of all other files are in it
    (everyone, two), events = tensors, tensors[0]["offsets"][2]
    assert ids[1] == ids[0][:2]
    assert two["offsets"].tolist() == everyone["offsets"][:3].tolist()
    for name in two.keys() - {"offsets"}:
        np.testing.assert_array_equal(two[name], everyone[name][:events])


@pytest.mark.parametrize(
    "name",
    ["actions", "positive_actions", "surfaces", "dense", "categories", "item_ids", "item_dense", "item_categories"],
)
def test_the_fingerprint_of_the_data_changes_with_each_of_its_parts(checkpoint: Path, name: str) -> None:
    source = source_from_checkpoint(checkpoint)
    given = getattr(source, name)
    other: Any
    if isinstance(given, np.ndarray):
        other = given.copy()
        other[-1, -1] += 1
    elif isinstance(given, dict):
        other = {f"{key}, renamed": value for key, value in given.items()}
    else:
        other = [*given[:-1], "another"]
    assert _data_fingerprint(source) == _data_fingerprint(source_from_checkpoint(checkpoint))
    assert _data_fingerprint(replace(source, **{name: other})) != _data_fingerprint(source)


def test_an_existing_folder_is_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/precious").write_text("mine")
    with pytest.raises(ExportError, match="exists; a bundle is never overwritten"):
        export_bundle(source_from_checkpoint(checkpoint), tmp_path / "bundle")
    assert (tmp_path / "bundle/precious").read_text() == "mine"


@pytest.mark.parametrize("limit", [1_000, 100_000])
def test_a_full_disk_is_named_and_leaves_nothing(checkpoint: Path, tmp_path: Path, limit: int) -> None:
    """A limit on file size stands for the full disk: 1 kB stops the item table, 100 kB the weights."""
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(tmp_path / "bundle"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ExportError: could not write" in done.stderr
    assert "no space left on the disk; nothing was left behind" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_killed_half_way_there_is_no_bundle_and_the_next_export_works(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(tmp_path / "bundle"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "graph extend":
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "bundle").exists()
    assert export_bundle(source_from_checkpoint(checkpoint), tmp_path / "bundle").num_items == 300


def test_data_whose_surfaces_have_other_codes_is_refused(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "other")
    described = json.loads((tmp_path / "other/dataset.json").read_bytes())
    described["surfaces"].append("another")
    (tmp_path / "other/dataset.json").write_text(json.dumps(described))
    with pytest.raises(ExportError, match="trained on: surfaces differ"):
        histories_from_data(tmp_path / "other", source_from_checkpoint(checkpoint), 10)


def test_data_without_events_is_refused(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    """Slates alone, as of a service that has shown much and logged nothing yet."""
    from unipinrec.models.data.schema import read_dataset, write_dataset

    data = read_dataset(dataset)
    write_dataset(replace(data, events=data.events.clear()), tmp_path / "silent")
    with pytest.raises(ExportError, match="silent has no events, so no histories; export without data"):
        histories_from_data(tmp_path / "silent", source_from_checkpoint(checkpoint), 10)


def test_data_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from unipinrec.models.data.schema import write_dataset
    from unipinrec.models.simulator.simulator import simulate
    from unipinrec.models.simulator.world import SimulatorConfig

    write_dataset(simulate(SimulatorConfig(users=20, items=50, categories=2))[0], tmp_path / "other")
    with pytest.raises(ExportError, match="is not the data that the model was trained on"):
        histories_from_data(tmp_path / "other", source_from_checkpoint(checkpoint), 10)


@pytest.mark.parametrize("slack", [0, 65])
def test_a_window_slack_that_cannot_be_is_refused_at_once(checkpoint: Path, tmp_path: Path, slack: int) -> None:
    stages: list[str] = []
    with pytest.raises(ExportError, match=f"window_slack={slack} must be from 1 to 64, the model's longest history"):
        export_bundle(
            source_from_checkpoint(checkpoint),
            tmp_path / "bundle",
            options=ExportOptions(window_slack=slack),
            progress=stages.append,
        )
    assert stages == []
