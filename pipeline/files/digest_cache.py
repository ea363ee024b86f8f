"""sha256 digests of folders, kept between processes for as long as the files' signatures stay the same.

Only lists use it, which would read every byte again for each look. Whoever loads a model hashes its files.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.files.file_stamp import Signature, signature

FORMAT = 1  # of the file: one of another format is not read
MOST = 50_000  # digests in the file, about 5 MB
SETTLED = 2 * 10**9  # ns: a file that changed more recently may change again without another time
Entry = tuple[str, dict[str, str]]  # a signature's digest, and what was computed from those files


def cache_home() -> Path:
    """The user's folder for what can be computed again; for a user without a home, one that cannot be written."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return Path(os.devnull)


class DigestStore:
    """Digests by folder. A store that is damaged or cannot be written costs time and nothing else."""

    def __init__(self) -> None:
        self.path = cache_home() / "lora-workbench" / "digests.json"
        self._kept: dict[str, Entry] | None = None  # by earlier processes; None: not read yet
        self._taken: dict[str, Entry] = {}  # by this process
        self._used: dict[str, Entry] = {}  # what the file is to have of this process, last used last
        self._saved = True

    def contents(self, folder: Path, earlier: bool = True) -> dict[str, str]:
        """`artifact.contents`. Without `earlier`, only what this process hashed counts as known."""
        return self._remembered("files", folder, artifact.contents, earlier)

    def fingerprint(self, base: Path, earlier: bool = True) -> dict[str, str]:
        """`base_fingerprint`. Raises UserError as it does."""
        return self._remembered("base", base, base_fingerprint, earlier)

    def digest(self, path: Path) -> str:
        """`artifact.digest`. Raises UserError as it does."""
        return artifact.contents_digest(self.contents(path)) if path.is_dir() else artifact.digest(path)

    def forget(self) -> None:
        """Hash everything again the next time."""
        self._kept = {}
        self._taken.clear()

    def _remembered(
        self, kind: str, folder: Path, take: Callable[[Path], dict[str, str]], earlier: bool
    ) -> dict[str, str]:
        started, now = time.time_ns(), signature(folder)  # before the files are read: an edit meanwhile shows
        key, sign = f"{kind}:{folder.resolve()}", _sign(now)
        if self._kept is None:
            self._kept = _read(self.path)
        found = self._taken.get(key) or (self._kept.get(key) if earlier else None)
        if found is None or found[0] != sign:
            found = self._taken[key] = sign, take(folder)
            self._saved = False
        if all(started - file.changed > SETTLED for file in now):
            self._used.pop(key, None)
            self._used[key] = found
        return found[1]

    def save(self) -> None:
        """Write what was hashed since the last time, beside what other processes wrote. Keeps those used last."""
        if self._saved:
            return
        kept = _read(self.path)
        for key, entry in self._used.items():
            kept.pop(key, None)
            kept[key] = entry
        total = sum(len(digests) for _, digests in kept.values())
        for key in list(kept):
            if total <= MOST:
                break
            total -= len(kept.pop(key)[1])
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(f".{os.getpid()}.tmp")
            try:
                unfinished.write_text(json.dumps({"format": FORMAT, "entries": kept}), encoding="utf-8")
                unfinished.replace(self.path)
            finally:
                unfinished.unlink(missing_ok=True)
        self._saved = True


def _sign(files: Signature) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _read(path: Path) -> dict[str, Entry]:
    """The entries in a store's file that are of the right shape; none if it cannot be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        entries = stored["entries"].items() if stored["format"] == FORMAT else ()
        return {key: (entry[0], entry[1]) for key, entry in entries if _is_entry(entry)}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], Mapping)
        and all(isinstance(digest, str) for digest in entry[1].values())
    )
