"""The state of each stage: up to date, changed (with reasons), running, failed, …, and what an
evaluation changed.

A stage is up to date if the inputs recorded in its artifact equal the current ones, as in the
cache's key.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
    changed_inputs,
    changed_params,
    input_facts,
    settings_of,
)
from pipeline.project.stage_graph import Project, Stage

State = Literal["missing", "current", "changed", "waits", "running", "failed", "stopped", "died"]


@dataclass(frozen=True)
class StageState:
    """A stage's state; `reasons`: what changed or went wrong, or if limits are kept; `run`: its
    last run's journal; `verdict`: of an evaluation that is up to date, on the models."""

    stage: Stage
    state: State
    reasons: tuple[str, ...] = ()
    run: Journal | None = None
    verdict: Verdict | None = None

    @property
    def broken(self) -> Verdict | None:
        """The verdict if the models break evaluate.limits: the stage is up to date, and its command
        ends with 1.
        """
        return self.verdict if self.verdict and self.verdict.broken else None


@dataclass
class Status:
    """Computes the states of all stages. Digests are cached and recomputed only if a file's stamp
    changes.
    """

    _cache: dict[tuple[str, Path | str], tuple[Signature, str]] = field(default_factory=dict)

    def of(
        self, project: Project, each: Callable[[StageState], object] = lambda _: None
    ) -> dict[str, StageState]:
        """The state of every stage of the project and its parent, in the DAG's order, and of what
        ran unlisted.

        `each` is called with every state as soon as it is computed: large files take seconds to
        hash.
        """
        # one look at all files, instead of reading each stage's
        code = signature(provenance.ROOT / "pipeline")

        def code_of(*modules: str) -> str:
            return self._cached(
                ("code", " ".join(modules)), code, lambda: provenance.code_digest(*modules)
            )

        def digest_of(path: Path) -> str:
            return self._cached(("digest", path), signature(path), lambda: artifact.digest(path))

        digests = Digests(digest_of, code_of)
        states: dict[str, StageState] = {}
        for stage in project.shown.values():
            states[stage.name] = self._state(project.home(stage.name), stage, digests, states)
            each(states[stage.name])
        return states

    def _state(
        self, project: Project, stage: Stage, digests: Digests, before: Mapping[str, StageState]
    ) -> StageState:
        folder = project.run_folder(stage.name)
        run = run_state.read(folder)
        if run_state.alive(folder):
            return StageState(stage, "running", (), run)
        # A failure counts until the artifact is up to date, which takes no run: `dvc checkout` may
        # bring it back.
        state, details = self._compare(project, stage, digests)
        reasons = tuple(reason.replace(f"{project.root}/", "") for reason in details)
        if state != "current" and run and run.state in ("failed", "stopped"):
            message = (run.message,) if run.message else ()
            return StageState(
                stage, "failed" if run.state == "failed" else "stopped", (*message, *reasons), run
            )
        if state != "current" and run and run.state == "running":
            return StageState(
                stage, "died", ("the process died (no error recorded)", *reasons), run
            )
        # What a stage reads is compared once that is itself up to date: it may be made again as it
        # was.
        # a params file may lack a section
        needs = [need for need in project.needs(stage) if need in before]
        outdated_needs = [need for need in needs if before[need].state != "current"]
        missing = any(not project.artifact(need).is_dir() for need in outdated_needs)
        # what is unlisted is not made again with what it reads
        runs_again = stage.name in project.stages
        if (
            runs_again
            and outdated_needs
            and (state == "current" or (state == "changed" and missing))
        ):
            return StageState(stage, "waits", (f"after {', '.join(outdated_needs)}",), run)
        if state != "current" or stage.kind != "evaluation":
            return StageState(stage, state, reasons, run)
        verdict = read_verdict(artifact.read_manifest(project.artifact(stage.name)))
        return StageState(stage, state, (f"gate {verdict.badge}",) if verdict else (), run, verdict)

    def _compare(
        self, project: Project, stage: Stage, digests: Digests
    ) -> tuple[State, tuple[str, ...]]:
        folder = project.artifact(stage.name)
        if not (folder / artifact.MANIFEST).is_file():
            missing = [need for need in project.needs(stage) if not project.artifact(need).is_dir()]
            unknown = [need for need in missing if need not in project.readable]
            reason = f"needs {', '.join(missing)}" if missing else ""
            if unknown:
                reason = _error_of(lambda: project.stage(unknown[0]))
            # can the base be imported? Its weights are not read for that
            if stage.name == "import":
                reason = _error_of(
                    lambda: base_model.resolve(project.params.origin.base, project.root)
                )
            return "missing", (reason,) if reason else ()
        verify = partial(_error_of, partial(artifact.verify, folder))
        if problem := self._cached(("verified", folder), signature(folder), verify):
            return "changed", (problem,)
        try:
            if stage.name not in project.readable:
                return self._compare_unlisted(project, stage, digests)
            now = input_facts(project, stage, digests)
        except UserError as error:
            return "changed", (str(error),)
        except OSError as error:
            return "changed", (f"{error.filename}: {error.strerror}",)
        manifest = artifact.read_manifest(folder)
        reasons = tuple(differences(manifest, now))
        return ("changed" if reasons else "current"), reasons

    def _compare_unlisted(
        self, project: Project, stage: Stage, digests: Digests
    ) -> tuple[State, tuple[str, ...]]:
        """No setting of the params file contradicts it, and its data may be named nowhere: what it
        was trained on counts."""
        manifest = artifact.read_manifest(project.artifact(stage.name))
        needs = {
            project.artifact_name(need): project.artifact(need) for need in project.needs(stage)
        }
        now = {name: digests.path(path) for name, path in needs.items() if path.is_dir()}
        reasons = [f"{name} changed" for name in changed_inputs(manifest.get("inputs", {}), now)]
        if manifest.get("code") != digests.code(*stage.code):
            reasons.append("code changed")
        return "changed" if reasons else "current", (f"not in {project.params.file}", *reasons)

    def _cached(self, key: tuple[str, Path | str], now: Signature, make: Callable[[], str]) -> str:
        entry = self._cache.get(key)
        if entry is None or entry[0] != now:
            entry = self._cache[key] = now, make()
        return entry[1]


def _error_of(call: Callable[[], object]) -> str:
    """The message of the UserError that `call` raises; empty if it raises none."""
    try:
        call()
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
    for library, version in now["versions"].items():
        before = manifest.get("versions", {}).get(library)
        if before != version:
            yield f"{library} {before} → {version}"


def outdated(project: Project, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Stages among `names` and their ancestors whose input files changed: name → reasons, in the
    DAG's order.

    Changed params, code and libraries are ignored: the results are still valid for the models they
    were made from. Stages without a manifest are ignored too.
    """
    # By digests that are kept between processes: this is for people to look at, and hashing a model
    # takes a minute.
    digests, selected, stages = DigestStore(), set(names), project.readable
    for stage in reversed(stages.values()):
        selected |= set(project.needs(stage)) if stage.name in selected else set()
    outdated_stages: dict[str, tuple[str, ...]] = {}
    for stage in (stage for name, stage in stages.items() if name in selected):
        try:
            made_from, home = (
                artifact.read_manifest(project.artifact(stage.name))["inputs"],
                project.home(stage.name),
            )
            existing = {
                name: path
                for name, path in home.inputs(stage).items()
                if name in made_from and path.exists()
            }
            changed = changed_inputs(
                made_from, {name: digests.digest(path) for name, path in existing.items()}
            )
        # no manifest, or one of another format
        except (UserError, OSError, KeyError, TypeError, AttributeError):
            continue
        outdated_needs = [
            home.artifact_name(need) for need in home.needs(stage) if need in outdated_stages
        ]
        reasons = [f"{name} changed" for name in changed]
        reasons += [f"{name} is out of date" for name in outdated_needs if name not in changed]
        if reasons:
            outdated_stages[stage.name] = tuple(reasons)
    digests.save()
    return outdated_stages


def apart(project: Project) -> dict[str, tuple[str, ...]]:
    """Method → how the settings of its artifact differ from those of the params file, such as `rank
    16 → 4`, or that it is not in there. A method without an artifact, and one that is as the file
    says, is left out."""
    found: dict[str, tuple[str, ...]] = {}
    for stage in (stage for stage in project.shown.values() if stage.look):
        try:
            params = dict(artifact.read_manifest(project.artifact(stage.name))["params"])
        except (UserError, KeyError, TypeError, ValueError):  # there is none, or it is not ours
            continue
        if stage.name not in project.readable:
            found[stage.name] = (f"not in {project.params.file}",)
        elif changed := changed_params(params, settings_of(project.home(stage.name), stage)):
            found[stage.name] = tuple(changed)
    return found


def project_signature(project: Project) -> tuple[Signature, ...]:
    """A value that changes when anything changes that a state depends on."""
    data = {
        project.root / name
        for stage in project.readable.values()
        for name in project.data_files(stage)
    }
    shown = project.shown
    runs = [project.run_folder(name) / run_state.JOURNAL for name in shown]
    artifacts = [project.artifact(name) for name in shown]
    base = base_model.files_to_watch(project.params.origin.base, project.home("import").root)
    return tuple(map(signature, (*sorted(data), *runs, *artifacts, *base)))


@dataclass(frozen=True)
class MetricChange:
    """A number of the evaluation before and after; None if it is missing there."""

    name: str
    before: float | None
    after: float | None


def metrics_since_commit(path: Path) -> list[MetricChange]:
    """Every number of `path` that differs from the last commit's in six digits; further digits
    depend on the machine.

    Raises UserError if there is nothing to compare.
    """
    if not path.is_file():
        raise UserError("Nothing was evaluated yet.")
    text = provenance.committed(path)
    if text is None:
        raise UserError(f"{path.name} was never committed, so there is nothing to compare.")
    try:
        before, after = (
            dict(_numbers(json.loads(each))) for each in (text, path.read_text(encoding="utf-8"))
        )
    except (ValueError, OSError) as error:
        raise UserError(f"{path.name} cannot be read: {error}.") from None
    changes = [
        MetricChange(name, before.get(name), after.get(name)) for name in {**before, **after}
    ]
    return [change for change in changes if _six_digits(change.before) != _six_digits(change.after)]


def _six_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in the JSON tree with its dotted name."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield prefix, tree
