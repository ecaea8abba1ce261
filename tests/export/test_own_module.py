"""Export asks for five methods and nothing else: another backbone goes through it, a wrong one is refused."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx._internal.exporter import _onnx_program

from unipinrec.errors import ExportError, ParityError
from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.export.checks import probe
from unipinrec.export.golden import random_histories
from unipinrec.export.protocol import Candidates, Events, ExportSource, KeyValues, Past
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import Manifest, ModelSpec

ITEMS, ACTIONS, DIM = 40, 3, 8
SEALS = ("manifest.json", "manifest.sha256")


class PooledHistory(nn.Module):
    """No transformer at all: one layer of additive attention over events, positions and times ignored.

    "Key" and "value" are the projected events; a candidate weighs them by one dot product. Its last hidden state is
    the newest event's output.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.items = nn.Embedding(ITEMS, DIM)
        self.key = nn.Linear(DIM + ACTIONS, DIM)
        self.value = nn.Linear(DIM + ACTIONS, DIM)
        self.query = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, ACTIONS)

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        pair = self._project(events)
        return [pair], self._newest(events, pair, _beginning(pair[0], events.lengths))

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        pair, cached = self._project(events), past.key_values[0]
        key, value = (torch.cat(parts, 2) for parts in zip(cached, pair, strict=True))
        # The past is right-padded: its empty slots lie between its events and the new ones.
        seen = torch.cat([_beginning(cached[0], past.lengths), _beginning(pair[0], events.lengths)], 1)
        return [pair], self._newest(events, (key, value), seen)

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        return F.normalize(last_hidden_state, dim=-1)[:, None]

    def rank(self, past: Past, candidates: Candidates) -> Tensor:
        key, value = past.key_values[0]
        seen = _beginning(key, past.lengths)[:, None]
        return self.head(self._read(self.query(candidates.item_vectors), key, value, seen))  # type: ignore[no-any-return]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        return F.normalize(self.items(rows), dim=-1)

    def _project(self, events: Events) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([events.item_vectors, events.actions], -1)
        return self.key(inputs)[:, None], self.value(inputs)[:, None]

    def _newest(self, events: Events, pair: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        last = events.item_vectors.gather(1, (events.lengths - 1)[:, None, None].expand(-1, 1, DIM))
        return self._read(self.query(last), *pair, seen[:, None])[:, 0]

    def _read(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        scores = (query @ key[:, 0].transpose(1, 2)).masked_fill(~seen, -1e9)
        return torch.softmax(scores, -1) @ value[:, 0]


def _beginning(keys: Tensor, lengths: Tensor) -> Tensor:
    """Which slots [B, s] of keys [B, 1, s, D] are not padding."""
    return torch.arange(keys.shape[2]) < lengths[:, None]


class BranchOnShape(PooledHistory):
    """Traces with small batches and bakes that branch in: wrong, without an error, for one of five."""

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        queries = super().retrieve(last_hidden_state, outcomes)
        return queries * (1.0 if last_hidden_state.shape[0] != 5 else -1.0)


class TwiceAsLong(PooledHistory):
    """Forgets to normalise."""

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        return 2.0 * super().embed_items(rows, dense, categories)


class WithDropout(PooledHistory):
    """Which of its numbers are dropped is up to chance while it is trained."""

    always = False

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        return F.normalize(F.dropout(self.items(rows), training=self.always or self.training), dim=-1)


def source_of(module: nn.Module) -> ExportSource:
    return ExportSource(
        module=module,
        model=ModelSpec(
            num_layers=1,
            num_kv_heads=1,
            head_dim=DIM,
            hidden_size=DIM,
            item_dim=DIM,
            max_history=20,
            kv_prefix_slots=0,
            outcome_conditioned=False,
        ),
        actions=("a", "b", "c"),
        positive_actions=("a",),
        surfaces=("unknown",),
        dense={},
        categories={},
        item_ids=[f"item-{i}" for i in range(ITEMS)],
        titles=[None] * ITEMS,
        item_dense=np.zeros((ITEMS, 0), np.float32),
        item_categories=np.zeros((ITEMS, 0), np.int64),
        config={"architecture": "PooledHistory"},
    )


def test_another_backbone_is_exported_with_parity(tmp_path: Path) -> None:
    export_bundle(source_of(PooledHistory()), tmp_path / "bundle")
    manifest = msgspec.json.decode((tmp_path / "bundle/manifest.json").read_bytes(), type=Manifest)
    assert set(manifest.graphs) == {"encoder", "extend", "retrieval", "ranker"}
    assert manifest.config == {"architecture": "PooledHistory"}
    assert manifest.parity.max_abs_diff < 1e-5
    assert all(check.problem is None for check in manifest.parity.checks)
    assert not (tmp_path / "bundle/item_titles.json").exists()


def test_of_a_large_model_exported_where_onnxruntime_is_the_wheel_for_gpus_nothing_is_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 1.5 GiB torch stores the weights beside each graph; the wheel is named otherwise."""
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1)
    monkeypatch.setattr(importlib.metadata, "version", version)
    manifest = export_bundle(source_of(PooledHistory()), tmp_path / "bundle")
    assert manifest.tools["onnxruntime"] == onnxruntime.__version__
    assert not list((tmp_path / "bundle").glob("*.data"))


def test_another_backbone_is_served(tmp_path: Path) -> None:
    from unipinrec.runtime import Recommender, verify_bundle

    export_bundle(source_of(PooledHistory()), tmp_path / "bundle")
    assert verify_bundle(tmp_path / "bundle").ok
    history = [{"item": f"item-{i}", "actions": ["a"], "timestamp_ms": 1_000 * i} for i in range(1, 6)]
    slate = Recommender.load(tmp_path / "bundle").recommend(history=history, k=35)
    assert len(slate.items) == 35
    assert not {item.item for item in slate.items} & {e["item"] for e in history}


def test_a_branch_on_a_shape_is_caught_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"retrieval: queries \(batch=5\): differs by"):
        export_bundle(source_of(BranchOnShape()), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_the_methods_is_refused() -> None:
    with pytest.raises(ExportError, match=r"Linear lacks \['encode', 'extend', 'retrieve', 'rank', 'embed_items'\]"):
        source_of(nn.Linear(2, 2))


def test_a_catalogue_of_another_length_is_refused() -> None:
    with pytest.raises(ExportError, match=r"item_ids \(40\), titles \(39\)"):
        replace(source_of(PooledHistory()), titles=[None] * 39)


def test_repeated_item_ids_are_refused() -> None:
    with pytest.raises(ExportError, match="item_ids must be distinct"):
        replace(source_of(PooledHistory()), item_ids=["same"] * ITEMS)


def test_one_item_vector_in_a_large_catalogue_that_is_not_finite_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ITEMS", 5)
    module = PooledHistory()
    module.items.weight.data[7] = float("nan")
    with pytest.raises(ExportError, match="1 item vectors are not of unit length, first 'item-7'; train"):
        export_bundle(source_of(module), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_item_vectors_that_are_not_of_unit_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="40 of 40 vectors of catalogue items are not of unit length, one has 2; normalise"
    ):
        export_bundle(source_of(TwiceAsLong()), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_was_in_training_is_exported_as_it_predicts(tmp_path: Path) -> None:
    module = WithDropout()
    export_bundle(source_of(module), tmp_path / "bundle")
    expected = F.normalize(module.items.weight, dim=-1).detach().numpy()
    np.testing.assert_allclose(Bundle.open(tmp_path / "bundle").item_vectors, expected, atol=1e-6)


def test_item_vectors_that_are_up_to_chance_are_refused(tmp_path: Path) -> None:
    module = WithDropout()
    module.always = True
    with pytest.raises(ExportError, match="embed_items returns other vectors on the second call"):
        export_bundle(source_of(module), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_could_not_be_opened_is_not_left_behind(tmp_path: Path) -> None:
    options = ExportOptions(recall=float("nan"))
    with pytest.raises(ExportError, match=r"the written bundle cannot be served: .*Expected `float`, got `null`"):
        export_bundle(source_of(PooledHistory()), tmp_path / "bundle", options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_single_events_is_refused() -> None:
    source = source_of(PooledHistory())
    with pytest.raises(ExportError, match="max_history=1 leaves no history to extend; train with at least 2"):
        replace(source, model=msgspec.structs.replace(source.model, max_history=1))


def test_another_backbone_is_exported_in_both_precisions_and_its_fp32_part_stays(tmp_path: Path) -> None:
    export_bundle(source_of(PooledHistory()), tmp_path / "plain")
    manifest = export_bundle(source_of(PooledHistory()), tmp_path / "bundle", precisions=["fp16", "bf16"])
    assert list(manifest.precisions) == ["bf16", "fp16"]
    assert manifest == Bundle.open(tmp_path / "bundle").manifest
    assert {spec.agreement.problem for spec in manifest.precisions.values()} == {None}
    assert [spec.auc_change for spec in manifest.precisions.values()] == [{}, {}]  # no real users
    for path in (tmp_path / "plain").iterdir():
        assert path.name in SEALS or path.read_bytes() == (tmp_path / "bundle" / path.name).read_bytes(), path.name


def test_a_precision_that_recommends_something_else_is_refused(tmp_path: Path) -> None:
    module = PooledHistory()
    with torch.no_grad():
        module.query.weight *= 40.0  # attention that goes by differences which bf16 hardly resolves
        module.head.weight *= 30.0
    with pytest.raises(ParityError, match=r"bf16 does not recommend what fp32 recommends: .*; no bundle was written"):
        export_bundle(source_of(module), tmp_path / "bundle", precisions=["bf16"])
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_the_range_of_fp16_are_found(tmp_path: Path) -> None:
    module = PooledHistory()
    with torch.no_grad():
        module.query.weight.mul_(1.8e5)
        module.key.weight.mul_(1e-5)
        module.key.bias.mul_(1e-5)
    with pytest.raises(ParityError, match=r"fp16: ranker: the logits are not finite.*leave this precision out, or try"):
        export_bundle(source_of(module), tmp_path / "bundle", precisions=["fp16"])
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_layers_for_fp8_is_told_so(tmp_path: Path) -> None:
    source = source_of(PooledHistory())
    histories = random_histories(source)
    with pytest.raises(ExportError, match="no linear layer for fp8: a layer needs a norm or attention before it"):
        export_bundle(source, tmp_path / "bundle", histories=histories, precisions=["fp8"])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_precision_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(ExportError, match="unknown precision 'int4'; beside fp32 there are bf16, fp16"):
        export_bundle(source_of(PooledHistory()), tmp_path / "b", precisions=["int4"], progress=stages.append)
    assert stages == []
