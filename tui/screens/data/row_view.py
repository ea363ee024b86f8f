"""One row, turn by turn: what is trained on, what is only read, and where it is cut."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import Static

from tui.widgets.pane import Pane

LEGEND = (("trained", "⟦trained on⟧"), ("read", "read"), ("template", "template"), ("cut", "cut"))
SHOWN = {"\n": "\n", "\t": "⇥"}  # of what is not printed
MAX_RULE = 200


def styles(colors: Mapping[str, str]) -> dict[str, str]:
    """Kind of text → its style."""
    return {
        "trained": f"bold {colors['success']}",
        "read": "",
        "template": "dim",
        "cut": f"strike {colors['error']}",
    }


def visible(text: str) -> str:
    """Line breaks stay; tabs and control characters become visible."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() else SHOWN.get(c, f"\\x{ord(c):02x}") for c in text)


def draw_row(
    answer: Mapping[str, Any], colors: Mapping[str, str], width: int, max_length: int
) -> Text:
    """The turns of a row as `browse_server` sends them, each below a line with its role."""
    lines, by_kind = Text(), styles(colors)
    if answer["problem"]:
        lines.append(f"✗ {visible(answer['problem'])}\n\n", colors["error"])
    was_cut = False
    for role, parts in answer["turns"]:
        kinds = [kind for kind, _ in parts]
        fact = "trained on" if "trained" in kinds else ""
        if kinds[:1] == ["cut"]:
            fact = "cut"
        if answer["problem"]:
            fact = ""
        lines.append(f"{_rule(f'── {visible(role)} ' + f'· {fact} ' * bool(fact), width)}\n", "dim")
        for kind, text in parts:
            if kind == "cut" and not was_cut:
                was_cut = True
                before = "" if lines.plain.endswith("\n") else "\n"
                lines.append(
                    f"{before}{_rule(f'⊣─ cut at {max_length:,} tokens ', width)}\n",
                    colors["error"],
                )
            shown = visible(text)
            if kind == "trained" and not answer["problem"]:
                shown = f"⟦{shown}⟧"
            lines.append(shown, by_kind[kind])
        lines.append("\n" if lines.plain.endswith("\n") else "\n\n")
    if answer["hidden"]:
        lines.append(f"… {answer['hidden']:,} more characters; e opens all of it\n", "dim")
    lines.rstrip()
    return lines


def _rule(label: str, width: int) -> str:
    return label + "─" * max(0, min(width, MAX_RULE) - cell_len(label))


def facts(answer: Mapping[str, Any]) -> list[str]:
    """What is said of a row beside its title."""
    if answer.get("tokens") is None:
        return ["mask by roles, no tokens"] if answer["turns"] and not answer["problem"] else []
    parts = [f"{answer['tokens']:,} tokens", f"{answer['trained']:,} trained on"]
    if answer["cut"]:
        turns = [kind for _, turn in answer["turns"] for kind in ["cut" in [k for k, _ in turn]]]
        where = f" from turn {turns.index(True) + 1}" if len(turns) > 1 and True in turns else ""
        parts.insert(1, f"{answer['cut']:,} cut{where}")
    return parts


class RowPane(Pane):
    """The row under the cursor of the list."""

    TITLE = "Row"
    HELP = """\
The row as the model reads it: with a tokenizer as its chat template writes it, else its messages.

- **⟦green⟧** is trained on: the model learns to write it, with the end token behind it.
- Plain text is read, and no loss is computed on it. Dim text is what the template adds.
- **Struck out** is behind the cut at `max_length`, and never seen. `⊣` marks the place.

Without a model in `artifacts` there are no tokens: the mask is that of the roles."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "screen.edit", "edit", id="data.edit"),
        Binding("y", "screen.copy", "copy", id="data.copy"),
    ]

    def __init__(self) -> None:
        super().__init__(id="row")
        self._answer: Mapping[str, Any] | None = None
        self._max_length = 0

    def contents(self) -> Iterable[Widget]:
        with VerticalScroll():
            yield Static(id="turns", markup=False)
        yield Static(id="legend", markup=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())

    def show_row(self, answer: Mapping[str, Any], max_length: int) -> None:
        self._answer, self._max_length = answer, max_length
        self.show_title(*facts(answer), title=f"Row {answer['row']:,}")
        self._draw()
        self.query_one(VerticalScroll).scroll_home(animate=False)

    def show_text(self, text: str) -> None:
        """Something instead of a row."""
        self._answer = None
        self.show_title(title="Row")
        self.query_one("#turns", Static).update(text)

    def _draw(self) -> None:
        colors = self.app.theme_variables
        legend = Text(no_wrap=True, overflow="ellipsis")
        for kind, label in LEGEND:
            legend.append(label, styles(colors)[kind]).append("  ")
        missing = bool(self._answer and self._answer.get("missing"))
        self.query_one("#legend").set_class(missing, "-note")
        if self._answer and missing:
            legend = Text(f"no tokens: {visible(self._answer['missing'])}", colors["warning"])
        self.query_one("#legend", Static).update(legend)
        if self._answer:
            width = self.query_one("#turns").content_size.width
            self.query_one("#turns", Static).update(
                draw_row(self._answer, colors, width, self._max_length)
            )

    def on_resize(self, event: Resize) -> None:
        super().on_resize(event)
        self.call_after_refresh(self._draw)
