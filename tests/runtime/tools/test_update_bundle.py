"""Items come and go: rows stay where they are, what is retired is never found, and nothing is left half-done."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unipinrec.errors import BundleCorruptError, BundleError, DataError, ExportError, RequestError
from unipinrec.runtime import Bundle, CacheOptions, Recommender, RecommendOptions, verify_bundle
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.tools.item_input import NewItem
from unipinrec.runtime.tools.update_bundle import UpdateReport, update_bundle

Reseal = Callable[..., None]
FIXTURE = Path(__file__).resolve().parents[2] / "fixtures/bundle_v1"
T = 1_760_000_000_000
OPTIONS = RecommendOptions(now_ms=T + 1000)
UPDATE = """
import resource, sys
from pathlib import Path
from unipinrec.runtime.tools.update_bundle import update_bundle
from unipinrec.runtime.tools.item_input import parse_items
limit = int(sys.argv[4])
def progress(stage):
    print(stage, flush=True)
    if limit and stage == sys.argv[5]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
items = parse_items(Path(sys.argv[3]).read_bytes(), "items")
update_bundle(Path(sys.argv[1]), Path(sys.argv[2]), add=items, retire={}, progress=progress)
"""


def new(item: str, seed: int = 0, **categories: str) -> NewItem:
    """An item of the simulated catalogue, with random content."""
    content = tuple(np.random.default_rng(seed).normal(size=16).tolist())
    return NewItem(item=item, dense={"content": content, "log_duration": (3.0,)}, categories=categories)


def update(bundle: Path, out: Path, add: tuple[NewItem, ...] = (), retire: tuple[str, ...] = ()) -> UpdateReport:
    return update_bundle(
        bundle,
        out,
        add={f"items[{index}]": item for index, item in enumerate(add)},
        retire={f"ids line {index}": item for index, item in enumerate(retire, 1)},
    )


def index_of(report: UpdateReport) -> IndexSpec:
    assert report.index is not None
    return report.index


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def ids(bundle: Path) -> list[str]:
    read: list[str] = json.loads((bundle / "item_ids.json").read_bytes())
    return read


@pytest.fixture(scope="module")
def updated(bundle: Path, ids: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UpdateReport]:
    """Two items added, three retired, one of them added again."""
    words = Bundle.open(bundle).manifest.categories
    out = tmp_path_factory.mktemp("updated") / "bundle"
    add = (new("new-1", 1, topic=words["topic"][2]), new("new-2", 2, topic="unheard-of"), new(ids[5], 3))
    return out, update(bundle, out, add, (ids[5], ids[17], ids[299]))


@pytest.mark.hnswlib
def test_the_report_counts(bundle: Path, updated: tuple[Path, UpdateReport]) -> None:
    out, report = updated
    old, new = Bundle.open(bundle), Bundle.open(out)
    assert (report.items_before, report.items_after, report.added, report.retired) == (300, 300, 3, 3)
    assert (report.already_retired, report.unknown_words, report.way) == (0, {"topic": 1}, "incremental")
    assert (report.bundle, report.parent) == (new.hash, old.hash)
    assert report.index == new.manifest.index
    assert index_of(report).recall >= 0.99
    assert index_of(report).count == 303


@pytest.mark.hnswlib
def test_a_new_bundle_is_whole_and_computes_as_before(bundle: Path, updated: tuple[Path, UpdateReport]) -> None:
    out, _ = updated
    report = verify_bundle(out)
    assert report.ok
    assert report.cache is not None
    assert report.cache.exported == report.cache.here
    for name in ("golden.safetensors", "weights.bin"):
        assert (out / name).read_bytes() == (bundle / name).read_bytes()
    assert (out / "index.hnsw").read_bytes() != (bundle / "index.hnsw").read_bytes()


def test_a_new_bundle_shares_no_file_with_the_old_one(bundle: Path, updated: tuple[Path, UpdateReport]) -> None:
    out, _ = updated
    shared = {path.stat().st_ino for path in bundle.iterdir()} & {path.stat().st_ino for path in out.iterdir()}
    assert not shared


def test_rows_stay_and_new_ones_follow(bundle: Path, ids: list[str], updated: tuple[Path, UpdateReport]) -> None:
    old, new = Bundle.open(bundle), Bundle.open(updated[0])
    np.testing.assert_array_equal(new.item_vectors[:300], old.item_vectors)
    assert new.item_ids == (*ids, "new-1", "new-2", ids[5])
    assert (new.rows["new-1"], new.rows[ids[5]], new.rows[ids[17]]) == (300, 302, 17)
    assert new.catalogue.retired.tolist() == [5, 17, 299]
    assert (new.manifest.num_items, new.manifest.num_retired, new.catalogue.num_live) == (303, 3, 300)
    assert old.catalogue.codes is not None
    assert new.catalogue.codes is not None
    np.testing.assert_array_equal(new.catalogue.codes[:300], old.catalogue.codes)
    assert new.catalogue.codes[300:].tolist() == [[3, 0], [0, 0], [0, 0]]
    assert new.titles[300:] == ("topic " + new.manifest.categories["topic"][2], None, None)


def test_cached_keys_and_values_stay_valid(bundle: Path, updated: tuple[Path, UpdateReport]) -> None:
    old, new = Bundle.open(bundle), Bundle.open(updated[0])
    assert old.kv_namespace == old.hash
    assert new.kv_namespace == old.hash != new.hash
    assert (old.manifest.parent, new.manifest.parent) == (None, old.hash)
    assert b"kv_namespace" not in (bundle / "manifest.json").read_bytes()
    before = Recommender.load(bundle, cache=CacheOptions(budget_bytes=1 << 20, dtype="fp32"))
    after, fresh = Recommender.load(updated[0], cache=before.cache), Recommender.load(updated[0])
    # One of the thirty is retired by now.
    history = [{"item": item, "actions": ["click"], "timestamp_ms": T} for item in old.item_ids[10:40]]
    assert before.recommend(history, 10, OPTIONS, user="u").kv == "miss"
    grown = [*history, {"item": new.item_ids[-1], "actions": ["save"], "timestamp_ms": T}]
    for events, kind in ((history, "hit"), (grown, "extended")):
        slate, expected = after.recommend(events, 10, OPTIONS, user="u"), fresh.recommend(events, 10, OPTIONS)
        assert slate.kv == kind
        assert [item.item for item in slate.items] == [item.item for item in expected.items]
        np.testing.assert_allclose(
            [item.score for item in slate.items], [item.score for item in expected.items], atol=1e-5
        )
    # An id that was retired and added again names another row.
    again = [{"item": old.item_ids[5], "actions": ["click"], "timestamp_ms": T}]
    before.recommend(again, 10, OPTIONS, user="v")
    assert after.recommend(again, 10, OPTIONS, user="v").kv_reason == "edited"


def test_two_updates_that_give_a_row_to_different_items_share_a_cache(
    bundle: Path, ids: list[str], tmp_path: Path
) -> None:
    words = Bundle.open(bundle).manifest.categories["topic"]
    for name, number, topic in (("one", 1, words[0]), ("other", 9, words[-1]), ("same", 1, words[0])):
        update(bundle, tmp_path / name, (new("new", number, topic=topic),), (ids[7],) if name == "same" else ())
    one, other = Bundle.open(tmp_path / "one"), Bundle.open(tmp_path / "other")
    assert one.rows["new"] == other.rows["new"] == 300
    assert one.kv_namespace == other.kv_namespace == Bundle.open(bundle).hash
    assert one.kv_item_keys[:300].tolist() == list(range(300))
    assert one.kv_item_keys[300] != other.kv_item_keys[300] < 0
    before = Recommender.load(tmp_path / "one", cache=CacheOptions(budget_bytes=1 << 20, dtype="fp32"))
    history = [{"item": item, "actions": ["click"], "timestamp_ms": T} for item in (ids[3], "new", ids[4])]
    before.recommend(history, 10, OPTIONS, user="u")
    for name, kind, reason in (("same", "hit", None), ("other", "miss", "edited")):
        after = Recommender.load(tmp_path / name, cache=before.cache)
        slate = after.recommend(history, 10, OPTIONS, user="u")
        assert (slate.kv, slate.kv_reason) == (kind, reason)
        expected = Recommender.load(tmp_path / name).recommend(history, 10, OPTIONS)
        assert [item.item for item in slate.items] == [item.item for item in expected.items]


def test_an_update_without_the_number_of_common_rows_shares_nothing(
    updated: tuple[Path, UpdateReport], bundle: Path, tmp_path: Path, reseal: Reseal
) -> None:
    assert Bundle.open(updated[0]).manifest.kv_rows == 300
    shutil.copytree(updated[0], tmp_path / "earlier")
    reseal(tmp_path / "earlier", kv_rows=None)
    earlier = Bundle.open(tmp_path / "earlier")
    assert earlier.kv_namespace == earlier.hash != Bundle.open(bundle).hash


def test_a_new_vector_is_that_of_the_model(checkpoint: Path, updated: tuple[Path, UpdateReport]) -> None:
    import torch

    from unipinrec.models.checkpoint import load_checkpoint

    model = load_checkpoint(checkpoint).model.eval()
    item = new("new-1", 1)
    dense = torch.tensor([[*item.dense["content"], *item.dense["log_duration"]]])
    with torch.inference_mode():
        expected = model.embed_items(torch.tensor([-1]), dense, torch.tensor([[3, 0]]))
    np.testing.assert_allclose(Bundle.open(updated[0]).item_vectors[300:301], expected.numpy(), atol=1e-5)


def test_retired_items_are_history_but_never_found(ids: list[str], updated: tuple[Path, UpdateReport]) -> None:
    recommender = Recommender.load(updated[0])
    history = [{"item": ids[row], "actions": ["click"], "timestamp_ms": T + row} for row in (17, 40, 299)]
    for exact in (False, True):
        options = msgspec.structs.replace(OPTIONS, exact=exact)
        slate = recommender.recommend(history, 299, options)
        assert {item.item for item in slate.items} == {*ids, "new-1", "new-2"} - {ids[17], ids[40], ids[299]}
    with pytest.raises(RequestError, match="k=300 items were requested, but only 299 of the 300 items are eligible"):
        recommender.recommend(history, 300, OPTIONS)
    only = msgspec.structs.replace(OPTIONS, allow=(ids[17], ids[5], "new-2"))
    assert {item.item for item in recommender.recommend(history, 2, only).items} == {ids[5], "new-2"}
    with pytest.raises(RequestError, match="only 2 of the 300 items are eligible"):
        recommender.recommend(history, 3, only)


def test_an_unchanged_catalogue_answers_as_before(bundle: Path, ids: list[str], tmp_path: Path) -> None:
    update(bundle, tmp_path / "new", retire=(ids[7],))
    history = [{"item": ids[row], "actions": ["click"], "timestamp_ms": T + row} for row in (1, 3, 4)]
    before, after = (
        Recommender.load(folder).recommend(history, 20, msgspec.structs.replace(OPTIONS, exclude=(ids[7],)))
        for folder in (bundle, tmp_path / "new")
    )
    assert before.items == after.items
    assert (tmp_path / "new/items.safetensors").read_bytes() == (bundle / "items.safetensors").read_bytes()


def test_updates_follow_each_other(ids: list[str], updated: tuple[Path, UpdateReport], tmp_path: Path) -> None:
    out, first = updated
    second = update(out, tmp_path / "2", retire=(ids[5], ids[17], "new-2", "new-2"))
    assert (second.retired, second.already_retired, second.items_after) == (2, 2, 298)
    third = update(tmp_path / "2", tmp_path / "3", (new("new-2", 9),))
    opened = Bundle.open(tmp_path / "3")
    assert opened.catalogue.retired.tolist() == [5, 17, 299, 301, 302]
    assert opened.rows["new-2"] == 303
    assert (third.parent, opened.kv_namespace, first.parent) == (second.bundle, first.parent, opened.kv_namespace)
    assert verify_bundle(tmp_path / "3").ok
    with pytest.raises(DataError, match=r"items\[0\]: item 'new-2' is already in the catalogue"):
        update(tmp_path / "3", tmp_path / "4", (new("new-2"),))


@pytest.mark.hnswlib
def test_an_index_that_misses_the_target_is_built_anew(
    bundle: Path, ids: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = update(bundle, tmp_path / "half", retire=tuple(ids[:160]))
    assert (report.way, index_of(report).count, report.items_after) == ("rebuilt", 140, 140)
    report = update(tmp_path / "half", tmp_path / "more", (new("new-1"),), retire=(ids[200],))
    assert (report.way, index_of(report).count, report.items_after) == ("incremental", 141, 140)
    assert verify_bundle(tmp_path / "more").ok
    monkeypatch.setattr("unipinrec.runtime.tools.update_bundle.grow_index", lambda *_: None)
    report = update(tmp_path / "more", tmp_path / "anew", retire=(ids[201],))
    assert (report.way, index_of(report).count, report.items_after) == ("rebuilt", 139, 139)
    slate = Recommender.load(tmp_path / "anew").recommend(
        [{"item": ids[0], "actions": ["click"]}], 139, RecommendOptions()
    )
    assert len(slate.items) == 139


@pytest.mark.hnswlib
def test_the_target_is_that_of_the_bundle_unless_another_is_given(bundle: Path, ids: list[str], tmp_path: Path) -> None:
    given = update_bundle(bundle, tmp_path / "a", add={}, retire={"x": ids[0]}, recall=0.9)
    assert index_of(given).recall_target == 0.9
    assert index_of(update(tmp_path / "a", tmp_path / "b", retire=(ids[1],))).recall_target == 0.9


@pytest.mark.hnswlib
def test_without_sample_users_the_golden_requests_measure_recall(
    copy: Path, reseal: Reseal, ids: list[str], tmp_path: Path
) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    del manifest["files"]["users.safetensors"], manifest["files"]["user_ids.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    reseal(copy)
    assert index_of(update(copy, tmp_path / "new", retire=(ids[0],))).recall == 1.0


def test_a_bundle_of_an_older_version_is_updated(tmp_path: Path) -> None:
    item = NewItem(item="late", title="Late", dense={"size": (0.5,)}, categories={"kind": "a"})
    report = update(FIXTURE, tmp_path / "new", (item,), retire=("item-3",))
    assert (report.items_before, report.items_after) == (24, 24)
    assert verify_bundle(tmp_path / "new").ok
    assert Bundle.open(tmp_path / "new").titles[24] == "Late"
    with pytest.raises(RequestError, match="does not store the words of its items"):
        Bundle.open(tmp_path / "new").catalogue.allowed(None, {"kind": ("a",)})


@pytest.mark.parametrize(
    ("add", "retire", "match"),
    [
        ((), ("no-such",), r"ids line 1: item 'no-such' is not among the 300 items of this bundle"),
        (("item-0",), (), r"items\[0\]: item 'item-0' is already in the catalogue"),
        ((), tuple(f"item-{i}" for i in range(300)), "all 300 items would be retired; keep at least one"),
    ],
)
def test_what_cannot_be_done_leaves_nothing(
    bundle: Path, tmp_path: Path, add: tuple[str, ...], retire: tuple[str, ...], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        update(bundle, tmp_path / "new", tuple(new(item) for item in add), retire)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [3e38, 1e30])
def test_an_item_beyond_what_the_model_can_take_is_named(bundle: Path, tmp_path: Path, value: float) -> None:
    huge = NewItem(item="huge", dense={"content": (value,) * 16, "log_duration": (1.0,)})
    with pytest.raises(
        DataError,
        match=r"item 'huge': its vector is not of unit length; .* dense values is [13]e\+3[08]: give",
    ):
        update(bundle, tmp_path / "new", (new("fine"), huge))
    assert list(tmp_path.iterdir()) == []


def test_spaces_of_an_id_are_part_of_it(bundle: Path, tmp_path: Path) -> None:
    update(bundle, tmp_path / "new", (new("sku 12 "),))
    report = update(tmp_path / "new", tmp_path / "newer", retire=("sku 12 ", " item-3 "))
    assert report.retired == 2


@pytest.mark.hnswlib
def test_all_items_can_be_replaced_by_one(bundle: Path, ids: list[str], tmp_path: Path) -> None:
    report = update(bundle, tmp_path / "new", (new("only"),), tuple(ids))
    assert (report.items_after, index_of(report).count, report.way) == (1, 1, "rebuilt")
    slate = Recommender.load(tmp_path / "new").recommend([{"item": ids[0], "actions": []}], 1)
    assert [item.item for item in slate.items] == ["only"]


def test_a_damaged_bundle_is_not_updated(copy: Path, tmp_path: Path) -> None:
    (copy / "weights.bin").unlink()
    with pytest.raises(BundleCorruptError, match=r"weights\.bin is missing"):
        update(copy, tmp_path / "new", (new("n"),))
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_never_overwritten(bundle: Path, ids: list[str], tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ExportError, match="exists; a bundle is never overwritten"):
        update(bundle, tmp_path / "new", retire=(ids[0],))


def test_a_full_disk_is_named_and_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    """A limit on file size stands for the full disk."""
    before = state(bundle)
    (tmp_path / "items").write_bytes(msgspec.json.encode(new("n")))
    for limit, stage in ((1_000, "index"), (1_000, "files"), (60_000, "files")):
        limited = map(str, (bundle, tmp_path / "new", tmp_path / "items", limit, stage))
        command = [sys.executable, "-c", UPDATE, *limited]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "ExportError" in done.stderr
        assert "space left on the disk" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["items"]
    assert state(bundle) == before


def test_killed_half_way_there_is_no_bundle_and_the_next_update_works(bundle: Path, tmp_path: Path) -> None:
    before = state(bundle)
    (tmp_path / "items").write_bytes(msgspec.json.encode(new("n")))
    command = [sys.executable, "-c", UPDATE, *map(str, (bundle, tmp_path / "new", tmp_path / "items", 0))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "index":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "new").exists()
    assert len(list(tmp_path.glob(".new.partial-*"))) == 1
    assert update(bundle, tmp_path / "new", (new("n"),)).items_after == 301
    assert state(bundle) == before


@pytest.mark.parametrize("broken", ["shutil", "seal", "fingerprint"])
def test_a_failure_at_any_step_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    before = state(bundle)
    instead = SimpleNamespace(copyfile=fail) if broken == "shutil" else fail
    monkeypatch.setattr(f"unipinrec.runtime.bundle.derived.{broken}", instead)
    with pytest.raises(ExportError, match=r"could not write .*new: .*Input/output error; nothing was left behind"):
        update(bundle, tmp_path / "new", (new("n"),))
    assert list(tmp_path.iterdir()) == []
    assert state(bundle) == before


@pytest.mark.parametrize(
    ("retired", "match"),
    [
        ([5, 17], r"retired\.json: not 3 distinct rows"),
        ([5, 17, 17], r"retired\.json: not 3 distinct rows"),
        ([5, 17, 303], r"retired\.json: not 3 distinct rows"),
        ([5, 17, -1], r"retired\.json: not 3 distinct rows"),
        ([6, 17, 299], r"item_ids\.json: 1 item ids occur twice"),
    ],
)
def test_retired_rows_that_do_not_fit(
    updated: tuple[Path, UpdateReport], tmp_path: Path, reseal: Reseal, retired: list[int], match: str
) -> None:
    damaged = Path(shutil.copytree(updated[0], tmp_path / "damaged"))
    (damaged / "retired.json").write_text(json.dumps(retired))
    reseal(damaged)
    with pytest.raises(BundleError, match=match):
        Bundle.open(damaged)


@pytest.mark.hnswlib
def test_a_manifest_whose_counts_do_not_fit(updated: tuple[Path, UpdateReport], tmp_path: Path, reseal: Reseal) -> None:
    damaged = Path(shutil.copytree(updated[0], tmp_path / "damaged"))
    reseal(damaged, index={"count": 299})
    with pytest.raises(BundleError, match="the index does not match the items"):
        Bundle.open(damaged)
    reseal(damaged, index={"count": 303}, num_retired=303)
    with pytest.raises(BundleError, match="303 of 303 items are retired"):
        Bundle.open(damaged)
    manifest = json.loads((damaged / "manifest.json").read_bytes()) | {"num_retired": 3}
    del manifest["files"]["retired.json"]
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    reseal(damaged)
    with pytest.raises(BundleError, match=r"does not list retired\.json"):
        Bundle.open(damaged)


@pytest.mark.parametrize(
    ("codes", "match"),
    [
        (np.zeros((300, 2), np.int64), r"categories is .*I64.*expected .*I32"),
        (np.zeros((299, 2), np.int32), r"categories is .*299.*expected .*300"),
    ],
)
def test_category_codes_that_do_not_fit(copy: Path, reseal: Reseal, codes: Any, match: str) -> None:
    save_file({**load_file(copy / "items.safetensors"), "categories": codes}, copy / "items.safetensors")
    reseal(copy)
    with pytest.raises(BundleError, match=match):
        Bundle.open(copy)


def test_popularity_is_carried_on(bundle: Path, ids: list[str], updated: tuple[Path, UpdateReport]) -> None:
    """Added items are as popular as the least popular one; retired ones are not answered."""
    old, new = Bundle.open(bundle).popularity, Bundle.open(updated[0]).popularity
    assert old is not None
    assert new is not None
    least = old.min(axis=1, keepdims=True)
    expected = np.concatenate([old, least, least, least], axis=1)
    np.testing.assert_allclose(new, expected / expected.sum(axis=1, keepdims=True), rtol=1e-6)
    slate = Recommender.load(updated[0]).recommend([], 300)
    assert slate.source == "popular"
    assert {item.item for item in slate.items} == {*ids, "new-1", "new-2"} - {ids[17], ids[299]}
    assert ids[5] in [item.item for item in slate.items[-130:]]


def test_popularity_of_a_bundle_that_only_retires(bundle: Path, tmp_path: Path) -> None:
    (best,) = (item.item for item in Recommender.load(bundle).recommend([], 1).items)
    update(bundle, tmp_path / "out", (), (best,))
    assert (tmp_path / "out/popular.safetensors").read_bytes() == (bundle / "popular.safetensors").read_bytes()
    after = Recommender.load(tmp_path / "out").recommend([], 299)
    assert best not in [item.item for item in after.items]


def small(item: str) -> NewItem:
    return NewItem(item=item, dense={"size": (0.5,)}, categories={"kind": "a"})


def test_a_bundle_without_an_index_gets_one_only_for_a_target(tmp_path: Path) -> None:
    report = update(FIXTURE.with_name("bundle_v3"), tmp_path / "new", (small("new"),), ("item-3",))
    new = Bundle.open(tmp_path / "new")
    assert (report.index, report.way, report.items_after) == (None, "none", 24)
    assert (new.manifest.index, new.manifest.format_version) == (None, 3)
    assert "index.hnsw" not in new.manifest.files
    assert verify_bundle(tmp_path / "new").ok


@pytest.mark.hnswlib
def test_a_target_builds_an_index(tmp_path: Path) -> None:
    report = update_bundle(
        FIXTURE.with_name("bundle_v3"), tmp_path / "new", add={"x": small("new")}, retire={}, recall=0.9
    )
    new = Bundle.open(tmp_path / "new")
    assert (report.way, index_of(report).count, index_of(report).recall_target) == ("rebuilt", 25, 0.9)
    assert (new.manifest.index, new.manifest.format_version) == (report.index, 1)
    assert verify_bundle(tmp_path / "new").ok


def test_without_hnswlib_an_update_drops_the_index_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    report = update(FIXTURE, tmp_path / "new", (small("new"),), ("item-3",))
    assert (report.index, report.way) == (None, "none")
    new = Bundle.open(tmp_path / "new")
    assert (new.manifest.index, new.manifest.format_version) == (None, 3)
    assert not (tmp_path / "new/index.hnsw").exists()
    (warning,) = [text for text in caplog.messages if "index" in text]
    assert warning.startswith("the new bundle has no index, and requests will scan all items: hnswlib is not installed")
    slate = Recommender.load(tmp_path / "new").recommend([{"item": "item-4", "actions": ["click"]}], 23)
    assert slate.exact == "the bundle has no index"
    assert {item.item for item in slate.items} == {*new.item_ids} - {"item-3", "item-4"}
