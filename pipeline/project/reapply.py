"""Takes an earlier run again: its settings for the params file, its artifact from the cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.cache import Cache, Damaged
from pipeline.project.logs import run_state
from pipeline.project.logs.run_state import Settings
from pipeline.project.logs.runs import Run
from pipeline.project.params.schema import hints
from pipeline.project.runner import changed_params, keep, settings_of
from pipeline.project.stage_graph import Project, Stage


def settings_to_write(project: Project, run: Run) -> dict[str, Any]:
    """`section.key` → value of the run's settings that the params file has not.

    Raises UserError for a data file of the run that is not there.
    """
    stage = project.graph.stages[run.stage]
    now = settings_of(project, stage)
    params = run.params
    keys = [key for key in params if changed_params({key: params[key]}, {key: now.get(key)})]
    if stage.name not in project.readable:  # its section needs a line
        keys += [key for key in ("grid", "data") if key in params and key not in keys]
    values = {_key(stage, key): params[key] for key in keys}
    files = {key if "." in key else f"{stage.section}.{key}" for key in stage.data}
    for key in sorted(values.keys() & files):
        for name in _files(values[key]):
            if not (project.root / name).exists():
                raise UserError(
                    f"{key}: the run read {name}, which is not in this project. Set {key} by hand."
                )
    return values


def _key(stage: Stage, key: str) -> str:
    """The key of a stage's param in the params file: a sweep has those of two sections."""
    if "." in key:
        return key
    return f"{stage.name if key in hints(stage.settings) else stage.section}.{key}"


def _files(value: Any) -> list[str]:
    """The files that a key's value names: one path or several, each a text or a mapping."""
    entries = [value] if isinstance(value, str) else value or []
    names = [entry["path"] if isinstance(entry, Mapping) else entry for entry in entries]
    return [name for name in names if name]


def restore(project: Project, run: Run) -> Path:
    """Put the run's artifact in place, and return its folder.

    Raises UserError if its stage runs, or if the cache no longer has the artifact.
    """
    stage = project.graph.stages[run.stage]
    target, folder = project.artifact(stage.name), project.run_folder(stage.name)
    if run_state.alive(folder):
        raise UserError(f"{stage.name} is running. Wait until it has finished, or stop it.")
    try:
        if artifact.sealed_digest(artifact.read_manifest(target)) == run.digest:
            return target
    except (UserError, KeyError, TypeError):
        pass  # there is none, or it is not ours
    cache = Cache(project.cache)
    keep(cache, stage, target)
    again = f"Run `{stage.command}` to make it again"
    try:
        if not cache.restore(stage.name, run.key, target):
            raise UserError(f"The cache no longer has {run.label}. {again}.")
    except Damaged as damage:
        raise UserError(f"{damage} {again}; the damaged copy was removed from the cache.") from None
    run_state.write_settings(folder, made=Settings(run.key, run.params))
    return target
