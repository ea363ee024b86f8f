"""Adapters on disk in PEFT's format: written so that PEFT opens them, read so that nothing wrong gets in."""

from pathlib import Path
from typing import Any

import torch

from pipeline import artifact
from pipeline.adapters.attach import AdapterSpec, attach, tensors
from pipeline.errors import UserError
from pipeline.models.base import load_tensors, save_tensors
from pipeline.models.minigpt import MiniGPT
from pipeline.tensors import refuse_difference, shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT's options that change what an adapter computes, and the only value of each that is understood here.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_qalora": False,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def save_adapter(folder: Path, model: MiniGPT, spec: AdapterSpec, base_name: str) -> None:
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
        "init_lora_weights": True,
        "target_modules": list(spec.targets),
        "modules_to_save": list(spec.saved) or None,
        "trainable_token_indices": {name: list(ids) for name, ids in spec.rows.items()} or None,
    }
    artifact.write_json(folder / CONFIG, config)


def read_spec(folder: Path) -> AdapterSpec:
    """What the adapter in `folder` says it changes. Raises UserError for what is not understood."""
    config = read_config(folder)
    place = folder / CONFIG
    for key, plain in _PLAIN.items():
        if (config.get(key) or plain) != plain:
            raise UserError(f"{place}: {key} is {config[key]!r}; only {plain!r} is supported so far.")
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(f"{place}: r must be a whole number from 1 and lora_alpha positive, got {rank!r}, {alpha!r}.")
    if isinstance(targets, str):
        targets = [targets]
    if not isinstance(targets, list) or not targets:
        raise UserError(f"{place}: target_modules must be a list of names, got {targets!r}.")
    return AdapterSpec(
        rank, float(alpha), tuple(sorted(targets)), tuple(config.get("modules_to_save") or ()), _rows(config, place)
    )


def _rows(config: dict[str, Any], place: Path) -> dict[str, tuple[int, ...]]:
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, list):
        indices = {"embed_tokens": indices}
    unknown = indices.keys() - {"embed_tokens", "lm_head"}
    if unknown:
        raise UserError(f"{place}: trainable_token_indices names {min(unknown)}; known: embed_tokens, lm_head.")
    return {name: tuple(ids) for name, ids in indices.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError if there is none."""
    return artifact.read_json(folder / CONFIG, f"An adapter folder holds {CONFIG} and {WEIGHTS}")


def load_adapter(model: MiniGPT, base_folder: Path, folder: Path) -> AdapterSpec:
    """Attach the adapter in `folder` to `model`, which was loaded from `base_folder`.

    Raises UserError if the adapter was changed since it was made, was made on another base, or has other tensors
    than its config and this model call for; `model` is then of no more use.
    """
    refuse_foreign(base_folder, folder)
    spec = read_spec(folder)
    found = shapes(folder / WEIGHTS)
    rows = [row for ids in spec.rows.values() for row in ids]
    outside = [row for row in rows if not 0 <= row < model.config.vocab_size]
    if outside:
        raise UserError(f"{folder}: trains row {outside[0]}; {base_folder} has {model.config.vocab_size} rows.")
    attach(model, spec)
    places = tensors(model, spec)
    refuse_difference({key: tuple(p.shape) for key, p in places.items()}, found, str(folder / WEIGHTS))
    values = load_tensors(folder / WEIGHTS)
    with torch.no_grad():
        for key, parameter in places.items():
            parameter.copy_(values[key])
    for key, parameter in places.items():
        if not torch.equal(parameter, values[key].to(parameter.dtype)):
            raise UserError(f"{folder}: {key} differs from its twin, but the base ties embedding and head.")
    model.requires_grad_(False)
    return spec


def refuse_foreign(base_folder: Path, folder: Path) -> None:
    """Raises UserError if the adapter's manifest does not bind these files to this base.

    An adapter made elsewhere has no manifest: its names and shapes are all that can be checked.
    """
    if not (folder / artifact.MANIFEST).exists():
        return
    manifest = artifact.read_manifest(folder)
    _refuse_edited(manifest, read_config(folder), folder / CONFIG)
    artifact.verify(folder)
    trained_on, found = manifest.get("base", {}), artifact.base_fingerprint(base_folder)
    for part, digest in found.items():
        if trained_on.get(part) != digest:
            raise UserError(
                f"{folder} was trained on another base: its {part} {'have' if part == 'tensors' else 'has'} sha256 "
                f"{str(trained_on.get(part))[:12]}, those of {base_folder} {digest[:12]}. "
                "Name the base it was trained on with --base, or train it again."
            )


def _refuse_edited(manifest: dict[str, Any], config: dict[str, Any], place: Path) -> None:
    trained = manifest.get("params", {})
    for key, name in (("r", "rank"), ("lora_alpha", "alpha")):
        if name in trained and config.get(key) != trained[name]:
            raise UserError(
                f"{place}: {key} was edited: it says {config.get(key)!r}, the adapter was trained with "
                f"{trained[name]!r}. Restore the file or train the adapter again."
            )
