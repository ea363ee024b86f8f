"""mlx-lm (.yaml): `lora_parameters` holds rank, dropout, keys and `scale`, which is alpha / rank;
`iters` are steps.

`lr_schedule` is {name, warmup, arguments: [rate, …]}; without it the rate is constant.
"""

from typing import Any

from pipeline.project.foreign import Config, Format

METHODS = {"lora": "finetune_lora", "dora": "finetune_lora", "full": "finetune_full"}
LORA = {"rank": "rank", "keys": "target_modules", "dropout": "lora_dropout"}


def read(config: Config) -> None:
    dora = config.rest.get("fine_tune_type") == "dora"
    config.choose("fine_tune_type", METHODS)
    if dora:
        config.take("fine_tune_type", "dora", True)
    lora = _mapping(config, "lora_parameters")
    rank, scale = lora.get("rank"), lora.pop("scale", None)
    if isinstance(scale, int | float) and isinstance(rank, int):
        # refused as the file has them: their product would be another number
        config.take("lora_parameters.scale", "alpha", scale)
        config.take("lora_parameters.rank", "rank", lora.pop("rank"))
        if "rank" in config.taken:
            config.take("lora_parameters.scale", "alpha", scale * rank)
        lora.pop("alpha", None)  # mlx-lm has it in older files and does not read it
    for key, value in lora.items():
        if value is not None:
            config.take(f"lora_parameters.{key}", LORA.get(key, key), value)
    schedule = _mapping(config, "lr_schedule")
    config.rest["lr_schedule"] = schedule.get("name", "constant")
    if isinstance(steps := schedule.get("warmup"), int) and steps:
        config.take("lr_schedule.warmup", "warmup_steps", steps)
    rates = schedule.get("arguments")
    if isinstance(rates, list) and rates:
        config.rest.pop("learning_rate", None)
        config.take("lr_schedule.arguments", "learning_rate", rates[0])
    optimizers = _mapping(config, "optimizer_config")
    options = optimizers.get(str(config.rest.get("optimizer", "adam")))
    if isinstance(options, dict) and "weight_decay" in options:
        config.take("optimizer_config.weight_decay", "weight_decay", options["weight_decay"])


def _mapping(config: Config, key: str) -> dict[str, Any]:
    value = config.rest.pop(key, None)
    return {str(name): part for name, part in value.items()} if isinstance(value, dict) else {}


FORMAT = Format(
    2, "mlx-lm", frozenset(("lora_parameters", "fine_tune_type", "iters", "lora_layers")), read
)
