"""What was measured of models, in the cache: an entry for each model, settings and base."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project import provenance
from pipeline.project.cache import Cache, Damaged

MEASUREMENTS, NUMBERS = "measured", "numbers.json"  # the entries' folder in the cache, their file
FIRST = "first"  # in place of a digest: the model from which forgetting counts


class MeasuredEntries:
    """The entries of one evaluation. `settings`: its key; `base`: the digest of its first model."""

    def __init__(self, cache: Cache, settings: str, base: str) -> None:
        self._cache, self._settings, self._base = cache, settings, base

    def key(self, model: str) -> str:
        """The key of the entry of a model, by its digest."""
        versions = provenance.public(provenance.versions())
        text = json.dumps([self._settings, self._base, model, versions])
        return hashlib.sha256(text.encode()).hexdigest()

    def has(self, model: str) -> bool:
        """Whether the model was measured."""
        return self._cache.has(MEASUREMENTS, self.key(model))

    def read(self, model: str) -> dict[str, Any] | None:
        """What was measured of it; None if nothing was, or the entry is damaged."""
        with suppress(Damaged, OSError), TemporaryDirectory() as name:
            folder = Path(name) / "entry"
            if not self._cache.restore(MEASUREMENTS, self.key(model), folder):
                return None
            with suppress(UserError):
                return dict(artifact.read_json(folder / NUMBERS, ""))
        return None

    def write(self, model: str, numbers: Mapping[str, Any]) -> None:
        """Keep it, if the cache can."""
        with suppress(OSError), TemporaryDirectory() as name:
            folder = Path(name)
            artifact.write_json(folder / NUMBERS, numbers)
            artifact.seal(folder, {"kind": "measured", "settings": self._settings})
            self._cache.store(MEASUREMENTS, self.key(model), folder)
