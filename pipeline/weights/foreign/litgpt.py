"""Adapters of litgpt: lit_model.pth.lora, with rank and alpha in hyperparameters.yaml.

One A and B for queries, keys and values together: A stacks an A of rank R for each of those that
are trained, B their rows, heads in order. So they are split without multiplying B and A. Only
models with LLaMA's names of layers are read. Pythia and Phi fuse other matrices in transformers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.weights.foreign import Converted, Format, converted, low_rank, rank_and_alpha

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.base import CausalLM

WEIGHTS, SETTINGS = "lit_model.pth.lora", "hyperparameters.yaml"
LARGEST = 100_000  # characters of a config
HEADS = ("q_proj", "k_proj", "v_proj")
TRAINED = ("lora_query", "lora_key", "lora_value")
LINEARS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
FUSED = ("attn.qkv", "attn.attn")  # today's name, and that of 2024
INSTEAD = (
    "Merge it with `litgpt merge_lora`, convert it with `litgpt convert_from_litgpt`, and use "
    "that as a base."
)


def detect(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path, model: "CausalLM", base: Path) -> Converted:
    """Raises UserError."""
    from pipeline.weights.torch_file import load

    source = folder / WEIGHTS
    settings = _settings(folder / SETTINGS)
    rank, alpha = rank_and_alpha(folder / SETTINGS, settings, "lora_r", "lora_alpha")
    if "model.layers.0.self_attn.q_proj" not in dict(model.named_modules()):
        raise UserError(
            f"{base} has other layers than LLaMA's, which litgpt names and splits otherwise. "
            f"{INSTEAD}"
        )
    tensors, updates = load(source), {}
    for key in [key for key in tensors if key.endswith(".lora_A")]:
        theirs = key.removesuffix(".lora_A")
        a, b = tensors.pop(key), tensors.pop(f"{theirs}.lora_B", None)
        if b is None or a.ndim != 2 or b.ndim != 2:
            raise UserError(
                f"{source}: {theirs[:200]} has no lora_A and lora_B of two dimensions. Copy it "
                "again."
            )
        for name, one_a, one_b in _layers(theirs, a, b, model, settings, source):
            updates[name] = low_rank(model, name, one_a, one_b, alpha / rank, source)
    if tensors:
        raise UserError(f"{source}: {min(tensors)[:200]} is not a part of LoRA. {INSTEAD}")
    return converted(updates, model, "", (source, folder / SETTINGS))


def _settings(path: Path) -> dict[str, Any]:
    from pipeline.files import strict_yaml

    settings = strict_yaml.read(path, f"{path}, which litgpt writes beside the adapter", LARGEST)
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no settings file of litgpt. Copy the adapter's folder again.")
    return settings


def _layers(
    theirs: str, a: "Tensor", b: "Tensor", model: "CausalLM", settings: dict[str, Any], source: Path
) -> list[tuple[str, "Tensor", "Tensor"]]:
    """(name in transformers, A, B) of each layer that one of litgpt's holds. Raises UserError."""
    if theirs == "lm_head":  # litgpt pads its rows, which no token has
        return [(model.head_name, a, b[: model.shape.rows])]
    import torch

    parts = theirs.split(".")
    inside = ".".join(parts[3:])
    if parts[:2] != ["transformer", "h"] or inside not in (*LINEARS, *FUSED):
        raise UserError(f"{source}: {theirs[:200]} is a layer that is not read. {INSTEAD}")
    block = f"model.layers.{parts[2]}"
    if inside in LINEARS:
        return [(f"{block}.{LINEARS[inside]}", a, b)]
    names = [
        f"{block}.self_attn.{name}"
        for name, key in zip(HEADS, TRAINED, strict=True)
        if settings.get(key) is True
    ]
    modules = dict(model.named_modules())
    rows = [modules[name].out_features if name in modules else 0 for name in names]
    if not names or a.shape[0] != len(names) * b.shape[1] or b.shape[0] != sum(rows):
        raise UserError(
            f"{source}: {theirs} has shapes {list(a.shape)} and {list(b.shape)}, which do not fit "
            f"the {sum(rows)} rows of {', '.join(names) or 'no layer'}, trained by {SETTINGS}. "
            "Pass the base it was trained on with --base."
        )
    return list(zip(names, a.chunk(len(names)), torch.split(b, rows), strict=True))


FORMAT = Format(1, "litgpt", f"{WEIGHTS} of models with LLaMA's layers", detect, read)
