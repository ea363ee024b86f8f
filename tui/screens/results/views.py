"""The line of the screen's views."""

from rich.text import Text
from textual.app import RenderResult
from textual.events import Click
from textual.reactive import reactive
from textual.widget import Widget


class Views(Widget):
    """The screen's views in one line, each with its key; a click shows one."""

    DEFAULT_CSS = """
    Views { height: 1; padding: 0 1; }
    """
    entries: reactive[tuple[tuple[str, str, str], ...]] = reactive(())  # view, key, label
    current: reactive[str] = reactive("")

    def _texts(self) -> list[tuple[str, str, str]]:
        """View, key and label; of the label its first word where the width allows no more."""
        texts = list(self.entries)
        if sum(len(key) + len(label) + 4 for _, key, label in texts) <= self.size.width:
            return texts
        return [(view, key, label.split()[0]) for view, key, label in texts]

    def render(self) -> RenderResult:
        line = Text(no_wrap=True, overflow="ellipsis", end="")
        accent = self.app.theme_variables["accent"]
        for view, key, label in self._texts():
            style = "reverse bold" if view == self.current else ""
            line.append(f" {key}", style or f"bold {accent}").append(f" {label} ", style).append(
                " "
            )
        return line

    def on_click(self, event: Click) -> None:
        start = 1
        for view, key, label in self._texts():
            start += len(key) + len(label) + 4
            if event.x < start:
                self.app.call_later(self.screen.run_action, f"view('{view}')")
                return
