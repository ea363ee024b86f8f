"""What the four screens share: the tab bar at the top, the keys at the bottom."""

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer

from tui.app import Workbench
from tui.widgets.tab_bar import TabBar

TALL = 20  # from this many rows on there is room for secondary widgets


class WorkbenchScreen(Screen[None]):
    """A screen of the workbench. Subclasses set NAME and implement `body`."""

    NAME: ClassVar[str] = ""
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Leave the field", show=False)]
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012  # as Textual declares it
        (0, "-narrow"),
        (110, "-wide"),
    ]

    VERTICAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-short"),
        (TALL, "-tall"),
    ]

    @property
    def workbench(self) -> Workbench:
        assert isinstance(self.app, Workbench)
        return self.app

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
