"""Writes to params files, and the way back from the last one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.project.params import edit
from pipeline.stages.registry import GRAPH, open_project

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
        """Set `section.key` → value. Raises UserError and OSError as `edit.save` does; then nothing
        is written.
        """
        before = path.read_text(encoding="utf-8")
        with _followed(path):
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
                f"{last.path.name} was changed by another program since {', '.join(last.keys)} was "
                "written, so it is not taken back. Edit the file."
            )
        with _followed(last.path):
            write_file(last.path.resolve(), last.before, durable=True)
        self._edits.pop()
        return f"Taken back: {', '.join(last.keys)} in {last.path.name}."


@contextmanager
def _followed(params: Path) -> Iterator[None]:
    """dvc.yaml counts the files in the lists of params.yaml: it is written again if it is as `lora
    new` writes it.
    """
    follows = follows_params(params)
    yield
    if follows and not follows_params(params) and (text := _render(params)):
        write_file(params.with_name("dvc.yaml"), text, durable=True)


def follows_params(params: Path) -> bool:
    """Whether dvc.yaml says what the params do, as `lora new` writes it."""
    with suppress(OSError, ValueError):
        text = params.with_name("dvc.yaml").read_text(encoding="utf-8")
        return text == _render(params)
    return False


def _render(params: Path) -> str:
    """dvc.yaml as `lora new` writes it; "" if the params cannot be read, or are not those that DVC
    reads.
    """
    # not before the first paint
    from pipeline.project.dvc_yaml import HEADER, render_dvc_yaml
    from pipeline.project.new_project import PARAMS

    with suppress(UserError, OSError):
        return HEADER + render_dvc_yaml(open_project(params)) if params.name == PARAMS else ""
    return ""
