"""The bottom line: what keys do here and now."""

from rich.cells import cell_len
from rich.text import Text
from textual.app import RenderResult
from textual.events import Click
from textual.reactive import reactive
from textual.widget import Widget

from tui.panes.pane import Pane

Keys = tuple[tuple[str, str, str], ...]  # key as it is shown, label, key as Textual names it
# keys with a longer name that type a character
NAMED = ("question_mark", "slash", "plus", "colon", "space")
ALWAYS = ("app.help", "app.palette", "app.quit")  # at the right end, never left out
SCREENS_KEYS = ("F2–F9", "screens", "")


class KeyBar(Widget):
    """The keys of the screen and, while a text is typed, of its field; at the right those that are
    the same everywhere.

    What a pane shows in its border is left out, unless a text is typed. A click on a key has its
    effect.
    """

    DEFAULT_CSS = """
    KeyBar { dock: bottom; height: 1; background: $panel; color: $foreground; }
    """
    keys: reactive[Keys] = reactive(())
    fixed: reactive[Keys] = reactive(())

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, lambda _: self.collect())
        self.collect()

    def collect(self) -> None:
        """Read the active bindings again."""
        if not self.is_attached or self.app.screen is not self.screen:
            return
        focused = self.screen.focused
        typing = focused is not None and focused.check_consume_key("a", "a")
        keys: dict[str, tuple[str, str, str]] = {}
        fixed: dict[str, tuple[str, str, str]] = {}
        for key, (node, binding, enabled, _) in self.screen.active_bindings.items():
            in_border = (
                isinstance(node, Pane) and binding.action in node.actions_in_border and not typing
            )
            if not enabled or (typing and (len(key) == 1 or key in NAMED)):
                continue
            if binding.id == getattr(self.app, "hidden_key", ""):
                continue
            entry = self.app.get_key_display(binding), binding.description.lower(), key
            if binding.id in ALWAYS:
                fixed.setdefault(binding.id, entry)
            elif binding.show and not in_border:
                keys.setdefault(binding.action, entry)
        self.keys = tuple(keys.values())
        self.fixed = (*(SCREENS_KEYS,) * typing, *(fixed[name] for name in ALWAYS if name in fixed))

    def _places(self) -> list[tuple[int, str, str, str]]:
        """Column, key, label, name of the key. Those that do not fit are left out; the fixed ones
        never.
        """
        places: list[tuple[int, str, str, str]] = []
        right = max(self.size.width - sum(_width(entry) for entry in self.fixed), 0)
        column = 1
        for entry in self.keys:
            if column + _width(entry) > right:
                break
            places.append((column, *entry))
            column += _width(entry)
        for entry in self.fixed:
            places.append((right, *entry))
            right += _width(entry)
        return places

    def render(self) -> RenderResult:
        line = Text(no_wrap=True, overflow="ellipsis", end="")
        accent = self.app.theme_variables["accent"]
        for column, shown, label, _ in self._places():
            line.pad_right(max(column - line.cell_len, 0))
            line.append(shown, f"bold {accent}").append(f" {label}")
        return line

    def on_click(self, event: Click) -> None:
        for column, shown, label, key in self._places():
            if key and column <= event.x < column + _width((shown, label, key)):
                self.app.simulate_key(key)


def _width(entry: tuple[str, str, str]) -> int:
    return cell_len(entry[0]) + cell_len(entry[1]) + 3
