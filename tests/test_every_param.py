"""No setting that nothing reads: each field of params.yaml, changed, changes an artifact, a report, or is refused."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.dag import STAGES
from pipeline.errors import UserError
from pipeline.params import Params
from tests.support import BRIEF, folder_bytes, make

OTHER = {
    "seed": "1",
    "epochs": "3",
    "batch_size": "3",
    "window": "3",
    "learning_rate": "3e-3",
    "pretrain.data": "data/finetune.de.txt",
    "pretrain.d_model": "32",
    "pretrain.layers": "1",
    "pretrain.heads": "2",
    "pretrain.feed_forward": "128",
    "pretrain.max_positions": "24",
    "pretrain.tie_embeddings": "true",
    "expand_vocab.data": "data/finetune.de.txt",
    "expand_vocab.noise_std": "0.1",
    "expand_vocab.audit_data": "data/fact_correction.de.txt",
    "finetune_full.data": "data/fact_correction.de.txt",
    "finetune_freeze.data": "data/fact_correction.de.txt",
    "finetune_freeze.last_blocks": "2",
    "finetune_freeze.train_embeddings": "false",
    "finetune_lora.data": "data/fact_correction.de.txt",
    "finetune_lora.rank": "2",
    "finetune_lora.alpha": "2",
    "finetune_lora.target_modules": "[v_proj]",
    "finetune_lora.train_embeddings": "new_rows",
    "merge.prompts": "other.yaml",
    "merge.max_logit_difference": "1e-12",
    "evaluate.old_data": "other.txt",
    "evaluate.new_data": "data/fact_correction.de.txt",
    "evaluate.prompts": "other.yaml",
    "evaluate.top_k": "2",
    "evaluate.prompt_words": "1",
}
KEYS = [f"{section.name}.{field.name}" for section in fields(Params) for field in fields(section.default_factory)]  # type: ignore[arg-type]


def test_every_field_has_another_value_to_try() -> None:
    assert {key for key in KEYS if key not in OTHER and key.split(".")[1] not in OTHER} == set()


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_field_changes_what_its_stage_makes_or_is_refused(project: Path, key: str) -> None:
    (project / "other.yaml").write_text("g: {must_keep: [{prompt: der hund, answer: läuft}]}\n", encoding="utf-8")
    (project / "other.txt").write_text("die katze sitzt auf dem sofa\n", encoding="utf-8")
    stage, field = key.split(".")
    folder = project / "artifacts" / STAGES[stage].output
    before = folder_bytes(folder)
    overrides = [*BRIEF, f"{key}={OTHER.get(key) or OTHER[field]}"]
    if key == "merge.max_logit_difference":  # 0 where layers are small enough to be folded: take one that is not
        overrides += ["pretrain.feed_forward=1024", "finetune_lora.target_modules=fc1"]
        make(project, ["pretrain", "expand_vocab", "finetune_lora"], overrides)
        with pytest.raises(UserError, match=r"more than merge.max_logit_difference"):
            make(project, [stage], overrides)
        return
    shutil.rmtree(project / ".lora-cache")
    make(project, [stage], overrides)
    after = folder_bytes(folder)
    del before["manifest.json"], after["manifest.json"]  # it repeats the params: its change proves nothing
    assert after != before
