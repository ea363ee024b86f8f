"""What each model says after the prompt, as it comes."""

from rich.text import Text
from textual.containers import Grid
from textual.events import Resize
from textual.widgets import Static

from tui.screens.adapters.session.transcript import Answer, Exchange

LEAST = 24  # cells of a column in which a sentence can be read
SHOWN = 4000  # characters: of more than a screen the end; a transcript has all
ENDED = {"interrupted": " ▪ interrupted", "length": " …", "waiting": " …", "loading": " … loading"}


class Completions(Grid):
    """One column a model where there is room, one below the other where there is not."""

    DEFAULT_CSS = """
    Completions { height: auto; grid-gutter: 0 1; grid-rows: auto; }
    Completions Static { height: auto; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._count = 1

    async def start(self, exchange: Exchange) -> None:
        """Show these answers in place of the last."""
        answers = exchange.answers
        self._count = max(len(answers), 1)
        self._arrange(self.size.width)
        if len(self.children) != len(answers):
            await self.remove_children()
            await self.mount(*(Static() for _ in answers))
        self.show(exchange)

    def show(self, exchange: Exchange) -> None:
        """The answers as they are now."""
        for child, answer in zip(self.children, exchange.answers, strict=False):
            assert isinstance(child, Static)
            child.update(written(exchange, answer))

    def on_resize(self, event: Resize) -> None:
        self._arrange(event.size.width)

    def _arrange(self, width: int) -> None:
        self.styles.grid_size_columns = self._count if width // self._count >= LEAST else 1


def written(exchange: Exchange, answer: Answer) -> Text:
    """The model's name, the prompt dimmed, what follows it; then how it ended or why there is none."""
    text = Text(f"{answer.title}  ", "bold")
    if answer.text or not answer.error:
        before, said = exchange.parts(answer)
        text.append(before, "not bold dim")
        text.append("…" if len(said) > SHOWN else "", "not bold dim").append(said[-SHOWN:], "not bold")
    text.append(ENDED.get(answer.ended, ""), "not bold dim")
    if answer.error:
        text.append(f" ✗ {answer.error}", "not bold red")
    return text
