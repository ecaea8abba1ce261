from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from unipinrec.errors import CheckpointError, ConfigError, DataError, TrainingError, TrainingInterrupted
from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.config import TINY, ModelConfig
from unipinrec.models.data.schema import Dataset, TimeSplit, read_dataset
from unipinrec.models.evaluate import Scores, gather_scores, held_out_requests, item_vectors, metrics_of, model_scores
from unipinrec.models.training import train
from unipinrec.models.training.config import RunConfig, TrainConfig
from unipinrec.models.training.log import StepReport
from unipinrec.models.training.train import EpochReport, RunMetrics, Trainer

Make = Callable[..., Dataset]
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=48,
    max_history=10,
    item_dim=16,
    id_dim=16,
    feature_dim=8,
)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is bit-equal here is not on every GPU; Accelerate keeps its choice of device for the whole process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _config(train: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "num_negatives": 4,
        "max_targets": 12,
        "precision": "fp32",
        **(train or {}),
    }
    return RunConfig(model=msgspec.structs.replace(MODEL, **model), train=TrainConfig(**settings))


@pytest.fixture(scope="module")
def noise(random_dataset: Make) -> Dataset:
    """Random events and slates: nothing to learn, but every part of a step has something to do."""
    return random_dataset(7, users=20, slates=80, features=True)


@pytest.fixture(scope="module")
def rule(make_dataset: Make) -> Dataset:
    """A world with two rules: after item i comes item i + 1, and of what is shown the first four items are clicked."""
    letters = "abcdefgh"
    events, slates = [], []
    for user in range(16):
        for t in range(10):
            item = letters[(user + t) % 8]
            events.append((f"u{user:02d}", item, "feed", 10 * t, "click" if item in "abcd" else "like"))
        for number, time in enumerate((35, 55, 85)):
            shown = [letters[(user + number + i) % 8] for i in range(4)]
            content = [(item, "click" if item in "abcd" else "") for item in shown]
            slates.append((3 * user + number, f"u{user:02d}", "feed", time, content))
    return make_dataset(events, slates, split=(80, 85), features=True)


def _run_into(trainer: Trainer, steps: list[dict[str, float]]) -> None:
    """Ask to stop after every step, also where the first thing to do is to end an epoch."""
    for report in trainer.run():
        if isinstance(report, StepReport):
            steps.append(report.losses)
            trainer.stop_requested = True


def _run(trainer: Trainer, stop_after: int | None = None) -> tuple[list[dict[str, float]], list[EpochReport]]:
    steps: list[dict[str, float]] = []
    epochs: list[EpochReport] = []
    for report in trainer.run():
        if isinstance(report, StepReport):
            steps.append(report.losses)
            trainer.stop_requested = stop_after == len(steps)
        else:
            epochs.append(report)
    return steps, epochs


LEARNING = {"epochs": 30, "learning_rate": 0.005, "warmup_steps": 30, "num_negatives": 99, "max_targets": 4096}


def test_a_small_world_is_learned_and_the_rule_holds_on_held_out_slates(rule: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(rule, _config({**LEARNING, "mask_probability": 0.1}), tmp_path)
    _, epochs = _run(trainer)
    first, last = epochs[0].losses, epochs[-1].losses
    assert first["retrieval"] > 2.0
    assert first["candidate_actions"] > 2.0
    assert last["retrieval"] < 0.3
    assert last["candidate_actions"] < 0.15
    requests = held_out_requests(trainer.data, trainer.positive, "test")
    scores = gather_scores(list(model_scores(load_checkpoint(tmp_path).model, trainer.data, requests)))
    metrics = metrics_of(scores, trainer.data, requests, trainer.vocabulary.actions)
    assert metrics.ranking is not None
    assert metrics.ranking["click"].rows == 64
    assert metrics.ranking["click"].auc == 1.0


def test_the_same_seed_gives_the_same_run(noise: Dataset, tmp_path: Path) -> None:
    config = _config({"epochs": 1}, dropout=0.1)
    first, _ = _run(Trainer(noise, config, tmp_path / "first"))
    torch.manual_seed(99)
    assert _run(Trainer(noise, config, tmp_path / "second"))[0] == first
    other, _ = _run(Trainer(noise, _config({"epochs": 1, "seed": 1}, dropout=0.1), tmp_path / "other"))
    assert other[0] != first[0]


def test_two_threads_add_up_gradients_in_the_same_order_each_time(dataset: Path, tmp_path: Path) -> None:
    """Items that occur many times in a batch: atomic additions to their gradients would come in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = RunConfig(model=TINY, train=TrainConfig(epochs=1, batch_size=32, precision="fp32", seed=3))
        runs = [_run(Trainer(read_dataset(dataset), config, tmp_path / name))[0] for name in "abc"]
    finally:
        torch.set_num_threads(before)
    assert len(runs[0]) >= 10
    assert runs[0] == runs[1] == runs[2]


def test_a_run_stops_in_a_validation_and_does_it_again(
    noise: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config({"epochs": 2})
    _, expected = _run(Trainer(noise, config, tmp_path / "whole"))
    first = Trainer(noise, config, tmp_path / "parts")

    def signalled(*inputs: Any) -> Iterator[Scores]:
        first.stop_requested = True
        yield from model_scores(*inputs)

    monkeypatch.setattr(train, "model_scores", signalled)
    with pytest.raises(TrainingInterrupted, match="stopped after step 5 of 10"):
        list(first.run())
    monkeypatch.undo()
    assert first.reports == []
    steps, epochs = _run(Trainer(noise, config, tmp_path / "parts", resume=True))
    assert len(steps) == 5
    assert [_timeless(epoch) for epoch in epochs] == [_timeless(epoch) for epoch in expected]


@pytest.mark.parametrize("stop_after", [1, 3, 5, 6, 9, 13])
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    noise: Dataset, tmp_path: Path, stop_after: int, conditioned: bool
) -> None:
    """With dropout, masks, id dropout and drawn targets: all randomness belongs to the step, not to the process."""
    config = _config({"epochs": 3}, dropout=0.2, outcome_conditioned=conditioned)
    whole = Trainer(noise, config, tmp_path / "whole")
    assert whole.steps_per_epoch == 5
    expected, expected_epochs = _run(whole)
    first = Trainer(noise, config, tmp_path / "parts")
    with pytest.raises(TrainingInterrupted, match=f"stopped after step {stop_after} of 15; go on with --resume"):
        _run(first, stop_after)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global state is what must not matter
    second = Trainer(noise, config, tmp_path / "parts", resume=True)
    rest, _ = _run(second)
    assert rest == expected[stop_after:]
    for name in ("model.safetensors", "state.safetensors", "config.json", "catalogue.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [_timeless(r) for r in second.reports] == [_timeless(r) for r in expected_epochs]


def _timeless(report: EpochReport) -> EpochReport:
    return msgspec.structs.replace(report, seconds=0.0)


def test_a_run_can_be_stopped_more_than_once_and_prolonged(noise: Dataset, tmp_path: Path) -> None:
    config = _config({"epochs": 2})
    expected, _ = _run(Trainer(noise, config, tmp_path / "whole"))
    steps: list[dict[str, float]] = []
    for part in range(5):
        trainer = Trainer(noise, config, tmp_path / "parts", resume=part > 0)
        with pytest.raises(TrainingInterrupted, match="go on with --resume"):
            _run_into(trainer, steps)
    rest, _ = _run(Trainer(noise, config, tmp_path / "parts", resume=True))
    assert steps + rest == expected
    finished = Trainer(noise, config, tmp_path / "parts", resume=True)
    assert finished.finished
    assert _run(finished) == ([], [])
    longer = Trainer(noise, _config({"epochs": 3}), tmp_path / "parts", resume=True)
    assert len(_run(longer)[0]) == 5
    assert [report.epoch for report in longer.reports] == [0, 1, 2]


def test_a_run_that_dies_before_it_saves_its_state_repeats_the_epoch(noise: Dataset, tmp_path: Path) -> None:
    """The best checkpoint and the metrics are written before the state; what they tell must not be told twice."""
    config, folder = _config({"epochs": 3}), tmp_path / "run"
    saved: dict[str, bytes] = {}
    expected = []
    for report in Trainer(noise, config, folder).run():
        if isinstance(report, EpochReport):
            expected.append(_timeless(report))
            if report.epoch == 0:
                saved = {name: (folder / name).read_bytes() for name in ("state.safetensors",)}
    model = (folder / "model.safetensors").read_bytes()
    for name, content in saved.items():
        (folder / name).write_bytes(content)
    trainer = Trainer(noise, config, folder, resume=True)
    _run(trainer)
    assert [_timeless(report) for report in trainer.reports] == expected
    assert (folder / "model.safetensors").read_bytes() == model


def test_a_run_goes_on_only_with_its_own_settings_and_data(noise: Dataset, rule: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted, match="stopped after step 1"):
        _run(Trainer(noise, _config(), tmp_path), 1)
    with pytest.raises(CheckpointError, match="batch_size was 4, is 2; resume with the same ones"):
        Trainer(noise, _config({"batch_size": 2}), tmp_path, resume=True)
    fewer = replace(noise, events=noise.events.filter(noise.events["user_id"] != noise.events["user_id"][0]))
    with pytest.raises(CheckpointError, match="other settings or data: events was"):
        Trainer(fewer, _config(), tmp_path, resume=True)


def test_a_run_does_not_go_on_with_other_data_of_the_same_size(noise: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted, match="stopped after step 1"):
        _run(Trainer(noise, _config(), tmp_path), 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    swapped = replace(noise, events=noise.events.with_columns(action_click=~noise.events["action_click"]))
    reordered = replace(noise, items=noise.items.reverse())
    moved = msgspec.structs.replace(noise.spec, split=TimeSplit(valid_start_ms=61, test_start_ms=80))
    for other in (swapped, reordered, replace(noise, spec=moved)):
        with pytest.raises(CheckpointError, match="other settings or data: data fingerprint was '"):
            Trainer(other, _config(), tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Trainer(noise, _config(), tmp_path, resume=True).position.batch == 1


def test_a_run_does_not_go_on_with_another_number_of_processes(noise: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(noise, _config(), tmp_path)
    trainer.position.settings["processes"] *= 2
    with pytest.raises(TrainingInterrupted, match="stopped after step 1"):
        _run(trainer, 1)
    with pytest.raises(CheckpointError, match="processes was 2, is 1; resume with the same ones"):
        Trainer(noise, _config(), tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(noise: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(noise, _config(), tmp_path)
    with torch.no_grad():
        trainer.model.final_norm.weight[3] = float("nan")
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1; .* Lower the learning rate"):
        _run(trainer)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_take_it(noise: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(noise, _config(), tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.log_scale.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"the gradient's norm is (inf|nan) at step 1; .* Lower the learning rate"):
        _run(trainer)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def _run_and_spoil_the_last_step(trainer: Trainer, stored: dict[str, bytes]) -> None:
    """Every loss is good, and so is every gradient; `stored` is what was on disk before the last epoch ended."""
    for report in trainer.run():
        if isinstance(report, EpochReport):
            stored.update({path.name: path.read_bytes() for path in trainer.out.iterdir()})
        elif report.step == trainer.total_steps:
            with torch.no_grad():
                trainer.model.state_dict()["blocks.0.qkv.weight"].fill_(1e25)


@pytest.mark.parametrize("slates", [True, False])
@pytest.mark.parametrize("change", [{}, {"fit_validation": True}, {"ranking_weight": 0.0}])
def test_an_epoch_that_ends_in_scores_that_are_no_numbers_is_not_stored(
    noise: Dataset, tmp_path: Path, change: dict[str, Any], slates: bool
) -> None:
    leave_one_out = replace(noise, slates=noise.slates.clear(), spec=msgspec.structs.replace(noise.spec, split=None))
    config = _config({"epochs": 2, "log_every": 99, **change})
    trainer = Trainer(noise if slates else leave_one_out, config, tmp_path)
    stored: dict[str, bytes] = {}
    with pytest.raises(
        TrainingError, match=r"the validation after step \d+ gives scores that are no numbers; .* Lower"
    ):
        _run_and_spoil_the_last_step(trainer, stored)
    assert len(stored) == 6
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == stored


def test_a_folder_that_holds_a_run_is_not_overwritten(noise: Dataset, tmp_path: Path) -> None:
    config = _config({"epochs": 1})
    with pytest.raises(TrainingInterrupted, match="stopped after step 1"):
        _run(Trainer(noise, config, tmp_path / "stopped"), 1)
    _run(Trainer(noise, config, tmp_path / "done"))
    for name in ("stopped", "done"):
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(CheckpointError, match="holds a run already; pass --resume to go on, or choose another"):
            Trainer(noise, config, tmp_path / name)
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


def test_a_run_whose_first_state_was_never_written_begins_anew(
    noise: Dataset, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    config = _config({"epochs": 1})
    expected, _ = _run(Trainer(noise, config, tmp_path / "whole"))
    trainer = Trainer(noise, config, tmp_path / "parts")
    room = (tmp_path / "whole/model.safetensors").stat().st_size + 1
    with full_disk(room), pytest.raises(CheckpointError, match=r"could not write .*state\.safetensors"):
        _run(trainer)
    with pytest.raises(CheckpointError, match="holds no run to resume; leave out --resume to start one"):
        Trainer(noise, config, tmp_path / "parts", resume=True)
    assert _run(Trainer(noise, config, tmp_path / "parts"))[0] == expected


def test_a_run_that_died_between_state_and_model_writes_the_model_when_it_goes_on(
    noise: Dataset, tmp_path: Path
) -> None:
    config = _config({"epochs": 1})
    _run(Trainer(noise, config, tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="holds a run already; pass --resume"):
        Trainer(noise, config, tmp_path)
    assert Trainer(noise, config, tmp_path, resume=True).finished
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_without_a_state_is_neither_overwritten_nor_resumed(noise: Dataset, tmp_path: Path) -> None:
    _run(Trainer(noise, _config({"epochs": 1}), tmp_path))
    (tmp_path / "state.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="holds a model, but no run to resume; choose another --out"):
        Trainer(noise, _config(), tmp_path)
    with pytest.raises(CheckpointError, match="leave out --resume to start one, in a folder without a model"):
        Trainer(noise, _config(), tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_no_folder_to_write(noise: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        with pytest.raises(CheckpointError, match=rf"--out .*{out} cannot be made a folder: .*; choose another"):
            Trainer(noise, _config(), tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_to_resume_is_an_error(noise: Dataset, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        Trainer(noise, _config(), tmp_path, resume=True)


def test_a_run_of_another_model_is_not_resumed(noise: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted, match="stopped"):
        _run(Trainer(noise, _config(), tmp_path), 1)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        Trainer(noise, _config(item_dim=8), tmp_path, resume=True)


def test_the_checkpoint_is_the_best_epoch_not_the_last(noise: Dataset, tmp_path: Path) -> None:
    """Noise is overfitted, so that validation gets worse."""
    trainer = Trainer(noise, _config({"epochs": 8, "learning_rate": 0.03}), tmp_path)
    weights, scores, best = [], [], []
    for report in trainer.run():
        if isinstance(report, EpochReport):
            weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
            scores.append(report.metrics.selection_score())
            best.append(report.best)
    assert best == [score > max(scores[:i], default=-1.0) for i, score in enumerate(scores)]
    winner = int(np.argmax(scores))
    assert winner < 7
    kept = load_checkpoint(tmp_path).model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights[winner].items())
    latest = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(latest[f"model.{name}"], tensor) for name, tensor in weights[-1].items())


def test_a_head_that_is_not_trained_does_not_choose_the_epoch(noise: Dataset, tmp_path: Path) -> None:
    _, epochs = _run(Trainer(noise, _config({"epochs": 1, "ranking_weight": 0.0}), tmp_path / "retrieval"))
    assert epochs[0].metrics.retrieval is not None
    assert epochs[0].metrics.ranking is None
    _, epochs = _run(Trainer(noise, _config({"epochs": 1, "retrieval_weight": 0.0}), tmp_path / "ranking"))
    assert epochs[0].metrics.retrieval is None
    assert epochs[0].metrics.ranking is not None
    silent = _config({"epochs": 1, "action_weights": {"like": 0.0}})
    _, epochs = _run(Trainer(noise, silent, tmp_path / "silent"))
    assert list(epochs[0].metrics.ranking or {}) == ["click", "hide"]
    nothing = {"click": 0.0, "like": 0.0, "hide": 0.0}
    _, epochs = _run(Trainer(noise, _config({"epochs": 1, "action_weights": nothing}), tmp_path / "no-actions"))
    assert epochs[0].metrics.ranking is None


def test_patience_ends_a_run_that_no_longer_improves(noise: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(noise, _config({"epochs": 9, "learning_rate": 1e-12, "patience": 2}), tmp_path)
    _, epochs = _run(trainer)
    assert [report.best for report in epochs] == [True, False, False]
    assert trainer.finished
    assert Trainer(noise, trainer.config, tmp_path, resume=True).finished, "patience survives a restart"


def test_without_validation_data_the_latest_weights_are_kept(random_dataset: Make, tmp_path: Path) -> None:
    trainer = Trainer(random_dataset(7, split=(80, 80)), _config({"epochs": 3, "patience": 1}), tmp_path)
    _, epochs = _run(trainer)
    assert [(r.best, r.metrics.retrieval, r.metrics.ranking) for r in epochs] == [(True, None, None)] * 3
    kept = load_checkpoint(tmp_path).model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_data_without_slates_train_and_validate_leave_one_out(make_dataset: Make, tmp_path: Path) -> None:
    events = [(f"u{u}", "abcdef"[(u + t) % 6], "feed", None, "click") for u in range(8) for t in range(5)]
    _, epochs = _run(Trainer(make_dataset(events), _config({"epochs": 2}), tmp_path))
    retrieval = epochs[-1].metrics.retrieval
    assert retrieval is not None
    assert retrieval.targets == 8
    assert epochs[-1].metrics.ranking is None
    assert epochs[-1].losses["candidate_actions"] == 0.0


def test_a_query_follows_the_outcome_it_was_trained_for(make_dataset: Make, tmp_path: Path) -> None:
    """Items come at random; the first four are clicked, the others liked. A wanted click asks for the former."""
    rng = np.random.default_rng(0)
    items = rng.choice(list("abcdefgh"), (16, 10)).tolist()
    events = [
        (f"u{u:02d}", item, "feed", t, "click" if item in "abcd" else "like")
        for u, row in enumerate(items)
        for t, item in enumerate(row)
    ]
    dataset = make_dataset(events, items=list("abcdefgh"), split=(99, 99), features=True)
    trainer = Trainer(dataset, _config({**LEARNING, "ranking_weight": 0.0}, outcome_conditioned=True), tmp_path)
    _run(trainer)
    model = load_checkpoint(tmp_path).model
    with torch.no_grad():
        vectors = item_vectors(model, trainer.data)
        click, like = (
            model.retrieve(torch.zeros(1, 32), torch.tensor([wanted]))[0, 0] @ vectors.T
            for wanted in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
        )
    assert float((click - like)[:4].min()) > 0.1
    assert float((click - like)[4:].max()) < -0.1


def test_metrics_json_tells_the_whole_run(noise: Dataset, tmp_path: Path) -> None:
    config = _config({"epochs": 2, "action_weights": {"like": 2.0}})
    trainer = Trainer(noise, config, tmp_path)
    _run(trainer)
    document = msgspec.json.decode((tmp_path / "metrics.json").read_bytes(), type=RunMetrics)
    assert document.config == config
    assert document.parameters == sum(p.numel() for p in trainer.model.parameters())
    assert document.epochs == trainer.reports
    assert [report.epoch for report in document.epochs] == [0, 1]
    assert sorted(document.epochs[0].losses) == ["candidate_actions", "history_actions", "loss", "retrieval"]
    assert trainer.objective.action_weights.tolist() == [1.0, 2.0, 1.0]


def test_metrics_json_holds_what_there_was_to_learn_from(noise: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(noise, _config({"epochs": 1, "warmup_steps": 9}), tmp_path)
    assert trainer.warnings[0].startswith("training ends after 5 steps, inside its warm-up of 9")
    _run(trainer)
    document = msgspec.json.decode((tmp_path / "metrics.json").read_bytes(), type=RunMetrics)
    assert document.facts == trainer.facts
    assert trainer.facts.targets > 0
    old = msgspec.to_builtins(document, str_keys=True)
    del old["facts"]
    assert msgspec.convert(old, RunMetrics, strict=False).facts is None


def test_data_without_a_positive_action_is_refused_before_anything_is_written(
    make_dataset: Make, tmp_path: Path
) -> None:
    events = [("ann", item, "feed", t, "hide") for t, item in enumerate("abcde")]
    with pytest.raises(DataError, match=r"none of the positive actions \['click', 'like'\] ever happens"):
        Trainer(make_dataset(events, split=(60, 80)), _config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_has_the_features_and_standardises_them(noise: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(noise, _config({"epochs": 1}), tmp_path)
    _run(trainer)
    loaded = load_checkpoint(tmp_path)
    assert loaded.catalogue.item_ids == noise.items["item_id"].to_list()
    assert loaded.features.dense[:, 0].tolist() == list(range(11))
    assert loaded.model.item_embedder.dense_mean.tolist() == pytest.approx([5.0, 2.5, -4.0])
    spread = math.sqrt(10.0)
    assert loaded.model.item_embedder.dense_std.tolist() == pytest.approx([spread, spread / 2, spread])


def test_a_feature_is_standardised_however_large_it_is_and_a_constant_one_is_left_alone(
    make_dataset: Make, tmp_path: Path
) -> None:
    """Unix seconds of a day, which float32 holds to 128 s, and a column of 0.1."""
    names, times = [f"i{n:04d}" for n in range(3000)], 1.7e9 + 28.8 * np.arange(3000)
    rows = [(f"u{u:02d}", names[u + t], "feed", t, "click") for u in range(20) for t in range(9)]
    dataset = make_dataset(rows, items=names, split=(7, 8), features=True)
    columns = {"dense_size": times[:, None].tolist(), "dense_content": [[0.1, 0.0]] * 3000}
    items = dataset.items.with_columns(**{n: pl.Series(c, dtype=pl.List(pl.Float32)) for n, c in columns.items()})
    embedder = Trainer(replace(dataset, items=items), _config(), tmp_path).model.item_embedder
    assert embedder.dense_mean.tolist() == pytest.approx([times.mean(), 0.1, 0.0], rel=1e-7)
    assert embedder.dense_std.tolist() == pytest.approx([times.std(), 1.0, 1.0], rel=1e-4)


def test_the_rate_warms_up_and_falls_along_a_cosine_to_a_tenth(noise: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(noise, _config({"epochs": 2, "learning_rate": 1.0e-3, "warmup_steps": 4}), tmp_path)
    rates = [trainer.optimizer.param_groups[0]["lr"] * 1000 for r in trainer.run() if isinstance(r, StepReport)]
    assert len(rates) == 10
    assert rates[:2] == pytest.approx([0.25, 0.5 * (0.55 + 0.45 * math.cos(math.pi / 10))])
    assert rates[5] == pytest.approx(0.55)
    assert rates[9] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 0.9))
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)


def test_a_constant_rate_only_warms_up(noise: Dataset, tmp_path: Path) -> None:
    settings = {"epochs": 1, "learning_rate": 1.0e-3, "warmup_steps": 2, "schedule": "constant"}
    trainer = Trainer(noise, _config(settings), tmp_path)
    assert [r.learning_rate for r in trainer.run() if isinstance(r, StepReport)] == [0.0005, *[0.001] * 4]


def test_the_last_fit_trains_on_the_validation_part_and_keeps_the_latest_weights(
    noise: Dataset, tmp_path: Path
) -> None:
    config = _config({"epochs": 2, "fit_validation": True})
    trainer = Trainer(noise, config, tmp_path)
    newest = max(noise.events["timestamp_ms"].drop_nulls().filter(noise.events["timestamp_ms"].drop_nulls() < 80))
    assert trainer.data.timestamps_ms[trainer.batches.trainable].max() == newest
    _, epochs = _run(trainer)
    assert [(r.best, r.metrics.retrieval, r.metrics.ranking) for r in epochs] == [(True, None, None)] * 2
    assert torch.equal(load_checkpoint(tmp_path).model.log_scale, trainer.model.log_scale)


@pytest.mark.parametrize("change", [{"token_dropout": 0.5}, {"item_form": "residual"}])
def test_a_model_option_takes_part_in_training(noise: Dataset, tmp_path: Path, change: dict[str, Any]) -> None:
    plain, _ = _run(Trainer(noise, _config({"epochs": 1}), tmp_path / "plain"))
    other, _ = _run(Trainer(noise, _config({"epochs": 1}, **change), tmp_path / "other"))
    assert plain[0] != other[0]


def test_label_smoothing_takes_part_in_training(noise: Dataset, tmp_path: Path) -> None:
    plain, _ = _run(Trainer(noise, _config({"epochs": 1}), tmp_path / "plain"))
    other, _ = _run(Trainer(noise, _config({"epochs": 1, "label_smoothing": 0.2}), tmp_path / "other"))
    assert plain[0]["retrieval"] != other[0]["retrieval"]
    assert plain[0]["candidate_actions"] == other[0]["candidate_actions"]


def test_the_log_holds_every_step_of_an_interrupted_run_once(noise: Dataset, tmp_path: Path) -> None:
    config = _config({"epochs": 1, "log_every": 1})
    with pytest.raises(TrainingInterrupted):
        _run(Trainer(noise, config, tmp_path), stop_after=2)
    steps, _ = _run(Trainer(noise, config, tmp_path, resume=True))
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [float(row["loss"]) for row in rows[2:]] == [step["loss"] for step in steps]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can train in fp16")
def test_fp16_without_a_gpu_is_refused(noise: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision fp16 needs a CUDA GPU, and there is none; use fp32, bf16 or auto"):
        Trainer(noise, _config({"precision": "fp16"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_matrices_decay(noise: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(noise, _config({"weight_decay": 0.3}), tmp_path)
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    by_name = {name: decays[id(parameter)] for name, parameter in trainer.model.named_parameters()}
    assert len(by_name) == len(decays)
    assert by_name["blocks.0.qkv.weight"] == by_name["retrieval_head.mlp.0.weight"] == 0.3
    plain = [name for name, decay in by_name.items() if decay == 0.0]
    assert {"log_scale", "item_embedder.ids.weight", "item_embedder.words.1.weight", "blocks.1.sink"} <= set(plain)
    assert all(name in plain for name in by_name if name.endswith("bias") or "norm" in name)


def test_settings_that_do_not_fit_the_data_are_refused(noise: Dataset, make_dataset: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"action_weights names \['love'\]"):
        Trainer(noise, _config({"action_weights": {"love": 1.0}}), tmp_path / "weights")
    nothing = {"click": 0.0, "like": 0.0, "hide": 0.0}
    with pytest.raises(ConfigError, match="are 0: nothing would be trained"):
        Trainer(noise, _config({"action_weights": nothing, "retrieval_weight": 0.0}), tmp_path / "nothing")
    events = [("ann", item, "feed", 90, "click") for item in "ab"]
    with pytest.raises(ConfigError, match="0 training windows make no batch for each of 1 processes"):
        Trainer(make_dataset(events, split=(60, 80)), _config(), tmp_path / "late")
    assert list(tmp_path.iterdir()) == []
