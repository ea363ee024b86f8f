"""Which files a project's data are, and how rows get into what it trains on."""

import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.project.params.edit import save
from pipeline.stages.registry import GRAPH, open_project
from pipeline.views.data_files import (
    append_row,
    corrected_row,
    edited_name,
    other_file,
    other_files,
    project_files,
    spaced,
    ways_to_train,
)
from tests.helpers.projects import new_project

PARAMS = """\
training:
  max_length: 64
  window: 0
finetune_lora:
  data: [{path: data/mine.csv, columns: {prompt: question, completion: answer}}, data/more.jsonl]
  eval_data: data/heldout.jsonl
  retention_data: data/retain.de.txt
finetune_dpo:
  data: data/preferences.de.jsonl
evaluate:
  prompts: data/prompts.yaml
"""


@pytest.fixture
def data_project(tmp_path: Path) -> Path:
    new_project(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS, encoding="utf-8")
    return tmp_path


def test_files_come_with_what_reads_them_and_its_settings(data_project: Path) -> None:
    project = open_project(data_project / "params.yaml")
    files = project_files(project)
    assert "data/prompts.yaml" not in files, "prompts are no data"
    mine = files["data/mine.csv"]
    assert (mine.max_length, mine.columns) == (64, {"prompt": "question", "completion": "answer"})
    assert mine.readers == "lora" and files["data/heldout.jsonl"].readers == "lora: held-out"
    assert files["data/retain.de.txt"].readers == "lora: retention"
    assert files["data/preferences.de.jsonl"].readers == "dpo"
    assert mine.base == "", "there is no model yet"
    (data_project / "artifacts/base").mkdir(parents=True)
    assert project_files(project)["data/mine.csv"].base == "artifacts/base"


def test_other_files_are_those_of_data_that_the_formats_read(data_project: Path) -> None:
    for name in (
        "data/a.parquet",
        "data/b.jsonl.gz",
        "data/c.parquet.gz",
        "data/.d.txt",
        "data/e.md",
    ):
        (data_project / name).touch()
    project = open_project(data_project / "params.yaml")
    others = other_files(data_project, project_files(project))
    assert {"data/a.parquet", "data/b.jsonl.gz"} <= set(others)
    assert not {
        "data/c.parquet.gz",
        "data/.d.txt",
        "data/e.md",
        "data/prompts.yaml",
        "data/retain.de.txt",
    } & set(others)
    assert other_files(data_project / "nowhere", {}) == []
    assert other_file(project, "data/a.parquet").max_length == 64, "as fine-tuning would read it"
    assert other_file(None, "x.txt").request()["path"] == "x.txt"


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("data/a.jsonl", "data/a.edited.jsonl"),
        ("data/a.de.txt", "data/a.de.edited.jsonl"),
        ("data/a.csv.gz", "data/a.edited.jsonl"),
        ("a.parquet", "a.edited.jsonl"),
        ("data/a.edited.jsonl", "data/a.edited.jsonl"),
    ],
    ids=["jsonl", "txt", "gz", "parquet", "edited"],
)
def test_an_edited_copy_has_a_name_of_its_own(name: str, copy: str) -> None:
    assert edited_name(name) == copy


def test_rows_are_appended_whole_lines_and_to_rows_that_they_may_stand_beside(
    tmp_path: Path,
) -> None:
    path, row = tmp_path / "new/c.jsonl", json.dumps({"prompt": "a", "completion": "b"})
    append_row(path, "c.jsonl", row)
    # as an editor leaves it
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    append_row(path, "c.jsonl", '{"messages": []}')
    assert path.read_text(encoding="utf-8") == f'{row}\n{{"messages": []}}\n'
    path.write_text(
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
    )
    before = path.read_bytes()
    with pytest.raises(UserError, match="has rows of sharegpt, and this one is prompt_completion"):
        append_row(path, "c.jsonl", row)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"a \.jsonl file"):
        append_row(tmp_path / "c.csv", "c.csv", row)


def test_a_completion_does_not_become_part_of_the_prompts_last_word() -> None:
    assert spaced({"prompt": "der hund", "completion": "bellt"})["completion"] == " bellt"
    for prompt, completion in (
        ("der hund ", "bellt"),
        ("der hund", " bellt"),
        ("日本", "語"),
        ("Is it?", "Yes"),
    ):
        assert spaced({"prompt": prompt, "completion": completion})["completion"] == completion
    assert spaced({"messages": []}) == {"messages": []}


def test_an_answer_is_a_prompt_and_its_completion_only_without_a_chat_template() -> None:
    asked, answered = (
        {"role": "user", "content": "der hund"},
        {"role": "assistant", "content": "bellt"},
    )
    record = {"messages": [asked, answered]}
    assert corrected_row(record, has_template=True) == record
    row = corrected_row(record, has_template=False)
    assert row == {"prompt": "der hund", "completion": " bellt"}
    longer = {"messages": [asked, answered] * 2}
    assert corrected_row(longer, has_template=False) == longer


def test_a_stage_trains_on_a_file_besides_its_data_or_instead_of_one(data_project: Path) -> None:
    project = open_project(data_project / "params.yaml")
    ways = ways_to_train(project, "data/new.jsonl")
    assert ways.keys() == {"finetune_lora.data"}, "a correction is no pair for dpo"
    save(data_project / "params.yaml", ways["finetune_lora.data"], GRAPH.sections)
    project = open_project(data_project / "params.yaml")
    assert project.params.finetune_lora.files == (
        "data/mine.csv",
        "data/more.jsonl",
        "data/new.jsonl",
    )
    assert ways_to_train(project, "data/new.jsonl") == {}
    (values,) = ways_to_train(project, "data/mine.edited.jsonl", "data/mine.csv").values()
    save(data_project / "params.yaml", values, GRAPH.sections)
    assert (
        open_project(data_project / "params.yaml").params.finetune_lora.files[0]
        == "data/mine.edited.jsonl"
    )
