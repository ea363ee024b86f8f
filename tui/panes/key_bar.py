"""The bottom line: what keys do here and now."""

from textual.app import RenderResult
from textual.content import Content
from textual.reactive import reactive
from textual.style import Style
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
    auto_links = False  # they are named by their keys
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

    def render(self) -> RenderResult:
        """Keys that do not fit are left out; the fixed ones never."""
        fixed = Content("  ").join(map(_entry, self.fixed))
        room, parts = self.size.width - fixed.cell_length - 3, list[Content]()
        for part in map(_entry, self.keys):
            room -= part.cell_length + 2
            if room < 0:
                break
            parts.append(part)
        line = Content(" ") + Content("  ").join(parts)
        space = self.size.width - line.cell_length - fixed.cell_length - 2
        return line + " " * max(space, 0) + fixed


def _entry(entry: tuple[str, str, str]) -> Content:
    """A key and what it does; a click has its effect."""
    shown, label, key = entry
    text = Content.assemble((shown, "bold $accent"), f" {label}")
    return text.stylize(Style.from_meta({"@click": f"app.simulate_key('{key}')"})) if key else text
