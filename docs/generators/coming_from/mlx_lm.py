"""Coming from mlx-lm."""
# ruff: noqa: E501 (rows of tables)

PAGE = "mlx-lm"
FILE = "mlx.yaml"
DATA = "chats/train.jsonl"
CONFIG = """\
model: HuggingFaceTB/SmolLM2-135M-Instruct
train: true
fine_tune_type: lora
data: chats
num_layers: 16
batch_size: 4
iters: 600
learning_rate: 1e-5
lora_parameters:
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 60
  arguments: [1e-5, 600]
mask_prompt: true
max_seq_length: 2048
grad_checkpoint: true
steps_per_eval: 200
adapter_path: adapters
"""
RULES = {
    "fine_tune_type": "the method: `lora`, `full`; `dora` is `lora` with `dora: true`",
    "lora_parameters.rank": "`rank`",
    "lora_parameters.scale": "`alpha` = scale × rank",
    "lora_parameters.dropout": "`lora_dropout`",
    "lora_parameters.keys": "`target_modules`",
    "lr_schedule": "`schedule`, `warmup_steps`, and the first of its arguments as `learning_rate`",
    "optimizer_config": "`weight_decay` of the optimizer that is used",
}
NAMES = """model data train test num_layers batch_size iters learning_rate optimizer max_seq_length mask_prompt
grad_checkpoint grad_accumulation_steps steps_per_report steps_per_eval val_batches test_batches save_every adapter_path
resume_adapter_file report_to trust_remote_code seed"""
TEXT = """# Coming from mlx-lm

`lora new my-project --from mlx.yaml` makes a project with your settings, and `lora export ADAPTER --format mlx --out DIR`
writes what `mlx_lm.generate --model BASE --adapter-path DIR` loads. So you can train here and answer there, and the other way round.

## Step by step

| mlx-lm | here |
|---|---|
| a folder with `train.jsonl`, `valid.jsonl`, `test.jsonl` | `--data train.jsonl --eval-data valid.jsonl`; the rows are the same: `messages`, `prompt`/`completion`, `text` |
| `mlx_lm.lora --train --config mlx.yaml` | `lora train --base BASE --data FILE --out run`; in a project `lora finetune lora` |
| `mlx_lm.lora --test` | `lora evaluate` |
| `--resume-adapter-file` | `init_from` trains on from an adapter; a run that was stopped resumes by itself |
| `mlx_lm.generate --adapter-path` | `lora prompt`, `lora chat` |
| `mlx_lm.fuse` | `lora merge`; `lora export ADAPTER --format merged --out DIR` |
| `mlx_lm.fuse --export-gguf` | `lora export ADAPTER --format gguf --out DIR`, compared in llama.cpp |
| `mlx_lm.server` | `lora serve` |
| an adapter that mlx-lm trained | `lora adapters import DIR --base BASE --out OUT` |

## What differs

| | mlx-lm 0.32 | here, in a project of `lora new --base --data` |
|---|---|---|
| length | `iters`: 1,000 steps | epochs: 3, fewer for many examples; `max_steps` is `iters` |
| layers with LoRA | the last 16 (`num_layers`) | all; `layers_to_transform: last 16` |
| scale | 20, whatever the rank | alpha / rank = 2 |
| learning rate | 1e-5 | 2e-4 for LoRA |
| optimizer | Adam | AdamW, without weight decay unless you set it |
| trained on | the whole text, unless `mask_prompt` | the completion, or the assistant's turns |
| batches | padded | not padded |
| longer than `max_seq_length` | truncated to 2,048 | no example is, unless `max_length` is set |
| runs on | Apple silicon first | CPU, CUDA; MPS, which is untested |

With scale 20 and rank 8 alpha is 160. That belongs to mlx-lm's small learning rate: where the file gives one of the two,
take both or neither.

## What is not here

A quantized MLX base (name the unquantized one), optimizers other than AdamW, SGD and Muon.
"""
