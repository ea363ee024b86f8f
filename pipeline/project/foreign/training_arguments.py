"""transformers and TRL (training_args.json by `TrainingArguments.to_json_string`, or a YAML of
TRL's scripts).

`warmup_steps` below 1 is a share of all steps.
"""

from pipeline.project.foreign import Config, Format


def read(config: Config) -> None:
    config.choose("use_peft", {True: "finetune_lora", False: "finetune_full"})
    steps = config.rest.get("warmup_steps")
    if isinstance(steps, float) and 0 < steps < 1:
        config.take("warmup_steps", "warmup_ratio", config.rest.pop("warmup_steps"))


FORMAT = Format(
    5,
    "transformers",
    frozenset(("per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type")),
    read,
)
