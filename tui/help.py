"""Help: what a pane shows and its keys, then the keys that are the same everywhere, and what the
signs mean.
"""

from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from textual.binding import Binding

from tui.panes.pane import Pane
from tui.widgets.colors import LOOKS

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


def page(prose: str, keys: Keys, pane: Pane | None) -> Iterable[RenderableType]:
    """The parts of the help: prose (Markdown), then tables."""
    from rich.markdown import Markdown

    if pane and pane.about.help:
        yield Text(pane.title, "bold")
        yield Markdown(f"{pane.about.help}\n")
    yield Markdown(f"{prose}\n")
    own = [
        (names, binding) for names, binding in keys if not (binding.id or "app.").startswith("app.")
    ]
    if own:
        yield _table(
            "Keys here", ((names, binding.description, binding.id or "") for names, binding in own)
        )
    yield _table("Keys everywhere", ((names, text, "") for names, text in EVERYWHERE))
    yield _table("Signs", ((sign, text, "") for sign, text in STATES.items()))
    yield _table(
        "Methods", ((Text(look.sign, look.color), name, "") for name, look in LOOKS.items())
    )
    yield Text("\nThe names at the right can be given other keys in the config file.", "dim")


def _table(title: str, rows: Iterable[tuple[str | Text, str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(f"\n{title}", "bold"), "", "")
    for keys, text, name in rows:
        table.add_row(keys, text, Text(name, "dim"))
    return table
