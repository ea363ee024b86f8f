"""Fields with a value each, checked while one types: lines of one text, and one input, which lies over
the value that is typed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.events import Click
from textual.geometry import Region, Size
from textual.reactive import reactive
from textual.suggester import SuggestFromList
from textual.widget import Widget
from textual.widgets import Input, Static

from tui.panes.fields import Field, format_value
from tui.panes.lines import MOVE_KEYS, MUTED, FromPane
from tui.panes.table import fitted

MAX_LABELS = 24  # cells of the column of labels
LEFT = 2  # cells of the signs, before the labels
NOTED = 12  # cells of a value that a note follows
INDENT = 4  # cells before what is said below a line
PAGE = 10  # lines
MOST_MATCHES = 9
LIT = "$block-cursor-foreground on $block-cursor-background"


class ValueInput(Input):
    """Lies over the value of the line that the cursor is on."""

    virtual_size = reactive(Size(0, 0))  # Textual's lays out the screen, at each letter

    def __init__(self) -> None:
        super().__init__(compact=True)
        self.display = False

    def edit(self, field: Field, text: str) -> None:
        """Show the text of a field, all of it selected."""
        self.placeholder, self.suggester = field.placeholder, None
        if field.choices:
            self.suggester = SuggestFromList(field.choices, case_sensitive=False)
        with self.prevent(Input.Changed):
            self.value = text
        self.action_select_all()

    def put(self, text: str) -> None:
        self.value, self.cursor_position = text, len(text)


class Form(VerticalScroll):
    """A line for each field, and below it what the field means, or what is wrong with it.

    `always`: the field that the cursor is on is typed in, and each keeps what was typed. Else Enter
    opens a field, Enter again posts `Submitted`, whose receiver writes the value and calls `close`;
    Esc keeps the value as it was; where nothing is open, letters are the screen's.
    """

    DEFAULT_CSS = """
    Form {
        height: 1fr; scrollbar-gutter: stable; scrollbar-size-vertical: 1; background: transparent;
        & > Static { height: auto; width: 1fr; text-wrap: nowrap; }
        & > ValueInput { position: absolute; width: 6; height: 1; background: $boost; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *MOVE_KEYS,
        Binding("tab", "tab(1)", "Next field", show=False),
        Binding("shift+tab", "tab(-1)", "Field before", show=False),
        Binding("right", "sideways(1)", "Unfold, or the next value", show=False),
        Binding("left", "sideways(-1)", "Fold, or the value before", show=False),
        Binding("plus", "step(1)", "Next value", show=False, priority=True),
        Binding("minus", "step(-1)", "Value before", show=False, priority=True),
        Binding("space", "fold", "Fold or unfold the group", show=False),
        Binding("enter,e", "open", "Edit", show=False),
        Binding("escape", "close", "keep as it was", id="form.keep"),
        Binding("ctrl+b", "reset", "Back to the field's default", show=False),
    ]

    class Changed(FromPane):
        """What is typed in a field has changed."""

    @dataclass
    class Submitted(FromPane):
        """Enter was pressed in a field; unless it is `always` typed in, with a valid value that is
        another than it had.
        """

        key: str
        text: str

    @dataclass
    class Lost(FromPane):
        """A field was closed because something else is shown; what was typed is not written."""

        unsaved: str  # as `unsaved` says it

    def __init__(
        self,
        fields: Iterable[Field] = (),
        values: Mapping[str, Any] | None = None,
        *,
        always: bool = False,
    ) -> None:
        super().__init__()
        self.can_focus = True
        self.always = always
        self.fields: dict[str, Field] = {}
        self.given: dict[str, Any] = {}  # key → its value before one typed
        self.texts: dict[str, str] = {}  # key → as typed
        self.key = ""  # of the line that the cursor is on
        self.unfolded = set[str]()
        self.needle = ""
        self.input = ValueInput()
        self._matches: list[tuple[str, str]] = []
        self._match = 0
        # How it is drawn
        self._text = Static()
        self._tops: dict[str, int] = {}  # key → number of its line
        self._labels = self._height = 0
        self._take(fields, values)

    def compose(self) -> Iterable[Widget]:
        yield self._text
        yield self.input

    def on_mount(self) -> None:
        self._go_to(self.key)

    # What is shown

    def show(
        self,
        fields: Iterable[Field],
        values: Mapping[str, Any] | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Show these fields with their values, else their defaults.

        `again`: they are those of before, so the cursor and what is being typed stay.
        """
        fields = list(fields)
        if not again or all(field.key != self.key for field in fields):
            self._lose()
        if not again:
            self.key = ""
            self.scroll_home(animate=False)
        self._take(fields, values)
        if self.is_typing and self.key in self.fields:
            self.texts[self.key] = self.input.value
        self._go_to(self.key)

    def _take(self, fields: Iterable[Field], values: Mapping[str, Any] | None) -> None:
        self.fields = {field.key: field for field in fields}
        self.given = {key: field.default for key, field in self.fields.items()} | dict(values or {})
        self.texts = {key: format_value(self.given[key]) for key in self.fields}

    def filter(self, text: str) -> None:
        """Show only fields whose label, value or meaning has `text`, whatever the case; the cursor is
        on one of them, not on a group's head.
        """
        self.needle = text.casefold()
        found = [key for key in self._stops() if key in self.fields]
        is_found = not text or not found or self.key in found
        self._go_to(self.key if is_found else found[0])

    def point(self, key: str) -> None:
        """Move the cursor to a field that is shown, and unfold its group."""
        if key in self.fields:
            self.unfolded.add(self.fields[key].group)
            self._go_to(key)

    # Values

    @property
    def field(self) -> Field | None:
        """The field that the cursor is on."""
        return self.fields.get(self.key)

    @property
    def is_typing(self) -> bool:
        """Whether the cursor's field is typed in."""
        return bool(self.input.display)

    def value(self, key: str) -> Any:
        return self.fields[key].parse(self.texts[key])

    def problem(self, key: str) -> str:
        """What is wrong with a value, or ""."""
        return self.fields[key].problem(self.value(key))

    def unsaved(self) -> str:
        """The field that is open and what was typed: `finetune_lora.rank: 16`; "" if nothing."""
        field = self.field
        if field is None or self.always or not self.is_typing:
            return ""
        text = self.texts[field.key]
        is_same = format_value(field.parse(text)) == format_value(self.given[field.key])
        return "" if is_same else f"{field.path or field.key}: {text}"

    def put(self, key: str, text: str) -> None:
        """Give a field another text, as if it was typed."""
        if key == self.key and self.is_typing:
            self.input.put(text)
        else:
            self.texts[key] = text
            self._draw()
            self.post_message(self.Changed(self))

    # Typing

    def _type(self, is_open: bool) -> None:
        """Lay the input over the cursor's value, or take it away."""
        has_focus = self.has_focus_within
        if is_open and self.field:
            self.input.edit(self.field, self.texts[self.key])
        self.input.display = is_open
        self.can_focus = not (self.always and is_open)
        if has_focus:
            self.take_focus()
        self._draw()
        self.refresh_bindings()

    def take_focus(self) -> None:
        """Let the next keys go to the cursor's field."""
        self.screen.set_focus(self.input if self.is_typing else self)

    def _keep_typed(self) -> None:
        """Keep what is typed: its message may still be on the way."""
        if self.is_typing and self.texts.get(self.key, self.input.value) != self.input.value:
            self.texts[self.key] = self.input.value
            self.post_message(self.Changed(self))

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._keep_typed()
        self._matches, self._match = [], 0
        if self.field and self.field.search and self.input.has_focus:
            found = self.field.search(self.input.value)
            if [*found] != [self.input.value]:
                self._matches = list(found.items())[:MOST_MATCHES]
        self._draw()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self._keep_typed()
        if self._matches:
            self._choose(self._match)
        elif not self.always and not self.unsaved():
            self.close()
        elif self.always or not self.problem(self.key):
            self._submit()

    def _choose(self, match: int) -> None:
        """Take one of the values that were found for what was typed."""
        text, self._matches = self._matches[match][0], []
        with self.prevent(Input.Changed):
            self.input.put(text)
        self._keep_typed()
        self._draw()
        self._submit()

    def _submit(self) -> None:
        self.post_message(self.Submitted(self, self.key, self.texts[self.key]))

    def action_open(self) -> None:
        """Open the cursor's field, or fold or unfold the group."""
        if self.field is None:
            self.action_fold()
        elif self.always:
            self._submit()
        else:
            self._type(True)

    def close(self) -> None:
        """Close the field that is open, with the value that it had."""
        if self.is_typing and not self.always:
            self.texts[self.key] = format_value(self.given[self.key])
            self._type(False)

    action_close = close

    def _lose(self) -> None:
        """Close the field because something else is shown."""
        if unsaved := self.unsaved():
            self.post_message(self.Lost(self, unsaved))
        self.close()

    # The cursor

    def _go_to(self, key: str) -> None:
        """Move the cursor to a line, else to the one that is now where it was."""
        if not self.is_attached:
            return
        self._keep_typed()
        stops, before = self._stops(), self.key
        if key not in stops:
            at = list(self._tops).index(before) if before in self._tops else 0
            key = stops[min(at, len(stops) - 1)] if stops else ""
        if key != before:
            self._lose()
            self.key, self._matches = key, []
            if self.always:
                self._type(self.field is not None and self.field.kind != "choice")
        self._draw()
        self.call_after_refresh(self._show_cursor)

    def _show_cursor(self) -> None:
        """Scroll to the line, and move the terminal's cursor along, by which input methods open
        their windows.
        """
        top = self._tops.get(self.key, 0)
        following = (each for each in self._tops.values() if each > top)
        height = min(next(following, self._height) - top, max(self.size.height, 1))
        self.scroll_to_region(Region(0, top, 1, height), animate=False, force=True)
        if self.input.has_focus:
            self.app.cursor_position = self.input.cursor_screen_offset

    def _further(self, by: int) -> str:
        """The key of the line so many below or above."""
        stops = self._stops()
        if self.key not in stops:
            return ""
        return stops[min(max(stops.index(self.key) + by, 0), len(stops) - 1)]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys without an effect here go on to the screen."""
        match action:
            case "tab":
                by = 1 if parameters == (1,) else -1
                return self.always and self._further(by) != self.key
            case "step":
                return self.always and self.field is not None and self.field.steps_by_signs
            case "fold":
                return not self.always
            case "close":
                return self.is_typing and not self.always
        return super().check_action(action, parameters)

    def action_move(self, by: int) -> None:
        if self._matches:
            self._match = (self._match + by) % len(self._matches)
            self._draw()
        elif self.is_typing and not self.always:
            self.action_step(by)
        else:
            self._go_to(self._further(by))

    def action_tab(self, by: int) -> None:
        self._go_to(self._further(by))

    def action_page(self, by: int) -> None:
        if self.is_typing or self.always:
            self.action_step(by)
        else:
            self.action_move(by * PAGE)

    def action_first(self) -> None:
        self.action_move(-len(self.fields) * 2)

    def action_last(self) -> None:
        self.action_move(len(self.fields) * 2)

    def action_step(self, by: int) -> None:
        """Give the field the next of its values, or the one before."""
        if self.field:
            self._keep_typed()
            self.put(self.key, self.field.stepped(self.texts[self.key], by))

    def action_sideways(self, by: int) -> None:
        if self.always:
            self.action_step(by)
        else:
            self._fold(by < 0)

    def action_fold(self) -> None:
        self._fold(self._group in self.unfolded)

    @property
    def _group(self) -> str:
        """The group of the line that the cursor is on."""
        return self.field.group if self.field else self.key[1:-1]

    def _fold(self, folded: bool) -> None:
        """Fold or unfold the cursor's group; the cursor goes to its head."""
        if group := self._group:
            (self.unfolded.discard if folded else self.unfolded.add)(group)
            self._go_to(head_key(group))

    def action_reset(self) -> None:
        if field := self.field:
            self.put(field.key, format_value(field.default))

    def on_click(self, event: Click) -> None:
        if event.widget is self.input:
            return
        x, y = event.screen_offset - self._text.region.offset
        match = y - self._tops.get(self.key, 0) - 1
        if 0 <= match < len(self._matches):
            self._choose(match)
            return
        before, start = self.key, x - LEFT - self._labels - 1
        above = [key for key, top in self._tops.items() if top <= y]
        self._go_to(above[-1] if above else before)
        if self.always:
            self.take_focus()
            if not self.is_typing and start >= 0:
                self.action_step(-1 if start < 2 else 1)
        elif self.key == before:
            self.action_open()

    # How it is drawn

    def lines(self) -> list[str]:
        """Every line as it is drawn."""
        return [line.rstrip() for line in str(self._text.content).splitlines()]

    def on_descendant_blur(self) -> None:
        self._matches = []
        self._draw()

    def _rows(self) -> list[Field]:
        """Fields in no group, then the groups: a head each, and below it, unless folded, fields."""
        fields = [field for field in self.fields.values() if self._is_shown(field)]
        rows = [field for field in fields if not field.group]
        for group in dict.fromkeys(field.group for field in fields if field.group):
            rows.append(Field(head_key(group), label=group))
            if self._is_unfolded(group):
                rows += [field for field in fields if field.group == group]
        return rows

    def _is_unfolded(self, group: str) -> bool:
        return self.always or bool(self.needle) or group in self.unfolded

    def _is_shown(self, field: Field) -> bool:
        words = f"{field.title} {field.key} {self.texts[field.key]} {field.meaning}"
        return self.needle in words.casefold()

    def _stops(self) -> list[str]:
        """The keys of the lines that the cursor can be on."""
        return [row.key for row in self._rows() if row.key in self.fields or not self.always]

    def _draw(self) -> None:
        """Draw all lines: as one text it takes a millisecond."""
        width, rows = self.scrollable_content_region.width, self._rows()
        if not width:  # it is not laid out yet, or not shown
            return
        labels = [len(_label(row, self.always)) for row in rows if row.key in self.fields]
        self._labels = min(MAX_LABELS, max(labels, default=0), (width + 1) // 2)
        said, heads = self._said(width), len(rows) - len(labels)
        is_roomy = len(rows) + heads + len(said) < self.size.height
        lines, self._tops = list[Content](), {}
        for row in rows:
            key, is_head = row.key, row.key not in self.fields
            if is_head and self.always:
                lines += [Content(), Content.styled(f" {row.title}", f"bold {MUTED}")] * is_roomy
                continue
            self._tops[key] = len(lines)
            lines.append(self._head(row.title) if is_head else self._line(row, width))
            if key == self.key and not self.always:
                style = LIT if self.has_focus_within else "on $block-cursor-blurred-background"
                lines[-1] = fitted(lines[-1], width).stylize(style)
                lines += said
            if key == self.key:
                lines += self._match_lines(width)
        if self.always and said:
            lines += [Content(), *said]
        self._text.update(Content("\n").join(lines), layout=len(lines) != self._height)
        self._height = len(lines)
        self.input.styles.offset = (LEFT + self._labels + 1, self._tops.get(self.key, 0))
        self.input.styles.width = self._room(self.field, width)

    on_resize = on_focus = on_blur = on_descendant_focus = _draw

    def _room(self, field: Field | None, width: int) -> int:
        """Cells of a value that is typed in."""
        room = max(width - LEFT - self._labels - 1, 6)
        return min(room, NOTED) if self.always and field and field.note else room

    def _head(self, group: str) -> Content:
        shown = filter(self._is_shown, self.fields.values())
        count = sum(field.group == group for field in shown)
        return Content(f"{'▾' if self._is_unfolded(group) else '▸'} {group} ({count})")

    def _line(self, field: Field, width: int) -> Content:
        is_here = field.key == self.key
        is_checked = self.always or (is_here and self.is_typing)
        sign, style = Content.styled(field.sign, "$text-warning"), ""
        if self.always:
            style = "bold" if is_here and self.has_focus_within else MUTED
        if is_checked and self.problem(field.key):
            style = "bold $text-error"
            sign = Content.styled("✗", style)
        label = fitted(Content(_label(field, self.always)), self._labels).stylize(style)
        note = field.note if isinstance(field.note, Content) else Content.styled(field.note, MUTED)
        text, look = self._value(field, is_here)
        value = Content(text)
        if self.always:
            value = fitted(value, self._room(field, width))
        parts = fitted(sign, LEFT), label, " ", value.stylize(look), " " * bool(note), note
        return Content.assemble(*parts).truncate(width, ellipsis=True)

    def _value(self, field: Field, is_here: bool) -> tuple[str, str]:
        """The value as it is drawn, and its style."""
        text, style = self.texts[field.key].replace("\n", "↵"), MUTED if field.quiet else ""
        if field.kind == "choice" and self.always:
            style = f"bold {LIT}" if is_here and self.has_focus_within else ""
            return f"‹ {field.names.get(text, text)} ›", style
        if not text:
            text, style = field.placeholder or "–", MUTED
        return text, f"{style} on $boost" if self.always else style

    def _match_lines(self, width: int) -> Iterable[Content]:
        for number, (text, about) in enumerate(self._matches):
            line = Content.assemble(" " * INDENT, f"{text:16} ", (about, MUTED))
            line = fitted(line, width)
            yield line.stylize(LIT) if number == self._match else line

    def _said(self, width: int) -> list[Content]:
        """What is wrong with the cursor's field, what Enter does, what it means."""
        field, said = self.field, list[Content]()
        if field is None:
            return []
        if self.is_typing and (problem := self.problem(field.key)):
            said.append(Content.styled(f"✗ {problem}", "$text-error"))
        elif self.unsaved():
            before = format_value(self.given[field.key]) or "it empty"
            name = field.path or field.key
            said.append(Content(f"Enter writes {name}, Esc keeps {before}."))
        said += [Content.styled(text, MUTED) for text in (field.meaning, field.rule) if text]
        indent = " " * (1 if self.always else INDENT)
        parts = [part for text in said for part in text.wrap(max(width - len(indent), 16))]
        return [Content.assemble(indent, part) for part in parts]


def head_key(group: str) -> str:
    """The key of a group's head, which no field has."""
    return f"({group})"


def _label(field: Field, always: bool) -> str:
    """Indented below a head that folds."""
    return f"{'' if always or not field.group else '  '}{field.title}"
