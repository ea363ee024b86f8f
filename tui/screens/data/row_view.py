"""The pane of one row, turn by turn: what is trained on, what is only read, and where it is cut."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

from textual.content import Content
from textual.widgets import Static

from pipeline.views.data_rows import Answer, row_facts
from tui.panes.pane import Pane
from tui.panes.text import Text
from tui.screens.data.about import ROW
from tui.screens.data.reader import Reader

REST = 0.05  # seconds on a row before it is read: a held key passes over rows
STYLES = {"trained": "bold $success", "read": "", "template": "dim", "cut": "strike $error"}
LABELS = {"trained": "⟦trained on⟧", "read": "read", "template": "template", "cut": "cut"}
LEGEND = Content("  ").join(Content.styled(LABELS[kind], STYLES[kind]) for kind in LABELS)
Part = Sequence[str]  # its kind and its text


class RowPane(Pane):
    """A row of the reader's file; `row` is what was read of it."""

    def __init__(self, reader: Reader) -> None:
        self.text, self.legend = Text(), Static(id="legend")
        super().__init__(ROW, self.text, self.legend, id="row")
        self.row: Answer | None = None
        self._reader, self._position = reader, -1

    def read(self, position: int) -> None:
        """Show the row at this position, unless it is shown or being read."""
        if position != self._position:
            self._position = position
            take = partial(self._show, position)
            self._reader.ask(self, "row", take, self.say, REST, position=position)

    def say(self, text: str) -> None:
        """A sentence in place of a row."""
        self.row, self._position = None, -1
        self.show_title(title="Row")
        self.text.show(text)

    def _show(self, position: int, answer: Answer) -> None:
        # sent again when there are tokens, it stays where one has scrolled to
        again = bool(self.row and self.row["position"] == position)
        self.row, missing = {**answer, "position": position}, visible(answer["missing"])
        self.show_title(*row_facts(answer), title=f"Row {answer['row']:,}")
        self.text.show(partial(draw_row, answer, self._reader.file.max_length), again=again)
        why = Content.styled(f"no tokens: {missing}", "$warning")
        self.legend.update(why if missing else LEGEND)
        self.legend.set_class(bool(missing), "-note")


def visible(text: str) -> str:
    """Line breaks stay; tabs and control characters become visible."""
    shown = []
    for char in text:
        is_plain = char.isprintable() or char == "\n"
        shown.append(char if is_plain else char.encode("unicode_escape").decode())
    return "".join(shown)


def draw_row(answer: Answer, max_length: int, width: int) -> Iterator[Content]:
    """The turns of a row as `browse_server` sends them, each below a line with its role."""
    was_cut = False
    if problem := answer["problem"]:
        yield from (Content.styled(f"✗ {visible(problem)}", "$error"), Content())
    for role, parts in answer["turns"]:
        yield _rule(f"── {visible(role)} ", width, "dim")
        for is_cut, group in groupby(parts, lambda part: part[0] == "cut"):
            if is_cut and not was_cut:
                was_cut = True
                yield _rule(f"⊣─ cut at {max_length:,} tokens ", width, "$error")
            yield from _lines(group)
        yield Content()
    if answer["hidden"]:
        more = f"… {answer['hidden']:,} more characters; e opens all of it"
        yield Content.styled(more, "dim")


def _lines(parts: Iterable[Part]) -> list[Content]:
    shown = []
    for kind, text in parts:
        mark = "⟦{}⟧" if kind == "trained" else "{}"
        shown.append((mark.format(visible(text)), STYLES[kind]))
    return Content.assemble(*shown).split()


def _rule(label: str, width: int, style: str) -> Content:
    return Content.styled(label + "─" * (width - Content(label).cell_length), style)
