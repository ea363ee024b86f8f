"""Shapes from a path or the Hub: a config.json, safetensors headers, a GGUF file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.calc.architecture import Model
from pipeline.calc.families.from_tensors import from_shapes
from pipeline.calc.families.registry import FAMILIES, architecture
from pipeline.calc.sources import gguf
from pipeline.errors import UserError
from pipeline.files.artifact import read_json, refuse_untrusted
from pipeline.files.safetensors_header import read_header

MAX_CONFIG_BYTES = 10_000_000


def from_path(path: Path) -> Model:
    """The model in a file or folder. Raises UserError with the reason."""
    try:
        return _read_model(path)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or not in the format of its name ({type(error).__name__}). Copy it again."
        ) from None


def _read_model(path: Path) -> Model:
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".gguf":
        return Model(replace(gguf.read_shapes(path), name=path.name))
    if path.suffix == ".safetensors":
        return Model(replace(from_shapes(_read_shapes([path]), {}, str(path)), name=path.name))
    hint = "Give a Hugging Face config.json, a folder, .safetensors or .gguf"
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path} is not a config: it has {path.stat().st_size:,} bytes. {hint}.")
    config = read_json(path, hint)
    return Model(replace(architecture(config, str(path)), name=str(path)), config)


def _from_folder(folder: Path) -> Model:
    refuse_untrusted(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} is an adapter. Give the model that it was trained on.")
    weights = sorted(folder.glob("*.safetensors"))
    hint = "Give a folder with a Hugging Face config.json, .safetensors or one .gguf file"
    config = read_json(folder / "config.json", hint) if (folder / "config.json").exists() else {}
    _refuse_missing_shards(folder, weights)
    if "model_type" in config and (not weights or _is_supported(config)):
        return Model(replace(architecture(config, str(folder / "config.json")), name=str(folder)), config)
    if weights:
        return Model(replace(from_shapes(_read_shapes(weights), config, str(folder)), name=str(folder)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return from_path(files[0])
    raise UserError(f"{folder} has no config.json, no .safetensors and no single .gguf file.")


def _is_supported(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    family = f"{config['model_type']}_text" if isinstance(text, dict) else config["model_type"]
    return isinstance(family, str) and family in FAMILIES


def _refuse_missing_shards(folder: Path, weights: list[Path]) -> None:
    index = folder / "model.safetensors.index.json"
    if weights and index.exists():
        listed = set(read_json(index, "Copy it again").get("weight_map", {}).values())
        missing = sorted(listed - {path.name for path in weights})
        if missing:
            raise UserError(f"{folder}: {missing[0]} is missing, but {index.name} lists it. Copy it there.")


def _read_shapes(files: list[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        shapes |= {name: (info.dtype, info.shape) for name, info in read_header(file).items()}
    return shapes


def from_hub(name: str) -> Model:
    """The model of the Hub's config.json, from the cache or the network. Raises UserError."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

        path = try_to_load_from_cache(name, "config.json")
        if not isinstance(path, str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=5)  # fails fast, while a download would retry
            path = hf_hub_download(name, "config.json")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: no folder of that name, and its config.json cannot be fetched ({reason}). "
            "Download it elsewhere and give its path, or see `lora calc --list`."
        ) from None
    config = read_json(Path(path), "The hub's file is damaged")
    return Model(replace(architecture(config, f"{name} config.json"), name=name), config)
