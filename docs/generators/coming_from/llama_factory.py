"""Coming from LLaMA-Factory."""
# ruff: noqa: E501 (rows of tables)

PAGE = "llama-factory"
FILE = "llamafactory.yaml"
DATA = "chats.json"
CONFIG = """\
model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: default
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
output_dir: saves/mine
plot_loss: true
"""
RULES = {
    "finetuning_type": "the method: `lora`, `full` or `freeze`",
    "stage": "`sft`; `dpo` and `kto` are the method `dpo`, with `loss`",
    "dataset": "none: names of dataset_info.json; name the files with `--data`",
    "disable_gradient_checkpointing": "`gradient_checkpointing: none`",
}
NAMES = """model_name_or_path adapter_name_or_path lora_rank lora_alpha lora_dropout lora_target use_dora use_rslora
pissa_init loraplus_lr_ratio additional_target freeze_trainable_layers quantization_bit double_quantization template
cutoff_len max_samples packing neat_packing train_on_prompt mask_history per_device_train_batch_size
gradient_accumulation_steps learning_rate num_train_epochs max_steps lr_scheduler_type warmup_ratio warmup_steps optim
max_grad_norm bf16 fp16 val_size eval_strategy eval_steps save_steps logging_steps plot_loss report_to output_dir
overwrite_cache preprocessing_num_workers flash_attn use_unsloth deepspeed pref_beta pref_loss pref_ftx
resume_from_checkpoint trust_remote_code create_new_adapter seed"""
TEXT = """# Coming from LLaMA-Factory

`lora new my-project --from llamafactory.yaml --data FILE` makes a project with the settings of your YAML. The data files
are named, because `dataset` is a list of names in `dataset_info.json`.

## Step by step

| LLaMA-Factory | here |
|---|---|
| an entry in `dataset_info.json` | nothing: Alpaca and ShareGPT rows are recognized by their keys; other names of columns: `--columns` |
| `template: qwen` | nothing: the base's own chat template |
| `llamafactory-cli train c.yaml` | `lora train --base BASE --data FILE --out run`; in a project `lora finetune lora` |
| `stage: dpo`, `stage: kto` | `--methods dpo`, with `loss=kto` for the second ([preferences](../how-to/preferences.md)) |
| `llamafactory-cli chat c.yaml` | `lora chat` |
| `llamafactory-cli export c.yaml` | `lora merge`; `lora export ADAPTER --format merged --out DIR`, or gguf, vllm, mlx |
| `llamafactory-cli api c.yaml` | `lora serve` |
| `llamafactory-cli webui` | `lora-tui`; `lora-tui --web` in a browser |
| `llamafactory-cli eval` | `lora evaluate --harness TASK` |
| an adapter that LLaMA-Factory trained | `lora adapters import DIR --base BASE --out OUT` |

## What differs

| | LLaMA-Factory | here, in a project of `lora new --base --data` |
|---|---|---|
| `lora_target` | `all` | `all-linear`: the same |
| `lora_alpha` | 2 × `lora_rank` where it is not written | the same |
| `learning_rate` | 5e-5 where it is not written | 2e-4 for LoRA |
| `cutoff_len` | 2,048 | the longest example |
| gradient checkpointing | on | off, unless memory is short |
| history | all answers of a conversation, unless `mask_history` | all answers; `"train": false` in a turn leaves it out |
| ShareGPT's `system`, `tools`; Alpaca's `history` | columns | read too |
| held-out data | `val_size`, 0 by default | a tenth |

## What is not here

`stage: pt` as a stage of its own (rows of `{"text": …}` train on all of it), reward models and PPO, multimodal models,
GaLore, BAdam, APOLLO, LLaMA Pro, LongLoRA, GPTQ and AWQ bases to train on.
"""
