"""Discovers runs to compare: each training stage's last run, its artifact, those in the cache."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.measuring import measuring
from pipeline.files import artifact
from pipeline.fleet.logs import UnitLogs, log_stamps, unit_logs
from pipeline.inference.catalog import VERDICT, measured
from pipeline.project.cache import NAMED, SHORT_KEY, Cache, cache_key
from pipeline.project.logs import run_state
from pipeline.project.logs.run_log import (
    COLUMNS,
    DIVERGED,
    LOSS,
    OPTIONAL,
    best_step,
    final_loss,
    read_run_outcomes,
    read_steps,
)
from pipeline.project.logs.run_state import Settings
from pipeline.project.logs.runs import LogFiles, Run, curves
from pipeline.project.stage_graph import ARTIFACTS, RUNS, Project, Stage, cache_folder
from pipeline.stages.registry import GRAPH


@dataclass(frozen=True)
class Row:
    """A curve of a run, as `lora runs` lists it. `key` is empty until the run has finished, `name`
    unless it was given one.

    `loss`: its last, in nats per token; `when`: the log's last change in seconds since the epoch.
    """

    key: str
    name: str
    run: str
    steps: int
    loss: float | None
    when: float


def rows(runs: Iterable[Run]) -> Iterator[Row]:
    """A row for each curve of the runs: a sweep has one per adapter."""
    for run in runs:
        for curve in run.curves:
            steps = read_steps(curve.loss)
            yield Row(
                run.key[:SHORT_KEY],
                run.name,
                run.curve_label(curve.name),
                len(steps),
                final_loss(steps),
                run.when,
            )


def steps_csv(runs: Iterable[Run]) -> bytes:
    """Every step of each curve of the runs, as CSV."""
    text = StringIO()
    rows = csv.DictWriter(text, ("run", *COLUMNS, *OPTIONAL), lineterminator="\n")
    rows.writeheader()
    for run in runs:
        for curve in run.curves:
            label = run.curve_label(curve.name)
            rows.writerows({"run": label, **vars(step)} for step in read_steps(curve.loss))
    return text.getvalue().encode()


def choose(runs: Sequence[Run], name: str | None) -> list[Run]:
    """The runs that a name means: those of a named run, one by its key, or a stage's last; without
    a name the last of each stage.

    Raises UserError if there is none.
    """
    last = {run.stage: run for run in reversed(runs)}
    if name is None:
        chosen = list(reversed(last.values()))
    else:
        finished = [run for run in runs if run.key]
        chosen = [run for run in finished if name in (*run.names, run.key[:SHORT_KEY])]
        chosen = chosen or [run for run in last.values() if run.stage == name]
    if not chosen:
        raise UserError(
            f"There is no run{f' {name}' * bool(name)}. `lora runs` lists them with their keys."
        )
    return chosen


@dataclass(frozen=True)
class Comparison:
    """What sets runs apart: a value for each of them, in their order."""

    settings: Mapping[str, tuple[Any, ...]]  # those that differ; None where a run has none
    curves: Mapping[str, tuple[float | None, ...]]
    # an evaluation's metrics of each; empty if it was not measured with the settings of now
    metrics: tuple[Mapping[str, Any], ...]


def compare(project: Project, runs: Sequence[Run]) -> Comparison:
    """Compare single runs by their settings, logs and evaluations."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    settings = {key: tuple(run.params.get(key) for run in runs) for key in keys}
    roots = [project.root / ARTIFACTS, *Cache(project.cache).named().values()]
    evaluates = "evaluate" in project.readable
    measurements = measured(roots, measuring(project).key) if evaluates else {}
    logs = [read_steps(run.curves[0].loss) for run in runs]
    ends = []
    for run, steps in zip(runs, logs, strict=True):
        evaluated = [step for step in steps if step.eval_loss is not None]
        best = best_step(evaluated, run.params.get("metric_for_best_model", "eval_loss"))
        takes_best = run.params.get("patience") or run.params.get("load_best")
        ends.append(best if takes_best else next(reversed(evaluated), None))
    return Comparison(
        {key: values for key, values in settings.items() if any(v != values[0] for v in values)},
        {
            "steps": tuple(map(len, logs)),
            "loss": tuple(map(final_loss, logs)),
            "held-out loss": tuple(end.eval_loss if end else None for end in ends),
            "held-out answers": tuple(end.eval_answers if end else None for end in ends),
        },
        tuple(
            {
                key: value
                for key, value in measurements.get(run.digest, {}).items()
                if key != VERDICT
            }
            for run in runs
        ),
    )


@dataclass(frozen=True)
class _Logs:
    """The logs of a run folder or an artifact, and the artifact's manifest."""

    folder: Path
    curves: tuple[LogFiles, ...]
    # curve → sha256 of its log; None for an adapter that diverged: the artifact has no log of it
    digests: Mapping[str, str | None]
    manifest: Mapping[str, Any]
    units: Mapping[int, Path] = field(default_factory=dict)  # of a fleet, which log there

    @property
    def params(self) -> Mapping[str, Any]:
        """The settings, if the manifest has them: another version may have written it."""
        params = self.manifest.get("params")
        return params if isinstance(params, dict) else {}

    @property
    def when(self) -> float:
        """The last change, in seconds since the epoch."""
        return max(_stat(curve.loss)[1] for curve in self.curves) / 1e9

    def same(self, other: "_Logs") -> bool:
        """Whether both have the same adapters and equal logs, as far as both have them."""
        if self.digests.keys() != other.digests.keys():
            return False
        pairs = [(digest, other.digests[name]) for name, digest in self.digests.items()]
        return all(None in pair or pair[0] == pair[1] for pair in pairs)

    def covers(self, part: "_Logs") -> bool:
        """Whether it has all curves of another: of units that have ended, or of a sweep that takes
        them from the cache.
        """
        return part.digests.keys() <= self.digests.keys() and all(
            self.digests[name] in (None, digest) for name, digest in part.digests.items()
        )


def discover_runs(root: Path, project: Project | None) -> list[Run]:
    """All runs of the training stages, stage by stage: the last run first, then from new to old.

    Runs with the same bytes in their logs are listed once. Labels show the params that differ from
    the current ones. Inherited stages have their runs in the parent's folder; stages of other
    projects with the same cache are left out. `project` is None if the params file in `root` cannot
    be read. This reads whole logs to hash them, so do not call it on the UI thread.
    """
    stages = training_stages(project)
    sweeps = {stage.name: stage.kind == "adapters" for stage in stages}
    units = [logs for home in _homes(root, project) for logs in unit_logs(home, sweeps)]
    return [run for stage in stages for run in _runs(root, stage, project, units)]


def _homes(root: Path, project: Project | None) -> list[Path]:
    """The project's folder, and that of its parent."""
    return [root, *([project.parent.root] if project and project.parent else [])]


def stamp(root: Path, params: Path, project: Project | None) -> tuple[int, ...]:
    """Changes when `discover_runs` may return other runs.

    Takes a dozen calls of os.stat, and one per adapter.
    """
    cache = project.cache if project else cache_folder(root)
    numbers = [*_stat(params), *_stat(cache / NAMED)]
    for stage in training_stages(project):
        home = project.home(stage.name).root if project else root
        numbers += _log_inodes(home / RUNS / stage.name, stage.kind == "adapters")
        numbers += [*_stat(home / stage.path), *_stat(cache / stage.name)]
    for home in _homes(root, project):
        numbers += log_stamps(home)
    return tuple(numbers)


def _log_inodes(folder: Path, sweeps: bool) -> list[int]:
    """The inodes of a run folder's logs: a log that grows is the same run."""
    if not sweeps:
        return [_stat(folder / LOSS)[0]]
    try:
        entries = [entry for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
    numbers = []
    for name in sorted(entry.name for entry in entries if entry.name[0] != "."):
        # with the name, as a renamed folder keeps the inodes
        numbers += [hash(name), _stat(folder / name / LOSS)[0]]
    return numbers


def training_stages(project: Project | None) -> list[Stage]:
    """The stages that train and that the project shows, methods first; without a project, all."""
    shown = GRAPH.product if project is None else project.shown
    training = [stage for stage in GRAPH.product.values() if stage.trains and stage.name in shown]
    return sorted(training, key=lambda stage: not stage.look)


def _stat(path: Path) -> tuple[int, int]:
    """The inode and the time of the last change in ns; zeros if the file does not exist."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def _runs(
    root: Path, stage: Stage, project: Project | None, units: Iterable[UnitLogs]
) -> Iterator[Run]:
    """The runs of a stage, each once: in runs/ and of `units` the newest first, then in artifacts/
    and in the cache from new to old.
    """
    home = project.home(stage.name) if project else None
    home_root = home.root if home else root
    cache = project.cache if project else cache_folder(root)
    names: dict[str, tuple[str, ...]] = {}  # by key
    for link in Cache(cache).results():
        key = link.resolve().name
        names[key] = (*names.get(key, ()), link.parent.name)
    last = _artifact_logs(home_root / stage.path, stage)
    cached = [_artifact_logs(entry, stage) for entry in (cache / stage.name).glob("[!.]*/")]
    finished = sorted(filter(None, cached), key=lambda logs: logs.when, reverse=True)
    if last:
        finished.insert(0, last)
    reference = finished[0].manifest if finished else {}

    folder = home_root / RUNS / stage.name
    noted = run_state.read_settings(folder, "run")
    now = _current_params(home, stage, noted, finished[0].params if finished else {})
    running = _running_logs(folder, stage, noted.params if noted else now, finished)
    fleet = [_fleet_logs(logs) for logs in units if logs.stage == stage.name]
    made = [*finished, *filter(None, [running])]
    fleet = [logs for logs in fleet if not logs.digests or not any(m.covers(logs) for m in made)]
    if running and any(logs.covers(running) for logs in fleet):  # it is taking them from the cache
        running = None
    newest = sorted([*filter(None, [running]), *fleet], key=lambda logs: logs.when, reverse=True)
    # The last run, its artifact and the cache's copy of it are one run, told by equal logs: a run
    # folder has no key.
    different: list[_Logs] = []
    labels: set[str] = set()
    for logs in [*newest, *finished]:
        if logs.digests and any(logs.same(other) for other in different):
            continue
        different.append(logs)
        label = _label(stage, logs, now, reference)
        if label in labels:
            label = f"{label} ({logs.folder.name[:SHORT_KEY]})"
        labels.add(label)
        key = cache_key(logs.manifest)
        yield Run(
            stage=stage.name,
            label=label,
            log_folder=logs.folder,
            curves=logs.curves,
            folder=folder if logs is running else None,
            params=logs.params,
            when=logs.when,
            sweeps=stage.kind == "adapters",
            key=key,
            names=names.get(key, ()),
            digest=artifact.sealed_digest(logs.manifest) if "files" in logs.manifest else "",
            checkpoints=_checkpoints(logs.manifest),
            best=logs.manifest.get("best_checkpoint"),
            units=logs.units,
        )


def _checkpoints(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """The steps N of the folders checkpoint-N of an artifact."""
    folders = {name.partition("/")[0] for name in manifest.get("files", ())}
    steps = [folder.removeprefix("checkpoint-") for folder in folders]
    return tuple(sorted(int(step) for step in steps if step.isdigit()))


def _running_logs(
    folder: Path, stage: Stage, params: Mapping[str, Any], finished: Sequence[_Logs]
) -> _Logs | None:
    """The logs of the run folder, or None if it has none.

    It has no manifest: its settings are those of the artifact with the same logs, else `params`.
    """
    files, digests = curves(folder, stage.kind == "adapters"), dict[str, str | None]()
    for curve in files:
        with suppress(OSError):
            digests[curve.name] = artifact.file_digest(curve.loss)
    if not digests:
        return None
    running = _Logs(folder, files, digests, {"params": params})
    made = next((logs.manifest for logs in finished if logs.same(running)), running.manifest)
    return replace(running, manifest=made)


def _fleet_logs(logs: UnitLogs) -> _Logs:
    """Of a fleet's units, without digests while they go on."""
    digests = dict[str, str | None]()
    for curve in logs.curves if logs.has_ended else ():
        with suppress(OSError):
            digests[curve.name] = artifact.file_digest(curve.loss)
    return _Logs(logs.folder, tuple(logs.curves), digests, {"params": logs.params}, logs.units)


def _label(stage: Stage, logs: _Logs, now: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """The stage, and what sets the run apart: other params than now, or else inputs or code."""
    parts = [
        f" {key} {_abbreviate(value)}"
        for key, value in logs.params.items()
        if now.get(key, value) != value
    ]
    if not parts:
        parts = [
            f" other {name}"
            for name in ("inputs", "code")
            if name in logs.manifest and logs.manifest[name] != reference.get(name)
        ]
    differences = ",".join(parts)
    if stage.kind != "adapters":
        return stage.name + differences
    count = len(logs.curves)
    adapters = f"{count} adapter{'s' if count > 1 else ''}"
    return f"{stage.name}  {adapters}{',' if parts else ''}{differences}"


def _current_params(
    home: Project | None, stage: Stage, noted: Settings | None, last: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The params that labels compare with: the params file's, else those of the last run."""
    if home and stage.name in home.readable:
        current: Mapping[str, Any] = json.loads(json.dumps(home.stage_params(stage)))
        return current
    if home and noted:
        return noted.params
    return last if home else {}


def _artifact_logs(folder: Path, stage: Stage) -> _Logs | None:
    """The logs of the artifact in `folder`, or None if it is not one or has no logs."""
    try:
        manifest = artifact.read_manifest(folder)
    except UserError:
        return None
    files = curves(folder, stage.kind == "adapters", telemetry=False)
    if not files:
        return None
    outcomes = read_run_outcomes(folder)
    digests: dict[str, str | None] = {
        name: None for name, outcome in outcomes.items() if outcome == DIVERGED
    }
    for curve in files:
        digest = manifest["files"].get(str(curve.loss.relative_to(folder)))
        if not isinstance(digest, str) or not curve.loss.is_file():
            return None
        digests[curve.name] = digest
    return _Logs(folder, files, digests, manifest)


def _abbreviate(value: Any) -> str:
    if isinstance(value, Mapping):
        return " × ".join(f"{key} {_abbreviate(item)}" for key, item in value.items()) or "none"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
