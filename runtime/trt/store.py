"""The private cache of compiled engines, `~/.cache/unipinrec/engines/<key>/`, and what makes an entry trustworthy.

A plan is executable code. So the cache and its entries belong to this user and to nobody else's reach, an entry lists
the sha256 of its files, what is given out are the very bytes that were hashed, and an entry that another machine, GPU
or TensorRT made is refused with the reason. An entry appears whole, by one rename, or not at all.
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
from unipinrec.runtime.trt.private_files import (
    FILE,
    FOLDER,
    UnsafeError,
    open_private,
    read_private,
    sync_folder,
    write_files,
)
from unipinrec.runtime.trt.record import EngineHost, EngineKey, EngineRecord, Need, Refusal, unfit

PLAN, RECORD, KERNELS = "engine.plan", "engine.json", "kernels.bin"
PARTIAL = ".partial-"
STALE_S = 24 * 3600.0
ATTEMPTS = 3
REMOVE = "remove it, and compile again"


def cache_root() -> Path:
    """Where engines are kept: under `UNIPINREC_CACHE`, else under the user's cache folder.

    Raises:
        BackendError: No variable names a folder, and this user has no home.
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
    """Engines of this user on this machine, in one folder. Nothing is built or written while requests are served."""

    def __init__(self, root: Path | None = None) -> None:
        """Use a folder, which need not exist; None = `cache_root()`.

        Raises:
            BackendError: As `cache_root`.
        """
        self.root = cache_root() if root is None else root

    def prepare(self) -> None:
        """Make the folder where it is missing, and remove what interrupted compilations left there long ago.

        Raises:
            BackendError: It is not private, or cannot be made.
        """
        try:
            self._make_private()
        except (OSError, UnsafeError) as error:
            raise BackendError(f"{self.root}: {_reason(error)}; {REMOVE}") from error

    def put(
        self, record: EngineRecord, plan: bytes, kernels: bytes | None = None, *, replace: bool = False
    ) -> EngineRecord:
        """Add an engine, whole or not at all.

        Args:
            record: What it is; the hashes and the size of its files are filled in.
            plan: The engine.
            kernels: What TensorRT-RTX compiled from it for this GPU.
            replace: Take the place of a sound entry that this machine made, which else stays.

        Returns:
            The record of the entry: of two builds at the same time, that of the first one to finish.

        Raises:
            BackendError: The folder is not private, or it cannot be written, the disk being full included.
        """
        record = msgspec.structs.replace(
            record,
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            size_bytes=len(plan),
            kernels_sha256=None if kernels is None else hashlib.sha256(kernels).hexdigest(),
        )
        files = {PLAN: plan, RECORD: msgspec.json.format(msgspec.json.encode(record))}
        try:
            self._make_private()
            partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
            try:
                write_files(partial, files if kernels is None else {**files, KERNELS: kernels})
                return self._install(partial, record, replace)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except (OSError, UnsafeError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
            reason = "no space left on the disk" if full else _reason(error)
            raise BackendError(
                f"{self.root}: the engine of {record.key.graph} cannot be kept: {reason}; nothing was left behind"
            ) from error

    def find(self, key: EngineKey) -> EngineRecord | Refusal:
        """The entry of a key, its plan unread, or why there is none."""
        digest = key.digest()
        return self._entries([digest]).get(digest) or Refusal(
            reason=f"no engine of {key.graph} in {key.precision} was compiled with these settings"
        )

    def entries(self) -> dict[str, EngineRecord | Refusal]:
        """All entries by the hash of their key; those that cannot be trusted with the reason."""
        return self._entries(None)

    def serving(self, need: Need, machine: EngineHost) -> EngineRecord | Refusal:
        """The newest engine that fits, or why none does."""
        entries = self.entries().values()
        records = [entry for entry in entries if isinstance(entry, EngineRecord)]
        records.sort(key=lambda r: (r.key.graph_sha256 == need.graph_sha256, r.created), reverse=True)
        nearest: Refusal | None = None
        for record in records:
            if (record.key.graph, record.key.precision) == (need.graph, need.precision):
                refusal = unfit(record, need, machine)
                if refusal is None:
                    return record
                nearest = nearest or refusal
        broken = [entry for entry in entries if isinstance(entry, Refusal)]
        missing = Refusal(reason=f"no engine of {need.graph} in {need.precision} was compiled")
        return nearest or (broken[0] if broken else missing)

    def plan(self, record: EngineRecord) -> bytes:
        """The plan of an entry: the very bytes whose sha256 was compared.

        Raises:
            BackendError: It cannot be read, is not private, or is not the plan that the record lists.
        """
        return self._read(record, PLAN, record.plan_sha256)

    def kernels(self, record: EngineRecord) -> bytes | None:
        """The compiled kernels of an entry, if it has any; they are checked as the plan is.

        Raises:
            BackendError: As `plan`.
        """
        return None if record.kernels_sha256 is None else self._read(record, KERNELS, record.kernels_sha256)

    def sound(self, key: EngineKey) -> EngineRecord | None:
        """The entry of a key, if there is one and its plan is what its record lists."""
        there = self.find(key)
        if isinstance(there, Refusal):
            return None
        try:
            self.plan(there)
        except BackendError:
            return None
        return there

    def remove(self, digest: str) -> None:
        """Remove an entry, whatever state it is in.

        Raises:
            BackendError: There is none, or it cannot be removed.
        """
        if not digest or digest not in self.entries():
            raise BackendError(f"{self.root} has no engine {digest!r}; see unipinrec compile BUNDLE --list")
        try:
            self._discard(self.root / digest)
        except OSError as error:
            raise BackendError(f"{self.root / digest} cannot be removed: {_reason(error)}") from error

    def _entries(self, wanted: list[str] | None) -> dict[str, EngineRecord | Refusal]:
        """Entries by hash, those that there are."""
        try:
            with open_private(self.root, FOLDER) as root:
                there = sorted(name for name in os.listdir(root) if not name.startswith("."))  # noqa: PTH208 - of what is open
                names = there if wanted is None else [name for name in wanted if name in there]
                return {name: self._entry(root, name) for name in names}
        except FileNotFoundError:
            return {}
        except (OSError, UnsafeError) as error:
            refusal = Refusal(reason=f"{self.root}: {_reason(error)}", remedy=REMOVE)
            return dict.fromkeys(wanted or [""], refusal)

    def _entry(self, root: int, digest: str) -> EngineRecord | Refusal:
        try:
            return _read_record(root, digest)
        except (OSError, UnsafeError) as error:
            return Refusal(reason=f"{self.root / digest}: {_reason(error)}", remedy=REMOVE)

    def _read(self, record: EngineRecord, name: str, sha256: str) -> bytes:
        entry = self.root / record.key.digest()
        try:
            with open_private(self.root, FOLDER) as root, open_private(entry.name, FOLDER, root) as folder:
                content = read_private(folder, name)
        except (OSError, UnsafeError) as error:
            raise BackendError(f"{entry}: {_reason(error)}; {REMOVE}") from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            differs = f"its sha256 is {found}, the record says {sha256}"
            raise BackendError(f"{entry / name} is altered and was not loaded: {differs}; {REMOVE}")
        return content

    def _make_private(self) -> None:
        """See `prepare`."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.root.mkdir(mode=0o700)
        with open_private(self.root, FOLDER):
            pass
        for path in self.root.glob(f"{PARTIAL}*"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < time.time() - STALE_S:
                    shutil.rmtree(path)

    def _install(self, partial: Path, record: EngineRecord, replace: bool) -> EngineRecord:
        """Give a finished folder its name, unless a sound entry has it already."""
        entry = self.root / record.key.digest()
        for _ in range(ATTEMPTS):  # another process may come in between
            try:
                partial.rename(entry)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
            else:
                sync_folder(self.root)
                return record
            there = self.sound(record.key)
            same = there is not None and (there.machine.id, there.machine.gpu) == (
                record.machine.id,
                record.machine.gpu,
            )
            if there is not None and same and not replace:
                return there
            with contextlib.suppress(FileNotFoundError):
                self._discard(entry)
        raise OSError(errno.EBUSY, f"{entry} keeps coming back")

    def _discard(self, entry: Path) -> None:
        """Take an entry away by one rename, so that nobody finds half of it."""
        away = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
        try:
            entry.rename(away / entry.name)
        finally:
            shutil.rmtree(away, ignore_errors=True)


def _read_record(root: int, digest: str) -> EngineRecord:
    """The record of an entry; of its plan only the size is looked at.

    Raises:
        UnsafeError: Something is not private, missing, or contradicts itself.
        OSError: Something cannot be read.
    """
    with open_private(digest, FOLDER, root) as folder:
        content = read_private(folder, RECORD)
        with open_private(PLAN, FILE, folder) as plan:
            size = os.fstat(plan).st_size
    try:
        record = msgspec.json.decode(content, type=EngineRecord)
    except MALFORMED as error:
        raise UnsafeError(f"{RECORD} is of another version, or altered ({error})") from error
    if record.key.digest() != digest:
        raise UnsafeError(f"{RECORD} is that of another entry, or altered")
    if record.size_bytes != size:
        raise UnsafeError(f"{PLAN} is truncated or altered: it has {size} bytes, its record says {record.size_bytes}")
    return record


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "is a link, or no folder, where a private folder or file belongs"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is missing"
    return str(error)
