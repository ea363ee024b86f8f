"""What tests share: a project in a folder of its own, its stages run in process, and `lora` as a
user types it.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.project.params import edit
from pipeline.project.params.edit import remove_section
from pipeline.project.params.load import Params
from pipeline.project.runner import Event, Note, Work, run
from pipeline.stages import registry
from pipeline.stages.registry import GRAPH, open_project

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
STAGES = GRAPH.stages
CHILD = Path(__file__).with_name("child.yaml")
LORA = str(Path(sys.executable).parent / "lora")


WORK: dict[str, Work] = {name: stage.run for name, stage in STAGES.items()}
COMMAND = {
    "import": ["import"],
    "pretrain": ["pretrain"],
    "expand_vocab": ["expand-vocab"],
    **{stage.name: ["finetune", stage.method] for stage in registry.METHODS.values()},
    "train_from_scratch": ["train-from-scratch"],
    "merge": ["merge"],
    "evaluate": ["evaluate"],
}
METHODS = tuple(  # those of `lora finetune` that train one thing
    name
    for name, s in registry.METHODS.items()
    if s.name.startswith("finetune_") and s.kind != "adapters"
)


def new_project(folder: Path) -> Path:
    """The repository's params and data with the sections of `CHILD` as one project in `folder`,
    nothing made yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(all_params(), encoding="utf-8")
    shutil.copytree(ROOT / "data", folder / "data", dirs_exist_ok=True)
    return folder


def new_houses(root: Path) -> Path:
    """The repository's project, and below it in `child` one that builds on it."""
    (root / "child").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", root)
    shutil.copytree(ROOT / "data", root / "data")
    shutil.copy(CHILD, root / "child/params.yaml")
    return root


def shorten(*projects: Path, given: Mapping[str, Any] | None = None) -> None:
    """Write into each params file what `BRIEF`, or `given`, says of its own sections."""
    for params in (root / "params.yaml" for root in projects):
        own = yaml.safe_load(params.read_text(encoding="utf-8"))
        values = (given or GIVEN).items()
        save(params, {key: value for key, value in values if key.partition(".")[0] in own})


def all_params() -> str:
    """params.yaml and `CHILD` in one, which then needs no other project."""
    return joined((ROOT / "params.yaml"), CHILD)


def joined(parent: Path, child: Path) -> str:
    """The params of a project and of one that builds on it, as one project's."""
    _, _, own = child.read_text(encoding="utf-8").partition("project: ../params.yaml\n")
    sections = remove_section(own, "evaluate").replace("../data/", "data/")
    return f"{parent.read_text(encoding='utf-8')}\n{sections}"


def make(
    root: Path, stages: Sequence[str], overrides: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """Run stages in order in this process; returns the last one's manifest."""
    manifest: dict[str, Any] = {}
    for name in stages:
        manifest, _ = make_one(root, name, overrides, **options)
    return manifest


def make_one(
    root: Path, name: str, overrides: Sequence[str] = (), **options: Any
) -> tuple[dict[str, Any], list[Event]]:
    """Run one stage in this process; returns its manifest and its events.

    `pretrain` is the stage that makes the base, whether it trains or imports it.
    """
    project = open_project(root / "params.yaml", overrides)
    name = project.standing_for(name) if name == "pretrain" else name
    return played(run(project, STAGES[name], **options))


def make_base(root: Path, overrides: Sequence[str] = ()) -> Path:
    """The project, once it has an expanded base."""
    make(root, ["pretrain", "expand_vocab"], overrides)
    return root


def fresh(root: Path, stage: str) -> Path:
    """The project without what a stage made, its run and its checkpoints."""
    for name in (".lora-cache", f"runs/{stage}", STAGES[stage].path):
        shutil.rmtree(root / name, ignore_errors=True)
    return root


def section_overrides(stage: str, values: Mapping[str, object]) -> list[str]:
    return [f"{stage}.{key}={value}" for key, value in values.items()]


def note_texts(events: Iterable[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def played(events: Generator[Event, None, T]) -> tuple[T, list[Event]]:
    """What a generator returns, and what it yielded."""
    seen: list[Event] = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            return stop.value, seen


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def swept_weights(root: Path) -> dict[str, bytes]:
    """The tensors of a sweep's adapters, to the bit. Losses are summed with those of neighbours."""
    files = folder_bytes(root / "artifacts" / "sweep")
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def lora(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lora …` in a process of its own."""
    variables = {
        **os.environ,
        "TERMINAL_WIDTH": "100",
        "COLUMNS": "100",
        "_TYPER_FORCE_DISABLE_TERMINAL": "1",
    }
    return subprocess.run(
        [LORA, *arguments],
        cwd=cwd,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def refusal(answer: tuple[int, str, str]) -> str:
    """The one message of a command that did nothing."""
    code, out, err = answer
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


SEVERAL = """
import json, sys
from dvc.cli import main
for command in json.load(sys.stdin):
    code = main(command)
    assert code == 0, command
    print(end="\\x1e", flush=True)
"""


def dvc(folder: Path, *commands: str, code: Path | str = ROOT) -> list[str]:
    """What each `dvc …` says in a project, whose stages run the code in `code`; one process does
    all.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(code), "PATH": path},
        input=json.dumps([command.split() for command in commands]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *said, rest = done.stdout.split("\x1e")
    assert (len(said), rest) == (len(commands), "")
    return said


def wait_for(holds: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold in time"
        time.sleep(0.01)


def logged_memory(log: Path) -> tuple[int, int]:
    """The peak that was predicted and the one that was measured, of a telemetry.csv."""
    last = log.read_text(encoding="utf-8").splitlines()[-1]
    predicted, measured = map(int, last.split(",")[-2:])
    return predicted, measured


def cut_off(path: Path, count: int = 100) -> None:
    """Take the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-count])


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: writing past it fails as it does on a full
    disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def git(folder: Path, *arguments: str) -> None:
    """`git …` as somebody."""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def load(params: Path, overrides: Sequence[str] = ()) -> Params:
    """The settings in a params file."""
    return open_project(params, overrides).params


def save(params: Path, values: Mapping[str, Any]) -> None:
    """`section.key` → value written into a params file."""
    edit.save(params, values, GRAPH.sections)


# The stages of `new_project`.
PIPELINE = [name for name in STAGES if f"\n{name}:" in all_params()]
BRIEF = (
    "pretrain.epochs=2",
    "train_from_scratch.epochs=2",
    *(f"finetune_{method}.epochs=2" for method in METHODS if f"finetune_{method}" in PIPELINE),
    "finetune_sweep.grid={rank: [1, 2]}",
)
GIVEN: dict[str, Any] = {  # the same, to be written into a params file
    key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in BRIEF)
}
