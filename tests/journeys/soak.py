"""A soak: commands are killed at random moments, and results must have the bytes of an undisturbed
run.

    python -m tests.journeys.soak --kills 200 --seed 0

Every stage, export format and container of data is found in its registry. A command is killed after
a random share of its time, or right before or after a random change of a file. Then each result is
absent, as it was before, or complete; run again, the command ends and leaves what it leaves
undisturbed, and no file more. `lora serve` and the terminal UI's inference process are killed while
they load and answer: started again they answer the same, and no file has changed.

What is not compared: the contents of `runs/` (times, memory, process ids; of its files only the
names are), and `tokens_per_second` in an export's certificate. A tracker's event files have times
and process ids in their names.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

os.environ.setdefault("LORA_NO_EXTENSIONS", "1")  # a soak of the program alone

from cli.main import COMMANDS
from pipeline.data.convert import WRITERS
from pipeline.export.formats import FORMATS, Export
from pipeline.files.artifact import MANIFEST, file_digest
from pipeline.files.async_worker import WorkerDied
from pipeline.project.logs import run_state
from pipeline.project.logs.follower import missing
from pipeline.project.params import edit
from pipeline.stages.registry import GRAPH, open_project
from tests.helpers.kill_points import count_changes, die_at_change
from tests.helpers.process import PRELOADED, SERVER, Forked
from tests.helpers.projects import GIVEN, LORA, make, new_project, played, save
from tui.services.engine_client import Inference

# by commands, which then start at once; a kill while a library is imported shows little
IMPORTED = (
    *dict.fromkeys(module for module, _ in COMMANDS.values()),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "gguf", "uvicorn", "pyarrow.parquet"),
    *("pipeline.stages.quickstart", "pipeline.data.convert"),
    *(
        "pipeline.export.model_card",
        "pipeline.export.gguf.writer",
        "pipeline.inference.http.server",
    ),
    *("pipeline.inference.engine", "pipeline.weights.import_adapter", "pipeline.weights.extract"),
)
TRIES = 6  # for a kill: on a busy machine a command may end before its moment comes
PATIENCE = 120.0  # seconds for a server to answer
OWN_CACHE = ".lora-cache"
MEASURED = {"certificate.json": "tokens_per_second"}  # file → key that differs between two runs
Files = dict[str, str]  # name → digest
RESUMED = "resumed after step"
BEFORE, WHILE, AFTER = "before", "while", "after"


@dataclass
class Kill:
    """One kill: when it hit with regard to writing, what was wrong then, and whether the next run
    resumed.
    """

    phase: str
    problems: list[str]
    resumed: bool = False


@dataclass(frozen=True)
class Command:
    """A command that writes `made`, each of which exists whole or not at all; `dropped` is removed
    before it starts.

    `replaces`: whether it replaces an earlier result in its place.
    """

    name: str
    words: tuple[str, ...]
    project: str
    made: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    replaces: bool = True


# The projects


def build_models(
    root: Path, new: Callable[[Path], object] = new_project, given: Mapping[str, Any] = GIVEN
) -> None:
    """A project with a section for every stage; those that make models have run."""
    new(root)
    text = (root / "params.yaml").read_text(encoding="utf-8")
    for name, stage in GRAPH.stages.items():
        if f"\n{name}:" not in text and name != "import":
            text = f"{text.rstrip()}\n\n{edit.section_text(name, stage.settings)}"
    (root / "params.yaml").write_text(text, encoding="utf-8")
    save(root / "params.yaml", given)
    stages = open_project(root / "params.yaml").stages
    make(root, [name for name, stage in stages.items() if not stage.is_measurement])


def build_adapters(root: Path) -> None:
    """A toy Llama, two adapters on it, the first merged into it, and a project that would import
    it.
    """
    from pipeline.adapters.config import AdapterSpec
    from pipeline.export.formats.merged import merging_of
    from pipeline.weights.merge import merge_to
    from tests.helpers.checkpoints import adapter
    from tests.helpers.families import FAMILIES, new_project

    llama = FAMILIES["llama"]  # with room for the texts that `lora train` evaluates on
    new_project(root, replace(llama, config={**llama.config, "max_position_embeddings": 128}))
    attention = AdapterSpec(4, 8, ("q_proj", "k_proj", "v_proj", "o_proj"))
    for number, name in enumerate(("adapter", "second")):
        adapter(root / name, root / "base", attention, seed=number)
    played(merge_to(root / "merged", *merging_of(Export(root / "adapter"))))


def commands() -> Iterator[Command]:
    """All that writes, from the registries."""
    for name, stage in GRAPH.stages.items():
        words = [*stage.command.split()[1:], *(f"--set={setting}" for setting in _longer(name))]
        if name.startswith(("pretrain", "train_", "finetune_")):
            words += ["--checkpoint-every", "5"]
        project = "adapters" if name == "import" else "models"
        yield Command(
            name, tuple(words), project, (stage.path,), (f"{OWN_CACHE}/{name}", f"runs/{name}")
        )
    sweep, path = GRAPH.stages["finetune_sweep"], GRAPH.stages["finetune_lora"].path
    applied = ("finetune", "sweep", "--apply", "--set=finetune_sweep.grid={rank: [1, 3]}")
    dropped = (f"{OWN_CACHE}/{sweep.name}", f"runs/{sweep.name}")
    yield Command("sweep --apply", applied, "models", (sweep.path,), dropped)
    yield Command("finetune_lora, cached", ("finetune", "lora"), "models", (path,))
    measured = ("evaluate", "--adapter", "artifacts/lora_adapter")
    yield Command("evaluate --adapter", measured, "models", dropped=("artifacts/measured",))
    if not missing("tensorboard"):
        sent = ("runs", "export", "finetune_lora", "--to", "tensorboard", "--out", "runs/sent")
        yield Command("runs export", sent, "models", dropped=("runs/sent",))
    yield Command("cache prune", ("cache", "prune"), "models")
    for name in FORMATS:
        yield _writes(f"export {name}", "export", "adapter", "--format", name)
    yield _writes(
        "push --dry-run", "push", "adapter", "me/mine", "--base-name", "me/base", "--dry-run"
    )
    yield _writes("merge --adapter", "merge", "--adapter", "adapter")
    yield _writes("adapters import", "adapters", "import", "adapter")
    yield _writes(
        "adapters combine",
        "adapters",
        "combine",
        "adapter",
        "second",
        "--method",
        "svd",
        "--rank",
        "4",
    )
    yield _writes("adapters compress", "adapters", "compress", "adapter", "--rank", "2")
    yield _writes("spectrum --rank", "spectrum", "base", "merged", "--rank", "2")
    yield _writes(
        "spectrum --damp",
        "spectrum",
        "base",
        "adapter",
        "--intruders",
        "--epsilon",
        "1",
        "--damp",
        "0",
    )
    for suffix in WRITERS:
        converted = ("data", "convert", "data/texts.jsonl", f"out{suffix}", "--force")
        yield Command(f"data convert {suffix}", converted, "adapters", (f"out{suffix}",))
    yield Command("new", ("new", "out"), "adapters", replaces=False)
    chosen = ("--base", "base", "--data", "data/texts.jsonl", "--set", "epochs=4")
    yield Command("new --base", ("new", "out", *chosen), "adapters", replaces=False)
    yield Command("train", ("train", "--out", "out", *chosen), "adapters", replaces=False)


def _longer(name: str) -> Iterator[str]:
    """Settings under which a training of a few steps takes long enough for several checkpoints."""
    if name in ("pretrain", "train_from_scratch") or (
        name.startswith("finetune_") and name != "finetune_sweep"
    ):
        yield f"{name}.epochs=6"


def _writes(name: str, *words: str) -> Command:
    return Command(name, (*words, "--out", "out"), "adapters", ("out",))


# Files


def files_of(root: Path) -> Files:
    """Name → digest of every file; of one in `runs/` an empty one."""
    found: Files = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            inside = path.relative_to(root)
            if "tfevents" in name:  # with the time and the process in its name
                continue
            with suppress(FileNotFoundError):  # of a process that is just being ended
                found[inside.as_posix()] = "" if "runs" in inside.parts else _digest(path)
    return found


def _digest(path: Path) -> str:
    key = MEASURED.get(path.name)
    text = path.read_text(encoding="utf-8") if key else ""
    with suppress(ValueError):
        if key and key in text:
            return json.dumps(_without(json.loads(text), key))
    return file_digest(path)


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(part, key) for name, part in value.items() if name != key}
    return [_without(part, key) for part in value] if isinstance(value, list) else value


def below(files: Files, top: str) -> Files:
    return {
        name: digest for name, digest in files.items() if name == top or name.startswith(f"{top}/")
    }


def _without_runs(files: Files) -> Files:
    return {name: digest for name, digest in files.items() if "runs" not in name.split("/")}


def _is_temporary(name: str, known: Files) -> bool:
    """Whether a file is one that is being written: hidden, and of neither the start nor the end; or
    a checkpoint.
    """
    parts = [part for part in name.split("/") if part != OWN_CACHE]
    if "runs" in parts:
        return any("checkpoint-" in part or part.endswith(".tmp") for part in parts)
    return name not in known and any(part.startswith(".") for part in parts)


def damage(before: Files, now: Files, new: Files, made: Iterable[str]) -> list[str]:
    """What a killed command may not leave: a result that is neither the old one nor the new one, or
    only in part.
    """
    known = before | new
    before, new, now = (_without_runs(files) for files in (before, new, now))
    seen = {name: digest for name, digest in now.items() if not _is_temporary(name, known)}
    sealed = {name.removesuffix(f"/{MANIFEST}") for name in known if name.endswith(f"/{MANIFEST}")}
    problems, inside = [], set[str]()
    for top in sorted(sealed | set(made)):
        parts = [below(files, top) for files in (seen, before, new)]
        inside |= parts[0].keys() | parts[1].keys() | parts[2].keys()
        if parts[0] and parts[0] not in parts[1:]:
            problems.append(f"{top} is in part")
    for name in sorted((seen.keys() | (before.keys() & new.keys())) - inside):
        if seen.get(name) not in (before.get(name), new.get(name)):
            problems.append(f"{name} is {'changed' if name in seen else 'missing'}")
    return problems


def differences(now: Files, new: Files) -> list[str]:
    """How two states of a project differ."""
    names = sorted(name for name in now.keys() | new.keys() if now.get(name) != new.get(name))
    return [
        f"{name} is {'left over' if name not in new else 'changed' if name in now else 'missing'}"
        for name in names
    ]


class Soak:
    """Projects in `root`, in which commands are killed; `seed` decides when."""

    def __init__(
        self, root: Path, seed: int, build: Callable[[Path], object] = build_models
    ) -> None:
        self.root, self.seed = root, seed
        (root / "cache").mkdir(parents=True)
        SERVER.set_forkserver_preload(
            [PRELOADED, *IMPORTED, *(stage.module for stage in GRAPH.stages.values())]
        )
        builders: dict[str, Callable[[Path], object]] = {
            "models": build,
            "adapters": build_adapters,
        }
        for name, builder in builders.items():
            builder(root / name)
            shutil.copytree(root / name, root / "pristine" / name)
        self.start(["--version"], "models").end()  # the first start imports what all use

    def restore(self, project: str) -> Path:
        """The project as it was built, in its place."""
        shutil.rmtree(self.root / project, ignore_errors=True)
        return shutil.copytree(self.root / "pristine" / project, self.root / project)

    def chance(self, name: str) -> random.Random:
        """Of one command alone, so that its kills are the same whichever others there are."""
        return random.Random(f"{self.seed} {name}")

    def start(
        self, words: Sequence[str], project: str, first: Callable[[], object] | None = None
    ) -> Forked:
        variables = {"XDG_CACHE_HOME": str(self.root / "cache"), "HF_HUB_OFFLINE": "1"}
        group = partial(os.setpgid, 0, 0)
        return Forked(
            [LORA, *words], self.root / project, variables=variables, first=first or group
        )


class Written:
    """Kills of one command that writes."""

    def __init__(self, soak: Soak, command: Command) -> None:
        self.soak, self.command, self.name, self.chance = (
            soak,
            command,
            command.name,
            soak.chance(command.name),
        )
        self.seconds, self.changes, self.new = 0.0, 0, Files()
        self._kept = soak.root / "kept" / command.name

    def prepare(self) -> list[str]:
        """Run it undisturbed: its time, its changes of files, and its result."""
        counter = self.soak.root / "counter"
        self._reset()
        counter.write_bytes(b"")
        start = time.perf_counter()
        code, errors = self._start(partial(count_changes, str(counter))).end()
        if code:
            return [f"not killed: exit code {code}, {errors.strip()[-300:]}"]
        self.seconds, self.changes, self.new = (
            time.perf_counter() - start,
            counter.stat().st_size,
            files_of(self._root),
        )
        for name in self.command.made:
            target = self._kept / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (self._root / name).is_dir() else shutil.copy)(
                self._root / name, target
            )
        return []

    def kills(self, most: int) -> list[Kill]:
        """Kill it once or several times in a row, at most `most`, and run it to its end; none if it
        always ended.
        """
        for _ in range(TRIES):
            self._reset()
            if self.command.replaces and self.chance.random() < 0.5:
                self._make_old()
            before, kills = files_of(self._root), list[Kill]()
            while True:
                code, errors = self._killed()
                if kills:
                    kills[-1].resumed = RESUMED in errors
                if code != -signal.SIGKILL:
                    break
                now = files_of(self._root)
                kills.append(
                    Kill(self._phase(before, now), damage(before, now, self.new, self.command.made))
                )
                if len(kills) == most or self.chance.random() < 0.4:
                    code, errors = self._start().end()
                    kills[-1].resumed = RESUMED in errors
                    break
            problems = self._problems(code, errors)
            if kills:
                kills[-1].problems += problems
                return kills
            if problems:  # though it was not killed
                return [Kill(AFTER, problems)]
        return []

    @property
    def _root(self) -> Path:
        return self.soak.root / self.command.project

    def _reset(self) -> None:
        root = self.soak.restore(self.command.project)
        for name in (*self.command.made, *self.command.dropped):
            shutil.rmtree(root / name, ignore_errors=True)
            with suppress(OSError):
                (root / name).unlink()

    def _make_old(self) -> None:
        """An earlier result in its place: each file has one more line than it gets."""
        for name in self.command.made:
            kept, target = self._kept / name, self._root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if kept.is_dir() else shutil.copy)(kept, target)
            for path in target.rglob("*") if target.is_dir() else [target]:
                if path.is_file():
                    path.write_bytes(path.read_bytes() + b"\n")

    def _killed(self) -> tuple[int, str]:
        chance = self.chance
        if self.changes and chance.random() < 0.5:
            point = chance.randint(1, self.changes), chance.random() < 0.5
            running = self._start(partial(die_at_change, *point))
        else:
            running = self._start()
            running.ended(chance.uniform(0, self.seconds))
        _end_group(running, killed=not self._at_change)
        return running.end()

    def _start(self, first: Callable[[], object] | None = None) -> Forked:
        self._at_change = first is not None
        return self.soak.start(self.command.words, self.command.project, first)

    def _phase(self, before: Files, now: Files) -> str:
        known = before | self.new
        if any(_is_temporary(name, known) for name in now):
            return WHILE
        if _without_runs(now) == _without_runs(before):
            return BEFORE
        made = [below(now, name) == below(self.new, name) for name in self.command.made]
        return AFTER if (all(made) if made else now == self.new) else WHILE

    def _problems(self, code: int, errors: str) -> list[str]:
        """What a run that ended has left otherwise than an undisturbed one."""
        problems = [f"run again: exit code {code}, {errors.strip()[-300:]}"] * bool(code)
        problems += differences(files_of(self._root), self.new)
        problems += ["a lock was still held"] * ("waiting for process" in errors)
        for folder in (self._root / "runs").glob("*"):
            journal = run_state.read(folder)
            if run_state.alive(folder) or (journal is not None and journal.state == "running"):
                problems.append(f"runs/{folder.name} is still running")
        return problems


def _end_group(running: Forked, killed: bool) -> None:
    """Wait for a process that kills itself, or kill it; and all that it started."""
    pid = running.process.pid
    assert pid is not None
    if not killed:
        running.ended()
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if killed:
        with suppress(ProcessLookupError):  # before it had a group of its own
            running.process.kill()


# What answers


class Server:
    """Kills of `lora serve` over a project, while it starts, answers and loads an adapter."""

    name = "serve"
    PROMPTS = ("der hund", "die katze")

    def __init__(self, soak: Soak) -> None:
        self.soak, self.port, self.chance = soak, 0, soak.chance(self.name)
        self.seconds, self.answers, self.files = 0.0, list[str](), Files()

    def prepare(self) -> list[str]:
        self.soak.restore("models")
        self.files = files_of(self.soak.root / "models")
        answers = []
        for _ in range(2):
            running, start = self._serve(), time.perf_counter()
            answers.append(list(self._ask_all()))
            self.seconds = time.perf_counter() - start
            self._stop(running)
        self.answers = answers[1]
        changed = [] if answers[0] == answers[1] else ["undisturbed: its answers differ"]
        return changed + differences(files_of(self.soak.root / "models"), self.files)

    def kills(self, _most: int) -> list[Kill]:
        running = self._serve()
        timer = Timer(self.chance.uniform(0, self.seconds), _end_group, (running, True))
        timer.start()
        heard = 0
        with suppress(OSError, HTTPException):
            for _ in self._ask_all():
                heard += 1
        timer.join()
        running.end()
        problems = differences(files_of(self.soak.root / "models"), self.files)
        again = self._serve()
        if list(self._ask_all()) != self.answers:
            problems.append("started again, it answers otherwise")
        problems += self._stop(again)
        problems += differences(files_of(self.soak.root / "models"), self.files)
        phase = BEFORE if not heard else AFTER if heard == len(self.answers) else WHILE
        return [Kill(phase, problems)]

    def _serve(self) -> Forked:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = ("serve", "--port", str(self.port))
        running = self.soak.start(words, "models")
        until = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError):
                self._ask("/health")
                return running
            if running.ended(0.1) or time.monotonic() > until:
                raise SystemExit(f"lora serve did not start: {running.end()}")

    def _stop(self, running: Forked) -> list[str]:
        running.process.terminate()
        code, errors = running.end()
        return (
            [] if code == 128 + signal.SIGTERM else [f"stopped: exit code {code}, {errors[-300:]}"]
        )

    def _ask_all(self) -> Iterator[str]:
        """Greedy answers of all models, and of an adapter that is loaded by its path."""
        loads = {"lora_name": "again", "lora_path": "artifacts/lora_adapter"}
        models = [each["id"] for each in json.loads(self._ask("/v1/models"))["data"]]
        yield from models
        yield self._ask("/v1/load_lora_adapter", loads)
        for model in (*models, "again"):
            for prompt in self.PROMPTS:
                asked = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8}
                yield json.dumps(json.loads(self._ask("/v1/completions", asked))["choices"])

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            content = json.dumps(body) if body else None
            connection.request("POST" if body else "GET", path, content)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            return text
        finally:
            connection.close()


class Engine:
    """Kills of the terminal UI's inference process, while it loads and while it generates."""

    name = "inference process"
    TEXT = "der tisch"

    def __init__(self, soak: Soak) -> None:
        self.soak, self.chance = soak, soak.chance(self.name)
        self.seconds, self.answers, self.files = 0.0, list[str](), Files()

    def prepare(self) -> list[str]:
        root = self.soak.restore("models")
        self.files = files_of(root)
        self.answers, self.seconds = asyncio.run(self._undisturbed(root))
        return differences(files_of(root), self.files)

    def kills(self, _most: int) -> list[Kill]:
        root = self.soak.root / "models"
        answers, heard = asyncio.run(self._killed(root, self.chance.uniform(0, self.seconds)))
        problems = differences(files_of(root), self.files)
        if answers != self.answers:
            problems.append("started again, it answers otherwise")
        return [Kill(BEFORE if not heard else WHILE if heard < len(answers) else AFTER, problems)]

    async def _undisturbed(self, root: Path) -> tuple[list[str], float]:
        engine = Inference(root)
        await engine.ask("status")
        start = time.perf_counter()
        answers = [answer async for answer in self._ask_all(engine)]
        seconds = time.perf_counter() - start
        await engine.stop()
        return answers, seconds

    async def _killed(self, root: Path, seconds: float) -> tuple[list[str], int]:
        """All answers after a kill, and how many there were before it."""
        engine, heard = Inference(root), 0
        await engine.ask("status")
        pid = engine.pid
        assert pid is not None
        asyncio.get_running_loop().call_later(seconds, os.kill, pid, signal.SIGKILL)
        # to its end: the moment may come late on a machine that is not busy
        while engine.pid == pid:
            with suppress(WorkerDied):
                async for _ in self._ask_all(engine):
                    heard += 1
        answers = [answer async for answer in self._ask_all(engine)]
        await engine.stop()
        return answers, heard

    async def _ask_all(self, engine: Inference) -> AsyncIterator[str]:
        for name in ("base", "lora_adapter", "prefix"):
            place = {"base": f"artifacts/{name}"}
            if name != "base":
                place = {"base": "artifacts/expanded", "adapter": f"artifacts/{name}"}
            await engine.ask("load", name=name, **place)
            async with aclosing(
                engine.stream("generate", model=name, text=self.TEXT, limit=12)
            ) as answers:
                async for answer in answers:
                    yield json.dumps([answer.get("text"), answer.get("probability")])


@dataclass
class Row:
    """The kills of one command."""

    name: str
    seconds: float
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def all_problems(self) -> list[str]:
        return [*self.problems, *(problem for kill in self.kills for problem in kill.problems)]

    @property
    def cells(self) -> list[str]:
        phases = Counter(kill.phase for kill in self.kills)
        resumed = sum(kill.resumed for kill in self.kills)
        wrong = len(self.problems) + sum(bool(kill.problems) for kill in self.kills)
        numbers = (len(self.kills), phases[BEFORE], phases[WHILE], phases[AFTER], resumed, wrong)
        return [self.name, f"{self.seconds:.1f}", *map(str, numbers)]


HEADS = ("command", "seconds", "kills", BEFORE, WHILE, AFTER, "resumed", "changed")


def run(
    root: Path,
    count: int,
    seed: int,
    only: Sequence[str] = (),
    show: Callable[[str], object] = print,
    build: Callable[[Path], object] = build_models,
) -> list[Row]:
    """Kill `count` times, each command about as often; returns a row for each command.

    `only`: names of commands; default all.
    """
    chosen = [command for command in commands() if not only or command.name in only]
    services = [kind for kind in (Server, Engine) if not only or kind.name in only]
    soak = Soak(root, seed, build)
    targets: list[Written | Server | Engine] = [Written(soak, command) for command in chosen]
    targets += [kind(soak) for kind in services]
    shares = Counter({target.name: min(2, max(1, count // len(targets))) for target in targets})
    names = [target.name for target in targets]
    while shares.total() < count:
        shares[soak.chance(f"share {shares.total()}").choice(names)] += 1
    rows = []
    for target in targets:
        share = shares[target.name]
        problems = target.prepare()
        row = Row(target.name, target.seconds, problems=problems)
        while len(row.kills) < share and not row.problems:
            kills = target.kills(share - len(row.kills))
            row.kills += kills
            if not kills:
                row.problems.append("it ended before it was killed, each time")
        rows.append(row)
        show("  ".join(f"{cell:{width}}" for cell, width in zip(row.cells, WIDTHS, strict=True)))
        for problem in row.all_problems:
            show(f"    {problem}")
    return rows


WIDTHS = (28, *(len(head) for head in HEADS[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", metavar="COMMAND", help="A command of the table; repeatable."
    )
    given = parser.parse_args()
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        print("  ".join(f"{head:{width}}" for head, width in zip(HEADS, WIDTHS, strict=True)))
        rows = run(
            Path(folder).resolve(),
            given.kills,
            given.seed,
            given.only or (),
            partial(print, flush=True),
        )
    count = sum(len(row.kills) for row in rows)
    wrong = [row for row in rows if row.all_problems]
    print(f"{count} kills of {len(rows)} commands in {time.monotonic() - start:.0f} s: ", end="")
    print("0 bytes changed" if not wrong else f"{len(wrong)} commands did not recover")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
