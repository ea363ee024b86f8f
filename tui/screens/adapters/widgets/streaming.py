"""The completions of each model, as they stream in."""

from rich.text import Text
from textual.containers import Grid
from textual.events import Resize
from textual.widgets import Static

from tui.screens.adapters.session.transcript import Answer, Exchange

MIN_COLUMN = 24  # cells; narrower columns are hard to read
MAX_SHOWN = 4000  # last characters of an answer; the transcript has all
ENDINGS = {"interrupted": " ▪ interrupted", "length": " …", "waiting": " …", "loading": " … loading"}


class Completions(Grid):
    """One column per model if there is room, else one below the other."""

    DEFAULT_CSS = """
    Completions { height: auto; grid-gutter: 0 1; grid-rows: auto; }
    Completions Static { height: auto; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._count = 1

    async def start(self, exchange: Exchange) -> None:
        """Replace the shown answers by those of `exchange`."""
        answers = exchange.answers
        self._count = max(len(answers), 1)
        self._arrange(self.size.width)
        if len(self.children) != len(answers):
            await self.remove_children()
            await self.mount(*(Static() for _ in answers))
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
        text.append("…" if len(after) > MAX_SHOWN else "", "not bold dim").append(after[-MAX_SHOWN:], "not bold")
    text.append(ENDINGS.get(answer.ended, ""), "not bold dim")
    if answer.error:
        text.append(f" ✗ {answer.error}", "not bold red")
    return text
