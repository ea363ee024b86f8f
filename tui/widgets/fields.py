"""Fields of one line: text whose value steps with keys, a choice, a slider, a prompt with a history.

Textual's compact Input is the base of two. Its Select and its OptionList open a list over the form and take up and
down, which move between the fields here, so a choice is our own; Textual has no slider.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

from rich.text import Text
from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.events import Blur, Click, Focus, Key, MouseDown, MouseMove, MouseUp
from textual.geometry import Region
from textual.message import Message
from textual.reactive import reactive
from textual.suggester import SuggestFromList
from textual.widget import Widget
from textual.widgets import Input

STEP_KEYS: list[BindingType] = [
    Binding("pagedown", "step(1)", "The field's next value", show=False),
    Binding("pageup", "step(-1)", "The field's value before", show=False),
]


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


class Choice(Widget, can_focus=True):
    """`‹ lora ›`: left, right or a click steps to another value. `values` maps each value to its label."""

    DEFAULT_CSS = """
    Choice { height: 1; width: 1fr; }
    Choice:focus { background: $block-cursor-background; color: $block-cursor-foreground; text-style: bold; }
    Choice:disabled { color: $text-disabled; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,plus", "step(1)", "Next value", show=False),
        Binding("left,minus", "step(-1)", "Value before", show=False),
        *STEP_KEYS,
    ]

    class Changed(Message):
        """The user changed the value."""

        def __init__(self, choice: "Choice") -> None:
            super().__init__()
            self.choice = choice

        @property
        def control(self) -> "Choice":
            return self.choice

    def __init__(self, values: Mapping[str, str], value: str, *, id: str) -> None:
        super().__init__(id=id)
        self.values, self._value = values, value

    @property
    def value(self) -> str:
        return self._value

    @value.setter
    def value(self, value: str) -> None:
        """Set the value without posting a message; an unknown value selects the first."""
        self._value = value if value in self.values else next(iter(self.values))
        self.refresh()

    def render(self) -> RenderResult:
        return Text(f"‹ {self.values[self._value]} ›", no_wrap=True, overflow="ellipsis")

    def action_step(self, by: int) -> None:
        order = list(self.values)
        self.value = order[(order.index(self._value) + by) % len(order)]
        self.post_message(self.Changed(self))

    def on_click(self, event: Click) -> None:
        self.action_step(-1 if event.x < 2 else 1)


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


class PromptInput(Input):
    """Up and down step through `history` (newest last); the draft comes back below the newest."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "earlier", "Earlier prompt", show=False),
        Binding("down", "later", "Later prompt", show=False),
    ]

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(placeholder="a prompt; Enter asks the selected models", compact=True, id=id)
        self.history: list[str] = []
        self._back = 0  # position in the history: 0 is the draft, 1 the newest
        self._draft = ""

    def action_earlier(self) -> None:
        self._go(self._back + 1)

    def action_later(self) -> None:
        self._go(self._back - 1)

    def _go(self, back: int) -> None:
        if not 0 <= back <= len(self.history):
            return
        if self._back == 0:
            self._draft = self.value
        self._back = back
        self.value = self.history[-back] if back else self._draft
        self.cursor_position = len(self.value)

    def remember(self, history: list[str]) -> None:
        """Set the history after a prompt was sent, and go back to the draft."""
        self.history, self._back = history, 0
