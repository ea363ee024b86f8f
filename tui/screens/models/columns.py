"""The list of models: its columns, what is folded, and which are chosen."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from textual.content import Content

from pipeline.files.text import in_units, natural_sort_key
from pipeline.views.model_library import CHECKING, Entry
from pipeline.views.models import REFUSED, UNBOUND, VERIFIED, WITHOUT_WEIGHTS
from tui.panes.lines import MUTED
from tui.panes.table import Column, Table
from tui.screens.conversation.session import sign_of
from tui.services.evaluation import Evaluation
from tui.widgets.cells import share_cell

SIGNS = {  # sign and style of a state
    VERIFIED: ("✓", "$success"),
    UNBOUND: ("?", "$warning"),
    WITHOUT_WEIGHTS: ("○", ""),
    REFUSED: ("✗", "$error"),
    CHECKING: ("…", ""),
}
BAR, SHARE = 7, 12  # cells of a bar, and with its number
FEW = 8  # models of a folder that is unfolded at first
LEARNED, KEPT = "learned", "kept"
SEARCHING = "looking for models…"
NO_MODELS = "No models yet. R runs the pipeline, which makes some; f searches another folder."


@dataclass(frozen=True)
class Folder:
    """The line of a folder, above its models."""

    label: str
    entries: tuple[Entry, ...]

    @cached_property  # of thousands, and the line is drawn again and again while they are checked
    def shares(self) -> Sequence[float]:
        """What those keep that were evaluated."""
        return [share for share in map(kept, self.entries) if share is not None]


Line = Entry | Folder


class ModelList(Table[Line]):
    """The pipeline's models in its order, then each folder with its models."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.entries: Sequence[Entry] = ()
        self.chosen: list[Path] = []
        self._evaluation = evaluation  # that measures some of them
        self._groups = set[str]()  # that were listed before
        super().__init__(
            key=lambda line: line.label if isinstance(line, Folder) else line.model.path,
            parent=lambda line: (line.group or None) if isinstance(line, Entry) else None,
            words=words_of,
            nothing=SEARCHING,
            favourite=KEPT,
            columns=self._all_columns(),
        )

    def show_entries(self, entries: Sequence[Entry]) -> None:
        """Show these models; a large folder is folded at first."""
        self.entries, self.nothing = entries, NO_MODELS
        paths = {entry.model.path for entry in entries}
        self.chosen = [path for path in self.chosen if path in paths]
        lines: list[Line] = []
        in_order = sorted(entries, key=lambda entry: entry.sort_key)
        for name, group in groupby(in_order, lambda entry: entry.group):
            members = tuple(group)
            if name:
                lines.append(Folder(name, members))
            if name not in self._groups and len(members) > FEW:
                self.folded.add(name)
            self._groups.add(name)
            lines += members
        self.show(lines)

    def seen(self) -> list[Path]:
        """The models whose lines can be seen."""
        top = round(self.scroll_offset.y)
        lines = self.shown[top : top + self.page_height]
        return [line.model.path for line in lines if isinstance(line, Entry)]

    def chosen_entries(self) -> list[Entry]:
        """The chosen models in display order, or the one under the cursor."""
        if not self.chosen:
            return [self.pointed] if isinstance(self.pointed, Entry) else []
        chosen = [entry for entry in self.entries if entry.model.path in self.chosen]
        return sorted(chosen, key=lambda entry: entry.sort_key)

    def _all_columns(self) -> list[Column[Line]]:
        mark = Column[Line]("", self._mark_of, width=1)
        name = Column[Line](
            "name", self._name_of, lambda line: natural_sort_key(line.label), fills=True
        )
        sign, *others = (replace(column, cell=self._cell(column)) for column in COLUMNS)
        return [mark, sign, name, *others]

    def _cell(self, column: Column[Entry]) -> Callable[[Line], Content | str]:
        """A column's cell, also of folders and of what is being measured."""

        def cell(line: Line) -> Content | str:
            if isinstance(line, Folder):
                return folder_cell(line, column.title)
            if column.title in (LEARNED, KEPT) and line.model.path in self._evaluation.adapters:
                return "measuring…"
            return column.cell(line)

        return cell

    def _mark_of(self, line: Line) -> Content | str:
        if isinstance(line, Folder):
            return "▸" if line.label in self.folded else "▾"
        return Content.styled("●" if line.model.path in self.chosen else "", "bold")

    def _name_of(self, line: Line) -> Content | str:
        if isinstance(line, Folder):
            return Content.styled(f"{line.label} ({len(line.entries)})", "bold")
        label = line.label
        if line.group and not self.sorted_by:
            # 80 columns have no room for checkpoint-40
            label = f"  {label.removeprefix(f'{line.group}/').replace('checkpoint-', 'step ')}"
        style = MUTED if line.state == REFUSED else ""
        best = " ★" * line.model.weights_of.endswith("the best checkpoint")
        return Content.styled(f"{label}{best}{' ●' * bool(line.apart)}", style)


def folder_cell(folder: Folder, title: str) -> Content | str:
    unmeasured = len(folder.entries) - len(folder.shares)
    if title == LEARNED and unmeasured:
        return f"{unmeasured} unmeasured"
    if title == KEPT and folder.shares:
        return share_cell(max(folder.shares), BAR)
    return ""


def entries_of(line: Line | None) -> Sequence[Entry]:
    """The models of a folder, or the model itself."""
    if isinstance(line, Folder):
        return line.entries
    return [line] if line else []


def words_of(line: Line) -> str:
    """What the filter searches, also in columns that are not shown."""
    if isinstance(line, Folder):
        return ""
    model = line.model
    words = [line.label, line.shown_path, line.state, line.gate, *line.apart]
    return "\n".join([*words, model.kind, model.method, model.base or "", *model.targets])


def measured(entry: Entry, *names: str) -> float | None:
    """The first of these that was measured."""
    values = (getattr(entry.verdict, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def kept(entry: Entry) -> float | None:
    return measured(entry, "kept")


def _share_learned(entry: Entry) -> float | None:
    """In the order of Results."""
    return measured(entry, "answered", "similar", "learned", "preferred")


def _learned(entry: Entry) -> Content:
    """A bar for a share; of a model whose new sentences were held out, the loss on them."""
    share, loss = _share_learned(entry), measured(entry, "new_loss")
    if share is None and loss is not None:
        return Content(f"loss {loss:.3f}")
    return share_cell(share, BAR)


def _learned_order(entry: Entry) -> float | None:
    share, loss = _share_learned(entry), measured(entry, "new_loss")
    return -loss if share is None and loss is not None else share


def made(entry: Entry) -> str:
    when = entry.model.when
    return "–" if when is None else f"{datetime.fromtimestamp(when):%d %b %H:%M}"


def _sign(entry: Entry) -> Content:
    """An evaluation may have found that an intact model breaks evaluate.limits."""
    is_broken = entry.verdict and entry.verdict.broken
    return Content.styled(*SIGNS[REFUSED if is_broken else entry.state])


def _method(entry: Entry) -> str:
    return re.sub("_(tuning|vocab)$", "", entry.model.method)


def _number(
    title: str, value: Callable[[Entry], float | None], form: str, width: int, rank: int
) -> Column[Any]:
    def cell(entry: Entry) -> Content | str:
        number = value(entry)
        return Content.styled("–", MUTED) if number is None else format(number, form)

    return Column(title, cell, value, width, rank, right=True)


COLUMNS: list[Column[Any]] = [  # those that say most have the lowest rank
    Column("", lambda e: Content.styled(*sign_of(e)), width=1),
    _number("rank", lambda e: e.model.rank, "d", 6, 2),
    Column(LEARNED, _learned, _learned_order, SHARE, 1, largest_first=True),
    Column(KEPT, lambda e: share_cell(kept(e), BAR), kept, SHARE, 0, largest_first=True),
    _number("forgot", lambda e: measured(e, "forgetting"), "+.2f", 6, 4),
    _number("loss", lambda e: e.model.final_loss, ".3f", 6, 5),
    Column("method", _method, _method, 8, 6),
    Column("on disk", lambda e: in_units(e.model.size), lambda e: e.model.size, 10, 7),
    _number("params", lambda e: e.model.parameters, ",d", 11, 9),
    Column("made", made, lambda e: e.model.when, 12, 8, largest_first=True),
    Column("✓", _sign, lambda e: e.state, 1, 3),
]
