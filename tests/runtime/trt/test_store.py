"""The private cache: entries appear whole or not at all, and are believed only as far as they can be checked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_records import HERE, KEY, need_of, record_of

from unipinrec.errors import BackendError
from unipinrec.runtime.trt.record import EngineProblem, EngineRecord
from unipinrec.runtime.trt.store import EngineStore, cache_root

DIGEST = KEY.digest()
PLAN, KERNELS = b"a plan", b"kernels"
PUT = """
import resource, sys
from pathlib import Path
from engine_records import record_of
from unipinrec.runtime.trt.store import EngineStore
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
EngineStore(Path(sys.argv[1])).put(record_of(), bytes(100_000))
"""


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "cache" / "engines")


@pytest.fixture
def entry(store: EngineStore) -> Path:
    """The folder of an engine that was put there."""
    store.put(record_of(), PLAN, KERNELS)
    return store.root / DIGEST


def files(store: EngineStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def refusal(found: EngineRecord | EngineProblem) -> str:
    assert isinstance(found, EngineProblem)
    return str(found)


def test_an_engine_is_found_again(store: EngineStore) -> None:
    assert refusal(store.find(KEY)) == (
        "no engine of ranker in bf16 was compiled with these settings; run unipinrec compile BUNDLE"
    )
    assert store.entries() == {}
    record = store.put(record_of(), PLAN, KERNELS)
    assert record.size_bytes == 6
    assert record.plan_sha256 == hashlib.sha256(b"a plan").hexdigest()
    assert store.find(KEY) == store.sound(KEY) == record
    assert store.entries() == {DIGEST: record}
    assert (store.plan(record), store.kernels(record)) == (PLAN, KERNELS)


def test_kernels_are_optional(store: EngineStore) -> None:
    record = store.put(record_of(), PLAN)
    assert store.kernels(record) is None


def test_nobody_else_can_reach_it(entry: Path) -> None:
    assert [path.stat().st_mode & 0o777 for path in (entry.parent, entry)] == [0o700, 0o700]
    assert {path.name: path.stat().st_mode & 0o777 for path in entry.iterdir()} == {
        "engine.plan": 0o600,
        "engine.json": 0o600,
        "kernels.bin": 0o600,
    }


def test_the_umask_does_not_open_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = EngineStore(tmp_path / "open" / "engines")
        store.put(record_of(), PLAN)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (store.root, store.root / DIGEST)] == [0o700, 0o700]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda entry: (entry / "engine.plan").write_bytes(b"b plan"), None),
        (lambda entry: (entry / "engine.plan").write_bytes(b"longer plan"), "engine.plan is truncated or altered"),
        (lambda entry: (entry / "engine.plan").unlink(), "engine.plan is missing"),
        (lambda entry: (entry / "engine.json").unlink(), "engine.json is missing"),
        (lambda entry: (entry / "engine.json").write_bytes(b"{}"), "engine.json is of another version, or altered"),
        (lambda entry: entry.chmod(0o750), f"{DIGEST} can be reached by others: its mode is 750, 700 is needed"),
        (lambda entry: (entry / "engine.plan").chmod(0o620), "engine.plan can be reached by others: its mode is 620"),
        (lambda entry: (entry / "engine.json").chmod(0o602), "engine.json can be reached by others: its mode is 602"),
        (lambda entry: entry.parent.chmod(0o755), "engines can be reached by others: its mode is 755"),
    ],
)
def test_a_damaged_or_open_entry_is_refused(
    damage: Callable[[Path], None], reason: str | None, store: EngineStore, entry: Path
) -> None:
    record = store.find(KEY)
    assert isinstance(record, EngineRecord)
    damage(entry)
    if reason is None:
        assert store.find(KEY) == record
        with pytest.raises(
            BackendError, match=r"engine.plan is altered and was not loaded: its sha256 is [0-9a-f]{64}"
        ):
            store.plan(record)
    else:
        assert reason in refusal(store.find(KEY))
        assert "remove it, and compile again" in refusal(store.find(KEY))
        assert reason in refusal(store.serving(need_of(), HERE))
    assert store.sound(KEY) is None


def test_kernels_are_checked_as_the_plan_is(store: EngineStore, entry: Path) -> None:
    record = store.find(KEY)
    assert isinstance(record, EngineRecord)
    (entry / "kernels.bin").write_bytes(b"kernelz")
    with pytest.raises(BackendError, match=r"kernels.bin is altered and was not loaded"):
        store.kernels(record)


def test_a_record_under_another_name_is_refused(store: EngineStore, entry: Path) -> None:
    other = msgspec.structs.replace(KEY, precision="fp16")
    entry.rename(entry.parent / other.digest())
    assert "engine.json is that of another entry, or altered" in refusal(store.find(other))


@pytest.mark.parametrize("name", ["", "engine.plan", "engine.json"])
def test_a_link_is_not_followed(name: str, store: EngineStore, entry: Path, tmp_path: Path) -> None:
    index = entry / name if name else entry
    index.rename(tmp_path / "elsewhere")
    index.symlink_to(tmp_path / "elsewhere")
    assert "is a link, or no folder, where a private folder or file belongs" in refusal(store.find(KEY))


def test_a_linked_cache_is_not_followed(store: EngineStore, entry: Path, tmp_path: Path) -> None:
    entry.parent.rename(tmp_path / "elsewhere")
    store.root.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refusal(store.find(KEY))
    assert [str(found) for found in store.entries().values()] == [
        f"{store.root}: is a link, or no folder, where a private folder or file belongs; remove it, and compile again"
    ]
    with pytest.raises(BackendError, match=r"is a link.*remove it, and compile again"):
        store.put(record_of(), PLAN)


def test_a_pipe_does_not_hold_it_up(store: EngineStore, entry: Path) -> None:
    (entry / "engine.plan").unlink()
    os.mkfifo(entry / "engine.plan", 0o600)
    assert "engine.plan is no plain file" in refusal(store.find(KEY))


def test_what_belongs_to_somebody_else_is_refused(
    store: EngineStore, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = store.find(KEY)
    assert isinstance(record, EngineRecord)
    owner = os.geteuid()
    monkeypatch.setattr("unipinrec.runtime.trt.private_files.os.geteuid", lambda: owner + 1)
    assert f"engines belongs to user {owner}, this is user {owner + 1}" in refusal(store.find(KEY))
    with pytest.raises(BackendError, match=f"belongs to user {owner}"):
        store.plan(record)
    with pytest.raises(BackendError, match=f"belongs to user {owner}"):
        store.put(record, PLAN)
    with pytest.raises(BackendError, match=f"belongs to user {owner}"):
        store.prepare()
    assert entry.exists()


def test_the_bytes_that_were_hashed_are_those_that_are_returned(
    store: EngineStore, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is swapped while it is read is either the listed one or refused, whatever its name leads to then."""
    record = store.find(KEY)
    assert isinstance(record, EngineRecord)
    read = os.fdopen

    def swapped(*arguments: Any) -> Any:
        (entry / "other").write_bytes(b"c plan")
        (entry / "other").replace(entry / "engine.plan")
        return read(*arguments)

    monkeypatch.setattr("unipinrec.runtime.trt.private_files.os.fdopen", swapped)
    assert store.plan(record) == PLAN
    with pytest.raises(BackendError, match="is altered"):
        store.plan(record)


def test_a_sound_entry_stays(store: EngineStore) -> None:
    first = store.put(record_of(seconds=1.0), PLAN)
    assert store.put(record_of(seconds=2.0), b"another plan") == first
    assert store.plan(first) == PLAN
    replaced = store.put(record_of(seconds=3.0), b"another plan", replace=True)
    assert store.find(KEY) == replaced
    assert store.plan(replaced) == b"another plan"
    assert files(store) == [DIGEST]


def test_an_entry_of_another_machine_is_replaced(store: EngineStore) -> None:
    """A home folder may be shared between machines."""
    store.put(record_of(machine=msgspec.structs.replace(HERE, id="there")), PLAN)
    mine = store.put(record_of(), b"my plan")
    assert mine.machine == HERE
    assert store.find(KEY) == mine


@pytest.mark.parametrize("occupant", ["damaged", "file", "empty", "link"])
def test_what_cannot_be_trusted_is_replaced(occupant: str, store: EngineStore, entry: Path, tmp_path: Path) -> None:
    if occupant == "damaged":
        (entry / "engine.plan").write_bytes(b"b plan")
    else:
        entry.rename(tmp_path / "elsewhere")
        make: dict[str, Callable[[], None]] = {
            "file": entry.touch,
            "empty": entry.mkdir,
            "link": lambda: entry.symlink_to(tmp_path / "elsewhere"),
        }
        make[occupant]()
    record = store.put(record_of(seconds=9.0), PLAN)
    assert store.find(KEY) == record
    assert store.plan(record) == PLAN
    assert files(store) == [DIGEST]
    if occupant == "link":
        assert (tmp_path / "elsewhere" / "engine.plan").read_bytes() == PLAN


def test_builds_at_the_same_time_agree_on_one(store: EngineStore) -> None:
    barrier = threading.Barrier(8)

    def put(index: int) -> EngineRecord:
        barrier.wait()
        return store.put(record_of(seconds=float(index)), b"plan %d" % index)

    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(put, range(8)))
    assert len({record.seconds for record in records}) == 1
    assert store.plan(records[0]) == b"plan %d" % records[0].seconds
    assert files(store) == [DIGEST]


def test_a_full_disk_leaves_nothing_behind(store: EngineStore, tmp_path: Path) -> None:
    """The limit on the size of files stands for it; its signal is off, as Python has it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", PUT, str(store.root)], capture_output=True, text=True, check=False, env=environment
    )
    assert "the engine of ranker cannot be kept: no space left on the disk; nothing was left behind" in done.stderr
    assert files(store) == []


def test_an_interrupted_put_is_found_by_nobody_and_removed_later(store: EngineStore, entry: Path) -> None:
    fresh, stale = store.root / ".partial-fresh", store.root / ".partial-stale"
    for partial in (fresh, stale):
        partial.mkdir(mode=0o700)
        (partial / "engine.plan").write_bytes(b"half")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(stale, (long_ago, long_ago))
    assert list(store.entries()) == [DIGEST]
    store.prepare()
    assert files(store) == sorted([".partial-fresh", DIGEST])


def test_the_newest_engine_that_fits_serves(store: EngineStore) -> None:
    wide = msgspec.structs.replace(KEY, profiles=({"x": ((1, 2), (4, 2), (64, 2))},))
    foreign = msgspec.structs.replace(KEY, target="sm_89")
    store.put(record_of(created="2026-01-01"), PLAN)
    newest = store.put(record_of(wide, created="2026-02-01"), PLAN)
    store.put(record_of(foreign, created="2026-03-01"), PLAN)
    assert store.serving(need_of(), HERE) == newest


def test_the_refusal_is_of_the_engine_that_comes_nearest(store: EngineStore) -> None:
    assert refusal(store.serving(need_of(), HERE)) == (
        "no engine of ranker in bf16 was compiled; run unipinrec compile BUNDLE"
    )
    store.put(record_of(msgspec.structs.replace(KEY, graph_sha256="b" * 64), created="2026-02-01"), PLAN)
    assert "was built from another graph" in refusal(store.serving(need_of(), HERE))
    store.put(record_of(msgspec.structs.replace(KEY, version="11.3.0.9"), created="2026-01-01"), PLAN)
    assert "was built with TensorRT 11.3.0.9, here is TensorRT 11.4.0.106" in refusal(store.serving(need_of(), HERE))
    assert "no engine of encoder in bf16" in refusal(store.serving(need_of(graph="encoder"), HERE))


def test_entries_are_removed(store: EngineStore, entry: Path) -> None:
    store.remove(DIGEST)
    assert store.entries() == {}
    for name in (DIGEST, "", "..", "../cache", ".partial-x"):
        with pytest.raises(BackendError, match="has no engine"):
            store.remove(name)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNIPINREC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "unipinrec" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == tmp_path / ".cache" / "unipinrec" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_root() == Path("/var/cache/me/unipinrec/engines")
    monkeypatch.setenv("UNIPINREC_CACHE", "/srv/unipinrec")
    assert cache_root() == Path("/srv/unipinrec/engines")
    assert EngineStore().root == Path("/srv/unipinrec/engines")


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_needs_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"no folder for compiled engines: .* home .*; set UNIPINREC_CACHE"):
        cache_root()
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_root() == Path("/var/cache/me/unipinrec/engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("UNIPINREC_CACHE", "/srv/unipinrec")
    assert cache_root() == Path("/srv/unipinrec/engines")
