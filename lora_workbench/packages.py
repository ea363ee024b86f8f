"""The packages that the program is made of, and whether a module of somebody else hides one."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def hidden() -> str:
    """Why the packages cannot be imported, and what to do; empty if they can."""
    for name in ("pipeline", "cli", "tui"):
        spec = find_spec(name)
        place = spec and spec.origin
        if not place or not Path(place).is_relative_to(ROOT):
            return (
                f"{place or 'a broken installation'} hides lora-workbench's own package {name}. "
                "Rename it, or take its folder out of sys.path and PYTHONPATH."
            )
    return ""
