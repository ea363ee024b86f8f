"""The state of each stage's artifact against the project's settings and files: up to date, changed and why, running.

The comparison is the cache's: a stage is up to date if running it would give the artifact that is there.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.files.file_stamp import Signature, signature
from pipeline.project import provenance
from pipeline.project.logs import run_state
from pipeline.project.logs.run_state import Journal
from pipeline.project.runner import Digests, changed_inputs, known
from pipeline.project.stage_graph import Project, Stage

State = Literal["missing", "current", "changed", "waits", "running", "failed", "stopped", "died"]


@dataclass(frozen=True)
class StageState:
    """One stage now; `reasons` say what changed or went wrong, `run` how its last run went."""

    stage: Stage
    state: State
    reasons: tuple[str, ...] = ()
    run: Journal | None = None


@dataclass
class Status:
    """Answers again and again: what was hashed is hashed again only when its files look different."""

    _memory: dict[tuple[str, Path | str], tuple[Signature, str]] = field(default_factory=dict)

    def of(self, project: Project, each: Callable[[StageState], object] = lambda _: None) -> dict[str, StageState]:
        """Every stage that the project can read, its parent's too, in the DAG's order.

        `each` is called with every state as soon as it is known: large files take seconds to hash.
        """
        code = signature(provenance.ROOT / "pipeline")

        def code_of(module: str) -> str:
            return self._remembered(("code", module), code, lambda: provenance.code_digest(module))

        digests = Digests(self._digest, code_of)
        found: dict[str, StageState] = {}
        for stage in project.readable.values():
            found[stage.name] = self._state(project.home(stage.name), stage, digests, found)
            each(found[stage.name])
        return found

    def _state(self, project: Project, stage: Stage, digests: Digests, before: Mapping[str, StageState]) -> StageState:
        folder = project.run_folder(stage.name)
        run = run_state.read(folder)
        if run_state.alive(folder):
            return StageState(stage, "running", (), run)
        state, found = self._compared(project, stage, digests)
        reasons = tuple(reason.replace(f"{project.root}/", "") for reason in found)
        if state != "current" and run and run.state in ("failed", "stopped"):
            said = (run.message,) if run.message else ()
            return StageState(stage, "failed" if run.state == "failed" else "stopped", (*said, *reasons), run)
        if state != "current" and run and run.state == "running":
            return StageState(stage, "died", ("its process ended without a word", *reasons), run)
        late = [need for need in project.needs(stage) if before[need].state != "current"]
        gone = any(not project.artifact(need).is_dir() for need in late)
        if late and (state == "current" or (state == "changed" and gone)):
            return StageState(stage, "waits", (f"after {', '.join(late)}",), run)
        return StageState(stage, state, reasons, run)

    def _compared(self, project: Project, stage: Stage, digests: Digests) -> tuple[State, tuple[str, ...]]:
        folder = project.artifact(stage.name)
        if not (folder / artifact.MANIFEST).is_file():
            lacks = [need for need in project.needs(stage) if not project.artifact(need).is_dir()]
            reason = f"needs {', '.join(lacks)}" if lacks else _base_problem(project, stage)
            return "missing", (reason,) if reason else ()
        broken = self._verified(folder)
        if broken:
            return "changed", (broken,)
        try:
            now = known(project, stage, digests)
        except UserError as error:
            return "changed", (str(error),)
        except OSError as error:
            return "changed", (f"{error.filename}: {error.strerror}",)
        reasons = tuple(differences(artifact.read_manifest(folder), now))
        return ("changed", reasons) if reasons else ("current", ())

    def _digest(self, path: Path) -> str:
        return self._remembered(("digest", path), signature(path), lambda: artifact.digest(path))

    def _verified(self, folder: Path) -> str:
        """Why the artifact is not what its manifest says; empty if it is."""
        return self._remembered(("verified", folder), signature(folder), lambda: _problem(folder))

    def _remembered(self, key: tuple[str, Path | str], now: Signature, make: Callable[[], str]) -> str:
        known = self._memory.get(key)
        if known is None or known[0] != now:
            known = self._memory[key] = now, make()
        return known[1]


def _problem(folder: Path) -> str:
    try:
        artifact.verify(folder)
    except UserError as error:
        return str(error)
    return ""


def _base_problem(project: Project, stage: Stage) -> str:
    """Why the base cannot be imported, as far as can be seen from outside; its weights are not read for it."""
    if stage.name != "pretrain":
        return ""
    try:
        base_model.resolve(project.params.pretrain.base, project.root)
    except UserError as error:
        return str(error)
    return ""


def differences(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What was otherwise when an artifact was made, in words: params, inputs, code, libraries."""
    now = json.loads(json.dumps(now))  # tuples are lists in a manifest
    for key, value in now["params"].items():
        before = manifest.get("params", {}).get(key)
        if before != value:
            yield f"{key} {_short(before)} → {_short(value)}"
    for name in changed_inputs(manifest.get("inputs", {}), now["inputs"]):
        yield f"{name} changed"
    if manifest.get("code") != now["code"]:
        yield "code changed"
    for library, version in now["versions"].items():
        before = manifest.get("versions", {}).get(library)
        if before != version:
            yield f"{library} {before} → {version}"


def outdated(
    project: Project, names: Iterable[str], digest: Callable[[Path], str] = artifact.digest
) -> dict[str, tuple[str, ...]]:
    """Which of these stages, and of those before them, were made from other files than lie there now: name → reasons.

    In the DAG's order. Params, code and libraries do not count: results stay true of the models that they were made
    from. Nor does what has no manifest, which came with the project.
    """
    asked, stages = set(names), project.readable
    for stage in reversed(stages.values()):
        asked |= set(project.needs(stage)) if stage.name in asked else set()
    found: dict[str, tuple[str, ...]] = {}
    for stage in (stage for name, stage in stages.items() if name in asked):
        try:
            made_from, home = artifact.read_manifest(project.artifact(stage.name))["inputs"], project.home(stage.name)
            there = {name: path for name, path in home.inputs(stage).items() if name in made_from and path.exists()}
            changed = changed_inputs(made_from, {name: digest(path) for name, path in there.items()})
        except (UserError, OSError, KeyError, TypeError, AttributeError):  # none, or not one of this project
            continue
        late = [home.artifact_name(need) for need in home.needs(stage) if need in found]
        reasons = [f"{name} changed" for name in changed]
        reasons += [f"{name} is out of date" for name in late if name not in changed]
        if reasons:
            found[stage.name] = tuple(reasons)
    return found


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def project_signature(project: Project) -> tuple[Signature, ...]:
    """Changes when anything does that a state depends on."""
    data = {project.root / name for stage in project.readable.values() for name in project.data_files(stage)}
    runs = [project.run_folder(name) / run_state.JOURNAL for name in project.readable]
    artifacts = [project.artifact(name) for name in project.readable]
    base = base_model.files_to_watch(project.params.pretrain.base, project.home("pretrain").root)
    return tuple(map(signature, (*sorted(data), *runs, *artifacts, *base)))
