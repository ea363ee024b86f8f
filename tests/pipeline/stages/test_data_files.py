"""Training on data files of every container, on several with weights, and what is said of a hub
data set.
"""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.project.dvc_yaml import render_dvc_yaml
from pipeline.stages.registry import open_project
from tests.helpers.containers import TEXT_WRITERS
from tests.helpers.errors import user_error
from tests.helpers.json_files import write_json, write_jsonl
from tests.helpers.projects import BRIEF, ROOT, make, make_one
from tests.helpers.real import notes

LINES = (ROOT / "data/finetune.de.txt").read_text(encoding="utf-8").splitlines()
WEIGHTS = "artifacts/lora_adapter/adapter_model.safetensors"


def weights_after(project: Path, data: str, *overrides: str) -> bytes:
    make(project, ["finetune_lora"], [*BRIEF, f"finetune_lora.data={data}", *overrides], force=True)
    return (project / WEIGHTS).read_bytes()


def test_the_same_sentences_give_the_same_adapter_from_every_container(project: Path) -> None:
    plain = weights_after(project, "data/finetune.de.txt")
    for name in ("d.csv", "d.parquet", "saved", "d.JSONL.zst"):
        TEXT_WRITERS[name]([{"text": line} for line in LINES], project / "data" / name)
        assert weights_after(project, f"data/{name}") == plain
        assert f"data/{name}" in read_manifest(project / "artifacts/lora_adapter")["inputs"]
    rows = [{"body": line, "id": str(n)} for n, line in enumerate(LINES)]
    TEXT_WRITERS["d.tsv"](rows, project / "data/d.tsv")
    assert weights_after(project, "data/d.tsv", "finetune_lora.columns={text: body}") == plain
    assert weights_after(project, "[{path: data/d.tsv, columns: {text: body}}]") == plain


def test_a_weight_changes_how_often_a_file_is_seen(project: Path) -> None:
    def steps(data: str) -> int:
        weights_after(
            project,
            data,
            "finetune_lora.window=0",
            "finetune_lora.batch_size=1",
            "finetune_lora.epochs=1",
        )
        return (
            len(
                (project / "artifacts/lora_adapter/loss.csv")
                .read_text(encoding="utf-8")
                .splitlines()
            )
            - 1
        )

    more, less = "data/fact_correction.de.txt", "data/finetune.de.txt"
    once = steps(f"[{more}, {less}]")
    assert (
        steps(f"[{{path: {more}, weight: 0.5}}, {{path: {less}, weight: 3}}]")
        == once - (once - 8) // 2 + 16
    )
    made = read_manifest(project / "artifacts/lora_adapter")
    assert made["params"]["data"] == [{"path": more, "weight": 0.5}, {"path": less, "weight": 3.0}]


def test_dvc_watches_each_file_under_its_own_key(project: Path) -> None:
    params = project / "params.yaml"
    tree = yaml.safe_load(params.read_text(encoding="utf-8"))
    tree["finetune_lora"]["data"] = [
        {"path": "data/finetune.de.txt", "weight": 2},
        "data/retain.de.txt",
    ]
    write_json(params, tree)
    stages = yaml.safe_load(render_dvc_yaml(open_project(params)))["stages"]
    keys = [
        dep for dep in stages["finetune_lora"]["deps"] if dep.startswith("${finetune_lora.data")
    ]
    assert keys == ["${finetune_lora.data[0].path}", "${finetune_lora.data[1]}"]


@pytest.mark.parametrize("name", ["org/name", "org/name-v1.5@main[train_sft]"])
def test_a_hub_id_in_params_is_answered_with_the_command_that_fetches_it(
    project: Path, name: str
) -> None:
    said = user_error(weights_after, project, json.dumps(name))
    assert said.endswith(f"becomes one by `lora data convert {name} data/NAME.jsonl`.")
    with pytest.raises(
        UserError,
        match=r"data/none.csv is not a file\. Name an existing one in section \w+ of the params\.$",
    ):
        weights_after(project, "data/none.csv")


def write_prompts(project: Path, **more: object) -> list[dict[str, object]]:
    """The sentences, each with its last word as the completion."""
    halves = [line.rsplit(" ", 1) for line in LINES]
    rows = [{"prompt": f"{start} ", "completion": end, **more} for start, end in halves]
    write_jsonl(project / "data/prompts.jsonl", rows)
    return rows


def test_where_every_prompt_is_cut_off_that_is_the_reason_also_beside_eval_data(
    project: Path,
) -> None:
    write_prompts(project)
    settings = [
        "finetune_lora.eval_data=data/finetune.de.txt",
        "finetune_lora.window=0",
        "finetune_lora.max_length=2",
    ]
    reason = user_error(weights_after, project, "data/prompts.jsonl", *settings)
    assert reason.startswith("data/prompts.jsonl: nothing to train on")
    assert "Raise max_length" in reason


def test_an_example_that_was_not_cut_is_not_counted_among_those_that_were(project: Path) -> None:
    rows = write_prompts(project, label=True)
    unwanted = {"prompt": "der ", "completion": "schnee", "label": False}
    write_jsonl(project / "data/prompts.jsonl", [*rows, unwanted, unwanted])
    longest = max(len(line.split()) for line in LINES)
    settings = [
        "finetune_lora.data=data/prompts.jsonl",
        "finetune_lora.window=0",
        f"finetune_lora.max_length={longest}",  # its end is cut off, its label is not
    ]
    _, seen = make_one(project, "finetune_lora", [*BRIEF, *settings])
    assert f"examples truncated to {longest} tokens" in notes(seen)
    assert "2 examples skipped: no token is labelled" in notes(seen)
