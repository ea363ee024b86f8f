"""docs/reference/keys.md: the keys of the terminal UI, from the bindings of its screens, panes and
dialogs.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

from textual.binding import Binding

import tui.panes
import tui.screens
import tui.widgets
from docs.generators import cell, table
from tui.app import Workbench
from tui.registry import SCREENS
from tui.screens.base import WorkbenchScreen

HEAD = """# The keys of lora-tui

Written by `python -m docs` from the bindings in the code. `?` shows the keys of the pane that has the focus. A key
with a name can be replaced in [tui.yaml](../how-to/tui.md#settings): `keys: {app.run: ctrl+r}`. In lists and long texts
arrows, `j` `k`, Page Up and Page Down, Home and End, `g` `G` move; Tab goes to the next pane or field.

## Everywhere
"""
MOVEMENTS = ("Down", "Up", "First", "Last", "Page down", "Page up", "First line", "Last line")


def pages() -> dict[str, str]:
    lines = [HEAD, *_keys(["tui.app", "tui.screens.base"])]
    for number, (name, entry) in enumerate(SCREENS.items(), 1):
        own = entry.source.partition(":")[0]
        modules = [
            own,
            *(each for each in _modules(tui.screens) if each.startswith(f"tui.screens.{name}.")),
        ]
        lines += [f"## {number} {entry.label}\n", *_keys(modules)]
    lines += ["## The first look\n", "In a folder without a project.\n"]
    lines += _keys(
        each for each in _modules(tui.screens) if each.startswith("tui.screens.welcome.")
    )
    lines += ["## Panes, fields, forms and dialogs\n"]
    lines += _keys([*_modules(tui.panes), *_modules(tui.widgets), "tui.dialogs"])
    return {"reference/keys.md": "\n".join(lines).rstrip() + "\n"}


def _modules(package: Any) -> list[str]:
    return sorted(each.name for each in walk_packages(package.__path__, f"{package.__name__}."))


def _keys(modules: Iterable[str]) -> Iterator[str]:
    """A table of what the classes of these modules bind, without what moves in a list."""
    rows = dict.fromkeys(
        (_key(binding), owner, cell(binding.description), f"`{binding.id}`" if binding.id else "")
        for module in dict.fromkeys(modules)
        for kind in vars(import_module(module)).values()
        if isinstance(kind, type) and kind.__module__ == module
        for owner, binding in _bindings(kind)
        if binding.description not in MOVEMENTS
    )
    head = ("key", "in", "what it does", "name")
    shown = [number for number in range(len(head)) if any(row[number] for row in rows)]
    yield from table(
        [head[number] for number in shown], [[row[number] for number in shown] for row in rows]
    )


def _bindings(kind: type) -> Iterator[tuple[str, Binding]]:
    """What a class binds, and what the panes of a screen do."""
    for binding in kind.__dict__.get("BINDINGS", ()):
        yield _owner(kind), binding
    if issubclass(kind, WorkbenchScreen):
        for about in kind.PANES.values():
            for binding in about.keys:
                yield about.title, binding


def _owner(kind: type) -> str:
    """A part of a screen by its class; nothing for the screen itself."""
    if issubclass(kind, Workbench | WorkbenchScreen):
        return ""
    return " ".join(re.findall("[A-Z][a-z]+", kind.__name__.removesuffix("Screen"))).capitalize()


def _key(binding: Binding) -> str:
    """All keys of a binding, as they are written on a keyboard."""
    if binding.key_display:
        return f"`{binding.key_display}`"
    keys = (
        Workbench.get_key_display(None, replace(binding, key=key))  # type: ignore[arg-type]
        for key in binding.key.split(",")
    )
    return " ".join(f"`{key}`" for key in keys)
