"""The export dialog of the Curves screen: format and path."""

from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, RadioButton, RadioSet, Static

from tui.screens.curves.export import FORMATS, free_name

LABELS = {"svg": "SVG, a picture for print", "png": "PNG, a picture", "csv": "CSV, the numbers"}


class Format(RadioButton):
    """A radio button that is empty when off: Textual's differs in colour only."""

    @property
    def _button(self) -> Content:
        self.BUTTON_INNER = "●" if self.value else " "
        return super()._button


class ExportScreen(ModalScreen[Path | None]):
    """Asks for a format and a path; returns the path, whose suffix is the format."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss", "Close")]
    DEFAULT_CSS = """
    ExportScreen { align: center middle; }
    ExportScreen Input { margin: 1 0; }
    ExportScreen Horizontal { height: auto; align-horizontal: right; }
    ExportScreen Button { margin-left: 2; }
    ExportScreen RadioSet { width: 100%; }
    """

    def __init__(self, root: Path, stem: str) -> None:
        super().__init__()
        self.root, self.stem = root, stem

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Export what is shown: the runs that are switched on, this range, this smoothing.")
            with RadioSet():
                for kind in FORMATS:
                    yield Format(LABELS[kind], value=kind == FORMATS[0], id=kind)
            yield Input(self._default(FORMATS[0]), placeholder="a path, from the project's folder")
            yield Static(id="note")
            with Horizontal():
                yield Button("Export", variant="primary", id="export")
                yield Button("Cancel", id="cancel")

    def on_mount(self) -> None:
        self.set_focus(self.query_one(Input))

    def _default(self, kind: str) -> str:
        return free_name(self.root, self.stem, kind).name

    @property
    def path(self) -> Path:
        return self.root / Path(self.query_one(Input).value.strip()).expanduser()

    @on(RadioSet.Changed)
    def _format_changed(self, event: RadioSet.Changed) -> None:
        kind, field = str(event.pressed.id), self.query_one(Input)
        chosen = Path(field.value)
        defaults = [self._default(name) for name in FORMATS]
        field.value = self._default(kind) if field.value in defaults else str(chosen.with_suffix(f".{kind}"))

    @on(Input.Changed)
    def _update_note(self) -> None:
        self.query_one("#note", Static).update(
            self._problem() or ("" if not self.path.exists() else "will be replaced")
        )

    def _problem(self) -> str:
        """Why the path is invalid; empty if it is valid."""
        kind = self.path.suffix.removeprefix(".").lower()
        if kind not in FORMATS:
            return f"The path must end in {', '.join(f'.{name}' for name in FORMATS)}."
        return "" if self.path.parent.is_dir() else f"{self.path.parent} is not a folder."

    @on(Input.Submitted)
    @on(Button.Pressed, "#export")
    def _export(self) -> None:
        if not self._problem():
            self.dismiss(self.path)

    @on(Button.Pressed, "#cancel")
    def _cancel(self) -> None:
        self.dismiss(None)
