"""A new project: a short form, and the command that makes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import LoadingIndicator, Static

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


class Creation(ModalScreen[Made | None]):
    """Runs `lora new`: what it does meanwhile, then the project, or one sentence on why there is
    none.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]
    CSS_PATH = "welcome.tcss"

    def __init__(self, arguments: Sequence[str], root: Path) -> None:
        super().__init__()
        self._arguments, self._root = arguments, root

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = f"Making {self._arguments[0]}"
            dialog.border_subtitle = "Esc cancel"
            yield LoadingIndicator()
            yield Static("starting", id="note", markup=False)

    @work(exclusive=True)
    async def on_mount(self) -> None:
        note = self.query_one("#note", Static)
        try:
            lora = LoraCommand(self._root)
            printed, _ = await lora.run("new", *self._arguments, on_note=note.update)
        except UserError as error:
            self.query_one(LoadingIndicator).display = False
            note.update(f"✗ {error}")
            note.add_class("wrong")
            return
        report = printed.partition("\nNext: ")[0]  # that is for a shell
        # Without a base nothing is chosen: a line says which files were written.
        params = self._root / self._arguments[0] / "params.yaml"
        self.dismiss((params, report if "\n" in report else ""))


class NewProject(ModalScreen[Made | None]):
    """Asks for what `lora new` must know."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]
    CSS_PATH = "welcome.tcss"
    AUTO_FOCUS = "ValueInput"

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self.form, self.wrong = Form(FIELDS, always=True), Static(classes="wrong", markup=False)

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "New project"
            dialog.border_subtitle = "↑ ↓ field  Enter make it  Esc cancel"
            yield self.form
            yield self.wrong

    @on(Form.Submitted)
    def make(self) -> None:
        """Make it, or say what is missing."""
        texts = self.form.texts
        folder, base = map(_path, (texts["folder"], texts["base"]))
        data, methods = map(parse_names, (texts["data"], texts["methods"]))
        problem = ""
        if not folder or folder.startswith("-"):
            problem = "The project needs a folder, such as my-model."
        elif base and not data:
            problem = (
                f"{base} needs data to train on: a file, a folder or the id of a hub data set."
            )
        elif data and not base:
            problem = "Your data needs a base model: a checkpoint folder, a .gguf file or a hub id."
        self.wrong.update(f"✗ {problem}" if problem else "")
        if problem:
            return
        arguments = [folder]
        for option, values in (
            ("--base", [base]),
            ("--data", map(_path, data)),
            ("--columns", [texts["columns"].strip()]),
            ("--methods", [",".join(methods)]),
        ):
            for value in filter(None, values):
                arguments += [option, value]
        self.app.push_screen(Creation(arguments, self._root), self._made)

    def _made(self, made: Made | None) -> None:
        if made:  # else it was cancelled, and the form stays for another try
            self.dismiss(made)


def _path(text: str) -> str:
    """With the home folder in place of ~, which no shell reads here."""
    text = text.strip()
    return str(expand(text)) if text.startswith("~/") else text
