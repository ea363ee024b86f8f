"""A sweep's adapters in the cache, an entry for each: a grid that grew trains only what is new.

The sweep's manifest has the key of each under `entries`, and each adapter's the outcome of its
training. An adapter that diverged has no files: its entry is the outcome alone.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.cache import ADAPTERS, Cache, Damaged

OUTCOME = "outcome"  # in a manifest: the adapter's row of sweep.json, without its values


def store_adapters(cache: Cache, sweep: Path) -> None:
    """Store the adapters of a sweep's artifact that the cache has not. Raises OSError.

    An artifact of anything else has none.
    """
    manifest = artifact.read_manifest(sweep)
    for name, key in manifest.get("entries", {}).items():
        folder = sweep / name
        if folder.is_dir():
            cache.store(ADAPTERS, key, folder)
            continue
        with TemporaryDirectory() as empty:
            row = {k: value for k, value in manifest["adapters"][name].items() if k != "values"}
            artifact.seal(Path(empty), {OUTCOME: row})
            cache.store(ADAPTERS, key, Path(empty))


def outcomes(cache: Cache, entries: Mapping[str, str]) -> dict[str, Any]:
    """Adapter → its outcome, if the cache has all of these entries; else empty."""
    found = dict[str, Any]()
    if not all(cache.has(ADAPTERS, key) for key in entries.values()):
        return found
    with suppress(UserError, KeyError):
        for name, key in entries.items():
            found[name] = artifact.read_manifest(cache.root / ADAPTERS / key)[OUTCOME]
        return found
    return {}


def restore_adapter(cache: Cache, key: str, target: Path) -> dict[str, Any] | None:
    """Copy an adapter to `target` and return its outcome; None if the cache does not have it.

    One that diverged has no files: `target` then has a manifest alone.
    """
    with suppress(Damaged, OSError):
        if not cache.restore(ADAPTERS, key, target):
            return None
        with suppress(UserError, KeyError, TypeError):
            return dict(artifact.read_manifest(target)[OUTCOME])
    return None
