"""The top line of every screen: screens, what runs, the project, the machine."""

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text
from textual.app import RenderResult
from textual.events import Click
from textual.reactive import reactive
from textual.widget import Widget

from pipeline.project.status import StageState
from tui.registry import SCREENS

NAME = " lora  "
Part = tuple[str, str]  # text, style


class Header(Widget):
    """`lora  1 Pipeline  2 Curves …   ▶ finetune_lora 64% 0:12   main*   cpu 1.1/23 GiB   ~/app`.

    What does not fit is left out, the least important first: the folder, the machine, the branch. A click on a screen's
    name opens it.
    """

    DEFAULT_CSS = """
    Header { dock: top; height: 1; background: $panel; color: $foreground; }
    """
    state: reactive[Part] = reactive(("", ""))
    facts: reactive[tuple[str, ...]] = reactive(())  # the most important first

    def __init__(self, current: str) -> None:
        super().__init__()
        self.current = current

    def _labels(self) -> list[str]:
        """The screens' labels, in full or as short as the width demands."""
        room = self.size.width - len(NAME) - cell_len(self.state[0]) - 3
        for gap, labels in (
            (2, [entry.label for entry in SCREENS.values()]),
            (1, [entry.short for entry in SCREENS.values()]),
            (1, [entry.short if name == self.current else "" for name, entry in SCREENS.items()]),
        ):
            texts = [f"{number} {label}".rstrip() + " " * gap for number, label in enumerate(labels, 1)]
            if sum(map(len, texts)) <= room:
                break
        return texts

    def render(self) -> RenderResult:
        width, variables = self.size.width, self.app.theme_variables
        line = Text(no_wrap=True, overflow="ellipsis", end="").append(NAME, f"bold {variables['accent']}")
        for name, label in zip(SCREENS, self._labels(), strict=True):
            text = label.rstrip()
            line.append(text, "reverse bold" if name == self.current else "").append(label[len(text) :])
        right = Text(end="")
        text, style = self.state
        for fact in (text, *self.facts):
            if fact and line.cell_len + right.cell_len + cell_len(fact) + 3 <= width:
                right.append("  " if right else "").append(fact, style if fact is text else "dim")
        line.pad_right(max(width - line.cell_len - right.cell_len - 1, 0))
        return line.append_text(right)

    def on_click(self, event: Click) -> None:
        start = len(NAME)
        for name, label in zip(SCREENS, self._labels(), strict=True):
            if start <= event.x < (start := start + len(label)):
                self.app.switch_mode(name)


def describe_state(states: Sequence[StageState], started: bool, problem: str, colors: dict[str, str]) -> Part:
    """What runs, else what went wrong, else what is left to do; and its colour."""
    running = next((state for state in reversed(states) if state.state == "running"), None)
    if running:
        run = running.run
        if run is None:
            return f"▶ {running.stage.name}", f"bold {colors['accent']}"
        share = f" {run.done / run.total:.0%}" if run.total else ""
        seconds = max(int(time.time() - run.started), 0)
        return f"▶ {running.stage.name}{share} {_clock(seconds)}", f"bold {colors['accent']}"
    if started:
        return "▶ starting", f"bold {colors['accent']}"
    if problem:
        return "✗ params", f"bold {colors['error']}"
    failed = [state.stage.name for state in states if state.state in ("failed", "died")]
    if failed:
        return f"✗ {failed[0]}", f"bold {colors['error']}"
    waiting = sum(state.state != "current" for state in states)
    return (f"● {waiting} to run", colors["warning"]) if waiting else ("✓" * bool(states), colors["success"])


def _clock(seconds: int) -> str:
    """0:12, 3:20:05."""
    minutes, hours = seconds // 60, seconds // 3600
    return f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
