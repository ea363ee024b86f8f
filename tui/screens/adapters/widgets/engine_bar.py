"""One line: what the inference process is doing, on which device, with how much memory."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual.app import RenderResult
from textual.reactive import reactive
from textual.widget import Widget

from pipeline.project.logs.run_log import in_units

STATES = {  # state → (sign, style, what to do or know)
    "not started": ("○", "dim", "the first prompt starts it"),
    "starting": ("◌", "", "importing libraries"),
    "ready": ("●", "green", ""),
    "loading": ("◌", "", "x interrupts"),
    "busy": ("◐", "", "x interrupts"),
    "died": ("✗", "red", "prompt again: a fresh one starts"),
}


class EngineBar(Widget):
    """The state in a word, then device, its name, memory used of total, models resident."""

    DEFAULT_CSS = "EngineBar { height: 1; background: $panel; color: $foreground; }"
    state: reactive[str] = reactive("not started")
    facts: reactive[Mapping[str, Any] | None] = reactive(None)

    def render(self) -> RenderResult:
        sign, style, hint = STATES[self.state]
        parts = [hint] if hint else []
        if self.facts and self.state in ("ready", "busy"):
            parts += described(self.facts)
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f" {sign} engine {self.state}", style)
        return text.append("".join(f" · {part}" for part in parts))


def described(facts: Mapping[str, Any]) -> list[str]:
    """Device, name, memory in absolute units, how many models: the answer to `status` in words."""
    count = len(facts["loaded"])
    memory = f"{in_units(facts['memory_used'])} of {in_units(facts['memory_total'])}"
    return [str(facts["device"]), memory, f"{count} model{'' if count == 1 else 's'}", str(facts["name"])]
