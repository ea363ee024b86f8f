"""A new project: a short form, and the command that makes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.files.home import expand
from pipeline.stages.registry import METHODS
from tui.panes.fields import Field, parse_names
from tui.panes.form import Form
from tui.services.lora_command import LoraCommand

# the params file, and what was chosen with which reasons ("" if nothing was)
Made = tuple[Path, str]
FIELDS = (
    Field("folder", default="my-model", rule="a new folder, made here"),
    Field(
        "base",
        label="base model",
        rule="a checkpoint folder, a .gguf file or a hub id, org/name; empty: MiniGPT, trained here",
        placeholder="MiniGPT",
    ),
    Field(
        "data",
        rule="what to train on: .txt, .jsonl, .csv, .parquet … or a hub data set's id; several "
        "with commas",
        placeholder="MiniGPT's own sentences",
    ),
    Field(
        "columns",
        rule="where the file names them otherwise: prompt=question, completion=answer; or "
        "messages=dialog",
        placeholder="as the format has them",
    ),
    Field("methods", default="lora", rule=f"of {', '.join(METHODS)}", choices=tuple(METHODS)),
)


async def create(
    root: Path, *arguments: str, on_note: Callable[[str], object] = lambda _: None
) -> Made:
    """Run `lora new`; `on_note` gets what it does meanwhile. Raises UserError."""
    printed, _ = await LoraCommand(root).run("new", *arguments, on_note=on_note)
    report = printed.partition("\nNext: ")[0]  # that is for a shell
    # Without a base nothing is chosen: a line says which files were written.
    return root / arguments[0] / "params.yaml", report if "\n" in report else ""


class NewProject(ModalScreen[Made | None]):
    """Asks for what `lora new` must know, and runs it: what it does meanwhile, then the project, or
    one sentence on why there is none.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]
    CSS_PATH = "welcome.tcss"
    AUTO_FOCUS = "ValueInput"

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self.form, self.note = Form(FIELDS, always=True), Static(id="note", markup=False)

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "New project"
            dialog.border_subtitle = "↑ ↓ field  Enter make it  Esc cancel"
            yield self.form
            yield self.note

    @on(Form.Submitted)
    @work(exclusive=True)
    async def make(self) -> None:
        """Make it, or say what is missing."""
        self._tell("starting")
        try:
            arguments = _arguments(self.form.texts)
            self.dismiss(await create(self._root, *arguments, on_note=self._tell))
        except UserError as error:
            self._tell(f"✗ {error}", wrong=True)

    def _tell(self, text: str, wrong: bool = False) -> None:
        self.note.update(text)
        self.note.set_class(wrong, "wrong")


def _arguments(texts: Mapping[str, str]) -> list[str]:
    """What `lora new` is given. Raises UserError with what is missing."""
    folder, base = map(_path, (texts["folder"], texts["base"]))
    data, methods = map(parse_names, (texts["data"], texts["methods"]))
    if not folder or folder.startswith("-"):
        raise UserError("The project needs a folder, such as my-model.")
    if base and not data:
        raise UserError(
            f"{base} needs data to train on: a file, a folder or the id of a hub data set."
        )
    if data and not base:
        raise UserError(
            "Your data needs a base model: a checkpoint folder, a .gguf file or a hub id."
        )
    arguments = [folder]
    for option, values in (
        ("--base", [base]),
        ("--data", map(_path, data)),
        ("--columns", [texts["columns"].strip()]),
        ("--methods", [",".join(methods)]),
    ):
        for value in filter(None, values):
            arguments += [option, value]
    return arguments


def _path(text: str) -> str:
    """With the home folder in place of ~, which no shell reads here."""
    text = text.strip()
    return str(expand(text)) if text.startswith("~/") else text
