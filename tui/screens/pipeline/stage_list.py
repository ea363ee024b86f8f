"""The list of stages: state, reasons, and progress while running."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rich.text import Text
from textual.geometry import Region
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from pipeline.project.status import StageState
from tui.screens.pipeline.dag_view import SIGNS, STATE_TEXT
from tui.widgets.format import duration

NAME_WIDTH = len("finetune_freeze")  # of the design card's stages; longer names move their line to the right
BAR = 8  # cells of a progress bar


class StageList(OptionList):
    """The stages that a project can read, in the order of the DAG. Option ids are their names."""

    DEFAULT_CSS = """
    StageList { height: auto; border: none; padding: 0; background: transparent; }
    StageList { text-wrap: nowrap; text-overflow: ellipsis; }
    StageList:focus { border: none; }
    """

    def __init__(self, stages: Iterable[str], **options: Any) -> None:
        super().__init__(*(Option(_format_line(name, None), id=name) for name in stages), compact=True, **options)
        self._shown: dict[str, Text] = {}
        self._states: dict[str, str] = {}

    def set_stages(self, stages: Collection[str]) -> None:
        """Show these stages, in this order."""
        if [option.id for option in self.options] == list(stages):
            return
        chosen = self.highlighted_option
        self.set_options(Option(self._shown.get(name, _format_line(name, None)), id=name) for name in stages)
        if chosen is not None and chosen.id in stages:
            self.choose(str(chosen.id))

    def choose(self, stage: str) -> None:
        """Highlight a stage."""
        self.highlighted = self.get_option_index(stage)

    def show(self, states: Mapping[str, StageState]) -> None:
        """Update the lines that changed. A stage that starts to run scrolls into view; the cursor stays."""
        ids = {option.id for option in self.options}
        for name, state in ((name, state) for name, state in states.items() if name in ids):
            line = _format_line(name, state)
            if self._shown.get(name) != line:
                self._shown[name] = line
                self.replace_option_prompt(name, line)
            if state.state == "running" and self._states.get(name) != "running":
                region = Region(0, self.get_option_index(name), 1, 1)
                self.call_after_refresh(self.scroll_to_region, region, animate=False)
            self._states[name] = state.state


def _format_line(name: str, state: StageState | None) -> Text:
    sign, style = SIGNS[state.state] if state else ("·", "dim")
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{sign} ", style).append(f"{name:{NAME_WIDTH}}  ")
    return line.append(_format_state(state) if state else Text("…", "dim"))


def _format_state(state: StageState) -> Text:
    if state.state == "running":
        return Text(_format_progress(state), SIGNS["running"][1])
    word = Text(STATE_TEXT.get(state.state, state.state), SIGNS[state.state][1])
    return word.append(f": {', '.join(state.reasons)}" if state.reasons else "", "default")


def _format_progress(state: StageState) -> str:
    run = state.run
    if run is None or not run.total:
        return "running: starting"
    share = run.done / run.total
    filled = round(share * BAR)
    left = "" if run.eta is None else f"  {duration(run.eta)} left"
    return f"{'━' * filled}{'╌' * (BAR - filled)} {share:4.0%}  {run.done:,}/{run.total:,}  {run.text}{left}"
