"""Other tools' keys and values as ours: names by `aliases.KEYS`, values by the functions here.

A function (their key, value) → our value returns a `Why` for a value without a counterpart, and
None for one that sets nothing, such as `max_steps: -1`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from pipeline.project.params.aliases import KEYS, by_other_name

BITS = {"load_in_4bit": "nf4", "load_in_8bit": "int8", "4": "nf4", "8": "int8"}
# quantize the scales too
DOUBLE = ("double_quantization", "bnb_4bit_use_double_quant", "use_bnb_nested_quant")
NAMES: Mapping[str, Mapping[str, str]] = {  # our key → their name of a value → ours
    "schedule": by_other_name(
        {
            "constant": "constant constant_with_warmup",
            "linear": "linear linear_schedule",
            "cosine": "cosine cosine_decay cosine_with_min_lr",
            "cosine_with_restarts": "cosine_with_restarts",
            "polynomial": "polynomial",
            "inverse_sqrt": "inverse_sqrt",
            "warmup_stable_decay": "warmup_stable_decay",
        }
    ),
    "optimizer": by_other_name(
        {
            "adamw": "adam adamw adamw_torch adamw_torch_fused adamw_hf",
            "adamw-8bit": "adamw_bnb_8bit adamw_8bit",
            "paged-adamw-8bit": "paged_adamw_8bit",
            "sgd": "sgd",
            "muon": "muon",
        }
    ),
    "precision": by_other_name(
        {"bf16": "bfloat16 bf16", "fp16": "float16 fp16", "fp32": "float32 fp32"}
    ),
    "loss": by_other_name({"dpo": "sigmoid", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}),
    "init_lora_weights": by_other_name(
        {
            "kaiming": "True",
            "gaussian": "gaussian",
            "orthogonal": "orthogonal",
            "pissa": "pissa",
        }
    ),
}
SAME: Mapping[str, Any] = {  # their key → the only value, or the default, that there is here
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "label_smoothing_factor": 0.0,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "fan_in_fan_out": False,
    "megatron_core": "megatron.core",
    "train": True,
    "use_peft": True,
    "do_train": True,
    "stage": "sft",
    "training_mode": "normal",
    "inference_mode": True,
    "mask_prompt": True,
    "completion_only_loss": True,
    "assistant_only_loss": True,
    "average_tokens_across_devices": True,
    "num_layers": -1,
    "lora_layers": -1,
    "local_rank": -1,
    "skip_memory_metrics": True,
    "qalora_group_size": 16,
    "quantization_method": "bnb",
    "quantization_type": "nf4",
    "bnb_4bit_quant_type": "nf4",
}


class Why(str):
    """Why a value has no counterpart here."""


def translated(tree: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Their key, their value, our key and our value of each setting in `tree`.

    Our value is a `Why` where there is none, and None where theirs sets nothing.
    """
    numbers = tree.get("lr_scheduler_kwargs")
    if isinstance(numbers, dict):  # transformers': each has a key of its own here
        others = {key: value for key, value in tree.items() if key != "lr_scheduler_kwargs"}
        tree = {**others, **{str(key): value for key, value in numbers.items()}}
    pairs = {theirs: _translate(theirs, value, section) for theirs, value in tree.items()}
    if tree.get("save_strategy", "steps") != "steps":
        for key in pairs.keys() & {"save_steps", "save_total_limit"}:
            pairs[key] = key, Why("save_strategy is not steps")
    doubled = ("quantization", "nf4") in pairs.values() and True in map(tree.get, DOUBLE)
    for theirs, (ours, value) in pairs.items():
        if doubled and theirs in DOUBLE:
            continue
        is_doubled = doubled and ours == "quantization"
        yield theirs, tree[theirs], ours, "nf4-dq" if is_doubled else value


def _translate(theirs: str, value: Any, section: str) -> tuple[str, Any]:
    ours = KEYS.get(f"{section}.{theirs}") or KEYS.get(theirs, theirs)
    is_off = value is False and ours not in ("gradient_checkpointing", "use_peft")
    if is_off or value in (None, "", "none", "no", [], {}) or SAME.get(theirs) == value:
        return ours, None  # not set, or as it always is here
    convert = partial(by_name, ours) if ours in NAMES else CONVERSIONS.get(ours)
    return ours, convert(theirs, value) if convert else value


def by_name(ours: str, theirs: str, value: Any) -> Any:
    """Our name of a value of a key in `NAMES`. bf16, fp16 and pissa_init are keys that name it."""
    if theirs in ("bf16", "fp16") and value in (True, "auto", "full"):
        return theirs
    # PEFT's pissa_niter_16 is PiSSA too
    name = "pissa" if theirs == "pissa_init" else str(value).partition("_niter")[0]
    known = dict.fromkeys(NAMES[ours].values())
    return NAMES[ours].get(name) or Why(f"values here are {', '.join(known)}")


def _quantization(theirs: str, value: Any) -> Any:
    if theirs in DOUBLE:
        return Why("double quantization is quantization: nf4-dq")
    bits = theirs if theirs in BITS and value is True else str(value)
    return BITS.get(bits) or Why("a base is quantized to int8, nf4 or nf4-dq")


def _target_modules(_: str, value: Any) -> Any:
    return ["all-linear"] if value in ("all", "all-linear", True) else _names(_, value)


def _layers_to_transform(theirs: str, value: Any) -> Any:
    """mlx-lm counts the last blocks, PEFT numbers them."""
    if theirs not in ("num_layers", "lora_layers"):
        return value
    return f"last {value}" if isinstance(value, int) and value > 0 else None


def _names(_: str, value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[\w., -]+", value):
        return Why("a regular expression: name the linears in a list")
    return _split(value)


def _split(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _eval_share(_: str, value: Any) -> Any:
    if isinstance(value, int | float) and value >= 1:
        return Why("it is a number of examples; eval_share is a share, such as 0.1")
    return value


def _alpha(theirs: str, value: Any) -> Any:
    return Why("alpha is scale × rank") if theirs == "scale" else value


def _checkpointing(_: str, value: Any) -> Any:
    if value in ("selective", "full"):
        return value
    return "none" if value is False else "full"


def _epochs(_: str, value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else Why("epochs are whole numbers here")
    return value


def _if_positive(_: str, value: Any) -> Any:
    return None if isinstance(value, int | float) and value <= 0 else value


CONVERSIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "quantization": _quantization,
    "target_modules": _target_modules,
    "layers_to_transform": _layers_to_transform,
    "exclude_modules": _names,
    "modules_to_save": lambda _, value: _split(value),
    "train_embeddings": lambda *_: Why(
        "new tokens are named in expand_vocab, and train with train_embeddings=new_rows"
    ),
    "alpha": _alpha,
    "gradient_checkpointing": _checkpointing,
    "eval_share": _eval_share,
    "epochs": _epochs,
    "chat_template": lambda *_: Why("the base's own chat template is used"),
    **dict.fromkeys(("max_steps", "warmup_steps", "patience"), _if_positive),
}
