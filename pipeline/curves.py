"""Which runs there are to look at: the last of each stage that trains, artifacts/, and what the cache kept."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.dag import ARTIFACTS, RUNS, STAGES, Stage, cache_folder
from pipeline.errors import UserError
from pipeline.metrics import LOSS, TELEMETRY
from pipeline.params import Params

TRAINING = ("finetune_full", "finetune_freeze", "finetune_lora", "pretrain")  # as a reader wants to see them
SHORT_KEY = 8  # characters of a digest that tell two runs apart to a reader


@dataclass(frozen=True)
class Run:
    """A run log and what is known of it. `folder` is the run folder of a stage's last run, which may be going on.

    `params` is the section it ran with (as JSON has it), `when` the log's last change in seconds since the epoch.
    """

    stage: str
    label: str
    loss: Path
    telemetry: Path | None
    folder: Path | None
    params: Mapping[str, Any]
    when: float


@dataclass(frozen=True)
class _Made:
    """A finished artifact's log, and the parts of its manifest that tell it from another."""

    loss: Path
    digest: str
    manifest: Mapping[str, Any]
    when: float


def discover(root: Path, params: Params | None) -> list[Run]:
    """Every run of the stages that train, stage by stage, the last one first, then from new to old.

    A run whose log is the same, byte for byte, as one before it is left out. Labels say what of the params differs
    from `params`; None where params.yaml cannot be read. Reads whole logs to compare them: not for the UI's thread.
    """
    return [run for name in TRAINING for run in _named_apart(_runs(root, STAGES[name], params))]


def stamp(root: Path, params: Path) -> tuple[int, ...]:
    """What is another when `discover` may find other runs: a dozen calls of os.stat."""
    logs = [(root / RUNS / name / LOSS) for name in TRAINING]
    kept = cache_folder(root)
    others = [params, *(root / STAGES[name].path for name in TRAINING), *(kept / name for name in TRAINING)]
    return (*(_stat(path)[0] for path in logs), *(number for path in others for number in _stat(path)))


def _stat(path: Path) -> tuple[int, int]:
    """The inode, which another file has not, and the time of the last change; zeros if there is nothing."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def _runs(root: Path, stage: Stage, params: Params | None) -> Iterator[Run]:
    now = json.loads(json.dumps(asdict(getattr(params, stage.name)))) if params else {}
    made = list(_made(root, stage))
    reference = made[0].manifest if made else {}
    seen: set[str] = set()
    folder = root / RUNS / stage.name
    if digest := _digest(folder / LOSS):
        seen.add(digest)
        manifest = next((known.manifest for known in made if known.digest == digest), {"params": now})
        label = f"{stage.name}{_difference(manifest, reference, now)}"
        when = _changed(folder / LOSS)
        yield Run(stage.name, label, folder / LOSS, folder / TELEMETRY, folder, _params(manifest), when)
    for known in made:
        if known.digest not in seen:
            seen.add(known.digest)
            label = f"{stage.name}{_difference(known.manifest, reference, now)}"
            yield Run(stage.name, label, known.loss, None, None, _params(known.manifest), known.when)


def _made(root: Path, stage: Stage) -> Iterator[_Made]:
    """What is in artifacts/, then what the cache holds, newest first."""
    entries = (cache_folder(root) / stage.name).glob("[!.]*")
    kept = sorted(entries, key=lambda entry: _changed(entry / LOSS), reverse=True)
    for folder in (root / ARTIFACTS / stage.output, *kept):
        try:
            manifest = artifact.read_manifest(folder)
        except UserError:
            continue
        digest = manifest["files"].get(LOSS)
        if isinstance(digest, str) and (folder / LOSS).is_file():
            yield _Made(folder / LOSS, digest, manifest, _changed(folder / LOSS))


def _params(manifest: Mapping[str, Any]) -> dict[str, Any]:
    params = manifest.get("params")
    return params if isinstance(params, dict) else {}


def _difference(manifest: Mapping[str, Any], reference: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What to say of a run beside its stage's name: the params that are not today's, else other inputs or code."""
    params = _params(manifest)
    parts = [f" {key} {_short(value)}" for key, value in params.items() if now and now.get(key) != value]
    if not parts:
        parts = [f" other {part}" for part in ("inputs", "code") if _differs(part, manifest, reference)]
    return ",".join(parts)


def _differs(part: str, manifest: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    return part in manifest and manifest[part] != reference.get(part)


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _named_apart(runs: Iterator[Run]) -> Iterator[Run]:
    """Two runs that differ in nothing a reader would know are told apart by their key."""
    taken: set[str] = set()
    for run in runs:
        label = run.label
        if label in taken:
            label = f"{label} ({run.loss.parent.name[:SHORT_KEY]})"
        taken.add(label)
        yield replace(run, label=label)


def _digest(path: Path) -> str | None:
    try:
        return artifact.file_digest(path)
    except OSError:
        return None


def _changed(path: Path) -> float:
    return _stat(path)[1] / 1e9
