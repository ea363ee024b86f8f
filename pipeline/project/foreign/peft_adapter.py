"""PEFT (adapter_config.json): `peft_type` is the method; `init_lora_weights: true` is PEFT's own,
kaiming.
"""

from pipeline.project.foreign import Config, Format

METHODS = {
    "LORA": "finetune_lora",
    "IA3": "finetune_ia3",
    "PREFIX_TUNING": "finetune_prefix",
    "PROMPT_TUNING": "finetune_prompt",
}


def read(config: Config) -> None:
    config.choose("peft_type", METHODS)
    for key in ("peft_version", "auto_mapping", "revision"):
        config.rest.pop(key, None)


FORMAT = Format(1, "PEFT", frozenset(("peft_type",)), read)
