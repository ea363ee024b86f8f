"""Other names for what params.yaml and `lora` call by one: our own former names, and those of other tools.

An unknown key, command or option is answered with the name here. A key may be written with its section where only that
says what is meant.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def _by_other_name(names: Mapping[str, str]) -> dict[str, str]:
    """Other name → the name here, from the name here → its other names in one text."""
    return {other: name for name, others in names.items() for other in others.split()}


# Keys and sections of params.yaml. Files of earlier versions have `base` in the section that it stands above now.
KEYS = _by_other_name(
    {
        "base": "pretrain.base base_model model model_name model_name_or_path model_id pretrained_model",
        "train_from_scratch": "scratch finetune_scratch",
        "finetune_lora": "lora qlora finetune_qlora peft",
        "finetune_full": "full sft",
        "finetune_freeze": "freeze",
        "finetune_prefix": "prefix",
        "finetune_prompt": "prompt",
        "finetune_sweep": "sweep",
        "evaluate": "eval evaluation",
        "rank": "r lora_r lora_rank",
        "alpha": "lora_alpha scale",
        "target_modules": "lora_target lora_targets lora_target_modules targets keys",
        "lora_dropout": "dropout lora_drop adapter_dropout",
        "neftune_alpha": "neftune_noise_alpha noisy_embedding_alpha neftune",
        "dora": "use_dora lora_dora",
        "rslora": "use_rslora rs_lora",
        "init_lora_weights": "init_lora",
        "loraplus_ratio": "loraplus_lr_ratio lora_plus_ratio",
        "train_embeddings": "modules_to_save trainable_token_indices lora_modules_to_save",
        "quantization": "load_in_4bit load_in_8bit quantize quantization_bit bits",
        "virtual_tokens": "num_virtual_tokens prefix_length prompt_length",
        "optimizer": "optim optimizer_type optimizer_name optimizer_class",
        "weight_decay": "wd decay l2",
        "epochs": "num_epochs num_train_epochs n_epochs",
        "max_steps": "num_train_steps max_train_steps num_steps iters max_iters train_steps total_steps",
        "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size",
        "learning_rate": "lr learning_rate_max max_lr",
        "schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
        "warmup_steps": "warmup num_warmup_steps warmup_iters",
        "warmup_ratio": "warmup_proportion warmup_fraction lr_warmup_ratio",
        "max_grad_norm": "clip_norm grad_clip gradient_clipping clip_grad_norm max_norm",
        "gradient_accumulation_steps": "accumulate gradient_accumulation grad_accumulation_steps grad_accum "
        "accumulate_grad_batches",
        "gradient_checkpointing": "checkpointing grad_checkpoint activation_checkpointing",
        "max_length": "max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size",
        "precision": "bf16 fp16 torch_dtype mixed_precision compute_dtype",
        "data": "dataset datasets dataset_path train_file train_data data_path",
        "eval_share": "val_set_size test_size val_size eval_split validation_split",
        "eval_steps": "eval_every steps_per_eval evals_per_epoch eval_interval",
        "patience": "early_stopping_patience",
        "save_steps": "checkpoint_every save_every save_interval saves_per_epoch checkpointing_steps",
        "retention_data": "retain",
        "retention_weight": "retain_weight",
        "retention_batch_size": "retain_batch",
        "last_blocks": "freeze_trainable_layers num_layers_unfrozen unfrozen_layers",
        "layers": "num_hidden_layers n_layer n_layers",
        "d_model": "hidden_size n_embd n_embed",
        "heads": "num_attention_heads n_head n_heads",
        "feed_forward": "intermediate_size n_inner d_ff",
        "max_positions": "max_position_embeddings n_positions",
        "tie_embeddings": "tie_word_embeddings",
        "seed": "random_seed random_state",
    }
)
COMMANDS = _by_other_name(
    {
        "train-from-scratch": "scratch",
        "finetune": "train sft tune fine-tune",
        "lora": "qlora dora",
        "prompt": "generate chat ask run infer",
        "evaluate": "eval test",
        "merge": "fuse merge-lora merge-and-unload",
        "export": "convert save",
        "calc": "memory estimate-memory calculator calculate",
        "new": "init create start",
        "doctor": "env check info",
        "data": "preprocess dataset",
        "adapters": "list ls",
        "spectrum": "svd",
    }
)
OPTIONS = _by_other_name(
    {
        "--format": "--as --to --type",
        "--base": "--model --model-path --base-model --model-name-or-path",
        "--adapter": "--adapter-path --lora --peft --adapter-name-or-path",
        "--rank": "--r --lora-r --lora-rank",
        "--alpha": "--lora-alpha",
        "--targets": "--target-modules --lora-target",
        "--batch": "--batch-size --per-device-train-batch-size --micro-batch-size",
        "--sequence": "--max-length --seq-len --max-seq-length --sequence-length --cutoff-len",
        "--checkpointing": "--gradient-checkpointing --grad-checkpoint",
        "--optimizer": "--optim",
        "--lora-dropout": "--dropout",
        "--neftune-alpha": "--neftune-noise-alpha --neftune",
        "--max-tokens": "--max-new-tokens --n-predict",
        "--temperature": "--temp",
        "--out": "--output --output-dir --save-path --out-dir",
        "--params": "--config --params-file",
        "--devices": "--num-processes --nproc-per-node --num-gpus",
    }
)


def suggest(name: str, known: Iterable[str], aliases: Mapping[str, str], section: str = "") -> str | None:
    """The known name that is meant by `name`: by the table, else the nearest in spelling; None if none is near."""
    names = list(known)
    for alias in (f"{section}.{name}", name):
        if (meant := aliases.get(alias)) in names or (meant and "." in alias):
            return meant
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return near[0] if near else None
