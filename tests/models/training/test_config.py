from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from unipinrec.errors import ConfigError
from unipinrec.models.config import PAPER, TINY
from unipinrec.models.training.config import RunConfig, TrainConfig, load_run_config


def _load(tmp_path: Path, text: str, **overrides: Any) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_run_config(str(path), overrides)


def test_a_named_size_has_the_default_settings() -> None:
    assert load_run_config("paper", {}) == RunConfig(model=PAPER, train=TrainConfig())


def test_a_file_overrides_its_size_and_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    text = 'size = "tiny"\n[model]\nmax_history = 128\nattention = "self"\n[train]\nepochs = 12\nseed = 3\n'
    run = _load(tmp_path, text + "[train.action_weights]\nlike = 2.0\n", epochs=5, batch_size=None)
    assert (run.model.max_history, run.model.attention, run.model.hidden_size) == (128, "self", TINY.hidden_size)
    assert (run.train.epochs, run.train.seed, run.train.batch_size) == (5, 3, 64)
    assert run.train.weights_of(("click", "like")) == (1.0, 2.0)


def test_the_example_of_the_documentation_names_every_training_setting(tmp_path: Path) -> None:
    document = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    example = document.split("```toml\n")[1].split("```")[0]
    (tmp_path / "run.toml").write_text(example)
    train = load_run_config(str(tmp_path / "run.toml"), {}).train
    assert set(tomllib.loads(example)["train"]) == set(TrainConfig.__struct_fields__)
    default = TrainConfig()
    for name in ("max_candidates", "max_targets", "valid_requests"):
        assert getattr(train, name) == getattr(default, name)


def test_an_empty_file_is_tiny(tmp_path: Path) -> None:
    assert _load(tmp_path, "").model == TINY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('size = "huge"', "size='huge' is unknown; sizes are \\['paper', 'small', 'tiny'\\]"),
        ("epochs = 3", "epochs"),
        ("[train]\nepoch = 3", "epoch"),
        ("[train]\nepochs = 'three'", "Expected `int`, got `str`"),
        ('[train]\nprecision = "int8"', "precision"),
        ("[model]\ndepth = 3", "depth"),
        ("[model]\nnum_heads = 7", "hidden_size=64 must be a multiple of 2 \\* num_heads=14"),
        ("[model]\nnum_heads = 2.5", "num_heads"),
        ("[train\nepochs = 3", "run.toml"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, text)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_run_config(str(tmp_path / "run.toml"), {})


def test_what_is_neither_a_size_nor_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'huge' is neither a size \\(tiny, small, paper\\) nor a file"):
        load_run_config("huge", {})
    with pytest.raises(ConfigError, match=r"no\.toml"):
        load_run_config(str(tmp_path / "no.toml"), {})
    with pytest.raises(ConfigError, match="directory"):
        load_run_config(str(tmp_path), {})


def test_an_override_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match="epochs=0 must be at least 1"):
        load_run_config("tiny", {"epochs": 0})
    with pytest.raises(ConfigError, match="epoch"):
        load_run_config("tiny", {"epoch": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_negatives": 0}, "num_negatives=0 must be at least 1"),
        ({"max_candidates": -1}, "max_candidates=-1 must be at least 1"),
        ({"max_targets": 0}, "max_targets=0 must be at least 1"),
        ({"valid_requests": 0}, "valid_requests=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
        ({"grad_clip": -1.0}, "grad_clip=-1.0 must be positive"),
        ({"learning_rate": 1e308}, r"learning_rate=1e\+308 must be positive and below 1e30"),
        ({"grad_clip": float("inf")}, "grad_clip=inf must be positive and below 1e30"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and not negative"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be finite and not negative"),
        ({"mask_probability": 1.0}, "mask_probability=1.0 must be in"),
        ({"mask_probability": -0.1}, "mask_probability=-0.1 must be in"),
        ({"retrieval_weight": -1.0}, "retrieval_weight=-1.0 must be finite and not negative"),
        ({"masked_weight": -1.0}, "masked_weight=-1.0 must be finite and not negative"),
        ({"action_weights": {"like": -1.0}}, "action_weights\\['like'\\]=-1.0 must be finite and not negative"),
        ({"retrieval_weight": 0.0, "ranking_weight": 0.0}, "nothing would be trained"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be in"),
        ({"history_candidates": -1}, "history_candidates=-1 must be finite and not negative"),
        ({"log_every": 0}, "log_every=0 must be at least 1"),
        ({"patience": 3, "fit_validation": True}, "patience=3 needs held-out requests"),
        ({"patience": 0}, "patience=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"seed": 2**32}, "seed=4294967296 must be in"),
    ],
)
def test_a_setting_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change)


def test_a_weight_of_an_action_that_the_data_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="action_weights names \\['love'\\]; the data has \\['click', 'like'\\]"):
        TrainConfig(action_weights={"love": 2.0}).weights_of(("click", "like"))


def test_weights_that_train_nothing_are_refused() -> None:
    nothing = {"click": 0.0, "like": 0.0}
    message = "retrieval_weight and the weights of all actions \\['click', 'like'\\] are 0: nothing would be trained"
    with pytest.raises(ConfigError, match=message):
        TrainConfig(retrieval_weight=0.0, action_weights=nothing).weights_of(("click", "like"))
    assert TrainConfig(action_weights=nothing).weights_of(("click", "like")) == (0.0, 0.0)
    rest = TrainConfig(retrieval_weight=0.0, action_weights=nothing)
    assert rest.weights_of(("click", "like", "share")) == (0.0, 0.0, 1.0)
