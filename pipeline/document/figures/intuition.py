"""Figure 4: W, W + ΔW and W + BA (the best of rank 1) as ellipses, for an example and as measured (§2.3)."""

from typing import Any

import numpy as np

from pipeline.calc.target_modules import matches_suffix
from pipeline.document.figures.data.changes import Changed, block_and_name, changes, matrices
from pipeline.document.figures.data.eckart_young import Plane, circle, farthest, share_of_rank
from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import BLUE, EDGE, FROZEN, GREEN, HATCH, INK, RED, SMALL, WIDE
from pipeline.document.params import Figures
from pipeline.document.studies.shared.report import Figure
from pipeline.document.tables import Row, Table, shown
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.models.base import CausalLM
from pipeline.project.runner import Job

NAME = "lora_intuition"
EXAMPLE, MEASURED = "example", "measured"
POINTS, ARROWS = 73, 12
BARS = 16  # singular values drawn
FORMATS = {"ratio": ".2f", "rank_1": ".0%", "rank_4": ".0%", "rank_8": ".0%"}


def lora_intuition(job: Job) -> RenderedFigure:
    """Figure 4. Raises UserError if figures.module does not name exactly one matrix."""
    settings = job.project.params.of(Figures)
    model = engine.load(job.project.artifact("expand_vocab")).model
    by_module = {parameter.module: parameter for parameter in matrices(changes(job))}
    module = _resolve_module(settings.module, by_module)
    example = Plane.example(EXAMPLE, settings.weight, settings.change)
    measured = Plane.of(MEASURED, *_weight_and_change(by_module[module]))
    planes = (example, measured)
    table = _table(example, module, by_module, model)
    return RenderedFigure(
        NAME,
        "Figure 4, §2.3",
        "LoRA as a geometric correction in two dimensions",
        _summary(planes),
        _caption(planes, module, table),
        (table, _points(planes)),
        lambda figure: _draw(figure, planes, _title(module, model)),
        (WIDE, 4.4),
    )


def _resolve_module(suffix: str, by_module: dict[str, Changed]) -> str:
    """The full name of the only matrix whose name ends in `suffix`."""
    matches = [name for name in by_module if matches_suffix(name, suffix)]
    if len(matches) != 1:
        matched = "no matrix" if not matches else f"{matches[0]} and {matches[1]}"
        raise UserError(
            f"figures.module must be the end of one module's name, such as layers.0.self_attn.v_proj, got {suffix!r}, "
            f"which matches {matched}. Name one."
        )
    return matches[0]


def _weight_and_change(parameter: Changed) -> tuple[Any, Any]:
    return parameter.before.numpy(), parameter.change.numpy()


def _title(module: str, model: CausalLM) -> str:
    block, name = block_and_name(module, model)
    return name if block is None else f"{name} of block {block}"


def _table(example: Plane, module: str, by_module: dict[str, Changed], model: CausalLM) -> Table:
    """A row for the example and one for every matrix; `drawn` marks the one in the figure."""
    rows = [_row(example, None, "", drawn=True)]
    for name, parameter in by_module.items():
        block, last = block_and_name(name, model)
        rows.append(_row(Plane.of(MEASURED, *_weight_and_change(parameter)), block, last, drawn=name == module))
    title = "Share of ‖ΔW‖² in the best update of rank 1, 4 and 8, and σ₂/σ₁: the largest distance of the ellipses"
    return Table(NAME, title, rows, FORMATS)


def _row(plane: Plane, block: int | None, module: str, drawn: bool) -> Row:
    first, second = plane.pair
    return {
        "case": plane.name,
        "block": block,
        "module": module,
        "drawn": drawn,
        "sigma_1": first,
        "sigma_2": second,
        "ratio": plane.ratio,
        "rank_1": share_of_rank(plane.values, 1),
        "rank_4": share_of_rank(plane.values, 4),
        "rank_8": share_of_rank(plane.values, 8),
    }


def _points(planes: tuple[Plane, ...]) -> Table:
    """Points x of the unit circle and their images under the three maps."""
    x = circle(POINTS)
    rows: list[Row] = []
    for plane in planes:
        maps = {"pretrained": plane.weight, "full": plane.weight + plane.change, "lora": plane.weight + plane.update}
        images = {"input": x, **{name: matrix @ x for name, matrix in maps.items()}}
        for n in range(POINTS):
            coordinates = {
                f"{name}_{axis}": float(image[i, n]) for name, image in images.items() for i, axis in enumerate("xy")
            }
            rows.append({"case": plane.name, **coordinates})
    return Table(f"{NAME}_points", "The circle and its three images", rows)


def _describe(plane: Plane) -> str:
    return f"rank 1 has {share_of_rank(plane.values, 1):.0%} of ‖ΔW‖², ellipses up to {plane.ratio:.2f} σ₁ apart"


def _summary(planes: tuple[Plane, ...]) -> str:
    return "; ".join(f"{plane.name}: {_describe(plane)}" for plane in planes)


def _caption(planes: tuple[Plane, ...], module: str, table: Table) -> str:
    example, measured = planes
    return "\n\n".join(
        [
            "The unit circle of inputs x and its images under three maps: Wx, (W + ΔW)x, and (W + BA)x, where BA is "
            "the best update of rank 1 (by singular value decomposition). Arrows are BAx. Top: a 2 × 2 example. "
            f"Bottom: the ΔW of {module} from full fine-tuning, in its first two pairs of singular vectors.",
            "The document says that even rank 1 closely approximates full fine-tuning. That depends on the second "
            "singular value: the two images of a point of the circle are at most σ₂ apart, and σ₂ is reached. In "
            f"the example σ₂/σ₁ = {example.ratio:.3f} and rank 1 has {share_of_rank(example.values, 1):.1%} of ‖ΔW‖²: "
            f"the ellipses differ by at most {example.pair[1]:.3f}, while full fine-tuning moves a point by up "
            f"to {example.pair[0]:.3f}.",
            _describe_measured(measured, table),
        ]
    )


def _describe_measured(plane: Plane, table: Table) -> str:
    shares = {_module_name(row): float(str(row["rank_1"])) for row in table.rows if row["case"] == MEASURED}
    least, most = (pick(shares, key=lambda name: shares[name]) for pick in (min, max))
    weight_norm = float(np.linalg.svd(plane.weight, compute_uv=False)[0])
    return (
        f"Measured, σ₂/σ₁ = {plane.ratio:.2f}: rank 1 has {share_of_rank(plane.pair, 1):.0%} of ‖ΔW‖² in this plane "
        f"and {share_of_rank(plane.values, 1):.0%} of the full ‖ΔW‖², rank 4 {share_of_rank(plane.values, 4):.0%}. "
        f"In this plane |Wx| is at most {weight_norm:.2f} and |ΔWx| at most {plane.pair[0]:.2f}. Over all matrices "
        f"the share of rank 1 ranges from {shares[least]:.0%} ({least}) to {shares[most]:.0%} ({most})."
    )


def _module_name(row: Row) -> str:
    return str(row["module"]) if row["block"] is None else f"{row['module']} of block {row['block']}"


def _draw(figure: Figure, planes: tuple[Plane, ...], module: str) -> None:
    axes = figure.subplots(2, 4, width_ratios=(1, 1, 1, 0.85))
    for row, plane, name in zip(axes, planes, ("example", module), strict=True):
        _draw_plane(row[:3], plane)
        _draw_values(row[3], plane)
        row[0].set_ylabel(name)
    for axis, title in zip(axes[0], ("W (frozen)", "W + ΔW (full)", "W + BA (LoRA, r = 1)", "σ of ΔW"), strict=True):
        axis.set_title(title, loc="center")


def _draw_plane(axes: Any, plane: Plane) -> None:
    """Three panels with the same scale. A circle larger than its images is shrunk to their size."""
    x, w = circle(POINTS), plane.weight
    before, target, reached = w @ x, (w + plane.change) @ x, (w + plane.update) @ x
    reach = max(np.abs(part).max() for part in (before, target, reached))
    radius = min(1.0, float(reach))
    left, centre, right = axes
    left.plot(*radius * x, "--", color=EDGE, linewidth=0.9, label="x" if radius == 1 else f"{radius:.2g} x")
    left.plot(*before, color=BLUE, label="Wx")
    centre.plot(*before, color=BLUE, linewidth=0.6)
    centre.plot(*target, "--", color=RED, label="(W + ΔW)x")
    right.plot(*before, color=BLUE, linewidth=0.6)
    right.plot(*target, "--", color=RED, linewidth=0.9)
    right.plot(*reached, "-.", color=GREEN, label="(W + BA)x")
    _draw_arrows(right, plane)
    right.plot(*zip(*farthest(plane), strict=True), "-", color=INK, linewidth=1.6, label=f"{plane.pair[1]:.2g} apart")
    for axis in axes:
        axis.set(xlim=(-1.08 * reach, 1.08 * reach), ylim=(-1.08 * reach, 1.08 * reach), aspect="equal")
        axis.set(xticks=[], yticks=[])
        axis.axhline(0, color=EDGE, linewidth=0.3)
        axis.axvline(0, color=EDGE, linewidth=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False, handlelength=2.2, labelspacing=0.2)


def _draw_arrows(axis: Any, plane: Plane) -> None:
    x = circle(ARROWS + 1)[:, :-1]
    starts, moves = plane.weight @ x, plane.update @ x
    heads = {"width": 0.009, "headwidth": 4, "headlength": 4}
    axis.quiver(*starts, *moves, angles="xy", scale_units="xy", scale=1, color=GREEN, **heads)


def _draw_values(axis: Any, plane: Plane) -> None:
    values = plane.values[:BARS]
    axis.bar([1], values[:1], 0.7, color=GREEN)
    axis.bar(range(2, len(values) + 1), values[1:], 0.7, color=FROZEN, edgecolor=EDGE, hatch=HATCH)
    axis.set(xlabel="index", ylim=(0, 1.3 * values[0] or 1), xlim=(0.3, max(len(values), 4) + 0.7))
    axis.set_xticks([tick for tick in (1, 2, 4, 8, 16) if tick <= len(values)])
    axis.locator_params(axis="y", nbins=4)
    share = shown(share_of_rank(plane.values, 1), ".0%")
    axis.text(0.97, 0.97, f"rank 1: {share}\nof ‖ΔW‖²", transform=axis.transAxes, ha="right", va="top", fontsize=SMALL)
