"""What was read and measured of models, kept between starts in the user's cache folder while their
files stay.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.files import artifact, digest_cache
from pipeline.files.digest_cache import Signature
from pipeline.inference.catalog import Model, VerificationResult

FORMAT = 1  # version of the file and of what `check` says; others are ignored
MAX_ENTRIES = 20_000  # about 10 MB
Kept = tuple[str, dict[str, Any]]  # a stamp, and what was valid for it


def stamp_of(*signatures: Signature) -> str:
    """A digest of the states of files."""
    return hashlib.sha256(json.dumps(signatures).encode()).hexdigest()


class ModelCache:
    """Facts by kind and path, each valid for one stamp. A file that is damaged or cannot be written
    only costs time.
    """

    def __init__(self, root: Path) -> None:
        self.path, self._root = digest_cache.cache_home() / "lora-workbench" / "models.json", root
        self._entries: dict[str, Kept] | None = None  # None: not read yet
        self._used: dict[str, Kept] = {}  # of this process, the least recently used first
        self._saved = True

    def get(self, kind: str, path: Path, stamp: str) -> dict[str, Any] | None:
        """The facts of a path, if they were stored with this stamp."""
        if self._entries is None:
            self._entries = _read(self.path)
        key = self._key(kind, path)
        entry = self._entries.get(key)
        if entry is None or entry[0] != stamp:
            return None
        self._used[key] = entry
        return entry[1]

    def put(
        self,
        kind: str,
        path: Path,
        stamp: str,
        facts: Mapping[str, Any],
        files: Iterable[Signature],
    ) -> None:
        """Store facts, unless `files` changed just now: they may change again within one tick of
        the clock.
        """
        newest = max((file.changed for each in files for file in each), default=0)
        if time.time_ns() - newest > digest_cache.SETTLED:
            self._used[self._key(kind, path)] = stamp, dict(facts)
            self._saved = False

    def forget(self) -> None:
        """Read and check everything again from now on."""
        self._entries, self._used = {}, {}

    def save(self) -> None:
        """Merge new entries into the file."""
        if self._saved:
            return
        # Read again, as another process may have saved meanwhile. What this one used goes last: the
        # first are dropped.
        entries = {
            key: entry for key, entry in _read(self.path).items() if key not in self._used
        } | self._used
        entries = dict(list(entries.items())[-MAX_ENTRIES:])
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_file(self.path, json.dumps({"format": FORMAT, "entries": entries}))
        self._saved = True

    def _key(self, kind: str, path: Path) -> str:
        """With the project, as an adapter's base is searched in it."""
        return f"{kind} {self._root} {path}"


def _read(path: Path) -> dict[str, Kept]:
    entries: dict[str, Kept] = {}
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        for key, (stamp, facts) in stored["entries"].items() if stored["format"] == FORMAT else ():
            if isinstance(stamp, str) and isinstance(facts, dict):
                entries[key] = stamp, facts
    return entries


def model_facts(model: Model) -> dict[str, Any]:
    """A model without its path."""
    return {key: value for key, value in asdict(model).items() if key != "path"}


def model_of(path: Path, facts: Mapping[str, Any]) -> Model | None:
    """The model with these facts; None if they are damaged."""
    with suppress(TypeError, KeyError):
        return Model(path=path, **{**facts, "targets": tuple(map(str, facts["targets"]))})
    return None


def verdict_of(facts: Mapping[str, Any]) -> VerificationResult | None:
    """The verdict with these facts; None if they are damaged."""
    with suppress(TypeError):
        return VerificationResult(**facts)
    return None
