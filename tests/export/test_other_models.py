"""Models of other forms are served as they score: plain inner products, no ranker, histories that cannot be cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from live_server import served
from numpy.typing import NDArray
from starlette.testclient import TestClient
from torch import Tensor, nn

from unipinrec.errors import RequestError
from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.protocol import Candidates, Events, ExportSource, KeyValues, Past
from unipinrec.runtime import CacheOptions, Recommender, RecommendOptions, verify_bundle
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import ModelSpec, RankerInput
from unipinrec.runtime.retrieval.retriever import NO_COSINES
from unipinrec.runtime.server.bodies import SimilarBody
from unipinrec.runtime.server.similar import similar_items

ITEMS, DIM = 60, 8


class Recurrent(nn.Module):
    """A GRU: it keeps no keys and values, and an item's score is an inner product plus a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.items, self.bias = nn.Embedding(ITEMS, DIM), nn.Embedding(ITEMS, 1)
        self.items.weight.data *= torch.exp(torch.randn(ITEMS, 1))
        self.gru, self.head = nn.GRU(DIM, DIM, batch_first=True), nn.Linear(DIM, 2)

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        hidden, _ = self.gru(events.item_vectors[..., :-1])
        return (), hidden.gather(1, (events.lengths - 1)[:, None, None].expand(-1, 1, DIM))[:, 0]

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        return torch.cat([last_hidden_state, torch.ones_like(last_hidden_state[:, :1])], 1)[:, None]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        return torch.cat([self.items(rows), self.bias(rows)], 1)

    @torch.inference_mode()
    def scores(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Of all items."""
        hidden = self.gru(self.items(torch.tensor(rows))[None])[0][0, -1]
        return (self.items.weight @ hidden + self.bias.weight[:, 0]).numpy()  # type: ignore[no-any-return]


class Ranked(Recurrent):
    """With a ranker that reads the last hidden state alone."""

    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor) -> Tensor:
        return self.head(candidates.item_vectors[..., :-1] * last_hidden_state[:, None])  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Of all items and actions."""
        hidden = self.gru(self.items(torch.tensor(rows))[None])[0][0, -1]
        return self.head(self.items.weight * hidden).numpy()  # type: ignore[no-any-return]


def source_of(module: nn.Module, ranker: RankerInput | None) -> ExportSource:
    return ExportSource(
        module=module,
        model=ModelSpec(
            num_layers=0,
            num_kv_heads=1,
            head_dim=1,
            hidden_size=DIM,
            item_dim=DIM + 1,
            max_history=12,
            kv_prefix_slots=0,
            outcome_conditioned=False,
            similarity="dot",
            item_bias=True,
            cache="none",
            ranker=ranker,
        ),
        actions=("click", "save"),
        positive_actions=("click",),
        surfaces=("unknown",),
        dense={},
        categories={},
        item_ids=[f"item-{i}" for i in range(ITEMS)],
        titles=[None] * ITEMS,
        item_dense=np.zeros((ITEMS, 0), np.float32),
        item_categories=np.zeros((ITEMS, 0), np.int64),
        config={},
    )


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A module and its bundle."""

    module: Ranked
    folder: Path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    module, folder = Ranked(), tmp_path_factory.mktemp("plain") / "bundle"
    export_bundle(source_of(module, None), folder)
    return Exported(module=module, folder=folder)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    module, folder = Ranked(), tmp_path_factory.mktemp("ranked") / "bundle"
    export_bundle(source_of(module, "past+last_hidden_state"), folder, precisions=["bf16"])
    return Exported(module=module, folder=folder)


def events(rows: Sequence[int]) -> list[dict[str, object]]:
    return [{"item": f"item-{row}", "actions": ["click"], "timestamp_ms": 10**12 + i} for i, row in enumerate(rows)]


HISTORY = [3, 1, 4, 1, 5, 9, 2]
ALL = RecommendOptions(exclude_seen=False)


def test_a_slate_is_in_the_order_of_the_models_own_scores(plain: Exported) -> None:
    scores = plain.module.scores(HISTORY)
    with Recommender.load(plain.folder, cache=CacheOptions(budget_bytes=1 << 20)) as recommender:
        slate = recommender.recommend(events(HISTORY), k=10, options=ALL, user="ann")
        again = recommender.recommend(events(HISTORY), k=10, options=ALL, user="ann")
        longer = recommender.recommend(events([*HISTORY, 6]), k=10, options=ALL, user="ann")
    assert [item.item for item in slate.items] == [f"item-{row}" for row in np.argsort(-scores)[:10]]
    assert [item.score for item in slate.items] == pytest.approx(np.sort(scores)[::-1][:10].tolist(), abs=1e-4)
    assert (slate.order, slate.kv, again.kv, slate.items[0].actions) == ("retrieval", "miss", "miss", {})
    best = np.argmax(plain.module.scores([*HISTORY, 6]))
    assert longer.items[0].item == f"item-{best}"


def test_a_ranker_may_read_the_last_hidden_state(ranked: Exported) -> None:
    logits = ranked.module.logits(HISTORY)
    with Recommender.load(ranked.folder) as recommender:
        slate = recommender.recommend(events(HISTORY), k=ITEMS, options=ALL)
        together = recommender.score(events(HISTORY), [f"item-{row}" for row in range(ITEMS)])
    assert together == pytest.approx(logits, abs=1e-5)
    assert [item.item for item in slate.items] == [f"item-{row}" for row in np.argsort(-logits[:, 0])]
    assert slate.items[0].actions["save"] == pytest.approx(
        1 / (1 + np.exp(-logits[np.argmax(logits[:, 0]), 1])), abs=1e-5
    )


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_both_are_verified_and_compared_on_every_device_of_the_cpu(
    plain: Exported, ranked: Exported, device: str
) -> None:
    for exported in (plain, ranked):
        report = verify_bundle(exported.folder, device)
        assert report.ok, report
    assert Bundle.open(ranked.folder).manifest.precisions["bf16"].agreement.problem is None


def test_what_such_a_bundle_cannot_do_is_said(plain: Exported, caplog: pytest.LogCaptureFixture) -> None:
    with Recommender.load(plain.folder, cache=CacheOptions(budget_bytes=1 << 20)) as recommender:
        assert recommender.cache is None
        assert "this model's histories cannot be cached; each request encodes its whole history" in caplog.text
        with pytest.raises(RequestError, match="order='value' needs a ranker, which this bundle lacks"):
            recommender.recommend(events(HISTORY), options=RecommendOptions(order="value"))
        with pytest.raises(RequestError, match="this bundle has no ranker that could score items"):
            recommender.score(events(HISTORY), ["item-1"])
        ranked = recommender.rank(events(HISTORY), ["item-1", "item-2", "item-3"]).items
        assert [(item.value, item.actions) for item in ranked] == [(None, {})] * 3
        assert [item.score for item in ranked] == sorted((item.retrieval_score or 0.0 for item in ranked), reverse=True)


def test_encoding_in_two_parts_is_refused(ranked: Exported) -> None:
    with (
        Recommender.load(ranked.folder) as recommender,
        pytest.raises(RequestError, match="extend_at=2: this model encodes whole histories alone; leave it out"),
    ):
        recommender.score(events(HISTORY), ["item-1"], extend_at=2)


def test_similar_items_are_similar_by_cosine(plain: Exported) -> None:
    with Recommender.load(plain.folder) as recommender:
        answer = similar_items(recommender, SimilarBody(items=("item-7",), k=5))
    vectors = plain.module.items.weight.detach().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit[7]
    assert [item.item for item in answer.items] == [f"item-{row}" for row in np.argsort(-cosines)[1:6]]
    assert answer.items[0].similarity == pytest.approx(np.sort(cosines)[-2], abs=1e-5)
    assert answer.exact == NO_COSINES


def test_over_http_it_has_the_graphs_that_it_has(plain: Exported) -> None:
    with served(plain.folder) as app, TestClient(app) as client:
        answer = client.post("/v1/recommend", json={"user": "ann", "history": events(HISTORY), "k": 3})
        best = [row for row in np.argsort(-plain.module.scores(HISTORY)) if row not in HISTORY][:3]
        assert [item["item"] for item in answer.json()["items"]] == [f"item-{row}" for row in best]
        assert client.get("/v2/models/encoder").status_code == 200
        assert client.get("/v2/models/ranker").json()["error"].endswith("this server has encoder, retrieval")
