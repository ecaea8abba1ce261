"""The private cache of compiled engines, `~/.cache/unipinrec/engines/<key>/`.

A plan is executable code. So only this user can reach the cache and its entries, an entry lists the sha256 of its
files, and callers get the same bytes that were hashed. An entry of another machine, GPU or TensorRT is rejected with
the reason. An entry appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import msgspec

from unipinrec.errors import MALFORMED, BackendError
from unipinrec.runtime.trt.private_files import FILE, FOLDER, open_private, read_private, sync_folder, write_files
from unipinrec.runtime.trt.record import EngineHost, EngineKey, EngineProblem, EngineRecord, Need, unfit

PLAN, RECORD, KERNELS = "engine.plan", "engine.json", "kernels.bin"
PARTIAL = ".partial-"
STALE_S = 24 * 3600.0
ATTEMPTS = 3
REMOVE = "remove it, and compile again"


def cache_root() -> Path:
    """The folder for engines: in `UNIPINREC_CACHE`, else in the user's cache folder.

    Raises:
        BackendError: No variable names a folder, and this user has no home folder.
    """
    own, shared = os.environ.get("UNIPINREC_CACHE"), Path(os.environ.get("XDG_CACHE_HOME", ""))
    if own:
        return Path(own) / "engines"
    try:
        base = shared if shared.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise BackendError(
            f"no folder for compiled engines: {error}; set UNIPINREC_CACHE to a folder of this user's own"
        ) from error
    return base / "unipinrec" / "engines"


class EngineStore:
    """Engines of this user on this machine, in one folder. A running server writes nothing there."""

    def __init__(self, root: Path | None = None) -> None:
        """Use a folder, which need not exist; None = `cache_root()`.

        Raises:
            BackendError: See `cache_root`.
        """
        self.root = cache_root() if root is None else root

    def prepare(self) -> None:
        """Make the folder if it is missing, and remove the old remains of interrupted compilations.

        Raises:
            BackendError: It is not private, or cannot be made.
        """
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.root.mkdir(mode=0o700)
            with open_private(self.root, FOLDER):
                pass
        except OSError as error:
            raise BackendError(f"{self.root}: {_reason(error)}; {REMOVE}") from error
        for path in self.root.glob(f"{PARTIAL}*"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < time.time() - STALE_S:
                    shutil.rmtree(path)

    def put(
        self, record: EngineRecord, plan: bytes, kernels: bytes | None = None, *, replace: bool = False
    ) -> EngineRecord:
        """Add an engine, whole or not at all.

        Args:
            record: Its record; the hashes and the size of its files are filled in here.
            plan: The engine.
            kernels: The kernels that TensorRT-RTX compiled from it for this GPU.
            replace: Replace a sound entry of this machine, which else stays.

        Returns:
            The record of the entry; of two builds at the same time, the first to finish wins.

        Raises:
            BackendError: The folder is not private, or cannot be written, for example because the disk is full.
        """
        record = msgspec.structs.replace(
            record,
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            size_bytes=len(plan),
            kernels_sha256=None if kernels is None else hashlib.sha256(kernels).hexdigest(),
        )
        files = {PLAN: plan, RECORD: msgspec.json.format(msgspec.json.encode(record))}
        self.prepare()
        try:
            partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
            try:
                write_files(partial, files if kernels is None else {**files, KERNELS: kernels})
                return self._install(partial, record, replace)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise BackendError(
                f"{self.root}: the engine of {record.key.graph} cannot be kept: {_reason(error)}; "
                "nothing was left behind"
            ) from error

    def find(self, key: EngineKey) -> EngineRecord | EngineProblem:
        """The entry of a key, or why it cannot be used. Its plan is not read."""
        entries = self.entries()
        missing = EngineProblem(reason=f"no engine of {key.graph} in {key.precision} was compiled with these settings")
        return entries.get(key.digest()) or entries.get("", missing)

    def entries(self) -> dict[str, EngineRecord | EngineProblem]:
        """All entries by the hash of their key, or why one cannot be trusted; "" stands for the whole folder."""
        try:
            with open_private(self.root, FOLDER) as root:
                names = sorted(name for name in os.listdir(root) if not name.startswith("."))  # noqa: PTH208 - a descriptor
                return {name: self._entry(root, name) for name in names}
        except FileNotFoundError:
            return {}
        except OSError as error:
            return {"": EngineProblem(reason=f"{self.root}: {_reason(error)}", remedy=REMOVE)}

    def serving(self, need: Need, machine: EngineHost) -> EngineRecord | EngineProblem:
        """The newest engine that meets a need on a machine, or why none does."""
        entries = self.entries().values()
        records = [entry for entry in entries if isinstance(entry, EngineRecord)]
        records.sort(key=lambda r: (r.key.graph_sha256 == need.graph_sha256, r.created), reverse=True)
        problems = []
        for record in records:
            if (record.key.graph, record.key.precision) == (need.graph, need.precision):
                problem = unfit(record, need, machine)
                if problem is None:
                    return record
                problems.append(problem)
        problems += [entry for entry in entries if isinstance(entry, EngineProblem)]
        missing = EngineProblem(reason=f"no engine of {need.graph} in {need.precision} was compiled")
        return problems[0] if problems else missing

    def plan(self, record: EngineRecord) -> bytes:
        """The plan of an entry: the same bytes whose sha256 was compared.

        Raises:
            BackendError: It cannot be read, is not private, or differs from the record.
        """
        return self._read(record, PLAN, record.plan_sha256)

    def kernels(self, record: EngineRecord) -> bytes | None:
        """The compiled kernels of an entry, checked like its plan; None if it has none.

        Raises:
            BackendError: See `plan`.
        """
        return None if record.kernels_sha256 is None else self._read(record, KERNELS, record.kernels_sha256)

    def sound(self, key: EngineKey) -> EngineRecord | None:
        """The entry of a key, if it exists and its plan agrees with its record."""
        entry = self.find(key)
        if isinstance(entry, EngineRecord):
            with contextlib.suppress(BackendError):
                self.plan(entry)
                return entry
        return None

    def remove(self, digest: str) -> None:
        """Remove an entry, damaged or not.

        Raises:
            BackendError: It does not exist, or cannot be removed.
        """
        if not digest or digest not in self.entries():
            raise BackendError(f"{self.root} has no engine {digest!r}; see unipinrec compile BUNDLE --list")
        try:
            self._discard(self.root / digest)
        except OSError as error:
            raise BackendError(f"{self.root / digest} cannot be removed: {_reason(error)}") from error

    def _entry(self, root: int, digest: str) -> EngineRecord | EngineProblem:
        """The record of an entry, compared with the size of its plan, or why it cannot be trusted."""
        try:
            with open_private(digest, FOLDER, root) as folder:
                content = read_private(folder, RECORD)
                with open_private(PLAN, FILE, folder) as plan:
                    size = os.fstat(plan).st_size
            record = msgspec.json.decode(content, type=EngineRecord)
        except MALFORMED as error:
            problem = f"{RECORD} is of another version, or altered ({error})"
        except OSError as error:
            problem = _reason(error)
        else:
            if record.key.digest() != digest:
                problem = f"{RECORD} is that of another entry, or altered"
            elif record.size_bytes != size:
                problem = f"{PLAN} is truncated or altered: it has {size} bytes, its record says {record.size_bytes}"
            else:
                return record
        return EngineProblem(reason=f"{self.root / digest}: {problem}", remedy=REMOVE)

    def _read(self, record: EngineRecord, name: str, sha256: str) -> bytes:
        entry = self.root / record.key.digest()
        try:
            with open_private(self.root, FOLDER) as root, open_private(entry.name, FOLDER, root) as folder:
                content = read_private(folder, name)
        except OSError as error:
            raise BackendError(f"{entry}: {_reason(error)}; {REMOVE}") from error
        actual = hashlib.sha256(content).hexdigest()
        if actual != sha256:
            differs = f"its sha256 is {actual}, the record says {sha256}"
            raise BackendError(f"{entry / name} is altered and was not loaded: {differs}; {REMOVE}")
        return content

    def _install(self, partial: Path, record: EngineRecord, replace: bool) -> EngineRecord:
        """Rename a finished folder to its entry, unless a sound entry exists already."""
        entry = self.root / record.key.digest()
        for _ in range(ATTEMPTS):  # another process may interfere
            try:
                partial.rename(entry)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
            else:
                sync_folder(self.root)
                return record
            present = self.sound(record.key)
            here = (record.machine.id, record.machine.gpu)
            if present is not None and (present.machine.id, present.machine.gpu) == here and not replace:
                return present
            with contextlib.suppress(FileNotFoundError):
                self._discard(entry)
        raise OSError(errno.EBUSY, f"{entry} keeps coming back")

    def _discard(self, entry: Path) -> None:
        """Remove an entry by one rename, so that no reader sees half of it."""
        away = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
        try:
            entry.rename(away / entry.name)
        finally:
            shutil.rmtree(away, ignore_errors=True)


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return "no space left on the disk"
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "is a link, or no folder, where a private folder or file belongs"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is missing"
    return str(error)
