"""The models in some folders: their descriptions and verdicts, cached until their files change."""

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
from pipeline.files.digest_cache import DigestStore, Signature, signature
from pipeline.files.file_tail import file_stamp
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

# Display order, from left to right.
ORDER = ("import", "pretrain", "expand_vocab", "scratch", "full", "freeze", "adapter", "merge")
CHECKING = "checking…"
MAX_JSON = 1_000_000  # bytes; a larger manifest or config is not shown
SAVE_EVERY = 5.0  # seconds of hashing that are lost at most if the program ends
Stamp = tuple[Signature, ...]


@dataclass(frozen=True)
class Entry:
    """A model as the screen shows it. Without a verdict, it is not checked yet."""

    label: str
    model: Model
    verdict: VerificationResult | None
    shown_path: str = ""  # relative to the project if it is inside, else absolute

    @property
    def state(self) -> str:
        return self.verdict.state if self.verdict else CHECKING

    @property
    def gate(self) -> str:
        """What to add to the state: whether it keeps evaluate.limits."""
        return f", gate {self.verdict.gate}" if self.verdict and self.verdict.gate else ""

    @property
    def sort_key(self) -> tuple[int, list[str | float]]:
        """Pipeline models in ORDER, then all others by name."""
        kind = "adapter" if self.model.kind == "adapter" else self.model.method
        return (ORDER.index(kind) if kind in ORDER else len(ORDER), natural_sort_key(self.label))


@dataclass(frozen=True)
class CheckContext:
    """What the verdicts of many models depend on, read once for all: evaluations and bases."""

    evaluations: tuple[Signature, ...]
    measurements: Measurements
    signature: Callable[[Path], Signature]


class Library:
    """Finds and checks the models of a project and its parent.

    All methods but `project_variants` read files: call them from a thread.
    """

    def __init__(self, project: Project) -> None:
        self.project, self.root = project, project.root
        self.artifacts = [owner.root / ARTIFACTS for owner in (project, project.parent) if owner]
        self.folders: list[Path] = list(self.artifacts)
        self._models: dict[Path, tuple[Signature, Model]] = {}
        self._folder_stamps: dict[Path, tuple[int, ...] | None] = {}  # of the folders that contain models
        self._verdicts: dict[Path, tuple[Stamp, VerificationResult]] = {}
        self._digests = DigestStore()

    def project_variants(self) -> dict[Path, str]:
        """Folder → name, for the models that the pipeline makes."""
        return {self.project.artifact(pair[1] or pair[0]): name for name, pair in self.project.variants.items()}

    def label(self, path: Path) -> str:
        """A short name: the pipeline's, or the path within the searched folder."""
        if name := self.project_variants().get(path):
            return name
        for folder in self.folders:
            if path.is_relative_to(folder):
                inside = path.relative_to(folder)
                return str(inside if folder in self.artifacts else folder.name / inside)
        return str(path)

    def scan(self) -> Iterator[Entry]:
        """Yield every model in the folders, with its verdict if that is cached."""
        models: dict[Path, tuple[Signature, Model]] = {}
        folder_stamps, context = {folder: file_stamp(folder) for folder in self.folders}, self._check_context()
        for path in dict.fromkeys(model for folder in self.folders for model in model_folders(folder)):
            folder_stamps.setdefault(path.parent, file_stamp(path.parent))
            now = signature(path)
            cached = self._models.get(path)
            model = cached[1] if cached and cached[0] == now else describe(path)
            models[path] = now, model
            stamp, verdict = self._verdicts.get(path, (None, None))
            in_project = any(path.is_relative_to(folder) for folder in (self.root, *self.artifacts))
            shown_path = os.path.relpath(path, self.root) if in_project else str(path)
            yield Entry(self.label(path), model, verdict if stamp == self.stamp(model, context) else None, shown_path)
        self._models, self._folder_stamps = models, folder_stamps

    def changed(self) -> bool:
        """Whether a model was added, removed or changed since the last complete scan. Costs a stat per file."""
        return any(file_stamp(folder) != before for folder, before in list(self._folder_stamps.items())) or any(
            signature(path) != before for path, (before, _) in list(self._models.items())
        )

    def check_all(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the unchecked entries with a verdict. For the list: accepts digests cached by an earlier process."""
        context, saved = self._check_context(), monotonic()
        try:
            for entry in entries:
                if entry.verdict is None:
                    yield self.check(entry, context, earlier=True)
                if monotonic() - saved > SAVE_EVERY:
                    self._digests.save()
                    saved = monotonic()
        finally:
            self._digests.save()

    def check(self, entry: Entry, context: CheckContext | None = None, earlier: bool = False) -> Entry:
        """The entry with its verdict, whose reason has paths relative to the project.

        For loading, it hashes all files that this process has not hashed yet; `earlier`: accepts digests cached by
        an earlier process.
        """
        context = context or self._check_context()
        model, stamp = entry.model, self.stamp(entry.model, context)  # before the files are read
        fingerprint = partial(self._digests.fingerprint, earlier=earlier)
        contents = partial(self._digests.contents, earlier=earlier)
        verdict = check(model, self.root, context.measurements, fingerprint, contents)
        verdict = replace(verdict, reason=verdict.reason and verdict.reason.replace(f"{self.root}/", ""))
        self._verdicts[model.path] = stamp, verdict
        return replace(entry, verdict=verdict)

    def forget(self) -> None:
        """Drop all verdicts and digests, so that everything is checked again."""
        self._verdicts.clear()
        self._digests.forget()

    def stamp(self, model: Model, context: CheckContext | None = None) -> Stamp:
        """Signatures that a verdict depends on: the model, its base, the evaluations. ((),) if it is gone."""
        context, files = context or self._check_context(), signature(model.path)
        if not files:
            return ((),)
        base = self.base(model)
        return (files, context.signature(base) if base and base != model.path else files, *context.evaluations)

    def _check_context(self) -> CheckContext:
        evaluations = [path.parent for folder in self.folders for path in folder.glob("*/metrics.json")]
        signatures = tuple(map(signature, evaluations))  # before the files are read
        return CheckContext(signatures, measured(self.folders), cache(signature))

    def base(self, model: Model) -> Path | None:
        """The folder of the base model: the model's own, or for an adapter its base (None if it is missing)."""
        if model.kind != "adapter":
            return model.path
        try:
            return find_base(model.path, self.root)
        except UserError:
            return None


def read_documents(folder: Path) -> list[dict[str, Any]]:
    """The manifest and the adapter's config, each {} if it is missing, broken or too large."""
    documents: list[dict[str, Any]] = []
    for path in (folder / artifact.MANIFEST, folder / CONFIG):
        try:
            documents.append(artifact.read_json(path, "") if path.stat().st_size <= MAX_JSON else {})
        except (UserError, OSError):
            documents.append({})
    return documents
