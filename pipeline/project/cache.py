"""A content-addressed store of finished artifacts: <root>/<stage>/<key>/.

The key covers all that decides an artifact's bytes. Entries appear whole, by rename, are checked against
their manifest when used, and are touched by one process at a time. Large files are one file under two names, so
that a real model does not cost its size again. They are read-only: an edit in place would change both.
"""

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import artifact

LARGE = 64 * 2**20  # bytes from which a file is linked
WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class Damaged(Exception):
    """An entry was not what its manifest says, and was removed; the message says what had changed."""


@dataclass(frozen=True)
class CacheEntry:
    """One cached artifact: its size in bytes and when it was last used (seconds since the epoch)."""

    stage: str
    key: str
    path: Path
    size: int
    used: float


@dataclass(frozen=True)
class Cache:
    root: Path

    def restore(self, stage: str, key: str, target: Path) -> bool:
        """Put a verified copy at `target`; False if there is none.

        Raises Damaged, and OSError if the cache or the target cannot be written.
        """
        entry = self.root / stage / key
        with self._lock():
            if not entry.is_dir():
                return False
            try:
                artifact.verify(entry)
            except UserError as error:
                shutil.rmtree(entry)
                raise Damaged(str(error)) from None
            with artifact.writing(target) as folder:
                _copy(entry, folder)
            with suppress(OSError):  # another user's entry: the copy is made, only its last use is not noted
                (entry / artifact.MANIFEST).touch()
        return True

    def store(self, stage: str, key: str, source: Path) -> None:
        """Keep a copy of `source`. If the same key was stored before, that copy stays."""
        entry = self.root / stage / key
        with self._lock():
            if not entry.is_dir():
                with artifact.writing(entry) as folder:
                    _copy(source, folder)

    def entries(self) -> list[CacheEntry]:
        """Everything cached, last used first."""
        if not self.root.is_dir():
            return []
        with self._lock():
            return self._entries()

    def _entries(self) -> list[CacheEntry]:
        found = [
            CacheEntry(path.parent.name, path.name, path, _size(path), _used(path))
            for path in self.root.glob("*/*")
            if path.is_dir() and not path.name.startswith(".")
        ]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def prune(self, keep: int = 0, older_than_days: float = 0.0) -> list[CacheEntry]:
        """Remove entries last used before `older_than_days` ago, but keep the newest `keep` of each stage."""
        limit = time.time() - older_than_days * 86_400
        kept: dict[str, int] = {}
        removed: list[CacheEntry] = []
        if not self.root.is_dir():
            return removed
        with self._lock():
            for begun in self.root.glob("*/.*"):  # by a process that was killed: a living one would hold the lock
                shutil.rmtree(begun)
            for entry in self._entries():
                kept[entry.stage] = kept.get(entry.stage, 0) + 1
                if kept[entry.stage] > keep and entry.used <= limit:
                    shutil.rmtree(entry.path)
                    removed.append(entry)
        return removed

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _copy(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_dir():
            (target / path.name).mkdir()
            _copy(path, target / path.name)
        elif not _linked(path, target / path.name):
            shutil.copyfile(path, target / path.name)


def _linked(path: Path, target: Path) -> bool:
    """Whether a large file was given a second name, and made read-only.

    It cannot be on another file system or one without links; another user's file cannot be made read-only.
    """
    before = path.stat()
    if before.st_size < LARGE:
        return False
    try:
        os.link(path.resolve(), target)
        target.chmod(stat.S_IMODE(before.st_mode) & ~WRITE)
    except OSError:
        target.unlink(missing_ok=True)  # else a copy would be written into the shared file
        return False
    return True


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _used(folder: Path) -> float:
    try:
        return (folder / artifact.MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return 0.0
