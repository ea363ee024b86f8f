"""A field of text on one line, with steps where a next value makes sense."""

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
    """1, 2, 3, … ; what is no number becomes 1."""
    return str(max(1, int(value) + by)) if value.isdecimal() and len(value) < 12 else "1"


def doubling(value: str, by: int) -> str:
    """1, 2, 4, 8, …, from any number to the next power of two."""
    if not value.isdecimal() or len(value) >= 12:
        return "1"
    number = int(value)
    return str(1 << number.bit_length() if by > 0 else max(1, 1 << max(0, (number - 1).bit_length() - 1)))


def through(values: Sequence[str]) -> Step:
    """One of `values` after the other; from what is not among them to the first."""

    def step(value: str, by: int) -> str:
        return values[(values.index(value) + by) % len(values)] if value in values else values[0]

    return step


class Entry(Input):
    """Numbers step with + and -, all fields that step with page up and page down."""

    DEFAULT_CSS = """
    Entry { width: 1fr; background: $boost; }
    Entry:disabled { color: $text-disabled; }
    """
    BINDINGS: ClassVar[list[BindingType]] = STEP_KEYS

    def __init__(self, value: str, *, id: str, step: Step | None = None, suggested: Sequence[str] = ()) -> None:
        suggester = SuggestFromList(suggested, case_sensitive=False) if suggested else None
        super().__init__(value, id=id, compact=True, suggester=suggester)
        self.step = step
        self.of_numbers = step in (counting, doubling)

    def refresh(self, *regions: Region, repaint: bool = True, layout: bool = False, recompose: bool = False) -> Self:
        """An Input lays out the whole screen at every key; this one has its line whatever it holds."""
        return super().refresh(*regions, repaint=repaint, layout=layout and not self.is_mounted, recompose=recompose)

    async def _on_key(self, event: Key) -> None:
        if self.of_numbers and event.character in ("+", "-"):
            event.stop()
            event.prevent_default()
            self.action_step(1 if event.character == "+" else -1)

    def action_step(self, by: int) -> None:
        if self.step is not None:
            self.value = self.step(self.value.strip() or self.placeholder, by)
            self.cursor_position = len(self.value)
