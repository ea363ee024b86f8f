"""A slider from 0 to 2, moved with keys or the mouse."""

from typing import ClassVar

from rich.text import Text
from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.events import Blur, Focus, MouseDown, MouseMove, MouseUp
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

MINIMUM, MAXIMUM, STEP, AS_TRAINED = 0.0, 2.0, 0.05, 1.0


class Slider(Widget, can_focus=True):
    """Scale of an adapter: 0 is the base model, 1 the adapter as trained."""

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
        """The value changed."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

    def validate_value(self, value: float) -> float:
        """Round to the nearest step and clamp to the range."""
        return round(min(max(round(value / STEP) * STEP, MINIMUM), MAXIMUM), 2)

    def watch_value(self, before: float, value: float) -> None:
        if value != before:
            self.post_message(self.Changed(value))

    @property
    def track(self) -> int:
        """Length of the track in cells."""
        return max(self.size.width - len(self.LABEL) - 10, 11)

    def render(self) -> RenderResult:
        if self.disabled:
            return Text(f"{self.LABEL}no adapter selected", no_wrap=True, overflow="ellipsis")
        position, middle = (
            round((value - MINIMUM) / (MAXIMUM - MINIMUM) * (self.track - 1)) for value in (self.value, AS_TRAINED)
        )
        cells = ["━" if cell < position else "┄" for cell in range(self.track)]
        cells[middle] = "┿" if middle < position else "┊"
        cells[position] = "●"
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
        self.value = MINIMUM + (x - len(self.LABEL) - 2) / (self.track - 1) * (MAXIMUM - MINIMUM)

    def on_focus(self, _: Focus) -> None:
        self.refresh()

    def on_blur(self, _: Blur) -> None:
        self.refresh()
