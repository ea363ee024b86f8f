"""Tells without reading files whether they may have changed, and keeps facts of them meanwhile.

Only listings use facts that earlier processes kept: they would otherwise read every byte each time.
A process that loads a model hashes its files.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.files import artifact
from pipeline.files.artifact import SETTLED
from pipeline.files.base_model import base_fingerprint
from pipeline.files.home import home_folder

FORMAT = 1  # version of the files; others are ignored
MAX_DIGESTS = 50_000  # in the file, about 5 MB
Facts = dict[str, Any]
Entry = tuple[str, Facts]  # a stamp, and what was valid for it


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


def stamp_of(*signatures: Signature) -> str:
    """A digest of the states of files."""
    return hashlib.sha256(json.dumps(signatures).encode()).hexdigest()


def cache_home() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache")


class FactStore:
    """Facts of files by key, each valid for one stamp, kept in a file in the user's cache folder.

    A store that is damaged or cannot be written only costs time. `most`: facts in the file, counted
    by `size`.
    """

    def __init__(self, file: str, most: int, size: Callable[[Facts], int]) -> None:
        self.path, self._most, self._size = cache_home() / "lora-workbench" / file, most, size
        self._stored: dict[str, Entry] | None = None  # by earlier processes; None: not read yet
        self._computed: dict[str, Entry] = {}  # by this process
        self._used: dict[str, Entry] = {}  # entries to save, least recently used first
        self._saved = True

    def get(self, key: str, stamp: str, earlier: bool = True) -> Facts | None:
        """The facts that were stored with this stamp; without `earlier`, only by this process."""
        if self._stored is None:
            self._stored = _read_entries(self.path)
        entry = self._computed.get(key) or (self._stored.get(key) if earlier else None)
        if entry is None or entry[0] != stamp:
            return None
        if key in self._used or key not in self._computed:
            self._used.pop(key, None)
            self._used[key] = entry
        return entry[1]

    def put(
        self, key: str, stamp: str, facts: Facts, files: Iterable[FileState], now: int = 0
    ) -> None:
        """Store facts; in the file, unless `files` changed just before `now`.

        They may then change again within one tick of the clock.
        """
        self._computed[key] = stamp, facts
        now = now or time.time_ns()
        if all(now - file.changed > SETTLED for file in files):
            self._used.pop(key, None)
            self._used[key] = stamp, facts
        self._saved = False

    def forget(self) -> None:
        """Compute everything again from now on."""
        self._stored, self._computed, self._used = {}, {}, {}

    def save(self) -> None:
        """Merge new facts into the file; beyond `most`, drop the least recently used."""
        if self._saved:
            return
        # Read again, as another process may have saved meanwhile. What this one used goes last: the
        # first are dropped.
        entries = _read_entries(self.path)
        for key in self._used:
            entries.pop(key, None)
        entries |= self._used
        total = sum(self._size(facts) for _, facts in entries.values())
        for key in list(entries):
            if total <= self._most:
                break
            total -= self._size(entries.pop(key)[1])
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_file(self.path, json.dumps({"format": FORMAT, "entries": entries}))
        self._saved = True


def _read_entries(path: Path) -> dict[str, Entry]:
    """The valid entries of a store's file; none if it cannot be read."""
    entries: dict[str, Entry] = {}
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            return {}
        for key, (stamp, facts) in stored["entries"].items():
            if isinstance(stamp, str) and isinstance(facts, dict):
                entries[key] = stamp, facts
    return entries


class DigestStore(FactStore):
    """Digests of the files in folders."""

    def __init__(self) -> None:
        super().__init__("digests.json", MAX_DIGESTS, len)

    def contents(self, folder: Path, earlier: bool = True) -> dict[str, str]:
        """`artifact.contents`. Without `earlier`, digests of earlier processes are ignored."""
        return self._cached("files", folder, artifact.contents, earlier)

    def fingerprint(self, base: Path, earlier: bool = True) -> dict[str, str]:
        """`base_fingerprint`. Raises UserError as it does."""
        return self._cached("base", base, base_fingerprint, earlier)

    def digest(self, path: Path) -> str:
        """`artifact.digest`. Raises UserError as it does."""
        if path.is_dir():
            return artifact.contents_digest(self.contents(path))
        return artifact.digest(path)

    def _cached(
        self, kind: str, folder: Path, compute: Callable[[Path], dict[str, str]], earlier: bool
    ) -> dict[str, str]:
        # The signature is taken before the files are read: an edit meanwhile gives another one the
        # next time.
        now, files = time.time_ns(), signature(folder)
        key = f"{kind}:{folder.resolve()}"
        stamp = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        digests = self.get(key, stamp, earlier)
        if digests is None:
            digests = compute(folder)
            self.put(key, stamp, digests, files, now)
        return digests
