"""Run a stage: lock, look in the cache, do the work in a temporary folder, seal it, keep a copy."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.project import provenance
from pipeline.project.cache import Cache, Damaged
from pipeline.project.logs import run_state
from pipeline.project.stage_graph import Project, Stage


@dataclass(frozen=True)
class Note:
    """Something the user should know: a cache hit, a resumed or refused checkpoint.

    `routine`: nothing out of the ordinary, left out where many stages run one after the other.
    """

    text: str
    routine: bool = False


@dataclass(frozen=True)
class Progress:
    """How far the work is."""

    done: int
    total: int
    text: str = ""


Event = Note | Progress
Facts = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a stage's work gets: its project, the folder to fill, the folder of its run, and its cache key.

    `known` is all that decides what it makes: the first part of the manifest.
    """

    project: Project
    stage: Stage
    out: Path
    run: Path
    key: str
    checkpoint_every: int
    known: Facts = field(default_factory=dict)

    def artifact(self, stage: str) -> Path:
        """Another stage's output, once it is what its manifest says and was made from what lies beside it.

        Raises UserError.
        """
        folder, home = self.project.artifact(stage), self.project.home(stage)
        made_from = artifact.verify(folder)["inputs"]
        needs = home.needs(home.graph.stages[stage])
        now = {home.artifact_name(need): artifact.digest(home.artifact(need)) for need in needs}
        for name in changed_inputs(made_from, now):
            raise UserError(
                f"{self.project.artifact_name(stage)} was made from another {name} than the one that is "
                f"there. Run {stage} again, or `dvc repro` for all that is out of date."
            )
        return folder

    def path(self, name: str) -> Path:
        return self.project.root / name


def changed_inputs(made_from: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names whose digest is not the one that a manifest's inputs give."""
    return [name for name, digest in now.items() if made_from.get(name) != digest]


Work = Callable[[Job], Generator[Event, None, Facts]]


@dataclass(frozen=True)
class Digests:
    """How digests are taken: of a file or folder, and of the code that a module runs. Who watches remembers them."""

    path: Callable[[Path], str] = artifact.digest
    code: Callable[[str], str] = provenance.code_digest


DIGESTS = Digests()


def run(
    project: Project, stage: Stage, work: Work, *, force: bool = False, checkpoint_every: int = 100
) -> Generator[Event, None, dict[str, Any]]:
    """Yields events and returns the manifest of the stage's artifact, which is then in place.

    `work` fills `job.out` and returns the facts that only it knows (counts, fingerprints).
    """
    folder = project.run_folder(stage.name)
    with (yield from _lock(folder, stage)), run_state.writing(folder) as writer:
        for event in _made(project, stage, work, force, checkpoint_every):
            if isinstance(event, Note):
                writer.note(event.text)
            else:
                writer.progress(event.done, event.total, event.text)
            yield event
    return artifact.read_manifest(project.artifact(stage.name))


def _made(
    project: Project, stage: Stage, work: Work, force: bool, checkpoint_every: int
) -> Generator[Event, None, None]:
    """The artifact in its place, from the cache or by work."""
    target, folder = project.artifact(stage.name), project.run_folder(stage.name)
    facts_known = known(project, stage)
    key = hashlib.sha256(json.dumps(facts_known, sort_keys=True).encode()).hexdigest()
    cache = Cache(project.cache)
    if not force and (yield from _restored(cache, stage, key, target)):
        return
    with artifact.writing(target) as out:
        facts = yield from work(Job(project, stage, out, folder, key, checkpoint_every, facts_known))
        _refuse_changed(facts_known["inputs"], _inputs(project, stage), stage)
        artifact.seal(out, {**facts_known, "commit": provenance.commit(stage.module), **facts})
    yield from _store(cache, stage, key, target)
    discard_checkpoints(folder)


def _lock(folder: Path, stage: Stage) -> Generator[Event, None, TextIO]:
    """The run folder's lock, held until the file is closed or the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / run_state.LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        yield Note(f"{stage.name}: waiting for process {file.read()}, which is running it")
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def known(project: Project, stage: Stage, digests: Digests = DIGESTS) -> Facts:
    """All that decides the artifact's bytes: also the first part of its manifest. Raises UserError.

    Files outside the project are called by their names alone: their sha256 says which they are, wherever they lie.
    """
    section = project.stage_params(stage)
    besides = ["bitsandbytes"] if _in_few_bits(stage, section) else []
    return {
        "kind": stage.kind,
        "method": stage.method,
        "stage": stage.name,
        "seed": section.get("seed"),
        "params": {key: _without_paths(value) for key, value in section.items()},
        "inputs": _inputs(project, stage, digests),
        "code": digests.code(stage.module),
        "versions": provenance.versions(*besides),
    }


def _in_few_bits(stage: Stage, section: Facts) -> bool:
    """Whether a base is kept so, by its own settings or by those of a stage that it does anew; QLoRA is a method."""
    kept = [value for key, value in section.items() if key.rpartition(".")[2] == "quantization"]
    return stage.name == "study_methods" or any(value != "none" for value in kept)


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        return base_model.shared_name(value)
    return [_without_paths(entry) for entry in value] if isinstance(value, list | tuple) else value


def _inputs(project: Project, stage: Stage, digests: Digests = DIGESTS) -> dict[str, str]:
    """Digest of all that the stage reads. Raises UserError if something is missing."""
    for name in project.data_files(stage):
        if not (project.root / name).is_file():
            raise UserError(f"{name} is not a file. Name an existing one in section {stage.name} of the params.")
    base = _base(project, digests) if stage.name == "pretrain" else {}
    found = dict(base)
    for name, path in project.inputs(stage).items():
        shared, number = base_model.shared_name(name), 2
        while shared in found:  # files of one name from several folders
            shared, number = f"{base_model.shared_name(name)} {number}", number + 1
        found[shared] = digests.path(path)
    return found


def _base(project: Project, digests: Digests) -> dict[str, str]:
    """What is imported instead of trained, if anything is."""
    return base_model.identity(base_model.resolve(project.params.pretrain.base, project.root), digests.path)


def _refuse_changed(before: Mapping[str, str], after: Mapping[str, str], stage: Stage) -> None:
    """The manifest and the cache must not say that something was made from what was read only in part."""
    for name in before:
        if before[name] != after[name]:
            raise UserError(f"{name} changed while {stage.name} was running. Run {stage.name} again.")


def _restored(cache: Cache, stage: Stage, key: str, target: Path) -> Generator[Event, None, bool]:
    """Whether the artifact was in the cache. Without a cache that can be used, the stage does its work."""
    try:
        if not cache.restore(stage.name, key, target):
            return False
    except Damaged as damage:
        yield Note(f"{stage.name}: a damaged result was removed from the cache: {damage}")
        return False
    except OSError as error:
        yield Note(f"{stage.name}: the cache is not used ({error.filename or cache.root}: {error.strerror})")
        return False
    yield Note(f"{stage.name}: nothing to do, taken from the cache ({key[:12]})", routine=True)
    return True


def _store(cache: Cache, stage: Stage, key: str, target: Path) -> Iterator[Event]:
    try:
        cache.store(stage.name, key, target)
    except OSError as error:
        yield Note(f"{stage.name}: done, but not kept in the cache ({error.strerror})")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    return sorted(run.glob("checkpoint-*"), reverse=True)


def discard_checkpoints(run: Path, keep: Path | None = None) -> None:
    """Remove a run's checkpoints but `keep`, and what a killed process had begun to write of one."""
    for path in [*checkpoints(run), *run.glob(".checkpoint-*")]:
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
