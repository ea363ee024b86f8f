"""A value from 0 to 2 on a line, moved with keys or the mouse."""

from typing import ClassVar

from rich.text import Text
from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.events import Blur, Focus, MouseDown, MouseMove, MouseUp
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

LEAST, MOST, STEP, AS_TRAINED = 0.0, 2.0, 0.05, 1.0


class Slider(Widget, can_focus=True):
    """How much of an adapter's change applies: 0 is the base, 1 the adapter as it was trained."""

    DEFAULT_CSS = """
    Slider { height: 1; color: $foreground; }
    Slider:focus { text-style: bold; background: $boost; }
    Slider:disabled { color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,down", "move(-1)", "Weaker", show=False),
        Binding("right,up", "move(1)", "Stronger", show=False),
        Binding("home", "set(0)", "As the base", show=False),
        Binding("end", "set(2)", "Twice the change", show=False),
    ]
    LABEL = "strength "
    value: reactive[float] = reactive(AS_TRAINED)

    class Changed(Message):
        """The value is another."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

    def validate_value(self, value: float) -> float:
        """The nearest step within the ends."""
        return round(min(max(round(value / STEP) * STEP, LEAST), MOST), 2)

    def watch_value(self, before: float, value: float) -> None:
        if value != before:
            self.post_message(self.Changed(value))

    @property
    def track(self) -> int:
        """Cells between the ends."""
        return max(self.size.width - len(self.LABEL) - 10, 11)

    def render(self) -> RenderResult:
        if self.disabled:
            return Text(f"{self.LABEL}no adapter selected", no_wrap=True, overflow="ellipsis")
        at, middle = (round((value - LEAST) / (MOST - LEAST) * (self.track - 1)) for value in (self.value, AS_TRAINED))
        cells = ["━" if cell < at else "┄" for cell in range(self.track)]
        cells[middle] = "┿" if middle < at else "┊"
        cells[at] = "●"
        return Text(f"{self.LABEL}0 {''.join(cells)} 2 ×{self.value:.2f}", no_wrap=True)

    def action_move(self, steps: int) -> None:
        self.value += steps * STEP

    def action_set(self, value: float) -> None:
        self.value = value

    def on_mouse_down(self, event: MouseDown) -> None:
        self.capture_mouse()
        self._go_to(event.x)

    def on_mouse_move(self, event: MouseMove) -> None:
        if event.button:
            self._go_to(event.x)

    def on_mouse_up(self, _: MouseUp) -> None:
        self.release_mouse()

    def _go_to(self, x: int) -> None:
        self.value = LEAST + (x - len(self.LABEL) - 2) / (self.track - 1) * (MOST - LEAST)

    def on_focus(self, _: Focus) -> None:
        self.refresh()

    def on_blur(self, _: Blur) -> None:
        self.refresh()
