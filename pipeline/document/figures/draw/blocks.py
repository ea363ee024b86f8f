"""The drawing of Figure 5: boxes, branches and residual connections of one Transformer block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.document.figures.draw.style import EDGE, FROZEN, GREEN, INK, SMALL
from pipeline.document.studies.shared.report import Figure

Place = tuple[float, float]
Size = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A module with its weight's shape and frozen parameters.

    Where it is adapted: the shapes of A and B, their scale, and how many parameters train.
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
    """Draws in a plane where a box is 1 high."""

    axis: Any

    def box(self, at: Place, text: str, width: float, color: str = FROZEN, round_: bool = False) -> None:
        """Centred at `at`."""
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=0.35" if round_ else "square,pad=0"
        x, y = at
        look: dict[str, Any] = {
            "facecolor": color,
            "edgecolor": INK if round_ else EDGE,
            "linewidth": 1.1 if round_ else 0.6,
        }
        self.axis.add_patch(FancyBboxPatch((x - width / 2, y - 0.5), width, 1, boxstyle=style, zorder=2, **look))
        self.axis.text(x, y, text, ha="center", va="center", fontsize=SMALL, zorder=3, linespacing=1.05)

    def plus(self, at: Place) -> None:
        self.axis.plot(*at, "o", markersize=9, markerfacecolor="white", markeredgecolor=INK, zorder=2)
        self.axis.text(*at, "+", ha="center", va="center_baseline", fontsize=9, zorder=3)

    def path(self, *points: Place, color: str = INK, head: bool = True) -> None:
        """Straight pieces from point to point, with an arrow's head at the end."""
        xs, ys = zip(*points, strict=True)
        self.axis.plot(xs[:-1] if head else xs, ys[:-1] if head else ys, color=color, linewidth=0.8, zorder=1)
        if head:
            look = {"arrowstyle": "-|>", "color": color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
            self.axis.annotate("", points[-1], points[-2], arrowprops=look, zorder=1)


COLUMNS = {"q_proj": 2.6, "k_proj": 7.5, "v_proj": 12.4}
CENTRE, SECOND = 7.5, 19.4  # the middles of the two halves: attention, and the feed-forward network
APART = 1.2  # from a projection's middle to its two boxes
WIDTH, NARROW = 4.6, 2.3
TOP, NORM, FIRST, END = 0.0, -2.0, -4.4, -13.0  # heights that both halves have


def draw_block(figure: Figure, parts: Mapping[str, Part], heads: int) -> None:
    """From x at the top of the left half to the output below the right one; residuals run at the sides."""
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
    pen.box((CENTRE, NORM), _text(parts["self_attn_layer_norm"]), WIDTH)
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
    pen.box((SECOND, NORM), _text(parts["final_layer_norm"]), WIDTH)
    below = _projection(pen, parts["fc1"], SECOND, (SECOND, NORM - 0.5), FIRST)
    pen.path(below, (SECOND, -7.2))
    pen.box((SECOND, -7.7), "GELU", NARROW, "white")
    below = _projection(pen, parts["fc2"], SECOND, (SECOND, -8.2), -9.9)
    _residual(pen, SECOND, 23.4, TOP - 0.9, below)


def _text(part: Part) -> str:
    """Its own name and shape."""
    return f"{part.name.rsplit('.', 1)[-1]}\n{Part.size(part.shape)}"


def _projection(pen: Pen, part: Part, x: float, source: Place, y: float) -> Place:
    """A frozen matrix, and where it has one its branch BA beside it; returns where it goes on from."""
    boxes = [(x, part)] if not part.trained else [(x - APART, part), (x + APART, None)]
    for at, _ in boxes:
        bend = [] if at == source[0] else [(source[0], y + 1.0), (at, y + 1.0)]
        pen.path(source, *bend, (at, y + 0.5))
    pen.box((boxes[0][0], y), _text(part), NARROW)
    if not part.trained:
        return x, y - 0.5
    pen.box((x + APART, y), f"A {Part.size(part.a)}\nB {Part.size(part.b)}", NARROW, GREEN, round_=True)
    for at, side in ((x - APART, -0.3), (x + APART, 0.3)):
        pen.path((at, y - 0.5), (at, y - 1.6), (x + side, y - 1.6))
    pen.plus((x, y - 1.6))
    return x, y - 1.9


def _residual(pen: Pen, x: float, around: float, top: float, branch: Place) -> None:
    """What came in at `top` goes around at the side and is added to what the branch gives."""
    side = -0.3 if around < x else 0.3
    pen.path((x, top), (around, top), (around, END), (x + side, END))
    pen.path(branch, (x, END + 0.3))
    pen.plus((x, END))
    turned = {"rotation": 90, "ha": "center", "va": "center", "fontsize": SMALL}
    pen.axis.text(around + 2 * side / 3 * 2.2, END / 2, "residual", **turned)


def _legend(pen: Pen, parts: Mapping[str, Part]) -> None:
    scales = sorted({part.scale for part in parts.values() if part.scale is not None})
    pen.box((2.2, -9.7), "frozen\nshape of W", 4.6)
    if not scales:
        return
    text = f"trains, s = {' or '.join(f'{scale:g}' for scale in scales)}\nshapes of A and B"
    pen.box((2.2, -11.2), text, 4.6, GREEN, round_=True)
