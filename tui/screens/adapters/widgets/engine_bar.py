"""A status line of the inference process: state, device, memory."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual.app import RenderResult
from textual.reactive import reactive
from textual.widget import Widget

from pipeline.project.logs.run_log import in_units

STATES = {  # state → (symbol, style, hint)
    "not started": ("○", "dim", "the first prompt starts it"),
    "starting": ("◌", "", "importing libraries"),
    "ready": ("●", "green", ""),
    "loading": ("◌", "", "x interrupts"),
    "busy": ("◐", "", "x interrupts"),
    "died": ("✗", "red", "prompt again to start a new one"),
}


class EngineBar(Widget):
    """Shows the state, then device, memory, number of loaded models, and name of the device."""

    DEFAULT_CSS = "EngineBar { height: 1; background: $panel; color: $foreground; }"
    state: reactive[str] = reactive("not started")
    facts: reactive[Mapping[str, Any] | None] = reactive(None)

    def render(self) -> RenderResult:
        sign, style, hint = STATES[self.state]
        parts = [hint] if hint else []
        if self.facts and self.state in ("ready", "busy"):
            parts += format_facts(self.facts)
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f" {sign} engine {self.state}", style)
        return text.append("".join(f" · {part}" for part in parts))


def format_facts(facts: Mapping[str, Any]) -> list[str]:
    """The answer to `status` as texts: device, memory used of total, number of models, name."""
    count = len(facts["loaded"])
    memory = f"{in_units(facts['memory_used'])} of {in_units(facts['memory_total'])}"
    return [str(facts["device"]), memory, f"{count} model{'' if count == 1 else 's'}", str(facts["name"])]
