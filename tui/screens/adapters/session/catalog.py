"""The models in some folders: what was read of each and what was found when it was checked, kept while files stay."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import monotonic
from typing import Any

from pipeline.adapters.config import CONFIG
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.digest_cache import DigestStore
from pipeline.files.file_stamp import Signature, signature
from pipeline.files.text import natural_sort_key
from pipeline.inference.catalog import (
    Measurements,
    Model,
    VerificationResult,
    check,
    describe,
    find_base,
    measured,
    model_folders,
)
from pipeline.project.stage_graph import ARTIFACTS, Project

# Side by side, from left to right.
ORDER = ("pretrain", "expand_vocab", "scratch", "full", "freeze", "adapter", "merge")
MAX_JSON = 1_000_000  # bytes of a manifest or config that are shown
SAVE_EVERY = 5.0  # seconds of hashing that are lost at most when the program ends
Stamp = tuple[Signature, ...]


@dataclass(frozen=True)
class Entry:
    """A model as the screen shows it; no verdict means: not checked yet."""

    label: str
    model: Model
    verdict: VerificationResult | None
    shown: str = ""  # its path as it is shown: in the project, or whole

    @property
    def place(self) -> tuple[int, list[str | float]]:
        """Where it stands beside others: in the order of the comparison, then all else by name."""
        kind = "adapter" if self.model.kind == "adapter" else self.model.method
        return (ORDER.index(kind) if kind in ORDER else len(ORDER), natural_sort_key(self.label))


@dataclass(frozen=True)
class Surroundings:
    """What the verdicts of many models depend on, looked at once for all: evaluations and bases."""

    evaluations: tuple[Signature, ...]
    measurements: Measurements
    signature: Callable[[Path], Signature]


class Library:
    """Finds and checks models, a project's and its parent's. Every method reads files: call it from a thread, but
    `project_variants`."""

    def __init__(self, project: Project) -> None:
        self.project, self.root = project, project.root
        self._artifacts = [one.root / ARTIFACTS for one in (project, project.parent) if one]
        self.folders: list[Path] = list(self._artifacts)
        self._models: dict[Path, tuple[Signature, Model]] = {}
        self._places: dict[Path, int] = {}  # folder that models lie in → when it was modified (ns)
        self._verdicts: dict[Path, tuple[Stamp, VerificationResult]] = {}
        self._digests = DigestStore()

    def project_variants(self) -> dict[Path, str]:
        """Folder → name of the models that the pipeline makes."""
        return {self.project.artifact(pair[1] or pair[0]): name for name, pair in self.project.variants.items()}

    def label(self, path: Path) -> str:
        """A short name: the pipeline's own, or where it lies in the folder that it was found in."""
        if name := self.project_variants().get(path):
            return name
        for folder in self.folders:
            if path.is_relative_to(folder):
                inside = path.relative_to(folder)
                return str(inside if folder in self._artifacts else folder.name / inside)
        return str(path)

    def scan(self) -> Iterator[Entry]:
        """Every model in the folders, with the verdict where it is known."""
        models: dict[Path, tuple[Signature, Model]] = {}
        places, around = {folder: _modified(folder) for folder in self.folders}, self._surroundings()
        for path in dict.fromkeys(found for folder in self.folders for found in model_folders(folder)):
            places.setdefault(path.parent, _modified(path.parent))
            now = signature(path)
            known = self._models.get(path)
            model = known[1] if known and known[0] == now else describe(path)
            models[path] = now, model
            ours = any(path.is_relative_to(folder) for folder in (self.root, *self._artifacts))
            shown = os.path.relpath(path, self.root) if ours else str(path)
            yield Entry(self.label(path), model, self._known(path, self._stamp(model, around)), shown)
        self._models, self._places = models, places

    def changed(self) -> bool:
        """Whether a model came, went or changed since the last whole scan. Costs a stat a file."""
        return any(_modified(place) != before for place, before in list(self._places.items())) or any(
            signature(path) != before for path, (before, _) in list(self._models.items())
        )

    def check_all(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Each entry that has no verdict, with one: for the list, where digests of an earlier process are enough."""
        around, saved = self._surroundings(), monotonic()
        try:
            for entry in entries:
                if entry.verdict is None:
                    yield self._checked(entry, around, earlier=True)
                if monotonic() - saved > SAVE_EVERY:
                    self._digests.save()
                    saved = monotonic()
        finally:
            self._digests.save()

    def check(self, entry: Entry) -> Entry:
        """The entry with its verdict, before it is loaded: reads all bytes that this process has not hashed yet."""
        return self._checked(entry, self._surroundings(), earlier=False)

    def _checked(self, entry: Entry, around: Surroundings, earlier: bool) -> Entry:
        """Reasons name paths in the project short."""
        model, stamp = entry.model, self._stamp(entry.model, around)  # before the files are read
        fingerprint = partial(self._digests.fingerprint, earlier=earlier)
        contents = partial(self._digests.contents, earlier=earlier)
        verdict = check(model, self.root, around.measurements, fingerprint, contents)
        verdict = replace(verdict, reason=verdict.reason and verdict.reason.replace(f"{self.root}/", ""))
        self._verdicts[model.path] = stamp, verdict
        return replace(entry, verdict=verdict)

    def _known(self, path: Path, stamp: Stamp) -> VerificationResult | None:
        known = self._verdicts.get(path)
        return known[1] if known and known[0] == stamp else None

    def forget(self) -> None:
        """Check everything again the next time."""
        self._verdicts.clear()
        self._digests.forget()

    def stamp(self, model: Model) -> Stamp:
        """What a verdict depends on: the model's files, its base's, and the evaluations'. ((),) if it is gone."""
        return self._stamp(model, self._surroundings())

    def _stamp(self, model: Model, around: Surroundings) -> Stamp:
        own = signature(model.path)
        if not own:
            return ((),)
        base = self.base(model)
        return (own, around.signature(base) if base and base != model.path else own, *around.evaluations)

    def _surroundings(self) -> Surroundings:
        evaluations = [path.parent for folder in self.folders for path in folder.glob("*/metrics.json")]
        signatures = tuple(map(signature, evaluations))  # before the files are read
        return Surroundings(signatures, measured(self.folders), cache(signature))

    def base(self, model: Model) -> Path | None:
        """The folder that the model stands on: its own, or the base of an adapter if there is one."""
        if model.kind != "adapter":
            return model.path
        try:
            return find_base(model.path, self.root)
        except UserError:
            return None


def _modified(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest and the adapter's config, each {} where it is missing, broken or too big to show."""
    found: dict[str, dict[str, Any]] = {}
    for name in (artifact.MANIFEST, CONFIG):
        path = folder / name
        try:
            found[name] = artifact.read_json(path, "") if path.stat().st_size <= MAX_JSON else {}
        except (UserError, OSError):
            found[name] = {}
    return found
