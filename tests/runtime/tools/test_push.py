"""Pushes of bundles through the real client of the Hub, to a server on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from answers import STORED
from hub_server import Hub
from twin_bundle import seal_again

from unipinrec.errors import BundleError
from unipinrec.runtime import Bundle, Recommender, RecommendOptions, verify_bundle
from unipinrec.runtime.bundle.quality import CacheAgreement, CacheSpec
from unipinrec.runtime.tools import push
from unipinrec.runtime.tools.push import push_bundle

REPO = "shop/feed"
TARGET = f"hf://{REPO}"
USERS = {"users.safetensors", "user_ids.json"}
HISTORY = [{"item": "item-3", "actions": ["click"], "timestamp_ms": 1_700_000_000_000}]


@pytest.fixture(autouse=True)
def _new(hub: Hub) -> None:
    hub.commit(REPO, {".gitattributes": b"*.onnx filter=lfs"})


def answers(bundle: Path | str) -> list[tuple[str, float]]:
    with Recommender.load(bundle, "cpu") as recommender:
        slate = recommender.recommend(HISTORY, k=5, options=RecommendOptions(now_ms=1_700_000_100_000))
        return [(item.item, item.score) for item in slate.items]


def test_what_was_pushed_answers_the_same_and_holds_no_users(hub: Hub) -> None:
    pushed = push_bundle(STORED, TARGET, license_id="apache-2.0")
    files = hub.repos[REPO][pushed.commit]
    assert set(files) == {path.name for path in STORED.iterdir()} - USERS | {"README.md", ".gitattributes"}
    assert set(pushed.left_out) == USERS
    assert pushed.load == f"hf://{REPO}@{pushed.commit}"
    assert hub.messages == [f"unipinrec bundle {pushed.bundle}"]
    bundle = Bundle.open(pushed.load)
    assert (bundle.hash, bundle.manifest.parent) == (pushed.bundle, Bundle.open(STORED).hash)
    assert bundle.sample_users(5) == []
    assert answers(pushed.load) == answers(STORED)
    assert verify_bundle(pushed.load).ok


def test_with_users_the_bundle_is_pushed_unchanged(hub: Hub) -> None:
    pushed = push_bundle(STORED, TARGET, with_users=True)
    assert (pushed.bundle, pushed.left_out) == (Bundle.open(STORED).hash, ())
    files = hub.repos[REPO][pushed.commit]
    assert {path.name: path.read_bytes() for path in STORED.iterdir()}.items() <= files.items()
    card = files["README.md"].decode()
    assert "with sample users" in card


def test_a_second_push_removes_files_and_leaves_the_first_commit_as_it_was(hub: Hub, twins: tuple[Path, Path]) -> None:
    first = push_bundle(twins[0], TARGET, with_users=True)
    second = push_bundle(twins[1], TARGET)
    assert not USERS & hub.repos[REPO][second.commit].keys()
    assert answers(TARGET) == answers(twins[1]) != answers(twins[0])
    assert answers(first.load) == answers(twins[0])


def test_a_branch_is_pushed_to(hub: Hub) -> None:
    hub.refs[REPO]["next"] = main = hub.refs[REPO]["main"]
    pushed = push_bundle(STORED, f"{TARGET}@next")
    assert hub.refs[REPO] == {"main": main, "next": pushed.commit}


def test_engines_are_never_pushed(hub: Hub, tmp_path: Path, reseal: Callable[..., None]) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "engines"))
    for name in ("ranker_bf16_0.plan", "engines.json"):
        (folder / name).write_bytes(b"[]")
    spec = {"sha256": "", "size_bytes": 0}
    engine = {"file": "ranker_bf16_0.plan", "key": "", "graph": "ranker", "precision": "bf16", "flavor": "tensorrt"}
    engines = [{**engine, "version": "10.16", "targets": ["sm_89"]}]
    reseal(folder, files={"ranker_bf16_0.plan": dict(spec), "engines.json": dict(spec)}, engines=engines)
    reseal(folder)
    pushed = push_bundle(folder, TARGET, with_users=True)
    assert set(pushed.left_out) == {"ranker_bf16_0.plan", "engines.json"}
    assert set(hub.repos[REPO][pushed.commit]) == {path.name for path in STORED.iterdir()} | {
        "README.md",
        ".gitattributes",
    }
    bundle = Bundle.open(pushed.load)
    assert bundle.manifest.engines == ()
    assert bundle.sample_users(1) == Bundle.open(STORED).sample_users(1)


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp32"), ("int8", "fp16")])
def test_without_users_the_cache_is_the_finest_that_was_measured(
    hub: Hub, tmp_path: Path, reseal: Callable[..., None], monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "sampled"))
    agreement = {"requests": 4, "overlap": 1.0, "overlap_strict": 1.0}
    cache = {"dtype": before, "agreement": agreement, "refused": {}}
    reseal(folder, sample={"users": 2, "served": 1, "retrieved": 1}, cache=cache)
    here = CacheAgreement(requests=4, overlap=1.0, overlap_strict=1.0)
    monkeypatch.setattr(push, "chosen_cache", lambda _: CacheSpec(dtype="fp16", agreement=here, refused={}))
    pushed = push_bundle(folder, TARGET)
    manifest = Bundle.open(pushed.load).manifest
    assert manifest.sample is None
    assert manifest.cache_dtype == after
    assert verify_bundle(pushed.load).ok


def test_the_card_says_what_the_manifest_says(hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "measured"))
    served = {"hit_rate": {"mean": 0.25, "error": 0.01}}
    evaluation = {
        **{"split": "test", "requests": 400, "targets": 400, "repeats": False, "order": "value", "candidates": 24},
        **{"items": 24, "found": None, "lists": {"served": served}, "actions": {}, "gap_closed": None, "data": {}},
        "warnings": ["the data\nis small"],
    }
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest |= {"evaluation": evaluation, "metrics": {"split": "valid", "auc": 0.61}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal_again(folder)
    pushed = push_bundle(folder, TARGET, license_id="mit")
    card = hub.repos[REPO][pushed.commit]["README.md"].decode()
    assert card.startswith("---\nlicense: mit\nlibrary_name: unipinrec\n")
    for part in (
        f"Its hash is `{pushed.bundle}`.",
        "without sample users",
        'Recommender.load("hf://shop/feed")',
        "- served: HR@10 0.2500 ± 0.0100\n",
        "- checkpoint: auc 0.61\n",
        "- items: 24\n",
        "- actions: `click`, `save`\n",
        "- the data is small\n",
        "## License\nmit\n",
    ):
        assert part in card, part


@pytest.mark.parametrize(
    ("target", "license_id", "message"),
    [
        ("hf://shop/none", "mit", r"no such repository, or it is private"),
        (f"{TARGET}@v9", "mit", r"the repository has no revision 'v9'"),
        (f"{TARGET}@{'0' * 40}", "mit", r"is a commit, which never changes; push to a branch"),
        ("feed", "mit", r"'feed' is not hf://org/name"),
        (TARGET, "mit\ntags: [x]", r"the license 'mit\\ntags: \[x\]' is no identifier"),
    ],
)
def test_a_push_that_cannot_be_is_refused(hub: Hub, target: str, license_id: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        push_bundle(STORED, target, license_id=license_id)
    assert hub.messages == []


def test_a_damaged_bundle_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "damaged"))
    (folder / "items.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"items.safetensors is truncated"):
        push_bundle(folder, TARGET)
    assert hub.asked == []


def test_a_card_beside_a_bundle_is_not_part_of_it(hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "with-card"))
    (folder / "README.md").write_text("# Ours")
    assert verify_bundle(folder).ok
    pushed = push_bundle(folder, TARGET)
    assert json.loads(hub.repos[REPO][pushed.commit]["manifest.json"])["files"].keys() & {"README.md"} == set()
