from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from unipinrec.errors import ConfigError
from unipinrec.models.config import PAPER, SIZES, SMALL, TINY, ModelConfig, Vocabulary


def test_named_sizes_are_those_of_the_documents() -> None:
    assert list(SIZES) == ["tiny", "small", "paper"]
    assert (TINY.num_layers, TINY.hidden_size, TINY.max_history) == (2, 64, 64)
    assert (SMALL.num_layers, SMALL.hidden_size, SMALL.num_heads, SMALL.max_history) == (4, 256, 8, 992)
    assert (PAPER.num_layers, PAPER.hidden_size, PAPER.num_heads, PAPER.max_history) == (12, 768, 12, 1024)


def test_head_width_and_prefix_follow_from_the_architecture() -> None:
    assert (TINY.head_dim, PAPER.head_dim) == (32, 64)
    assert msgspec.structs.replace(TINY, attention="sink").kv_prefix_slots == 1
    assert msgspec.structs.replace(TINY, attention="self").kv_prefix_slots == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1"),
        ({"intermediate_size": -1}, "intermediate_size=-1 must be at least 1"),
        ({"max_history": 0}, "max_history=0 must be at least 1"),
        ({"feature_dim": 0}, "feature_dim=0 must be at least 1"),
        ({"hidden_size": 66}, "hidden_size=66 must be a multiple of 2 \\* num_heads=4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
        ({"token_dropout": 1.0}, "token_dropout=1.0 must be in"),
        ({"item_form": "residual", "id_dim": 32}, "id_dim=32 must equal item_dim=64"),
        ({"dropout": -0.1}, "dropout=-0.1 must be in"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive and finite"),
        ({"rope_theta": math.inf}, "rope_theta=inf must be positive and finite"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06 must be positive and finite"),
        ({"norm_eps": math.nan}, "norm_eps=nan must be positive and finite"),
    ],
)
def test_an_impossible_architecture_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        msgspec.structs.replace(TINY, **change)


def test_an_unknown_key_or_form_of_attention_is_refused() -> None:
    known = msgspec.to_builtins(TINY)
    with pytest.raises(msgspec.ValidationError, match="depth"):
        msgspec.convert({**known, "depth": 3}, ModelConfig)
    with pytest.raises(msgspec.ValidationError, match="attention"):
        msgspec.convert({**known, "attention": "full"}, ModelConfig)


def test_a_config_cannot_be_changed_and_survives_json() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        TINY.num_layers = 3  # type: ignore[misc]  # the point of the test
    assert msgspec.json.decode(msgspec.json.encode(PAPER), type=ModelConfig) == PAPER


def test_dense_width_is_the_sum_of_all_dense_features() -> None:
    vocabulary = Vocabulary(
        num_items=3,
        actions=("click",),
        positive_actions=("click",),
        surfaces=("unknown",),
        dense={"size": 1, "content": 16},
        categories={},
    )
    assert vocabulary.dense_width == 17
    assert msgspec.structs.replace(vocabulary, dense={}).dense_width == 0
