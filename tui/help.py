"""Help: what a pane shows and its keys, then the keys that are the same everywhere, and what the
signs mean.
"""

from collections.abc import Iterable, Iterator

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
EVERYWHERE = (
    ("1–8  F2–F9", "screens (function keys also while typing)"),
    ("Ctrl+P  :", "palette: every command, stage, model, param, prompt, page of the docs"),
    ("/  Esc", "filter the list of the focused pane; all again"),
    ("↑ ↓ j k  Home End g G", "move in a list"),
    ("Tab  Shift+Tab", "next, previous pane or field"),
    ("+  F10", "enlarge the focused pane, and back"),
    ("R  X", "run the pipeline; stop it"),
    ("z", "take back the last write to a params file"),
    ("F12  T  q", "messages; next theme; quit"),
)

Keys = list[tuple[str, Binding]]
Row = tuple[Content | str, str, str]


def page(prose: str, keys: Keys, pane: Pane | None, variables: dict[str, str]) -> Draw:
    """What draws the help: prose, then tables."""
    text = f"**{pane.title}**\n\n{pane.about.help}\n\n{prose}" if pane else prose
    own = [pair for pair in keys if not (pair[1].id or "app.").startswith("app.")]
    tables: dict[str, list[Row]] = {
        "Keys here": [(names, each.description, each.id or "") for names, each in own],
        "Keys everywhere": [(names, what, "") for names, what in EVERYWHERE],
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


def _lines(rows: Iterable[Row]) -> Iterator[Content]:
    """Keys, what they do, their name."""
    cells = [
        (Content(keys) if isinstance(keys, str) else keys, what, name) for keys, what, name in rows
    ]
    first = max(keys.cell_length for keys, *_ in cells)
    second = max(len(what) for _, what, _ in cells)
    for keys, what, name in cells:
        yield Content("  ").join(
            [
                fitted(keys, first),
                Content(what.ljust(second)),
                Content.styled(name, "$foreground-muted"),
            ]
        )
