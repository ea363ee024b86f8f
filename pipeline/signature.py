"""Whether files may have changed since they were looked at, by what the file system says of them alone."""

import os
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
    if not path.is_dir():
        return tuple(_states("", [path.name], str(path.parent)))
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name != "__pycache__"]
        inside = "" if folder == str(path) else f"{os.path.relpath(folder, path)}/"
        found += _states(inside, names, folder)
    return tuple(sorted(found))


def _states(inside: str, names: list[str], folder: str) -> list[FileState]:
    found = []
    for name in names:
        try:
            stat = Path(folder, name).stat()
        except OSError:  # it went while it was looked at
            continue
        found.append(FileState(inside + name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return found
