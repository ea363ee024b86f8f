"""The drawing of Figure 1: the network's neurons by what happens to them, and how concentrated the change is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.calc.target_modules import HEAD
from pipeline.document.figures.data.changes import held_if_normal, largest_first
from pipeline.document.figures.draw.style import BLUE, EDGE, FROZEN, GREEN, HATCH, INK, ORANGE, RED, SMALL, ramp
from pipeline.document.studies.shared.report import Figure
from pipeline.document.tables import Table

ABREAST = ("q_proj", "k_proj", "v_proj")  # side by side, as they read the same input
WIDEST, HEADS = 64, 4  # cells of a strip; rows of one that stands beside others
GAP, BETWEEN = 3.0, 2.0  # cells between levels, and between strips of a level
SPOT = 2.9  # points across, where a level is `WIDEST` wide
MOST_DIAMONDS = 8
TICKS = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5))
LINES = {"weights": ("-", RED), "weights of the blocks": ("-.", ORANGE), "neurons": ("--", BLUE)}
Place = tuple[float, float]


@dataclass(frozen=True)
class Module:
    """A matrix's neurons: relative change of each, rank of its A and B (0: none), and those that train in full."""

    block: int | None
    name: str
    relative: Sequence[float]
    rank: int
    in_full: frozenset[int]


@dataclass(frozen=True)
class Strip:
    """A module's neurons in their places, first row on top, `wide` abreast, and the middle of the space above them."""

    module: Module
    places: Sequence[Place]
    wide: int
    above: Place


@dataclass(frozen=True)
class Layout:
    """Strips from the input, below, to the output; the height of each level's middle and what it is called."""

    strips: Sequence[Strip]
    ticks: Sequence[tuple[float, str]]
    width: float
    height: float

    @property
    def spot(self) -> float:
        """Points² of a neuron's circle, in a panel of half a page's width."""
        return (SPOT * WIDEST / self.width) ** 2


def layout(modules: Sequence[Module]) -> Layout:
    """Where each neuron is drawn: cells of size 1, each level around x = 0."""
    strips, ticks, y, widest = list[Strip](), list[tuple[float, str]](), 0.0, float(WIDEST)
    for level in _levels(modules):
        rows = HEADS if len(level) > 1 else -(-len(level[0].relative) // WIDEST)
        columns = [-(-len(one.relative) // rows) for one in level]
        wide_all = sum(columns) + BETWEEN * (len(level) - 1)
        x, widest = (1 - wide_all) / 2, max(widest, wide_all)
        for module, wide in zip(level, columns, strict=True):
            places = [(x + n % wide, y + rows - 1 - n // wide) for n in range(len(module.relative))]
            strips.append(Strip(module, places, wide, (x + (wide - 1) / 2, y + rows - 1 + GAP / 2)))
            x += wide + BETWEEN
        ticks.append((y + (rows - 1) / 2, _label(level)))
        y += rows - 1 + GAP + 0.5
    return Layout(strips, ticks, widest, y)


def _levels(modules: Sequence[Module]) -> Iterator[list[Module]]:
    """From the embedding up; q, k and v of a block are one level."""
    inside = [one for one in modules if one.block is not None]
    yield from ([one] for one in modules if one.block is None and one.name != HEAD)
    for _, block in groupby(inside, lambda one: one.block):
        members = list(block)
        abreast = sorted((one for one in members if one.name in ABREAST), key=lambda one: ABREAST.index(one.name))
        yield from ([abreast] if abreast else [])
        yield from ([one] for one in members if one.name not in ABREAST)
    yield from ([one] for one in modules if one.name == HEAD)


def _label(level: Sequence[Module]) -> str:
    name = level[0].name if len(level) == 1 else ", ".join(one.name.removesuffix("_proj") for one in level)
    return name if level[0].block is None else f"block {level[0].block}: {name}"


def heights(modules: Sequence[Module]) -> tuple[float, float]:
    """Inches of the networks, and of the panels below, one of which has a line a matrix and one for all vectors."""
    return 0.336 * len(list(_levels(modules))), 0.6 + 0.11 * (len(modules) + 1)


def draw_network(figure: Figure, modules: Sequence[Module], squares: Mapping[str, Tensor], table: Table) -> None:
    """Four panels: the change, the strategy, how concentrated the change is, and in which matrices it is."""
    above, below = figure.subfigures(2, 1, height_ratios=heights(modules))
    (left, right), (key, legend) = above.subplots(2, 2, height_ratios=(1, 0.035))
    found = layout(modules)
    colored = _draw_change(left, found)
    bar = above.colorbar(colored, cax=key, location="bottom", extend="both", format="%g")
    bar.set_label("‖Δw‖ / ‖w‖ of a neuron; hollow: not moved at all")
    bar.set_ticks([tick for tick in TICKS if colored.norm.vmin <= tick <= colored.norm.vmax], minor=False)
    bar.ax.minorticks_off()
    _draw_strategy(right, found)
    legend.set_axis_off()
    legend.legend(*right.get_legend_handles_labels(), loc="center", ncols=3, frameon=False, columnspacing=1.2)
    for axis in (left, right):
        _frame(axis, found)
    left.set_yticks([y for y, _ in found.ticks], [name for _, name in found.ticks])
    first, second = below.subplots(1, 2)
    _draw_concentration(first, squares)
    _draw_modules(second, table)


def _frame(axis: Any, found: Layout) -> None:
    half = found.width / 2 + 0.5
    axis.set(xlim=(-half, half), ylim=(-1, found.height - 1), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _circles(axis: Any, places: Sequence[Place], found: Layout, **look: Any) -> Any:
    return axis.scatter(*zip(*places, strict=True), s=found.spot, **look) if places else None


def _draw_change(axis: Any, found: Layout) -> Any:
    """Colours on a logarithmic scale, from the 2nd to the 98th percentile."""
    from matplotlib.colors import LogNorm

    pairs = [pair for strip in found.strips for pair in zip(strip.places, strip.module.relative, strict=True)]
    moved = [(place, value) for place, value in pairs if value > 0]
    still = [place for place, value in pairs if value == 0]
    values = np.array([value for _, value in moved])
    norm = LogNorm(*np.quantile(values, (0.02, 0.98)))
    _circles(axis, still, found, facecolor="none", edgecolor=EDGE, linewidth=0.3)
    axis.set_title("(a) Full fine-tuning: what moves")
    return _circles(axis, [place for place, _ in moved], found, c=values, cmap=ramp(), norm=norm, linewidth=0)


def _draw_strategy(axis: Any, found: Layout) -> None:
    """Circles are frozen, squares train in full, diamonds are the ranks of A and B."""
    pairs = [(place, n in s.module.in_full) for s in found.strips for n, place in enumerate(s.places)]
    look = {"facecolor": FROZEN, "edgecolor": EDGE, "linewidth": 0.3}
    _circles(axis, [place for place, full in pairs if not full], found, **look)
    full = [place for place, in_full in pairs if in_full]
    diamonds = [place for strip in found.strips for place in _diamonds(strip)]
    look = {"linestyle": "", "markeredgecolor": INK, "markeredgewidth": 0.3}
    axis.plot([], [], "o", markersize=3.5, color=FROZEN, markeredgewidth=0.4, markeredgecolor=EDGE, label="frozen")
    if full:
        axis.plot(*zip(*full, strict=True), marker="s", markersize=2.6, color=RED, label="trained in full", **look)
    if diamonds:
        axis.plot(*zip(*diamonds, strict=True), marker="D", markersize=3.6, color=GREEN, label="A and B", **look)
    axis.set_title("(b) LoRA: what trains")


def _diamonds(strip: Strip) -> list[Place]:
    """One for each rank, up to `MOST_DIAMONDS`, above the module."""
    count = min(strip.module.rank, MOST_DIAMONDS)
    x, y = strip.above
    step = min(3.0, strip.wide / count) if count else 0
    return [(x + step * (n - (count - 1) / 2), y) for n in range(count)]


def _draw_concentration(axis: Any, squares: Mapping[str, Tensor]) -> None:
    for name, (line, color) in LINES.items():
        shares = largest_first(squares[name]).numpy()
        x = np.arange(1, len(shares) + 1) / len(shares)
        every = max(1, len(x) // 400)
        axis.plot(100 * x[::every], 100 * shares[::every], line, color=color, label=name)
        at = max(1, round(0.1 * len(shares))) - 1
        axis.plot(100 * x[at], 100 * shares[at], "o", color=color, markersize=4)
    parts = np.linspace(1e-4, 1 - 1e-9, 200)
    axis.plot(100 * parts, [100 * held_if_normal(float(part)) for part in parts], ":", color=EDGE, label="if normal")
    axis.axvline(10, color=INK, linewidth=0.5)
    axis.set(xlabel="% of them, those that change most first", ylabel="% of ‖ΔW‖²", xlim=(0, 100), ylim=(0, 102))
    axis.set_title("(c) How concentrated it is")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def _draw_modules(axis: Any, table: Table) -> None:
    """For each matrix its share of the weights and of the change, in the table's order from below."""
    names = [str(r["module"]) if r["block"] is None else f"{r['block']}: {r['module']}" for r in table.rows]
    y = np.arange(len(names))
    for key, label, shift, look in (
        ("share_of_weights", "of the weights", 0.2, {"color": FROZEN, "edgecolor": EDGE, "hatch": HATCH}),
        ("share_of_change", "of ‖ΔW‖²", -0.2, {"color": RED}),
    ):
        axis.barh(y + shift, [100 * float(str(row[key])) for row in table.rows], 0.4, label=label, **look)
    axis.set_yticks(y, names, fontsize=SMALL)
    axis.set(xlabel="%", ylim=(-0.6, len(names) - 0.4))
    axis.set_title("(d) Where it is")
    axis.legend(loc="best")
    axis.grid(axis="x", alpha=0.3)
