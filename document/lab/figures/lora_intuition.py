"""Figure 4: W, W + ΔW and W + BA (the best of rank 1) as ellipses, for an example and as measured
(§2.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lab.figures import Figures
from lab.measures import changes, module_name
from lab.report import (
    BLUE,
    EDGE,
    GREEN,
    HATCHED,
    INK,
    RED,
    SMALL,
    WIDE,
    Axis,
    Figure,
    Findings,
)
from lab.tables import Row, Table, shown
from pipeline.calc.target_modules import matches_suffix
from pipeline.errors import UserError
from pipeline.project.runner import Job

PLACE = "Figure 4, §2.3"
POINTS, ARROWS = 73, 12
BARS = 16  # singular values drawn
Matrix = npt.NDArray[np.float64]


def best_of_rank(change: Matrix, rank: int) -> Matrix:
    """σ₁u₁v₁ᵀ + … + σᵣuᵣvᵣᵀ, the matrix of rank r nearest to ΔW (Eckart & Young 1936)."""
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    best: Matrix = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


def share_of_rank(values: Sequence[float], rank: int) -> float:
    """The share of ‖ΔW‖² in its best approximation of rank r: Σσᵢ² of the first r values over all;
    1 if ΔW = 0.
    """
    squares = np.square(values)
    return float(squares[:rank].sum() / squares.sum()) if squares.sum() else 1.0


@dataclass(frozen=True)
class Plane:
    """W and ΔW as 2 × 2 matrices; `values`: all singular values of the full ΔW, at least two."""

    name: str
    weight: Matrix
    change: Matrix
    values: tuple[float, ...]

    @classmethod
    def of(cls, name: str, weight: Matrix, change: Matrix) -> "Plane":
        """Project W and ΔW onto the first two right (inputs) and left (outputs) singular vectors of
        ΔW.

        ΔW becomes diag(σ₁, σ₂). Signs are fixed so that the largest entry of each left vector is
        positive.
        """
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))])
        u, vt = (u * signs)[:, :2], (vt * signs[:, None])[:2]
        return cls(name, u.T @ weight @ vt.T, np.diag(s[:2]), tuple(map(float, s)))

    @classmethod
    def example(cls, name: str, weight: Sequence[float], change: Sequence[float]) -> "Plane":
        """From four numbers each, row by row."""
        w, d = (np.array(numbers, dtype=np.float64).reshape(2, 2) for numbers in (weight, change))
        return cls(name, w, d, tuple(map(float, np.linalg.svd(d, compute_uv=False))))

    @property
    def update(self) -> Matrix:
        """BA: the best approximation of ΔW of rank 1."""
        return best_of_rank(self.change, 1)

    @property
    def ratio(self) -> float:
        """σ₂/σ₁: the largest distance between the two ellipses, relative to how far ΔW moves a
        point; 0 if ΔW = 0.
        """
        first, second = self.values[:2]
        return second / first if first else 0.0


def circle(points: int) -> Matrix:
    """Unit vectors (2, points); the last equals the first."""
    angles = np.linspace(0, 2 * np.pi, points)
    return np.stack((np.cos(angles), np.sin(angles)))


def farthest(plane: Plane) -> tuple[Matrix, Matrix]:
    """(W + ΔW)x and (W + BA)x where they are farthest apart for |x| = 1: at x = v₂, with distance
    σ₂.
    """
    x = np.linalg.svd(plane.change)[2][1]
    return (plane.weight + plane.change) @ x, (plane.weight + plane.update) @ x


def render(job: Job) -> Findings:
    """Raises UserError if figures.module does not name exactly one matrix."""
    settings = job.project.params.of(Figures)
    changed = [parameter for parameter in changes(job) if parameter.change.ndim == 2]
    named = [
        parameter for parameter in changed if matches_suffix(parameter.module, settings.module)
    ]
    if len(named) != 1:
        matched = "no matrix" if not named else f"{named[0].module} and {named[1].module}"
        raise UserError(
            "figures.module must be the end of one module's name, such as "
            "layers.0.self_attn.v_proj, got "
            f"{settings.module!r}, which matches {matched}. Name one."
        )
    example = Plane.example("example", settings.weight, settings.change)
    planes = {
        parameter: Plane.of("measured", parameter.before.numpy(), parameter.change.numpy())
        for parameter in changed
    }
    measured = planes[named[0]]
    rows = [_row(example, None, "", drawn=True)]
    rows += [_row(plane, p.block, p.last, drawn=p is named[0]) for p, plane in planes.items()]
    x, points = circle(POINTS), list[Row]()
    for plane in (example, measured):
        maps = {
            "pretrained": plane.weight,
            "full": plane.weight + plane.change,
            "lora": plane.weight + plane.update,
        }
        images = {"input": x, **{name: matrix @ x for name, matrix in maps.items()}}
        points += [
            {
                "case": plane.name,
                **{
                    f"{name}_{axis}": float(at[i, n])
                    for name, at in images.items()
                    for i, axis in enumerate("xy")
                },
            }
            for n in range(POINTS)
        ]
    title = (
        "Share of ‖ΔW‖² in the best update of rank 1, 4 and 8, and σ₂/σ₁: the largest distance of "
        "the ellipses"
    )
    tables = (
        Table(
            "lora_intuition",
            title,
            rows,
            {"ratio": ".2f", "rank_1": ".0%", "rank_4": ".0%", "rank_8": ".0%"},
        ),
        Table("lora_intuition_points", "The circle and its three images", points),
    )
    shows = "; ".join(
        f"{plane.name}: rank 1 has {share_of_rank(plane.values, 1):.0%} of ‖ΔW‖², ellipses up to "
        f"{plane.ratio:.2f} σ₁ apart"
        for plane in (example, measured)
    )
    name = module_name(named[0].block, named[0].last)
    text = _text(example, measured, named[0].module, rows[1:])
    return Findings(
        text,
        tables,
        lambda figure: _draw(figure, example, measured, name),
        (WIDE, 4.4),
        shows,
        "LoRA as a geometric correction in two dimensions",
    )


def _row(plane: Plane, block: int | None, module: str, drawn: bool) -> Row:
    """`drawn`: whether it is in the figure."""
    own = {"case": plane.name, "block": block, "module": module, "drawn": drawn}
    sigmas = {"sigma_1": plane.values[0], "sigma_2": plane.values[1], "ratio": plane.ratio}
    return {
        **own,
        **sigmas,
        **{f"rank_{rank}": share_of_rank(plane.values, rank) for rank in (1, 4, 8)},
    }


def _text(example: Plane, measured: Plane, module: str, rows: Sequence[Row]) -> str:
    shares = {module_name(row["block"], row["module"]): row["rank_1"] for row in rows}
    least, most = (pick(shares, key=lambda name: shares[name]) for pick in (min, max))
    weight_norm = float(np.linalg.svd(measured.weight, compute_uv=False)[0])
    paragraphs = (
        "The unit circle of inputs x and its images under three maps: Wx, (W + ΔW)x, and (W + "
        "BA)x, where BA is the best update of rank 1 (by singular value decomposition). Arrows are "
        f"BAx. Top: a 2 × 2 example. Bottom: the ΔW of {module} from full fine-tuning, in its "
        "first two pairs of singular vectors.",
        "The document says that even rank 1 closely approximates full fine-tuning. That depends on "
        "the second singular value: the two images of a point of the circle are at most σ₂ apart, "
        f"and σ₂ is reached. In the example σ₂/σ₁ = {example.ratio:.3f} and rank 1 has "
        f"{share_of_rank(example.values, 1):.1%} of ‖ΔW‖²: the ellipses differ by at most "
        f"{example.values[1]:.3f}, while full fine-tuning moves a point by up to "
        f"{example.values[0]:.3f}.",
        f"Measured, σ₂/σ₁ = {measured.ratio:.2f}: rank 1 has "
        f"{share_of_rank(measured.values[:2], 1):.0%} of ‖ΔW‖² in this plane and "
        f"{share_of_rank(measured.values, 1):.0%} of the full ‖ΔW‖², rank 4 "
        f"{share_of_rank(measured.values, 4):.0%}. In this plane |Wx| is at most {weight_norm:.2f} "
        f"and |ΔWx| at most {measured.values[0]:.2f}. Over all matrices the share of rank 1 ranges "
        f"from {shares[least]:.0%} ({least}) to {shares[most]:.0%} ({most}).",
    )
    return "\n\n".join(paragraphs)


def _draw(figure: Figure, example: Plane, measured: Plane, module: str) -> None:
    """A row of panels for each plane: the three maps, and the singular values."""
    axes = figure.subplots(2, 4, width_ratios=(1, 1, 1, 0.85))
    for row, plane, name in zip(axes, (example, measured), ("example", module), strict=True):
        _draw_plane(row[:3], plane)
        _draw_values(row[3], plane.values)
        row[0].set_ylabel(name)
    for axis, title in zip(
        axes[0], ("W (frozen)", "W + ΔW (full)", "W + BA (LoRA, r = 1)", "σ of ΔW"), strict=True
    ):
        axis.set_title(title, loc="center")


def _draw_plane(axes: Sequence[Axis], plane: Plane) -> None:
    """Three panels with the same scale. A circle larger than its images is shrunk to their size."""
    x, w = circle(POINTS), plane.weight
    before, target, reached = w @ x, (w + plane.change) @ x, (w + plane.update) @ x
    reach = max(np.abs(part).max() for part in (before, target, reached))
    radius = min(1.0, float(reach))
    left, centre, right = axes
    left.plot(
        *radius * x,
        "--",
        color=EDGE,
        linewidth=0.9,
        label="x" if radius == 1 else f"{radius:.2g} x",
    )
    left.plot(*before, color=BLUE, label="Wx")
    centre.plot(*before, color=BLUE, linewidth=0.6)
    centre.plot(*target, "--", color=RED, label="(W + ΔW)x")
    right.plot(*before, color=BLUE, linewidth=0.6)
    right.plot(*target, "--", color=RED, linewidth=0.9)
    right.plot(*reached, "-.", color=GREEN, label="(W + BA)x")
    starts = circle(ARROWS + 1)[:, :-1]
    heads = {"width": 0.009, "headwidth": 4, "headlength": 4}
    scale = {"angles": "xy", "scale_units": "xy", "scale": 1}
    right.quiver(*w @ starts, *plane.update @ starts, color=GREEN, **scale, **heads)
    right.plot(
        *zip(*farthest(plane), strict=True),
        "-",
        color=INK,
        linewidth=1.6,
        label=f"{plane.values[1]:.2g} apart",
    )
    for axis in axes:
        axis.set(
            xlim=(-1.08 * reach, 1.08 * reach), ylim=(-1.08 * reach, 1.08 * reach), aspect="equal"
        )
        axis.set(xticks=[], yticks=[])
        axis.axhline(0, color=EDGE, linewidth=0.3)
        axis.axvline(0, color=EDGE, linewidth=0.3)
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            frameon=False,
            handlelength=2.2,
            labelspacing=0.2,
        )


def _draw_values(axis: Axis, all_values: Sequence[float]) -> None:
    values = all_values[:BARS]
    axis.bar([1], values[:1], 0.7, color=GREEN)
    axis.bar(range(2, len(values) + 1), values[1:], 0.7, **HATCHED)
    axis.set(xlabel="index", ylim=(0, 1.3 * values[0] or 1), xlim=(0.3, max(len(values), 4) + 0.7))
    axis.set_xticks([tick for tick in (1, 2, 4, 8, 16) if tick <= len(values)])
    axis.locator_params(axis="y", nbins=4)
    share = shown(share_of_rank(all_values, 1), ".0%")
    axis.text(
        0.97,
        0.97,
        f"rank 1: {share}\nof ‖ΔW‖²",
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=SMALL,
    )
