"""dvc.yaml says what pipeline/project/stage_graph.py says, and DVC does with it what the README promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.project.dvc_yaml import command, render
from pipeline.project.params.edit import save
from pipeline.project.params.sections import load
from pipeline.project.provenance import code_files
from pipeline.project.stage_graph import STAGES, Project
from tests.support import BRIEF, COMMAND, METHODS, ROOT, git

DVC = str(Path(sys.executable).parent / "dvc")


def test_dvc_knows_all_that_a_stage_reads_runs_and_writes() -> None:
    """The committed file is the generated one, with comments of its own."""
    committed = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    lines = [line for line in committed.splitlines() if not line.startswith("#")]
    assert lines == render(Project(ROOT, load(ROOT / "params.yaml")), "pipeline").splitlines()


def test_what_a_study_teaches_as_the_sections_of_others_say_is_among_what_it_reads() -> None:
    """Else a changed file would leave the study as it was."""
    given = ["finetune_full.data=data/retain.de.txt", "scratch.data=[data/euro.en.jsonl]"]
    project = Project(ROOT, load(ROOT / "params.yaml", given))
    for study, files in (
        ("methods", {"data/retain.de.txt", "data/euro.en.jsonl"}),
        ("forgetting", {"data/retain.de.txt"}),
    ):
        assert files <= set(project.data_files(STAGES[f"study_{study}"]))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_the_command_that_the_program_has(name: str) -> None:
    assert command(STAGES[name]) == " ".join(["lora", *COMMAND[name]])


def test_code_files_are_those_that_python_imports() -> None:
    """The static walk finds every module of ours that importing a stage loads."""
    for module in {stage.module for stage in STAGES.values()}:
        code = f"import sys, {module}\nfor name in sys.modules: print(name)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        imported = {name for name in done.stdout.split() if name.split(".")[0] == "pipeline"}
        found = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in code_files(module)}
        assert imported <= {name.removesuffix(".__init__") for name in found}


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


def dvc(folder: Path, *arguments: str) -> str:
    """`dvc …` in a clone, whose own code the stages run."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [DVC, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_fresh_clones_give_the_same_lock_and_a_changed_rank_reruns_what_depends_on_it(
    origin: Path, tmp_path: Path
) -> None:
    brief = {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in BRIEF)}
    locks = []
    for name in ("one", "two"):
        git(tmp_path, "clone", "-q", str(origin), name)
        save(tmp_path / name / "params.yaml", brief)
        dvc(tmp_path / name, "repro")
        locks.append((tmp_path / name / "dvc.lock").read_bytes())
    assert locks[0] == locks[1]
    clone = tmp_path / "one"
    assert "Data and pipelines are up to date" in dvc(clone, "repro")

    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "lock")
    save(clone / "params.yaml", {"finetune_lora.rank": 2})
    assert "finetune_lora.rank" in dvc(clone, "params", "diff")
    ran = dvc(clone, "repro")
    studies = (f"study_{name}" for name in ("knowledge_correction", "methods", "forgetting"))
    concerned = ("finetune_lora", "finetune_sweep", "merge", "evaluate", *studies, "figures", "claims")
    for stage in STAGES:
        assert (f"Running stage '{stage}'" in ran) == (stage in concerned), ran

    shown = json.loads(dvc(clone, "metrics", "show", "--json"))
    metrics = shown[""]["data"]["artifacts/evaluation/metrics.json"]["data"]
    assert metrics["lora"]["trainable"] == 2_048 + 2 * 99 * 64
    changed = json.loads(dvc(clone, "metrics", "diff", "--json"))["artifacts/evaluation/metrics.json"]
    assert changed["lora.trainable"] == {"old": 16_768, "new": 14_720, "diff": -2_048}

    plot = json.loads(dvc(clone, "plots", "show", "--show-vega", "training_loss"))
    curves = {value["filename"] for value in plot["data"]["values"]}
    assert len(curves) == 1 + len(METHODS)
    page = Path(dvc(clone, "plots", "show").strip().removeprefix("file://"))
    assert page.read_text(encoding="utf-8").count('"loss (nats a token)"') >= 1
