"""Which models and adapters lie in a folder, and what their files say of them: nothing is loaded."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.adapters.folder import CONFIG, VIRTUAL, Contents, Fingerprint, base_of, refuse_foreign
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.files.file_stamp import Signature, signature
from pipeline.files.safetensors_header import read_header
from pipeline.files.text import natural_sort_key
from pipeline.project.logs.run_log import LOSS, final_loss, read_steps
from pipeline.project.stage_graph import STAGES, VARIANTS, Project

UNSEALED = "no manifest: base not known"
NOT_CHECKED = "It has no manifest: names and shapes are checked when it is loaded, nothing else can be."
BASES = ("pretrain", "expand_vocab")  # methods whose checkpoints others are trained from
Measurements = Mapping[str, Mapping[str, Any]]  # sha256 of an artifact → what an evaluation measured of it
VERIFIED, UNBOUND, REFUSED = "verified", "no manifest", "refused"


@dataclass(frozen=True)
class Adapter:
    """One adapter folder. `problem` says why it would be refused; None in a field means: not known.

    `rank` is that of its files; PiSSA's trained with half of it, `trained_rank`.
    """

    path: Path
    method: str
    rank: int | None
    trained_rank: int | None
    targets: tuple[str, ...]
    base: str | None
    size: int
    final_loss: float | None
    forgetting: float | None
    problem: str | None


@dataclass(frozen=True)
class Model:
    """A folder with a base, a checkpoint trained from one, a merged model or an adapter. None means: not known.

    `size` is in bytes of weights, `when` in seconds since the epoch; `parameters` of an adapter are its own.
    """

    path: Path
    kind: str  # base, checkpoint, merged or adapter
    method: str
    rank: int | None
    targets: tuple[str, ...]
    base: str | None
    parameters: int | None
    size: int
    final_loss: float | None
    when: float | None

    @property
    def scales(self) -> bool:
        """Whether it is an adapter whose change can be had in part: virtual tokens are read or not."""
        return self.kind == "adapter" and self.method.upper() not in VIRTUAL


@dataclass(frozen=True)
class VerificationResult:
    """Whether a folder is what was made: verified, no manifest to compare with, or refused and why."""

    state: str
    reason: str | None = None
    forgetting: float | None = None  # rise of the old sentences' loss, in nats a token


def adapters(
    root: Path, fingerprint: Fingerprint = base_fingerprint, contents: Contents = artifact.contents
) -> list[Adapter]:
    """Every adapter below `root`, by path."""
    measurements = measured([root])
    return [
        _adapter(folder, root, measurements, fingerprint, contents)
        for folder in model_folders(root)
        if (folder / CONFIG).exists()
    ]


def _adapter(
    folder: Path, root: Path, measurements: Measurements, fingerprint: Fingerprint, contents: Contents
) -> Adapter:
    model = describe(folder)
    return Adapter(
        path=folder,
        method=model.method,
        rank=model.rank,
        trained_rank=_trained_rank(folder),
        targets=model.targets,
        base=model.base,
        size=model.size,
        final_loss=model.final_loss,
        forgetting=_forgetting(artifact.contents_digest(contents(folder)), measurements),
        problem=_problem(model, root, fingerprint, contents),
    )


def _trained_rank(folder: Path) -> int | None:
    rank = (_json(folder / artifact.MANIFEST).get("params") or {}).get("rank")
    return rank if isinstance(rank, int) else None


def _problem(model: Model, root: Path, fingerprint: Fingerprint, contents: Contents) -> str | None:
    """Why it would be refused. A base that is not found says nothing of the adapter: --base may name it."""
    try:
        artifact.read_json(model.path / CONFIG, "Make the adapter again")
        if not (model.path / artifact.MANIFEST).exists():
            return UNSEALED
        if not _has_base(model.path, root):
            artifact.verify(model.path, contents)
            return None
    except UserError as error:
        return str(error)
    return check(model, root, fingerprint=fingerprint, contents=contents).reason


def _has_base(adapter: Path, root: Path) -> bool:
    try:
        find_base(adapter, root)
    except UserError:
        return False
    return True


def model_folders(root: Path) -> Iterator[Path]:
    """Every folder below `root`, itself included, with an adapter or a checkpoint; hidden ones are passed over."""
    for place, folders, files in os.walk(root):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_sort_key)
        weights = any(name.endswith(".safetensors") for name in files)
        if CONFIG in files or ("config.json" in files and (weights or artifact.MANIFEST in files)):
            yield Path(place)


def describe(folder: Path) -> Model:
    """What the files in `folder` say of it. What is missing or broken is not known: `check` gives the reason."""
    config, manifest = _json(folder / CONFIG), _json(folder / artifact.MANIFEST)
    adapter = (folder / CONFIG).exists()
    kind = "dora" if config.get("use_dora") else config.get("peft_type")
    method = kind if adapter else manifest.get("method") or _architecture(folder)
    rank, base, files = config.get("r"), config.get("base_model_name_or_path"), signature(folder)
    return Model(
        path=folder,
        kind="adapter" if adapter else _kind(manifest.get("method")),
        method=str(method or "?").lower(),
        rank=rank if isinstance(rank, int) else None,
        targets=_targets(config) if adapter else (),
        base=base if isinstance(base, str) else None,
        parameters=_parameters(folder, {} if adapter else manifest),
        size=sum(file.size for file in files if file.name.endswith(".safetensors")),
        final_loss=_final_loss(folder / LOSS),
        when=_when(files),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return artifact.read_json(path, "")
    except UserError:
        return {}


def _kind(method: Any) -> str:
    if method in (None, *BASES):
        return "base"
    return "merged" if method == "merge" else "checkpoint"


def _architecture(folder: Path) -> Any:
    return _json(folder / "config.json").get("model_type")


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the adapter stands on: names of layers, or how many virtual tokens are read before all else."""
    if str(config.get("peft_type")) in VIRTUAL:
        return (f"{config.get('num_virtual_tokens')} virtual tokens",)
    value = config.get("target_modules")
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _parameters(folder: Path, manifest: Mapping[str, Any]) -> int | None:
    """As the manifest counts them, else all numbers in the weights."""
    try:
        return int(manifest["parameters"]["total"])
    except (KeyError, OverflowError, TypeError, ValueError):
        pass
    try:
        headers = [read_header(path) for path in folder.glob("*.safetensors")]
    except UserError:
        return None
    return sum(prod(info.shape) for header in headers for info in header.values()) if headers else None


def _final_loss(path: Path) -> float | None:
    try:
        return final_loss(read_steps(path))
    except OSError:
        return None


def _when(files: Signature) -> float | None:
    times = {file.name: file.modified / 1e9 for file in files}
    return times.get(artifact.MANIFEST, max(times.values(), default=None))


def newest_model(project: Project) -> tuple[Path, Path | None]:
    """Folders of base and adapter of the pipeline's model that was trained last in a project.

    Where none is trained, its expanded base, or the base if it has no other.
    """
    folders = {
        name: [project.artifact(stage) for stage in pair if stage]
        for name, pair in VARIANTS.items()
        if name == "expanded" or name in project.variants
    }
    there = {name: found for name, found in folders.items() if all(map(Path.is_dir, found))}
    trained = [found for name, found in there.items() if STAGES[VARIANTS[name][0]].method not in BASES or found[1:]]
    base, *adapter = max(
        reversed(trained),  # of two made at the same time, the later in the pipeline
        key=lambda found: _when(signature(found[-1])) or 0.0,
        default=there.get("expanded") or there.get("base") or folders["expanded"],
    )
    return base, adapter[0] if adapter else None


def find_base(adapter: Path, root: Path) -> Path:
    """The base that an adapter names, looked for around it first, then in `root`. Raises UserError."""
    try:
        return base_of(adapter, adapter.parent)
    except UserError:
        return base_of(adapter, root)


def check(
    model: Model,
    root: Path,
    measurements: Measurements = MappingProxyType({}),
    fingerprint: Fingerprint = base_fingerprint,
    contents: Contents = artifact.contents,
) -> VerificationResult:
    """Whether the model's files, and an adapter's base, are those it was made with.

    Reads all of them, unless `fingerprint` and `contents` remember. `measurements` are those of `measured`.
    """
    try:
        if model.kind == "adapter":
            refuse_foreign(find_base(model.path, root), model.path, fingerprint, contents)
        if not (model.path / artifact.MANIFEST).exists():
            read_header(next(model.path.glob("*.safetensors"), model.path / "model.safetensors"))
            return VerificationResult(UNBOUND, NOT_CHECKED)
        adapter = model.kind == "adapter"  # verified above
        manifest = artifact.read_manifest(model.path) if adapter else artifact.verify(model.path, contents)
        return VerificationResult(VERIFIED, None, _forgetting(artifact.sealed_digest(manifest), measurements))
    except UserError as error:
        return VerificationResult(REFUSED, str(error))
    except OSError as error:
        return VerificationResult(REFUSED, f"{error.filename or model.path}: {error.strerror}.")
    except (AttributeError, KeyError, TypeError):  # a manifest whose sections are something else
        return VerificationResult(REFUSED, f"{model.path / artifact.MANIFEST} is not a manifest of this project.")


def _forgetting(digest: str, measurements: Measurements) -> float | None:
    """The rise of the old sentences' loss, if it was measured."""
    try:
        return float(measurements[digest]["forgetting"]["loss_rise"])
    except (KeyError, TypeError, ValueError):  # some other tool's metrics
        return None


def measured(roots: Iterable[Path]) -> Measurements:
    """What the evaluations in `roots` measured, by the artifact's sha256; of several, the first in order."""
    found: dict[str, Mapping[str, Any]] = {}
    for manifest, metrics in (pair for root in roots for pair in _evaluations(root)):
        with suppress(KeyError, TypeError, AttributeError):
            for variant, name in manifest["variants"].items():
                found.setdefault(manifest["inputs"][name], metrics[variant])
    return found


def _evaluations(root: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for path in sorted(root.glob("*/metrics.json")):
        try:
            yield artifact.read_manifest(path.parent), artifact.read_json(path, "Run `lora evaluate`")
        except UserError:
            continue
