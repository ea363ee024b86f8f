"""Writes to params files, and the way back from the last one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.project.params import edit
from pipeline.workbench import GRAPH

MAX_EDITS = 100


class Edit(NamedTuple):
    """One write: the file's text before and after."""

    path: Path
    keys: tuple[str, ...]
    before: str
    after: str


class ParamEdits:
    """Every write to a params file goes through here."""

    def __init__(self) -> None:
        self._edits: list[Edit] = []

    def save(self, path: Path, values: Mapping[str, Any]) -> None:
        """Set `section.key` → value. Raises UserError and OSError as `edit.save` does; then nothing is written."""
        before = path.read_text(encoding="utf-8")
        edit.save(path, values, GRAPH.sections)
        self._edits.append(Edit(path, tuple(values), before, path.read_text(encoding="utf-8")))
        del self._edits[:-MAX_EDITS]

    def undo(self) -> str:
        """Take back the last write, and say so. Raises UserError, OSError: it is then unchanged."""
        if not self._edits:
            raise UserError("Nothing to take back: no param was written since lora-tui started.")
        last = self._edits[-1]
        if last.path.read_text(encoding="utf-8") != last.after:
            raise UserError(
                f"{last.path.name} was changed by another program since {', '.join(last.keys)} was written, "
                "so it is not taken back. Edit the file."
            )
        write_file(last.path.resolve(), last.before, durable=True)
        self._edits.pop()
        return f"Taken back: {', '.join(last.keys)} in {last.path.name}."
