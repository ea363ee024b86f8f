"""Other names for what params.yaml and `lora` call by one: our own former names, and those of other tools.

An unknown key, command or option is answered with the name here. A key may be written with its section where only that
says what is meant.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

KEYS: Mapping[str, str] = {  # of params.yaml
    "pretrain.base": "base",
    **dict.fromkeys(
        ("base_model", "model", "model_name", "model_name_or_path", "model_id", "pretrained_model"), "base"
    ),
    **dict.fromkeys(("scratch", "finetune_scratch"), "train_from_scratch"),
    **dict.fromkeys(("lora", "qlora", "finetune_qlora", "peft"), "finetune_lora"),
    **dict.fromkeys(("full", "sft"), "finetune_full"),
    **dict.fromkeys(("freeze", "prefix", "prompt", "sweep"), "finetune_{}"),
    **dict.fromkeys(("eval", "evaluation"), "evaluate"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "rank"),
    **dict.fromkeys(("lora_alpha", "scale"), "alpha"),
    **dict.fromkeys(("lora_target", "lora_targets", "lora_target_modules", "targets", "keys"), "target_modules"),
    **dict.fromkeys(("use_dora", "lora_dora"), "dora"),
    **dict.fromkeys(("use_rslora", "rs_lora"), "rslora"),
    "init_lora": "init_lora_weights",
    **dict.fromkeys(("loraplus_lr_ratio", "lora_plus_ratio"), "loraplus_ratio"),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "lora_modules_to_save"), "train_embeddings"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantize", "quantization_bit", "bits"), "quantization"),
    **dict.fromkeys(("num_virtual_tokens", "prefix_length", "prompt_length"), "virtual_tokens"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("lr", "learning_rate_max", "max_lr"), "learning_rate"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "lr_schedule", "scheduler"), "schedule"),
    **dict.fromkeys(("warmup", "num_warmup_steps", "warmup_iters"), "warmup_steps"),
    **dict.fromkeys(("clip_norm", "grad_clip", "gradient_clipping", "clip_grad_norm", "max_norm"), "max_grad_norm"),
    **dict.fromkeys(
        ("accumulate", "gradient_accumulation", "grad_accumulation_steps", "grad_accum", "accumulate_grad_batches"),
        "gradient_accumulation_steps",
    ),
    **dict.fromkeys(("checkpointing", "grad_checkpoint", "activation_checkpointing"), "gradient_checkpointing"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length", "block_size"), "max_length"
    ),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "mixed_precision", "compute_dtype"), "precision"),
    **dict.fromkeys(("dataset", "datasets", "dataset_path", "train_file", "train_data", "data_path"), "data"),
    **dict.fromkeys(("val_set_size", "test_size", "val_size", "eval_split", "validation_split"), "eval_share"),
    **dict.fromkeys(("eval_steps", "steps_per_eval", "evals_per_epoch", "eval_interval"), "eval_every"),
    "early_stopping_patience": "patience",
    "retain": "retention_data",
    "retain_weight": "retention_weight",
    "retain_batch": "retention_batch_size",
    **dict.fromkeys(("freeze_trainable_layers", "num_layers_unfrozen", "unfrozen_layers"), "last_blocks"),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), "layers"),
    **dict.fromkeys(("hidden_size", "n_embd", "n_embed"), "d_model"),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), "heads"),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff"), "feed_forward"),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), "max_positions"),
    "tie_word_embeddings": "tie_embeddings",
    **dict.fromkeys(("random_seed", "random_state"), "seed"),
}
COMMANDS: Mapping[str, str] = {
    "scratch": "train-from-scratch",
    **dict.fromkeys(("train", "sft", "tune", "fine-tune"), "finetune"),
    **dict.fromkeys(("qlora", "dora"), "lora"),
    **dict.fromkeys(("generate", "chat", "ask", "run", "infer"), "prompt"),
    **dict.fromkeys(("eval", "test"), "evaluate"),
    **dict.fromkeys(("fuse", "merge-lora", "merge-and-unload"), "merge"),
    **dict.fromkeys(("convert", "save"), "export"),
    **dict.fromkeys(("memory", "estimate-memory", "calculator", "calculate"), "calc"),
    **dict.fromkeys(("init", "create", "start"), "new"),
    **dict.fromkeys(("env", "check", "info"), "doctor"),
    **dict.fromkeys(("preprocess", "dataset"), "data"),
    **dict.fromkeys(("list", "ls"), "adapters"),
    "svd": "spectrum",
}
OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(("--as", "--to", "--type"), "--format"),
    **dict.fromkeys(("--model", "--model-path", "--base-model", "--model-name-or-path"), "--base"),
    **dict.fromkeys(("--adapter-path", "--lora", "--peft", "--adapter-name-or-path"), "--adapter"),
    **dict.fromkeys(("--r", "--lora-r", "--lora-rank"), "--rank"),
    "--lora-alpha": "--alpha",
    **dict.fromkeys(("--target-modules", "--lora-target"), "--targets"),
    **dict.fromkeys(("--batch-size", "--per-device-train-batch-size", "--micro-batch-size"), "--batch"),
    **dict.fromkeys(
        ("--max-length", "--seq-len", "--max-seq-length", "--sequence-length", "--cutoff-len"), "--sequence"
    ),
    **dict.fromkeys(("--gradient-checkpointing", "--grad-checkpoint"), "--checkpointing"),
    **dict.fromkeys(("--max-new-tokens", "--n-predict"), "--max-tokens"),
    **dict.fromkeys(("--temp",), "--temperature"),
    **dict.fromkeys(("--output", "--output-dir", "--save-path", "--out-dir"), "--out"),
    **dict.fromkeys(("--config", "--params-file"), "--params"),
    **dict.fromkeys(("--num-processes", "--nproc-per-node", "--num-gpus"), "--devices"),
}


def suggest(name: str, known: Iterable[str], aliases: Mapping[str, str], section: str = "") -> str | None:
    """The known name that is meant by `name`: by the table, else the nearest in spelling; None if none is near."""
    names = list(known)
    for alias in (f"{section}.{name}", name):
        if (meant := aliases.get(alias, "").format(name)) in names or ("." in alias and alias in aliases):
            return meant
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return near[0] if near else None
