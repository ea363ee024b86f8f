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
