"""A selector of one of a few values, on one line."""

from collections.abc import Mapping
from typing import ClassVar

from rich.text import Text
from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.message import Message
from textual.widget import Widget

STEP_KEYS: list[BindingType] = [
    Binding("pagedown", "step(1)", "The field's next value", show=False),
    Binding("pageup", "step(-1)", "The field's value before", show=False),
]


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
