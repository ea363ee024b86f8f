"""Run a stage: lock, look in the cache, work in a temporary folder, seal and cache the artifact."""

import json
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.files.locks import Lock
from pipeline.project import provenance
from pipeline.project.cache import SHORT_KEY, Cache, Damaged, cache_key
from pipeline.project.entries import open_cache
from pipeline.project.logs import run_state
from pipeline.project.logs.run_state import Settings
from pipeline.project.probes import held
from pipeline.project.stage_graph import Project, Stage


@dataclass(frozen=True)
class Note:
    """Something the user should know: a cache hit, a resumed or rejected checkpoint."""

    text: str
    # nothing out of the ordinary, left out where many stages run one after the other
    routine: bool = False


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of work."""

    done: int
    total: int
    text: str = ""


Event = Note | Progress
Facts = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a stage's work gets."""

    project: Project
    stage: Stage
    out: Path  # the folder to fill
    run: Path  # the run folder
    key: str  # the artifact's in the cache
    checkpoint_every: int | None  # steps between checkpoints; None: as the settings say
    # everything that determines the artifact: the first part of its manifest
    input_facts: Facts = field(default_factory=dict)
    sample: int | None = None  # read only so many examples: a step is tried, nothing is made
    force: bool = False  # make anew what the cache has
    # whether what is frozen is split over the devices; None: if a step does not fit one
    sharded: bool | None = None
    # what a model computes once it is sharded, before its first step
    deferred: list[Iterator[Event]] = field(default_factory=list)

    def artifact(self, stage: str) -> Path:
        """The folder of another stage's artifact. Raises UserError if it is damaged or outdated."""
        stage = self.project.standing_for(stage)
        folder, home = self.project.artifact(stage), self.project.home(stage)
        _refuse_missing(self.project, stage)
        if left_out := artifact.not_shipped(folder):
            raise UserError(
                f"{self.project.artifact_name(stage)} was shipped without {', '.join(left_out)}. "
                f"Run {self.project.command(stage)}."
            )
        made_from = artifact.verify(folder)["inputs"]
        needs = home.needs(home.graph.stages[stage])
        now = {home.artifact_name(need): artifact.digest(home.artifact(need)) for need in needs}
        for name in changed_inputs(made_from, now):
            raise UserError(
                f"{self.project.artifact_name(stage)} was made from another {name} than the "
                f"current one. Run {self.project.command(stage)}."
            )
        return folder

    def path(self, name: str) -> Path:
        return self.project.root / name


def _refuse_missing(project: Project, stage: str) -> None:
    """Raises UserError if a stage's artifact was not made."""
    if not project.artifact(stage).exists():
        raise UserError(
            f"{project.artifact_name(stage)} does not exist. Run {project.command(stage)}."
        )


def changed_inputs(made_from: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names whose digest differs from the manifest's."""
    return [name for name, digest in now.items() if made_from.get(name) != digest]


def changed_params(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How params differ from those in a manifest: `rank 4 → 8`."""
    plain = json.loads(json.dumps(now))  # tuples are lists in a manifest
    # An earlier version knew fewer keys. A sweep has no value of a key that its grid has.
    changed = [key for key, value in plain.items() if before.get(key, value) != value]
    return [f"{key} {_abbreviate(before[key])} → {_abbreviate(plain[key])}" for key in changed]


def _abbreviate(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or "none"


Work = Callable[[Job], Generator[Event, None, Facts]]


@dataclass(frozen=True)
class Digests:
    """Functions for digests of a file or folder, and of modules; a watcher passes cached ones."""

    path: Callable[[Path], str] = artifact.digest
    code: Callable[..., str] = provenance.code_digest


DIGESTS = Digests()
# of a data set, with a revision and a split
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(\[[^\[\]]+\])?")
MOST = 4  # changed params that a note names
SAVED = "saved"  # in a run folder: the models of the steps that its artifact will have


def run(
    project: Project,
    stage: Stage,
    work: Work | None = None,
    *,
    force: bool = False,
    checkpoint_every: int | None = None,
) -> Generator[Event, None, dict[str, Any]]:
    """Run a stage. Yields events and returns the manifest of its artifact.

    `work` fills `job.out` and returns its own part of the manifest (counts, fingerprints); by
    default the stage's.
    """
    events = _make(project, stage, work or stage.run, force, checkpoint_every)
    yield from _recorded(project, stage, events)
    return artifact.read_manifest(project.artifact(stage.name))


def run_part(
    project: Project,
    stage: Stage,
    work: Callable[[Job], Generator[Event, None, None]],
    checkpoint_every: int | None = None,
) -> Generator[Event, None, None]:
    """Run work of a stage that leaves its results in the cache, and no artifact."""
    yield from _recorded(project, stage, _make_part(project, stage, work, checkpoint_every))


def _recorded(
    project: Project, stage: Stage, events: Generator[Event, None, None]
) -> Generator[Event, None, None]:
    """The events of a stage's work under its lock; they are written to its journal."""
    folder = project.run_folder(stage.name)
    with (yield from _lock(folder, stage)) as lock, run_state.writing(folder) as writer:
        text = f"{stage.name}: the file system of {folder} has no flock: a heartbeat is the lock"
        notes = [Note(text)] * (not lock.has_flock)
        for event in chain(notes, _with_findings(stage, events)):
            if isinstance(event, Note):
                writer.note(event.text)
            else:
                writer.progress(event.done, event.total, event.text)
            yield event


def _with_findings(stage: Stage, events: Iterable[Event]) -> Iterator[Event]:
    """The events, and a note for each faster path that meanwhile was found not to work here."""
    reported = 0
    with held() as findings:
        for event in chain(events, [None]):
            if event is not None:
                yield event
            for finding in findings[reported:]:
                yield Note(f"{stage.name}: {finding}")
            reported = len(findings)


def _make(
    project: Project, stage: Stage, work: Work, force: bool, checkpoint_every: int | None
) -> Generator[Event, None, None]:
    """Put the artifact in place, from the cache or by running the work."""
    from concurrent.futures import ThreadPoolExecutor  # 10 ms, which the calculator does not need

    target, folder = project.output(stage.name), project.run_folder(stage.name)
    cache = open_cache(project)
    with ThreadPoolExecutor(1) as pool:
        if stage.trains and (force or _is_new(cache, project, stage)):
            pool.submit(import_module, "torch")  # while the base is hashed
        manifest = input_facts(project, stage)
    key = cache_key(manifest)
    settings = Settings(key, manifest["params"])
    replaced = _keep_replaced(cache, stage, target, folder, settings)
    if not force and (yield from _restore(cache, stage, key, target)):
        _store_parts(cache, stage, target)
        run_state.write_settings(folder, made=settings)
        # of a process that was killed right after it had stored the result
        _discard_checkpoints_of(key, folder)
        yield from replaced
        return
    run_state.write_settings(folder, run=settings)
    # whole or not at all: a stage that fails leaves the last result in place
    with artifact.writing(target) as out:
        job = Job(project, stage, out, folder, key, checkpoint_every, manifest, force=force)
        facts = yield from work(job)
        for name, digest in _inputs(project, stage).items():
            if digest != manifest["inputs"].get(name):  # the artifact would not match its manifest
                raise UserError(
                    f"{name} changed while {stage.name} was running. Run {stage.name} again."
                )
        artifact.seal(out, {**manifest, "commit": provenance.commit(*stage.code), **facts})
    try:
        cache.store(stage.name, key, target)
        _store_parts(cache, stage, target)
    except OSError as error:
        yield Note(f"{stage.name}: done, but not stored in the cache ({error.strerror})")
    run_state.write_settings(folder, made=settings)
    discard_checkpoints(folder)
    yield from replaced


def _store_parts(cache: Cache, stage: Stage, target: Path) -> None:
    """Store the adapters of an artifact that has several, each by itself, if the cache can."""
    if stage.kind == "adapters":
        from pipeline.project.entries.adapter_entries import store_adapters

        with suppress(OSError):
            store_adapters(cache, target)


def _make_part(
    project: Project,
    stage: Stage,
    work: Callable[[Job], Generator[Event, None, None]],
    checkpoint_every: int | None,
) -> Generator[Event, None, None]:
    folder, facts = project.run_folder(stage.name), input_facts(project, stage)
    key = cache_key(facts)
    run_state.write_settings(folder, run=Settings(key, facts["params"]))
    yield from work(Job(project, stage, folder, folder, key, checkpoint_every, facts))
    discard_checkpoints(folder)


def _is_new(cache: Cache, project: Project, stage: Stage) -> bool:
    """Whether no result in the cache has these settings, which is known before anything is read."""
    now = settings_of(project, stage)
    stored = map(artifact_settings, (cache.root / stage.name).glob("[!.]*/"))
    return all(result and changed_params(result.params, now) for result in stored)


def _keep_replaced(
    cache: Cache, stage: Stage, target: Path, folder: Path, settings: Settings
) -> list[Note]:
    """Store the trained model in place in the cache if it has other settings.

    Returns the note for when it is replaced; none if nothing is.
    """
    if not stage.look:
        return []
    # DVC removes an output before it runs the stage
    before = artifact_settings(target) or run_state.read_settings(folder, "made")
    changed = changed_params(before.params, settings.params) if before else []
    if not before or not changed:
        return []
    keep(cache, stage, target)
    more = f" and {len(changed) - MOST} more" * (len(changed) > MOST)
    back = ""
    if cache.has(stage.name, before.key):
        back = f". `lora runs apply {before.key[:SHORT_KEY]}` brings that one back"
    shown = ", ".join(changed[:MOST])
    return [Note(f"{stage.name}: replaced the earlier one: {shown}{more}{back}")]


def artifact_settings(folder: Path) -> Settings | None:
    """The key and the params of the artifact in `folder`; None if there is none, or not ours."""
    try:
        manifest = artifact.read_manifest(folder)
        return Settings(cache_key(manifest), dict(manifest["params"]))
    except (UserError, KeyError, TypeError, ValueError):
        return None


def keep(cache: Cache, stage: Stage, target: Path) -> None:
    """Store the artifact in place, if it is whole and not in the cache any more."""
    with suppress(UserError, OSError, KeyError, TypeError, ValueError):
        if key := cache_key(artifact.verify(target)):
            cache.store(stage.name, key, target)


def _lock(folder: Path, stage: Stage) -> Generator[Event, None, Lock]:
    """Acquire the run folder's lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / run_state.LOCK)
    if not lock.acquire(wait=False):
        yield Note(f"{stage.name}: waiting for {lock.holder or 'a process'}, which is running it")
        lock.acquire()
    return lock


def input_facts(project: Project, stage: Stage, digests: Digests = DIGESTS) -> Facts:
    """Everything that determines the artifact's bytes. Raises UserError.

    It is the first part of the artifact's manifest, and its digest is the cache key.
    """
    # Inputs count by content, never by time: a stage that runs again with the same result leaves
    # the later ones as they are. Code counts as the modules that the stage imports, not as a
    # commit: an edit elsewhere makes nothing again. Libraries count because another torch rounds
    # differently. Folders do not, so that a project can move and two can share a cache; nor do the
    # device and the number of processes: what one made is a result for all.
    section = settings_of(project, stage)
    extra = ["bitsandbytes"] if _uses_quantization(stage, section) else []
    return {
        "kind": stage.kind,
        "method": stage.method,
        "stage": stage.name,
        "seed": section.get("seed"),
        "params": section,
        "inputs": _inputs(project, stage, digests),
        "code": digests.code(*stage.code),
        "versions": provenance.versions(*extra),
    }


def settings_of(project: Project, stage: Stage) -> Facts:
    """The params that affect the stage's output, as its manifest has them."""
    params: Facts = without_paths(project.stage_params(stage))
    return params


def _uses_quantization(stage: Stage, section: Facts) -> bool:
    """Whether a base is quantized, by the stage's own settings or those of a stage that it
    repeats.
    """
    values = [value for key, value in section.items() if key.rpartition(".")[2] == "quantization"]
    return stage.quantizes or any(value != "none" for value in values)


def without_paths(value: Any) -> Any:
    """Settings as a manifest has them: of an absolute path only the last part."""
    if isinstance(value, str):
        return base_model.shared_name(value)
    if isinstance(value, Mapping):
        return {key: without_paths(part) for key, part in value.items()}
    return [without_paths(entry) for entry in value] if isinstance(value, list | tuple) else value


def _inputs(project: Project, stage: Stage, digests: Digests = DIGESTS) -> dict[str, str]:
    """Name → digest of everything that the stage reads. Raises UserError if it is not all there."""
    for key, name in project.file_keys(stage).items():
        if not (project.root / name).exists():
            section = key.partition("[")[0].rpartition(".")[0] or stage.section
            convert = ""
            # data/mine.csv is a file
            if HUB_ID.fullmatch(name) and not Path(name).suffix[1:].isalpha():
                convert = (
                    " A data set of the hub becomes one by `lora data convert "
                    f"{name} data/NAME.jsonl`."
                )
            raise UserError(
                f"{name} is not a file. Name an existing one in section {section} of the params."
                f"{convert}"
            )
    for need in project.needs(stage):
        if need not in project.readable and not project.artifact(need).is_dir():
            # says which section is missing, before anything is made for nothing
            project.stage(need)
    for need in project.needs(stage):
        _refuse_missing(project, need)
    inputs: dict[str, str] = {}
    if stage.name == "import":
        inputs |= _base_identity(project, digests)
    for name, path in project.inputs(stage).items():
        shared, number = base_model.shared_name(name), 2
        while shared in inputs:  # files of the same name in several folders
            shared, number = f"{base_model.shared_name(name)} {number}", number + 1
        inputs[shared] = digests.path(path)
    return inputs


def _base_identity(project: Project, digests: Digests) -> dict[str, str]:
    """Name → digest of the base that is imported. Raises UserError.

    The base that a demo is shipped without counts as the one that it was made from.
    """
    base, imported = project.params.origin.base, project.artifact("import")
    if base in artifact.not_shipped(imported) and not (project.root / base).exists():
        return {base: artifact.read_manifest(imported)["inputs"][base]}
    return base_model.identity(base_model.resolve(base, project.root), digests.path)


def _restore(cache: Cache, stage: Stage, key: str, target: Path) -> Generator[Event, None, bool]:
    """Restore the artifact from the cache. Returns whether that worked."""
    try:
        if not cache.restore(stage.name, key, target):
            return False
    except Damaged as damage:
        yield Note(f"{stage.name}: a damaged result was removed from the cache: {damage}")
        return False
    except OSError as error:
        yield Note(
            f"{stage.name}: the cache is not used ({error.filename or cache.root}: "
            f"{error.strerror})"
        )
        return False
    yield Note(f"{stage.name}: nothing to do, taken from the cache ({key[:12]})", routine=True)
    return True


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    return sorted(run.glob("checkpoint-*"), reverse=True)


def _discard_checkpoints_of(key: str, run: Path) -> None:
    """Remove the checkpoints of this result alone: other settings may still resume from theirs."""
    for path in checkpoints(run):
        with suppress(UserError):
            made_for = str(artifact.read_manifest(path).get("key"))
            if made_for.partition(" ")[0] == key:  # a sweep's passes append their number
                shutil.rmtree(path, ignore_errors=True)


def discard_checkpoints(run: Path, keep: Path | None = None) -> None:
    """Remove a run's checkpoints except `keep`, and unfinished ones of a killed process.

    Without `keep` the run is over, and its saved steps go too.
    """
    over = [run / SAVED] if keep is None else []
    for path in [*checkpoints(run), *run.glob(".checkpoint-*"), *over]:
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
