"""Detects that files may have changed, from inode, size and times alone, without reading them."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """A file's name in its folder, inode, size in bytes, mtime and ctime (ns).

    No program can set ctime: it reveals an edit that keeps the size and restores mtime.
    """

    name: str
    inode: int
    size: int
    modified: int
    changed: int


Signature = tuple[FileState, ...]


def signature(path: Path) -> Signature:
    """The state of a file, or of every file below a folder, sorted by name; () if there is none."""
    if path.is_dir():
        return tuple(sorted(_states(str(path), "")))
    try:
        return (_state(path.name, path.stat()),)
    except OSError:
        return ()


def _states(folder: str, prefix: str) -> Iterator[FileState]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # deleted meanwhile
        return
    for entry in entries:
        if not entry.is_dir():
            with suppress(OSError):
                yield _state(prefix + entry.name, entry.stat())
        elif entry.name != "__pycache__" and not entry.is_symlink():
            yield from _states(entry.path, f"{prefix}{entry.name}/")


def _state(name: str, stat: os.stat_result) -> FileState:
    return FileState(name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
