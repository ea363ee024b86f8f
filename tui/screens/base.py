"""What the four screens share: the tab bar at the top, the keys at the bottom."""

from collections.abc import Iterable
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer

from tui.app import Workbench
from tui.registry import SCREENS

TALL, WIDE = 20, 110  # from this many rows, columns on there is room for secondary widgets


class TabBar(Widget):
    """One line: 1 Pipeline  2 Curves  3 Calculator  4 Adapters, and the project's folder."""

    DEFAULT_CSS = """
    TabBar { height: 1; dock: top; background: $panel; color: $foreground; }
    """

    def __init__(self, current: str, folder_label: str) -> None:
        super().__init__()
        self.current = current
        self.folder_label = folder_label

    def render(self) -> RenderResult:
        line = Text(no_wrap=True, overflow="ellipsis")
        for number, (name, entry) in enumerate(SCREENS.items(), 1):
            line.append(f" {number} {entry.label} ", "reverse bold" if name == self.current else "")
        room = self.size.width - line.cell_len - 2
        if room > 8:
            folder_label = self.folder_label if len(self.folder_label) <= room else f"…{self.folder_label[1 - room :]}"
            line.append(folder_label.rjust(room + 1), "dim")
        return line

    def on_click(self, event: Click) -> None:
        start = 0
        for number, (name, entry) in enumerate(SCREENS.items(), 1):
            start += len(f" {number} {entry.label} ")
            if event.x < start:
                self.app.switch_mode(name)
                return


class WorkbenchScreen(Screen[None]):
    """A screen of the workbench. Subclasses set NAME and implement `body`."""

    NAME: ClassVar[str] = ""
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Leave the field", show=False)]
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012  # as Textual declares it
        (0, "-narrow"),
        (WIDE, "-wide"),
    ]

    VERTICAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-short"),
        (TALL, "-tall"),
    ]

    @property
    def workbench(self) -> Workbench:
        assert isinstance(self.app, Workbench)
        return self.app

    def warn(self, text: str) -> None:
        self.workbench.log_message(text, "warning")

    def compose(self) -> ComposeResult:
        yield TabBar(self.NAME, self.workbench.folder_label)
        yield from self.body()
        yield Footer(compact=True, show_command_palette=False)

    def body(self) -> Iterable[Widget]:
        """The widgets between the tab bar and the keys."""
        return ()

    def action_leave(self) -> None:
        """Take the focus from the field, so that keys go to the screen."""
        self.set_focus(None)

    def give_focus(self, widget: Widget) -> None:
        """Focus a widget now, even if a CSS class has only just shown it: keys already typed are meant for it."""
        self.app.stylesheet.update(self)
        self.set_focus(widget)
