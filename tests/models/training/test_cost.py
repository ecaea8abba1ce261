from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from unipinrec.errors import ConfigError
from unipinrec.models.config import ModelConfig
from unipinrec.models.data.schema import Dataset
from unipinrec.models.training.config import RunConfig, TrainConfig
from unipinrec.models.training.cost import training_cost

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=48,
    max_history=8,
    item_dim=16,
    id_dim=16,
    feature_dim=4,
)


def config(layers: int = 2, **train: float) -> RunConfig:
    model = msgspec.structs.replace(MODEL, num_layers=layers)
    return RunConfig(model=model, train=msgspec.convert({"batch_size": 4, **train}, TrainConfig))


def test_parameters_and_state_are_what_the_shapes_say(random_dataset: Callable[..., Dataset]) -> None:
    cost = training_cost(random_dataset(1), config())
    block = 32 * 96 + 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 2 * 16  # qkv, out, feed-forward, norms, sink
    assert cost.parameters["blocks"] == 2 * block
    assert cost.parameters["total"] == 1 + sum(n for part, n in cost.parameters.items() if part != "total")
    assert cost.state_bytes == 16 * cost.parameters["total"]
    assert cost.step_bytes == cost.state_bytes + 4 * cost.activation_bytes_per_example


def test_one_more_layer_costs_its_products(random_dataset: Callable[..., Dataset]) -> None:
    data = random_dataset(1)
    two, three = training_cost(data, config(2)), training_cost(data, config(3))
    tokens = two.example_events + two.example_candidates
    # Two operations per weight forward, four backward; attention is two products of queries x slots x width.
    weights = 32 * 96 + 32 * 32 + 3 * 32 * 48
    slots = two.example_events + 1
    attention = 2 * 2 * 32 * (two.example_events**2 + two.example_candidates * slots)
    assert three.flops_per_example - two.flops_per_example == 6 * tokens * weights + 3 * attention
    assert three.activation_bytes_per_example > two.activation_bytes_per_example
    assert (two.windows, two.steps_per_epoch) == (three.windows, three.steps_per_epoch)


def test_data_without_training_windows_is_refused(make_dataset: Callable[..., Dataset]) -> None:
    data = make_dataset([("u", "a", "feed", 1, "click"), ("u", "b", "feed", 2, "click")])
    with pytest.raises(ConfigError, match="no training windows: too few events before its split"):
        training_cost(data, config())
