"""A field for a model, and below it the built-in names that match while one types."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import DescendantBlur
from textual.fuzzy import FuzzySearch
from textual.message import Message
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from tui.widgets.text_field import Entry, cycling

SHOWN = 9  # matches


class ModelSearch(Vertical):
    """`catalogue`: name → hub id, or empty."""

    DEFAULT_CSS = """
    ModelSearch { height: 1; width: 1fr; }
    ModelSearch OptionList {
        overlay: screen; constrain: none inside; display: none;
        width: 52; height: auto; max-height: 11; background: $panel;
    }
    ModelSearch.-open OptionList { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "highlight(1)", "Next match", show=False),
        Binding("up", "highlight(-1)", "Match before", show=False),
    ]

    class Typed(Message):
        """The text is another one: a name, the beginning of one, or a path."""

    class Taken(Message):
        """This is the model that is meant, fetched if need be."""

    def __init__(self, value: str, catalogue: Mapping[str, str], *, id: str) -> None:
        super().__init__(id=id)
        self._first, self._catalogue, self._fuzzy = value, catalogue, FuzzySearch()

    def compose(self) -> ComposeResult:
        yield Entry(self._first, id="model", step=cycling(list(self._catalogue)))
        matches = OptionList(compact=True, markup=False)
        matches.can_focus = False
        yield matches

    @property
    def entry(self) -> Entry:
        return self.query_one(Entry)

    @property
    def open(self) -> bool:
        return self.has_class("-open")

    def matches(self, text: str) -> Sequence[str]:
        """Names with `text` in their name or hub id, those that begin with it first; else names that look like it."""
        text = text.strip().lower()
        found = [name for name, hub_id in self._catalogue.items() if text in name or text in hub_id.lower()]
        if found or not text:
            return sorted(found, key=lambda name: not name.startswith(text))
        scores = {name: self._fuzzy.match(text, f"{name} {hub_id}")[0] for name, hub_id in self._catalogue.items()}
        return sorted((name for name, score in scores.items() if score), key=lambda name: -scores[name])

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(self.Typed())
        found = self.matches(event.value)[:SHOWN] if event.value.strip() != "" else []
        if self.entry.has_focus and found and found != [event.value]:
            self._show(found)
        else:
            self.close()

    def _show(self, names: Sequence[str]) -> None:
        options = self.query_one(OptionList)
        options.set_options(Option(Text.assemble(f"{n:20} ", (self._catalogue[n], "dim")), id=n) for n in names)
        options.highlighted = 0
        self.add_class("-open")

    def close(self) -> None:
        self.remove_class("-open")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002  # Textual calls it so
        return self.open if action == "highlight" else True

    def action_highlight(self, by: int) -> None:
        options = self.query_one(OptionList)
        options.highlighted = ((options.highlighted or 0) + by) % options.option_count

    @on(Input.Submitted)
    def _enter(self, event: Input.Submitted) -> None:
        event.stop()
        options = self.query_one(OptionList)
        if self.open and options.highlighted is not None and "/" not in event.value:
            self._take(options.get_option_at_index(options.highlighted).id or "")
        else:
            self.close()
            self.post_message(self.Taken())

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._take(event.option_id or "")

    def _take(self, name: str) -> None:
        with self.prevent(Input.Changed):
            self.entry.value = name
        self.entry.cursor_position = len(name)
        self.close()
        self.post_message(self.Taken())

    @on(DescendantBlur)
    def _left(self) -> None:
        self.close()
