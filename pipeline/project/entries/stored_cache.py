"""A cache with a store behind it, for machines that share no folder."""

import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pipeline.project.cache import Cache, Damaged
from pipeline.project.entries.store import Store, Unreachable
from pipeline.project.probes import record

PAUSES = (2.0, 10.0, 30.0)  # seconds before a result is uploaded once more


@lru_cache
def open_stored(folder: Path, root: Path, name: str) -> "StoredCache":
    """The cache in a folder, before a remote of the project in `root`. Raises UserError."""
    return StoredCache(folder, Store.open(root, name))


@dataclass(frozen=True)
class StoredCache(Cache):
    """Downloads what it lacks, and uploads what it gets. Methods raise Unreachable."""

    remote: Store
    # stage and key of results in the store that nobody can use: they are replaced
    damaged: set[tuple[str, str]] = field(default_factory=set)

    def has(self, stage: str, key: str) -> bool:
        return super().has(stage, key) or (bool(key) and self._pull(stage, key))

    def restore(self, stage: str, key: str, target: Path) -> bool:
        if not self.has(stage, key) or not super().restore(stage, key, target):
            return False
        # else what was made while the store could not be reached would never get there
        self._push(stage, key)
        return True

    def store(self, stage: str, key: str, source: Path) -> None:
        super().store(stage, key, source)
        self._push(stage, key)

    def _pull(self, stage: str, key: str) -> bool:
        try:
            return self.remote.pull(Cache(self.root), stage, key)
        except Damaged as damage:
            self.damaged.add((stage, key))
            said = str(damage).removesuffix(".")
            record(f"store {self.remote.name}", said, "the result is made again")
            return False

    def _push(self, stage: str, key: str) -> None:
        for pause in PAUSES:
            try:
                self._push_once(stage, key)
                return
            except Unreachable:
                time.sleep(pause)
        self._push_once(stage, key)

    def _push_once(self, stage: str, key: str) -> None:
        self.remote.push(Cache(self.root), stage, key, replace=(stage, key) in self.damaged)
        self.damaged.discard((stage, key))
