"""A bundle with further precisions: what it holds, what it says of them, and when it is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from answers import graph_paths
from numpy.typing import NDArray

from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.data_histories import histories_from_data
from unipinrec.export.lists.held_out import auc_by_action, held_out_logits
from unipinrec.export.precision.check import add_precisions
from unipinrec.runtime import Recommender, verify_bundle
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import TensorSpec
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.requests import History
from unipinrec.runtime.tools.update_bundle import update_bundle

REDUCED = {"bf16": "bfloat16", "fp16": "float16"}
SEALS = {"manifest.json", "manifest.sha256"}


def reduce(bundle: Path, checkpoint: Path, dataset: Path, folder: Path) -> Path:
    """A copy of a bundle with both precisions."""
    shutil.copytree(bundle, folder)
    histories = histories_from_data(dataset, source_from_checkpoint(checkpoint), 50).split()
    add_precisions(folder, ("bf16", "fp16"), histories)
    return folder


@pytest.fixture(scope="module")
def reduced(bundle: Path, checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reduce(bundle, checkpoint, dataset, tmp_path_factory.mktemp("reduced") / "bundle")


def test_each_precision_has_its_three_graphs_and_its_weights_beside_those_of_fp32(bundle: Path, reduced: Path) -> None:
    added = {path.name for path in reduced.iterdir()} - {path.name for path in bundle.iterdir()}
    graphs = {f"{name}_{precision}.onnx" for name in ("encoder", "extend", "ranker") for precision in REDUCED}
    assert added == graphs | {"weights_bf16.bin", "weights_fp16.bin"}
    assert added <= set(Bundle.open(reduced).manifest.files)
    for path in bundle.iterdir():
        assert path.name in SEALS or path.read_bytes() == (reduced / path.name).read_bytes(), path.name


def test_only_keys_and_values_change_their_type(reduced: Path) -> None:
    manifest = Bundle.open(reduced).manifest
    for precision, dtype in REDUCED.items():
        for name, graph in manifest.precisions[precision].graphs.items():
            exact = manifest.graphs[name]
            assert graph.file == f"{name}_{precision}.onnx"
            for given, wanted in zip(graph.inputs + graph.outputs, exact.inputs + exact.outputs, strict=True):
                low = wanted.name.startswith(("past_key_values.", "present."))
                expected = TensorSpec(name=wanted.name, dtype=dtype if low else wanted.dtype, shape=wanted.shape)
                assert given == expected


def test_the_graphs_of_a_precision_share_its_weights_which_are_half_as_large(reduced: Path) -> None:
    indices = []
    for name in ("encoder", "extend", "ranker"):
        model = onnx.load(reduced / f"{name}_bf16.onnx", load_external_data=False)
        entries = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
        assert {entry["location"] for entry in entries} == {"weights_bf16.bin"}
        indices.append({int(entry["offset"]) for entry in entries})
    assert len(indices[0] & indices[1] & indices[2]) >= 8
    content, used = (reduced / "weights_bf16.bin").read_bytes(), sorted(set.union(*indices))
    pieces = [content[begin:end] for begin, end in zip(used, [*used[1:], None], strict=True)]
    assert len({piece.rstrip(b"\0") for piece in pieces}) == len(pieces)
    exact = onnx.load(reduced / "ranker.onnx", load_external_data=False).graph.initializer
    assert sum(4 * int(np.prod(t.dims)) for t in exact if t.data_type == 1) > 1.5 * len(content) / 2


def test_the_same_bundle_gives_the_same_bytes(
    bundle: Path, reduced: Path, checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    again = reduce(bundle, checkpoint, dataset, tmp_path / "again")
    for path in reduced.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_no_trace_of_the_exporting_machine(reduced: Path) -> None:
    for path in reduced.glob("*_*.onnx"):
        assert b".py" not in path.read_bytes()
        assert str(Path.home()).encode() not in path.read_bytes()


def test_what_a_precision_changes_is_measured(reduced: Path) -> None:
    precisions = Bundle.open(reduced).manifest.precisions
    errors = {name: spec.agreement.max_logit_diff for name, spec in precisions.items()}
    for spec in precisions.values():
        assert spec.agreement.problem is None
        assert spec.agreement.requests > 20
        assert min(spec.agreement.ranked_overlap, spec.agreement.retrieved_overlap) >= 0.99
        assert max(map(abs, spec.auc_change.values())) < 0.01
        assert set(spec.auc_change) == {"click", "save", "share", "hide"}
    assert errors["fp16"] < errors["bf16"]


def test_a_bundle_with_precisions_is_served_in_fp32_as_before(bundle: Path, reduced: Path) -> None:
    assert verify_bundle(reduced).ok
    events = [{"item": item, "actions": []} for item in Bundle.open(bundle).item_ids[:5]]
    slates = [Recommender.load(path).recommend(events, k=5) for path in (bundle, reduced)]
    assert [(item.item, item.score) for item in slates[0].items] == [(i.item, i.score) for i in slates[1].items]


def test_an_update_of_the_items_carries_the_precisions_along(reduced: Path, tmp_path: Path) -> None:
    update_bundle(reduced, tmp_path / "updated", add={}, retire={"here": Bundle.open(reduced).item_ids[0]})
    old, new = Bundle.open(reduced), Bundle.open(tmp_path / "updated")
    assert new.manifest.precisions == old.manifest.precisions
    for precision in REDUCED:
        for name, path in graph_paths(new, precision).items():
            assert path.read_bytes() == graph_paths(old, precision)[name].read_bytes()
    assert verify_bundle(tmp_path / "updated").ok


def test_the_report_has_a_row_per_precision(reduced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from unipinrec.cli.export import _print_report

    _print_report(reduced, Bundle.open(reduced).manifest, 1.0)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ bf16") or "│ fp16" in line]
    assert [row.split("│")[3].strip() for row in rows] == ["1.0000", "1.0000"]


def test_held_out_events_are_scored_from_those_before_them(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    engine, history = Engine.on_cpu(opened), opened.sample_histories(1)[0]
    logits = held_out_logits(engine, history)
    for index in range(4):
        cut = len(history) - 4 + index
        shown = history.part(cut, cut + 1)
        before = engine.encode(pad_histories([history.part(0, cut)]))
        expected = engine.rank(before, shown.item_rows[None], shown.surfaces, shown.timestamps_ms)[0, 0]
        np.testing.assert_allclose(logits[index], expected, atol=1e-5, rtol=0)


def test_auc_is_that_of_the_last_events_and_left_out_where_it_says_nothing() -> None:
    def history(*saves: int) -> History:
        actions: NDArray[np.float32] = np.array([[save, 1] for save in (0, *saves)], np.float32)
        nothing = np.zeros(len(actions), np.int64)
        return History(item_rows=nothing, actions=actions, surfaces=nothing, timestamps_ms=nothing)

    logits = np.array([[0.4, 0.0], [0.3, 0.0], [0.2, 0.0], [0.1, 0.0]], np.float32)
    auc = auc_by_action(("save", "click"), [history(1, 0, 1, 0), history(1, 0, 0, 0)], [logits, logits])
    # Saved are 0.4, 0.4 and 0.2, the others 0.3, 0.3, 0.2, 0.1 and 0.1: 12 of 15 pairs are in order, one is level.
    assert auc == {"save": pytest.approx(12.5 / 15)}
