"""Coming from PEFT, with transformers' Trainer or TRL."""
# ruff: noqa: E501 (rows of tables)

PAGE = "peft"
FILE = "adapter_config.json"
DATA = "chats.jsonl"
CONFIG = """\
{
  "peft_type": "LORA",
  "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
  "r": 16,
  "lora_alpha": 32,
  "lora_dropout": 0.05,
  "target_modules": ["q_proj", "v_proj"],
  "use_rslora": true,
  "bias": "none",
  "layers_to_transform": [0, 1],
  "task_type": "CAUSAL_LM"
}
"""
RULES = {
    "peft_type": "the method: `LORA`, `IA3`, `PREFIX_TUNING` or `PROMPT_TUNING`",
    "use_peft": "the method: LoRA, or full fine-tuning where it is false",
}
NAMES = """r lora_alpha lora_dropout target_modules target_parameters modules_to_save trainable_token_indices use_rslora
use_dora init_lora_weights exclude_modules layers_to_transform layers_pattern inference_mode num_virtual_tokens
model_name_or_path dataset_name learning_rate per_device_train_batch_size gradient_accumulation_steps num_train_epochs
max_steps lr_scheduler_type warmup_steps warmup_ratio max_grad_norm weight_decay optim max_length bf16 load_in_4bit
gradient_checkpointing packing assistant_only_loss completion_only_loss attn_implementation eval_strategy eval_steps
save_steps save_strategy logging_steps report_to resume_from_checkpoint push_to_hub output_dir beta ref_model seed"""
TEXT = """# Coming from PEFT, transformers and TRL

Adapters are the same files: what is trained here opens in PEFT, and an adapter of PEFT's is read here. What differs is
that a command and a `params.yaml` take the place of a script.

## Step by step

| in a script | here |
|---|---|
| `AutoModelForCausalLM.from_pretrained(name)` | `--base`: a hub id, a folder or a GGUF file. It is imported once, its revision and sha256 are recorded |
| `LoraConfig(r=…, target_modules=…)`, `get_peft_model` | the section `finetune_lora`; `--set rank=16` |
| `tokenizer.apply_chat_template`, `DataCollator…` | nothing: `lora data show FILE --base BASE` shows each token and whether it is trained on |
| `Trainer(…).train()`, `SFTTrainer(…).train()` | `lora train --base BASE --data FILE --out run`, later `lora finetune lora` in `run/` |
| `DPOTrainer`, `KTOTrainer`, `ORPOTrainer`, `CPOTrainer` | `--methods dpo` with `loss`: [preferences](../how-to/preferences.md) |
| `trainer.train(resume_from_checkpoint=True)` | the same command again |
| `trainer.evaluate()` | `lora evaluate`: what was learned, and what was forgotten, of the base, the adapter and the merged model |
| `model.save_pretrained(folder)` | `artifacts/lora_adapter` is PEFT's format already |
| `PeftModel.from_pretrained(base, folder)` | `lora chat`, `lora prompt`; in Python PEFT's own call |
| `model.merge_and_unload()` | `lora merge`: sums in fp32, and a certificate that compares answers |
| `model.push_to_hub(name)` | `lora export --format peft`, then `lora push`, which shows what it would upload with `--dry-run` |

An adapter that was trained elsewhere is read by `lora adapters import DIR --base BASE --out OUT`
([shipping](../how-to/shipping.md)); `init_from` trains on from it.

## What differs

| | PEFT 0.21, transformers 5 and TRL 1.16 | here, in a project of `lora new --base --data` |
|---|---|---|
| modules with LoRA | by architecture, often queries and values | `all-linear` |
| alpha | 8 at rank 8 | 2 × rank |
| rank | 8 | 8 to 128, by the number of tokens that are trained on |
| learning rate | 5e-5 (`Trainer`), 2e-5 (`SFTTrainer`) | 2e-4 for LoRA |
| gradient checkpointing | on in `SFTTrainer` | off, unless memory is short |
| warm-up | none | 3% of the steps |
| a conversation | every token (`assistant_only_loss=False`) | the assistant's turns |
| `max_length` | 1,024 in `SFTTrainer` | the longest example |
| batches | padded, or packed if you say so | never padded |
| held-out examples | none | a tenth |

A key of PEFT or transformers is taken, with a line that says its name here; a mistyped one is an error with the name that was meant.

## What is not here

AdaLoRA, LoHa, LoKr, OFT, VeRA and PEFT's other methods; LoRA on convolutions; `bias` other than `none`; several
adapters active in one forward (combine them first: `lora adapters combine`); models that are not causal language models;
reward models, PPO and GRPO; callbacks. Adapters with PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ initialization change the base, and are
rejected until they are converted.
"""
