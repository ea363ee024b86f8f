"""docs/how-to/share.md, as two people type it: the second one gets every result without training."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.tour import run
from pipeline.project.new_project import create
from pipeline.stages.registry import GRAPH
from tests.helpers.bases import toy_checkpoint
from tests.helpers.json_files import write_jsonl
from tests.helpers.projects import ROOT, dvc, folder_bytes, lora, save, shorten
from tests.helpers.s3 import USER, serving_s3

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs/how-to/share.md").read_text(encoding="utf-8")
ADAPTER = "artifacts/lora_adapter"


def commands(heading: str) -> str:
    """The commands below a heading of the page."""
    _, _, text = PAGE.partition(f"\n## {heading}\n")
    lines = re.findall(r"^    (.*)$", text.partition("\n## ")[0], re.MULTILINE)
    assert lines, heading
    return "\n".join(lines)


def ran(said: str) -> list[str]:
    """The stages that `dvc repro` ran."""
    return re.findall(r"^Running stage '(\w+)'", said, re.MULTILINE)


@pytest.fixture(autouse=True)
def somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom git and S3 know, and no settings of the developer's."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "t")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "t@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    for name, value in USER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serving_s3() as address:
        yield address


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages DVC has run."""
    folder = tmp_path_factory.mktemp("trained") / "owner"
    create(folder, GRAPH)
    shorten(folder)
    dvc(folder, "repro")
    return folder


@pytest.fixture(params=["folder", "S3"])
def shared(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The project that was pushed, and a clone of it with what was pulled."""
    owner, clone = tmp_path / "owner", tmp_path / "tickets"
    shutil.copytree(trained, owner, symlinks=True)
    push = commands("Push")
    folder = next(line for line in push.splitlines() if "remote add" in line)
    if request.param == "S3":
        remote = commands("Push to S3")
        remote = remote.replace("https://s3.example.org", request.getfixturevalue("s3"))
    else:
        remote = folder.replace("/mnt/team", str(tmp_path / "team"))
    run(push.replace(folder, remote), owner)

    pull = commands("Pull").replace("https://git.example.org/tickets.git", f"{owner} tickets")
    printed = run(pull, tmp_path)
    assert ran(printed) == [] and "Data and pipelines are up to date." in printed
    assert not (clone / "runs").exists() and not (clone / ".lora-cache").exists()
    assert "der hund " in printed and "report: " in printed
    return owner, clone


def changes(folder: Path) -> str:
    return run("git status --short", folder)


def answer(folder: Path, adapter: str = ADAPTER, **environment: str) -> dict[str, Any]:
    """What `lora prompt --json` prints, but for the adapter's path."""
    done = lora("prompt", "der hund", "--adapter", adapter, "--json", cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    del printed["adapter"]
    return printed


def test_a_clone_has_the_results_of_the_project_without_training(
    shared: tuple[Path, Path],
) -> None:
    owner, clone = shared
    expected = folder_bytes(owner / "artifacts")
    assert folder_bytes(clone / "artifacts") == expected
    assert answer(clone) == answer(owner)

    shutil.rmtree(clone / ADAPTER)
    (said,) = dvc(clone, "repro")
    assert ran(said) == [] and "'finetune_lora' is cached - skipping run" in said
    assert folder_bytes(clone / "artifacts") == expected

    done = lora("evaluate", cwd=clone)
    assert done.returncode == 0, done.stderr
    metrics = "evaluation/metrics.json"
    assert (clone / "artifacts" / metrics).read_bytes() == expected[metrics]
    assert changes(clone) == ""


def test_settings_that_somebody_trained_and_pushed_are_pulled_and_not_trained(
    shared: tuple[Path, Path],
) -> None:
    owner, clone = shared
    save(owner / "params.yaml", {"finetune_lora.rank": 2})
    run("dvc repro --quiet; git commit -qam rank; dvc push --run-cache", owner)
    of_rank_2 = folder_bytes(owner / ADAPTER)
    run("git checkout --quiet HEAD~1 -- .; dvc repro --quiet; git commit -qam back", owner)

    run("git pull --quiet; dvc pull --run-cache", clone)
    assert folder_bytes(clone / ADAPTER) != of_rank_2
    save(clone / "params.yaml", {"finetune_lora.rank": 2})
    other = shutil.copytree(clone, clone.with_name("without"), symlinks=True)
    (said,) = dvc(other, "repro")
    assert ran(said) == ["finetune_lora", "merge", "evaluate"], "nobody fetched what was trained"
    (said,) = dvc(clone, "repro --pull")
    assert ran(said) == ["evaluate"], "what it makes is in git, so that DVC's run cache has it not"
    assert folder_bytes(clone / ADAPTER) == of_rank_2


def test_a_base_inside_the_project_is_pushed_and_imported_once(tmp_path: Path) -> None:
    owner, clone = tmp_path / "owner", tmp_path / "clone"
    toy_checkpoint(owner / "data/BASE")
    rows = [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in range(20)]
    write_jsonl(owner / "data/rows.jsonl", rows)
    done = lora(
        "new", "owner", "--base", "owner/data/BASE", "--data", "owner/data/rows.jsonl", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    push = commands("Push").replace("/mnt/team", str(tmp_path / "team"))
    run(push.replace("dvc repro", f"dvc repro import; {commands('Before you begin')}"), owner)

    run(f"git clone --quiet {owner} {clone}", tmp_path)
    *_, said = dvc(clone, "pull data/BASE.dvc import", "repro import")
    assert ran(said) == []
    assert folder_bytes(clone / "data/BASE") == folder_bytes(owner / "data/BASE")
    assert folder_bytes(clone / "artifacts") == folder_bytes(owner / "artifacts")


@pytest.mark.parametrize("shared", ["folder"], indirect=True)
def test_a_named_run_stays_behind_unless_it_is_copied_or_the_cache_is_common(
    shared: tuple[Path, Path],
) -> None:
    owner, clone = shared
    given = ("--name", "r1", "--set", "finetune_lora.rank=1", "--set", "finetune_lora.epochs=2")
    assert lora("finetune", "lora", *given, cwd=owner).returncode == 0
    expected = answer(owner, "r1")
    assert lora("prompt", "der hund", "--adapter", "r1", cwd=clone).returncode == 1
    assert answer(clone, "r1", LORA_CACHE=str(owner / ".lora-cache")) == expected

    run(commands("What goes along, and what does not"), owner)
    run("git pull --quiet; dvc pull", clone)
    assert answer(clone, "adapters/r1") == expected
