"""The files of a bundle in sealed memory, which no process can change after the check.

Each file is copied into a memfd, which only Linux has, then sealed, and only then compared with its sha256. Processes
of one server share a copy: each writes a note of its files to a folder, and opens those of the others through /proc.
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
READ_ONLY = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
OWN_FILES = Path("/proc/self/fd")
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EFBIG)
NOTE, WAIT_S = ".sealed", 30.0
REMEDY = "copy the bundle again, or export it again"
Offers = dict[str, list[str]]
log = logging.getLogger(__name__)


class SealedFile:
    """Sealed content of a file. It opens like a path; `str` is the name of the original file."""

    def __init__(self, source: Path, descriptor: int) -> None:
        self.source, self.descriptor = source, descriptor
        weakref.finalize(self, os.close, descriptor)

    def __fspath__(self) -> str:
        return str(OWN_FILES / str(self.descriptor))

    def __str__(self) -> str:
        return str(self.source)

    def read_bytes(self) -> bytes:
        """The whole content."""
        return Path(self).read_bytes()


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """A graph, and the files of weights that it refers to."""

    name: str
    content: bytes
    weights: Mapping[str, os.PathLike[str]]

    @classmethod
    def at(cls, path: Path) -> GraphFile:
        """A graph in a folder, whose other files may be its weights."""
        content, others = path.read_bytes(), (file for file in path.parent.iterdir() if file.is_file() and file != path)
        weights = {file.name: file for file in others if file.name.encode() in content}
        return cls(name=path.name, content=content, weights=weights)

    @contextlib.contextmanager
    def in_folder(self) -> Iterator[Path]:
        """A temporary private folder with these files, for libraries that load weights beside a graph.

        Raises:
            BackendError: The disk has no room for it.
        """
        with contextlib.ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unipinrec-")))
                (folder / self.name).write_bytes(self.content)
                for name, file in self.weights.items():
                    shutil.copyfile(file, folder / name)
            except OSError as error:
                raise BackendError(
                    f"{self.name} cannot be copied to a private folder for loading: {error.strerror}; set TMPDIR to a "
                    "folder with room for it and its weights"
                ) from error
            yield folder / self.name


class SealedFiles:
    """The files of one folder, by name, sealed when it was opened."""

    def __init__(self, folder: Path, specs: Mapping[str, FileSpec], shared: Path | None = None) -> None:
        """Seal all of them.

        Args:
            folder: Their folder; read again only for a file that `let_go` released.
            specs: Size and sha256 of each.
            shared: Folder of the processes that share copies; one of them seals at a time. None = no sharing.

        Raises:
            BundleCorruptError: A file is missing, truncated or altered.
            BackendError: The memory does not suffice.
        """
        self._folder, self._specs = folder, specs
        if not OWN_FILES.is_dir():
            raise BackendError(f"{OWN_FILES} is missing, but bundles are read through it; mount /proc")
        with _alone(shared) as in_turn:
            self._files = self._sealed(largest_first(specs), _offered(shared) if shared and in_turn else {})
            if shared and in_turn:
                self._offer(shared)

    def __getitem__(self, name: str) -> SealedFile:
        if name not in self._files:
            self._files |= self._sealed([name], {})
        return self._files[name]

    def let_go(self, kept: Collection[str]) -> None:
        """Release all other files."""
        self._files = {name: file for name, file in self._files.items() if name in kept}

    def graph(self, name: str) -> GraphFile:
        """A graph with its weights, which are among these files."""
        content = self[name].read_bytes()
        named = {other: self[other] for other in self._specs if other != name and other.encode() in content}
        return GraphFile(name=name, content=content, weights=named)

    def _sealed(self, names: Collection[str], offered: Offers) -> dict[str, SealedFile]:
        def seal(name: str) -> SealedFile | str:
            path, spec = self._folder / name, self._specs[name]
            return _taken_over(path, spec, offered) or _copied(path, spec)

        with ThreadPoolExecutor(available_threads()) as pool:  # copying and hashing release Python's lock
            made = dict(zip(names, pool.map(seal, names), strict=True))
        problems = [f"{name} {made[name]}" for name in self._specs if isinstance(made.get(name), str)]
        if problems:
            raise BundleCorruptError(f"{self._folder}: {'; '.join(problems)}; {REMEDY}")
        return {name: file for name, file in made.items() if isinstance(file, SealedFile)}

    def _offer(self, shared: Path) -> None:
        note = shared / f"{os.getpid()}-{id(self)}{NOTE}"
        offers = {self._specs[name].sha256: file.descriptor for name, file in self._files.items()}
        with contextlib.suppress(OSError):  # if there is no room for the note, the others make their own copies
            note.write_bytes(msgspec.json.encode(offers))
            weakref.finalize(self, _withdraw, note, os.getpid())


def _withdraw(note: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        note.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(shared: Path | None) -> Iterator[bool]:
    """Lock the folder, so that one process seals at a time; False if another one holds the lock for too long."""
    if shared is None:
        yield True
        return
    with (shared / "sealing.lock").open("w") as lock:
        limit = time.monotonic() + WAIT_S
        while not (locked := _locked(lock.fileno())) and time.monotonic() < limit:
            time.sleep(0.01)
        if not locked:
            log.warning("another process has been sealing for %.0f s; this process makes its own copy", WAIT_S)
        yield locked


def _locked(lock: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _offered(shared: Path) -> Offers:
    """Paths of files of other processes, by sha256; a path may be gone or lead to something else."""
    offers: Offers = {}
    for note in shared.glob(f"*{NOTE}"):
        process = Path("/proc", note.name.partition("-")[0])
        with contextlib.suppress(OSError, *MALFORMED):
            if not process.exists():
                note.unlink()
                continue
            for digest, number in msgspec.json.decode(note.read_bytes(), type=dict[str, int]).items():
                offers.setdefault(digest, []).append(str(process / "fd" / str(number)))
    return offers


def _taken_over(path: Path, spec: FileSpec, offered: Offers) -> SealedFile | None:
    """The file as another process has sealed it, if one has."""
    for path_of_fd in offered.get(spec.sha256, ()):
        with contextlib.suppress(OSError):  # gone, or not a memfd
            file = SealedFile(path, os.open(path_of_fd, READ_ONLY))
            if fcntl.fcntl(file.descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS and file_problem(file, spec) is None:
                return file
    return None


def _copied(path: Path, spec: FileSpec) -> SealedFile | str:
    """A sealed copy of a file, or the file's problem.

    Raises:
        BackendError: The memory does not suffice.
    """
    try:
        source = os.open(path, READ_ONLY)
    except OSError:
        return file_problem(path, spec) or "was replaced meanwhile"
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode) or status.st_size != spec.size_bytes:  # before memory is allocated
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
        return os.memfd_create(name, flags | NOEXEC)  # hardened systems (vm.memfd_noexec=2) require it
    except OSError:
        return os.memfd_create(name, flags)
