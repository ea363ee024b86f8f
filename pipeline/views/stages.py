"""The state of each stage: up to date, changed (with reasons), running, failed, …

A stage is up to date if the inputs recorded in its artifact equal the current ones, as in the
cache's key.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.files.digest_cache import DigestStore, Signature, signature
from pipeline.project import provenance
from pipeline.project.gate import Verdict, read_verdict
from pipeline.project.logs import run_state
from pipeline.project.logs.run_state import Journal
from pipeline.project.runner import (
    Digests,
    artifact_settings,
    changed_inputs,
    changed_params,
    input_facts,
    settings_of,
)
from pipeline.project.stage_graph import Project, Stage

State = Literal["missing", "current", "changed", "waits", "running", "failed", "stopped", "died"]
# How the last run ended → the state of a stage whose artifact is not up to date. A journal that
# says "running" is one of a process that is gone.
ENDED: Mapping[str, State] = {"failed": "failed", "stopped": "stopped", "running": "died"}


@dataclass(frozen=True)
class StageState:
    """A stage's state."""

    stage: Stage
    state: State
    reasons: tuple[str, ...] = ()  # what changed or went wrong, or whether limits are kept
    run: Journal | None = None  # its last run's
    verdict: Verdict | None = None  # on the models, of an evaluation that is up to date

    @property
    def broken(self) -> Verdict | None:
        """The verdict if the models break evaluate.limits.

        The stage is up to date nevertheless, and its command ends with 1.
        """
        return self.verdict if self.verdict and self.verdict.broken else None


@dataclass
class Status:
    """Computes the states of all stages. Digests are kept until a file's stamp changes."""

    _cache: dict[tuple[str, Path | str], tuple[Signature, str]] = field(default_factory=dict)

    def of(
        self, project: Project, report: Callable[[StageState], object] = lambda _: None
    ) -> dict[str, StageState]:
        """The state of every stage that the project shows, in the DAG's order.

        `report` is called with every state as soon as it is computed: large files take seconds to
        hash.
        """
        # one look at all files, instead of reading each stage's
        code = signature(provenance.ROOT / "pipeline")

        def code_of(*modules: str) -> str:
            compute = partial(provenance.code_digest, *modules)
            return self._cached(("code", " ".join(modules)), code, compute)

        def digest_of(path: Path) -> str:
            compute = partial(artifact.digest, path)
            return self._cached(("digest", path), signature(path), compute)

        digests = Digests(digest_of, code_of)
        states: dict[str, StageState] = {}
        for stage in project.shown.values():
            states[stage.name] = self._state(project.home(stage.name), stage, digests, states)
            report(states[stage.name])
        return states

    def _state(
        self, project: Project, stage: Stage, digests: Digests, before: Mapping[str, StageState]
    ) -> StageState:
        folder = project.run_folder(stage.name)
        run = run_state.read(folder)
        if run_state.alive(folder):
            return StageState(stage, "running", (), run)
        state, details = self._compare(project, stage, digests)
        reasons = tuple(reason.replace(f"{project.root}/", "") for reason in details)

        # A failure counts until the artifact is up to date, which takes no run: `dvc checkout` may
        # bring it back.
        if state != "current" and run and run.state in ENDED:
            died = run.state == "running"
            message = "the process died (no error recorded)" if died else run.message
            return StageState(stage, ENDED[run.state], (*filter(None, [message]), *reasons), run)

        # What a stage reads is compared once that is itself up to date: it may be made again as it
        # was. A stage that the params file lacks is not made again with what it reads.
        if stage.name in project.stages and state in ("current", "changed"):
            # a params file may lack a section
            needs = [need for need in project.needs(stage) if need in before]
            waits_for = [need for need in needs if before[need].state != "current"]
            missing = any(not project.artifact(need).is_dir() for need in waits_for)
            if waits_for and (state == "current" or missing):
                return StageState(stage, "waits", (f"after {', '.join(waits_for)}",), run)

        if state != "current" or stage.kind != "evaluation":
            return StageState(stage, state, reasons, run)
        verdict = read_verdict(artifact.read_manifest(project.artifact(stage.name)))
        return StageState(stage, state, (f"gate {verdict.badge}",) if verdict else (), run, verdict)

    def _compare(
        self, project: Project, stage: Stage, digests: Digests
    ) -> tuple[State, tuple[str, ...]]:
        """Whether the stage's artifact is what its inputs make, and why not."""
        folder = project.artifact(stage.name)
        if not (folder / artifact.MANIFEST).is_file():
            reason = _why_missing(project, stage)
            return "missing", (reason,) if reason else ()
        verify = partial(_error_of, artifact.verify, folder)
        if problem := self._cached(("verified", folder), signature(folder), verify):
            return "changed", (problem,)
        manifest = artifact.read_manifest(folder)
        try:
            if stage.name not in project.readable:
                return _compare_unlisted(project, stage, digests, manifest)
            reasons = tuple(differences(manifest, input_facts(project, stage, digests)))
        except UserError as error:
            return "changed", (str(error),)
        except OSError as error:
            return "changed", (f"{error.filename}: {error.strerror}",)
        except (AttributeError, TypeError):  # a manifest whose sections have another type
            path = folder / artifact.MANIFEST
            reason = f"{path} is not a manifest of this project. Make the artifact again."
            return "changed", (reason,)
        return ("changed" if reasons else "current"), reasons

    def _cached(self, key: tuple[str, Path | str], now: Signature, make: Callable[[], str]) -> str:
        entry = self._cache.get(key)
        if entry is None or entry[0] != now:
            entry = self._cache[key] = now, make()
        return entry[1]


def _why_missing(project: Project, stage: Stage) -> str:
    """Why a stage cannot run yet; empty if it can."""
    # can the base be imported? Its weights are not read for that
    if stage.name == "import":
        return _error_of(base_model.resolve, project.params.origin.base, project.root)
    missing = [need for need in project.needs(stage) if not project.artifact(need).is_dir()]
    unknown = [need for need in missing if need not in project.readable]
    if unknown:
        return _error_of(project.stage, unknown[0])
    return f"needs {', '.join(missing)}" if missing else ""


def _compare_unlisted(
    project: Project, stage: Stage, digests: Digests, manifest: Mapping[str, Any]
) -> tuple[State, tuple[str, ...]]:
    """As `_compare`, of a stage that the params file lacks: settings and data are not compared."""
    needs = {project.artifact_name(need): project.artifact(need) for need in project.needs(stage)}
    now = {name: digests.path(path) for name, path in needs.items() if path.is_dir()}
    reasons = [f"{name} changed" for name in changed_inputs(manifest.get("inputs", {}), now)]
    if manifest.get("code") != digests.code(*stage.code):
        reasons.append("code changed")
    return "changed" if reasons else "current", (f"not in {project.params.file}", *reasons)


def _error_of(call: Callable[..., object], *arguments: object) -> str:
    """The message of the UserError that `call` raises; empty if it raises none."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


def differences(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What changed since an artifact was made: params, inputs, code, libraries."""
    yield from changed_params(manifest.get("params", {}), now["params"])
    for name in changed_inputs(manifest.get("inputs", {}), now["inputs"]):
        yield f"{name} changed"
    if manifest.get("code") != now["code"]:
        yield "code changed"
    made_with = provenance.public(manifest.get("versions", {}))
    for library, version in provenance.public(now["versions"]).items():
        before = made_with.get(library)
        if before != version:
            yield f"{library} {before} → {version}"


def outdated(project: Project, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Stages among `names` and their ancestors whose input files changed: name → reasons.

    Changed params, code and libraries are ignored: the results are still valid for the models they
    were made from. Stages without a manifest are ignored too.
    """
    selected = set(names)
    stages = project.readable
    for stage in reversed(stages.values()):
        if stage.name in selected:
            selected.update(project.needs(stage))

    # By digests that are kept between processes: this is for people to look at, and hashing a model
    # takes a minute.
    digests = DigestStore()
    reasons_of: dict[str, tuple[str, ...]] = {}
    for stage in stages.values():
        if stage.name not in selected:
            continue
        home = project.home(stage.name)
        try:
            made_from = artifact.read_manifest(home.artifact(stage.name))["inputs"]
            now = {
                name: digests.digest(path)
                for name, path in home.inputs(stage).items()
                if name in made_from and path.exists()
            }
            changed = changed_inputs(made_from, now)
        # no manifest, or one of another format
        except (UserError, OSError, KeyError, TypeError, AttributeError):
            continue
        needs = [home.artifact_name(need) for need in home.needs(stage) if need in reasons_of]
        reasons = [f"{name} changed" for name in changed]
        reasons += [f"{name} is out of date" for name in needs if name not in changed]
        if reasons:
            reasons_of[stage.name] = tuple(reasons)
    digests.save()
    return reasons_of


def apart(project: Project) -> dict[str, tuple[str, ...]]:
    """Method → how its artifact's settings differ from the params file's: `rank 16 → 4`.

    A method that is not in the file says so; one without an artifact or without a difference is
    left out.
    """
    differing: dict[str, tuple[str, ...]] = {}
    for stage in project.shown.values():
        made = artifact_settings(project.artifact(stage.name)) if stage.look else None
        if made is None:
            continue
        if stage.name not in project.readable:
            differing[stage.name] = (f"not in {project.params.file}",)
            continue
        now = settings_of(project.home(stage.name), stage)
        if changed := changed_params(made.params, now):
            differing[stage.name] = tuple(changed)
    return differing


def going_on(project: Project, states: Mapping[str, StageState]) -> dict[str, StageState] | None:
    """The states, where nothing changed but what the running stages say; None if one has ended."""
    now = dict(states)
    for name in running_of(states):
        folder = project.run_folder(name)
        if not run_state.alive(folder):
            return None
        now[name] = replace(states[name], run=run_state.read(folder))
    return now


def running_of(states: Mapping[str, StageState]) -> list[str]:
    """The stages that run."""
    return [name for name, state in states.items() if state.state == "running"]


def project_signature(project: Project, running: Collection[str] = ()) -> tuple[Signature, ...]:
    """A value that changes when anything changes that a state depends on, but for the journals of
    the `running` stages, which are written all the time.
    """
    data = set[Path]()
    for stage in project.readable.values():
        data.update(project.root / name for name in project.data_files(stage))
    shown = project.shown
    runs = [project.run_folder(n) / run_state.JOURNAL for n in shown if n not in running]
    artifacts = [project.artifact(name) for name in shown]
    base = base_model.files_to_watch(project.params.origin.base, project.home("import").root)
    return tuple(map(signature, (*sorted(data), *runs, *artifacts, *base)))
