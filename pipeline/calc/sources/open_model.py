"""Opens a model by built-in name, path (config.json, safetensors, GGUF) or Hub id."""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.calc.architecture import Model
from pipeline.calc.families.registry import architecture
from pipeline.errors import UserError

BUILT_IN = Path(__file__).parent.parent / "presets" / "models"


def names() -> list[str]:
    """Names of the built-in models."""
    return sorted(path.stem for path in BUILT_IN.glob("*.json"))


def entry(name: str) -> dict[str, Any]:
    """The preset of a built-in model, with keys such as hub_id, published, source and config."""
    loaded: dict[str, Any] = json.loads((BUILT_IN / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@cache
def hub_ids() -> dict[str, str]:
    """Built-in name → Hub id, empty if it is not on the Hub."""
    return {name: entry(name)["hub_id"] or "" for name in names()}


@cache
def built_in(name: str) -> Model:
    preset = entry(name)
    shapes = architecture(preset["config"], name)
    return Model(replace(shapes, name=name, source=preset["source"], published=preset["published"]), preset["config"])


def open_model(name: str) -> Model:
    """The model called `name`. Raises UserError with the nearest names, or the reason why a file cannot be read."""
    if name.lower() in names():
        return built_in(name.lower())
    from pipeline.calc.sources import files  # not needed for built-in names

    path = Path(name)
    if path.exists():
        return files.from_path(path)
    if path.suffix in (".json", ".gguf", ".safetensors") or name.startswith((".", "/", "~")):
        raise UserError(f"{name} does not exist.")
    if name.count("/") == 1:
        built_in_name = next((key for key, hub_id in hub_ids().items() if hub_id.lower() == name.lower()), None)
        return built_in(built_in_name) if built_in_name else files.from_hub(name)
    suggestions = nearest(name.lower(), names())
    hint = f"Nearest: {', '.join(suggestions)}." if suggestions else "See `lora calc --list`."
    raise UserError(f"model {name!r} is not built in. {hint} Or give a folder, a file or a Hub id such as org/name.")


def nearest(name: str, choices: Iterable[str]) -> list[str]:
    """Up to three of `choices` that are similar to `name`."""
    from difflib import get_close_matches

    return get_close_matches(name, list(choices), n=3, cutoff=0.5)
