"""Adapters of torchtune in its own names: adapter_model.pt, or adapter_0.pt of older versions.

By a token's position its LLaMA, Mistral and Gemma turn pairs of neighbours, as Meta's code does.
transformers pairs a number with the one half a head further. So rows of queries and keys are in
another order. torchtune also writes the adapter in PEFT's format, which is not read where its own
file is there, as it is wrong twice: it reorders Qwen2's rows, which already are in transformers'
order, and leaves DoRA's magnitudes in Meta's order.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.weights.foreign import Converted, Format, converted, low_rank, rank_and_alpha

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.base import CausalLM

CONFIG = "adapter_config.json"
REORDERED = {"llama": True, "mistral": True, "gemma": True, "qwen2": False}  # by transformers' type
LAYERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
PARTS = {"lora_a.weight": "a", "lora_b.weight": "b", "magnitude": "magnitude"}
_KEY = re.compile(r"(?P<layer>.+?)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")


def _files(folder: Path) -> list[Path]:
    """The newest of them last."""
    numbered = sorted(
        folder.glob("adapter_[0-9]*.pt"), key=lambda path: (len(path.name), path.name)
    )
    return numbered + [path for path in (folder / "adapter_model.pt",) if path.is_file()]


def detect(folder: Path) -> bool:
    return bool(_files(folder))


def read(folder: Path, model: "CausalLM", base: Path) -> Converted:
    """Raises UserError."""
    from pipeline.files.artifact import read_json
    from pipeline.models.load import read_config
    from pipeline.weights.torch_file import load

    source = _files(folder)[-1]
    config = read_json(
        folder / CONFIG,
        "torchtune writes it with r and lora_alpha; its files of Meta's format lack it",
    )
    rank, alpha = rank_and_alpha(folder / CONFIG, config, "r", "lora_alpha")
    shape = read_config(base)
    family = str(shape.get("model_type"))
    if family not in REORDERED:
        raise UserError(
            f"{base} is a model of type {family}; of torchtune, adapters of "
            f"{', '.join(REORDERED)} are read. Merge it "
            "in torchtune, which writes a checkpoint of transformers, and use that as a base."
        )
    layers: dict[str, dict[str, Any]] = {}
    for key, tensor in load(source).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{source}: {key[:200]} is not a part of LoRA. Merge the adapter in torchtune."
            )
        layers.setdefault(match["layer"], {})[PARTS[match["part"]]] = tensor
    updates = {}
    for theirs, parts in layers.items():
        name = _name(theirs, model)
        if name is None or not {"a", "b"} <= parts.keys():
            raise UserError(
                f"{source}: {theirs[:200]} is a layer that is not read, or lacks a part. Merge "
                "the adapter."
            )
        if REORDERED[family] and name.endswith(("q_proj", "k_proj")):
            heads = shape.get("num_attention_heads")
            if name.endswith("k_proj"):
                heads = shape.get("num_key_value_heads", heads)
            parts = {
                part: tensor if part == "a" else _in_halves(tensor, heads, source)
                for part, tensor in parts.items()
            }
        updates[name] = low_rank(
            model, name, parts["a"], parts["b"], alpha / rank, source, parts.get("magnitude")
        )
    return converted(
        updates, model, config.get("base_model_name_or_path"), (source, folder / CONFIG)
    )


def _name(theirs: str, model: "CausalLM") -> str | None:
    """The layer's name in transformers; None if it is none of those above."""
    if theirs == "output":
        return model.head_name
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", theirs)
    return f"model.layers.{match[1]}.{LAYERS[match[2]]}" if match and match[2] in LAYERS else None


def _in_halves(rows: "Tensor", heads: Any, source: Path) -> "Tensor":
    """The rows (O, …) of every head from neighbours 0 1, 2 3, … to halves 0 2 …, 1 3 …"""
    if not isinstance(heads, int) or heads < 1 or rows.ndim < 1 or rows.shape[0] % (2 * heads):
        raise UserError(
            f"{source}: a tensor of shape {list(rows.shape)} is none of the base's {heads} heads. "
            "Pass the base it was trained on with --base."
        )
    pairs = rows.reshape(heads, rows.shape[0] // (2 * heads), 2, *rows.shape[1:])  # (H, K/2, 2, …)
    return pairs.transpose(1, 2).reshape(rows.shape)  # (H, 2, K/2, …) → (O, …)


FORMAT = Format(2, "torchtune", "adapter_model.pt of LLaMA, Mistral, Gemma and Qwen2", detect, read)
