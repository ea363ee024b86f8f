"""The top line of every screen: screens, what runs, the project, the machine."""

import time
from collections.abc import Sequence

from textual.app import RenderResult
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from pipeline.views.stages import StageState
from tui.registry import SCREENS
from tui.widgets.cells import clickable

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
    auto_links = False  # they are named by their keys
    state: reactive[State] = reactive(("", "", ""))
    facts: reactive[tuple[str, ...]] = reactive(())  # the most important first

    def __init__(self, current: str) -> None:
        super().__init__()
        self.current = current

    def render(self) -> RenderResult:
        text, short, style = self.state
        width = self.size.width
        choices = (("label", "  ", text), ("short", " ", text), ("short", " ", short))
        for kind, gap, state in (*choices, ("digit", " ", text), ("digit", " ", short)):
            line = self._screens(kind, gap)
            if line.cell_length + len(state) + 2 <= width:
                break
        right = [Content.styled(state, style)] if state else []
        for fact in filter(None, self.facts):
            used = line.cell_length + sum(part.cell_length + 2 for part in right)
            if used + len(fact) + 1 <= width:
                right.append(Content.styled(fact, "dim"))
        end = Content("  ").join(right)
        return line + " " * max(width - line.cell_length - end.cell_length - 1, 0) + end

    def _screens(self, kind: str, gap: str) -> Content:
        """The screens with their keys: with their label, a shorter one, or the number alone."""
        parts = []
        for number, (name, entry) in enumerate(SCREENS.items(), 1):
            is_current = name == self.current
            label = entry.label if kind == "label" else entry.short
            text = f"{number} {label}" if kind != "digit" or is_current else f"{number}"
            parts.append(clickable(text, f"app.switch_mode('{name}')", "reverse bold" * is_current))
        return Content.styled(NAME, "bold $accent") + Content(gap).join(parts)


def describe_state(states: Sequence[StageState], started: bool, problem: str) -> State:
    """What runs, else what went wrong, else what is left to do; and its colour."""
    running = next((state for state in reversed(states) if state.state == "running"), None)
    if running:
        name, run, style = running.stage.name, running.run, "bold $accent"
        share = f" {run.done / run.total:.0%}" if run and run.total else ""
        clock = f" {_clock(max(int(time.time() - run.started), 0))}" if run else ""
        return f"▶ {name}{share}{clock}", f"▶ {running.stage.method}{share}", style
    if started:
        return "▶ starting", "▶", "bold $accent"
    if problem:
        return "✗ params", "✗ params", "bold $error"
    failed = [state.stage for state in states if state.state in ("failed", "died")]
    if failed:
        return f"✗ {failed[0].name}", f"✗ {failed[0].method}", "bold $error"
    if broken := [state.broken for state in states if state.broken]:
        return f"✗ {broken[0].counted} broken", "✗ limits", "bold $error"
    waiting = sum(state.state != "current" for state in states)
    text, style = (
        (f"● {waiting} to run", "$warning") if waiting else ("✓" * bool(states), "$success")
    )
    return text, text, style


def _clock(seconds: int) -> str:
    """0:12, 3:20:05."""
    minutes, hours = seconds // 60, seconds // 3600
    return (
        f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
    )
