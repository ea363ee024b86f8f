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

from pipeline.errors import UserError, explain
from pipeline.files.home import expand
from pipeline.stages.registry import METHODS
from tui.services.projects.new_project import create
from tui.widgets.form import Form, FormField, parse_names

# the params file, and what was chosen with which reasons ("" if nothing was)
Made = tuple[Path, str]
FIELDS = (
    FormField("folder", label="folder", default="my-model", rule="a new folder, made here"),
    FormField(
        "base",
        label="base model",
        rule=(
            "a checkpoint folder, a .gguf file or a hub id, org/name; empty: MiniGPT, trained here"
        ),
        placeholder="MiniGPT",
    ),
    FormField(
        "data",
        label="data",
        rule=(
            "what to train on: .txt, .jsonl, .csv, .parquet … or a hub data set's id; several "
            "with commas"
        ),
        placeholder="MiniGPT's own sentences",
    ),
    FormField(
        "methods",
        label="methods",
        default="lora",
        rule=f"of {', '.join(METHODS)}",
        choices=tuple(METHODS),
    ),
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
            dialog.border_title, dialog.border_subtitle = (
                f"Making {self._arguments[0]}",
                "Esc cancel",
            )
            yield LoadingIndicator()
            yield Static("starting", id="note", markup=False)

    def on_mount(self) -> None:
        self._run()

    @work(exclusive=True)
    async def _run(self) -> None:
        note = self.query_one("#note", Static)
        try:
            printed = await create(self._arguments, self._root, note.update)
        except (UserError, OSError) as error:
            self.query_one(LoadingIndicator).display = False
            note.update(f"✗ {explain(error) if isinstance(error, OSError) else error}")
            note.add_class("wrong")
            return
        report = printed.partition("\nNext: ")[0]  # that is for a shell
        # Without a base nothing is chosen: a line says which files were written.
        self.dismiss(
            (self._root / self._arguments[0] / "params.yaml", report if "\n" in report else "")
        )


class NewProject(ModalScreen[Made | None]):
    """Asks for what `lora new` must know."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]
    CSS_PATH = "welcome.tcss"
    AUTO_FOCUS = "Input"

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title, dialog.border_subtitle = (
                "New project",
                "↑ ↓ field  Enter make it  Esc cancel",
            )
            yield Form(FIELDS)
            yield Static(id="rule", markup=False)
            yield Static(classes="wrong", markup=False)

    def on_descendant_focus(self) -> None:
        form = self.query_one(Form)
        if form.focused_key:
            self.query_one("#rule", Static).update(form.fields[form.focused_key].rule)

    @on(Form.Submitted)
    def make(self) -> None:
        arguments, problem = self._read()
        self.query_one(".wrong", Static).update(f"✗ {problem}" if problem else "")
        if not problem:
            self.app.push_screen(Creation(arguments, self._root), self._made)

    def _made(self, made: Made | None) -> None:
        if made:  # else it was cancelled, and the form stays for another try
            self.dismiss(made)

    def _read(self) -> tuple[list[str], str]:
        """The command's arguments, and what is wrong with them."""
        form = self.query_one(Form)
        folder, base = (_path(form.editors[key].value) for key in ("folder", "base"))
        data, methods = (parse_names(form.editors[key].value) for key in ("data", "methods"))
        if not folder or folder.startswith("-"):
            return [], "The project needs a folder, such as my-model."
        if base and not data:
            return (
                [],
                f"{base} needs data to train on: a file, a folder or the id of a hub data set.",
            )
        if data and not base:
            return (
                [],
                "Your data needs a base model: a checkpoint folder, a .gguf file or a hub id.",
            )
        arguments = [
            folder,
            *(["--base", base] if base else []),
            *(part for name in data for part in ("--data", _path(name))),
        ]
        return [*arguments, *(["--methods", ",".join(methods)] if methods else [])], ""


def _path(text: str) -> str:
    """With the home folder in place of ~, which no shell reads here."""
    text = text.strip()
    return str(expand(text)) if text.startswith("~/") else text
