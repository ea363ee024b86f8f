"""Which runs there are to look at: the last of each stage that trains, artifacts/, and what the cache kept."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.text import natural_sort_key
from pipeline.project.logs.run_log import LOSS, TELEMETRY
from pipeline.project.params.grid import DIVERGED, read_run_outcomes
from pipeline.project.stage_graph import ARTIFACTS, RUNS, STAGES, Project, Stage, cache_folder

TRAINING = (  # as a reader wants to see them
    *("finetune_full", "finetune_freeze", "finetune_lora", "finetune_prefix", "finetune_prompt", "finetune_sweep"),
    *("train_from_scratch", "pretrain"),
)
SHORT_KEY = 8  # characters of a digest that tell two runs apart to a reader


@dataclass(frozen=True)
class LogFiles:
    """One curve: its log, and its telemetry where that is kept. `name` is its adapter's in a sweep, else empty."""

    name: str
    loss: Path
    telemetry: Path | None


@dataclass(frozen=True)
class Run:
    """What was trained in one pass: one curve, or those of a sweep's adapters. `place` is the folder of their logs.

    `folder` is the run folder of a stage's last run, which may be going on; `params` are what it ran with (as JSON has
    them), `when` is the logs' last change in seconds since the epoch.
    """

    stage: str
    label: str
    place: Path
    curves: tuple[LogFiles, ...]
    folder: Path | None
    params: Mapping[str, Any]
    when: float

    @property
    def sweeps(self) -> bool:
        return STAGES[self.stage].kind == "adapters"

    def called(self, curve: str) -> str:
        """What to call one of its curves beside other runs'."""
        return f"{self.label}, {curve}" if curve else self.label


@dataclass(frozen=True)
class _Made:
    """A finished artifact's logs, and the parts of its manifest that tell it from another.

    `digests`: curve → sha256 of its log; None for an adapter that diverged, of which the artifact has none.
    """

    place: Path
    curves: tuple[LogFiles, ...]
    digests: Mapping[str, str | None]
    manifest: Mapping[str, Any]
    when: float


def discover_runs(root: Path, project: Project | None) -> list[Run]:
    """Every run of the stages that train, stage by stage, the last one first, then from new to old.

    A project's stages that are its parent's have their runs there. A run whose logs are the same, byte for byte, as
    those of one before it is left out. Labels say what of the params differs from today's; `project` is None where the
    params file in `root` cannot be read. Reads whole logs to compare them: not for the UI's thread.
    """
    return [run for name in TRAINING for run in _named_apart(_runs(root, STAGES[name], project))]


def stamp(root: Path, params: Path, project: Project | None) -> tuple[int, ...]:
    """What is another when `discover_runs` may find other runs: calls of os.stat, a dozen and one for each adapter."""
    homes = {name: project.home(name).root if project else root for name in TRAINING}
    kept = project.cache if project else cache_folder(root)
    logs = [number for name, home in homes.items() for number in _identities(home / RUNS / name, STAGES[name])]
    others = [params, *(home / STAGES[name].path for name, home in homes.items()), *(kept / name for name in TRAINING)]
    return (*logs, *(number for path in others for number in _stat(path)))


def _identities(folder: Path, stage: Stage) -> list[int]:
    """What tells the logs in a run folder from others: inodes, and the names of a sweep's adapters."""
    if stage.kind != "adapters":
        return [_stat(folder / LOSS)[0]]
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    return [number for name in names for number in (hash(name), _stat(folder / name / LOSS)[0])]


def _stat(path: Path) -> tuple[int, int]:
    """The inode, which another file has not, and the time of the last change; zeros if there is nothing."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def _logs(folder: Path, stage: Stage, telemetry: bool = True) -> tuple[LogFiles, ...]:
    """The curves of a stage whose logs lie in `folder`; of a sweep one for each adapter that is there."""
    places = [folder]
    if stage.kind == "adapters":
        places = sorted(
            (log.parent for log in folder.glob(f"[!.]*/{LOSS}")), key=lambda place: natural_sort_key(place.name)
        )
    return tuple(
        LogFiles("" if at == folder else at.name, at / LOSS, at / TELEMETRY if telemetry else None) for at in places
    )


def _runs(root: Path, stage: Stage, project: Project | None) -> Iterator[Run]:
    home = project.home(stage.name) if project else None
    now = json.loads(json.dumps(home.stage_params(stage))) if home else {}
    made = list(_made(home.root if home else root, project.cache if project else cache_folder(root), stage))
    reference = made[0].manifest if made else {}
    seen: list[Mapping[str, str | None]] = []

    def run(place: Path, curves: tuple[LogFiles, ...], folder: Path | None, manifest: Mapping[str, Any]) -> Run:
        difference = _difference(manifest, reference, now)
        label = f"{_named(stage, curves)}{',' if difference and stage.kind == 'adapters' else ''}{difference}"
        when = max(_changed(curve.loss) for curve in curves)
        return Run(stage.name, label, place, curves, folder, _params(manifest), when)

    folder = (home.root if home else root) / RUNS / stage.name
    curves = _logs(folder, stage)
    digests = {curve.name: digest for curve in curves if (digest := _digest(curve.loss))}
    if digests:
        seen.append(digests)
        manifest = next((known.manifest for known in made if _same(known.digests, digests)), {"params": now})
        yield run(folder, curves, folder, manifest)
    for known in made:
        if not any(_same(known.digests, other) for other in seen):
            seen.append(known.digests)
            yield run(known.place, known.curves, None, known.manifest)


def _named(stage: Stage, curves: tuple[LogFiles, ...]) -> str:
    if stage.kind != "adapters":
        return stage.name
    return f"{stage.name}  {len(curves)} adapter{'s' if len(curves) > 1 else ''}"


def _same(one: Mapping[str, str | None], other: Mapping[str, str | None]) -> bool:
    """Whether two runs have the same curves, as far as both have kept them."""
    return one.keys() == other.keys() and all(None in (a, other[name]) or a == other[name] for name, a in one.items())


def _made(root: Path, kept: Path, stage: Stage) -> Iterator[_Made]:
    """What is in artifacts/, then what the cache in `kept` holds, newest first."""
    entries = [entry for entry in (kept / stage.name).glob("[!.]*") if entry.is_dir()]
    found = [made for entry in entries if (made := _made_in(entry, stage))]
    last = _made_in(root / ARTIFACTS / stage.output, stage)
    yield from [last] if last else []
    yield from sorted(found, key=lambda made: made.when, reverse=True)


def _made_in(folder: Path, stage: Stage) -> _Made | None:
    """The artifact in `folder`, or None where there is none with a log."""
    try:
        manifest = artifact.read_manifest(folder)
    except UserError:
        return None
    digests: dict[str, str | None] = {}
    curves = _logs(folder, stage, telemetry=False)
    for curve in curves:
        digest = manifest["files"].get(str(curve.loss.relative_to(folder)))
        if not isinstance(digest, str) or not curve.loss.is_file():
            return None
        digests[curve.name] = digest
    diverged = [name for name, end in read_run_outcomes(folder).items() if end == DIVERGED]
    when = max((_changed(curve.loss) for curve in curves), default=0.0)
    return _Made(folder, curves, {**dict.fromkeys(diverged), **digests}, manifest, when) if curves else None


def _params(manifest: Mapping[str, Any]) -> dict[str, Any]:
    params = manifest.get("params")
    return params if isinstance(params, dict) else {}


def _difference(manifest: Mapping[str, Any], reference: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What to say of a run beside its stage's name: the params that are not today's, else other inputs or code."""
    params = _params(manifest)
    parts = [f" {key} {_short(value)}" for key, value in params.items() if now.get(key, value) != value]
    if not parts:
        parts = [f" other {part}" for part in ("inputs", "code") if _differs(part, manifest, reference)]
    return ",".join(parts)


def _differs(part: str, manifest: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    return part in manifest and manifest[part] != reference.get(part)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " × ".join(f"{key} {_short(item)}" for key, item in value.items()) or "none"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _named_apart(runs: Iterator[Run]) -> Iterator[Run]:
    """Two runs that differ in nothing a reader would know are told apart by their key."""
    taken: set[str] = set()
    for run in runs:
        label = run.label
        if label in taken:
            label = f"{label} ({run.place.name[:SHORT_KEY]})"
        taken.add(label)
        yield replace(run, label=label)


def _digest(path: Path) -> str | None:
    try:
        return artifact.file_digest(path)
    except OSError:
        return None


def _changed(path: Path) -> float:
    return _stat(path)[1] / 1e9
