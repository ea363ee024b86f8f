"""Help: what a pane shows and its keys, then the keys that are the same everywhere, and what the
signs mean.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from textual.binding import Binding
from textual.content import Content

from tui.panes.markdown import markdown
from tui.panes.pane import Pane
from tui.panes.table import fitted
from tui.panes.text import Draw
from tui.widgets.colors import LOOKS, look_style

STATES = {
    "✓": "up to date; intact",
    "●": "changed, so it would run again",
    "○": "not made yet",
    "◌": "waits for another stage",
    "▶": "running",
    "‖": "stopped with a checkpoint",
    "✗": "failed; refused",
}
MOVEMENTS = (
    ("↑ ↓ j k  Home End g G", "move in a list", ""),
    ("Tab  Shift+Tab", "next, previous pane or field", ""),
)

Row = tuple[Content | str, str, str]  # keys or a sign, what they do or mean, their name


def page(screen: Any) -> Draw:
    """What draws the help of a `WorkbenchScreen`: prose, then tables."""
    pane: Pane | None = screen.focused_pane
    text, variables = screen.HELP, screen.app.theme_variables
    if pane:
        text = f"**{pane.title}**\n\n{pane.about.help}\n\n{text}"
    own, everywhere = list[Row](), list[Row]()
    for keys, binding in _keys(screen):
        rows = everywhere if binding.id.startswith("app.") else own
        rows.append((keys, binding.tooltip or binding.description, binding.id))
    tables: dict[str, list[Row]] = {
        "Keys here": own,
        "Keys everywhere": [*everywhere, *MOVEMENTS],
        "Signs": [(sign, what, "") for sign, what in STATES.items()],
        "Methods": [
            (Content.styled(look.sign, look_style(look)), name, "") for name, look in LOOKS.items()
        ],
    }

    def draw(width: int) -> Iterator[Content]:
        yield from markdown(text, variables, 0)(width)
        for title, rows in tables.items():
            if rows:
                yield Content("")
                yield Content.styled(title, "bold")
                yield from _lines(rows)
        note = "The names at the right can be given other keys in the config file."
        yield from (Content(""), Content.styled(note, "$foreground-muted"))

    return draw


def _keys(screen: Any) -> Iterator[tuple[str, Any]]:
    """The keys of each action that has a name, and its binding."""
    found: dict[str, tuple[list[str], Binding]] = {}
    for _, binding, *_ in screen.active_bindings.values():
        if binding.id:
            keys, _ = found.setdefault(binding.action, ([], binding))
            keys.append(screen.app.get_key_display(binding))
    for keys, binding in found.values():
        yield " ".join(dict.fromkeys(keys)), binding


def _lines(rows: Iterable[Row]) -> Iterator[Content]:
    cells = [(Content.assemble(keys), what, name) for keys, what, name in rows]
    first = max(keys.cell_length for keys, *_ in cells)
    second = max(len(what) for _, what, _ in cells)
    for keys, what, name in cells:
        line = Content.assemble(fitted(keys, first), f"  {what:{second}}  ")
        yield line + Content.styled(name, "$foreground-muted")
