"""Writes to params files from the screens: dvc.yaml goes with them, and the last is taken back."""

from pathlib import Path

from pipeline.project.dvc_yaml import HEADER, render_dvc_yaml
from pipeline.stages.registry import open_project
from pipeline.views.data_files import ways_to_train
from tests.helpers.projects import new_project
from tui.services.param_edits import ParamEdits, follows_params


def test_dvc_yaml_follows_what_is_written_and_what_is_taken_back(tmp_path: Path) -> None:
    """It counts the files in a list, and `dvc repro` fails where it counts others."""
    params = new_project(tmp_path) / "params.yaml"
    (tmp_path / "dvc.yaml").write_text(
        HEADER + render_dvc_yaml(open_project(params)), encoding="utf-8"
    )
    before, edits = (tmp_path / "dvc.yaml").read_text(encoding="utf-8"), ParamEdits()
    ways = ways_to_train(open_project(params), "data/new.jsonl")
    assert ways["finetune_lora.data"]["expand_vocab.data"][-1] == "data/new.jsonl", (
        "MiniGPT needs a row for new words"
    )
    edits.save(params, ways["finetune_lora.data"])
    assert "${finetune_lora.data[1]}" in (tmp_path / "dvc.yaml").read_text(
        encoding="utf-8"
    ) and follows_params(params)
    edits.undo()
    assert (tmp_path / "dvc.yaml").read_text(encoding="utf-8") == before
    (tmp_path / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    edits.save(params, ways["finetune_lora.data"])
    assert (tmp_path / "dvc.yaml").read_text(encoding="utf-8") == "stages: {}\n", (
        "what is the user's own stays"
    )
