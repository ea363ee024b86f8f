"""Whether files may have changed since they were looked at, by what the file system says of them alone."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """A file's name in its folder, inode, size in bytes, and when its content and its inode last changed (ns).

    No program can set the last one: it shows an edit that keeps the size and puts the first time back.
    """

    name: str
    inode: int
    size: int
    modified: int
    changed: int


Signature = tuple[FileState, ...]


def signature(path: Path) -> Signature:
    """The state of a file, or of every file below a folder, by name; () if there is none."""
    if path.is_dir():
        return tuple(sorted(_states(str(path), "")))
    try:
        return (_state(path.name, path.stat()),)
    except OSError:
        return ()


def _states(folder: str, inside: str) -> Iterator[FileState]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # it went while it was looked at
        return
    for entry in entries:
        if not entry.is_dir():
            with suppress(OSError):
                yield _state(inside + entry.name, entry.stat())
        elif entry.name != "__pycache__" and not entry.is_symlink():
            yield from _states(entry.path, f"{inside}{entry.name}/")


def _state(name: str, stat: os.stat_result) -> FileState:
    return FileState(name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
