"""Adapters of mlx-lm: adapters.safetensors with A (I, R) and B (R, O), y = Wx + s·xAB."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.weights.foreign import Converted, Format, converted, low_rank

if TYPE_CHECKING:
    from pipeline.models.base import CausalLM

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
PARTS = ("lora_a", "lora_b", "m")  # m: DoRA's magnitude


def detect(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path, model: "CausalLM", _base: Path) -> Converted:
    """Raises UserError for what is trained in full, and for experts.

    A and B of experts have a dimension more.
    """
    from pipeline.adapters.low_rank import LowRank
    from pipeline.files.artifact import read_json
    from pipeline.models.save import load_tensors

    source = folder / WEIGHTS
    config = read_json(folder / CONFIG, "mlx-lm writes it beside the adapter")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(
            f"{folder / CONFIG}: fine_tune_type is {str(kind)[:80]!r}: whole weights are trained. "
            "Fuse the model with mlx_lm.fuse, and use it as a base."
        )
    settings = config.get("lora_parameters")
    scale = settings.get("scale") if isinstance(settings, dict) else None
    layers: dict[str, dict[str, Any]] = {}
    for key, tensor in load_tensors(source).items():
        name, _, part = key.rpartition(".")
        if part not in PARTS:
            raise UserError(
                f"{source}: {key[:200]} is not a part of LoRA. Fuse the model with mlx_lm.fuse "
                "instead."
            )
        layers.setdefault(name, {})[part] = tensor
    updates = {}
    for name, parts in layers.items():
        wanted = PARTS[: 3 if kind == "dora" else 2]
        if {*parts} != {*wanted}:
            raise UserError(
                f"{source}: {name[:200]} has {', '.join(sorted(parts))}; {kind} has "
                f"{', '.join(wanted)}."
            )
        a, b = (parts[part].mT if parts[part].ndim > 1 else parts[part] for part in PARTS[:2])
        update = low_rank(model, name, a, b, scale, source, parts.get("m"))
        updates[name] = update
        if update.embedding and update.magnitude is not None:
            raise UserError(
                f"{source}: {name} is an embedding with DoRA, which PEFT does not support. Fuse it "
                "with mlx_lm.fuse."
            )
        # mlx-lm computes a tied head with the adapted embedding
        if update.embedding and model.shape.tied:
            updates[model.head_name] = LowRank(update.b.mT, update.a.mT, update.scale)
    base_name = config.get("base_model_name_or_path") or config.get("model")
    return converted(updates, model, base_name, (source, folder / CONFIG))


FORMAT = Format(
    0, "mlx-lm", "adapters.safetensors: LoRA and DoRA, also of the embedding", detect, read
)
