"""The files of a bundle in memory that nobody can write to: what serves is what was checked, whatever becomes of them.

Each is copied into a memfd, sealed, and only then compared with its sha256. Linux alone has these. Processes that serve
together hold one copy: each leaves word of its own in a folder, and opens those of the others through /proc.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from unipinrec.errors import MALFORMED, BackendError, BundleCorruptError
from unipinrec.runtime.bundle.integrity import file_problem, largest_first
from unipinrec.runtime.bundle.manifest import FileSpec
from unipinrec.runtime.machine import available_threads

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
NOEXEC = 8  # MFD_NOEXEC_SEAL, of Linux 6.3 and later
OWN_FILES = Path("/proc/self/fd")
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EFBIG)
NOTE, WAIT_S = ".sealed", 30.0
REMEDY = "copy the bundle again, or export it again"
Places = dict[str, list[str]]
log = logging.getLogger(__name__)


class SealedFile:
    """A file's content as it was when it was checked. It is opened like a path; as text it is the name of the file."""

    def __init__(self, source: Path, descriptor: int) -> None:
        self.source, self.descriptor = source, descriptor
        weakref.finalize(self, os.close, descriptor)

    def __fspath__(self) -> str:
        return str(OWN_FILES / str(self.descriptor))

    def __str__(self) -> str:
        return str(self.source)

    def read_bytes(self) -> bytes:
        """All of it."""
        return Path(self).read_bytes()


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """A graph, and the files of weights that it names."""

    name: str
    content: bytes
    weights: Mapping[str, os.PathLike[str]]

    @classmethod
    def at(cls, path: Path) -> GraphFile:
        """A graph in a folder, some of whose other files it may name."""
        content, others = path.read_bytes(), (one for one in path.parent.iterdir() if one.is_file() and one != path)
        weights = {one.name: one for one in others if one.name.encode() in content}
        return cls(name=path.name, content=content, weights=weights)

    @contextlib.contextmanager
    def in_folder(self) -> Iterator[Path]:
        """A private folder with these files, for libraries that look for one beside the other; nothing may stay mapped.

        Raises:
            BackendError: There is no room for it.
        """
        with contextlib.ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unipinrec-")))
                (folder / self.name).write_bytes(self.content)
                for name, file in self.weights.items():
                    shutil.copyfile(file, folder / name)
            except OSError as error:
                raise BackendError(
                    f"{self.name} cannot be copied to a private folder for loading: {error.strerror}; set TMPDIR to "
                    "one with room for it and its weights"
                ) from error
            yield folder / self.name


class SealedFiles:
    """The files of one folder, by name, sealed as they were when it was opened."""

    def __init__(self, folder: Path, specs: Mapping[str, FileSpec], shared: Path | None = None) -> None:
        """Seal all of them.

        Args:
            folder: Where they lie; it is not read again unless one is asked for after `let_go`.
            specs: Size and sha256 of each.
            shared: A folder of processes that serve together, of which one seals at a time; None = shared with nobody.

        Raises:
            BundleCorruptError: A file is missing, truncated or altered.
            BackendError: There is no memory for them.
        """
        self._folder, self._specs = folder, specs
        if not OWN_FILES.is_dir():
            raise BackendError(f"{OWN_FILES} is not there, through which bundles are read; mount /proc")
        with _alone(shared) as in_turn:
            self._files = self._sealed(largest_first(specs), _offered(shared) if shared and in_turn else {})
            if shared and in_turn:
                self._offer(shared)

    def __getitem__(self, name: str) -> SealedFile:
        if name not in self._files:
            self._files |= self._sealed([name], {})
        return self._files[name]

    def let_go(self, kept: Collection[str]) -> None:
        """Hold no others than these from now on."""
        self._files = {name: file for name, file in self._files.items() if name in kept}

    def graph(self, name: str) -> GraphFile:
        """A graph, whose weights are among these files."""
        content = self[name].read_bytes()
        named = {other: self[other] for other in self._specs if other != name and other.encode() in content}
        return GraphFile(name=name, content=content, weights=named)

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
        with contextlib.suppress(OSError):  # without room for it the others make copies of their own
            note.write_bytes(msgspec.json.encode(places))
            weakref.finalize(self, _withdraw, note, os.getpid())


def _withdraw(note: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        note.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(shared: Path | None) -> Iterator[bool]:
    """Hold while this process alone seals; whether it is, for one that stands still must not hold up the others."""
    if shared is None:
        yield True
        return
    with (shared / "sealing.lock").open("w") as lock:
        limit = time.monotonic() + WAIT_S
        while not (mine := _locked(lock.fileno())) and time.monotonic() < limit:
            time.sleep(0.01)
        if not mine:
            log.warning("another process has been sealing for %.0f s; this one makes a copy of its own", WAIT_S)
        yield mine


def _locked(lock: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _offered(shared: Path) -> Places:
    """Where processes hold files, by sha256; some may be gone, and in their place is anything."""
    places: Places = {}
    for note in shared.glob(f"*{NOTE}"):
        process = Path("/proc", note.name.partition("-")[0])
        with contextlib.suppress(OSError, *MALFORMED):
            if not process.exists():
                note.unlink()
                continue
            for digest, number in msgspec.json.decode(note.read_bytes(), type=dict[str, int]).items():
                places.setdefault(digest, []).append(str(process / "fd" / str(number)))
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
    """A file, sealed, or what is wrong with it.

    Raises:
        BackendError: There is no memory for it.
    """
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return file_problem(path, spec) or "was replaced meanwhile"
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode) or status.st_size != spec.size_bytes:  # before room is made for it
            return file_problem(path, spec) or "was replaced meanwhile"
        file, left = SealedFile(path, _memfd(path.name)), spec.size_bytes
        while left and (sent := os.sendfile(file.descriptor, source, None, left)):
            left -= sent
        fcntl.fcntl(file.descriptor, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise BackendError(
                f"{path}: {spec.size_bytes:,} bytes cannot be held in memory: {error.strerror}; allow this process "
                "more memory, open files (ulimit -n) or larger files (ulimit -f)"
            ) from error
        return f"cannot be read: {error.strerror or error}"
    finally:
        os.close(source)
    return file_problem(file, spec) or file


def _memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | NOEXEC)  # hardened systems (vm.memfd_noexec=2) allow no others
    except OSError:
        return os.memfd_create(name, flags)
