"""The drawing of Figure 1: the network's neurons by change and by what trains, and the concentration of the change."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.calc.target_modules import HEAD
from pipeline.document.figures.data.changes import cumulative_shares, held_if_normal
from pipeline.document.figures.draw.style import BLUE, EDGE, FROZEN, GREEN, HATCH, INK, ORANGE, RED, SMALL, ramp
from pipeline.document.studies.shared.report import Figure
from pipeline.document.tables import Table

SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj")  # they read the same input
MAX_COLUMNS, SHARED_ROWS = 64, 4  # of a strip alone in its level; rows of a strip beside others
GAP, BETWEEN = 3.0, 2.0  # in cells: between levels, and between the strips of a level
SPOT = 2.9  # diameter in points, if the widest level has `MAX_COLUMNS` cells
MAX_DIAMONDS = 8
TICKS = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5))
LINES = {"weights": ("-", RED), "weights of the blocks": ("-.", ORANGE), "neurons": ("--", BLUE)}
Point = tuple[float, float]


@dataclass(frozen=True)
class Module:
    """A matrix: the relative change of each neuron, the rank of A and B (0: none), the neurons that train in full."""

    block: int | None
    name: str
    relative: Sequence[float]
    rank: int
    in_full: frozenset[int]


@dataclass(frozen=True)
class Strip:
    """A module's neurons on a grid `columns` wide, the first at the top left; `above`: the middle of the gap above."""

    module: Module
    points: Sequence[Point]
    columns: int
    above: Point


@dataclass(frozen=True)
class Layout:
    """Strips from the input (bottom) to the output; `ticks`: y and label of each level."""

    strips: Sequence[Strip]
    ticks: Sequence[tuple[float, str]]
    width: float
    height: float

    @property
    def spot(self) -> float:
        """The area in points² of a neuron's circle, in a panel of half a page's width."""
        return (SPOT * MAX_COLUMNS / self.width) ** 2


def layout(modules: Sequence[Module]) -> Layout:
    """The position of each neuron: cells of size 1, each level centered at x = 0."""
    strips, ticks, y, width = list[Strip](), list[tuple[float, str]](), 0.0, float(MAX_COLUMNS)
    for level in _levels(modules):
        rows = SHARED_ROWS if len(level) > 1 else -(-len(level[0].relative) // MAX_COLUMNS)
        widths = [-(-len(module.relative) // rows) for module in level]
        level_width = sum(widths) + BETWEEN * (len(level) - 1)
        x, width = (1 - level_width) / 2, max(width, level_width)
        for module, columns in zip(level, widths, strict=True):
            points = [(x + n % columns, y + rows - 1 - n // columns) for n in range(len(module.relative))]
            strips.append(Strip(module, points, columns, (x + (columns - 1) / 2, y + rows - 1 + GAP / 2)))
            x += columns + BETWEEN
        ticks.append((y + (rows - 1) / 2, _label(level)))
        y += rows - 1 + GAP + 0.5
    return Layout(strips, ticks, width, y)


def _levels(modules: Sequence[Module]) -> Iterator[list[Module]]:
    """The levels from the embedding to the head; q, k and v of a block share one."""
    in_blocks = [module for module in modules if module.block is not None]
    yield from ([module] for module in modules if module.block is None and module.name != HEAD)
    for _, block in groupby(in_blocks, lambda module: module.block):
        members = list(block)
        shared = [module for name in SIDE_BY_SIDE for module in members if module.name == name]
        yield from ([shared] if shared else [])
        yield from ([module] for module in members if module.name not in SIDE_BY_SIDE)
    yield from ([module] for module in modules if module.name == HEAD)


def _label(level: Sequence[Module]) -> str:
    name = level[0].name if len(level) == 1 else ", ".join(module.name.removesuffix("_proj") for module in level)
    return name if level[0].block is None else f"block {level[0].block}: {name}"


def heights(modules: Sequence[Module]) -> tuple[float, float]:
    """Heights in inches of the networks and of the panels below, which have one line per matrix and one for vectors."""
    return 0.336 * len(list(_levels(modules))), 0.6 + 0.11 * (len(modules) + 1)


def draw_network(figure: Figure, modules: Sequence[Module], squares: Mapping[str, Tensor], table: Table) -> None:
    """Four panels: the change, the strategy, the concentration of the change, and its share by matrix."""
    above, below = figure.subfigures(2, 1, height_ratios=heights(modules))
    (left, right), (key, legend) = above.subplots(2, 2, height_ratios=(1, 0.035))
    arrangement = layout(modules)
    colored = _draw_change(left, arrangement)
    bar = above.colorbar(colored, cax=key, location="bottom", extend="both", format="%g")
    bar.set_label("‖Δw‖ / ‖w‖ of a neuron; hollow: unchanged")
    bar.set_ticks([tick for tick in TICKS if colored.norm.vmin <= tick <= colored.norm.vmax], minor=False)
    bar.ax.minorticks_off()
    _draw_strategy(right, arrangement)
    legend.set_axis_off()
    legend.legend(*right.get_legend_handles_labels(), loc="center", ncols=3, frameon=False, columnspacing=1.2)
    for axis in (left, right):
        _frame(axis, arrangement)
    left.set_yticks([y for y, _ in arrangement.ticks], [name for _, name in arrangement.ticks])
    first, second = below.subplots(1, 2)
    _draw_concentration(first, squares)
    _draw_modules(second, table)


def _frame(axis: Any, arrangement: Layout) -> None:
    half = arrangement.width / 2 + 0.5
    axis.set(xlim=(-half, half), ylim=(-1, arrangement.height - 1), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _circles(axis: Any, points: Sequence[Point], arrangement: Layout, **style: Any) -> Any:
    return axis.scatter(*zip(*points, strict=True), s=arrangement.spot, **style) if points else None


def _draw_change(axis: Any, arrangement: Layout) -> Any:
    """Neurons colored by relative change, on a logarithmic scale from the 2nd to the 98th percentile."""
    from matplotlib.colors import LogNorm

    pairs = [pair for strip in arrangement.strips for pair in zip(strip.points, strip.module.relative, strict=True)]
    moved = [(point, value) for point, value in pairs if value > 0]
    unchanged = [point for point, value in pairs if value == 0]
    values = np.array([value for _, value in moved])
    norm = LogNorm(*np.quantile(values, (0.02, 0.98)))
    _circles(axis, unchanged, arrangement, facecolor="none", edgecolor=EDGE, linewidth=0.3)
    axis.set_title("(a) Full fine-tuning: change")
    return _circles(axis, [point for point, _ in moved], arrangement, c=values, cmap=ramp(), norm=norm, linewidth=0)


def _draw_strategy(axis: Any, arrangement: Layout) -> None:
    """Circles are frozen, squares train in full, diamonds are the ranks of A and B."""
    pairs = [(point, n in s.module.in_full) for s in arrangement.strips for n, point in enumerate(s.points)]
    style = {"facecolor": FROZEN, "edgecolor": EDGE, "linewidth": 0.3}
    _circles(axis, [point for point, full in pairs if not full], arrangement, **style)
    full = [point for point, in_full in pairs if in_full]
    diamonds = [place for strip in arrangement.strips for place in _diamonds(strip)]
    marker = {"linestyle": "", "markeredgecolor": INK, "markeredgewidth": 0.3}
    axis.plot([], [], "o", markersize=3.5, color=FROZEN, markeredgewidth=0.4, markeredgecolor=EDGE, label="frozen")
    if full:
        axis.plot(*zip(*full, strict=True), marker="s", markersize=2.6, color=RED, label="trained in full", **marker)
    if diamonds:
        axis.plot(*zip(*diamonds, strict=True), marker="D", markersize=3.6, color=GREEN, label="A and B", **marker)
    axis.set_title("(b) LoRA: trainable parts")


def _diamonds(strip: Strip) -> list[Point]:
    """One for each rank, up to `MAX_DIAMONDS`, above the module."""
    count = min(strip.module.rank, MAX_DIAMONDS)
    x, y = strip.above
    step = min(3.0, strip.columns / count) if count else 0
    return [(x + step * (n - (count - 1) / 2), y) for n in range(count)]


def _draw_concentration(axis: Any, squares: Mapping[str, Tensor]) -> None:
    for name, (line, color) in LINES.items():
        shares = cumulative_shares(squares[name]).numpy()
        x = np.arange(1, len(shares) + 1) / len(shares)
        every = max(1, len(x) // 400)
        axis.plot(100 * x[::every], 100 * shares[::every], line, color=color, label=name)
        at = max(1, round(0.1 * len(shares))) - 1
        axis.plot(100 * x[at], 100 * shares[at], "o", color=color, markersize=4)
    fractions = np.linspace(1e-4, 1 - 1e-9, 200)
    axis.plot(
        100 * fractions, [100 * held_if_normal(float(part)) for part in fractions], ":", color=EDGE, label="if normal"
    )
    axis.axvline(10, color=INK, linewidth=0.5)
    axis.set(xlabel="% of them, largest change first", ylabel="% of ‖ΔW‖²", xlim=(0, 100), ylim=(0, 102))
    axis.set_title("(c) Concentration of the change")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def _draw_modules(axis: Any, table: Table) -> None:
    """Each matrix's share of the weights and of the change, in the table's order from the bottom."""
    names = [str(r["module"]) if r["block"] is None else f"{r['block']}: {r['module']}" for r in table.rows]
    y = np.arange(len(names))
    for key, label, shift, style in (
        ("share_of_weights", "of the weights", 0.2, {"color": FROZEN, "edgecolor": EDGE, "hatch": HATCH}),
        ("share_of_change", "of ‖ΔW‖²", -0.2, {"color": RED}),
    ):
        axis.barh(y + shift, [100 * float(str(row[key])) for row in table.rows], 0.4, label=label, **style)
    axis.set_yticks(y, names, fontsize=SMALL)
    axis.set(xlabel="%", ylim=(-0.6, len(names) - 0.4))
    axis.set_title("(d) Share by matrix")
    axis.legend(loc="best")
    axis.grid(axis="x", alpha=0.3)
