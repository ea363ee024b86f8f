"""The bottom line: what keys do here and now."""

from collections.abc import Iterable

from textual.app import RenderResult
from textual.content import Content
from textual.style import Style
from textual.widget import Widget

from tui.panes.pane import Pane
from tui.panes.table import fitted

# keys with a longer name that type a character
NAMED = ("question_mark", "slash", "plus", "colon", "space")
ALWAYS = ("app.help", "app.palette", "app.quit")  # at the right end, never left out


class KeyBar(Widget):
    """The keys of the screen and, while a text is typed, of its field; at the right those that are
    the same everywhere.

    What a pane shows in its border is left out, unless a text is typed. A click on a key has its
    effect.
    """

    DEFAULT_CSS = """
    KeyBar { dock: bottom; height: 1; background: $panel; color: $foreground; }
    """
    auto_links = False  # they are named by their keys

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, lambda _: self.refresh())

    def render(self) -> RenderResult:
        """Keys that do not fit are left out; the fixed ones never."""
        keys, always = self._keys()
        fixed = Content("  ").join(always)
        room, line = self.size.width - fixed.cell_length - 2, Content(" ")
        for key in keys:
            if line.cell_length + key.cell_length + 2 > room:
                break
            line += key + "  "
        return fitted(line, max(room, 0)) + fixed

    def _keys(self) -> tuple[Iterable[Content], Iterable[Content]]:
        """The active ones, and those at the right end."""
        focused = self.screen.focused
        typing = focused is not None and focused.check_consume_key("a", "a")
        keys, fixed = dict[str, Content](), dict[str, Content]()
        for key, (node, binding, enabled, _) in self.screen.active_bindings.items():
            types = typing and (len(key) == 1 or key in NAMED)
            if types or not enabled or binding.id == getattr(self.app, "hidden_key", ""):
                continue
            entry = _entry(self.app.get_key_display(binding), binding.description.lower(), key)
            in_border = isinstance(node, Pane) and binding.action in node.actions_in_border
            if binding.id in ALWAYS:
                fixed.setdefault(binding.id, entry)
            elif binding.show and (typing or not in_border):
                keys.setdefault(binding.action, entry)
        screens = [_entry("F2–F9", "screens")] * typing
        return keys.values(), screens + [fixed[name] for name in ALWAYS if name in fixed]


def _entry(shown: str, label: str, key: str = "") -> Content:
    """A key and what it does; a click has its effect."""
    text = Content.assemble((shown, "bold $accent"), f" {label}")
    return text.stylize(Style.from_meta({"@click": f"app.simulate_key('{key}')"})) if key else text
