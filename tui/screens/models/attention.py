"""Attention (`a`): all heads as small maps, then one head: of the base, of the adapter, and
the difference.
"""

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from rich.cells import cell_len
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen

from pipeline.errors import UserError
from pipeline.files.text import escape_whitespace
from tui.services.loaded_models import Latest
from tui.widgets.text import Lines, bar, pad_or_truncate, shade

NUMBERS, SHADES = 6, 2  # cells per weight in the matrix: " 0.45 ", "▓▓"
MAX_NAME = 12  # cells of a token's name in the matrix
BAR = 20
HEAVIEST = 6  # tokens with the largest weights, as bars; the rest is summed
MIN_MAP = 10  # cells of a small map with its gap
LESS = " -=≡"  # in a map of differences: how much less the adapter attends there; more is a shade
Weights = Sequence[Sequence[float]]  # (T, T): row t has the weights of token t and sums to 1
VIEWS = ("base", "adapter", "difference")


class Ask(Protocol):
    """Asks the engine at a strength: for all heads, or for one."""

    def __call__(self, strength: float, **head: int) -> Awaitable[dict[str, Any]]: ...


def sign(weight: float, scale: float = 1.0) -> str:
    """A character that is heavier the larger the weight is; `scale` is the largest. Below 0 there
    are others.
    """
    if weight >= 0:
        return shade(weight / scale)
    return LESS[min(round(-weight / scale * (len(LESS) - 1) + 0.2), len(LESS) - 1)]


def largest(weights: Iterable[Weights]) -> float:
    """The largest size of differences, by which they are scaled; of weights, which are shares,
    1.
    """
    values = [value for head in weights for row in head for value in row]
    return max(map(abs, values)) or 1.0 if min(values) < 0 else 1.0


def overview(
    maps: Sequence[Sequence[Weights]],
    change: Sequence[Sequence[float]],
    chosen: tuple[int, int],
    width: int,
) -> list[Text]:
    """All heads: a row of maps per layer, wrapped to the width; the chosen one stands out."""
    lines, scale = list[Text](), largest(head for layer in maps for head in layer)
    cell = max(2 * len(maps[0][0]) + 2, MIN_MAP)
    most = max((share for layer in change for share in layer), default=0)
    per_line = max((width - 2) // cell, 1)
    for layer, heads in enumerate(maps):
        lines.append(Text(f"layer {layer + 1}", "bold"))
        for start in range(0, len(heads), per_line):
            part = range(start, min(start + per_line, len(heads)))
            title = Text("  ")
            for head in part:
                moved = f" {change[layer][head]:.0%}" if change else ""
                style = "bold" if moved and change[layer][head] == most else ""
                if (layer, head) == chosen:
                    style = "reverse bold"
                title.append(pad_or_truncate(f"{head + 1}{moved}", cell - 2), style).append("  ")
            lines.append(title)
            rows = [
                ["".join(2 * sign(weight, scale) for weight in row) for row in heads[head]]
                for head in part
            ]
            lines += [
                Text("  " + "".join(row[y].ljust(cell) for row in rows))
                for y in range(len(rows[0]))
            ]
    return lines


def bars(tokens: Sequence[str], own: Weights, base: Weights | None, token: int) -> list[Text]:
    """`dem attends to`, and a bar for each of the largest weights, with the base's beside it."""
    ranked = sorted(enumerate(own[token][: token + 1]), key=lambda pair: -pair[1])
    heaviest, others = ranked[:HEAVIEST], [weight for _, weight in ranked[HEAVIEST:]]
    width = max(cell_len(tokens[other]) for other, _ in heaviest)
    lines = [Text.assemble((tokens[token], "bold"), " attends to")]
    for other, weight in heaviest:
        line = Text(f"  {pad_or_truncate(tokens[other], width)} {weight:.2f} {bar(weight, BAR)}")
        if base is not None:
            line.append(
                f" {weight - base[token][other]:+.2f}",
                "bold" if abs(weight - base[token][other]) >= 0.1 else "dim",
            )
        lines.append(line)
    return [*lines, *[Text(f"  {len(others)} others {sum(others):.2f}", "dim")] * bool(others)]


def window(tokens: Sequence[str], token: int, width: int) -> tuple[int, int]:
    """The range of tokens shown in the matrix: all if they fit, else those up to `token`, or the
    first ones.
    """
    count = max(width - margin(tokens), 1)
    stop = min(max(token + 1, count), len(tokens))
    return max(stop - count, 0), stop


def margin(tokens: Sequence[str]) -> int:
    """Cells before the first column: the name, and the mark of the chosen row."""
    return min(max(map(cell_len, tokens)), MAX_NAME) + 3


def matrix(tokens: Sequence[str], weights: Weights, token: int, width: int) -> list[Text]:
    """A row per token, a column per token that it attends to: numbers if they fit, else shades.

    If not all tokens fit, those of `window`.
    """
    first, (start, stop) = margin(tokens), window(tokens, token, width)
    cell = next((cell for cell in (NUMBERS, SHADES) if first + cell * (stop - start) <= width), 1)
    scale = largest([weights])
    signed = any(weight < 0 for row in weights for weight in row)
    header = ""
    if stop - start < len(tokens):
        header = f"tokens {start + 1} to {stop} of {len(tokens)}"
    elif cell == NUMBERS:  # names right-aligned over the numbers
        names = [pad_or_truncate(name, min(cell_len(name), cell - 1)) for name in tokens]
        header = "".join(" " * (cell - 1 - cell_len(name)) + name + " " for name in names)
    lines = [Text(" " * first + header, "dim", no_wrap=True)]
    for row in range(start, stop):
        line = Text(
            ("▸ " if row == token else "  ") + pad_or_truncate(tokens[row], first - 3) + " ",
            no_wrap=True,
        )
        line.stylize("bold" if row == token else "")
        for weight in weights[row][start : row + 1]:
            number = f"{weight:+.2f} " if signed else f"{sign(weight)}{weight:.2f} "
            style = "bold" if row == token else ""
            if signed:
                style = "bold" if abs(weight) >= 0.1 else "dim"
            line.append(number if cell == NUMBERS else sign(weight, scale) * cell, style)
        lines.append(line)
    return lines


def difference(own: Weights, base: Weights) -> list[list[float]]:
    """own − base; virtual tokens, which the base has not, are the first."""
    more = len(own) - len(base)
    padded = [[0.0] * len(own)] * more + [[0.0] * more + list(row) for row in base]
    return [
        [a - b for a, b in zip(one, other, strict=True)]
        for one, other in zip(own, padded, strict=True)
    ]


class AttentionScreen(ModalScreen[None]):
    """All heads first; Enter enlarges one. Tab changes between base, adapter and difference."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,a,q", "back", "Back"),
        Binding("enter", "enlarge", "Enlarge the head", priority=True),
        Binding("left", "head(-1)", "Head before", priority=True),
        Binding("right", "head(1)", "Next head", priority=True),
        # Priority, as the scrolled text would take the arrows, and the screen Tab.
        Binding("up", "layer(-1)", "Layer below", priority=True),
        Binding("down", "layer(1)", "Layer above", priority=True),
        Binding("tab", "view(1)", "Base, adapter, difference", priority=True),
        Binding("shift+tab", "view(-1)", "The other way", priority=True),
        Binding("j", "token(1)", "Next token"),
        Binding("k", "token(-1)", "Token before"),
    ]
    DEFAULT_CSS = (
        "AttentionScreen { align: center middle; } AttentionScreen .dialog { width: 96%; "
        "max-width: 160; }"
    )

    def __init__(self, title: str, is_adapter: bool, strength: float, ask: Ask) -> None:
        super().__init__()
        self._title, self._strength, self._ask = title, strength, ask
        self._views: tuple[str, ...] = VIEWS if is_adapter else ("model",)
        self._view = len(self._views) - 1  # what the adapter changed comes first
        self._chosen, self._token = (0, 0), -1
        self._maps: Mapping[str, Any] | None = None
        # tokens, its weights, the base's
        self._head: tuple[list[str], Weights, Weights | None] | None = None
        self._enlarged, self._problem = False, ""
        self._text = Lines()
        # keys may be faster than the engine: it is asked for the last head only
        self._latest = Latest(self._fetch)

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title, dialog.border_subtitle = Text(f"Attention of {self._title}"), ""
            yield self._text

    def on_mount(self) -> None:
        self._load()

    @work
    async def _load(self) -> None:
        self._show()
        await self._latest.run()

    async def _fetch(self) -> None:
        layer, head = self._chosen
        try:
            if self._maps is None:
                self._maps = await self._ask(self._strength)
            if self._enlarged:
                own = await self._ask(self._strength, layer=layer, head=head)
                base = (
                    (await self._ask(0.0, layer=layer, head=head))["weights"]
                    if len(self._views) > 1
                    else None
                )
                self._head = list(map(escape_whitespace, own["tokens"])), own["weights"], base
        except UserError as error:
            self._problem = str(error)
        self._show()

    def _show(self) -> None:
        keys = "←→ head  ↑↓ layer  " + (
            "Tab base, adapter, difference  " if len(self._views) > 1 else ""
        )
        keys += "j k token  Esc all heads" if self._enlarged else "Enter enlarge  Esc close"
        self.query_one(VerticalScroll).border_subtitle = keys
        self._text.show(self._draw)

    def _draw(self, width: int) -> list[Text]:
        if self._problem:
            return [Text(f"✗ {self._problem}")]
        if self._maps is None or (self._enlarged and self._head is None):
            return [Text("asking…", "dim")]
        return self._draw_head(width) if self._enlarged else self._draw_heads(width)

    def _tabs(self) -> Text:
        line = Text()
        for number, view in enumerate(self._views):
            line.append(f" {view} ", "reverse bold" if number == self._view else "").append(" ")
        return line

    def _draw_heads(self, width: int) -> list[Text]:
        assert self._maps is not None
        view = self._views[self._view]
        maps = self._maps[{"base": "base", "difference": "difference"}.get(view, "maps")]
        note = "rows attend to columns; darker is more"
        if view == "difference":
            scale = largest(head for layer in maps for head in layer)
            note = f"dark: the adapter attends more ({scale:.2f} at most), {LESS[1:]} less"
        if len(self._views) > 1:
            note += "; %: attention moved"
        return [
            self._tabs(),
            Text(note, "dim"),
            Text(),
            *overview(maps, self._maps["change"], self._chosen, width),
        ]

    def _draw_head(self, width: int) -> list[Text]:
        assert self._head is not None
        tokens, own, base = self._head
        token = min(self._token if self._token >= 0 else len(tokens) - 1, len(tokens) - 1)
        parts = {self._views[-1]: own}
        if base is not None:
            change = difference(own, base)
            # padded
            base = [
                [a - b for a, b in zip(*rows, strict=True)]
                for rows in zip(own, change, strict=True)
            ]
            parts = dict(zip(VIEWS, (base, own, change), strict=True))
        title = Text(f"layer {self._chosen[0] + 1}, head {self._chosen[1] + 1}", "bold")
        each = (width - 2 * (len(parts) - 1)) // len(parts)
        if len(parts) > 1 and margin(tokens) + SHADES * len(tokens) <= each:  # side by side
            columns = [
                [Text(name, "bold"), *matrix(tokens, weights, token, each)]
                for name, weights in parts.items()
            ]
            rows = [_beside(row, each) for row in zip(*columns, strict=True)]
        else:
            rows = [self._tabs(), *matrix(tokens, parts[self._views[self._view]], token, width)]
        return [title, Text(), *bars(tokens, own, base, token), Text(), *rows]

    def action_back(self) -> None:
        if self._enlarged and not self._problem:
            self._enlarged = False
            self._show()
        else:
            self.dismiss()

    def action_enlarge(self) -> None:
        if not self._enlarged and self._maps is not None:
            self._enlarged, self._head = True, None
            self._load()

    def _go_to(self, layer: int, head: int) -> None:
        if self._maps is not None:
            maps = self._maps["maps"]
            self._chosen = layer % len(maps), head % len(maps[0])
            if self._enlarged:
                self._load()
            else:
                self._show()

    def action_head(self, by: int) -> None:
        self._go_to(self._chosen[0], self._chosen[1] + by)

    def action_layer(self, by: int) -> None:
        self._go_to(self._chosen[0] + by, self._chosen[1])

    def action_view(self, by: int) -> None:
        self._view = (self._view + by) % len(self._views)
        self._show()

    def action_token(self, by: int) -> None:
        if self._enlarged and self._head:
            count = len(self._head[0])
            self._token = ((self._token if self._token >= 0 else count - 1) + by) % count
            self._show()


def _beside(texts: Sequence[Text], width: int) -> Text:
    line = Text(no_wrap=True)
    for text in texts:
        line.append_text(text).append(" " * max(width - text.cell_len, 0) + "  ")
    return line
