"""Figure 1: which neurons full fine-tuning changes, how concentrated the change is, and what LoRA
trains (§2).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.measures import Changed, changes, module_name
from lab.report import (
    BLUE,
    EDGE,
    FROZEN,
    GREEN,
    HATCHED,
    INK,
    ORANGE,
    RED,
    SMALL,
    WIDE,
    Axis,
    Figure,
    Findings,
)
from lab.tables import Row, Table, shown
from pipeline.adapters.attach import targeted
from pipeline.adapters.config import AdapterSpec, lies_in, read_spec
from pipeline.calc.target_modules import HEAD
from pipeline.inference import engine
from pipeline.project.runner import Job

PLACE = "Figure 1, §2"
LINES = {"weights": ("-", RED), "weights of the blocks": ("-.", ORANGE), "neurons": ("--", BLUE)}
LITTLE_TO_MUCH = ("#D5E4F0", "#E69F00", "#7A1B00")  # light to dark, so that it works in grayscale
SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj")  # they read the same input
MAX_COLUMNS, SHARED_ROWS = 64, 4  # of a strip alone in its level; rows of a strip beside others
GAP, BETWEEN = 3.0, 2.0  # in cells: between levels, and between the strips of a level
SPOT = 2.9  # diameter in points, if the widest level has `MAX_COLUMNS` cells
MAX_DIAMONDS = 8
TICKS = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5))
Point = tuple[float, float]


@dataclass(frozen=True)
class Matrix(Changed):
    """A changed matrix; the rank of its A and B (0: none), and the neurons that train in full with
    the adapter.
    """

    rank: int = 0
    in_full: frozenset[int] = frozenset()


def render(job: Job) -> Findings:
    """Raises UserError if the adapter's config does not fit the model."""
    model = engine.load(job.project.artifact("expand_vocab")).model
    changed, spec = (
        changes(job),
        read_spec(job.project.artifact("finetune_lora"), model.embedding_and_head[0]),
    )
    adapted = targeted(model, spec)
    drawn = [
        Matrix(
            **vars(m),
            rank=spec.rank_of(m.module) if m.module in adapted else 0,
            in_full=frozenset(_rows_in_full(spec, m.module, len(m.change))),
        )
        for m in changed
        if m.change.ndim == 2
    ]

    # How concentrated the change is: in all weights, in those of the blocks, and in neurons.
    of_all = {parameter.name: parameter.change.flatten().square() for parameter in changed}
    squares = {
        "weights": torch.cat([*of_all.values()]),
        "weights of the blocks": torch.cat(
            [of_all[p.name] for p in changed if p.block is not None]
        ),
        "neurons": torch.cat([matrix.change.square().sum(1) for matrix in drawn]),  # (O, I) → (O,)
    }
    concentration: list[Row] = [
        {
            "part": name,
            "count": len(of_part),
            "moved": float((of_part > 0).double().mean()),
            "top_1": held_by(of_part, 0.01),
            "top_10": held_by(of_part, 0.1),
            "needed_for_90": needed_for(of_part, 0.9),
        }
        for name, of_part in squares.items()
    ]
    held = {
        "top_1": held_if_normal(0.01),
        "top_10": held_if_normal(0.1),
        "needed_for_90": needed_if_normal(0.9),
    }
    concentration.append({"part": "normal", "count": None, "moved": 1.0, **held})

    # The change by matrix and by neuron.
    modules = _module_rows(changed, drawn, squares["weights"])
    neurons: list[Row] = [
        {
            "block": m.block,
            "module": m.last,
            "neuron": n,
            "change": size,
            "relative_change": relative,
        }
        for m in drawn
        for n, (size, relative) in enumerate(
            zip(m.change.norm(dim=1).tolist(), m.relative.tolist(), strict=True)
        )
    ]
    formats = {"part": "", "moved": ".1%", "top_1": ".0%", "top_10": ".0%", "needed_for_90": ".1%"}
    of_modules = {
        "share_of_weights": ".1%",
        "share_of_change": ".1%",
        "relative_change": ".3f",
        "moved": ".1%",
    }
    name = "finetuning_subspace"
    title = (
        "Share of ‖ΔW‖² in those that change most; *normal*: if all changes followed one normal "
        "distribution"
    )
    by_matrix = "Each matrix: its change by full fine-tuning, and what the adapter trains"
    tables = (
        Table(f"{name}_concentration", title, concentration, formats),
        Table(f"{name}_modules", by_matrix, modules, of_modules),
        Table(name, "Every neuron: ‖Δw‖ and ‖Δw‖/‖w‖ of its row", neurons),
    )

    # In words, with the numbers of the tables.
    parts = {row["part"]: {key: shown(row[key], ".0%") for key in held} for row in concentration}
    top = {part: row["top_10"] for part, row in parts.items()}
    moved = concentration[0]["moved"]
    shows = (
        f"{moved:.0%} of all weights move; the tenth that moves most has {top['weights']} of ‖ΔW‖² "
        f"({top['normal']} if normal), of neurons {top['neurons']}"
    )
    most = max(modules, key=lambda row: row["share_of_change"])
    ranks = " and ".join(map(str, sorted({row["lora_rank"] for row in modules} - {0})))
    in_full = [
        module
        for module in model.embedding_and_head
        if _rows_in_full(spec, module, model.shape.rows)
    ]
    also = (
        f" It also trains rows of {' and '.join(in_full)} in full: the base is not entirely frozen."
        if in_full
        else ""
    )
    paragraphs = (
        "Left: every neuron of MiniGPT (a row of a matrix), colored by its relative change "
        "‖Δw‖/‖w‖ in full "
        "fine-tuning. Right: what the adapter trains instead, according to its config.",
        f"The document says that only a small subset changes significantly. Measured: {moved:.1%} "
        "of the weights change, because Adam moves every weight with a gradient. They do not "
        f"change equally: the top tenth has {top['weights']} of ‖ΔW‖², against {top['normal']} if "
        "all changes followed one normal distribution; the top tenth of the neurons has "
        f"{top['neurons']}. 90% of ‖ΔW‖² takes {parts['weights']['needed_for_90']} of the weights "
        f"(normal: {parts['normal']['needed_for_90']}). The module with the largest share is "
        f"{module_name(most['block'], most['module'])}, with {most['share_of_weights']:.0%} of the "
        f"weights and {most['share_of_change']:.0%} of ‖ΔW‖². Among the weights of the blocks, "
        f"where LoRA is applied, the top tenth has {top['weights of the blocks']} of their ‖ΔW‖².",
        f"The adapter has A and B of rank {ranks} on {len(adapted)} matrices.{also}",
    )
    size = (WIDE, sum(_heights(drawn)))
    draw = Drawing(drawn, squares, modules).draw
    return Findings(
        "\n\n".join(paragraphs), tables, draw, size, shows, "From observation to strategy"
    )


def _rows_in_full(spec: AdapterSpec, module: str, rows: int) -> Sequence[int]:
    """The rows of the module's weight that train in full."""
    return (
        range(rows) if lies_in(module, spec.saved) else spec.rows.get(module.rsplit(".", 1)[-1], ())
    )


def _module_rows(
    changed: Sequence[Changed], drawn: Sequence[Matrix], all_squares: Tensor
) -> list[Row]:
    """One row per matrix; the last row is all vectors (biases and norms) together."""
    total, vectors = (
        float(all_squares.sum()),
        [parameter for parameter in changed if parameter.change.ndim == 1],
    )
    before, change = (
        torch.cat([getattr(vector, key) for vector in vectors]) for key in ("before", "change")
    )
    return [
        {
            "block": m.block,
            "module": m.last,
            "weights": m.change.numel(),
            "share_of_weights": m.change.numel() / len(all_squares),
            "share_of_change": float(m.change.square().sum()) / total,
            "relative_change": float(m.change.norm() / m.before.norm()),
            "moved": float((m.change != 0).double().mean()),
            "lora_rank": m.rank,
            "rows_in_full": len(m.in_full),
        }
        for m in (*drawn, Matrix("biases and norms", None, before, change))
    ]


def cumulative_shares(squares: Tensor) -> Tensor:
    """Cumulative shares of Σ squares, the largest first: (n,) → (n,)."""
    sums = squares.sort(descending=True).values.cumsum(0)
    return sums / sums[-1]


def held_by(squares: Tensor, part: float) -> float:
    """The share of Σ squares in the largest `part` of them."""
    return float(cumulative_shares(squares)[max(1, round(part * len(squares))) - 1])


def needed_for(squares: Tensor, share: float) -> float:
    """The smallest part of the squares whose sum is at least `share` of the total."""
    return int((cumulative_shares(squares) < share).sum() + 1) / len(squares)


def held_if_normal(part: float) -> float:
    """`held_by` for normally distributed changes: 2(qφ(q) + 1 − Φ(q)), where a `part` of all
    changes exceeds ±q.

    It is 44% for a tenth, so a share of 44% is no sign of concentration.
    """
    normal = NormalDist()
    q = normal.inv_cdf(1 - part / 2)
    return 2 * (q * normal.pdf(q) + 1 - normal.cdf(q))


def needed_if_normal(share: float) -> float:
    """`needed_for` for normally distributed changes, by bisection."""
    low, high = 1e-12, 1.0
    for _ in range(60):  # 2⁻⁶⁰ is below a float's precision
        middle = (low + high) / 2
        low, high = (middle, high) if held_if_normal(middle) < share else (low, middle)
    return high


def ramp() -> Any:
    """matplotlib's color map from light blue over orange to dark red."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("little to much", LITTLE_TO_MUCH)


def _levels(drawn: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """The levels from the embedding to the head; q, k and v of a block share one."""
    outside = [matrix for matrix in drawn if matrix.block is None]
    yield from ([matrix] for matrix in outside if matrix.last != HEAD)
    in_blocks = (matrix for matrix in drawn if matrix.block is not None)
    for _, block in groupby(in_blocks, lambda matrix: matrix.block):
        members = list(block)
        shared = [matrix for name in SIDE_BY_SIDE for matrix in members if matrix.last == name]
        yield from ([shared] if shared else [])
        yield from ([matrix] for matrix in members if matrix.last not in SIDE_BY_SIDE)
    yield from ([matrix] for matrix in outside if matrix.last == HEAD)


def _heights(drawn: Sequence[Matrix]) -> tuple[float, float]:
    """Heights in inches of the networks and of the panels below, which have one line per matrix and
    one for vectors.
    """
    return 0.336 * len(list(_levels(drawn))), 0.6 + 0.11 * (len(drawn) + 1)


class Drawing:
    """Four panels: the change, the strategy, the concentration of the change, and its share by
    matrix.

    A neuron is a cell of size 1 in its matrix's strip. Strips stand in levels from the input
    (bottom) to the output, each level centered at x = 0.
    """

    def __init__(
        self, drawn: Sequence[Matrix], squares: Mapping[str, Tensor], modules: Sequence[Row]
    ) -> None:
        self.drawn, self.squares, self.modules = drawn, squares, modules
        # position, relative change, whether it trains in full
        self.neurons: list[tuple[Point, float, bool]] = []
        self.diamonds: list[Point] = []  # one for each rank of A and B, in the gap above the strip
        self.ticks: list[tuple[float, str]] = []  # y and label of each level
        self.width, self.height = float(MAX_COLUMNS), 0.0
        for level in _levels(drawn):
            self._place(level)

    def _place(self, level: Sequence[Matrix]) -> None:
        """Add a level on top of the others."""
        sizes = [len(matrix.change) for matrix in level]
        rows, y = SHARED_ROWS if len(level) > 1 else -(-sizes[0] // MAX_COLUMNS), self.height
        widths = [-(-size // rows) for size in sizes]
        level_width = sum(widths) + BETWEEN * (len(level) - 1)
        x, self.width = (1 - level_width) / 2, max(self.width, level_width)
        for matrix, columns in zip(level, widths, strict=True):
            # the first neuron at the top left
            for n, relative in enumerate(matrix.relative.tolist()):
                at = (x + n % columns, y + rows - 1 - n // columns)
                self.neurons.append((at, relative, n in matrix.in_full))
            count = min(matrix.rank, MAX_DIAMONDS)
            middle, step = x + (columns - 1) / 2, min(3.0, columns / count) if count else 0
            self.diamonds += [
                (middle + step * (n - (count - 1) / 2), y + rows - 1 + GAP / 2)
                for n in range(count)
            ]
            x += columns + BETWEEN
        names = [matrix.last for matrix in level]
        name = (
            names[0] if len(level) == 1 else ", ".join(name.removesuffix("_proj") for name in names)
        )
        block = level[0].block
        self.ticks.append((y + (rows - 1) / 2, name if block is None else f"block {block}: {name}"))
        self.height += rows - 1 + GAP + 0.5

    def draw(self, figure: Figure) -> None:
        above, below = figure.subfigures(2, 1, height_ratios=_heights(self.drawn))
        (left, right), (key, legend) = above.subplots(2, 2, height_ratios=(1, 0.035))
        colored = self._draw_change(left)
        bar = above.colorbar(colored, cax=key, location="bottom", extend="both", format="%g")
        bar.set_label("‖Δw‖ / ‖w‖ of a neuron; hollow: unchanged")
        bar.set_ticks(
            [tick for tick in TICKS if colored.norm.vmin <= tick <= colored.norm.vmax], minor=False
        )
        bar.ax.minorticks_off()
        self._draw_strategy(right)
        legend.set_axis_off()
        legend.legend(
            *right.get_legend_handles_labels(),
            loc="center",
            ncols=3,
            frameon=False,
            columnspacing=1.2,
        )
        half = self.width / 2 + 0.5
        for axis in (left, right):
            axis.set(
                xlim=(-half, half), ylim=(-1, self.height - 1), aspect="equal", xticks=[], yticks=[]
            )
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
        left.set_yticks([y for y, _ in self.ticks], [name for _, name in self.ticks])
        first, second = below.subplots(1, 2)
        self._draw_concentration(first)
        self._draw_modules(second)

    def _circles(self, axis: Axis, points: Sequence[Point], **style: Any) -> Any:
        # in points², in a panel of half a page's width
        area = (SPOT * MAX_COLUMNS / self.width) ** 2
        return axis.scatter(*zip(*points, strict=True), s=area, **style) if points else None

    def _draw_change(self, axis: Axis) -> Any:
        """Neurons colored by relative change, on a logarithmic scale from the 2nd to the 98th
        percentile.
        """
        from matplotlib.colors import LogNorm

        moved = [(at, relative) for at, relative, _ in self.neurons if relative > 0]
        unchanged = [at for at, relative, _ in self.neurons if relative == 0]
        values = np.array([value for _, value in moved])
        norm = LogNorm(*np.quantile(values, (0.02, 0.98)))
        self._circles(axis, unchanged, facecolor="none", edgecolor=EDGE, linewidth=0.3)
        axis.set_title("(a) Full fine-tuning: change")
        return self._circles(
            axis, [at for at, _ in moved], c=values, cmap=ramp(), norm=norm, linewidth=0
        )

    def _draw_strategy(self, axis: Axis) -> None:
        """Circles are frozen, squares train in full, diamonds are the ranks of A and B."""
        frozen, full = (
            [at for at, _, in_full in self.neurons if in_full == wanted] for wanted in (False, True)
        )
        self._circles(axis, frozen, facecolor=FROZEN, edgecolor=EDGE, linewidth=0.3)
        marker = {"linestyle": "", "markeredgecolor": INK, "markeredgewidth": 0.3}
        axis.plot(
            [],
            [],
            "o",
            markersize=3.5,
            color=FROZEN,
            markeredgewidth=0.4,
            markeredgecolor=EDGE,
            label="frozen",
        )
        if full:
            axis.plot(
                *zip(*full, strict=True),
                marker="s",
                markersize=2.6,
                color=RED,
                label="trained in full",
                **marker,
            )
        if self.diamonds:
            x, y = zip(*self.diamonds, strict=True)
            axis.plot(x, y, marker="D", markersize=3.6, color=GREEN, label="A and B", **marker)
        axis.set_title("(b) LoRA: trainable parts")

    def _draw_concentration(self, axis: Axis) -> None:
        for name, (line, color) in LINES.items():
            shares = cumulative_shares(self.squares[name]).numpy()
            x = np.arange(1, len(shares) + 1) / len(shares)
            # a point for each of 112,768 weights would only make the SVG large
            every = max(1, len(x) // 400)
            axis.plot(100 * x[::every], 100 * shares[::every], line, color=color, label=name)
            tenth = max(1, round(0.1 * len(shares))) - 1
            axis.plot(100 * x[tenth], 100 * shares[tenth], "o", color=color, markersize=4)
        # not 0, where the normal distribution's quantile is infinite
        fractions = np.linspace(1e-4, 1 - 1e-9, 200)
        normal = [100 * held_if_normal(float(part)) for part in fractions]
        axis.plot(100 * fractions, normal, ":", color=EDGE, label="if normal")
        axis.axvline(10, color=INK, linewidth=0.5)
        axis.set(
            xlabel="% of them, largest change first",
            ylabel="% of ‖ΔW‖²",
            xlim=(0, 100),
            ylim=(0, 102),
        )
        axis.set_title("(c) Concentration of the change")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")

    def _draw_modules(self, axis: Axis) -> None:
        """Each matrix's share of the weights and of the change, in the table's order from the
        bottom.
        """
        names = [
            row["module"] if row["block"] is None else f"{row['block']}: {row['module']}"
            for row in self.modules
        ]
        y = np.arange(len(names))
        for key, label, shift, style in (
            ("share_of_weights", "of the weights", 0.2, HATCHED),
            ("share_of_change", "of ‖ΔW‖²", -0.2, {"color": RED}),
        ):
            axis.barh(
                y + shift, [100 * row[key] for row in self.modules], 0.4, label=label, **style
            )
        axis.set_yticks(y, names, fontsize=SMALL)
        axis.set(xlabel="%", ylim=(-0.6, len(names) - 0.4))
        axis.set_title("(d) Share by matrix")
        axis.legend(loc="best")
        axis.grid(axis="x", alpha=0.3)
