"""Whether files may have changed, told without reading them, and sha256 digests that are kept while
they did not.

Only listings use kept digests: they would otherwise read every byte each time. Loading a model
always hashes its files.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.files.home import home_folder

FORMAT = 1  # version of the file; others are ignored
MAX_DIGESTS = 50_000  # in the file, about 5 MB
# ns: a file that changed later may change again within one tick of the file system's clock
SETTLED = 2 * 10**9
# digest of the signature, and the digests computed from those files
Entry = tuple[str, dict[str, str]]


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


def cache_home() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache")


class DigestStore:
    """Digests by folder. A store that is damaged or cannot be written only costs time."""

    def __init__(self) -> None:
        self.path = cache_home() / "lora-workbench" / "digests.json"
        self._stored: dict[str, Entry] | None = None  # from earlier processes; None: not read yet
        self._computed: dict[str, Entry] = {}  # computed by this process
        self._used: dict[str, Entry] = {}  # entries to save, least recently used first
        self._saved = True

    def contents(self, folder: Path, earlier: bool = True) -> dict[str, str]:
        """`artifact.contents`. Without `earlier`, digests of earlier processes are ignored."""
        return self._cached("files", folder, artifact.contents, earlier)

    def fingerprint(self, base: Path, earlier: bool = True) -> dict[str, str]:
        """`base_fingerprint`. Raises UserError as it does."""
        return self._cached("base", base, base_fingerprint, earlier)

    def digest(self, path: Path) -> str:
        """`artifact.digest`. Raises UserError as it does."""
        return (
            artifact.contents_digest(self.contents(path))
            if path.is_dir()
            else artifact.digest(path)
        )

    def forget(self) -> None:
        """Hash everything again from now on."""
        self._stored = {}
        self._computed.clear()

    def _cached(
        self, kind: str, folder: Path, compute: Callable[[Path], dict[str, str]], earlier: bool
    ) -> dict[str, str]:
        # Before the files are read, so that an edit meanwhile gives another signature the next
        # time.
        started, current = time.time_ns(), signature(folder)
        key, stamp = (
            f"{kind}:{folder.resolve()}",
            hashlib.sha256(json.dumps(current).encode()).hexdigest(),
        )
        if self._stored is None:
            self._stored = _read_entries(self.path)
        entry = self._computed.get(key) or (self._stored.get(key) if earlier else None)
        if entry is None or entry[0] != stamp:
            entry = self._computed[key] = stamp, compute(folder)
            self._saved = False
        if all(started - file.changed > SETTLED for file in current):
            self._used.pop(key, None)
            self._used[key] = entry
        return entry[1]

    def save(self) -> None:
        """Merge new digests into the file; beyond MAX_DIGESTS, drop the least recently used."""
        if self._saved:
            return
        # Read again, as another process may have saved meanwhile. What this one used goes last: the
        # first are dropped.
        entries = {
            key: entry for key, entry in _read_entries(self.path).items() if key not in self._used
        } | self._used
        total = sum(len(digests) for _, digests in entries.values())
        for key in list(entries):
            if total <= MAX_DIGESTS:
                break
            total -= len(entries.pop(key)[1])
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_file(self.path, json.dumps({"format": FORMAT, "entries": entries}))
        self._saved = True


def _read_entries(path: Path) -> dict[str, Entry]:
    """The valid entries of a store's file; none if it cannot be read."""
    entries: dict[str, Entry] = {}
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        for key, entry in stored["entries"].items() if stored["format"] == FORMAT else ():
            stamp, digests = entry
            if all(isinstance(text, str) for text in (stamp, *digests.values())):
                entries[key] = stamp, digests
    return entries
