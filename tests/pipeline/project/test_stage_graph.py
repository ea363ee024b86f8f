"""dvc.yaml says what the stage graph says, and DVC does with it what the README promises."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.project import provenance
from pipeline.project.dvc_yaml import HEADER, render_code_yaml, render_dvc_yaml
from pipeline.project.provenance import code_files
from pipeline.stages.registry import open_project
from tests.helpers.extension import install, load
from tests.helpers.projects import CHILD, COMMAND, ROOT, STAGES, dvc, git, make, save, shorten


def test_dvc_knows_all_that_a_stage_reads_runs_and_writes() -> None:
    """The committed file is the generated one, with comments of its own."""
    committed = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    lines = [line for line in committed.splitlines() if not line.startswith("#")]
    assert lines == render_dvc_yaml(open_project(ROOT / "params.yaml"), "pipeline").splitlines()
    for text in (committed, HEADER):
        assert "pipeline/project/dvc_yaml.py" in text.splitlines()[0], "where a dependency is from"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_the_command_that_the_program_has(name: str) -> None:
    assert STAGES[name].command == " ".join(["lora", *COMMAND[name]])


IMPORTED = """
import importlib, os, sys
import matplotlib.pyplot, torch, transformers  # once: they take most of the time
for module in sys.argv[1:]:
    child = os.fork()
    if not child:  # where nothing of ours is imported yet
        importlib.import_module(module)
        print(module, *(name for name in sys.modules if name.split(".")[0] == "pipeline"), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
"""


@pytest.mark.slow
def test_code_files_are_those_that_python_imports() -> None:
    """The static walk finds every module of ours that importing a stage loads, but those that a
    registry finds.
    """
    found_by_registry = "pipeline.stages.methods."
    modules = sorted({stage.module for stage in STAGES.values()})
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == modules
    for module, *imported in lines:
        found = {
            ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in code_files(module)
        }
        assert module in imported
        statically = {name.removesuffix(".__init__") for name in found}
        assert {
            name for name in imported if not name.startswith(found_by_registry)
        } <= statically, module


@pytest.mark.slow
def test_code_files_are_found_while_another_thread_parses() -> None:
    """In a process of its own, which switches threads often."""
    code = """
import gc, inspect, sys, threading, time
from pipeline.project.provenance import code_files
done = threading.Event()
def parse():
    while not done.is_set():
        try:
            inspect.signature(dict.get)  # parses the signature's text
        except SystemError:
            pass  # what CPython 3.11 may say of two that parse; here it is of no interest
thread = threading.Thread(target=parse)
thread.start()
sys.setswitchinterval(1e-5)
gc.callbacks.append(lambda *_: time.sleep(0))
gc.set_threshold(50)
try:
    for _ in range(5):
        assert code_files("pipeline.stages.finetune")
finally:
    done.set()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("text", ["def read(:\n", "x = 1\0\n"])
def test_a_file_that_python_cannot_read_counts_by_its_content_alone(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extension that cannot be imported is left out; it does not stop what reads data."""
    files = {"qa_rows/__init__.py": "", "qa_rows/rows.py": text}
    load(monkeypatch, install(tmp_path, {"data_format.qa": "qa_rows.rows"}, files))
    code = STAGES["pretrain"].code
    assert tmp_path / "qa_rows/rows.py" in provenance.code_files(*code)
    before = provenance.code_digest(*code)
    (tmp_path / "qa_rows/rows.py").write_text("x = 2\n", encoding="utf-8")
    assert provenance.code_digest(*code) != before


def test_the_code_of_an_extension_that_is_one_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, install(tmp_path, {"stage.one": "one_file"}, {"one_file.py": "x = 1\n"}))
    assert provenance.code_files("one_file") == [tmp_path / "one_file.py"]
    before = provenance.code_digest("one_file")
    (tmp_path / "one_file.py").write_text("x = 2\n", encoding="utf-8")
    assert provenance.code_digest("one_file") != before


def test_what_imports_nothing_of_ours_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a file's name git would tell the last commit of all."""
    files = {"alone/__init__.py": "", "alone/probe.py": "def run(job):\n    yield from ()\n"}
    load(monkeypatch, install(tmp_path, {"stage.probe": "alone.probe"}, files))
    assert provenance.commit("alone.probe") is None


CONCERNED = ("finetune_lora", "merge", "evaluate")  # by a changed rank of LoRA


@pytest.mark.slow
def test_what_dvc_was_told_of_is_up_to_date_and_a_changed_rank_concerns_what_depends_on_it(
    houses: Path, origin: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(origin), "clone")
    shutil.copytree(houses / "artifacts", clone / "artifacts", dirs_exist_ok=True)
    shorten(clone)
    _, status = dvc(clone, "commit -f", "status")  # as if DVC had run the stages
    assert "Data and pipelines are up to date" in status

    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "lock")
    save(clone / "params.yaml", {"finetune_lora.rank": 2})
    make(clone, ["finetune_lora", "merge", "evaluate"])
    params, status, shown, changed, plot, page = dvc(
        clone,
        "params diff",
        "status --json",
        "metrics show --json",
        "metrics diff --json",
        "plots show --show-vega training_loss",
        "plots show",
    )
    assert "finetune_lora.rank" in params
    assert json.loads(status).keys() == set(CONCERNED)

    metrics = json.loads(shown)[""]["data"]["artifacts/evaluation/metrics.json"]["data"]
    assert metrics["lora"]["trainable"] == 2_048 + 2 * 99 * 64
    difference = json.loads(changed)["artifacts/evaluation/metrics.json"]["lora.trainable"]
    assert difference == {"old": 16_768, "new": 14_720, "diff": -2_048}

    curves = {value["filename"] for value in json.loads(plot)["data"]["values"]}
    assert len(curves) == 3
    drawn = Path(page.strip().removeprefix("file://")).read_text(encoding="utf-8")
    assert drawn.count('"loss (nats per token)"') >= 1


@pytest.mark.slow
@pytest.mark.rest
def test_two_fresh_clones_give_the_same_locks_and_a_changed_rank_reruns_what_depends_on_it(
    origin: Path, tmp_path: Path
) -> None:
    locks = []
    for name in ("one", "two"):
        git(tmp_path, "clone", "-q", str(origin), name)
        root = tmp_path / name
        _add_child(root)
        shorten(root, root / "child")
        dvc(root, "repro", code=root)
        dvc(root / "child", "repro", code=root)
        locks.append([(folder / "dvc.lock").read_bytes() for folder in (root, root / "child")])
    assert locks[0] == locks[1]
    root = tmp_path / "one"
    for folder in (root, root / "child"):
        (ran,) = dvc(folder, "repro", code=root)
        assert "Data and pipelines are up to date" in ran
    save(root / "params.yaml", {"finetune_lora.rank": 2})
    (ran,) = dvc(root, "repro", code=root)
    for stage in open_project(root / "params.yaml").stages:
        assert (f"Running stage '{stage}'" in ran) == (stage in CONCERNED), ran


def _add_child(root: Path) -> None:
    """A project in a folder of the repository that builds on the repository's."""
    (root / "child").mkdir()
    shutil.copy(CHILD, root / "child/params.yaml")
    child = open_project(root / "child/params.yaml")
    (root / "child/dvc.yaml").write_text(render_dvc_yaml(child), encoding="utf-8")
    (root / "child/code.yaml").write_text(render_code_yaml(child), encoding="utf-8")
