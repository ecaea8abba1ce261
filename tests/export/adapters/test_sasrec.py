"""Models that RecTools trained (tests/fixtures/make_sasrec.py), against its scores; it is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from unipinrec.errors import ExportError
from unipinrec.export.adapters.sasrec import source_from_sasrec
from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.export.protocol import Events, ExportSource
from unipinrec.runtime import Recommender

STORED = Path(__file__).resolve().parents[2] / "fixtures" / "sasrec"
VARIANTS = ("default", "categories", "cosine", "masked")
NOTHING = torch.empty(0)


def stored(variant: str) -> tuple[list[list[str]], list[dict[str, float]]]:
    """Histories, and RecTools' scores after each."""
    document = json.loads((STORED / f"{variant}.json").read_text())
    return document["histories"], document["scores"]


def changed(tmp_path: Path, config: dict[str, Any] | None = None, **others: Any) -> Path:
    """A checkpoint with other values of its configuration, or of itself."""
    checkpoint = torch.load(STORED / "default.ckpt", weights_only=False)
    checkpoint["hyper_parameters"]["model_config"] |= config or {}
    torch.save({**checkpoint, **others}, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


@torch.inference_mode()
def scores(source: ExportSource, histories: list[list[str]]) -> NDArray[np.float32]:
    """Of all items after each history, which are right-padded with items at random."""
    windows = [[source.item_ids.index(item) for item in one[-source.model.max_history :]] for one in histories]
    rows = torch.randint(0, len(source.item_ids), (len(windows), source.model.max_history + 2))
    for own, window in zip(rows, windows, strict=True):
        own[: len(window)] = torch.tensor(window)
    nothing = torch.zeros_like(rows)
    table = source.servable.embed_items(torch.arange(len(source.item_ids)), NOTHING, NOTHING)
    events = Events(
        item_vectors=table[rows],
        actions=torch.zeros(*rows.shape, 1),
        surfaces=nothing,
        timestamps_ms=nothing,
        lengths=torch.tensor([len(window) for window in windows]),
    )
    _, hidden = source.servable.encode(events)
    return (source.servable.retrieve(hidden, None)[:, 0] @ table.T).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_module_computes_the_scores_of_rectools(variant: str) -> None:
    source, (histories, expected) = source_from_sasrec(STORED / f"{variant}.ckpt"), stored(variant)
    assert {len(one) > 10 for one in histories} == {True, False}  # some are cut, some are padded
    wanted = np.array([[own[item] for item in source.item_ids] for own in expected])
    assert np.ptp(wanted) > 0.5
    np.testing.assert_allclose(scores(source, histories), wanted, atol=1e-5)


def test_a_history_without_its_padding_has_other_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an adapter that leaves out the padding would serve: RecTools' default attends to it."""
    source, (histories, expected) = source_from_sasrec(STORED / "default.ckpt"), stored("default")
    monkeypatch.setattr(source.module, "sees_padding", False)
    wanted = np.array([[own[item] for item in source.item_ids] for own in expected])
    assert np.abs(scores(source, histories) - wanted).max() > 1e-2


@pytest.mark.parametrize("variant", ["default", "cosine"])
def test_a_bundle_answers_with_the_scores_of_rectools(variant: str, differences: Any, tmp_path: Path) -> None:
    source, (histories, expected) = source_from_sasrec(STORED / f"{variant}.ckpt"), stored(variant)
    options = ExportOptions(reference=lambda items: scores(source, [list(items)])[0])
    manifest = export_bundle(source, tmp_path / "bundle", options=options)
    assert set(manifest.graphs) == {"encoder", "retrieval"}
    assert set(manifest.config["reference"]["served"]) == {"fresh"}
    found = differences(tmp_path / "bundle", [one[-10:] for one in histories], expected)
    assert {way: same for way, (_, same) in found.items()} == {"fresh": len(histories), "http": len(histories)}
    assert max(largest for largest, _ in found.values()) < 1e-4


def test_of_a_long_history_the_newest_events_count(tmp_path: Path) -> None:
    source, (histories, expected) = source_from_sasrec(STORED / "masked.ckpt"), stored("masked")
    export_bundle(source, tmp_path / "bundle")
    longest = max(range(len(histories)), key=lambda user: len(histories[user]))
    events = [{"item": item, "actions": []} for item in histories[longest]]
    with Recommender.load(tmp_path / "bundle", "cpu", window_slack=1) as recommender:
        slate = recommender.recommend(events, 5)
    for item in slate.items:
        assert item.score == pytest.approx(expected[longest][item.item], abs=1e-4)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"cls": "BERT4RecModel"}, "this model has cls='BERT4RecModel', only 'SASRecModel' is supported"),
        ({"transformer_layers_type": "a.PreLNTransformerLayers"}, "transformer_layers_type='a.PreLNTransformerLayers'"),
        ({"use_causal_attn": False}, "use_causal_attn=False, only True"),
        ({"n_blocks": 3}, r"not those of a SASRecModel: .*Missing key.*transformer_blocks\.2"),
        ({"use_pos_emb": False}, r"not those of a SASRecModel: .*Unexpected key.*pos_encoding_layer\.pos_emb\.weight"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"(?s){match}"):
        source_from_sasrec(changed(tmp_path, config))


def test_other_tokens_than_padding_are_refused(tmp_path: Path) -> None:
    known = torch.load(STORED / "default.ckpt", weights_only=False)["hyper_parameters"]
    path = changed(tmp_path, hyper_parameters={**known, "item_extra_tokens": ("PAD", "MASK")})
    with pytest.raises(ExportError, match=r"the extra tokens \('PAD', 'MASK'\), only \('PAD',\) are supported"):
        source_from_sasrec(path)


def test_items_made_of_something_else_are_refused(tmp_path: Path) -> None:
    weights = torch.load(STORED / "default.ckpt", weights_only=False)["state_dict"]
    weights["torch_model.item_model.item_net_blocks.1.mlp.weight"] = torch.zeros(3)
    with pytest.raises(ExportError, match=r"an item is made of \['mlp.weight'\], only ids and categories are"):
        source_from_sasrec(changed(tmp_path, state_dict=weights))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no checkpoint")
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "other")
    torch.save({"state_dict": {}, "hyper_parameters": {}, "code": Path}, tmp_path / "code")
    for name in ("text", "other", "code", "absent"):
        with pytest.raises(
            ExportError, match=rf"{name} is no checkpoint of a SASRecModel: .*; write one with model\.fit"
        ):
            source_from_sasrec(tmp_path / name)
    with pytest.raises(ExportError, match="dict is no fitted SASRecModel; fit it, or pass the path of a checkpoint"):
        source_from_sasrec({})
