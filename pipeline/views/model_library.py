"""The models in some folders: their descriptions and verdicts.

Both are kept until their files change, also when the program starts again.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

from pipeline.adapters.config import CONFIG
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.digest_cache import DigestStore, FactStore, Signature, signature, stamp_of
from pipeline.files.file_tail import file_stamp
from pipeline.files.text import natural_sort_key
from pipeline.inference.catalog import Measurements, find_base, measured, model_folders
from pipeline.project.cache import NAMED, Cache
from pipeline.project.stage_graph import ARTIFACTS, Project
from pipeline.views.models import Model, VerificationResult, check, describe, scored
from pipeline.views.stages import apart

CHECKING = "checking"
MAX_JSON = 1_000_000  # bytes; a larger manifest or config is not shown
SAVE_EVERY = 5.0  # seconds of checking that are lost at most if the program ends
MAX_ENTRIES = 20_000  # of the store in a file, about 10 MB
GONE = ""  # the stamp of a model whose files are gone


@dataclass(frozen=True)
class Entry:
    """A model as the screen shows it. Without a verdict, it is not checked yet; without a method,
    its files are not read yet.

    `group`: the heading that it is listed under; "" for the models that the pipeline makes.
    """

    label: str
    model: Model
    verdict: VerificationResult | None
    shown_path: str = ""  # relative to the project if it is inside, else absolute
    group: str = ""
    number: int = 0  # among the pipeline's models
    apart: tuple[str, ...] = ()  # how its settings differ from the params file's

    @property
    def state(self) -> str:
        return self.verdict.state if self.verdict else CHECKING

    @property
    def is_read(self) -> bool:
        return bool(self.model.method)

    @property
    def gate(self) -> str:
        """What to add to the state: whether it keeps evaluate.limits."""
        return f", gate {self.verdict.gate}" if self.verdict and self.verdict.gate else ""

    @cached_property
    def sort_key(self) -> tuple[bool, str, int, list[str | float]]:
        """The pipeline's models in its order, then folders by name, each with its models by
        name.
        """
        return bool(self.group), self.group, self.number, natural_sort_key(self.label)


@dataclass(frozen=True)
class CheckContext:
    """What many models have in common, read once for all: evaluations and bases."""

    measurements: Measurements
    signature: Callable[[Path], Signature]
    # the folder that an adapter lies in, and the base's name in its config → the base's folder
    bases: dict[tuple[Path, str | None], Path | None] = field(default_factory=dict)


class Library:
    """Finds and checks the models of a project and its parent.

    All methods but `project_variants` and `label` read files: call them from a thread.
    """

    def __init__(self, project: Project) -> None:
        self.project, self.root = project, project.root
        self.artifacts = [owner.root / ARTIFACTS for owner in (project, project.parent) if owner]
        self.folders: list[Path] = list(self.artifacts)
        self.runs = Cache(project.cache).root / NAMED
        self._models: dict[Path, tuple[Signature, Model]] = {}
        # of the folders that contain models
        self._folder_stamps: dict[Path, tuple[int, ...] | None] = {}
        self._verdicts: dict[Path, tuple[str, VerificationResult]] = {}
        self._digests = DigestStore()
        self.cache = FactStore("models.json", MAX_ENTRIES, lambda _: 1)

    def project_variants(self) -> dict[Path, str]:
        """Folder → name, for the models that the pipeline makes."""
        return {
            self.project.artifact(pair[1] or pair[0]): name
            for name, pair in self.project.variants.items()
        }

    def label(self, path: Path) -> str:
        """A short name: the pipeline's, or the path within the searched folder."""
        if name := self.project_variants().get(path):
            return name
        if path.is_relative_to(self.runs):
            return str(path.relative_to(self.runs))
        for folder in self.folders:
            if path.is_relative_to(folder):
                inside = path.relative_to(folder)
                return str(inside if folder in self.artifacts else folder.name / inside)
        return str(path)

    def _group(self, path: Path) -> str:
        """The heading of a model that the pipeline does not name: its run's name, with the
        adapter's if it is a checkpoint, its folder in artifacts/, or the added folder.
        """
        if path.is_relative_to(self.runs):
            return str(path.relative_to(self.runs).parent)
        for folder in self.folders:
            if path.is_relative_to(folder):
                inside = path.relative_to(folder).parts
                if folder in self.artifacts:
                    return inside[0] if len(inside) > 1 else f"others in {ARTIFACTS}/"
                names = [other.name for other in self.folders]
                return folder.name if names.count(folder.name) == 1 else str(folder)
        return str(path.parent)

    def scan(self) -> Iterator[Entry]:
        """Yield every model in the folders, with what is known of it so far: costs a stat per
        file.
        """
        models: dict[Path, tuple[Signature, Model]] = {}
        folder_stamps = {folder: file_stamp(folder) for folder in (*self.folders, self.runs)}
        context = self._check_context()
        variants = self.project_variants()
        numbers = {path: number for number, path in enumerate(variants)}
        marks = {
            self.project.artifact(name): reasons for name, reasons in apart(self.project).items()
        }
        roots = [*self.folders, *Cache(self.project.cache).results()]
        for path in dict.fromkeys(chain.from_iterable(map(model_folders, roots))):
            folder_stamps.setdefault(path.parent, file_stamp(path.parent))
            now = signature(path)
            model = self._known(path, now)
            models[path] = now, model or _unread(path, now)
            verdict = self._known_verdict(model, now, context) if model else None
            in_project = any(path.is_relative_to(folder) for folder in (self.root, *self.artifacts))
            shown_path = os.path.relpath(path, self.root) if in_project else str(path)
            group = "" if path in variants else self._group(path)
            label = variants.get(path) or self.label(path)
            mark = marks.get(path, ())
            yield Entry(
                label, models[path][1], verdict, shown_path, group, numbers.get(path, 0), mark
            )
        self._models, self._folder_stamps = models, folder_stamps

    def _known(self, path: Path, now: Signature) -> Model | None:
        cached = self._models.get(path)
        if cached and cached[0] == now and cached[1].method:
            return cached[1]
        facts = self.cache.get(self.key("model", path), stamp_of(now))
        return _model_of(path, facts) if facts else None

    def _known_verdict(
        self, model: Model, now: Signature, context: CheckContext
    ) -> VerificationResult | None:
        current = self._stamp(model, now, context)
        stamp, verdict = self._verdicts.get(model.path, ("", None))
        if verdict is None or stamp != current:
            facts = self.cache.get(self.key("verdict", model.path), current)
            verdict = _verdict_of(facts) if facts else None
        return verdict and scored(verdict, context.measurements)

    def key(self, kind: str, path: Path) -> str:
        """Of facts of a model; with the project, as an adapter's base is searched in it."""
        return f"{kind} {self.root} {path}"

    def added(self) -> bool:
        """Whether a model was added, removed or replaced since the last complete scan. Costs a stat
        per folder.
        """
        return any(
            file_stamp(folder) != before for folder, before in list(self._folder_stamps.items())
        )

    def changed(self) -> bool:
        """Whether a file of a model was changed in place since the last complete scan.

        Costs a stat per file.
        """
        return any(signature(path) != before for path, (before, _) in list(self._models.items()))

    def check_all(
        self, entries: Iterable[Entry], first: Callable[[], Collection[Path]] = tuple
    ) -> Iterator[Entry]:
        """Yield the unchecked entries with a verdict, those of `first` before the others.

        For the list: accepts digests cached by an earlier process.
        """
        context = self._check_context()
        saved = monotonic()
        pending = {entry.model.path: entry for entry in entries if entry.verdict is None}
        try:
            while pending:
                path = next((path for path in first() if path in pending), None) or next(
                    iter(pending)
                )
                yield self.check(pending.pop(path), context, earlier=True)
                if monotonic() - saved > SAVE_EVERY:
                    self._save()
                    saved = monotonic()
        finally:
            self._save()

    def _save(self) -> None:
        self._digests.save()
        self.cache.save()

    def read(self, entry: Entry) -> Entry:
        """The entry with its model as its files describe it."""
        if entry.is_read:
            return entry
        path = entry.model.path
        now = signature(path)  # before the files are read
        model = describe(path)
        self._models[path] = now, model
        self.cache.put(self.key("model", path), stamp_of(now), _model_facts(model), now)
        return replace(entry, model=model)

    def check(
        self, entry: Entry, context: CheckContext | None = None, earlier: bool = False
    ) -> Entry:
        """The entry with its verdict, whose reason has paths relative to the project.

        For loading, it hashes all files that this process has not hashed yet; `earlier`: accepts
        digests cached by an earlier process.
        """
        context = context or self._check_context()
        entry = self.read(entry)
        model, path = entry.model, entry.model.path
        now = signature(path)  # before the files are read
        stamp = self._stamp(model, now, context)
        fingerprint = partial(self._digests.fingerprint, earlier=earlier)
        contents = partial(self._digests.contents, earlier=earlier)
        verdict = check(model, self.root, fingerprint=fingerprint, contents=contents)
        verdict = replace(
            verdict, reason=verdict.reason and verdict.reason.replace(f"{self.root}/", "")
        )
        self._verdicts[path] = stamp, verdict
        base = self._base(model, context)
        files = now + (context.signature(base) if base else ())
        self.cache.put(self.key("verdict", path), stamp, asdict(verdict), files)
        return replace(entry, verdict=scored(verdict, context.measurements))

    def forget(self) -> None:
        """Drop all verdicts and digests, so that everything is checked again."""
        self._verdicts.clear()
        self._digests.forget()
        self.cache.forget()

    def stamp(self, model: Model, context: CheckContext | None = None) -> str:
        """Changes with the files of the model and of its base. GONE if it is gone."""
        return self._stamp(model, signature(model.path), context or self._check_context())

    def _stamp(self, model: Model, files: Signature, context: CheckContext) -> str:
        if not files:
            return GONE
        base = self._base(model, context)
        return stamp_of(files, context.signature(base) if base else ())

    def _check_context(self) -> CheckContext:
        runs = Cache(self.project.cache).named().values()
        return CheckContext(measured([*self.folders, *runs]), cache(signature))

    def _base(self, model: Model, context: CheckContext) -> Path | None:
        """`base`, looked up once for all adapters in a folder that name the same one; None for a
        model with its own.
        """
        if model.kind != "adapter":
            return None
        key = model.path.parent, model.base
        if key not in context.bases:
            context.bases[key] = self.base(model)
        return context.bases[key]

    def base(self, model: Model) -> Path | None:
        """The folder of the base model: the model's own, or for an adapter its base (None if it is
        missing).
        """
        if model.kind != "adapter":
            return model.path
        try:
            return find_base(model.path, self.root)
        except UserError:
            return None


def _unread(path: Path, files: Signature) -> Model:
    """A model of which only the names of its files are known."""
    kind = "adapter" if any(file.name == CONFIG for file in files) else ""
    return Model(path, kind, "", None, (), None, None, 0, None, None, False)


def read_documents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and the adapter's config, each {} if it is missing, broken or too large."""

    def read(path: Path) -> dict[str, Any]:
        try:
            return artifact.read_json(path, "") if path.stat().st_size <= MAX_JSON else {}
        except (UserError, OSError):
            return {}

    return read(folder / artifact.MANIFEST), read(folder / CONFIG)


def _model_facts(model: Model) -> dict[str, Any]:
    """A model without its path."""
    return {key: value for key, value in asdict(model).items() if key != "path"}


def _model_of(path: Path, facts: Mapping[str, Any]) -> Model | None:
    """The model with these facts; None if they are damaged."""
    with suppress(TypeError, KeyError):
        return Model(path=path, **{**facts, "targets": tuple(map(str, facts["targets"]))})
    return None


def _verdict_of(facts: Mapping[str, Any]) -> VerificationResult | None:
    """The verdict with these facts; None if they are damaged."""
    with suppress(TypeError):
        return VerificationResult(**facts)
    return None
