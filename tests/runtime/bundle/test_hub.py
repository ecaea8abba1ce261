"""Bundles of the Hub, through its real client, from a server on this machine."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from answers import STORED
from hub_server import Hub

from unipinrec.errors import BundleCorruptError, BundleError
from unipinrec.runtime import Bundle, Recommender, RecommendOptions, verify_bundle
from unipinrec.runtime.bundle.hub import HubReference, local_folder

REPO = "shop/feed"
HISTORY = [{"item": "item-3", "actions": ["click"], "timestamp_ms": 1_700_000_000_000}]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def answers(bundle: Path | str) -> list[tuple[str, float]]:
    with Recommender.load(bundle, "cpu") as recommender:
        slate = recommender.recommend(HISTORY, k=5, options=RecommendOptions(now_ms=1_700_000_100_000))
        return [(item.item, item.score) for item in slate.items]


def test_a_branch_is_resolved_to_a_commit_that_is_logged_and_downloaded(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.commit(REPO, files_of(STORED))
    with caplog.at_level(logging.INFO, "unipinrec"):
        bundle = Bundle.open(f"hf://{REPO}")
    assert bundle.path.name == commit
    assert f"hf://{REPO}@main is commit {commit}" in caplog.text
    assert bundle.hash == Bundle.open(STORED).hash
    assert all(f"/{commit}/" in asked for asked in hub.asked if "/resolve/" in asked)
    assert answers(f"hf://{REPO}@main") == answers(STORED)
    assert verify_bundle(f"hf://{REPO}").ok


def test_a_commit_stays_what_it_was(hub: Hub, twins: tuple[Path, Path]) -> None:
    first, second = (hub.commit(REPO, files_of(folder)) for folder in twins)
    hub.refs[REPO]["v1.0"] = first
    assert answers(f"hf://{REPO}") == answers(twins[1]) != answers(twins[0])
    assert answers(f"hf://{REPO}@{first}") == answers(f"hf://{REPO}@v1.0") == answers(twins[0])
    assert answers(f"hf://{REPO}@{second}") == answers(twins[1])


def test_a_branch_that_moves_meanwhile_is_downloaded_as_it_was(hub: Hub, twins: tuple[Path, Path]) -> None:
    first = hub.commit(REPO, files_of(twins[0]))

    class Mover(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hub.commit(REPO, files_of(twins[1]))

    logger, mover = logging.getLogger("unipinrec.runtime.bundle.hub"), Mover(logging.INFO)
    logger.addHandler(mover)
    logger.setLevel(logging.INFO)
    try:
        bundle = Bundle.open(f"hf://{REPO}")
    finally:
        logger.removeHandler(mover)
        logger.setLevel(logging.NOTSET)
    assert hub.refs[REPO]["main"] != first == bundle.path.name
    assert bundle.hash == Bundle.open(twins[0]).hash


def test_a_cached_commit_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = hub.commit(REPO, files_of(STORED))
    Bundle.open(f"hf://{REPO}@{commit}")
    before = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Bundle.open(f"hf://{REPO}@{commit}").path.name == commit
    assert len(hub.asked) == before
    with pytest.raises(
        BundleError,
        match=r"hf://shop/feed@main: OfflineMode.*a full commit that was downloaded before needs no network",
    ):
        Bundle.open(f"hf://{REPO}")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf://shop/none", "hf://shop/none@main: there is no such repository, or it is private; check the name"),
        (f"hf://{REPO}@v9", "hf://shop/feed@v9: the repository has no revision 'v9'"),
        (f"hf://{REPO}@{'0' * 40}", f"hf://shop/feed@{'0' * 40}: the repository has no revision '000"),
        ("hf://shop", "'hf://shop' is not hf://org/name or hf://org/name@revision"),
        ("hf://shop/feed@../x", "'hf://shop/feed@../x' is not hf://org/name"),
        ("hf://shop/docs", "hf://shop/docs@main holds no bundle: it has no manifest.json"),
    ],
)
def test_what_does_not_exist_is_named(hub: Hub, reference: str, message: str) -> None:
    hub.commit(REPO, files_of(STORED))
    hub.commit("shop/docs", {"README.md": b"# Docs"})
    with pytest.raises(BundleError) as raised:
        Bundle.open(reference)
    assert message in str(raised.value)


def test_a_private_repository_gets_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(REPO, files_of(STORED))
    hub.token = "hf_secret"
    with pytest.raises(BundleError, match=r"set HF_TOKEN to a token that may use it") as raised:
        Bundle.open(f"hf://{REPO}")
    assert hub.tokens == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BundleError, match=r"or it is private"):
        Bundle.open(f"hf://{REPO}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert Bundle.open(f"hf://{REPO}").hash == Bundle.open(STORED).hash
    assert hub.tokens == {None, "Bearer hf_wrong", "Bearer hf_secret"}
    assert "hf_" not in str(raised.value)


@pytest.mark.parametrize(("fault", "error"), [("cut", "Consistency check failed"), ("altered", "is altered")])
def test_a_faulty_download_never_loads(hub: Hub, fault: str, error: str) -> None:
    files = files_of(STORED)
    commit = hub.commit(REPO, files)
    oid = hashlib.sha256(files["index.hnsw"]).hexdigest()
    hub.large[oid] = files["index.hnsw"]
    setattr(hub, fault, oid)
    with pytest.raises(BundleError, match=error):
        Bundle.open(f"hf://{REPO}@{commit}")
    (manifest,) = Path(_cache()).rglob("manifest.json")
    with pytest.raises(BundleCorruptError, match=r"index.hnsw is (missing|altered)"):
        Bundle.open(manifest.parent)
    setattr(hub, fault, "")
    if fault == "altered":  # the client trusts what it has
        shutil.rmtree(_cache())
    assert Bundle.open(f"hf://{REPO}@{commit}").hash == Bundle.open(STORED).hash


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def test_other_files_and_engines_are_not_downloaded(hub: Hub) -> None:
    others = {"engines.json": b"[]", "encoder_bf16_0.plan": b"code", "README.md": b"# Feed", "pickled.bin": b"code"}
    hub.commit(REPO, files_of(STORED) | others)
    bundle = Bundle.open(f"hf://{REPO}")
    assert {path.name for path in bundle.path.iterdir()} == set(files_of(STORED))
    assert not [asked for asked in hub.asked if "/resolve/" in asked and asked.endswith(tuple(others))]


def test_a_bundle_of_engines_is_refused(hub: Hub, tmp_path: Path, reseal: Callable[..., None]) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "engines"))
    (folder / "ranker_bf16_0.plan").write_bytes(b"code")
    reseal(folder, files={"ranker_bf16_0.plan": {"sha256": "0" * 64, "size_bytes": 4}})
    hub.commit(REPO, files_of(folder))
    with pytest.raises(BundleError, match=r"lists the engines \['ranker_bf16_0.plan'\], which are never downloaded"):
        Bundle.open(f"hf://{REPO}")


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BundleError, match=r"needs huggingface_hub; run pip install 'unipinrec\[hub\]'"):
        local_folder("hf://shop/feed")


def test_a_path_keeps_its_meaning() -> None:
    assert HubReference.parse(str(Path("hf://shop/feed@v1"))) == HubReference("shop/feed", "v1")
    assert local_folder("some/folder") == Path("some/folder")
