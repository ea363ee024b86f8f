"""Runs with names: beside each other, kept, compared, taken again, removed, and found by name."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.project.cache import Cache
from pipeline.stages.registry import open_project
from pipeline.views.model_library import Library
from tests.conftest import Lora
from tests.helpers.projects import folder_bytes, refusal

ADAPTER = "artifacts/lora_adapter"
TRAIN = ("finetune", "lora", "--set", "finetune_lora.epochs=2")


def named(cli: Lora, project: Path, name: str, *values: str) -> dict[str, bytes]:
    """The adapter of a run with this name."""
    given = (part for value in values for part in ("--set", f"finetune_lora.{value}"))
    code, _, err = cli(*TRAIN, "--name", name, *given, cwd=project)
    assert code == 0, err
    return folder_bytes(project / ADAPTER)


def cache_of(project: Path) -> Cache:
    return Cache(open_project(project / "params.yaml").cache)


def test_two_named_runs_are_compared_and_the_first_comes_back_to_the_byte(
    project: Path, cli: Lora
) -> None:
    first = named(cli, project, "first", "rank=2", "eval_share=0.3")
    second = named(cli, project, "second", "rank=3", "learning_rate=0.01", "eval_share=0.3")
    assert first != second

    code, out, _ = cli("runs", "--json", cwd=project)
    names = {row["name"]: row["run"] for row in json.loads(out)}
    assert code == 0 and names.keys() >= {"first", "second"}
    assert names["first"].startswith("first: finetune_lora")

    code, out, _ = cli("runs", "compare", "first", "second", "--json", cwd=project)
    found = json.loads(out)
    assert code == 0 and found["runs"] == ["first", "second"]
    assert found["settings"] == {"rank": [2, 3], "learning_rate": [0.002, 0.01]}
    for name, numbers in found["curves"].items():
        assert (None in numbers) == (name == "held-out answers")
    for metrics in found["metrics"]:
        assert {"old_loss", "new_loss", "forgetting"} <= metrics.keys()
    shown = cli("runs", "compare", "first", "second", cwd=project)[1]
    assert "held-out loss" in shown and "answers" in shown and "is not evaluated" not in shown

    code, out, _ = cli("runs", "apply", "first", cwd=project)
    assert code == 0 and "+  rank: 2" in out
    assert folder_bytes(project / ADAPTER) == first


def test_what_has_a_name_outlives_the_cache_and_other_runs(project: Path, cli: Lora) -> None:
    first = named(cli, project, "first", "rank=2")
    named(cli, project, "second", "rank=3")
    shutil.rmtree(project / ADAPTER)
    cli("cache", "prune", cwd=project)
    entries = cache_of(project).entries()
    assert len(entries) == 2 and {entry.stage for entry in entries} == {"finetune_lora"}
    assert cli("runs", "apply", "first", cwd=project)[0] == 0
    assert folder_bytes(project / ADAPTER) == first

    code, out, _ = cli("runs", "remove", "first", cwd=project)
    assert code == 0 and out.startswith("first is removed, with ")
    assert len(cache_of(project).entries()) == 1
    assert folder_bytes(project / ADAPTER) == first, "the artifact stays"
    assert "no named run first. Known: second" in refusal(
        cli("runs", "remove", "first", cwd=project)
    )
    assert "There is no run first" in refusal(
        cli("runs", "compare", "first", "second", cwd=project)
    )


def test_two_names_of_one_result_share_it(project: Path, cli: Lora) -> None:
    made = named(cli, project, "one", "rank=2")
    assert named(cli, project, "another", "rank=2") == made
    for name in ("one", "another"):
        assert cli("runs", "apply", name, cwd=project)[0] == 0
    assert '"settings": {}' in cli("runs", "compare", "one", "another", "--json", cwd=project)[1]
    cli("runs", "remove", "one", cwd=project)
    cli("cache", "prune", cwd=project)
    assert [entry.stage for entry in cache_of(project).entries()] == ["finetune_lora"]


def test_a_name_stands_for_its_adapter(project: Path, cli: Lora, tmp_path: Path) -> None:
    named(cli, project, "first", "rank=2", "save_steps=4")
    named(cli, project, "second", "rank=3")
    for command in (
        ("prompt", "der hund", "--adapter", "first"),
        ("adapters", "verify", "first"),
        ("merge", "--adapter", "first", "--out", str(tmp_path / "merged")),
        ("export", "first", "--format", "peft", "--out", str(tmp_path / "peft")),
    ):
        code, _, err = cli(*command, cwd=project)
        assert code == 0, err
    measured = json.loads(cli("evaluate", "--adapter", "first", "--json", cwd=project)[1])
    assert measured.keys() == {"base", "first/lora_adapter"}
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 2
    listed = cli("adapters", cwd=project)[1]
    assert "first/lora_adapter" in listed and "  checkpoint-4" in listed
    library = Library(open_project(project / "params.yaml"))
    shown = {(entry.group, entry.label): library.check(entry) for entry in library.scan()}
    assert shown["first", "first/lora_adapter"].state == "verified"
    checkpoint = shown["first/lora_adapter", "first/lora_adapter/checkpoint-4"]
    assert checkpoint.state == "verified"
    assert shown["first", "first/lora_adapter"].verdict.forgetting is not None  # type: ignore[union-attr]


def test_a_whole_model_has_a_name_too(project: Path, cli: Lora) -> None:
    code, out, err = cli("finetune", "full", "--name", "whole", cwd=project)
    assert code == 0 and "whole: kept" in err
    assert "full_finetuned" in out
    said = refusal(cli("prompt", "der", "--adapter", "whole", cwd=project))
    assert "whole/full_finetuned" in said


def test_a_name_is_of_one_run(project: Path, cli: Lora) -> None:
    named(cli, project, "first", "rank=2")
    again = cli(*TRAIN, "--name", "first", "--set", "finetune_lora.rank=2", cwd=project)
    assert again[0] == 0 and "taken from the cache" in again[2]
    before = folder_bytes(project / ADAPTER)
    said = refusal(cli(*TRAIN, "--name", "first", "--set", "finetune_lora.rank=3", cwd=project))
    assert "first is a run already, with other settings: rank 2 → 3. Choose another name" in said
    said = refusal(cli(*TRAIN, "--name=first", "--set", "exclude_modules=v_proj", cwd=project))
    assert "exclude_modules none → v_proj" in said
    assert folder_bytes(project / ADAPTER) == before, "nothing was trained"


@pytest.mark.parametrize("name", ["a b", "../x", "", ".", "0123abcd", "finetune_lora", "x" * 65])
def test_a_name_that_cannot_be_is_one_message(project: Path, cli: Lora, name: str) -> None:
    said = refusal(cli(*TRAIN, f"--name={name}", cwd=project))
    assert said.startswith("error: --name must be at most 64 letters")


def test_numbers_of_other_evaluations_are_not_compared(project: Path, cli: Lora) -> None:
    named(cli, project, "first", "rank=2")
    named(cli, project, "second", "rank=3")
    text = (project / "params.yaml").read_text(encoding="utf-8")
    changed = text.replace(
        "new_data: data/finetune.de.txt", "new_data: data/fact_correction.de.txt"
    )
    assert changed != text
    (project / "params.yaml").write_text(changed, encoding="utf-8")
    out = cli("runs", "compare", "first", "second", cwd=project)[1]
    assert "first is not evaluated yet with evaluate's settings of now" in out
    code, _, err = cli("evaluate", "--adapter", "first", cwd=project)
    assert code == 0, err
    out = cli("runs", "compare", "first", "second", cwd=project)[1]
    assert "first is not evaluated" not in out and "second is not evaluated" in out
