"""Discovers the runs to compare: each training stage's last run, its artifact, and those in the
cache.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.text import natural_sort_key
from pipeline.project.cache import SHORT_KEY, cache_key
from pipeline.project.logs import run_state
from pipeline.project.logs.run_log import DIVERGED, LOSS, SAMPLES, TELEMETRY, read_run_outcomes
from pipeline.project.logs.run_state import Settings
from pipeline.project.stage_graph import ARTIFACTS, RUNS, Project, Stage, StageGraph, cache_folder


@dataclass(frozen=True)
class LogFiles:
    """The log of one curve, and its telemetry if it exists. `name`: the adapter's name in a sweep,
    else empty.
    """

    name: str
    loss: Path
    telemetry: Path | None

    @property
    def samples(self) -> Path:
        return self.loss.with_name(SAMPLES)


@dataclass(frozen=True)
class Run:
    """One training run: one curve, or one per adapter of a sweep; `log_folder` contains the logs.

    `folder`: the run folder if this is the stage's last run, which may still be running. `params`:
    the settings it ran with, as in JSON. `when`: the logs' last change in seconds since the epoch.
    `sweeps`: whether it is a sweep's. `key`: its artifact's in the cache, `digest`: of what the
    artifact contains; both empty where the run has made none.
    """

    stage: str
    label: str
    log_folder: Path
    curves: tuple[LogFiles, ...]
    folder: Path | None
    params: Mapping[str, Any]
    when: float
    sweeps: bool = False
    key: str = ""
    digest: str = ""

    def curve_label(self, curve: str) -> str:
        """The label of one of its curves, unique among all runs."""
        return f"{self.label}, {curve}" if curve else self.label


@dataclass(frozen=True)
class _Logs:
    """The logs of a run folder or an artifact, and the artifact's manifest.

    `digests`: curve → sha256 of its log; None for an adapter that diverged, whose log is not in the
    artifact.
    """

    folder: Path
    curves: tuple[LogFiles, ...]
    digests: Mapping[str, str | None]
    manifest: Mapping[str, Any]

    @property
    def when(self) -> float:
        """The last change, in seconds since the epoch."""
        return max(_stat(curve.loss)[1] for curve in self.curves) / 1e9

    def same(self, other: "_Logs") -> bool:
        """Whether both have the same adapters and equal logs, ignoring logs that one of them lacks
        (None).
        """
        one, two = self.digests, other.digests
        return one.keys() == two.keys() and all(
            None in (a, two[name]) or a == two[name] for name, a in one.items()
        )


def discover_runs(root: Path, project: Project | None, graph: StageGraph) -> list[Run]:
    """All runs of the training stages, stage by stage: the last run first, then from new to old.

    Runs with the same bytes in their logs are listed once. Labels show the params that differ from
    the current ones. Inherited stages have their runs in the parent's folder; stages of other
    projects with the same cache are left out. `project` is None if the params file in `root` cannot
    be read. This reads whole logs to hash them, so do not call it on the UI thread.
    """
    return [run for stage in training_stages(project, graph) for run in _runs(root, stage, project)]


def stamp(root: Path, params: Path, project: Project | None, graph: StageGraph) -> tuple[int, ...]:
    """Changes when `discover_runs` may return other runs. Takes a dozen calls of os.stat, and one
    per adapter.
    """
    cache = project.cache if project else cache_folder(root)
    numbers = [*_stat(params)]
    for stage in training_stages(project, graph):
        home = project.home(stage.name).root if project else root
        folder = home / RUNS / stage.name
        if stage.kind == "adapters":
            try:
                names = sorted(
                    entry.name
                    for entry in os.scandir(folder)
                    if entry.is_dir() and entry.name[0] != "."
                )
            except OSError:
                names = []
            # With their names, as a renamed folder keeps the inodes
            numbers += [
                number for name in names for number in (hash(name), _stat(folder / name / LOSS)[0])
            ]
        else:
            # the inode only: a log that grows is the same run
            numbers.append(_stat(folder / LOSS)[0])
        numbers += [*_stat(home / stage.path), *_stat(cache / stage.name)]
    return tuple(numbers)


def training_stages(project: Project | None, graph: StageGraph) -> list[Stage]:
    """The stages that train, which the project has itself or from its parent, or which ran without
    a section; without a project, all of the graph."""
    every = sorted(
        (stage for stage in graph.product.values() if stage.trains),
        key=lambda stage: not stage.look,
    )
    shown = graph.product if project is None else project.shown
    return [stage for stage in every if stage.name in shown]


def _stat(path: Path) -> tuple[int, int]:
    """The inode and the time of the last change in ns; zeros if the file does not exist."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def curves(folder: Path, sweeps: bool, telemetry: bool = True) -> tuple[LogFiles, ...]:
    """The curves with logs in `folder`: one, or one per adapter of a sweep."""
    folders = [folder]
    if sweeps:
        logs = folder.glob(f"[!.]*/{LOSS}")
        folders = sorted((log.parent for log in logs), key=lambda path: natural_sort_key(path.name))
    return tuple(
        LogFiles("" if at == folder else at.name, at / LOSS, at / TELEMETRY if telemetry else None)
        for at in folders
    )


def _runs(root: Path, stage: Stage, project: Project | None) -> Iterator[Run]:
    """The runs of a stage, each once: the one in runs/, then the one in artifacts/, then the
    cache's, newest first.
    """
    home = project.home(stage.name) if project else None
    home_root, cache = home.root if home else root, project.cache if project else cache_folder(root)
    entries = [entry for entry in (cache / stage.name).glob("[!.]*") if entry.is_dir()]
    cached = [logs for entry in entries if (logs := _artifact_logs(entry, stage))]
    last = _artifact_logs(home_root / ARTIFACTS / stage.output, stage)
    finished = [
        *([last] if last else []),
        *sorted(cached, key=lambda logs: logs.when, reverse=True),
    ]
    reference = finished[0].manifest if finished else {}
    candidates = finished
    # A run folder has no manifest. Its settings are those of the artifact with the same logs, else
    # those that it noted.
    folder, sweeps = home_root / RUNS / stage.name, stage.kind == "adapters"
    noted = run_state.read_settings(folder, "run")
    now = _current_params(home, stage, noted, reference)
    found, digests = curves(folder, sweeps), dict[str, str | None]()
    for curve in found:
        with suppress(OSError):
            digests[curve.name] = artifact.file_digest(curve.loss)
    if digests:
        running = _Logs(folder, found, digests, {"params": noted.params if noted else now})
        manifest = next(
            (logs.manifest for logs in finished if logs.same(running)), running.manifest
        )
        candidates = [replace(running, manifest=manifest), *finished]
    # The last run, its artifact and the cache's copy of it are one run, told by equal logs: a run
    # folder has no key.
    seen: list[_Logs] = []
    labels: set[str] = set()
    for logs in candidates:
        if any(logs.same(other) for other in seen):
            continue
        seen.append(logs)
        # What sets it apart: params that differ from the current ones, or else other inputs or code
        params = logs.manifest.get("params")
        # of an artifact that another version wrote
        params = params if isinstance(params, dict) else {}
        parts = [
            f" {key} {_abbreviate(value)}"
            for key, value in params.items()
            if now.get(key, value) != value
        ]
        if not parts:
            own = [part for part in ("inputs", "code") if part in logs.manifest]
            parts = [f" other {part}" for part in own if logs.manifest[part] != reference.get(part)]
        label = stage.name
        if sweeps:
            count = len(logs.curves)
            label += f"  {count} adapter{'s' if count > 1 else ''}{',' if parts else ''}"
        label += ",".join(parts)
        if label in labels:
            label = f"{label} ({logs.folder.name[:SHORT_KEY]})"
        labels.add(label)
        run_folder = folder if logs.folder == folder else None
        key = cache_key(logs.manifest)
        digest = artifact.sealed_digest(logs.manifest) if "files" in logs.manifest else ""
        yield Run(
            stage.name,
            label,
            logs.folder,
            logs.curves,
            run_folder,
            params,
            logs.when,
            sweeps,
            key,
            digest,
        )


def _current_params(
    home: Project | None, stage: Stage, noted: Settings | None, last: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The params from which a run's differ: those of the params file; where it has no such section,
    the last run's.
    """
    if home and stage.name in home.readable:
        current: Mapping[str, Any] = json.loads(json.dumps(home.stage_params(stage)))
        return current
    if home and noted:
        return noted.params
    params = last.get("params") if home else {}
    return params if isinstance(params, dict) else {}


def _artifact_logs(folder: Path, stage: Stage) -> _Logs | None:
    """The logs of the artifact in `folder`, or None if it is not one or has no logs."""
    try:
        manifest = artifact.read_manifest(folder)
    except UserError:
        return None
    digests: dict[str, str | None] = {}
    found = curves(folder, stage.kind == "adapters", telemetry=False)
    for curve in found:
        digest = manifest["files"].get(str(curve.loss.relative_to(folder)))
        if not isinstance(digest, str) or not curve.loss.is_file():
            return None
        digests[curve.name] = digest
    diverged = [name for name, end in read_run_outcomes(folder).items() if end == DIVERGED]
    return _Logs(folder, found, {**dict.fromkeys(diverged), **digests}, manifest) if found else None


def _abbreviate(value: Any) -> str:
    if isinstance(value, Mapping):
        return " × ".join(f"{key} {_abbreviate(item)}" for key, item in value.items()) or "none"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
