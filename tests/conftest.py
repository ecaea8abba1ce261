"""One real tiny checkpoint and bundle for the whole run, and where real data sets are found."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: tests share their cores
NO_REDIS = "redis-server is not installed (Debian: apt-get install redis-server)"
NO_HNSWLIB = "hnswlib is not installed (pip install 'unipinrec[hnsw]'), or left out by --without-hnswlib"
DATA_ROOT = Path(os.environ.get("UNIPINREC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """A test that configures logs, as a server does, changes none of later tests."""
    loggers = [logging.getLogger(name) for name in (None, "unipinrec", "uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(one, one.level, one.handlers[:], one.propagate, one.disabled) for one in loggers]
    yield
    for one, level, handlers, propagate, disabled in before:
        one.setLevel(level)
        one.handlers, one.propagate, one.disabled = handlers, propagate, disabled


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-hnswlib", action="store_true", help="test as if hnswlib were not installed")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-hnswlib"):
        sys.modules["hnswlib"] = None  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("hnswlib") and find_spec("hnswlib") is None:
        pytest.skip(NO_HNSWLIB)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated data set with its oracle."""
    from unipinrec.models.data.schema import write_dataset
    from unipinrec.models.simulator.oracle import write_oracle
    from unipinrec.models.simulator.simulator import simulate
    from unipinrec.models.simulator.world import SimulatorConfig

    folder = tmp_path_factory.mktemp("prepared") / "data"
    data, oracle = simulate(SimulatorConfig(users=300, items=300, categories=6, seed=11))
    write_dataset(data, folder)
    write_oracle(oracle, folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny size, trained for two epochs on it."""
    from unipinrec.models.config import TINY
    from unipinrec.models.data.schema import read_dataset
    from unipinrec.models.training.config import RunConfig, TrainConfig
    from unipinrec.models.training.train import Trainer

    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    train = TrainConfig(epochs=2, batch_size=32, precision="fp32", seed=3)
    for _ in Trainer(read_dataset(dataset), RunConfig(model=TINY, train=train), folder).run():
        pass
    return folder


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of that checkpoint. Read-only by convention: copy it before damaging it."""
    from unipinrec.export.bundle_writer import export_bundle
    from unipinrec.export.checkpoint_source import source_from_checkpoint
    from unipinrec.export.data_histories import histories_from_data

    folder = tmp_path_factory.mktemp("exported") / "bundle"
    source = source_from_checkpoint(checkpoint)
    export_bundle(source, folder, histories=histories_from_data(dataset, source, 200))
    return folder


@pytest.fixture(scope="session")
def lively(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same shape with large random weights, whose answers move visibly with every event.

    Those of two epochs of training do not: an action of an early event changes their logits by a millionth.
    """
    return _random_bundle(checkpoint, tmp_path_factory.mktemp("lively") / "bundle", outlier=1.0)


@pytest.fixture(scope="session")
def outlying(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with sample users, and a large number in each value: int8 rounds the others too far."""
    return _random_bundle(checkpoint, tmp_path_factory.mktemp("outlying") / "bundle", outlier=40.0, users=dataset)


def _random_bundle(checkpoint: Path, folder: Path, *, outlier: float, users: Path | None = None) -> Path:
    import torch

    from unipinrec.export.bundle_writer import export_bundle
    from unipinrec.export.data_histories import histories_from_data
    from unipinrec.export.servable import source_from_model
    from unipinrec.models.checkpoint import load_checkpoint

    stored = load_checkpoint(checkpoint)
    noise, dim = torch.Generator().manual_seed(0), stored.model.config.head_dim
    for parameter in stored.model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=noise) / parameter.shape[-1] ** 0.5
    for block in stored.model.layers():
        block.qkv.weight.data[-block.widths[2] :: dim] *= outlier
        block.out.weight.data[:, ::dim] /= outlier
    source = source_from_model(stored.model, stored.catalogue, stored.features)
    export_bundle(source, folder, histories=histories_from_data(users, source, 50) if users else None)
    return folder


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the machine does not know, as in a container with an id of its own choice."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "UNIPINREC_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data sets; skips where it is not at hand."""
    if not DATA_ROOT.is_dir():
        pytest.skip(f"no real data sets at {DATA_ROOT}; set UNIPINREC_DATA to a folder that holds them")
    return DATA_ROOT


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis server, for as long as the tests run; skips where there is none."""
    if shutil.which("redis-server") is None:
        pytest.skip(NO_REDIS)
    if find_spec("redis") is None:
        pytest.skip("redis is not installed (pip install 'unipinrec[redis]')")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([*words, "--dir", str(tmp_path_factory.mktemp("redis"))], stdout=subprocess.DEVNULL)
    try:
        _until(lambda: socket.create_connection(("127.0.0.1", port)).close())
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(20)


def _until(attempt: Callable[[], None]) -> None:
    limit = time.monotonic() + 20
    while True:
        try:
            return attempt()
        except OSError:
            assert time.monotonic() < limit
            time.sleep(0.02)
