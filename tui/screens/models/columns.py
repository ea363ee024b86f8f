"""The columns of the list of models: what is shown of a model, and by what it is sorted."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.text import Text

from pipeline.files.text import natural_sort_key
from pipeline.project.gate import PASSED
from pipeline.stages.registry import METHODS
from pipeline.views.model_library import CHECKING, Entry
from pipeline.views.models import REFUSED, UNBOUND, VERIFIED, WITHOUT_WEIGHTS
from tui.widgets.colors import share_style
from tui.widgets.text import bar, pad_or_truncate

SIGNS = {VERIFIED: "✓", UNBOUND: "?", WITHOUT_WEIGHTS: "○", REFUSED: "✗", CHECKING: "…"}
STATES = {
    VERIFIED: "intact",
    UNBOUND: "no manifest",
    WITHOUT_WEIGHTS: "replayed",
    REFUSED: "refused",
    CHECKING: "checking",
}
STATE_COLORS = {
    VERIFIED: "success",
    UNBOUND: "warning",
    WITHOUT_WEIGHTS: "",
    REFUSED: "error",
    CHECKING: "",
}
# folder → method
SWEEPS = {stage.output: name for name, stage in METHODS.items() if stage.kind == "adapters"}
MIN_NAME, MAX_NAME = 10, 40  # cells
APART = " ●"  # after the name of a model whose settings are not those of params.yaml
BAR, SHARE = 7, 5  # cells of a bar, of the number after it
Colors = Mapping[str, str]  # theme variable → colour


def look_name(entry: Entry) -> str:
    """The method whose colour and sign a model has, as its curve has."""
    if sweep := SWEEPS.get(entry.group):
        return sweep
    method = entry.model.method.removesuffix("_tuning")
    return "lora" if method == "dora" else method


def short_targets(targets: Sequence[str]) -> str:
    return (
        " ".join(target.removesuffix("_proj").removesuffix(" tokens") for target in targets) or "–"
    )


def format_size(size: int) -> str:
    """The size in decimal units."""
    for unit, name, form in ((1e9, "GB", ".2f"), (1e6, "MB", ".1f"), (1e3, "kB", ".0f")):
        if size >= unit:
            return f"{size / unit:{form}} {name}"
    return f"{size} B"


def format_time(when: float | None) -> str:
    return "–" if when is None else f"{datetime.fromtimestamp(when):%d %b %H:%M}"


def share_bar(share: float | None, colors: Colors) -> Text:
    """A bar and its number; the colour says how much is missing."""
    if share is None:
        return Text("–", "dim")
    color = colors.get(share_style(1 - share).removeprefix("$"), "")
    return Text.assemble((bar(share, BAR), color), f"{share:>{SHARE}.0%}")


def _size(entry: Entry) -> str:
    """`r4`, `8 tokens`, or what a full model is."""
    if entry.model.rank is not None:
        return f"r{entry.model.rank}"
    if entry.model.kind == "adapter":
        return next((target for target in entry.model.targets if "virtual" in target), "–").replace(
            " virtual tokens", " tok"
        )
    return {"checkpoint": "all"}.get(entry.model.kind, entry.model.kind)


def _number(value: float | None, form: str) -> Text:
    return Text("–", "dim") if value is None else Text(format(value, form))


def _of_verdict(name: str) -> Callable[[Entry], Any]:
    return lambda entry: getattr(entry.verdict, name) if entry.verdict else None


def breaks_limits(entry: Entry) -> bool:
    """Whether an evaluation found that it breaks evaluate.limits."""
    return bool(entry.verdict and entry.verdict.broken)


def _learned_share(entry: Entry) -> float | None:
    """The first that was measured, in the order of Results."""
    verdict = entry.verdict
    shares = (
        (verdict.answered, verdict.similar, verdict.learned, verdict.preferred) if verdict else ()
    )
    return next((share for share in shares if share is not None), None)


def _learned_cell(entry: Entry, colors: Colors) -> Text:
    """A bar for a share; of a model whose new sentences were held out, the loss on them."""
    share, loss = _learned_share(entry), _new_loss(entry)
    return (
        share_bar(share, colors) if share is not None or loss is None else Text(f"loss {loss:.3f}")
    )


def _learned_order(entry: Entry) -> float | None:
    share, loss = _learned_share(entry), _new_loss(entry)
    return -loss if share is None and loss is not None else share


def _sign(entry: Entry, colors: Colors) -> Text:
    if breaks_limits(entry):
        return Text(SIGNS[REFUSED], colors.get("error", ""))
    return Text(SIGNS[entry.state], colors.get(STATE_COLORS[entry.state], ""))


def _state(entry: Entry, colors: Colors) -> Text:
    gate = entry.gate.replace(f", gate {PASSED}", ", gate ✓").replace("gate failed: ", "breaks ")
    text = ", ".join([f"{STATES[entry.state]}{gate}", *entry.apart])
    return Text(text, colors.get("error", "") if breaks_limits(entry) else "")


@dataclass(frozen=True)
class Column:
    """A column: its cell, and the value to sort by (None: unknown, sorted last).

    `falls`: the best, or most interesting, is the largest. `rank`: the lower, the sooner it is
    shown.
    """

    label: str
    width: int
    cell: Callable[[Entry, Colors], Text]
    value: Callable[[Entry], Any]
    rank: int
    falls: bool = False
    right: bool = False


_kept, _forgot, _new_loss = map(_of_verdict, ("kept", "forgetting", "new_loss"))
COLUMNS = (
    Column(
        "name",
        0,
        lambda e, _: Text(f"{e.label}{APART * bool(e.apart)}"),
        lambda e: natural_sort_key(e.label),
        0,
    ),
    Column("rank", 6, lambda e, _: Text(_size(e)), lambda e: e.model.rank, 3),
    Column("learned", BAR + SHARE, _learned_cell, _learned_order, 2, falls=True),
    Column("kept", BAR + SHARE, lambda e, c: share_bar(_kept(e), c), _kept, 1, falls=True),
    Column("forgot", 6, lambda e, _: _number(_forgot(e), "+.2f"), _forgot, 5, right=True),
    Column(
        "loss",
        6,
        lambda e, _: _number(e.model.final_loss, ".3f"),
        lambda e: e.model.final_loss,
        6,
        right=True,
    ),
    Column(
        "method",
        8,
        lambda e, _: Text(re.sub("_(tuning|vocab)$", "", e.model.method)),
        lambda e: e.model.method,
        7,
    ),
    Column(
        "base", 10, lambda e, _: Text(Path(e.model.base or "–").name), lambda e: e.model.base, 11
    ),
    Column(
        "on disk",
        8,
        lambda e, _: Text(format_size(e.model.size)),
        lambda e: e.model.size,
        8,
        right=True,
    ),
    Column(
        "params",
        11,
        lambda e, _: _number(e.model.parameters, ",d"),
        lambda e: e.model.parameters,
        10,
        right=True,
    ),
    Column(
        "targets",
        12,
        lambda e, _: Text(short_targets(e.model.targets)),
        lambda e: e.model.targets or None,
        12,
    ),
    Column(
        "made",
        12,
        lambda e, _: Text(format_time(e.model.when)),
        lambda e: e.model.when,
        9,
        falls=True,
    ),
    Column("✓", 1, _sign, lambda e: e.state, 4),
    Column("state", 24, _state, lambda e: e.state + e.gate, 13),
)
BY_LABEL = {column.label: column for column in COLUMNS}


def columns_for(width: int, name: int) -> list[Column]:
    """The columns that fit beside a name of `name` cells, in their order: those of the lowest
    rank.
    """
    shown, room = {0}, width - name
    for column in sorted(COLUMNS[1:], key=lambda column: column.rank):
        if room < column.width + 1:
            break
        shown.add(column.rank)
        room -= column.width + 1
    return [column for column in COLUMNS if column.rank in shown]


def name_width(entries: Sequence[Entry], width: int) -> int:
    """Cells of the name: the longest one, as far as the bars still fit beside it."""
    longest = max((len(entry.label) for entry in entries), default=0) + 2  # indented below a folder
    return max(min(longest, MAX_NAME, width - 2 * (BAR + SHARE + 1)), MIN_NAME)


def searched(entry: Entry) -> str:
    """What the filter searches: all words of the columns, also of those that are not shown."""
    model = entry.model
    words = (
        entry.label,
        model.kind,
        model.method,
        _size(entry),
        model.base,
        *model.targets,
        STATES[entry.state],
    )
    return "\n".join((*map(str, words), entry.gate, *entry.apart, entry.shown_path)).casefold()


def sorted_entries(entries: Sequence[Entry], column: Column, reverse: bool) -> list[Entry]:
    """The best first, or with `reverse` last; those without a value last in both cases."""
    known = [entry for entry in entries if column.value(entry) is not None]
    known.sort(key=column.value, reverse=column.falls != reverse)
    return known + [entry for entry in entries if column.value(entry) is None]


def pad(text: Text, width: int, right: bool = False) -> Text:
    """The text in exactly `width` cells."""
    if text.cell_len > width:
        text = Text(pad_or_truncate(text.plain, width), text.style)
    space = " " * (width - text.cell_len)
    return Text.assemble(space, text) if right else Text.assemble(text, space)
