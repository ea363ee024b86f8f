"""What a check of all rows says: lengths as a histogram with the cut, and problems, which lead to
their rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.message import Message
from textual.widget import Widget
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from pipeline.views.data_files import DataFile, flat
from tui.widgets.pane import Pane
from tui.widgets.table import VIM_KEYS
from tui.widgets.text import LEVELS

MAX_PROBLEMS = 500  # in the list
Lengths = Sequence[tuple[int, int]]  # (length, examples), in order


def columns_of(lengths: Lengths, width: int, longest: int) -> list[int]:
    """Examples per column of a histogram from 0 to `longest`."""
    if longest < width:  # several columns for each length
        counts = dict(lengths)
        return [counts.get(column * (longest + 1) // width, 0) for column in range(width)]
    columns = [0] * width
    for length, count in lengths:
        columns[min(width - 1, length * width // (longest + 1))] += count
    return columns


def longer_than(lengths: Lengths, most: int) -> int:
    return sum(count for length, count in lengths if length > most)


def draw_lengths(
    report: Mapping[str, Any], file: DataFile, colors: Mapping[str, str], width: int, rows: int
) -> Text:
    """Bars of the examples by length, and the place of the cut; red where all are cut, yellow where
    some are.
    """
    lengths: Lengths = report["lengths"]
    limit, name = (file.max_length, "max_length") if file.max_length else (file.window, "window")
    longest = lengths[-1][0]
    longest = max(longest, min(limit, 2 * longest))
    columns = columns_of(lengths, width, longest)
    over = (
        columns_of([each for each in lengths if each[0] > limit], width, longest)
        if file.max_length
        else [0] * width
    )
    styles = []
    for count, cut in zip(columns, over, strict=True):
        color = "warning" if cut else "accent"
        if cut == count:
            color = "error"
        styles.append(colors[color])
    cut_at = limit * width // (longest + 1) if limit and limit <= longest else width
    most, height = max(columns), max(1, rows - 1)
    lines = []
    for row in range(height - 1, -1, -1):
        line = Text(no_wrap=True)
        for column, count in enumerate(columns):
            eighths = max(int(count > 0 and row == 0), round(count / most * height * 8) - 8 * row)
            if eighths > 0:
                line.append(LEVELS[min(8, eighths) - 1], styles[column])
            else:
                line.append("│" if column == cut_at else " ", colors["warning"])
        lines.append(line)
    peak = f"{most:,} examples"
    if not lines[0].plain[: len(peak) + 1].strip():
        lines[0] = Text(peak, "dim", no_wrap=True).append_text(lines[0][len(peak) :])
    lines.append(_axis(width, longest, cut_at, limit, name, colors))
    return Text("\n").join(lines)


def _axis(
    width: int, longest: int, cut_at: int, limit: int, name: str, colors: Mapping[str, str]
) -> Text:
    """0, the mark of the cut with as many words as there is room for, the longest."""
    full = f"0{f'{longest:,} tokens':>{max(0, width - 1)}}"[:width]
    if cut_at >= width:
        return Text(full, "dim", no_wrap=True)
    texts = (f"{name} {limit:,}", f"{limit:,}")
    for ends, words in (
        (full, texts[0]),
        (full, texts[1]),
        ("0".ljust(width), texts[0]),
        ("0".ljust(width), texts[1]),
    ):
        for mark, start in ((f"▲ {words}", cut_at), (f"{words} ▲", cut_at - len(words) - 1)):
            stop = start + len(mark)
            if start > 1 and stop <= width and not ends[start - 1 : stop + 1].strip():
                return Text.assemble(
                    (ends[:start], "dim"),
                    (mark, colors["warning"]),
                    (ends[stop:], "dim"),
                    no_wrap=True,
                )
    return Text.assemble(" " * cut_at, ("▲", colors["warning"]), no_wrap=True)


def length_facts(report: Mapping[str, Any], file: DataFile) -> list[str]:
    """What the histogram's title says."""
    quantiles = report["quantiles"]
    if not quantiles:
        return []
    parts = [f"median {quantiles['p50']:,}", f"99% ≤ {quantiles['p99']:,}"]
    if file.max_length:
        cut = report["truncated"]
        parts.insert(
            0, f"{cut:,} cut ({cut / max(1, report['examples']):.0%})" if cut else "none cut"
        )
    elif file.window:
        longer = longer_than(report["lengths"], file.window + 1)
        parts.insert(0, f"{longer:,} in windows")
    return parts


class LengthsPane(Pane):
    """The histogram."""

    TITLE = "Lengths"
    HELP = """\
How many examples have which length in tokens, the end token included; a preference pair has that
of its longer answer.

- **▲ max_length** is where examples are cut: red bars lie behind it, and lose the rest of their
  text.
- **▲ window** is the length of a training window: longer examples give several, and lose nothing.
- `m` counts all rows. `lora data check FILE` prints the same."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "screen.measure", "measure", id="data.measure")
    ]

    def __init__(self) -> None:
        super().__init__(id="lengths")
        self._report: Mapping[str, Any] | None = None
        self._file = DataFile("")

    def contents(self) -> Iterable[Widget]:
        yield Static(markup=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())

    def show_report(self, report: Mapping[str, Any], file: DataFile) -> None:
        self._report, self._file = report, file
        self.show_title(*length_facts(report, file))
        self._draw()

    def show_text(self, text: str) -> None:
        self._report = None
        self.show_title()
        self.query_one(Static).update(text)

    def _draw(self) -> None:
        if self._report is None or not self.size:
            return
        if not self._report["lengths"]:
            self.query_one(Static).update("No example could be counted.")
            return
        width, height = self.content_size
        if width > 0 and height > 0:
            text = draw_lengths(self._report, self._file, self.app.theme_variables, width, height)
            self.query_one(Static).update(text)

    def on_resize(self, event: Resize) -> None:
        super().on_resize(event)
        self._draw()


class ProblemList(OptionList):
    BINDINGS: ClassVar[list[BindingType]] = [*VIM_KEYS]
    DEFAULT_CSS = """
    ProblemList { height: 1fr; border: none; padding: 0; background: transparent; scrollbar-size-vertical: 1; }
    ProblemList:focus { border: none; }
    """

    def __init__(self) -> None:
        super().__init__(compact=True, markup=False)


class ProblemsPane(Pane):
    """The problems of `lora data check`, the errors first."""

    TITLE = "Problems"
    HELP = """\
What `lora data check` says of the file: **✗** errors, which spoil a training, then **!** warnings.

Enter goes to the row; `n`, `N` go from one to the next from anywhere on this screen. Of each kind
the first 50 are listed, all are counted."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "screen.problem(1)", "next", id="data.next"),
        Binding("N", "screen.problem(-1)", "previous", id="data.previous"),
        Binding("m", "screen.measure", "check all", id="data.measure"),
    ]

    class Chosen(Message):
        """Go to this row."""

        def __init__(self, row: int) -> None:
            super().__init__()
            self.row = row

    def __init__(self) -> None:
        super().__init__(id="problems")
        self._report: Mapping[str, Any] | None = None

    def contents(self) -> Iterable[Widget]:
        yield ProblemList()

    def on_mount(self) -> None:
        super().on_mount()
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw_again())

    def _draw_again(self) -> None:
        if self._report:
            self.show_report(self._report)

    @property
    def _list(self) -> ProblemList:
        return self.query_one(ProblemList)

    def show_report(self, report: Mapping[str, Any]) -> None:
        self._report = report
        colors = self.app.theme_variables
        options = []
        for number, problem in enumerate(report["problems"][:MAX_PROBLEMS]):
            is_error = problem["level"] == "error"
            sign = ("✗ ", colors["error"]) if is_error else ("! ", colors["warning"])
            row = "" if problem["row"] is None else f"{problem['row']:,}  "
            text = Text.assemble(
                sign, (row, "bold"), flat(problem["problem"]), no_wrap=True, overflow="ellipsis"
            )
            options.append(Option(text, id=f"{number}:{problem['row'] or ''}"))
        self._list.set_options(
            options or [Option(Text("✓ none", colors["success"]), disabled=True)]
        )
        counts = [(report["errors"], "error"), (report["warnings"], "warning")]
        self.show_title(*(f"{n:,} {name}{'s' * (n != 1)}" for n, name in counts if n))

    def show_text(self, text: str) -> None:
        self._report = None
        self.show_title()
        self._list.set_options([Option(Text(flat(text), "dim"), disabled=True)])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        row = str(event.option_id).partition(":")[2]
        if row:
            self.post_message(self.Chosen(int(row)))
