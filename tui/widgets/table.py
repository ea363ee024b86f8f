"""A table that is moved in like every list here."""

from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import DataTable

# for lists too: an OptionList has the same actions
VIM_KEYS: tuple[BindingType, ...] = (
    Binding("j", "cursor_down", "Down", show=False),
    Binding("k", "cursor_up", "Up", show=False),
)


# for lists that draw their lines themselves: they have `action_move(lines)` and
# `action_page(pages)`
MOVE_KEYS: tuple[BindingType, ...] = (
    Binding("down,j", "move(1)", "Down", show=False),
    Binding("up,k", "move(-1)", "Up", show=False),
    Binding("pagedown", "page(1)", "Page down", show=False),
    Binding("pageup", "page(-1)", "Page up", show=False),
    Binding("home,g", "move(-1000000000)", "First", show=False),
    Binding("end,G", "move(1000000000)", "Last", show=False),
)


class Table(DataTable[Text]):
    """Rows with a cursor: arrows, j and k, Home and End, g and G."""

    DEFAULT_CSS = """
    Table { height: 1fr; background: transparent; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *VIM_KEYS,
        Binding("home,g", "scroll_top", "First", show=False),
        Binding("end,G", "scroll_bottom", "Last", show=False),
    ]

    def __init__(self, **options: object) -> None:
        super().__init__(cursor_type="row", **options)  # type: ignore[arg-type]  # DataTable's own options

    def watch_virtual_size(self) -> None:
        """Measure the table once more.

        Textual measures a widget once for each time that a layout is asked for. Between the asking,
        when the rows change, and the moment in which the table counts them, another widget's layout
        may come: the table would keep the height that it had without them.
        """
        self.call_after_refresh(self.refresh, layout=True)
