"""Discovers the runs to compare: each training stage's last run, its artifact, and those in the cache."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.text import natural_sort_key
from pipeline.project.logs.outcomes import DIVERGED, read_run_outcomes
from pipeline.project.logs.run_log import LOSS, TELEMETRY
from pipeline.project.stage_graph import ARTIFACTS, RUNS, Project, Stage, StageGraph, cache_folder

SHORT_KEY = 8  # characters of a cache key in a label


@dataclass(frozen=True)
class LogFiles:
    """The log of one curve, and its telemetry if it exists. `name`: the adapter's name in a sweep, else empty."""

    name: str
    loss: Path
    telemetry: Path | None


@dataclass(frozen=True)
class Run:
    """One training run: one curve, or one per adapter of a sweep; `log_folder` contains the logs.

    `folder`: the run folder if this is the stage's last run, which may still be running. `params`: the settings it ran
    with, as in JSON. `when`: the logs' last change in seconds since the epoch. `sweeps`: whether it is a sweep's.
    """

    stage: str
    label: str
    log_folder: Path
    curves: tuple[LogFiles, ...]
    folder: Path | None
    params: Mapping[str, Any]
    when: float
    sweeps: bool = False

    def curve_label(self, curve: str) -> str:
        """The label of one of its curves, unique among all runs."""
        return f"{self.label}, {curve}" if curve else self.label


@dataclass(frozen=True)
class _FinishedRun:
    """The logs of a finished artifact and its manifest.

    `digests`: curve → sha256 of its log; None for an adapter that diverged, whose log is not in the artifact.
    """

    log_folder: Path
    curves: tuple[LogFiles, ...]
    digests: Mapping[str, str | None]
    manifest: Mapping[str, Any]
    when: float


def discover_runs(root: Path, project: Project | None, graph: StageGraph) -> list[Run]:
    """All runs of the training stages, stage by stage: the last run first, then from new to old.

    Runs with the same bytes in their logs are listed once. Labels show the params that differ from the current ones.
    Inherited stages have their runs in the parent's folder; stages of other projects with the same cache are left out.
    `project` is None if the params file in `root` cannot be read. This reads whole logs to hash them, so do not call
    it on the UI thread.
    """
    return [run for stage in training_stages(project, graph) for run in _disambiguate(_runs(root, stage, project))]


def stamp(root: Path, params: Path, project: Project | None, graph: StageGraph) -> tuple[int, ...]:
    """Changes when `discover_runs` may return other runs. Takes a dozen calls of os.stat, and one per adapter."""
    stages = training_stages(project, graph)
    homes = [(stage, project.home(stage.name).root if project else root) for stage in stages]
    cache = project.cache if project else cache_folder(root)
    logs = [number for stage, home in homes for number in _identities(home / RUNS / stage.name, stage)]
    others = [params, *(home / stage.path for stage, home in homes), *(cache / stage.name for stage in stages)]
    return (*logs, *(number for path in others for number in _stat(path)))


def training_stages(project: Project | None, graph: StageGraph) -> list[Stage]:
    """The stages that train, which the project has itself or from its parent; without a project, all of the graph."""
    trained = sorted((stage for stage in graph.stages.values() if stage.look), key=lambda stage: stage.order)
    every = [*trained, graph.stages["pretrain"]]
    return [stage for stage in every if project is None or stage.name in project.readable]


def _identities(folder: Path, stage: Stage) -> list[int]:
    """The inodes of the logs in a run folder, and hashes of the names of a sweep's adapters."""
    if stage.kind != "adapters":
        return [_stat(folder / LOSS)[0]]
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    return [number for name in names for number in (hash(name), _stat(folder / name / LOSS)[0])]


def _stat(path: Path) -> tuple[int, int]:
    """The inode and the time of the last change in ns; zeros if the file does not exist."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def _logs(folder: Path, stage: Stage, telemetry: bool = True) -> tuple[LogFiles, ...]:
    """The curves with logs in `folder`: one, or one per adapter of a sweep."""
    folders = [folder]
    if stage.kind == "adapters":
        folders = sorted(
            (log.parent for log in folder.glob(f"[!.]*/{LOSS}")), key=lambda path: natural_sort_key(path.name)
        )
    return tuple(
        LogFiles("" if at == folder else at.name, at / LOSS, at / TELEMETRY if telemetry else None) for at in folders
    )


def _runs(root: Path, stage: Stage, project: Project | None) -> Iterator[Run]:
    home = project.home(stage.name) if project else None
    now = json.loads(json.dumps(home.stage_params(stage))) if home else {}
    finished = list(
        _finished_runs(home.root if home else root, project.cache if project else cache_folder(root), stage)
    )
    reference = finished[0].manifest if finished else {}
    seen: list[Mapping[str, str | None]] = []

    def run(log_folder: Path, curves: tuple[LogFiles, ...], folder: Path | None, manifest: Mapping[str, Any]) -> Run:
        difference = _difference(manifest, reference, now)
        label = f"{_stage_label(stage, curves)}{',' if difference and stage.kind == 'adapters' else ''}{difference}"
        when = max(_changed(curve.loss) for curve in curves)
        return Run(stage.name, label, log_folder, curves, folder, _params(manifest), when, stage.kind == "adapters")

    folder = (home.root if home else root) / RUNS / stage.name
    curves = _logs(folder, stage)
    digests = {curve.name: digest for curve in curves if (digest := _digest(curve.loss))}
    if digests:
        seen.append(digests)
        manifest = next((other.manifest for other in finished if _same(other.digests, digests)), {"params": now})
        yield run(folder, curves, folder, manifest)
    for other in finished:
        if not any(_same(other.digests, digests) for digests in seen):
            seen.append(other.digests)
            yield run(other.log_folder, other.curves, None, other.manifest)


def _stage_label(stage: Stage, curves: tuple[LogFiles, ...]) -> str:
    if stage.kind != "adapters":
        return stage.name
    return f"{stage.name}  {len(curves)} adapter{'s' if len(curves) > 1 else ''}"


def _same(one: Mapping[str, str | None], other: Mapping[str, str | None]) -> bool:
    """Whether two runs have the same adapters and equal logs, ignoring logs that one of them lacks (None)."""
    return one.keys() == other.keys() and all(None in (a, other[name]) or a == other[name] for name, a in one.items())


def _finished_runs(root: Path, cache: Path, stage: Stage) -> Iterator[_FinishedRun]:
    """The run in artifacts/, then those in the cache, newest first."""
    entries = [entry for entry in (cache / stage.name).glob("[!.]*") if entry.is_dir()]
    cached = [run for entry in entries if (run := _finished_run(entry, stage))]
    last = _finished_run(root / ARTIFACTS / stage.output, stage)
    yield from [last] if last else []
    yield from sorted(cached, key=lambda run: run.when, reverse=True)


def _finished_run(folder: Path, stage: Stage) -> _FinishedRun | None:
    """The finished run in `folder`, or None if it has no artifact with a log."""
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
    return _FinishedRun(folder, curves, {**dict.fromkeys(diverged), **digests}, manifest, when) if curves else None


def _params(manifest: Mapping[str, Any]) -> dict[str, Any]:
    params = manifest.get("params")
    return params if isinstance(params, dict) else {}


def _difference(manifest: Mapping[str, Any], reference: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The suffix of a run's label: params that differ from the current ones, or else "other inputs" or "other code"."""
    params = _params(manifest)
    parts = [f" {key} {_abbreviate(value)}" for key, value in params.items() if now.get(key, value) != value]
    if not parts:
        parts = [f" other {part}" for part in ("inputs", "code") if _differs(part, manifest, reference)]
    return ",".join(parts)


def _differs(part: str, manifest: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    return part in manifest and manifest[part] != reference.get(part)


def _abbreviate(value: Any) -> str:
    if isinstance(value, Mapping):
        return " × ".join(f"{key} {_abbreviate(item)}" for key, item in value.items()) or "none"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _disambiguate(runs: Iterator[Run]) -> Iterator[Run]:
    """Append the cache key to labels that occur twice."""
    labels: set[str] = set()
    for run in runs:
        label = run.label
        if label in labels:
            label = f"{label} ({run.log_folder.name[:SHORT_KEY]})"
        labels.add(label)
        yield replace(run, label=label)


def _digest(path: Path) -> str | None:
    try:
        return artifact.file_digest(path)
    except OSError:
        return None


def _changed(path: Path) -> float:
    return _stat(path)[1] / 1e9
