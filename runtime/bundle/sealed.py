"""The files of a bundle in memory that nobody can write to: what serves is what was checked, whatever becomes of them.

Each is copied into a memfd, sealed, and only then compared with its sha256. Linux alone has these. Processes that serve
together hold one copy: each leaves word of its own in a folder, and opens those of the others through /proc.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from unipinrec.errors import MALFORMED, BackendError, BundleCorruptError
from unipinrec.runtime.bundle.files import file_problem, largest_first
from unipinrec.runtime.bundle.manifest import FileSpec
from unipinrec.runtime.machine import available_threads

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
NOEXEC = 8  # MFD_NOEXEC_SEAL, of Linux 6.3 and later
NOTE = ".sealed"
REMEDY = "copy the bundle again, or export it again"
Places = dict[str, list[str]]


class SealedFile:
    """A file's content as it was when it was checked. It is opened like a path; as text it is the name of the file."""

    def __init__(self, source: Path, descriptor: int) -> None:
        self.source, self.descriptor = source, descriptor
        weakref.finalize(self, os.close, descriptor)

    def __fspath__(self) -> str:
        return f"/proc/self/fd/{self.descriptor}"

    def __str__(self) -> str:
        return str(self.source)

    def read_bytes(self) -> bytes:
        """All of it."""
        return Path(self).read_bytes()


class SealedFiles:
    """The files of one folder, by name, sealed as they were when it was opened."""

    def __init__(self, folder: Path, specs: Mapping[str, FileSpec], shared: Path | None = None) -> None:
        """Seal all of them.

        Args:
            folder: Where they lie; it is not read again unless one is asked for after `let_go`.
            specs: Size and sha256 of each.
            shared: A folder of processes that serve together, of which one seals at a time; None = shared with nobody.

        Raises:
            BundleCorruptError: A file is missing, truncated or altered, or there is no memory for it.
        """
        self._folder, self._specs = folder, specs
        self._unpacked: dict[str, Path] = {}
        with _alone(shared):
            self._files = self._sealed(largest_first(specs), {} if shared is None else _offered(shared))
            if shared is not None:
                self._offer(shared)

    def __getitem__(self, name: str) -> SealedFile:
        if name not in self._files:
            self._files |= self._sealed([name], {})
        return self._files[name]

    def let_go(self, kept: Collection[str]) -> None:
        """Hold no others than these from now on."""
        self._files = {name: file for name, file in self._files.items() if name in kept}
        for folder in {path.parent for path in self._unpacked.values()}:
            shutil.rmtree(folder, ignore_errors=True)
        self._unpacked = {}

    def unpacked(self, names: Collection[str]) -> dict[str, Path]:
        """These under their own names in a private folder, for libraries that find one beside the other.

        It is removed with `let_go`, or with these files: what is mapped from it stays, and has no name any more.

        Raises:
            BackendError: There is no room for them.
        """
        if not self._unpacked.keys() >= set(names):
            try:
                folder = Path(tempfile.mkdtemp(prefix="unipinrec-"))
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self._unpacked |= {name: Path(shutil.copyfile(self[name], folder / name)) for name in names}
            except OSError as error:
                raise BackendError(
                    f"the graphs cannot be copied to a private folder for loading: {error}; set TMPDIR to one "
                    "with room for them"
                ) from error
        return {name: self._unpacked[name] for name in names}

    def _sealed(self, names: Collection[str], offered: Places) -> dict[str, SealedFile]:
        def seal(name: str) -> SealedFile | str:
            path, spec = self._folder / name, self._specs[name]
            return _taken_over(path, spec, offered) or _copied(path, spec)

        with ThreadPoolExecutor(available_threads()) as pool:  # copying and hashing leave Python's lock to others
            made = dict(zip(names, pool.map(seal, names), strict=True))
        problems = [f"{name} {made[name]}" for name in self._specs if isinstance(made.get(name), str)]
        if problems:
            raise BundleCorruptError(f"{self._folder}: {'; '.join(problems)}; {REMEDY}")
        return {name: file for name, file in made.items() if isinstance(file, SealedFile)}

    def _offer(self, shared: Path) -> None:
        note = shared / f"{os.getpid()}-{id(self)}{NOTE}"
        places = {self._specs[name].sha256: file.descriptor for name, file in self._files.items()}
        note.write_bytes(msgspec.json.encode(places))
        weakref.finalize(self, note.unlink, missing_ok=True)


@contextlib.contextmanager
def _alone(shared: Path | None) -> Iterator[None]:
    """Hold while this process alone seals; of one that dies, the lock is free."""
    if shared is None:
        yield
        return
    with (shared / "sealing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _offered(shared: Path) -> Places:
    """Where processes hold files, by sha256; some may be gone, and in their place is anything."""
    places: Places = {}
    for note in shared.glob(f"*{NOTE}"):
        with contextlib.suppress(OSError, *MALFORMED):
            held = msgspec.json.decode(note.read_bytes(), type=dict[str, int])
            for digest, number in held.items():
                places.setdefault(digest, []).append(f"/proc/{note.name.partition('-')[0]}/fd/{number}")
    return places


def _taken_over(path: Path, spec: FileSpec, offered: Places) -> SealedFile | None:
    """A file that a process has sealed."""
    for place in offered.get(spec.sha256, ()):
        with contextlib.suppress(OSError):  # gone, or no memfd
            file = SealedFile(path, os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            if fcntl.fcntl(file.descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS and file_problem(file, spec) is None:
                return file
    return None


def _copied(path: Path, spec: FileSpec) -> SealedFile | str:
    """A file, sealed, or what is wrong with it."""
    try:
        if path.stat().st_size != spec.size_bytes:  # before room is made for it
            return file_problem(path, spec) or "was altered meanwhile"
        file = SealedFile(path, _memfd(path.name))
        shutil.copyfile(path, file)
        fcntl.fcntl(file.descriptor, fcntl.F_ADD_SEALS, SEALS)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read into memory: {error.strerror or error}"
    return file_problem(file, spec) or file


def _memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | NOEXEC)  # hardened systems (vm.memfd_noexec=2) allow no others
    except OSError:
        return os.memfd_create(name, flags)
