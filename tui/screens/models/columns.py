"""The columns of the list of models: what is shown of a model or a folder, and by what it is
sorted.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from textual.content import Content

from pipeline.files.text import natural_sort_key
from pipeline.project.gate import PASSED
from pipeline.stages.registry import METHODS
from pipeline.views.model_library import CHECKING, Entry
from pipeline.views.models import REFUSED, UNBOUND, VERIFIED, WITHOUT_WEIGHTS
from tui.panes.table import Column
from tui.screens.conversation.session import method_of
from tui.widgets.cells import method_sign, share_cell

STATES = {  # sign, style, word
    VERIFIED: ("✓", "$success", "intact"),
    UNBOUND: ("?", "$warning", "no manifest"),
    WITHOUT_WEIGHTS: ("○", "", "replayed"),
    REFUSED: ("✗", "$error", "refused"),
    CHECKING: ("…", "", "checking"),
}
# folder → method
SWEEPS = {stage.output: name for name, stage in METHODS.items() if stage.kind == "adapters"}
BAR, SHARE = 7, 12  # cells of a bar, and with its number
KEPT = "kept"


@dataclass(frozen=True)
class Folder:
    """The line of a folder, above its models."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def best(self) -> Entry | None:
        """The model that keeps most."""
        known = [entry for entry in self.entries if kept(entry) is not None]
        return max(known, key=lambda entry: kept(entry) or 0.0, default=None)

    @property
    def unmeasured(self) -> int:
        return sum(kept(entry) is None for entry in self.entries)


Line = Entry | Folder


def key_of(line: Line) -> Path | str:
    return line.name if isinstance(line, Folder) else line.model.path


def parent_of(line: Line) -> str | None:
    return (line.group or None) if isinstance(line, Entry) else None


def lines_of(entries: Sequence[Entry]) -> list[Line]:
    """The pipeline's models in its order, then each folder with its models."""
    groups: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.sort_key):
        groups.setdefault(entry.group, []).append(entry)
    lines: list[Line] = []
    for name, members in groups.items():
        lines += [Folder(name, tuple(members))] if name else []
        lines += members
    return lines


def look_name(entry: Entry) -> str:
    """The method whose colour and sign a model has, as its curve has."""
    return SWEEPS.get(entry.group) or method_of(entry)


def kept(entry: Entry) -> float | None:
    return entry.verdict.kept if entry.verdict else None


def _learned(entry: Entry) -> float | None:
    """The first that was measured, in the order of Results."""
    verdict = entry.verdict
    if verdict is None:
        return None
    shares = (verdict.answered, verdict.similar, verdict.learned, verdict.preferred)
    return next((share for share in shares if share is not None), None)


def _learned_cell(entry: Entry) -> Content:
    """A bar for a share; of a model whose new sentences were held out, the loss on them."""
    loss = entry.verdict.new_loss if entry.verdict else None
    if _learned(entry) is None and loss is not None:
        return Content(f"loss {loss:.3f}")
    return share_cell(_learned(entry), BAR)


def _learned_order(entry: Entry) -> float | None:
    loss = entry.verdict.new_loss if entry.verdict else None
    share = _learned(entry)
    return -loss if share is None and loss is not None else share


def size_of(entry: Entry) -> str:
    """`r4`, `8 tokens`, or what a full model is."""
    model = entry.model
    if model.rank is not None:
        return f"r{model.rank}"
    if model.kind == "adapter":
        virtual = next((target for target in model.targets if "virtual" in target), "–")
        return virtual.replace(" virtual tokens", " tok")
    return "all" if model.kind == "checkpoint" else model.kind


def short_targets(targets: Sequence[str]) -> str:
    names = (target.removesuffix("_proj").removesuffix(" tokens") for target in targets)
    return " ".join(names) or "–"


def format_size(size: int) -> str:
    """The size in decimal units."""
    for unit, name, form in ((1e9, "GB", ".2f"), (1e6, "MB", ".1f"), (1e3, "kB", ".0f")):
        if size >= unit:
            return f"{size / unit:{form}} {name}"
    return f"{size} B"


def format_time(when: float | None) -> str:
    return "–" if when is None else f"{datetime.fromtimestamp(when):%d %b %H:%M}"


def is_broken(entry: Entry) -> bool:
    """Whether an evaluation found that it breaks evaluate.limits."""
    return bool(entry.verdict and entry.verdict.broken)


def _sign(entry: Entry) -> Content:
    sign, style, _ = STATES[REFUSED if is_broken(entry) else entry.state]
    return Content.styled(sign, style)


def _state(entry: Entry) -> Content:
    gate = entry.gate.replace(f", gate {PASSED}", ", gate ✓").replace("gate failed: ", "breaks ")
    text = ", ".join([f"{STATES[entry.state][2]}{gate}", *entry.apart])
    return Content.styled(text, "$error" if is_broken(entry) else "")


def _number(value: float | None, form: str) -> Content | str:
    return Content.styled("–", "$foreground-muted") if value is None else format(value, form)


def words_of(line: Line) -> str:
    """What the filter searches: all words of the columns, also of those that are not shown."""
    if isinstance(line, Folder):
        return ""
    model = line.model
    words = [line.label, model.kind, model.method, size_of(line), model.base or ""]
    words += [*model.targets, STATES[line.state][2], line.gate, *line.apart, line.shown_path]
    return "\n".join(words)


def columns(
    is_chosen: Callable[[Entry], bool],
    is_busy: Callable[[Entry], bool],
    is_folded: Callable[[str], bool],
    is_flat: Callable[[], bool],
) -> list[Column[Line]]:
    """All columns, those that say most with the lowest rank."""

    def mark(line: Line) -> Content | str:
        if isinstance(line, Folder):
            return "▸" if is_folded(line.name) else "▾"
        return Content.styled("●" if is_chosen(line) else "", "bold")

    def sign(line: Line) -> Content | str:
        return "" if isinstance(line, Folder) else Content.styled(*method_sign(look_name(line)))

    def name(line: Line) -> Content | str:
        if isinstance(line, Folder):
            return Content.styled(f"{line.name} ({len(line.entries)})", "bold")
        label = line.label
        if line.group and not is_flat():
            label = f"  {label.removeprefix(f'{line.group}/')}"
        return Content.styled(f"{label}{' ●' * bool(line.apart)}", _name_style(line))

    def measured(cell: Callable[[Entry], Content]) -> Callable[[Entry], Content]:
        return lambda entry: Content("measuring…") if is_busy(entry) else cell(entry)

    def folder_learned(folder: Folder) -> str:
        return f"{folder.unmeasured} unmeasured" * bool(folder.unmeasured)

    def folder_kept(folder: Folder) -> Content | str:
        return share_cell(kept(folder.best), BAR) if folder.best else ""

    kept_cell = measured(lambda entry: share_cell(kept(entry), BAR))
    return [
        Column("", mark, width=1),
        Column("", sign, width=1),
        Column("name", name, _of(lambda e: natural_sort_key(e.label)), fills=True),
        _column("rank", size_of, lambda e: e.model.rank, 6, 2),
        _column("learned", measured(_learned_cell), _learned_order, SHARE, 1, True, folder_learned),
        _column(KEPT, kept_cell, kept, SHARE, 0, True, folder_kept),
        _column("forgot", lambda e: _number(_forgot(e), "+.2f"), _forgot, 6, 4),
        _column("loss", lambda e: _number(e.model.final_loss, ".3f"), _loss, 6, 5),
        _column("method", _method, lambda e: e.model.method, 8, 6),
        _column("base", lambda e: Path(e.model.base or "–").name, lambda e: e.model.base, 10, 10),
        _column("on disk", lambda e: format_size(e.model.size), lambda e: e.model.size, 8, 7),
        _column("params", lambda e: _number(e.model.parameters, ",d"), _parameters, 11, 9),
        _column("targets", lambda e: short_targets(e.model.targets), _targets, 12, 11),
        _column("made", lambda e: format_time(e.model.when), lambda e: e.model.when, 12, 8, True),
        _column("✓", _sign, lambda e: e.state, 1, 3),
        _column("state", _state, lambda e: e.state + e.gate, 24, 12),
    ]


def _name_style(entry: Entry) -> str:
    return "$foreground-muted" if entry.state == REFUSED else ""


def _method(entry: Entry) -> str:
    return re.sub("_(tuning|vocab)$", "", entry.model.method)


def _forgot(entry: Entry) -> float | None:
    return entry.verdict.forgetting if entry.verdict else None


def _loss(entry: Entry) -> float | None:
    return entry.model.final_loss


def _parameters(entry: Entry) -> int | None:
    return entry.model.parameters


def _targets(entry: Entry) -> Sequence[str] | None:
    return entry.model.targets or None


def _of(value: Callable[[Entry], Any]) -> Callable[[Line], Any]:
    """The value of a model; of a folder none."""
    return lambda line: None if isinstance(line, Folder) else value(line)


def _column(
    title: str,
    cell: Callable[[Entry], Content | str],
    order: Callable[[Entry], Any],
    width: int,
    rank: int,
    largest_first: bool = False,
    folder: Callable[[Folder], Content | str] = lambda _: "",
) -> Column[Line]:
    def shown(line: Line) -> Content | str:
        return folder(line) if isinstance(line, Folder) else cell(line)

    is_number = title in ("forgot", "loss", "on disk", "params")
    return Column(title, shown, _of(order), width, rank, is_number, largest_first)
