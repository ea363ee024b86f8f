"""The prompt field, the strength of an adapter, and the state of the engine: for the screens that
prompt models.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from rich.highlighter import Highlighter
from rich.text import Text
from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.events import MouseDown, MouseMove, MouseUp
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Input

from pipeline.files.text import in_units

STATES = {  # of the engine → (symbol, theme variable of its colour, hint)
    "not started": ("○", "", "the first prompt starts it"),
    "starting": ("◌", "", "importing libraries"),
    "ready": ("●", "success", ""),
    "loading": ("◌", "", "Esc interrupts"),
    "busy": ("◐", "", "Esc interrupts"),
    "died": ("✗", "error", "prompt again to start a new one"),
}
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
STRONGEST, STEP, AS_TRAINED = 2.0, 0.05, 1.0  # of an adapter's scale
MIN_TRACK, MAX_TRACK = 7, 21  # cells
Spans = Callable[[str], Iterable[tuple[int, int]]]


class _Marked(Highlighter):
    """Underlines parts of a text."""

    spans: Spans = staticmethod(lambda _: ())

    def highlight(self, text: Text) -> None:
        for start, stop in self.spans(text.plain):
            text.stylize("underline bold", start, stop)


class PromptInput(Input):
    """Up and down step through `history` (newest last); the draft comes back below the newest.

    What `mark` returns for the typed text is underlined: words that a model does not know.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "ask"),
        Binding("up", "recall(1)", "earlier prompt"),
        Binding("down", "recall(-1)", "later prompt", show=False),
    ]

    def __init__(self, placeholder: str = "a prompt; Enter asks the chosen models") -> None:
        self._marked = _Marked()
        super().__init__(
            placeholder=placeholder, compact=True, highlighter=self._marked, select_on_focus=False
        )
        self.history: list[str] = []
        self._back = 0  # position in the history: 0 is the draft, 1 the newest
        self._draft = ""

    def mark(self, spans: Spans) -> None:
        self._marked.spans = spans
        self.refresh()

    def action_recall(self, by: int) -> None:
        back = self._back + by
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


class Slider(Widget, can_focus=True):
    """Scale of an adapter: 0 is the base model, 1 the adapter as trained. Disabled, it shows
    `why`.
    """

    DEFAULT_CSS = """
    Slider { height: 1; color: $foreground; text-wrap: nowrap; text-overflow: ellipsis; }
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
    value: reactive[float] = reactive(AS_TRAINED, init=False)
    why: reactive[str] = reactive("no adapter chosen", init=False)

    class Changed(Message):
        """The value changed."""

    def validate_value(self, value: float) -> float:
        """Round to the nearest step and clamp to the range."""
        return round(min(max(round(value / STEP) * STEP, 0.0), STRONGEST), 2)

    def watch_value(self) -> None:
        self.post_message(self.Changed())

    @property
    def track(self) -> int:
        """Length of the track in cells."""
        return min(max(self.size.width - len(self.LABEL) - 6, MIN_TRACK), MAX_TRACK)

    def render(self) -> RenderResult:
        if self.disabled:
            return Text(f"{self.LABEL}– ({self.why})", no_wrap=True, overflow="ellipsis")
        position, middle = (
            round(value / STRONGEST * (self.track - 1)) for value in (self.value, AS_TRAINED)
        )
        cells = ["━" if cell < position else "┄" for cell in range(self.track)]
        cells[middle] = "┿" if middle < position else "┊"
        cells[position] = "●"
        return Text(f"{self.LABEL}{''.join(cells)} ×{self.value:.2f}", no_wrap=True)

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
        self.value = (x - len(self.LABEL)) / (self.track - 1) * STRONGEST


class EngineBar(Widget):
    """A status line of the inference process: state, device, memory, number of loaded models, name
    of the device.
    """

    DEFAULT_CSS = (
        "EngineBar { height: 1; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }"
    )
    state: reactive[str] = reactive("not started")
    facts: reactive[Mapping[str, Any] | None] = reactive(None)

    def render(self) -> RenderResult:
        sign, color, hint = STATES[self.state]
        parts = [hint] if hint else []
        if (facts := self.facts) and self.state in ("ready", "busy"):
            count, memory = (
                len(facts["loaded"]),
                (in_units(facts[f"memory_{key}"]) for key in ("used", "total")),
            )
            parts += [
                facts["device"],
                " of ".join(memory),
                f"{count} model{'' if count == 1 else 's'}",
                facts["name"],
            ]
        text = Text(no_wrap=True, overflow="ellipsis", end="")
        text.append(f"{sign} engine {self.state}", self.app.theme_variables.get(color, ""))
        return text.append("".join(f" · {part}" for part in parts))
