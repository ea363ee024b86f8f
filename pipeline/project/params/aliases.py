"""Other names of keys, commands and options: our own former ones, and those of other tools.

Keys are taken by these names, in params files, in --set and in other tools' configs; commands and
options are answered with the name here. `python -m docs` writes the page of them. A key may be
written with its section where only that says what is meant.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase


def by_other_name(names: Mapping[str, str]) -> dict[str, str]:
    """Other name → the name here, from the name here → its other names in one text."""
    return {other: name for name, others in names.items() for other in others.split()}


# Keys and sections of params.yaml. In files of earlier versions `base` stands in a section.
KEYS = by_other_name(
    {
        "base": (
            "pretrain.base import.base base_model model model_name model_name_or_path model_id "
            "pretrained_model base_model_name_or_path"
        ),
        "train_from_scratch": "scratch finetune_scratch",
        "finetune_lora": "lora qlora finetune_qlora peft",
        "finetune_dpo": "dpo ipo kto orpo simpo rlhf",
        "finetune_full": "full sft",
        "finetune_freeze": "freeze",
        "finetune_prefix": "prefix",
        "finetune_prompt": "prompt",
        "finetune_sweep": "sweep",
        "evaluate": "eval evaluation",
        "rank": "r lora_r lora_rank",
        "alpha": "lora_alpha scale",
        "target_modules": (
            "lora_target lora_targets lora_target_modules lora_target_linear targets keys"
        ),
        "lora_dropout": "dropout lora_drop adapter_dropout",
        "neftune_alpha": "neftune_noise_alpha noisy_embedding_alpha neftune",
        "dora": "use_dora lora_dora peft_use_dora",
        "rslora": "use_rslora rs_lora peft_use_rslora",
        "init_lora_weights": "init_lora pissa_init peft_init_lora_weights",
        "loraplus_ratio": "loraplus_lr_ratio lora_plus_ratio",
        "layers_to_transform": (
            "peft_layers_to_transform lora_layers_to_transform num_layers lora_layers"
        ),
        "exclude_modules": "peft_exclude_modules lora_exclude_modules",
        "modules_to_save": "lora_modules_to_save additional_target",
        "train_embeddings": "trainable_token_indices",
        "quantization": (
            "load_in_4bit load_in_8bit quantize quantization_bit bits double_quantization "
            "bnb_4bit_use_double_quant use_bnb_nested_quant"
        ),
        "virtual_tokens": "num_virtual_tokens prefix_length prompt_length",
        "optimizer": "optim optimizer_type optimizer_name optimizer_class",
        "adam_beta1": "beta1 adam_b1",
        "adam_beta2": "beta2 adam_b2",
        "adam_epsilon": "eps epsilon adam_eps",
        "weight_decay": "wd decay l2",
        "epochs": "num_epochs num_train_epochs n_epochs",
        "max_steps": (
            "num_train_steps max_train_steps num_steps iters max_iters train_steps total_steps"
        ),
        "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size",
        # verl's and NeMo-RL's; fairseq's max_tokens sizes the step itself
        "tokens_per_batch": "max_token_len_per_gpu train_mb_tokens",
        "learning_rate": "lr learning_rate_max max_lr",
        "schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
        "min_lr_ratio": "min_lr_rate cosine_min_lr_ratio",
        "num_cycles": "lr_num_cycles",
        "power": "lr_power",
        "decay_ratio": "decay_fraction cooldown_fraction",
        "warmup_steps": "warmup num_warmup_steps warmup_iters",
        "warmup_ratio": "warmup_proportion warmup_fraction lr_warmup_ratio",
        "max_grad_norm": "clip_norm grad_clip gradient_clipping clip_grad_norm max_norm",
        "gradient_accumulation_steps": (
            "accumulate gradient_accumulation grad_accumulation_steps grad_accum "
            "accumulate_grad_batches"
        ),
        "gradient_checkpointing": (
            "checkpointing grad_checkpoint activation_checkpointing use_gradient_checkpointing"
        ),
        "max_length": (
            "max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size"
        ),
        "precision": "bf16 fp16 torch_dtype mixed_precision compute_dtype",
        "data": "dataset datasets dataset_name dataset_path train_file train_data data_path",
        "eval_share": "val_set_size test_size val_size eval_split validation_split",
        "eval_steps": "eval_every steps_per_eval eval_interval",
        "patience": "early_stopping_patience",
        "load_best": "load_best_model_at_end",
        "save_steps": "save_every save_interval checkpointing_steps",
        "init_from": "adapter_name_or_path lora_model_dir resume_adapter_file",
        "beta": "pref_beta dpo_beta rl_beta",
        "loss": "pref_loss",
        "label_smoothing": "dpo_label_smoothing",
        "rpo_alpha": "pref_ftx",
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
# what a section's name says of its keys, unless they are set
IMPLIED: Mapping[str, Mapping[str, str]] = {
    "qlora": {"quantization": "nf4"},
    "finetune_qlora": {"quantization": "nf4"},
    **{name: {"loss": name} for name in ("ipo", "kto", "orpo", "simpo")},
}
# Other tools' settings without a counterpart here: why → settings; * stands for any characters.
# These change no result: they are ignored, with a note.
IGNORED = by_other_name(
    {
        "`lora finetune METHOD --devices N` runs on several devices": (
            "deepspeed fsdp* ddp* tensor_parallel* context_parallel* sequence_parallel* local_rank "
            "accelerator_config ray* use_cpu"
        ),
        "attention, kernels and packing are chosen by the model and the device": (
            "flash_att* attn_implementation xformers_attention sdp_attention s2_attention "
            "eager_attention *sample_packing packing* pad_to_* group_by_length length_column_name "
            "tf32 torch_compile* liger* use_liger* enable_liger* use_unsloth* lora_*_kernel "
            "neat_packing padding_free plugins torch_empty_cache_steps use_cache "
            "train_sampling_strategy *_checkpointing_kwargs"
        ),
        "`report_to`, above the sections, names the trackers of runs": (
            "report_to wandb* mlflow* comet* swanlab* trackio* *tensorboard* logging_* log_* "
            "run_name plot_loss steps_per_report project include_*tokens* disable_tqdm debug"
        ),
        "results go to artifacts/, each stage to its folder": (
            "*output_dir adapter_path adapter_file save_strategy save_only_model "
            "save_on_each_node save_safetensors saves_per_epoch save_first_step"
        ),
        "`lora push` uploads an adapter": "push_to_hub* hub_*",
        "data files are read as they are, all of them": (
            "dataset_prepared_path overwrite_cache preprocessing_num_workers dataset_num_proc "
            "dataset_processes shuffle_dataset dataloader_* streaming remove_unused_columns "
            "label_names"
        ),
        "a killed run resumes by itself from its last checkpoint": (
            "*resume_from_checkpoint* restore_callback_* ignore_data_skip enable_jit_checkpoint"
        ),
        "an adapter is trained on the base, a new one unless init_from names one": (
            "create_new_adapter inference_mode"
        ),
        "held-out examples are chosen by eval_share": (
            "eval*_strategy do_eval do_predict val_batches test test_batches evals_per_epoch "
            "*eval_batch_size eval_delay eval_on_start eval_accumulation_steps eval_do_* eval_use_* "
            "eval_table_size eval_max_new_tokens batch_eval_metrics prediction_loss_only "
            "*_full_eval include_for_metrics"
        ),
    }
)
# These change what is trained: without another name, they are an error.
NO_COUNTERPART = IGNORED | by_other_name(
    {
        "optimizers train all that is trainable; name linears in target_modules": (
            "optim_target_modules"
        ),
        "the base's own chat template is used": (
            "chat_template* template default_system tokenizer_* special_tokens add_eos_token"
        ),
        "what is trained on follows from the data's format: `lora data show`": (
            "train_on_* roles_to_train assistant_only_loss completion_only_loss mask_prompt "
            "mask_history dataset_text_field"
        ),
        "the data files that `data` names are read, all of them": (
            "dataset_dir dataset_kwargs dataset_split* dataset_config max_samples data_seed"
        ),
        "blocks are numbered in layers_to_transform, in whatever list they are": "layers_pattern",
        "it runs code that comes with a base: set import.trust_remote_code if you trust it": (
            "trust_remote_code"
        ),
        "held-out examples are chosen by eval_share, or named by eval_data": (
            "eval_dataset test_datasets greater_is_better"
        ),
        "the reference is the same model, without the adapter or as it begins": (
            "ref_model* ref_adapter* precompute_ref_log_probs"
        ),
        "only examples and preferences are learned from": (
            "rl training_mode pref_bco_weight dpo_norm_loss dpo_use_* kto_* ppo_* reward_model*"
        ),
        "a section is a method: finetune_full trains all weights": "use_peft",
    }
)
COMMANDS = by_other_name(
    {
        "train-from-scratch": "scratch",
        "train": "sft tune fine-tune fit",
        "lora": "qlora dora",
        "dpo": "ipo kto orpo simpo rlhf",
        "prompt": "generate ask run infer",
        "chat": "talk repl interactive",
        "evaluate": "eval test",
        "merge": "fuse merge-lora merge-and-unload",
        "export": "convert save",
        "serve": "server api",
        "check": "validate lint stats",
        "show": "preview",
        "calc": "memory estimate-memory calculator calculate",
        "new": "init create start",
        "doctor": "env check info",
        "data": "preprocess dataset",
        "adapters": "list ls",
        "spectrum": "svd",
    }
)
OPTIONS = by_other_name(
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
        "--methods": "--method --finetuning-type --fine-tune-type",
        "--params": "--config --params-file",
        "--devices": "--num-processes --nproc-per-node --num-gpus",
    }
)


def why_none(name: str, table: Mapping[str, str] = NO_COUNTERPART) -> str | None:
    """Why another tool's setting has no counterpart here; None if the table does not have it."""
    return next((why for pattern, why in table.items() if fnmatchcase(name, pattern)), None)


def suggest(
    name: str, known: Iterable[str], aliases: Mapping[str, str], section: str = ""
) -> str | None:
    """The known name that `name` means: by the table, else the nearest in spelling, if any is."""
    names = list(known)
    for alias in (f"{section}.{name}", name):
        meant = aliases.get(alias)
        if meant in names or (meant and "." in alias):
            return meant
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return near[0] if near else None
