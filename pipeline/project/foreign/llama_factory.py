"""LLaMA-Factory (.yaml): `lora_target: all` is all-linear; `lora_alpha` is 2 × `lora_rank` where it
is not written.
"""

from pipeline.project.foreign import Config, Format

METHODS = {"lora": "finetune_lora", "full": "finetune_full", "freeze": "finetune_freeze"}

LORA = ("finetune_lora", "finetune_dpo")


def read(config: Config) -> None:
    config.choose("finetuning_type", METHODS)
    config.choose_preferences("stage", {"dpo": "dpo", "kto": "kto"})  # `pref_loss` may say more
    if config.rest.pop("dataset", None):
        config.left["dataset"] = (
            "names of dataset_info.json: name its files in the section's `data`"
        )
    if config.rest.pop("disable_gradient_checkpointing", None) is True:
        config.take("disable_gradient_checkpointing", "gradient_checkpointing", "none")
    rank = config.rest.get("lora_rank")
    if isinstance(rank, int) and config.section in LORA and config.rest.get("lora_alpha") is None:
        config.take("lora_rank", "rank", rank)  # refused as the file has it, not doubled
        config.take("lora_rank", "alpha", 2 * rank)


FORMAT = Format(
    3,
    "LLaMA-Factory",
    frozenset(("finetuning_type", "cutoff_len", "lora_target", "template")),
    read,
)
