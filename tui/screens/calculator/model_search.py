"""A field for a model, with a list of matching built-in names while typing."""

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

MAX_MATCHES = 9


class ModelSearch(Vertical):
    """`catalogue`: name → hub id, which may be empty."""

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

    class Changed(Message):
        """The text changed: a name, the start of one, or a path."""

    class Selected(Message):
        """A model was selected or entered; it may have to be fetched."""

    def __init__(self, value: str, catalogue: Mapping[str, str], *, id: str) -> None:
        super().__init__(id=id)
        self._initial, self._catalogue, self._fuzzy = value, catalogue, FuzzySearch()

    def compose(self) -> ComposeResult:
        yield Entry(self._initial, id="model", step=cycling(list(self._catalogue)))
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
        """Names whose name or hub id contains `text`, prefix matches first; if there are none, fuzzy matches."""
        text = text.strip().lower()
        names = [name for name, hub_id in self._catalogue.items() if text in name or text in hub_id.lower()]
        if names or not text:
            return sorted(names, key=lambda name: not name.startswith(text))
        scores = {name: self._fuzzy.match(text, f"{name} {hub_id}")[0] for name, hub_id in self._catalogue.items()}
        return sorted((name for name, score in scores.items() if score), key=lambda name: -scores[name])

    @on(Input.Changed)
    def _text_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(self.Changed())
        names = self.matches(event.value)[:MAX_MATCHES] if event.value.strip() != "" else []
        if self.entry.has_focus and names and names != [event.value]:
            self._show(names)
        else:
            self.close()

    def _show(self, names: Sequence[str]) -> None:
        options = self.query_one(OptionList)
        options.set_options(Option(Text.assemble(f"{n:20} ", (self._catalogue[n], "dim")), id=n) for n in names)
        options.highlighted = 0
        self.add_class("-open")

    def close(self) -> None:
        self.remove_class("-open")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002  # name given by Textual
        return self.open if action == "highlight" else True

    def action_highlight(self, by: int) -> None:
        options = self.query_one(OptionList)
        options.highlighted = ((options.highlighted or 0) + by) % options.option_count

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        options = self.query_one(OptionList)
        if self.open and options.highlighted is not None and "/" not in event.value:
            self._select(options.get_option_at_index(options.highlighted).id or "")
        else:
            self.close()
            self.post_message(self.Selected())

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._select(event.option_id or "")

    def _select(self, name: str) -> None:
        with self.prevent(Input.Changed):
            self.entry.value = name
        self.entry.cursor_position = len(name)
        self.close()
        self.post_message(self.Selected())

    @on(DescendantBlur)
    def _focus_lost(self) -> None:
        self.close()
