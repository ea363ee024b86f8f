"""Figure 4: W, W + ΔW and W + BA as ellipses, with the best BA of rank 1, by example and as measured (§2.3)."""

from typing import Any

import numpy as np

from pipeline.calc.target_modules import matches_suffix
from pipeline.document.figures.data.changes import Changed, changes, last_names, matrices
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
BARS = 16  # singular values that are drawn
FORMS = {"ratio": ".2f", "rank_1": ".0%", "rank_4": ".0%", "rank_8": ".0%"}


def lora_intuition(job: Job) -> RenderedFigure:
    """Figure 4. Raises UserError where figures.module is no matrix, or was not changed."""
    settings = job.project.params.of(Figures)
    model = engine.load(job.project.artifact("expand_vocab")).model
    all_ = {one.module: one for one in matrices(changes(job))}
    module = _meant(settings.module, all_)
    example = Plane.example(EXAMPLE, settings.weight, settings.change)
    measured = Plane.of(MEASURED, *_pair(all_[module]))
    planes = (example, measured)
    table = _table(example, module, all_, model)
    return RenderedFigure(
        NAME,
        "Figure 4, §2.3",
        "LoRA as a geometric correction in two dimensions",
        _shows(planes),
        _caption(planes, module, table),
        (table, _points(planes)),
        lambda figure: _draw(figure, planes, _title(module, model)),
        (WIDE, 4.4),
    )


def _meant(wanted: str, all_: dict[str, Changed]) -> str:
    found = [name for name in all_ if matches_suffix(name, wanted)]
    if len(found) != 1:
        meant = "no matrix" if not found else f"{found[0]} and {found[1]}"
        raise UserError(
            f"figures.module must be the end of one module's name, such as layers.0.self_attn.v_proj, got {wanted!r}, "
            f"which means {meant}. Name one."
        )
    return found[0]


def _pair(one: Changed) -> tuple[Any, Any]:
    return one.before.numpy(), one.change.numpy()


def _title(module: str, model: CausalLM) -> str:
    block, name = last_names(module, model)
    return name if block is None else f"{name} of block {block}"


def _table(example: Plane, module: str, all_: dict[str, Changed], model: CausalLM) -> Table:
    """The example, then every matrix; the one that is drawn is marked."""
    rows = [_row(example, None, "", drawn=True)]
    for name, one in all_.items():
        block, last = last_names(name, model)
        rows.append(_row(Plane.of(MEASURED, *_pair(one)), block, last, drawn=name == module))
    title = "What an update of rank 1, 4 or 8 has of ‖ΔW‖² at best, and σ₂/σ₁: the largest distance of the ellipses"
    return Table(NAME, title, rows, FORMS)


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
    """Each x of the unit circle and where the three maps send it."""
    x = circle(POINTS)
    rows: list[Row] = []
    for plane in planes:
        maps = {"pretrained": plane.weight, "full": plane.weight + plane.change, "lora": plane.weight + plane.update}
        images = {"input": x, **{name: matrix @ x for name, matrix in maps.items()}}
        for n in range(POINTS):
            both = {f"{name}_{axis}": float(of[i, n]) for name, of in images.items() for i, axis in enumerate("xy")}
            rows.append({"case": plane.name, **both})
    return Table(f"{NAME}_points", "The circle and its three images", rows)


def _said(plane: Plane) -> str:
    return f"rank 1 has {share_of_rank(plane.values, 1):.0%} of ‖ΔW‖², ellipses up to {plane.ratio:.2f} σ₁ apart"


def _shows(planes: tuple[Plane, ...]) -> str:
    return "; ".join(f"{plane.name}: {_said(plane)}" for plane in planes)


def _caption(planes: tuple[Plane, ...], module: str, table: Table) -> str:
    example, measured = planes
    return "\n\n".join(
        [
            "A unit circle of inputs x and what three maps make of it: Wx, (W + ΔW)x, and (W + BA)x with the best BA "
            "of rank 1, that of the singular value decomposition. Arrows are BAx. Above a 2 × 2 example; below the ΔW "
            f"that full fine-tuning gave {module}, for inputs and outputs along its first two pairs of singular "
            "vectors.",
            "The document says that even with rank 1 the approximation closely matches full fine-tuning. That depends "
            "on the second singular value: no x of the circle is sent farther apart than σ₂, and some x so far. In "
            f"the example σ₂/σ₁ = {example.ratio:.3f} and rank 1 has {share_of_rank(example.values, 1):.1%} of ‖ΔW‖²: "
            f"there the ellipses differ by at most {example.pair[1]:.3f}, where full fine-tuning moves a point by up "
            f"to {example.pair[0]:.3f}.",
            _measured(measured, table),
        ]
    )


def _measured(plane: Plane, table: Table) -> str:
    shares = {_called(row): float(str(row["rank_1"])) for row in table.rows if row["case"] == MEASURED}
    least, most = (pick(shares, key=lambda name: shares[name]) for pick in (min, max))
    kept = float(np.linalg.svd(plane.weight, compute_uv=False)[0])
    return (
        f"Measured, σ₂/σ₁ = {plane.ratio:.2f}: rank 1 has {share_of_rank(plane.pair, 1):.0%} of ‖ΔW‖² in this plane "
        f"and {share_of_rank(plane.values, 1):.0%} of all of it, rank 4 {share_of_rank(plane.values, 4):.0%}. W itself "
        f"sends this circle no farther than {kept:.2f}, ΔW up to {plane.pair[0]:.2f}. Over all matrices rank 1 has "
        f"from {shares[least]:.0%} ({least}) to {shares[most]:.0%} ({most})."
    )


def _called(row: Row) -> str:
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
    """The same scale in all three panels; a circle that is far larger than its images is drawn smaller."""
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
    axis.set(xlabel="number of the value", ylim=(0, 1.3 * values[0] or 1), xlim=(0.3, max(len(values), 4) + 0.7))
    axis.set_xticks([tick for tick in (1, 2, 4, 8, 16) if tick <= len(values)])
    axis.locator_params(axis="y", nbins=4)
    share = shown(share_of_rank(plane.values, 1), ".0%")
    axis.text(0.97, 0.97, f"rank 1: {share}\nof ‖ΔW‖²", transform=axis.transAxes, ha="right", va="top", fontsize=SMALL)
