"""Axolotl (.yml): `adapter` is the method, `datasets` a list of `{path: …}`, `lora_target_linear:
true` all-linear.

`rl` says that it learns from preferences, and how.
"""

from pipeline.project.foreign import Config, Format


def read(config: Config) -> None:
    config.choose(
        "adapter", {"lora": "finetune_lora", "qlora": "finetune_lora"}, default="finetune_full"
    )
    config.choose_preferences("rl", {name: name for name in ("dpo", "ipo", "kto", "orpo", "simpo")})
    datasets = config.rest.pop("datasets", None) or []
    for dataset in datasets if isinstance(datasets, list) else [datasets]:
        path = dataset.get("path") if isinstance(dataset, dict) else dataset
        config.take_files("datasets", path)
    all_linear = config.rest.get("lora_target_linear") is True
    if all_linear and config.rest.pop("lora_target_modules", None):
        config.left["lora_target_modules"] = "lora_target_linear is on"
    if config.rest.pop("batch_size", None):
        config.left["batch_size"] = "it is micro_batch_size × gradient_accumulation_steps"


FORMAT = Format(4, "Axolotl", frozenset(("base_model", "micro_batch_size", "sequence_len")), read)
