"""What all screens share: the header, the keys at the bottom, panes that filter and enlarge,
help.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.events import ScreenResume
from textual.message import Message
from textual.screen import Screen
from textual.widget import Widget

from tui.app import Workbench
from tui.panes.key_bar import KeyBar
from tui.panes.pane import About, FilterField, Pane
from tui.widgets.header import Header

TALL, WIDE, HUGE = 20, 110, 170  # from this many rows, columns, columns on there is room for more


class WorkbenchScreen(Screen[None]):
    """A screen of the workbench. Subclasses set NAME and HELP, and implement `body`."""

    NAME: ClassVar[str] = ""
    HELP: ClassVar[str] = ""
    PANES: ClassVar[Mapping[str, About]] = {}
    ESCAPE_TO_MINIMIZE = False  # `action_leave` decides: a field first
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Leave", id="app.leave"),
        Binding("slash", "filter", "Filter", id="app.filter", key_display="/", show=False),
        Binding("plus,f10", "enlarge", "Enlarge the pane", id="app.enlarge", show=False),
    ]
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012  # as Textual declares it
        (0, "-narrow"),
        (WIDE, "-wide"),
        (HUGE, "-huge"),
    ]
    VERTICAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-short"),
        (TALL, "-tall"),
    ]
    _seen_revision = -1  # of the watch, when `project_changed` was last called

    @property
    def workbench(self) -> Workbench:
        assert isinstance(self.app, Workbench)
        return self.app

    def warn(self, text: str) -> None:
        self.workbench.log_message(text, "warning")

    def post_message(self, message: Message) -> bool:
        """Style nothing twice: a screen that was just made gets two resumes, each of which would
        style every widget.
        """
        if isinstance(message, ScreenResume) and not self.is_mounted:
            message.refresh_styles = False
        return super().post_message(message)

    def compose(self) -> ComposeResult:
        # Known before the widgets are styled, the size does not style them a second time.
        width, height = self.app.size
        for size, breakpoints in (
            (width, self.HORIZONTAL_BREAKPOINTS),
            (height, self.VERTICAL_BREAKPOINTS),
        ):
            self.add_class([name for least, name in breakpoints if size >= least][-1], update=False)
        yield Header(self.NAME)
        yield from self.body()
        yield KeyBar()

    def body(self) -> Iterable[Widget]:
        """The widgets between the header and the keys."""
        return ()

    @classmethod
    def own_bindings(cls) -> list[BindingType]:
        """What it binds besides the keys of every screen."""
        kinds = cls.__mro__[: cls.__mro__.index(WorkbenchScreen)]
        return [binding for kind in kinds for binding in kind.__dict__.get("BINDINGS", ())]

    def pane(self, name: str, *content: Widget) -> Pane:
        """A pane of PANES, with its name as id."""
        return Pane(self.PANES[name], *content, id=name)

    # What the app and other screens ask

    def open_with(self, **request: Any) -> None:
        """Show what another screen asks for; each screen names its own keywords."""

    def unsaved(self) -> str:
        """What quitting would lose, in words that follow "Quitting loses"; "" if nothing."""
        return ""

    def project_changed(self) -> None:
        """The watch saw a change. Called while the screen is shown, and once when it is shown
        again.
        """

    def watched(self) -> Iterable[Path]:
        """The folders and files that the screen shows, existing or not."""
        return ()

    def files_changed(self) -> None:
        """Something at or below `watched` may have changed. Called while the screen is shown, a few
        times per second at most, and once when it is shown again.
        """

    def tick(self) -> None:
        """Show what only the clock changes. Called once per second while the screen is shown."""

    def follow_files(self) -> None:
        """Follow what `watched` names now. Called when the screen is shown, and by a screen that
        shows other files than before.
        """
        if self._is_shown():
            self.workbench.file_watch.follow(
                "screen", self.watched(), lambda: self.call_later(self._notice_files)
            )

    def _notice_files(self) -> None:
        if self._is_shown():
            self.files_changed()

    def _is_shown(self) -> bool:
        """Whether it is, perhaps below a dialog; a screen that was just made is not yet."""
        return self.is_mounted and self in self.app.screen_stack[:1]

    def notice(self) -> None:
        """Call `project_changed` if the watch saw a change since the last call."""
        if self.is_mounted and self._seen_revision != self.workbench.project_watch.revision:
            self._seen_revision = self.workbench.project_watch.revision
            self.project_changed()

    def on_screen_resume(self) -> None:
        self.workbench.refresh_header()
        self.notice()
        self.follow_files()
        self._notice_files()

    # Panes

    @property
    def focused_pane(self) -> Pane | None:
        """The pane that holds the focus."""
        return next(
            (node for node in (self.focused or self).ancestors_with_self if isinstance(node, Pane)),
            None,
        )

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002  # Textual's name
        """Esc is offered where there is something to leave."""
        if action == "leave":
            return (
                self.maximized is not None
                or self._is_typing()
                or isinstance(self.focused, FilterField)
            )
        return True

    def _is_typing(self) -> bool:
        return self.focused is not None and self.focused.check_consume_key("a", "a")

    def action_leave(self) -> None:
        """End the filter, else leave the field, else show the other panes again."""
        focused = self.focused
        pane = self.focused_pane
        if isinstance(focused, FilterField) and pane:
            pane.close_filter()
        elif self._is_typing():
            self.leave_field()
        else:
            self.minimize()
            self.refresh_bindings()

    def leave_field(self) -> None:
        """Take the focus from a text field, so that keys go to the screen."""
        self.set_focus(None)

    def action_filter(self) -> None:
        """Open the filter of the focused pane, else of the first that has one."""
        panes = (
            pane
            for pane in (self.focused_pane, *self.query(Pane))
            if pane and pane.filter_field and pane.size
        )
        if pane := next(panes, None):
            pane.open_filter()
        else:
            self.warn("There is no list to filter here.")

    def action_enlarge(self) -> None:
        """Let the focused pane fill the screen, and back."""
        if self.maximized is not None:
            self.minimize()
        elif pane := self.focused_pane or next(iter(self.query(Pane)), None):
            self.maximize(pane, container=False)
        self.refresh_bindings()

    def give_focus(self, widget: Widget) -> None:
        """Focus a widget now, even if a CSS class has only just shown it: keys already typed are
        meant for it.
        """
        self.app.stylesheet.update(self)
        self.set_focus(widget)
