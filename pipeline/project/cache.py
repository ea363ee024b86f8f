"""A content-addressed cache of finished artifacts, <root>/<stage>/<key>/, and runs with names.

A named run is a folder that looks like artifacts/, <root>/named/<name>/: links to entries, which are
kept as long as it is there, and what was measured of them.

The key covers everything that determines an artifact's bytes. Entries appear and go atomically by
rename, and every copy is verified against its manifest. Large files are hard links,
so that a real model takes no extra space; they are read-only, because an edit in place would change
both copies.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.locks import flock
from pipeline.project.provenance import public

SHORT_KEY = 8  # characters of a key that name an entry to a user
# keys of a manifest that determine an artifact
FACTS = ("kind", "method", "stage", "seed", "params", "inputs", "code", "versions")
LARGE = 64 * 2**20  # bytes; larger files are hard-linked instead of copied
NAMED = "named"
ADAPTERS = "adapters"  # in the place of a stage: each adapter of a sweep, by itself
NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,63}", re.ASCII)  # of a run
WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
# errors of a cache that may only be read: another user's, or one on a read-only disk
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
# errors of reading an entry that is removed meanwhile; ESTALE on NFS
VANISHED = (errno.ENOENT, errno.ESTALE)
ATTEMPTS = 3  # at an entry that others remove and store again


def cache_key(facts: Mapping[str, Any]) -> str:
    """The key of the artifact with these facts in its manifest; empty if one is missing."""
    if any(name not in facts for name in FACTS):
        return ""
    determining = {name: facts[name] for name in FACTS}
    if isinstance(facts["versions"], Mapping):  # else not a manifest of ours
        determining["versions"] = public(facts["versions"])
    text = json.dumps(determining, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Damaged(Exception):
    """An entry did not match its manifest and was removed; the message says what differed."""


@dataclass(frozen=True)
class CacheEntry:
    """One cached artifact."""

    stage: str
    key: str
    path: Path
    size: int  # in bytes
    used: float  # when it was last used, in seconds since the epoch
    # bytes that an artifact has too, by hard links: removing the entry does not free them yet
    shared: int = 0


@dataclass(frozen=True)
class Cache:
    root: Path

    def restore(self, stage: str, key: str, target: Path) -> bool:
        """Copy the verified entry to `target`. Returns False if there is no entry.

        Raises Damaged, and OSError if the cache or the target cannot be written.
        """
        # Without a lock: a shared one would let removals wait for every copy over a slow network,
        # and not every file system has one. What is verified is the copy. So nobody gets a part of
        # an entry that is removed meanwhile, or a mixture with another that takes its place.
        self.root.mkdir(parents=True, exist_ok=True)
        entry = self.root / stage / key
        for _ in range(ATTEMPTS):
            if not entry.is_dir():
                break
            try:
                with artifact.writing(target) as folder:
                    copy_contents(entry, folder)
                    artifact.verify(folder)
            except (UserError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in VANISHED:
                    raise
                self._remove_damaged(entry)
            else:
                # another user's entry: only its time of last use is not updated
                with suppress(OSError):
                    (entry / artifact.MANIFEST).touch()
                return True
        return False

    def _remove_damaged(self, entry: Path) -> None:
        """Remove an entry that is there and differs from its manifest, which raises Damaged.

        A file of it may have been edited through one of its hard links.
        """
        with suppress(FileNotFoundError):  # another process removes it
            before = entry.stat()
            try:
                artifact.verify(entry)
            except UserError as error:
                with self._lock():
                    now = entry.stat()
                    # else another process has stored it again meanwhile
                    if (now.st_ino, now.st_ctime_ns) == (before.st_ino, before.st_ctime_ns):
                        remove(entry)
                        raise Damaged(str(error)) from None

    def store(self, stage: str, key: str, source: Path) -> None:
        """Store a copy of `source`, unless the key exists already."""
        # Without a lock: no rename replaces a folder that is not empty, so that of two copies the
        # second is dropped.
        entry = self.root / stage / key
        if not entry.is_dir():
            with artifact.beside(entry) as folder:
                copy_contents(source, folder)
                artifact.sync_tree(folder)
                try:
                    folder.rename(entry)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise

    def has(self, stage: str, key: str) -> bool:
        """Whether there is an entry; it may be damaged."""
        return bool(key) and (self.root / stage / key).is_dir()

    def entries(self) -> list[CacheEntry]:
        """All entries, most recently used first."""
        if not self.root.is_dir():
            return []
        with self._lock():
            return self._entries()

    def _entries(self) -> list[CacheEntry]:
        folders = (path for path in self.root.glob("*/[!.]*/") if path.parent.name != NAMED)
        entries = [_entry(path) for path in folders]
        return sorted(entries, key=lambda entry: entry.used, reverse=True)

    def prune(
        self, keep: int = 0, older_than_days: float = 0.0, max_size: int = 0
    ) -> list[CacheEntry]:
        """Remove entries unused for `older_than_days` days. Returns what was removed.

        The newest `keep` of each stage stay, the most recently used, up to `max_size` bytes in
        total, and those of named runs.
        """
        removed: list[CacheEntry] = []
        if not self.root.is_dir():
            return removed
        limit = time.time() - older_than_days * 86_400
        count = Counter[str]()  # stage → entries so far
        size = 0  # of the entries so far
        with self._lock():
            for unfinished in self.root.glob("*/.*/"):
                if artifact.is_abandoned(unfinished):
                    shutil.rmtree(unfinished, ignore_errors=True)
            named = self._linked()
            for entry in self._entries():
                if entry.path.resolve() in named:
                    continue
                # adapters are not versions of each other
                kind = entry.key if entry.stage == ADAPTERS else entry.stage
                count[kind] += 1
                size += entry.size
                if count[kind] > keep and entry.used <= limit and size > max_size:
                    remove(entry.path)
                    removed.append(entry)
        return removed

    def named(self) -> dict[str, Path]:
        """Name → folder of each named run."""
        return {path.name: path for path in sorted((self.root / NAMED).glob("[!.]*/"))}

    def results(self) -> list[Path]:
        """The results of all named runs, that is their links to entries that are there."""
        links = (link for folder in self.named().values() for link in sorted(folder.iterdir()))
        return [link for link in links if link.is_symlink() and link.is_dir()]

    def name(self, name: str, stage: str, key: str, link: str) -> Path:
        """Let `link` of a named run be an entry. Raises UserError if there is no such entry."""
        folder = self.root / NAMED / name
        with self._lock():
            if not self.has(stage, key):
                raise UserError(
                    f"The cache could not keep this result of {stage}, so that it has no name. "
                    f"Free some space, or check the permissions of {self.root}."
                )
            folder.mkdir(parents=True, exist_ok=True)
            new = folder / f".{link}"
            new.unlink(missing_ok=True)
            new.symlink_to(Path(os.path.relpath(self.root / stage / key, folder)))
            new.replace(folder / link)
        return folder / link

    def forget(self, name: str) -> int:
        """Remove a named run, and those of its entries that no other has. Returns their bytes."""
        with self._lock():
            before = self._linked()
            remove(self.root / NAMED / name)
            size = 0
            for path in before - self._linked():
                size += _entry(path).size
                remove(path)
        return size

    def _linked(self) -> set[Path]:
        """The entries of named runs that are there."""
        return {link.resolve() for link in self.results()}

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Other processes wait to remove or name entries, or to list them.

        Who may only read the cache shares the lock, so that the owner waits; without a lock file
        there is nobody to wait for. A file system without flock does without: entries appear and go
        by a rename.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / ".lock"
        file: BinaryIO
        mode = fcntl.LOCK_EX
        try:
            file = path.open("ab")
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            if not path.exists():
                yield
                return
            file = path.open("rb")
            mode = fcntl.LOCK_SH
        with file:
            flock(file, mode)
            yield


def remove(folder: Path) -> None:
    """Remove it whole, also if the process is killed, so that nobody finds a part of it."""
    aside = artifact.sibling(folder, "tmp")  # which `prune` removes if this process is killed
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):  # without flock two may do so at once
        shutil.rmtree(folder.rename(aside))


def copy_contents(source: Path, target: Path) -> None:
    """Copy what is in a folder into another one; large files are linked."""
    for path in sorted(source.iterdir()):
        if path.is_dir():
            (target / path.name).mkdir()
            copy_contents(path, target / path.name)
        elif not _try_link(path, target / path.name):
            shutil.copyfile(path, target / path.name)


def _try_link(path: Path, target: Path) -> bool:
    """Hard-link a large file and make it read-only. Returns whether that worked.

    It fails across file systems, on those without links, and for another user's file.
    """
    before = path.stat()
    if before.st_size < LARGE:
        return False
    try:
        os.link(path.resolve(), target)
        target.chmod(stat.S_IMODE(before.st_mode) & ~WRITE)
    except OSError:
        target.unlink(missing_ok=True)  # otherwise the copy would overwrite the linked file
        return False
    return True


def _entry(path: Path) -> CacheEntry:
    files = []
    with suppress(FileNotFoundError):  # without flock it may be removed meanwhile
        for file in path.rglob("*"):
            if file.is_file():
                files.append(file.stat())
    used = 0.0
    with suppress(FileNotFoundError):
        used = (path / artifact.MANIFEST).stat().st_mtime
    return CacheEntry(
        stage=path.parent.name,
        key=path.name,
        path=path,
        size=sum(file.st_size for file in files),
        used=used,
        shared=sum(file.st_size for file in files if file.st_nlink > 1),
    )
