"""From what a user names to shapes: a built-in name, a config.json, safetensors headers, a GGUF file, a hub id."""

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
    """The built-in models' names."""
    return sorted(path.stem for path in BUILT_IN.glob("*.json"))


def entry(name: str) -> dict[str, Any]:
    """A built-in model's file: hub_id, published count and its source, source of the config, config."""
    loaded: dict[str, Any] = json.loads((BUILT_IN / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@cache
def hub_ids() -> dict[str, str]:
    """Built-in name → hub id, empty where the hub has none."""
    return {name: entry(name)["hub_id"] or "" for name in names()}


@cache
def built_in(name: str) -> Model:
    known = entry(name)
    shapes = architecture(known["config"], name)
    return Model(replace(shapes, name=name, source=known["source"], published=known["published"]), known["config"])


def open_model(name: str) -> Model:
    """The model that `name` means. Raises UserError with the nearest names, or with what is wrong in a file."""
    if name.lower() in names():
        return built_in(name.lower())
    from pipeline.calc.sources import files  # what reads files is not needed for a name

    path = Path(name)
    if path.exists():
        return files.from_path(path)
    if path.suffix in (".json", ".gguf", ".safetensors") or name.startswith((".", "/", "~")):
        raise UserError(f"{name} does not exist.")
    if name.count("/") == 1:
        known = next((one for one, hub_id in hub_ids().items() if hub_id.lower() == name.lower()), None)
        return built_in(known) if known else files.from_hub(name)
    near = nearest(name.lower(), names())
    hint = f"Nearest: {', '.join(near)}." if near else "See `lora calc --list`."
    raise UserError(
        f"model {name!r} is not built in. {hint} A folder, a file or a hub id such as org/name will do too."
    )


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of `known` that `name` may have been meant to be."""
    from difflib import get_close_matches

    return get_close_matches(name, list(known), n=3, cutoff=0.5)
