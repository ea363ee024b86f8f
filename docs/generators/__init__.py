"""Pages that are generated from the code: a file for each kind, with `pages() -> {path below docs: text}`."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

DOCS = Path(__file__).parents[1]


def generated() -> Mapping[Path, str]:
    """Every generated page with its text."""
    modules = [import_module(f"{__name__}.{each.name}") for each in iter_modules(__path__)]
    return {DOCS / path: text for module in modules for path, text in module.pages().items()}
