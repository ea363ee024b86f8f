"""Opens a model by built-in name, path (config.json, safetensors, GGUF) or Hub id."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from pipeline.calc.architecture import Model
from pipeline.calc.families import UnsupportedLayer, architecture
from pipeline.errors import UserError
from pipeline.extensions import Registry

BUILT_IN = Path(__file__).parents[1] / "presets" / "models"
ADDED = Registry[dict[str, Any]]("preset", order=lambda preset: preset["hub_id"] or "")
MAX_CONFIG_BYTES = 10_000_000


@cache
def names() -> tuple[str, ...]:
    """Names of the built-in models, and of those that extensions add."""
    return tuple(sorted((*(path.stem for path in BUILT_IN.glob("*.json")), *ADDED)))


def entry(name: str) -> dict[str, Any]:
    """The preset of a built-in model, with keys such as hub_id, published, source and config."""
    if name in ADDED:
        return ADDED[name]
    return dict(json.loads((BUILT_IN / f"{name}.json").read_text(encoding="utf-8")))


@cache
def hub_ids() -> dict[str, str]:
    """Built-in name → Hub id, empty if it is not on the Hub."""
    return {name: entry(name)["hub_id"] or "" for name in names()}


@cache
def built_in(name: str) -> Model:
    preset = entry(name)
    shapes = architecture(preset["config"], name)
    return Model(
        replace(shapes, name=name, source=preset["source"], published=preset["published"]),
        preset["config"],
    )


def open_model(name: str) -> Model:
    """The model called `name`. Raises UserError with the nearest names, or the reason."""
    # built-in names first, so that a folder called gpt2 does not change what gpt2 means; ./gpt2 is
    # the folder
    if name.lower() in names():
        return built_in(name.lower())
    path = Path(name)
    try:
        exists = path.exists()
    except OSError:  # a name that is too long for a file
        exists = False
    if exists:
        return from_path(path)
    if path.suffix in (".json", ".gguf", ".safetensors") or name.startswith((".", "/", "~")):
        raise UserError(f"{name} does not exist.")
    if name.count("/") == 1:
        built_in_name = next(
            (key for key, hub_id in hub_ids().items() if hub_id.lower() == name.lower()), None
        )
        return built_in(built_in_name) if built_in_name else from_hub(name)
    suggestions = nearest(name.lower(), names())
    hint = f"Nearest: {', '.join(suggestions)}." if suggestions else "See `lora calc --list`."
    raise UserError(
        f"model {name!r} is not built in. {hint} Or give a folder, a file or a Hub id such as "
        "org/name."
    )


def nearest(name: str, choices: Iterable[str]) -> list[str]:
    """Up to three of `choices` that are similar to `name`."""
    from difflib import get_close_matches

    return get_close_matches(name, list(choices), n=3, cutoff=0.5)


# The functions below import what reads files: built-in names, the usual case, start without.


def from_path(path: Path) -> Model:
    """The model in a file or folder. Raises UserError with the reason."""
    try:
        return _from_folder(path) if path.is_dir() else _from_file(path)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path} is damaged, or not in the format of its name ({type(error).__name__}). Copy "
            "it again."
        ) from None


def _from_file(path: Path) -> Model:
    from pipeline.calc.sources.headers import from_gguf, from_safetensors
    from pipeline.files.artifact import read_json

    if path.suffix == ".gguf":
        return Model(replace(from_gguf(path), name=path.name))
    if path.suffix == ".safetensors":
        return Model(replace(from_safetensors([path], {}, str(path)), name=path.name))
    hint = "Give a Hugging Face config.json, a folder, .safetensors or .gguf"
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path} is not a config: it has {path.stat().st_size:,} bytes. {hint}.")
    config = read_json(path, hint)
    return Model(replace(architecture(config, str(path)), name=str(path)), config)


def _from_folder(folder: Path) -> Model:
    from pipeline.calc.sources.headers import from_safetensors
    from pipeline.files.artifact import read_json, refuse_untrusted

    refuse_untrusted(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} is an adapter. Give the model that it was trained on.")
    weights = sorted(folder.glob("*.safetensors"))
    hint = "Give a folder with a Hugging Face config.json, .safetensors or one .gguf file"
    config = read_json(folder / "config.json", hint) if (folder / "config.json").exists() else {}
    index = folder / "model.safetensors.index.json"
    if weights and index.exists():
        listed = set(read_json(index, "Copy it again").get("weight_map", {}).values())
        if missing := sorted(listed - {path.name for path in weights}):
            raise UserError(
                f"{folder}: {missing[0]} is missing, but {index.name} lists it. Copy it there."
            )
    # a family that is not supported is an error only where no weights tell the shapes
    if "model_type" in config:
        try:
            return Model(
                replace(architecture(config, str(folder / "config.json")), name=str(folder)), config
            )
        except UnsupportedLayer:
            if not weights:
                raise
    if weights:
        return Model(replace(from_safetensors(weights, config, str(folder)), name=str(folder)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return from_path(files[0])
    raise UserError(f"{folder} has no config.json, no .safetensors and no single .gguf file.")


def from_hub(name: str) -> Model:
    """The model of the Hub's config.json, from the cache or the network. Raises UserError."""
    from pipeline.files.artifact import read_json

    try:
        from huggingface_hub import (
            get_hf_file_metadata,
            hf_hub_download,
            hf_hub_url,
            try_to_load_from_cache,
        )

        path = try_to_load_from_cache(name, "config.json")
        if not isinstance(path, str):
            # fails fast, while a download would retry
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=5)
            path = hf_hub_download(name, "config.json")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: no folder of that name, and its config.json cannot be fetched ({reason}). "
            "Download it elsewhere and give its path, or see `lora calc --list`."
        ) from None
    config = read_json(Path(path), "The hub's file is damaged")
    return Model(replace(architecture(config, f"{name} config.json"), name=name), config)
