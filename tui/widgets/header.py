"""The top line of every screen: screens, what runs, the project, the machine."""

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text
from textual.app import RenderResult
from textual.events import Click
from textual.reactive import reactive
from textual.widget import Widget

from pipeline.views.stages import StageState
from tui.registry import SCREENS

NAME = " lora "
State = tuple[str, str, str]  # a text, a shorter one, their style


class Header(Widget):
    """`lora 1 Pipeline 2 Curves … ▶ finetune_lora 64% 0:12 main* cpu 1.1/23 GiB ~/app`.

    What does not fit is left out, the least important first: the folder, the machine, the branch. A
    click on a screen's name opens it.
    """

    DEFAULT_CSS = """
    Header { dock: top; height: 1; background: $panel; color: $foreground; }
    """
    state: reactive[State] = reactive(("", "", ""))
    facts: reactive[tuple[str, ...]] = reactive(())  # the most important first

    def __init__(self, current: str) -> None:
        super().__init__()
        self.current = current

    def _layout(self) -> tuple[list[str], str]:
        """The screens' labels and the state, in full or as short as the width demands."""
        text, short, _ = self.state
        full = [f"{number} {entry.label}" for number, entry in enumerate(SCREENS.values(), 1)]
        brief = [f"{number} {entry.short}" for number, entry in enumerate(SCREENS.values(), 1)]
        digits = [
            label if name == self.current else label[:1]
            for name, label in zip(SCREENS, brief, strict=True)
        ]
        for labels, gap, state in (
            (full, 2, text),
            (brief, 1, text),
            (brief, 1, short),
            (digits, 1, text),
        ):
            if len(NAME) + len((" " * gap).join(labels)) + cell_len(state) + 2 <= self.size.width:
                return [label + " " * gap for label in labels], state
        return [label + " " for label in digits], short

    def render(self) -> RenderResult:
        width, variables = self.size.width, self.app.theme_variables
        line = Text(no_wrap=True, overflow="ellipsis", end="").append(
            NAME, f"bold {variables['accent']}"
        )
        labels, state = self._layout()
        for name, label in zip(SCREENS, labels, strict=True):
            text = label.rstrip()
            line.append(text, "reverse bold" if name == self.current else "").append(
                label[len(text) :]
            )
        right = Text(state, self.state[2], end="")
        for fact in filter(None, self.facts):
            if line.cell_len + right.cell_len + cell_len(fact) + 3 <= width:
                right = Text.assemble(right, "  " if right else "", (fact, "dim"))
        line.pad_right(max(width - line.cell_len - right.cell_len - 1, 0))
        return line.append_text(right)

    def on_click(self, event: Click) -> None:
        start = len(NAME)
        for name, label in zip(SCREENS, self._layout()[0], strict=True):
            if start <= event.x < (start := start + len(label)):
                self.app.switch_mode(name)


def describe_state(
    states: Sequence[StageState], started: bool, problem: str, colors: dict[str, str]
) -> State:
    """What runs, else what went wrong, else what is left to do; and its colour."""
    running = next((state for state in reversed(states) if state.state == "running"), None)
    if running:
        name, run, style = running.stage.name, running.run, f"bold {colors['accent']}"
        share = f" {run.done / run.total:.0%}" if run and run.total else ""
        clock = f" {_clock(max(int(time.time() - run.started), 0))}" if run else ""
        return f"▶ {name}{share}{clock}", f"▶ {running.stage.method}{share}", style
    if started:
        return "▶ starting", "▶", f"bold {colors['accent']}"
    if problem:
        return "✗ params", "✗ params", f"bold {colors['error']}"
    failed = [state.stage for state in states if state.state in ("failed", "died")]
    if failed:
        return f"✗ {failed[0].name}", f"✗ {failed[0].method}", f"bold {colors['error']}"
    if broken := [state.broken for state in states if state.broken]:
        return f"✗ {broken[0].counted} broken", "✗ limits", f"bold {colors['error']}"
    waiting = sum(state.state != "current" for state in states)
    text, style = (
        (f"● {waiting} to run", colors["warning"])
        if waiting
        else ("✓" * bool(states), colors["success"])
    )
    return text, text, style


def _clock(seconds: int) -> str:
    """0:12, 3:20:05."""
    minutes, hours = seconds // 60, seconds // 3600
    return (
        f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
    )
