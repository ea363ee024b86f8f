"""The answers of one or more models as they arrive."""

from collections.abc import Mapping, Sequence
from time import monotonic
from types import MappingProxyType

from rich.cells import cell_len
from rich.text import Text
from textual.app import ComposeResult, RenderResult
from textual.containers import Grid, VerticalScroll
from textual.events import Resize
from textual.reactive import reactive
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.text import escape_whitespace
from tui.screens.models.conversation import Answer, Exchange
from tui.widgets.prompting import AS_TRAINED, SPINNER
from tui.widgets.text import bar, pad_or_truncate

# minimum width of a model's column in the table: a percentage and a difference, each after a space
CELL = 11
MAX_TOKEN = 24  # cells
MIN_COLUMN = 24  # cells of a completion; narrower columns are hard to read
MAX_TEXT = 4000  # last characters of an answer; the transcript has all
MAX_EARLIER = 50  # exchanges; the transcript has all
MAX_NAMES = 4  # of models with the same error
SPINS = 8  # pictures of the spinner per second
WELCOME = "Choose models with Space, or none for the one under the cursor. Enter: the prompt."
ENDINGS = {
    "interrupted": " ▪ interrupted",
    "length": " …",
    "waiting": " …",
    "loading": " … loading",
}


Looks = Mapping[str, tuple[str, str]]  # name of a model → sign and colour of its method


class TopK(Widget):
    """The most likely next tokens. Rows are tokens, columns are models."""

    DEFAULT_CSS = "TopK { height: auto; }"
    answers: reactive[Sequence[Answer]] = reactive((), layout=True, always_update=True)
    looks: Looks = MappingProxyType({})

    def render(self) -> RenderResult:
        return table(self.answers, self.size.width or 80, self.app.theme_variables, self.looks)


def table(
    answers: Sequence[Answer],
    width: int,
    colors: Mapping[str, str],
    looks: Looks = MappingProxyType({}),
) -> Text:
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
            sign, color = looks.get(answer.name, ("", ""))
            text.append(f"{sign} " if sign else "", color)
            text.append(pad_or_truncate(answer.title, cell - 1 - 2 * bool(sign)) + " ", "bold")
        for token in rows:
            text.append("\n" + pad_or_truncate(escape_whitespace(token), first - 1) + " ")
            for answer in block:
                text.append_text(_format_cell(token, answer, reference, cell, colors))
    return text


def _format_cell(
    token: str, answer: Answer, reference: Answer, width: int, colors: Mapping[str, str]
) -> Text:
    """`50.0 +25.0` and a bar if there is room for one; the sign is there because colour must not be
    the only cue.
    """
    probability, before = answer.of.get(token), reference.of.get(token)
    if not answer.top_k or probability is None:
        return Text(("unknown" if answer.top_k else "no answer").ljust(width), "dim")
    text = Text(f"{100 * probability:5.1f}" if probability < 0.9995 else "  100")
    if answer is not reference and before is None:
        text.append("   new", colors.get("success", ""))
    elif answer is not reference and before is not None:
        points = 100 * (probability - before)
        difference = (f"{points:+.1f}" if abs(points) < 99.95 else f"{points:+.0f}").replace(
            "-", "−"
        )
        if difference in ("+0.0", "−0.0"):
            text.append("     =", "dim")
        else:
            text.append(f"{difference:>6}", colors.get("success" if points > 0 else "error", ""))
    room = width - text.cell_len - 2
    if room >= 4 and (answer is not reference or width >= 2 * CELL):
        visible = probability if probability >= 0.0005 else 0.0  # no bar if it rounds to 0.0
        text.append(" " + bar(visible, room), "dim")
    text.pad_right(max(width - text.cell_len, 0))
    return text


class Completions(Grid):
    """The answers as they stream in: one column per model if there is room, else one below the
    other.
    """

    _count = 1  # of answers, also before their widgets are mounted

    async def start(self, exchange: Exchange) -> None:
        """Replace the shown answers by those of `exchange`."""
        if len(self.children) != len(exchange.answers):
            await self.remove_children()
            await self.mount(*(Static(markup=False) for _ in exchange.answers))
        self.show(exchange, AS_TRAINED)

    def show(self, exchange: Exchange, strength: float) -> None:
        """Update the shown answers. What is wrong with several models is shown once, under the
        first of them.
        """
        same: dict[str, list[Answer]] = {}
        for answer in exchange.answers:
            if answer.error and not answer.text:
                same.setdefault(answer.error, []).append(answer)
        shown = 0
        for child, answer in zip(self.children, exchange.answers, strict=False):
            assert isinstance(child, Static)
            alike = same.get(answer.error, [answer]) if not answer.text else [answer]
            child.display = alike[0] is answer
            if child.display:
                child.update(format_answer(exchange, alike, strength))
                shown += 1
        if shown != self._count:
            self._count = max(shown, 1)
            self._arrange(self.size.width)

    def on_resize(self, event: Resize) -> None:
        self._arrange(event.size.width)

    def _arrange(self, width: int) -> None:
        self.styles.grid_size_columns = self._count if width // self._count >= MIN_COLUMN else 1


def format_answer(exchange: Exchange, alike: Sequence[Answer], strength: float) -> Text:
    """The models' names, the prompt (dim), the answer; then how it ended, or the error; whether it
    is out of date.
    """
    answer = alike[0]
    names = [each.title for each in alike]
    title = (
        ", ".join(names)
        if len(names) <= MAX_NAMES
        else f"{', '.join(names[:2])} and {len(names) - 2} more"
    )
    text = Text(f"{title}  ", "bold")
    if answer.text or not answer.error:
        before, after = exchange.parts(answer)
        text.append(before, "not bold dim")
        text.append("…" if len(after) > MAX_TEXT else "", "not bold dim").append(
            after[-MAX_TEXT:], "not bold"
        )
    text.append(ENDINGS.get(answer.ended, ""), "not bold dim")
    if answer.error:
        text.append(f" ✗ {answer.error}", "not bold")
    elif answer.strength not in (None, strength) and not answer.ended.startswith(
        ("waiting", "loading")
    ):
        text.append(f"  ‹ at ×{answer.strength:.2f}; Ctrl+R asks again ›", "not bold italic")
    return text


def format_earlier(exchanges: Sequence[Exchange]) -> Text:
    """Earlier exchanges, which are in order of time, newest first: the prompt, then a line per
    model.
    """
    text = Text()
    for exchange in list(exchanges)[: -MAX_EARLIER - 1 : -1]:
        text.append(f"› {exchange.prompt}", "bold").append(f"  {exchange.sampling}\n", "dim")
        for answer in exchange.answers:
            text.append(f"  {answer.title}  ", "dim")
            text.append(f"{' '.join(answer.text.split()) or answer.error or answer.ended or '–'}\n")
    return Text.assemble(("earlier\n", "dim"), text) if exchanges else text


class Answers(VerticalScroll):
    """The newest exchange, with earlier ones below; while nothing can answer yet, what it waits
    for.

    The widgets are attributes, as answers can arrive while the screen closes, when queries fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting = Static(WELCOME, id="waiting", markup=False)
        self._top_k, self._completions = TopK(), Completions()
        self._earlier = Static(id="earlier", markup=False)
        self._exchange: Exchange | None = None
        self._spinning: Timer | None = None
        self._since, self._for = 0.0, ""

    def compose(self) -> ComposeResult:
        yield from (self._waiting, self._top_k, self._completions, self._earlier)

    async def start(self, exchange: Exchange, earlier: Sequence[Exchange], looks: Looks) -> None:
        """Show a new exchange, without answers yet."""
        self._exchange, self._top_k.looks = exchange, looks
        self._earlier.update(format_earlier(earlier))
        self.show_table([])
        self._show_waiting()
        await self._completions.start(exchange)

    def show(self, exchange: Exchange, strength: float) -> None:
        """Update the shown answers; those at another strength are marked."""
        self.show_table(exchange.answers)
        self._completions.show(exchange, strength)

    def mark_stale(self, strength: float) -> None:
        """Mark the shown answers that were given at another strength."""
        if self._exchange:
            self._completions.show(self._exchange, strength)

    def show_table(self, answers: Sequence[Answer]) -> None:
        self._top_k.answers = [answer for answer in answers if answer.top_k]

    def wait_for(self, what: str) -> None:
        """Show a spinner where the answer will be, with what it waits for; "" for nothing."""
        if what == self._for:
            return
        if what and not self._for:
            self._since = monotonic()
            self._spinning = self.set_interval(1 / SPINS, self._show_waiting)
        elif not what and self._spinning:
            self._spinning.stop()
        self._for = what
        self._show_waiting()

    def _show_waiting(self) -> None:
        passed = monotonic() - self._since
        spinner = SPINNER[int(passed * SPINS) % len(SPINNER)]
        text = "" if self._exchange else WELCOME
        if self._for:
            text = f"{spinner} {self._for}  {passed:.0f} s"
        self._waiting.update(text)
        self._waiting.display = bool(text)
