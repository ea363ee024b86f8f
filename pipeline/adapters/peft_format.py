"""Adapters on disk in PEFT's format: written so that PEFT opens them, read so that nothing wrong gets in."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import artifact
from pipeline.adapters.attach import AdapterSpec, adapter_layers, attach, tensors
from pipeline.adapters.lora import transposed
from pipeline.binding import CONFIG, WEIGHTS, Fingerprint, read_config, refuse_foreign
from pipeline.errors import UserError
from pipeline.models.causal import CausalLM
from pipeline.models.files import load_tensors, save_tensors
from pipeline.tensors import refuse_difference, shapes

# PEFT's options that change what an adapter computes, each with the only value that is understood here ...
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# ... those that are read, and those that decide nothing once an adapter is trained. Any other must be empty.
_READ = {"r", "lora_alpha", "target_modules", "modules_to_save", "trainable_token_indices", "init_lora_weights"}
_HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "fan_in_fan_out",  # of GPT-2's layers; PEFT sets it right itself, whatever the file says
}
EMBEDDING = "embed_tokens"  # what PEFT means where a list of rows names no module
_KEEPS_BASE = (True, False, "gaussian", "orthogonal")  # initialisations that leave the base's weights as they are


LORA_A = ".lora_A.weight"


def save_adapter(folder: Path, model: CausalLM, spec: AdapterSpec, base_name: str) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    save_tensors(folder / WEIGHTS, dict(tensors(model, spec)))
    config = {
        **_PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(transposed(layer.base) for _, layer in adapter_layers(model)),
        "init_lora_weights": True,
        "target_modules": list(spec.targets),
        "modules_to_save": list(spec.saved) or None,
        "trainable_token_indices": {name: list(ids) for name, ids in spec.rows.items()} or None,
    }
    artifact.write_json(folder / CONFIG, config)


def read_spec(folder: Path) -> AdapterSpec:
    """What the adapter in `folder` says it changes. Raises UserError for all that is not understood."""
    config, place = read_config(folder), folder / CONFIG
    _refuse_options(config, place)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _whole(rank, 1) or not isinstance(alpha, int | float) or not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"{place}: r must be a whole number from 1 and lora_alpha positive, got {rank!r}, {alpha!r}.")
    targets, saved = config.get("target_modules"), config.get("modules_to_save") or []
    if not _names(targets) or not targets:
        raise UserError(f"{place}: target_modules must be a list of names, got {targets!r}.")
    if not _names(saved):
        raise UserError(f"{place}: modules_to_save must be a list of names, got {saved!r}.")
    return AdapterSpec(int(str(rank)), float(alpha), tuple(sorted(targets)), tuple(saved), _rows(config, place))


def _refuse_options(config: dict[str, Any], place: Path) -> None:
    for key, plain in _PLAIN.items():
        if (config.get(key) or plain) != plain:
            raise UserError(f"{place}: {key} is {config[key]!r}; only {plain!r} is supported so far.")
    for key in sorted(config.keys() - _PLAIN.keys() - _READ - _HARMLESS):
        if config[key]:
            raise UserError(f"{place}: {key} is {config[key]!r}; it is not supported so far.")
    if config.get("init_lora_weights", True) not in _KEEPS_BASE:
        raise UserError(
            f"{place}: init_lora_weights is {config['init_lora_weights']!r}, which also changes the base. "
            "Convert the adapter in PEFT with save_pretrained(path_initial_model_for_weight_conversion=...)."
        )


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _rows(config: dict[str, Any], place: Path) -> dict[str, tuple[int, ...]]:
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, list):
        indices = {EMBEDDING: indices}
    if not isinstance(indices, dict):
        raise UserError(f"{place}: trainable_token_indices must map modules to rows, got {indices!r}.")
    for name, ids in indices.items():
        if not isinstance(ids, list) or not all(_whole(id_, 0) for id_ in ids):
            raise UserError(f"{place}: trainable_token_indices.{name} must list rows, got {ids!r}.")
    return {name: tuple(ids) for name, ids in indices.items()}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors. Raises UserError if they cannot be read or are not finite."""
    found = load_tensors(folder / WEIGHTS)
    for key, tensor in found.items():
        if not tensor.float().isfinite().all():  # 8 bits have no isfinite
            raise UserError(
                f"{folder / WEIGHTS}: {key} is not finite. Train the adapter again with a lower learning_rate."
            )
    return found


def load_adapter(
    model: CausalLM, base_folder: Path, folder: Path, fingerprint: Fingerprint = artifact.base_fingerprint
) -> AdapterSpec:
    """Attach the adapter in `folder` to `model`, which was loaded from `base_folder`.

    Parameters get the adapter's tensors; none is written to, so a model that shares its tensors keeps them.
    Raises UserError if the adapter was changed since it was made, was made on another base, or has other tensors
    than its config and this model call for, or such that are not finite; `model` is then of no more use.
    """
    refuse_foreign(base_folder, folder, fingerprint)
    spec = read_spec(folder)
    found = shapes(folder / WEIGHTS)
    rows = [row for ids in spec.rows.values() for row in ids]
    if rows and max(rows) >= model.shape.rows:
        raise UserError(f"{folder}: trains row {max(rows)}; {base_folder} has {model.shape.rows} rows.")
    for key, names in (("modules_to_save", spec.saved), ("trainable_token_indices", spec.rows)):
        if not set(names) <= set(model.ends):
            known = " and ".join(model.ends)
            raise UserError(f"{folder / CONFIG}: {key} may name {known} only so far, got {', '.join(names)}.")
    values = read_tensors(folder)
    attach(model, spec, next((value.dtype for key, value in values.items() if key.endswith(LORA_A)), None))
    places = tensors(model, spec)
    refuse_difference({key: tuple(p.shape) for key, p in places.items()}, found, str(folder / WEIGHTS))
    for key, parameter in places.items():
        parameter.data = values[key].to(parameter, copy=True)  # a copy: what the library read may be a mapped file
    for key, parameter in places.items():
        if not torch.equal(parameter, values[key].to(parameter)):
            raise UserError(f"{folder}: {key} differs from its twin, but the base ties embedding and head.")
    model.requires_grad_(False)
    return spec
