"""The models in some folders: what was read of each and what was found when it was checked, kept while files stay."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.bases import base_fingerprint
from pipeline.binding import CONFIG
from pipeline.dag import STAGES, VARIANTS
from pipeline.errors import UserError
from pipeline.inventory import Model, Verdict, check, describe, find_base, model_folders
from pipeline.legible import in_order
from pipeline.signature import Signature, signature

# Side by side, from left to right.
ORDER = ("pretrain", "expand_vocab", "scratch", "full", "freeze", "adapter", "merge")
MAX_JSON = 1_000_000  # bytes of a manifest or config that are shown
Stamp = tuple[Signature, ...]


@dataclass(frozen=True)
class Entry:
    """A model as the screen shows it; no verdict means: not checked yet."""

    label: str
    model: Model
    verdict: Verdict | None
    shown: str = ""  # its path as it is shown: in the project, or whole

    @property
    def place(self) -> tuple[int, list[str | float]]:
        """Where it stands beside others: in the order of the comparison, then all else by name."""
        kind = "adapter" if self.model.kind == "adapter" else self.model.method
        return (ORDER.index(kind) if kind in ORDER else len(ORDER), in_order(self.label))


class Library:
    """Finds and checks models. Every method reads files: call it from a thread, but `usual`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: list[Path] = [root / "artifacts"]
        self._models: dict[Path, tuple[Signature, Model]] = {}
        self._places: dict[Path, int] = {}  # folder that models lie in → when it was modified (ns)
        self._verdicts: dict[Path, tuple[Stamp, Verdict]] = {}
        self._fingerprints: dict[Path, tuple[Signature, Mapping[str, str]]] = {}

    def usual(self) -> dict[Path, str]:
        """Folder → name of the models that the pipeline makes."""
        return {self.root / STAGES[adapter or base].path: name for name, (base, adapter) in VARIANTS.items()}

    def label(self, path: Path) -> str:
        """A short name: the pipeline's own, or where it lies in the folder that it was found in."""
        if name := self.usual().get(path):
            return name
        for folder in self.folders:
            if path.is_relative_to(folder):
                inside = path.relative_to(folder)
                return str(inside if folder == self.root / "artifacts" else folder.name / inside)
        return str(path)

    def scan(self) -> Iterator[Entry]:
        """Every model in the folders, with the verdict where it is known."""
        models: dict[Path, tuple[Signature, Model]] = {}
        places = {folder: _modified(folder) for folder in self.folders}
        for path in dict.fromkeys(found for folder in self.folders for found in model_folders(folder)):
            places.setdefault(path.parent, _modified(path.parent))
            now = signature(path)
            known = self._models.get(path)
            model = known[1] if known and known[0] == now else describe(path)
            models[path] = now, model
            shown = path.relative_to(self.root) if path.is_relative_to(self.root) else path
            yield Entry(self.label(path), model, self._known(path, self.stamp(model)), str(shown))
        self._models, self._places = models, places

    def changed(self) -> bool:
        """Whether a model came, went or changed since the last whole scan. Costs a stat a file."""
        return any(_modified(place) != before for place, before in list(self._places.items())) or any(
            signature(path) != before for path, (before, _) in list(self._models.items())
        )

    def check(self, entry: Entry) -> Entry:
        """The entry with its verdict. Reads all of the model's bytes unless they are those that were checked before."""
        model = entry.model
        stamp = self.stamp(model)
        verdict = self._known(model.path, stamp) or self._checked(model)
        self._verdicts[model.path] = stamp, verdict
        return replace(entry, verdict=verdict)

    def _checked(self, model: Model) -> Verdict:
        """Reasons name paths in the project short."""
        verdict = check(model, self.root, self.folders, self._fingerprint)
        return replace(verdict, reason=verdict.reason and verdict.reason.replace(f"{self.root}/", ""))

    def _known(self, path: Path, stamp: Stamp) -> Verdict | None:
        known = self._verdicts.get(path)
        return known[1] if known and known[0] == stamp else None

    def forget(self) -> None:
        """Check everything again the next time."""
        self._verdicts.clear()
        self._fingerprints.clear()

    def stamp(self, model: Model) -> Stamp:
        """What a verdict depends on: the model's files, its base's, and the evaluations'. ((),) if it is gone."""
        own = signature(model.path)
        if not own:
            return ((),)
        evaluations = [path.parent for folder in self.folders for path in folder.glob("*/metrics.json")]
        return (own, signature(self.base(model) or model.path), *map(signature, evaluations))

    def base(self, model: Model) -> Path | None:
        """The folder that the model stands on: its own, or the base of an adapter if there is one."""
        if model.kind != "adapter":
            return model.path
        try:
            return find_base(model.path, self.root)
        except UserError:
            return None

    def _fingerprint(self, base: Path) -> Mapping[str, str]:
        """As base_fingerprint, once for all the adapters of a base."""
        now = signature(base)
        known = self._fingerprints.get(base)
        found = known[1] if known and known[0] == now else base_fingerprint(base)
        self._fingerprints[base] = now, found
        return found


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
