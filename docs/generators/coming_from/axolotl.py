"""Coming from Axolotl."""
# ruff: noqa: E501 (rows of tables)

PAGE = "axolotl"
FILE = "axolotl.yml"
DATA = "chats.jsonl"
CONFIG = """\
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
datasets:
  - path: chats.jsonl
    type: chat_template
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
learning_rate: 2e-4
lr_scheduler: cosine
warmup_ratio: 0.1
optimizer: adamw_bnb_8bit
bf16: auto
flash_attention: true
output_dir: ./outputs
wandb_project: mine
"""
RULES = {
    "adapter": "the method: `lora` or `qlora`; full fine-tuning without it",
    "rl": "`loss` of the method `dpo`: dpo, ipo, kto, orpo or simpo",
    "datasets": "`data`: the `path` of each that is a file here",
    "batch_size": "none: it is `batch_size` × `gradient_accumulation_steps`",
}
NAMES = """base_model lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear lora_modules_to_save
lora_model_dir peft_use_dora peft_use_rslora peft_init_lora_weights loraplus_lr_ratio load_in_4bit load_in_8bit
micro_batch_size gradient_accumulation_steps num_epochs max_steps learning_rate lr_scheduler warmup_steps warmup_ratio
optimizer weight_decay max_grad_norm sequence_len sample_packing pad_to_sequence_len val_set_size eval_steps
evals_per_epoch early_stopping_patience save_steps saves_per_epoch bf16 gradient_checkpointing flash_attention
neftune_noise_alpha train_on_inputs roles_to_train chat_template special_tokens dataset_prepared_path output_dir
wandb_project deepspeed fsdp plugins resume_from_checkpoint trust_remote_code seed"""
TEXT = """# Coming from Axolotl

One YAML file describes the run in both. `lora new my-project --from axolotl.yml` makes a project of yours.

## Step by step

| Axolotl | here |
|---|---|
| `axolotl preprocess c.yml` | `lora data check FILE --base BASE`: every row, lengths, tokens trained on. Tokens are made when a stage needs them |
| `axolotl train c.yml` | `lora train --base BASE --data FILE --out run`; in a project `lora finetune lora`, or `dvc repro` for all stages |
| `axolotl train` again, with `resume_from_checkpoint` | the same command again: it resumes by itself |
| `axolotl inference c.yml` | `lora chat`, or `lora prompt --chat TEXT` |
| `axolotl merge-lora c.yml` | `lora merge`: sums in fp32, and a certificate |
| `axolotl evaluate c.yml`, `lm-eval` | `lora evaluate`; `lora evaluate --harness TASK` |
| `rl: dpo` | `--methods dpo` ([preferences](../how-to/preferences.md)) |
| an adapter that Axolotl trained | `lora adapters import DIR --base BASE --out OUT` |

## What differs

| | Axolotl | here |
|---|---|---|
| one file | one run | a project: base, data, one or more methods, merge, evaluation; a stage whose inputs did not change is not run again |
| `type: chat_template`, `alpaca`, … | named for each data set | recognized by a row's keys: `messages`, `conversations`, `instruction`, `prompt` ([data](../how-to/data.md)) |
| packing | `sample_packing: true` | always without padding |
| examples longer than `sequence_len` | dropped by default | truncated at `max_length`, and counted; by default no example is |
| `datasets: [{path: org/name}]` | fetched by Axolotl | `--data org/name` writes it to a file of the project once |
| held-out data | `val_set_size`, 0 by default | `eval_share`, a tenth in a new project |
| several GPUs | `deepspeed`, `fsdp` | `lora finetune METHOD --devices N` |

## What is not here

GRPO and reward models, multimodal models, `datasets` with custom prompt strategies in Python (write the rows as
`messages` instead), pretraining on streamed data sets, plugins.
"""
