"""Files that only this user can write: checked and read through one descriptor, and synced to the disk."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a pipe must not block
OTHERS_ANY, OTHERS_WRITE = 0o077, 0o022


class UnsafeError(OSError):
    """A file or folder that others own or can reach."""


@contextlib.contextmanager
def open_private(name: str | Path, flags: int, folder: int | None = None) -> Iterator[int]:
    """Open a folder that only this user can reach, or a file that only this user can write.

    Args:
        name: A name in `folder`, or a whole path.
        flags: `FOLDER` or `FILE`. A link is not followed.
        folder: Descriptor of an open folder.

    Raises:
        UnsafeError: It is not private.
        OSError: It cannot be opened.
    """
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        mode, is_folder = stat.S_IMODE(status.st_mode), stat.S_ISDIR(status.st_mode)
        if status.st_uid != os.geteuid():
            raise UnsafeError(f"{Path(name).name} belongs to user {status.st_uid}, this is user {os.geteuid()}")
        if mode & (OTHERS_ANY if is_folder else OTHERS_WRITE):
            private = 700 if is_folder else 600
            raise UnsafeError(f"{Path(name).name} can be reached by others: its mode is {mode:o}, {private} is needed")
        if not is_folder and not stat.S_ISREG(status.st_mode):
            raise UnsafeError(f"{name} is no plain file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_private(folder: int, name: str) -> bytes:
    """All bytes of a private file in an open folder.

    Raises:
        UnsafeError: It is not private.
        OSError: It cannot be read.
    """
    with open_private(name, FILE, folder) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write new private files into a folder and sync them to the disk.

    Raises:
        OSError: One exists or cannot be written.
    """
    for name, content in files.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Sync a private folder's list of names to the disk."""
    with open_private(folder, FOLDER) as descriptor:
        os.fsync(descriptor)
