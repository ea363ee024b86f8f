"""The names of the four screens on one line; a click switches to one."""

from rich.text import Text
from textual.app import RenderResult
from textual.events import Click
from textual.widget import Widget

from tui.registry import SCREENS


class TabBar(Widget):
    """One line: 1 Pipeline  2 Curves  3 Calculator  4 Adapters, and the project's folder."""

    DEFAULT_CSS = """
    TabBar { height: 1; dock: top; background: $panel; color: $foreground; }
    """

    def __init__(self, current: str, folder_label: str) -> None:
        super().__init__()
        self.current = current
        self.folder_label = folder_label

    def render(self) -> RenderResult:
        line = Text(no_wrap=True, overflow="ellipsis")
        for number, (name, entry) in enumerate(SCREENS.items(), 1):
            line.append(f" {number} {entry.label} ", "reverse bold" if name == self.current else "")
        room = self.size.width - line.cell_len - 2
        if room > 8:
            folder_label = self.folder_label if len(self.folder_label) <= room else f"…{self.folder_label[1 - room :]}"
            line.append(folder_label.rjust(room + 1), "dim")
        return line

    def on_click(self, event: Click) -> None:
        start = 0
        for number, (name, entry) in enumerate(SCREENS.items(), 1):
            start += len(f" {number} {entry.label} ")
            if event.x < start:
                self.app.switch_mode(name)
                return
