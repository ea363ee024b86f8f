"""No setting that nothing reads: each field of params.yaml, changed, changes an artifact, a report,
or is refused.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.project.logs.run_log import Sample
from pipeline.project.params.load import TOP_LEVEL, key_path
from pipeline.project.params.schema import hints
from pipeline.stages.registry import GRAPH
from pipeline.training.data import Prompts
from tests.helpers.bases import toy_checkpoint
from tests.helpers.errors import user_error
from tests.helpers.json_files import write_jsonl
from tests.helpers.projects import (
    BRIEF,
    METHODS,
    PIPELINE,
    STAGES,
    folder_bytes,
    logged_memory,
    make,
)

OTHER = {
    "columns": "{text: body}",
    "chat_template": "none",
    "metric_for_best_model": "eval_answers",
    "finetune_dpo.columns": "{chosen: best}",
    "data": "data/fact_correction.de.txt",
    "target_modules": "[v_proj]",
    "feedforward_modules": "[fc1]",
    "seed": "1",
    "compile": "true",
    "epochs": "3",
    "batch_size": "3",
    "tokens_per_batch": "9",
    "window": "3",
    "learning_rate": "3e-3",
    "schedule": "cosine",
    "max_steps": "3",
    "optimizer": "sgd",
    "adam_beta1": "0.5",
    "adam_beta2": "0.9",
    "adam_epsilon": "0.01",
    "min_lr_ratio": "0.5",
    "num_cycles": "2",
    "power": "2",
    "decay_ratio": "0.5",
    "weight_decay": "0.3",
    "neftune_alpha": "5",
    "finetune_lora.lora_dropout": "0.3",
    "warmup_steps": "5",
    "warmup_ratio": "0.3",
    "max_grad_norm": "0.1",
    "gradient_accumulation_steps": "2",
    "max_length": "4",
    "precision": "bf16",
    "gradient_checkpointing": "full",
    "load_best": "true",
    "save_steps": "1",
    "save_total_limit": "2",
    "samples": "{prompts: [der hund]}",
    "eval_share": "0.3",
    "eval_data": "data/pretrain.de.txt",
    "eval_steps": "2",
    "patience": "1",
    "base": "toy",
    "import.dtype": "bf16",
    "import.trust_remote_code": "true",
    "pretrain.data": "data/finetune.de.txt",
    "pretrain.d_model": "32",
    "pretrain.layers": "1",
    "pretrain.heads": "2",
    "pretrain.feed_forward": "128",
    "pretrain.max_positions": "24",
    "pretrain.tie_embeddings": "true",
    "expand_vocab.data": "data/finetune.de.txt",
    "expand_vocab.tokens": "[euroraum]",
    "expand_vocab.special_tokens": "[<euro>]",
    "expand_vocab.noise_std": "0.1",
    "expand_vocab.audit_data": "data/fact_correction.de.txt",
    "train_from_scratch.data": "data/finetune.de.txt",
    "finetune_full.data": "data/fact_correction.de.txt",
    "finetune_freeze.data": "data/fact_correction.de.txt",
    "finetune_freeze.last_blocks": "2",
    "finetune_freeze.train_embeddings": "false",
    "finetune_lora.data": "data/fact_correction.de.txt",
    **{
        "finetune_dpo.data": "pairs.jsonl",
        "finetune_dpo.eval_data": "pairs.jsonl",
        "finetune_dpo.max_length": "5",
    },
    **{
        "finetune_dpo.loss": "simpo",
        "finetune_dpo.beta": "0.5",
        "finetune_dpo.label_smoothing": "0.1",
    },
    **{
        "finetune_dpo.rpo_alpha": "1",
        "finetune_dpo.simpo_gamma": "2",
        "finetune_dpo.reference": "base",
    },
    "finetune_dpo.max_grad_norm": "1e-4",
    "finetune_lora.rank": "2",
    "finetune_lora.alpha": "2",
    "finetune_lora.target_modules": "[v_proj]",
    "finetune_lora.target_parameters": "[mlp.experts.down_proj]",
    "finetune_lora.layers_to_transform": "last 1",
    "finetune_lora.exclude_modules": "[k_proj]",
    "finetune_lora.modules_to_save": "[fc1]",
    "finetune_lora.rank_pattern": "{v_proj: 2}",
    "finetune_lora.alpha_pattern": "{v_proj: 2}",
    "finetune_lora.dora": "true",
    "finetune_lora.rslora": "true",
    "finetune_lora.init_lora_weights": "kaiming",
    "finetune_lora.loraplus_ratio": "16",
    "finetune_lora.train_embeddings": "new_rows",
    "finetune_lora.adapter_precision": "bf16",
    "finetune_lora.quantization": "nf4",
    "finetune_lora.init_from": "other_adapter",
    "finetune_lora.save_optimizer": "true",
    "finetune_lora.retention_data": "other.txt",
    "finetune_lora.retention_weight": "3",
    "finetune_lora.retention_batch_size": "1",
    **{f"finetune_{kind}.data": "data/fact_correction.de.txt" for kind in ("prefix", "prompt")},
    "virtual_tokens": "3",
    "adapter_precision": "bf16",
    "quantization": "nf4",
    "finetune_sweep.grid": "{rank: [2]}",
    **{
        "finetune_sweep.search": "random",
        "finetune_sweep.trials": "1",
        "finetune_sweep.search_seed": "3",
    },
    **{
        "finetune_sweep.reduction_factor": "2",
        "finetune_sweep.sampler": "qmc",
        "finetune_sweep.generation": "3",
    },
    "finetune_sweep.old_data": "other.txt",
    "merge.prompts": "other.yaml",
    "merge.max_logit_difference": "1e-12",
    "evaluate.old_data": "other.txt",
    "evaluate.new_data": "data/fact_correction.de.txt",
    "evaluate.prompts": "other.yaml",
    "evaluate.tasks": "tasks.yaml",
    "evaluate.limits": "{new_loss: 0.001}",
    "evaluate.top_k": "2",
    "evaluate.max_examples": "3",
    "evaluate.sample_answers": "1",
    "evaluate.prompt_words": "1",
}
KEYS = [key_path(name, key) for name, kind in GRAPH.sections.items() for key in hints(kind)]


def section_of(key: str) -> str:
    """The section that holds a key of params.yaml."""
    return TOP_LEVEL.get(key) or key.partition(".")[0]


RANGE, OF_OPTUNA = (
    "grid={learning_rate: {low: 1e-4, high: 1e-2, log: true}}",
    ("sampler", "generation"),
)
BY_ANSWERS = ["eval_steps=1", "patience=99", "samples={held_out: 2}"]
# What must be set beside a field for it to count.
WITH = {
    "columns": ["data=both.jsonl"],
    "chat_template": ["data=asked.jsonl", "window=0"],
    "finetune_dpo.chat_template": ["data=pairs.jsonl"],
    "metric_for_best_model": ["data=asked.jsonl", "eval_data=asked.jsonl", *BY_ANSWERS],
    "finetune_dpo.metric_for_best_model": [
        "data=pairs.jsonl",
        "eval_data=pairs.jsonl",
        *BY_ANSWERS,
    ],
    "finetune_dpo.columns": ["data=more_pairs.jsonl"],
    "finetune_dpo.simpo_gamma": ["loss=simpo"],
    "finetune_dpo.reference": ["init_from=other_adapter"],
    "finetune_dpo.max_length": ["epochs=1"],
    "evaluate.columns": ["new_data=both.jsonl"],
    "min_lr_ratio": ["schedule=linear"],
    "num_cycles": ["schedule=cosine_with_restarts"],
    "power": ["schedule=polynomial"],
    "decay_ratio": ["schedule=warmup_stable_decay"],
    "eval_steps": ["eval_share=0.3"],
    "patience": ["eval_share=0.3", "eval_steps=1", "learning_rate=0.3"],
    "load_best": ["eval_share=0.3", "eval_steps=1", "learning_rate=0.3"],
    "train_from_scratch.load_best": ["eval_share=0.3", "eval_steps=1", "learning_rate=3"],
    "finetune_ia3.load_best": ["eval_share=0.3", "eval_steps=1", "learning_rate=30"],
    "finetune_dpo.load_best": ["eval_data=reversed.jsonl", "eval_steps=1", "learning_rate=0.3"],
    "save_total_limit": ["save_steps=1"],
    "import.dtype": ["base=toy"],
    "finetune_sweep.search": ["grid={rank: [1, 2, 3, 4]}", "search=halving", "trials=3", "eval"],
    "finetune_sweep.trials": ["grid={rank: [1, 2, 3, 4]}", "search=random", "trials=3"],
    "finetune_sweep.search_seed": ["grid={rank: [1, 2, 3, 4]}", "search=random", "trials=2"],
    "finetune_sweep.reduction_factor": ["grid={rank: [1, 2, 3, 4]}", "search=halving", "eval"],
    **{
        f"finetune_sweep.{key}": [RANGE, "search=optuna", "trials=6", "generation=2", "eval"]
        for key in OF_OPTUNA
    },
    "finetune_lora.retention_data": [
        "retention_weight=3",
        "retention_data=data/fact_correction.de.txt",
    ],
    "finetune_lora.retention_weight": ["retention_data=other.txt", "retention_weight=1"],
    "finetune_lora.retention_batch_size": [
        "retention_data=data/fact_correction.de.txt",
        "retention_weight=3",
    ],
}
REFUSED = {  # alone, or always: it would count for nothing
    "eval_steps": "there is no evaluation set. Set {stage}.eval_share above 0",
    "patience": "there is no evaluation set. Set {stage}.eval_share above 0",
    "load_best": "there is no evaluation set. Set {stage}.eval_share above 0",
    "save_total_limit": "save_total_limit is 2, but save_steps is 0",
    **dict.fromkeys(
        ("min_lr_ratio", "num_cycles", "power", "decay_ratio"), "schedule constant does not read it"
    ),
    "metric_for_best_model": "samples.held_out does not say how many answers to compare",
    "import.dtype": "import.dtype applies only to an imported base",
    "import.trust_remote_code": "import.trust_remote_code applies only to an imported base",
    "pretrain.precision": "pretrain.precision applies only to an imported base",
    "compile": "only an imported model with one adapter is compiled",
    "expand_vocab.special_tokens": "expand_vocab.special_tokens need a subword tokenizer",
    "finetune_dpo.window": "window must be 0: preferences are of whole answers",
    "finetune_lora.retention_weight": "{stage}.retention_data is not. Set it to a data file",
    "finetune_lora.target_parameters": "The base has no experts that are stacked",
}
ONLY_REFUSED = {
    "import.trust_remote_code",
    "pretrain.precision",
    "finetune_dpo.window",
    "finetune_dpo.target_parameters",
    # tests/pipeline/adapters/test_experts.py has bases with experts
    "finetune_lora.target_parameters",
}  # tests/pipeline/models/test_import_base.py has code that is trusted
CHANGING = [
    key
    for key in KEYS
    if key not in ONLY_REFUSED
    and not key.endswith((".gradient_checkpointing", ".compile"))
    and key != "pretrain.chat_template"  # MiniGPT has none
    and key
    not in ("merge.max_logit_difference", "evaluate.max_examples", "evaluate.sample_answers")
]  # the others have tests of their own


def stage_of(key: str) -> str:
    """The stage that reads a key; `pretrain` makes the base, trained or imported."""
    return {"import": "pretrain"}.get(section_of(key), section_of(key))


def of(table: dict[str, Any], key: str) -> Any:
    """The entry of a key; of dpo, which has LoRA's keys, theirs; or that of its name in any
    section.
    """
    section, _, name = key.rpartition(".")
    shared = f"finetune_lora.{name}" if section == "finetune_dpo" else key
    return table.get(key, table.get(shared, table.get(name)))


def test_every_field_has_another_value_to_try() -> None:
    assert [key for key in KEYS if of(OTHER, key) is None] == []


def prepared(project: Path) -> Path:
    (project / "other.yaml").write_text(
        "g: {must_keep: [{prompt: der hund, answer: läuft}]}\n", encoding="utf-8"
    )
    task = "[{name: t, kind: contains, examples: [{prompt: der hund, answer: park}]}]"
    (project / "tasks.yaml").write_text(task, encoding="utf-8")
    (project / "other.txt").write_text("die katze sitzt auf dem sofa\n", encoding="utf-8")
    asked = '{"prompt": "der hund", "completion": " läuft"}\n{"prompt": "die katze", "completion": " sitzt"}\n'
    (project / "asked.jsonl").write_text(asked, encoding="utf-8")
    two_columns = '{"text": "die katze sitzt auf dem sofa", "body": "der hund läuft im park"}\n'
    (project / "both.jsonl").write_text(two_columns, encoding="utf-8")
    pairs = [
        json.loads(line)
        for line in (project / "data/preferences.de.jsonl").read_text("utf-8").splitlines()
    ]
    for name, rows in (
        ("pairs", pairs[:5]),
        (
            "reversed",
            [
                {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
                for pair in pairs[:5]
            ],
        ),
        ("more_pairs", [pair | {"best": " im park"} for pair in pairs]),
    ):
        write_jsonl(project / f"{name}.jsonl", rows)
    shutil.copytree(
        project / "artifacts/lora_adapter", project / "other_adapter", dirs_exist_ok=True
    )
    return project


def artifact_after(project: Path, stage: str, overrides: Sequence[str]) -> dict[str, bytes]:
    """The stage's artifact, without the manifest: it repeats the params, and its change proves
    nothing.
    """
    shutil.rmtree(project / ".lora-cache", ignore_errors=True)
    # the others are so in BRIEF
    short = [f"{stage}.epochs=2"] * (STAGES[stage].trains and stage not in PIPELINE)
    make(project, [stage], [*BRIEF, *short, *overrides])
    files = folder_bytes(project / "artifacts" / STAGES[stage].output)
    del files["manifest.json"]
    return files


@pytest.fixture(scope="module")
def befores() -> dict[tuple[str, ...], dict[str, bytes]]:
    """What a stage makes of a prepared copy of `brief`, by its name and overrides: many keys begin
    with the same.
    """
    return {}


def best_after_a_step(self: Prompts, step: int) -> list[Sample]:
    """As expected after the first step alone, where the loss is not yet the lowest."""
    return [
        Sample(step, one.asked, one.expected if step == 1 else "", one.expected)
        for one in self.questions
    ]


@pytest.mark.parametrize("key", CHANGING)
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_a_changed_field_changes_what_its_stage_makes(
    project: Path,
    key: str,
    befores: dict[tuple[str, ...], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = stage_of(key)
    if key.endswith(".metric_for_best_model"):
        monkeypatch.setattr(Prompts, "answers", best_after_a_step)
    # beside a sweep's own keys
    own = {"base=toy": "base=toy", "eval": "finetune_lora.eval_share=0.3"}
    beside = [own.get(one) or f"{stage}.{one}" for one in of(WITH, key) or []]
    # which has a template
    on_toy = key == "expand_vocab.special_tokens" or key.endswith(".chat_template")
    if on_toy or key in ("base", "import.dtype"):
        toy_checkpoint(project / "toy")
    if on_toy:
        shutil.copy(prepared(project) / "other.txt", project / "english.txt")
        beside += ["base=toy", "expand_vocab.audit_data=english.txt"]
        for earlier in ("pretrain", "expand_vocab")[: 1 if stage == "expand_vocab" else 2]:
            artifact_after(project, earlier, beside)
    prepared(project)
    begun = (stage, *beside)
    if begun not in befores:
        befores[begun] = artifact_after(project, stage, beside)
    before = befores[begun]
    assert before
    assert artifact_after(project, stage, [*beside, f"{key}={of(OTHER, key)}"]) != before


@pytest.mark.parametrize("key", [key for key in KEYS if of(REFUSED, key)])
def test_a_field_that_would_count_for_nothing_is_refused(project: Path, key: str) -> None:
    stage = stage_of(key)
    without_file = [f"{stage}.retention_data="] if key.endswith(".retention_weight") else []
    assert of(REFUSED, key).format(stage=stage) in user_error(
        artifact_after, project, stage, [f"{key}={of(OTHER, key)}", *without_file]
    )


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize(
    "stage", ["pretrain", "train_from_scratch", *(f"finetune_{method}" for method in METHODS)]
)
def test_checkpointing_changes_no_byte_that_is_made_and_the_memory_that_is_measured(
    project: Path, stage: str, how: str
) -> None:
    def measured() -> int:
        return logged_memory(project / "runs" / stage / "telemetry.csv")[1]

    # activations, not weights, decide the peak
    wide = [f"{stage}.window=0", f"{stage}.batch_size=64"]
    before, plain = artifact_after(project, stage, wide), measured()
    assert (
        artifact_after(project, stage, [*wide, f"{stage}.gradient_checkpointing={how}"]) == before
    )
    assert measured() < plain


def test_a_merge_that_differs_by_more_than_is_allowed_is_refused(project: Path) -> None:
    # the difference is 0 where layers are small enough to be folded: take one that is not
    overrides = [*BRIEF, "pretrain.feed_forward=1024", "finetune_lora.target_modules=fc1"]
    make(project, ["pretrain", "expand_vocab", "finetune_lora"], overrides)
    with pytest.raises(UserError, match=r"more than merge.max_logit_difference"):
        make(project, ["merge"], [*overrides, "merge.max_logit_difference=1e-12"])


def test_texts_to_retain_with_no_weight_change_nothing(project: Path) -> None:
    """So that one number turns them off."""
    before = artifact_after(project, "finetune_lora", [])
    retain = "finetune_lora.retention_data=data/fact_correction.de.txt"
    assert (
        artifact_after(project, "finetune_lora", [retain, "finetune_lora.retention_batch_size=1"])
        == before
    )
