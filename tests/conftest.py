"""Fixtures: projects that were run once, and `lora` called in this process."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

# Whatever is installed beside the program: its own tests are of the program alone.
os.environ.setdefault("LORA_NO_EXTENSIONS", "1")

from cli import console
from cli.main import main
from pipeline.files import digest_cache
from pipeline.project import process, provenance
from pipeline.stages.registry import GRAPH, open_project
from tests.helpers import fake_accelerator
from tests.helpers.checkpoints import ONE, OTHER, adapter, checkpoint
from tests.helpers.projects import (
    BRIEF,
    PIPELINE,
    ROOT,
    git,
    make,
    new_houses,
    new_project,
    shorten,
)

# The same examples each time, so that a run can be repeated; `--hypothesis-profile=search` looks
# for new ones.
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=400, print_blob=True)
settings.load_profile("default")
# a shell starts so what it runs in the background
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tests run side by side on few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so has what they start
# before any test computes: autograd counts devices at its first backward
STANDIN = fake_accelerator.register()

# The code does not change while tests run: finding it and asking git for its commit takes longer
# than a brief training.
provenance.code_files = cache(provenance.code_files)
provenance.commit = cache(provenance.commit)

Lora = Callable[..., tuple[int, str, str]]
Built = Callable[[str, Callable[[Path], object]], Path]


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook, and pytest the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that ask for a fixture of their module run in one worker, which makes it once;
    pictures of whole screens are slow. The other cases of a sample are left to `make test-all`.
    """
    cases = Counter[object]()
    for item in items:
        if (sampled := item.get_closest_marker("sampled")) and isinstance(item, pytest.Function):
            if cases[item.function] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
                item.add_marker(pytest.mark.rest)
            cases[item.function] += 1
        if "snap_compare" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
        fixtures = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
        of_module = any(
            fixture.scope == "module" for name in fixtures for fixture in fixtures[name]
        )
        if of_module and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(ROOT).as_posix()))
    if sample := os.environ.get("LORA_TEST_SAMPLE"):
        share, _, seed = sample.partition(":")
        left_out = [item for item in items if not _is_drawn(item, int(share), seed)]
        items[:] = [item for item in items if _is_drawn(item, int(share), seed)]
        config.hook.pytest_deselected(items=left_out)


def _is_drawn(item: pytest.Item, share: int, seed: str) -> bool:
    """Of the slow tests one in `share`, by their names: the same for one seed on every machine."""
    if not item.get_closest_marker("slow"):
        return True
    return zlib.crc32(f"{seed} {item.nodeid}".encode()) % share == 0


def pytest_collection_finish() -> None:
    """What was imported stays to the end: looking through it for garbage again and again took a
    fifth of a test.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # Python's own thresholds take a quarter of a screen's test


def unchanged(root: Path) -> Iterator[Path]:
    """A project that many tests read: one of them that writes would change what those after it
    see.
    """

    def files() -> dict[str, int]:
        return {
            str(each.relative_to(root)): each.stat().st_mtime_ns
            for each in root.rglob("*")
            if each.is_file()
        }

    before = files()
    yield root
    assert files() == before, "a test wrote to a project that is shared: give it `project`, a copy"


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are kept between processes: the developer's own are neither read nor
    written.
    """
    monkeypatch.setattr(digest_cache, "cache_home", lambda: tmp_path / ".cache")
    return tmp_path / ".cache/lora-workbench/digests.json"


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits the device that another asked for, or the developer does."""
    monkeypatch.setenv(process.VARIABLE, "")
    monkeypatch.setattr(process, "_by_option", False)
    monkeypatch.setattr(process, "_of_params", None)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test pulls the plug, so nothing has to wait for the disk; tests of fsync itself put one of
    their own here.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """`built(name, build)`: the folder that `build` filled, once a run: workers wait for the one
    that asked first.
    """
    top = tmp_path_factory.getbasetemp()
    # a worker's lies in the run's
    top = (top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / "built"

    def folder(name: str, build: Callable[[Path], object]) -> Path:
        root, done = top / name, top / f"{name}.done"
        top.mkdir(exist_ok=True)
        with FileLock(top / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(root, ignore_errors=True)  # what a build that failed has left
                root.mkdir()
                build(root)
                done.touch()
        return root

    return folder


@pytest.fixture(scope="session")
def finished(built: Built) -> Iterator[Path]:
    """The whole pipeline with the repository's params. Read it; a test that writes to it is an
    error at the end.
    """
    yield from unchanged(built("finished", lambda root: make(new_project(root), PIPELINE)))


@pytest.fixture(scope="session")
def brief(built: Built) -> Iterator[Path]:
    """The whole pipeline, two epochs each. Read it; a test that writes to it is an error at the
    end.
    """
    yield from unchanged(built("brief", lambda root: make(new_project(root), PIPELINE, BRIEF)))


@pytest.fixture(scope="session")
def houses(brief: Path, built: Built) -> Iterator[Path]:
    """A project and one that builds on it, two epochs each: the parent's stages as `brief` made
    them, and the child's.
    """

    def build(root: Path) -> None:
        shorten(new_houses(root), root / "child")
        for name in open_project(root / "params.yaml").stages:
            shutil.copytree(brief / GRAPH.stages[name].path, root / GRAPH.stages[name].path)
        make(root, ["evaluate"])  # of its own variants alone
        make(root / "child", [*open_project(root / "child/params.yaml").stages])

    yield from unchanged(built("houses", build))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that talks for seconds unless it is interrupted. Read it; do not write to it."""
    return checkpoint(tmp_path_factory.mktemp("endless") / "base", max_positions=16_384)


@pytest.fixture
def two_adapters(tmp_path: Path) -> Path:
    """A base, and the adapters `one` and `other` on it, as if made elsewhere."""
    base = checkpoint(tmp_path / "base")
    adapter(tmp_path / "one", base, ONE)
    adapter(tmp_path / "other", base, OTHER, seed=2)
    return tmp_path


@pytest.fixture
def project(brief: Path, tmp_path: Path) -> Path:
    """A copy of `brief` to change."""
    root = tmp_path / "project"
    shutil.copytree(brief, root)
    return root


@pytest.fixture(scope="session")
def origin(built: Built) -> Path:
    """The repository as it stands, committed."""
    return built("origin", _commit_all)


def _commit_all(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if name != "dvc.lock" and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lora:
    """Call `lora …` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    for stream in (console.stdout, console.stderr):  # rich reads COLUMNS once
        monkeypatch.setattr(stream, "_width", 100)
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")

    def call(*arguments: str, cwd: Path) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["lora", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def family(built: Built) -> Callable[[str], Path]:
    """A family's project by name, every stage run, embeddings in full. Read it; do not write to
    it.
    """
    from tests.helpers import families  # with transformers, which most tests do without

    def project(name: str) -> Path:
        kind = families.FAMILIES[name]
        return built(
            f"family-{name}", lambda root: make(families.new_project(root, kind), PIPELINE)
        )

    return project
