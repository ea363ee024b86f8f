"""The answers of one or more models as they arrive."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text
from textual.app import ComposeResult, RenderResult
from textual.containers import Grid, VerticalScroll
from textual.events import Resize
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.text import escape_whitespace
from tui.screens.models.conversation import Answer, Exchange
from tui.widgets.text import bar, pad_or_truncate

CELL = 11  # minimum width of a model's column in the table: a percentage and a difference, each after a space
MAX_TOKEN = 24  # cells
MIN_COLUMN = 24  # cells of a completion; narrower columns are hard to read
MAX_TEXT = 4000  # last characters of an answer; the transcript has all
MAX_EARLIER = 50  # exchanges; the transcript has all
ENDINGS = {"interrupted": " ▪ interrupted", "length": " …", "waiting": " …", "loading": " … loading"}


class TopK(Widget):
    """The most likely next tokens. Rows are tokens, columns are models."""

    DEFAULT_CSS = "TopK { height: auto; }"
    answers: reactive[Sequence[Answer]] = reactive((), layout=True, always_update=True)

    def render(self) -> RenderResult:
        return table(self.answers, self.size.width or 80)


def table(answers: Sequence[Answer], width: int) -> Text:
    """Probabilities in percent, with differences to the first model in percentage points.

    As many models stand side by side as fit in `width` cells, the others below.
    """
    largest: dict[str, float] = {}  # token → its largest probability in any model
    for answer in answers:
        for token, probability in answer.top_k:
            largest[token] = max(largest.get(token, 0.0), probability)
    if not largest:
        return Text()
    rows = sorted(largest, key=lambda token: -largest[token])
    first = min(max(map(cell_len, ("next", *map(escape_whitespace, rows)))), MAX_TOKEN) + 1
    columns = max((width - first) // CELL, 1)
    reference = next(answer for answer in answers if answer.top_k)
    text = Text(no_wrap=True, overflow="ellipsis")
    for start in range(0, len(answers), columns):
        block = answers[start : start + columns]
        cell = (width - first) // len(block)
        text.append("\n\n" if start else "").append("next".ljust(first), "dim")
        for answer in block:
            text.append(pad_or_truncate(answer.title, cell - 1) + " ", "bold")
        for token in rows:
            text.append("\n" + pad_or_truncate(escape_whitespace(token), first - 1) + " ")
            for answer in block:
                text.append_text(_format_cell(token, answer, reference, cell))
    return text


def _format_cell(token: str, answer: Answer, reference: Answer, width: int) -> Text:
    """`50.0 +25.0` and a bar if there is room for one; the sign is there because colour must not be the only cue."""
    probability, before = answer.of.get(token), reference.of.get(token)
    if not answer.top_k or probability is None:
        return Text(("unknown" if answer.top_k else "no answer").ljust(width), "dim")
    text = Text(f"{100 * probability:5.1f}" if probability < 0.9995 else "  100")
    if answer is not reference and before is None:
        text.append("   new", "green")
    elif answer is not reference and before is not None:
        points = 100 * (probability - before)
        difference = f"{points:+.1f}" if abs(points) < 99.95 else f"{points:+.0f}"
        if difference in ("+0.0", "-0.0"):
            text.append("     =", "dim")
        else:
            text.append(f"{difference:>6}", "green" if points > 0 else "red")
    room = width - text.cell_len - 2
    if room >= 4 and (answer is not reference or width >= 2 * CELL):
        visible = probability if probability >= 0.0005 else 0.0  # no bar if it rounds to 0.0
        text.append(" " + bar(visible, room), "dim")
    text.pad_right(max(width - text.cell_len, 0))
    return text


class Completions(Grid):
    """The answers as they stream in: one column per model if there is room, else one below the other."""

    _count = 1  # of answers, also before their widgets are mounted

    async def start(self, exchange: Exchange) -> None:
        """Replace the shown answers by those of `exchange`."""
        self._count = max(len(exchange.answers), 1)
        self._arrange(self.size.width)
        if len(self.children) != len(exchange.answers):
            await self.remove_children()
            await self.mount(*(Static() for _ in exchange.answers))
        self.show(exchange)

    def show(self, exchange: Exchange) -> None:
        """Update the shown answers."""
        for child, answer in zip(self.children, exchange.answers, strict=False):
            assert isinstance(child, Static)
            child.update(format_answer(exchange, answer))

    def on_resize(self, event: Resize) -> None:
        self._arrange(event.size.width)

    def _arrange(self, width: int) -> None:
        self.styles.grid_size_columns = self._count if width // self._count >= MIN_COLUMN else 1


def format_answer(exchange: Exchange, answer: Answer) -> Text:
    """The model's name, the prompt (dim), the answer; then how it ended, or the error."""
    text = Text(f"{answer.title}  ", "bold")
    if answer.text or not answer.error:
        before, after = exchange.parts(answer)
        text.append(before, "not bold dim")
        text.append("…" if len(after) > MAX_TEXT else "", "not bold dim").append(after[-MAX_TEXT:], "not bold")
    text.append(ENDINGS.get(answer.ended, ""), "not bold dim")
    if answer.error:
        text.append(f" ✗ {answer.error}", "not bold red")
    return text


def format_earlier(exchanges: Sequence[Exchange]) -> Text:
    """Earlier exchanges, which are in order of time, newest first: the prompt, then a line per model."""
    text = Text()
    for exchange in list(exchanges)[: -MAX_EARLIER - 1 : -1]:
        text.append(f"› {exchange.prompt}", "bold").append(f"  {exchange.sampling}\n", "dim")
        for answer in exchange.answers:
            text.append(f"  {answer.title}  ", "dim")
            text.append(f"{' '.join(answer.text.split()) or answer.error or answer.ended or '–'}\n")
    return Text.assemble(("earlier\n", "dim"), text) if exchanges else text


class Answers(VerticalScroll):
    """The newest exchange, with earlier ones below.

    The widgets are attributes, as answers can arrive while the screen closes, when queries fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self._top_k, self._completions, self._earlier = TopK(), Completions(), Static(id="earlier")

    def compose(self) -> ComposeResult:
        yield from (self._top_k, self._completions, self._earlier)

    async def start(self, exchange: Exchange, earlier: Sequence[Exchange]) -> None:
        """Show a new exchange, without answers yet."""
        self._earlier.update(format_earlier(earlier))
        self.show_table([])
        await self._completions.start(exchange)

    def show(self, exchange: Exchange) -> None:
        """Update the shown answers."""
        self.show_table(exchange.answers)
        self._completions.show(exchange)

    def show_table(self, answers: Sequence[Answer]) -> None:
        self._top_k.answers = answers
