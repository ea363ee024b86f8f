"""Ships an adapter: asks for a format and a folder, then `lora export` writes it."""

import asyncio
from importlib import import_module
from pathlib import Path
from typing import Any

from textual.content import Content

from pipeline.files.home import expand
from pipeline.inference.catalog import VERDICT, measured_of
from tui.dialogs import AskText
from tui.panes.menu import Menu
from tui.services.lora_command import LoraCommand

FOLDER = "shipped"


async def ship(workbench: Any, name: str, adapter: Path) -> None:
    """Call it in a worker of the workbench: it waits for the answers and for the export."""
    # By name: what a format imports to write must not count as imported by the terminal UI, and is
    # not by this.
    formats = import_module("pipeline.export.formats").FORMATS
    choices = {
        key: Content.assemble((f"{key:14}", "bold"), format.about)
        for key, format in formats.items()
    }
    measured = await asyncio.to_thread(measured_of, adapter)
    verdict = measured.get(VERDICT)
    broken = f"✗ {name} breaks {verdict.counted}. " if verdict and verdict.broken else ""
    kind = await workbench.push_screen_wait(Menu(f"{broken}Ship {name} as", choices))
    if kind is None:
        return
    default = f"{FOLDER}/{name.replace('/', '-')}-{kind}"
    folder = await workbench.push_screen_wait(
        AskText(f"Folder to write {name} to, as {kind}:", default)
    )
    if folder is None:
        return
    out = workbench.root / expand(folder)
    workbench.log_message(f"Exporting {name} as {kind}; it goes on while you do something else.")
    with workbench.errors_shown():
        told, notes = await LoraCommand(workbench.root).run(
            "export", str(adapter), "--format", kind, "--out", str(out)
        )
        workbench.log_message("\n".join(filter(None, (f"{name} is in {folder}.", told, notes))))
