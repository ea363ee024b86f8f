"""The drawing of Figure 5: boxes, branches and residual connections of one Transformer block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.document.figures.draw.style import EDGE, FROZEN, GREEN, INK, SMALL
from pipeline.document.studies.shared.report import Figure

Point = tuple[float, float]
Size = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A module: its weight's shape and number of frozen parameters.

    If it is adapted: the shapes of A and B, their scale, and the number of trainable parameters.
    """

    name: str
    kind: str
    shape: Size
    parameters: int
    a: Size = ()
    b: Size = ()
    scale: float | None = None
    trained: int = 0

    @staticmethod
    def size(shape: Size) -> str:
        return " × ".join(map(str, shape))


@dataclass(frozen=True)
class Pen:
    """Draws boxes and arrows in coordinates where a box has height 1."""

    axis: Any

    def box(self, at: Point, text: str, width: float, color: str = FROZEN, round_: bool = False) -> None:
        """A labelled box centered at `at`."""
        from matplotlib.patches import FancyBboxPatch

        boxstyle = "round,pad=0,rounding_size=0.35" if round_ else "square,pad=0"
        x, y = at
        style: dict[str, Any] = {
            "facecolor": color,
            "edgecolor": INK if round_ else EDGE,
            "linewidth": 1.1 if round_ else 0.6,
        }
        self.axis.add_patch(FancyBboxPatch((x - width / 2, y - 0.5), width, 1, boxstyle=boxstyle, zorder=2, **style))
        self.axis.text(x, y, text, ha="center", va="center", fontsize=SMALL, zorder=3, linespacing=1.05)

    def plus(self, at: Point) -> None:
        self.axis.plot(*at, "o", markersize=9, markerfacecolor="white", markeredgecolor=INK, zorder=2)
        self.axis.text(*at, "+", ha="center", va="center_baseline", fontsize=9, zorder=3)

    def path(self, *points: Point, color: str = INK, head: bool = True) -> None:
        """A polyline through the points, with an arrowhead at the end."""
        xs, ys = zip(*points, strict=True)
        self.axis.plot(xs[:-1] if head else xs, ys[:-1] if head else ys, color=color, linewidth=0.8, zorder=1)
        if head:
            arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
            self.axis.annotate("", points[-1], points[-2], arrowprops=arrow, zorder=1)


COLUMNS = {"q_proj": 2.6, "k_proj": 7.5, "v_proj": 12.4}
CENTRE, SECOND = 7.5, 19.4  # x of the two halves: attention, and the feed-forward network
BRANCH_OFFSET = 1.2  # in x, from a projection's middle to its two boxes
WIDTH, NARROW = 4.6, 2.3
TOP, NORM, FIRST, END = 0.0, -2.0, -4.4, -13.0  # y in both halves


def draw_block(figure: Figure, parts: Mapping[str, Part], heads: int) -> None:
    """The block from x at the top left to the output at the bottom right; residual connections run at the sides."""
    pen = Pen(figure.subplots())
    pen.axis.set(xlim=(-2.0, 24.2), ylim=(-15.6, 0.7), aspect="equal")
    pen.axis.set_axis_off()
    pen.box((CENTRE, TOP), "input x", NARROW, "white")
    pen.path((CENTRE, TOP - 0.5), (CENTRE, NORM + 0.5))
    _attention(pen, parts, heads)
    pen.path((CENTRE + 0.3, END), (15.8, END), (15.8, TOP), (SECOND, TOP), (SECOND, NORM + 0.5))
    _feed_forward(pen, parts)
    pen.path((SECOND, END - 0.3), (SECOND, END - 1.5))
    pen.box((SECOND, END - 2), "output", NARROW, "white")
    _legend(pen, parts)


def _attention(pen: Pen, parts: Mapping[str, Part], heads: int) -> None:
    pen.box((CENTRE, NORM), _label(parts["self_attn_layer_norm"]), WIDTH)
    y, half = -7.7, 2.7
    for name, x in COLUMNS.items():
        below = _projection(pen, parts[f"self_attn.{name}"], x, (CENTRE, NORM - 0.5), FIRST)
        if x == CENTRE:
            pen.path(below, (x, y + 0.5))
        else:
            pen.path(below, (x, y), (CENTRE + (half if x > CENTRE else -half), y))
    pen.box((CENTRE, y), f"causal self-attention\n{heads} heads", 2 * half, "white")
    below = _projection(pen, parts["self_attn.out_proj"], CENTRE, (CENTRE, y - 0.5), -9.9)
    _residual(pen, CENTRE, -1.4, TOP - 0.9, below)


def _feed_forward(pen: Pen, parts: Mapping[str, Part]) -> None:
    pen.box((SECOND, NORM), _label(parts["final_layer_norm"]), WIDTH)
    below = _projection(pen, parts["fc1"], SECOND, (SECOND, NORM - 0.5), FIRST)
    pen.path(below, (SECOND, -7.2))
    pen.box((SECOND, -7.7), "GELU", NARROW, "white")
    below = _projection(pen, parts["fc2"], SECOND, (SECOND, -8.2), -9.9)
    _residual(pen, SECOND, 23.4, TOP - 0.9, below)


def _label(part: Part) -> str:
    """The module's last name and shape."""
    return f"{part.name.rsplit('.', 1)[-1]}\n{Part.size(part.shape)}"


def _projection(pen: Pen, part: Part, x: float, source: Point, y: float) -> Point:
    """A frozen matrix with its branch BA, if it has one. Returns the point below, from which to continue."""
    boxes = [(x, part)] if not part.trained else [(x - BRANCH_OFFSET, part), (x + BRANCH_OFFSET, None)]
    for at, _ in boxes:
        bend = [] if at == source[0] else [(source[0], y + 1.0), (at, y + 1.0)]
        pen.path(source, *bend, (at, y + 0.5))
    pen.box((boxes[0][0], y), _label(part), NARROW)
    if not part.trained:
        return x, y - 0.5
    pen.box((x + BRANCH_OFFSET, y), f"A {Part.size(part.a)}\nB {Part.size(part.b)}", NARROW, GREEN, round_=True)
    for at, side in ((x - BRANCH_OFFSET, -0.3), (x + BRANCH_OFFSET, 0.3)):
        pen.path((at, y - 0.5), (at, y - 1.6), (x + side, y - 1.6))
    pen.plus((x, y - 1.6))
    return x, y - 1.9


def _residual(pen: Pen, x: float, around: float, top: float, branch: Point) -> None:
    """A residual connection: from `top` around the side, added to the branch's output."""
    side = -0.3 if around < x else 0.3
    pen.path((x, top), (around, top), (around, END), (x + side, END))
    pen.path(branch, (x, END + 0.3))
    pen.plus((x, END))
    vertical = {"rotation": 90, "ha": "center", "va": "center", "fontsize": SMALL}
    pen.axis.text(around + 2 * side / 3 * 2.2, END / 2, "residual", **vertical)


def _legend(pen: Pen, parts: Mapping[str, Part]) -> None:
    scales = sorted({part.scale for part in parts.values() if part.scale is not None})
    pen.box((2.2, -9.7), "frozen\nshape of W", 4.6)
    if not scales:
        return
    text = f"trains, s = {' or '.join(f'{scale:g}' for scale in scales)}\nshapes of A and B"
    pen.box((2.2, -11.2), text, 4.6, GREEN, round_=True)
