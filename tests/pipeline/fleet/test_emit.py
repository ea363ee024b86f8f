"""Files for schedulers: what they say to bash, their schemas, and what can be run of them here."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.fleet.emit import emit
from pipeline.fleet.formats import FORMATS, MARK
from pipeline.fleet.settings import Cluster
from pipeline.fleet.unit import Unit
from pipeline.project.cache import ADAPTERS
from tests.helpers.projects import BRIEF, LORA, lora, make_base, new_project, swept_weights
from tests.helpers.schedulers import KUBEFLOW, SKY, TORCHX, checked, python_with_schedulers
from tests.helpers.slurm import cluster

HOSTILE = [
    "--set=a='q' \"d\" `touch pwned` $(touch pwned) ${app_id} $(LORA_CACHE) $LORA_CACHE $$ $$$",
    "two\nlines\n$",
    "ü ${rank0_env} \\ # ; touch pwned; *",
    "",
]
OPTUNA = ["--set=finetune_sweep.search=optuna", "--set=finetune_sweep.trials=4"]
OPTUNA += ["--set=finetune_sweep.generation=2", "--set=finetune_lora.eval_share=0.3"]
FOLDER = "it's $app_id $(LORA_CACHE) ü"
POOL = Cluster(gpus=2, cpus=8, memory="1500M", setup=("export GREETING=hello",), at_once=4)
GIVEN: dict[str, Mapping[str, str]] = {
    "slurm": {"partition": "gpu"},
    "sky": {"bucket": "s3://mine", "gpu": "H100", "image": "me/lora"},
    "kubeflow": {"image": "me/lora", "claim": "projects", "namespace": "ml"},
    "torchx": {},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("emit") / "mini"), BRIEF)


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    root = tmp_path / FOLDER
    shutil.copytree(made, root)
    return root


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `lora`, and a Python, that writes where it runs, its variables and its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "lora"
    told = '"$PWD" "$LORA_CACHE" "$LORA_WORK" "$GREETING" "$@"'
    program.write_text(f"#!/bin/bash\nprintf '%s\\0' {told} > {folder}/told\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("GREETING", "")
    return folder / "told"


def units_in(root: Path, count: int = 2, nodes: int = 1) -> list[Unit]:
    root.mkdir(exist_ok=True)
    cache = str(root / ".lora-cache")
    return [
        Unit([*HOSTILE, str(n)], f"label\n{n}", str(root), "finetune_lora", cache, nodes)
        for n in range(1, count + 1)
    ]


def written(name: str, units: Sequence[Unit], folder: Path) -> list[Path]:
    return emit(name, units, POOL, GIVEN[name], folder)[0]


def kubernetes(text: str) -> str:
    """What Kubernetes makes of a container's command."""
    known = {"LORA_CACHE": "replaced"}

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return known.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)


def scripts(name: str, files: Sequence[Path]) -> list[str]:
    """What bash gets for each unit, and for the slurm script the whole of it."""
    if name == "slurm":
        return [files[0].read_text()]
    documents = [yaml.safe_load(file.read_text()) for file in files]
    if name == "sky":
        return [document["run"] for document in documents]
    return [kubernetes(document["spec"]["trainer"]["command"][2]) for document in documents]


def ran(script: str, folder: Path, told: Path, **variables: str) -> list[str]:
    told.unlink(missing_ok=True)
    environment = {**os.environ, **variables}
    subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=True)
    return told.read_text().split("\0")[:-1]


# What bash gets


@pytest.mark.parametrize("name", ["slurm", "sky", "kubeflow"])
def test_hostile_names_reach_lora_as_they_are(name: str, tmp_path: Path, tell: Path) -> None:
    root = tmp_path / FOLDER
    texts = scripts(name, written(name, units_in(root), tmp_path / "out"))
    shared = "/lora" if name == "sky" else str(root)
    if name == "sky":  # no such folder is here
        texts = [text.replace("mkdir -p", "true") for text in texts]
    place, cache, work, greeting, *arguments = ran(texts[0], root, tell, SLURM_ARRAY_TASK_ID="1")
    assert arguments[-len(HOSTILE) - 1 :] == [*HOSTILE, "1"]
    assert (place, greeting) == (str(root), "hello")
    assert (Path(cache).parent, Path(work).is_relative_to(shared)) == (Path(shared), True)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("sky", {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}),
        (
            "kubeflow",
            {"PET_MASTER_ADDR": "10.0.0.1", "PET_MASTER_PORT": "29500", "PET_NODE_RANK": "1"},
        ),
    ],
)
def test_machines_of_a_gang_meet_by_the_schedulers_variables(
    name: str, variables: dict[str, str], tmp_path: Path, tell: Path
) -> None:
    units = units_in(tmp_path / "project", 1, nodes=2)
    (text,) = scripts(name, written(name, units, tmp_path / "out"))
    text = text.replace("mkdir -p", "true")
    arguments = ran(text, tmp_path / "project", tell, **variables)
    meet = ["--nnodes=2", "--rdzv-endpoint=10.0.0.1:29500", "--node-rank=1"]
    assert arguments[-3:] == meet


# What is written


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_files_say_that_they_are_ours_and_replace_only_such(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = written(name, units_in(tmp_path / "project", 3), out)
    for file in files:
        (line,) = [line for line in file.read_text().splitlines() if line.startswith(MARK)]
        assert re.search(r"Checked .*, never run\.|Run .*(never on a cluster|by no other)\.", line)
    foreign = out / "mine.yaml"
    foreign.write_text("a: 1\n")
    files = written(name, units_in(tmp_path / "project", 1), out)
    assert sorted(out.iterdir()) == sorted([*files, foreign])
    files[0].write_text("mine\n")
    with pytest.raises(UserError, match=r"was not made by `lora fleet emit`\. Name another --out"):
        written(name, units_in(tmp_path / "project", 1), out)
    assert files[0].read_text() == "mine\n"


def test_a_sweep_is_divided_and_methods_take_seeds(project: Path) -> None:
    grid = ["--grid", "rank=1,2,4", "--grid", "seed=0,1"]
    told = lora(
        "fleet", "emit", "sky", "sweep", *grid, "--parts", "4", "--option", "cache=/c", cwd=project
    )
    assert told.returncode == 0, told.stderr
    files = sorted((project / "fleet-sky").glob("*.yaml"))
    tasks = [yaml.safe_load(file.read_text()) for file in files]
    only = [re.search(r"--only (\S+)", task["run"]) for task in tasks]
    names = [match[1].split(",") for match in only if match]
    assert [len(part) for part in names] == [2, 2, 1, 1] and len(set(chain(*names))) == 6
    assert len({re.findall(r"LORA_WORK=(\S+)", task["run"])[0] for task in tasks}) == 4
    assert "submit: for file in fleet-sky/*.yaml; do sky jobs launch" in told.stdout

    vary = ["--vary", "seed=0,1", "--devices", "2", "--nnodes", "2"]
    told = lora(
        "fleet", "emit", "kubeflow", "lora", "full", *vary, "--option", "image=x", cwd=project
    )
    assert told.returncode == 0, told.stderr
    jobs = [yaml.safe_load(file.read_text()) for file in (project / "fleet-kubeflow").iterdir()]
    runs = [job["spec"]["trainer"]["command"][2] for job in jobs]
    found = {
        re.findall(r"finetune (\w+) .*--devices=2 .*--set=\w+\.(seed=\d)", run)[0] for run in runs
    }
    assert found == {(m, f"seed={n}") for m in ("lora", "full") for n in (0, 1)}
    assert {job["spec"]["trainer"]["numNodes"] for job in jobs} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pbs", "lora"], "pbs is not a format. There is kubeflow, sky, slurm, torchx"),
        (["sky", "lora"], "sky needs a folder of results .* Add --option bucket=s3://NAME, or"),
        (["kubeflow", "lora"], "kubeflow needs image, got none. Add --option image="),
        (["torchx", "lora", "--option", "images=x"], "--option images=x: torchx takes KEY=VALUE"),
        (["torchx", "lora", "--grid", "rank=1"], "--grid and --parts are of a sweep"),
        (["torchx", "sweep", "--nnodes", "2"], "A sweep's unit runs on one device"),
        (
            ["slurm", "lora", "--option", "comment=a\nb"],
            "slurm: comment='a.nb' is no option of one",
        ),
        (
            ["torchx", "sweep", "--parts", "2", *OPTUNA],
            "they have one unit. Leave out --parts, or use --on",
        ),
        (["torchx", "lora", "--on", "nowhere"], "has no such cluster"),
    ],
)
def test_what_cannot_be_emitted_is_refused(
    project: Path, arguments: list[str], message: str
) -> None:
    told = lora("fleet", "emit", *arguments, cwd=project)
    assert told.returncode == 1 and re.search(message, told.stderr), told.stderr
    assert not list(project.glob("fleet-*"))


def test_what_is_needed_has_to_be_there(tmp_path: Path) -> None:
    root = new_project(tmp_path / "new")
    told = lora("fleet", "emit", "torchx", "lora", cwd=root)
    assert told.returncode == 1 and "expand" in told.stderr, told.stderr


# Their schemas


@pytest.mark.slow
def test_skypilot_reads_the_tasks(tmp_path: Path) -> None:
    units = units_in(tmp_path / FOLDER, 2, nodes=2)
    tasks = checked(SKY, *written("sky", units, tmp_path / "out"))
    assert [task["name"] for task in tasks] == [f"{tasks[0]['name'][:-1]}{n}" for n in (1, 2)]
    for task in tasks:
        (resources,) = task["resources"]
        assert (task["nodes"], task["mounts"]) == (2, ["/lora"])
        assert (resources["accelerators"], resources["cpus"]) == ({"H100": 2}, "8+")
        assert (resources["memory"], resources["image_id"]) == ("2+", {"null": "docker:me/lora"})


@pytest.mark.slow
def test_kubeflows_models_know_the_jobs(tmp_path: Path) -> None:
    units = units_in(tmp_path / FOLDER, 2, nodes=2)
    for job in checked(KUBEFLOW, *written("kubeflow", units, tmp_path / "out")):
        trainer = job["spec"]["trainer"]
        assert job["metadata"]["namespace"] == "ml" and trainer["numNodes"] == 2
        assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "2"


@pytest.mark.slow
def test_torchx_takes_the_component_and_bash_gets_hostile_names(
    tmp_path: Path, tell: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / FOLDER
    (file,) = written("torchx", units_in(root, 2, nodes=2), tmp_path / "out")
    monkeypatch.undo()
    apps = checked(TORCHX, file, 1, 2)
    for number, app in enumerate(apps, 1):
        assert (app["nodes"], app["resource"]) == (2, [8, 2, 1500])
        variables = {"FIRST": "10.0.0.1", "PATH": f"{tell.parent}:{os.environ['PATH']}"}
        place, cache, _, greeting, *arguments = ran(app["args"][1], root, tell, **variables)
        meet = ["--nnodes=2", "--rdzv-endpoint=10.0.0.1:29500", "--node-rank=1"]
        assert (place, cache) == (str(root), str(root / ".lora-cache"))
        assert (greeting, arguments) == ("hello", [*HOSTILE, str(number), *meet])
    assert not list(tmp_path.rglob("pwned"))


# What runs here


@pytest.mark.slow
def test_torchx_runs_a_unit_and_its_result_is_in_the_cache(project: Path) -> None:
    told = lora("fleet", "emit", "torchx", "lora", "--set", "finetune_lora.epochs=1", cwd=project)
    assert told.returncode == 0, told.stderr
    torchx = python_with_schedulers().with_name("torchx")
    command = ["run", "--scheduler", "local_cwd", "--wait", "fleet-torchx/units.py:unit"]
    path = f"{Path(LORA).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [torchx, *command, "--number", "1"],
        cwd=project,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCEEDED" in done.stdout + done.stderr
    told = lora("finetune", "lora", "--set", "finetune_lora.epochs=1", cwd=project)
    assert told.returncode == 0 and "from the cache" in told.stderr, told.stderr


@pytest.mark.slow
def test_slurm_runs_the_script_and_puts_a_job_back_at_usr1(project: Path, tmp_path: Path) -> None:
    grid = ["--grid", "rank=1,2", "--set", "finetune_lora.epochs=400"]
    with cluster(tmp_path / "slurm") as slurm:
        told = lora("fleet", "emit", "slurm", "sweep", *grid, "--parts", "2", cwd=project)
        assert told.returncode == 0, told.stderr
        submit = told.stdout.splitlines()[-1].removeprefix("submit: ")
        subprocess.run(["bash", "-c", submit], cwd=project, env=slurm.environment, check=True)
        unit = "runs/finetune_sweep/fleet/*/units/1/runs/finetune_sweep"
        slurm.wait_for(lambda: list(project.glob(f"{unit}/**/loss.csv")))
        slurm.run("scancel", "--batch", "--signal=USR1", "1_1")  # as before a time limit
        slurm.wait_for(lambda: len(kept(project)) == 2, 240.0)
        slurm.wait_for(lambda: all(job.state == "COMPLETED" for job in slurm.jobs()), 60.0)
        assert max(job.restarts for job in slurm.jobs()) >= 1
    logs = [path.read_text() for path in (project / "fleet-slurm").glob("slurm-*.log")]
    assert len(logs) == 2 and any("resumed after step" in log for log in logs), logs
    told = lora("finetune", "sweep", *grid, cwd=project)
    assert told.returncode == 0 and "2 of 2 adapters are taken from the cache" in told.stderr
    assert len(swept_weights(project)) == 2


def kept(root: Path) -> list[Any]:
    return list((root / ".lora-cache" / ADAPTERS).glob("[!.]*/"))
