"""A text field on one line whose value can be stepped with keys."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Self

from textual.binding import BindingType
from textual.events import Key
from textual.geometry import Region
from textual.suggester import SuggestFromList
from textual.widgets import Input

from tui.widgets.select import STEP_KEYS

Step = Callable[[str, int], str]  # (value, +1 or -1) → the next value


def counting(value: str, by: int) -> str:
    """1, 2, 3, …; anything that is not a number becomes 1."""
    return str(max(1, int(value) + by)) if value.isdecimal() and len(value) < 12 else "1"


def doubling(value: str, by: int) -> str:
    """1, 2, 4, 8, …: the next power of two above or below."""
    if not value.isdecimal() or len(value) >= 12:
        return "1"
    number = int(value)
    return str(1 << number.bit_length() if by > 0 else max(1, 1 << max(0, (number - 1).bit_length() - 1)))


def cycling(values: Sequence[str]) -> Step:
    """Cycle through `values`; any other value goes to the first."""

    def step(value: str, by: int) -> str:
        return values[(values.index(value) + by) % len(values)] if value in values else values[0]

    return step


class Entry(Input):
    """Page up and page down step the value, + and - too if it is a number."""

    DEFAULT_CSS = """
    Entry { width: 1fr; background: $boost; }
    Entry:disabled { color: $text-disabled; }
    """
    BINDINGS: ClassVar[list[BindingType]] = STEP_KEYS

    def __init__(self, value: str, *, id: str, step: Step | None = None, suggested: Sequence[str] = ()) -> None:
        suggester = SuggestFromList(suggested, case_sensitive=False) if suggested else None
        super().__init__(value, id=id, compact=True, suggester=suggester)
        self.step = step
        self.is_numeric = step in (counting, doubling)

    def refresh(self, *regions: Region, repaint: bool = True, layout: bool = False, recompose: bool = False) -> Self:
        """Skip the layout of the whole screen that Input does at every key: this field never changes its size."""
        return super().refresh(*regions, repaint=repaint, layout=layout and not self.is_mounted, recompose=recompose)

    async def _on_key(self, event: Key) -> None:
        if self.is_numeric and event.character in ("+", "-"):
            event.stop()
            event.prevent_default()
            self.action_step(1 if event.character == "+" else -1)

    def action_step(self, by: int) -> None:
        if self.step is not None:
            self.value = self.step(self.value.strip() or self.placeholder, by)
            self.cursor_position = len(self.value)
