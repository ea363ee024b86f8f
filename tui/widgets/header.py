"""The top line of every screen: screens, what runs, the project, the machine."""

import time
from collections.abc import Sequence
from functools import cache
from itertools import product

from textual.app import RenderResult
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from pipeline.views.stages import StageState
from tui.registry import SCREENS
from tui.widgets.cells import duration

NAME = " lora "
State = tuple[str, str, str]  # a text, a shorter one, their style


class Header(Widget):
    """`lora 1 Pipeline 2 Curves … ▶ finetune_lora 64% 12 s main* cpu 1.1/23 GiB ~/app`.

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
        for kind, state in product(("label", "short", "digit"), (text, short)):
            line = screens_line(self.current, kind)
            if line.cell_length + len(state) + 2 <= width:
                break
        end = Content.styled(state, style)
        for fact in filter(None, self.facts):
            longer = end + "  " + Content.styled(fact, "dim")
            if line.cell_length + longer.cell_length + 1 <= width:
                end = longer
        space = width - line.cell_length - end.cell_length - 1
        return line + " " * max(space, 0) + end


@cache  # the line is drawn every second while something runs
def screens_line(current: str, kind: str) -> Content:
    """The screens with their keys: with their label, a shorter one, or the number alone."""
    parts = []
    for number, (name, entry) in enumerate(SCREENS.items(), 1):
        is_current = name == current
        label = entry.label if kind == "label" else entry.short
        text = f"{number} {label}" if kind != "digit" or is_current else f"{number}"
        content = Content.from_markup(f"[@click=\"app.switch_mode('{name}')\"]{text}[/]")
        parts.append(content.stylize("reverse bold" * is_current))
    gap = Content("  " if kind == "label" else " ")
    return Content.styled(NAME, "bold $accent") + gap.join(parts)


def describe_state(
    states: Sequence[StageState], started: bool, problem: str, stopping: bool = False
) -> State:
    """What runs, else what went wrong, else what is left to do; and its colour."""
    running = next((state for state in reversed(states) if state.state == "running"), None)
    if running:
        name, run, style = running.stage.name, running.run, "bold $accent"
        share = f" {run.done / run.total:.0%}" if run and run.total else ""
        clock = f" {duration(time.time() - run.started)}" if run else ""
        verb = "▶ stopping" if stopping else "▶"
        return f"{verb} {name}{share}{clock}", f"{verb} {running.stage.method}{share}", style
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
    text = f"● {waiting} to run" if waiting else "✓" * bool(states)
    return text, text, "$warning" if waiting else "$success"
