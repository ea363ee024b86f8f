"""The params of a stage as fields: their groups, what changed, what they mean."""

from pathlib import Path

from pipeline.stages.registry import open_project
from tests.helpers.projects import save
from tui.panes.fields import Field
from tui.screens.pipeline.params import in_order_of, params_of


def fields(root: Path, stage: str = "finetune_lora") -> dict[str, Field]:
    project = open_project(root / "params.yaml")
    found, _ = params_of(project, project.readable[stage])
    return {field.key: field for field in found}


def test_what_the_section_sets_stands_before_its_other_keys_and_shared_keys_are_in_groups(
    empty: Path,
) -> None:
    found = fields(empty)
    own = [field.key for field in found.values() if not field.group]
    assert own[:3] == ["rank", "alpha", "target_modules"]
    # the section sets the one alone
    assert own.index("learning_rate") < own.index("dora") and "epochs" not in own
    groups = list(dict.fromkeys(field.group for field in found.values()))
    assert groups == ["", "training", "data", "evaluation", "memory"]
    assert found["quantization"].group == "memory" and found["epochs"].group == "training"


def test_a_value_other_than_the_artifacts_comes_first_with_what_it_was(project: Path) -> None:
    save(
        project / "params.yaml",
        {"finetune_lora.lora_dropout": 0.5, "finetune_lora.target_modules": ["q_proj"]},
    )
    changed = {field.key: str(field.note) for field in fields(project).values() if field.sign}
    assert changed["lora_dropout"] == "was 0.0"
    assert changed["target_modules"] == "was q_proj, k_proj, v_proj, o_proj"
    assert list(fields(project))[: len(changed)] == list(changed)


def test_fields_keep_their_order_and_group_while_one_looks_at_them(project: Path) -> None:
    before = fields(project)
    save(project / "params.yaml", {"finetune_lora.neftune_alpha": 5.0})
    now = fields(project)
    kept = {field.key: field for field in in_order_of(list(now.values()), before)}
    assert list(now) != list(before) == list(kept)
    assert kept["neftune_alpha"].group == "training" and kept["neftune_alpha"].sign == "●"
    assert in_order_of(list(now.values()), {}) == list(now.values())


def test_a_params_meaning_is_its_comment_else_what_its_declaration_says(empty: Path) -> None:
    found = fields(empty)
    assert found["alpha"].meaning == "the update is scaled by alpha / rank"  # in params.yaml
    # of the block for all that trains
    assert found["window"].meaning.startswith("tokens per training window")
    assert found["epochs"].meaning == "times that every example is seen"  # of the declaration
    assert found["epochs"].rule.endswith(" · set in params.yaml, block training")
    assert found["dora"].rule.endswith(" · the default") and found["dora"].quiet


def test_broken_files_take_nothing_but_the_comments(project: Path) -> None:
    loaded = open_project(project / "params.yaml")
    (project / "params.yaml").write_text("pretrain: [", encoding="utf-8")
    (project / "artifacts/lora_adapter/manifest.json").write_text("[]", encoding="utf-8")
    found, values = params_of(loaded, loaded.stages["finetune_lora"])
    rank = next(field for field in found if field.key == "rank")
    assert values["rank"] == 4 and not rank.sign
    assert rank.meaning.startswith("rank of the update")


def test_blocks_names_and_numbers_of_training_are_typed_as_they_are_read(project: Path) -> None:
    found = fields(project)
    typed = {"layers_to_transform": "3, 8-15, last 8", "exclude_modules": "k_proj, 0.mlp.fc1"}
    read = {key: found[key].parse(text) for key, text in typed.items()}
    assert read == {
        "layers_to_transform": ["3", "8-15", "last 8"],
        "exclude_modules": ["k_proj", "0.mlp.fc1"],
    }
    save(
        project / "params.yaml",
        {
            f"finetune_lora.{key}": value
            for key, value in {**read, "exclude_modules": ["k_proj"]}.items()
        },
    )
    now = open_project(project / "params.yaml").params.finetune_lora
    assert now.layers_to_transform == ("3", "8-15", "last 8")
    assert found["schedule"].choices[-1] == "warmup_stable_decay"
    assert found["adam_beta2"].kind == "number" and found["num_cycles"].kind == "integer"
