"""The params of a stage as rows: their groups, what changed, what they mean."""

from pathlib import Path

import pytest

from pipeline.stages.registry import open_project
from tests.helpers.projects import save
from tui.screens.pipeline.params import Param, lines_of, params_of
from tui.widgets.form import format_value, parse_names


def params(root: Path, stage: str = "finetune_lora") -> dict[str, Param]:
    project = open_project(root / "params.yaml")
    return {param.key: param for param in params_of(project, project.readable[stage])}


def test_what_the_section_sets_stands_before_its_other_keys_and_shared_keys_are_in_groups(
    empty: Path,
) -> None:
    found = params(empty)
    own = [param.key for param in found.values() if not param.group]
    assert own[:3] == ["rank", "alpha", "target_modules"]
    # the section sets the one alone
    assert own.index("learning_rate") < own.index("dora") and "epochs" not in own
    assert {param.group for param in found.values()} == {
        "",
        "training",
        "data",
        "evaluation",
        "memory",
    }
    assert found["quantization"].group == "memory" and found["epochs"].group == "training"


def test_a_value_other_than_the_artifacts_comes_first_with_what_it_was(project: Path) -> None:
    save(
        project / "params.yaml",
        {"finetune_lora.lora_dropout": 0.5, "finetune_lora.target_modules": ["q_proj"]},
    )
    changed = {
        param.key: param.made for param in params(project).values() if param.made is not None
    }
    assert (
        changed.items()
        >= {"lora_dropout": "0.0", "target_modules": "q_proj, k_proj, v_proj, o_proj"}.items()
    )
    assert list(params(project))[: len(changed)] == list(changed)


def test_a_params_meaning_is_its_comment_else_what_its_declaration_says(empty: Path) -> None:
    found = params(empty)
    assert found["alpha"].meaning == "the update is scaled by alpha / rank"  # in params.yaml
    # of the block for all that trains
    assert found["window"].meaning.startswith("tokens per training window")
    assert found["epochs"].meaning == "times that every example is seen"  # of the declaration
    assert found["epochs"].source == "params.yaml, training"


def test_broken_files_take_nothing_but_the_comments(project: Path) -> None:
    loaded = open_project(project / "params.yaml")
    (project / "params.yaml").write_text("pretrain: [", encoding="utf-8")
    (project / "artifacts/lora_adapter/manifest.json").write_text("[]", encoding="utf-8")
    found = {param.key: param for param in params_of(loaded, loaded.stages["finetune_lora"])}
    assert found["rank"].value == 4 and found["rank"].made is None
    assert found["rank"].meaning.startswith("rank of the update")


def test_groups_are_folded_and_a_search_looks_into_all(empty: Path) -> None:
    found = [*params(empty).values()]
    keys = [line.key for line in lines_of(found, ())]
    assert (
        keys[-4:] == ["(training)", "(data)", "(evaluation)", "(memory)"] and "epochs" not in keys
    )
    unfolded = [line.key for line in lines_of(found, {"training"})]
    assert unfolded.index("(training)") < unfolded.index("epochs") < unfolded.index("(data)")
    assert [line.key for line in lines_of(found, (), "QUANT")] == ["(memory)", "quantization"]
    # its meaning
    assert "batch_size" in [line.key for line in lines_of(found, (), "examples a batch")]
    assert lines_of(found, (), "no such param") == []


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("a",),
        ("a b", " euro"),
        ("[INST]", "a,b", '"', "'", "#", "a: b", "-", "\n", "ß🤗", "on", "1"),
    ],
    ids=str,
)
def test_names_round_trip(values: tuple[str, ...]) -> None:
    assert parse_names(format_value(values)) == list(values)
