from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unipinrec.models.config import Vocabulary
from unipinrec.models.embedders import ItemEmbedder, previous_timestamps, time_features
from unipinrec.models.model import UniPinRec

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
Make = Callable[..., UniPinRec]


def _features(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((count, 3), generator=generator), torch.randint(0, 2, (count, 2), generator=generator)


def _plain(vocabulary: Vocabulary) -> Vocabulary:
    return msgspec.structs.replace(vocabulary, dense={}, categories={})


def test_item_vectors_have_unit_length_and_depend_on_every_feature(make_model: Make) -> None:
    embedder = make_model().item_embedder
    rows, (dense, categories) = torch.tensor([0, 3, 10]), _features(3)
    with torch.no_grad():
        vectors = embedder(rows, dense, categories)
        assert vectors.shape == (3, 8)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
        for changed in (
            embedder(rows + torch.tensor([0, 1, 0]), dense, categories),
            embedder(rows, dense + torch.tensor([[0.0], [1.0], [0.0]]), categories),
            embedder(rows, dense, (categories + torch.tensor([[0, 0], [0, 1], [0, 0]])) % 2),
        ):
            assert torch.equal(changed[[0, 2]], vectors[[0, 2]]), "other items stay as they are"
            assert not torch.allclose(changed[1], vectors[1], atol=1e-3)


def test_a_residual_item_vector_is_the_id_embedding_plus_the_mlp(make_model: Make) -> None:
    plain = make_model(id_dim=8).item_embedder
    residual = make_model(id_dim=8, item_form="residual").item_embedder
    inputs = torch.tensor([3, -1]), torch.ones(2, 3), torch.tensor([[1, 0], [2, 1]])
    before: list[torch.Tensor] = []
    plain.mlp.register_forward_hook(lambda module, given, out: before.append(out))
    plain(*inputs)
    expected = F.normalize(before[0] + plain.ids.weight[[4, 0]], dim=-1)
    torch.testing.assert_close(residual(*inputs), expected)


def test_dense_features_are_standardised_inside(make_model: Make) -> None:
    embedder = make_model().item_embedder
    dense, categories = _features(2)
    with torch.no_grad():
        expected = embedder(torch.tensor([1, 2]), dense, categories)
        embedder.dense_mean.mul_(3.0).add_(1.0)
        embedder.dense_std.mul_(3.0)
        actual = embedder(torch.tensor([1, 2]), 3.0 * dense + 1.0, categories)
    torch.testing.assert_close(actual, expected)


def test_an_unknown_item_is_row_minus_one_and_belongs_to_no_item(make_model: Make) -> None:
    embedder = make_model().item_embedder
    dense, categories = (t[:1].expand(12, -1) for t in _features(1))
    with torch.no_grad():
        vectors = embedder(torch.arange(-1, 11), dense, categories)
    assert torch.unique(vectors.round(decimals=4), dim=0).shape[0] == 12


def test_ids_are_dropped_in_training_where_content_can_stand_in(make_model: Make) -> None:
    embedder = make_model().item_embedder
    dense, categories = (t[:1].expand(2000, -1) for t in _features(1))
    known = torch.full((2000,), 4)
    with torch.no_grad():
        unknown = embedder(torch.tensor([-1]), dense[:1], categories[:1])[0]
        assert not torch.isclose(embedder(known, dense, categories), unknown, atol=1e-2).all(dim=1).any()
        embedder.train()
        torch.manual_seed(0)
        dropped = torch.isclose(embedder(known, dense, categories), unknown, atol=1e-5).all(dim=1)
    assert 0.07 < float(dropped.float().mean()) < 0.13
    assert embedder.id_dropout == 0.1


def test_categories_are_hidden_in_training_alone(make_model: Make) -> None:
    embedder = make_model(id_dropout=0.0, category_dropout=0.4).item_embedder
    dense = torch.ones(2000, 3)
    known, categories = torch.full((2000,), 4), torch.ones((2000, 2), dtype=torch.int64)
    with torch.no_grad():
        whole = embedder(known, dense, categories)
        torch.testing.assert_close(whole, whole[:1].expand(2000, -1))
        hidden = embedder(known[:1], dense[:1], torch.tensor([[0, 0]]))
        embedder.train()
        torch.manual_seed(0)
        both = torch.isclose(embedder(known, dense, categories), hidden, atol=1e-5).all(dim=1)
    assert 0.12 < float(both.float().mean()) < 0.2


def test_ids_are_never_dropped_where_nothing_else_is_known(make_model: Make) -> None:
    model = make_model()
    embedder = ItemEmbedder(model.config, _plain(model.vocabulary)).train()
    rows = torch.full((500,), 4)
    vectors = embedder(rows, torch.zeros(500, 0), torch.zeros((500, 0), dtype=torch.int64))
    assert embedder.id_dropout == 0.0
    torch.testing.assert_close(vectors, vectors[:1].expand(500, -1))


def _token(model: UniPinRec, actions: list[float], masked: float, surface: int = 1, time: int = 5 * HOUR_MS) -> Tensor:
    vector = torch.nn.functional.normalize(torch.arange(8.0), dim=0)[None, None]
    with torch.no_grad():
        token: Tensor = model.token_embedder(
            vector,
            torch.tensor([[actions]]),
            torch.tensor([[masked]]),
            torch.tensor([[surface]]),
            (torch.tensor([[time]]), torch.tensor([[HOUR_MS]])),
        )
    return token[0, 0]


def test_a_masked_action_hides_what_it_was_and_differs_from_none(make_model: Make) -> None:
    model = make_model()
    hidden = _token(model, [1.0, 0.0, 1.0], masked=1.0)
    assert torch.equal(hidden, _token(model, [0.0, 1.0, 0.0], masked=1.0))
    none = _token(model, [0.0, 0.0, 0.0], masked=0.0)
    assert torch.equal(_token(model, [0.0, 0.0, 0.0], masked=1.0), hidden)
    assert float((hidden - none).abs().max()) > 1e-2


def test_a_token_reads_every_action_surface_and_time(make_model: Make) -> None:
    model = make_model()
    tokens = [
        _token(model, [0.0, 0.0, 0.0], 0.0),
        _token(model, [1.0, 0.0, 0.0], 0.0),
        _token(model, [0.0, 1.0, 0.0], 0.0),
        _token(model, [0.0, 0.0, 1.0], 0.0),
        _token(model, [1.0, 1.0, 0.0], 0.0),
        _token(model, [0.0, 0.0, 0.0], 0.0, surface=2),
        _token(model, [0.0, 0.0, 0.0], 0.0, time=6 * HOUR_MS),
    ]
    assert torch.unique(torch.stack(tokens).round(decimals=3), dim=0).shape[0] == len(tokens)


def test_the_time_before_each_event() -> None:
    times = torch.tensor([[5, 7, -1], [1, 2, 3]])
    assert previous_timestamps(times).tolist() == [[-1, 5, 7], [-1, 1, 2]]
    assert previous_timestamps(times, torch.tensor([4, -1])).tolist() == [[4, 5, 7], [-1, 1, 2]]


def _one(time: int, previous: int) -> list[float]:
    features: list[float] = time_features(torch.tensor([[time]]), torch.tensor([[previous]]))[0, 0].tolist()
    return features


@pytest.mark.parametrize(
    ("time", "previous", "expected"),
    [
        # 1 January 1970 was a Thursday: the week of these features begins there, at midnight
        (0, 0, [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
        (6 * HOUR_MS, 0, [1.0, 0.0, math.sin(math.pi / 14), math.cos(math.pi / 14), math.log(21_601) / 10, 0.0, 0.0]),
        (7 * DAY_MS, 7 * DAY_MS - 1000, [0.0, 1.0, 0.0, 1.0, math.log(2) / 10, 0.0, 0.0]),
        (1000, 3000, [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),  # out of order: no gap
        (0, -1, [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
        (-1, -1, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]),
        (-1, 5000, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_time_features(time: int, previous: int, expected: list[float]) -> None:
    assert _one(time, previous) == pytest.approx(expected, abs=1e-4)


def test_time_features_tell_days_and_milliseconds_of_today_apart() -> None:
    now = 1_760_000_000_000
    assert _one(now, now - 1000)[:4] == pytest.approx(_one(now + 7 * DAY_MS, now)[:4], abs=1e-6)
    assert _one(now, now - 1000)[2:4] != pytest.approx(_one(now + DAY_MS, now)[2:4], abs=0.1)
    assert _one(now, now - 1000)[4] == pytest.approx(math.log(2) / 10, abs=1e-6)
