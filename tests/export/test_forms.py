"""Both attention forms, grouped key/value heads and conditioned queries go through export and are served."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from unipinrec.errors import RequestError
from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.protocol import ExportSource
from unipinrec.export.servable import source_from_model
from unipinrec.models.checkpoint import ItemList
from unipinrec.models.config import TINY, AttentionForm, Vocabulary
from unipinrec.models.data.item_features import ItemFeatures
from unipinrec.models.model import UniPinRec
from unipinrec.runtime import Recommender, RecommendOptions

ITEMS = 60


def source_of(form: AttentionForm, conditioned: bool) -> ExportSource:
    config = msgspec.structs.replace(TINY, attention=form, num_kv_heads=1, outcome_conditioned=conditioned)
    vocabulary = Vocabulary(
        num_items=ITEMS,
        actions=("click", "save"),
        positive_actions=("save",),
        surfaces=("unknown", "home"),
        dense={"size": 1},
        categories={"kind": ("a", "b")},
    )
    torch.manual_seed(1)
    model = UniPinRec(config, vocabulary)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    features = ItemFeatures(
        dense=rng.standard_normal((ITEMS, 1)).astype(np.float32), categories=rng.integers(0, 3, (ITEMS, 1))
    )
    catalogue = ItemList(item_ids=[str(i) for i in range(ITEMS)], titles=[None] * ITEMS)
    return source_from_model(model, catalogue, features)


@pytest.mark.parametrize(("form", "conditioned", "prefix"), [("sink", True, 1), ("self", False, 0)])
def test_a_form_is_exported_and_served(tmp_path: Path, form: AttentionForm, conditioned: bool, prefix: int) -> None:
    manifest = export_bundle(source_of(form, conditioned), tmp_path / "bundle")
    keys = next(t for t in manifest.graphs["encoder"].outputs if t.name == "present.0.key")
    assert keys.shape == ("batch", 1, "history + 1" if prefix else "history", 32)
    assert ("outcomes" in {t.name for t in manifest.graphs["retrieval"].inputs}) == conditioned
    recommender = Recommender.load(tmp_path / "bundle")
    history = [{"item": str(i), "actions": ["click"], "timestamp_ms": 10**12 + i} for i in range(9)]
    candidates = [str(i) for i in range(20, 40)]
    whole = recommender.score(history, candidates, RecommendOptions(now_ms=2 * 10**12))
    for cut in (1, 8):
        grown = recommender.score(history, candidates, RecommendOptions(now_ms=2 * 10**12), extend_at=cut)
        np.testing.assert_allclose(grown, whole, atol=1e-5, rtol=0)
    if conditioned:
        wanted = [
            [item.retrieval_score for item in recommender.recommend(history, 5, RecommendOptions(outcomes=o)).items]
            for o in (("click",), ("save",))
        ]
        assert wanted[0] != wanted[1]
    else:
        with pytest.raises(RequestError, match="not conditioned on outcomes"):
            recommender.recommend(history, 5, RecommendOptions(outcomes=("save",)))


def test_an_item_without_a_title_is_shown_by_its_features() -> None:
    source = source_of("sink", False)
    assert set(source.titles) == {"kind a", "kind b", None}
    assert [title is None for title in source.titles] == [code == 0 for code in source.item_categories[:, 0]]
