"""What the four screens share: the bar with their names above, the keys below."""

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer

from tui.app import Workbench
from tui.widgets.tab_bar import TabBar

TALL = 20  # rows from which on there is room for more than what one works with


class WorkbenchScreen(Screen[None]):
    """A screen of the workbench: give it a NAME and a `body`."""

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
        yield TabBar(self.NAME, self.workbench.where)
        yield from self.body()
        yield Footer(compact=True, show_command_palette=False)

    def body(self) -> Iterable[Widget]:
        """The widgets between the bar and the keys."""
        return ()

    def action_leave(self) -> None:
        """Keys go to the screen again, not into a field."""
        self.set_focus(None)

    def give_focus(self, widget: Widget) -> None:
        """At once, also to what a class has just shown: keys that are on their way are for it."""
        self.app.stylesheet.update(self)
        self.set_focus(widget)
