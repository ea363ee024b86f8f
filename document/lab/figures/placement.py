"""Figure 5: the position of the adapter in a Transformer block, read from the loaded model's
modules (§6).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lab.report import EDGE, FROZEN, GREEN, INK, SMALL, WIDE, Axis, Figure, Findings
from lab.tables import Row, Table
from pipeline.adapters.lora import LoRALinear, weight_of
from pipeline.inference import engine
from pipeline.models.minigpt import Attention
from pipeline.project.runner import Job

PLACE = "Figure 5, §6"
Point = tuple[float, float]

COLUMNS = {"q_proj": 2.6, "k_proj": 7.5, "v_proj": 12.4}
CENTRE, SECOND = 7.5, 19.4  # x of the two halves: attention, and the feed-forward network
BRANCH_OFFSET = 1.2  # in x, from a projection's middle to its two boxes
WIDTH, NARROW = 4.6, 2.3
TOP, NORM, FIRST, END = 0.0, -2.0, -4.4, -13.0  # y in both halves


def render(job: Job) -> Findings:
    """The modules of the first block with A and B; of the first block if there is none."""
    model = engine.load(
        job.project.artifact("expand_vocab"), job.project.artifact("finetune_lora")
    ).model
    adapted = (
        block for block in model.blocks if any(isinstance(m, LoRALinear) for m in block.modules())
    )
    block = next(adapted, model.blocks[0])  # target_modules may name modules of a single block
    parts = parts_of(block)
    heads = next((module.n_heads for module in block.modules() if isinstance(module, Attention)), 1)
    frozen, trained = (sum(row[key] for row in parts) for key in ("parameters", "trained"))
    names = [row["module"].rsplit(".", 1)[-1] for row in parts if row["trained"]]
    shows = (
        f"A and B on {len(names)} of the block's {len(parts)} modules ({', '.join(names)}): "
        f"{trained:,} parameters beside {frozen:,} frozen ones"
    )
    text = (
        "A block of MiniGPT loaded with the adapter; names, shapes and scale are read from the "
        "model. Pale boxes are frozen. Green boxes with round corners, beside the matrices in the "
        "adapter's target_modules, train, and their output is added. The lines at the sides are "
        "the residual connections.\n"
        "\n"
        f"Measured: A and B on {', '.join(names)}; {trained:,} trainable parameters beside "
        f"{frozen:,} frozen ones per block ({trained / (frozen + trained):.1%} of their sum); the "
        f"model has {len(model.blocks)} blocks. Each norm is inside the residual branch "
        "(pre-norm), as in the document."
    )
    table = Table(
        "placement", "The modules of a block: frozen weights, and A and B if adapted", parts
    )
    by_name = {row["module"]: row for row in parts}
    return Findings(
        text,
        (table,),
        lambda figure: Drawing(figure, by_name, heads).draw(),
        (WIDE, 4.5),
        shows,
        "Where LoRA sits in a Transformer block",
    )


def parts_of(block: nn.Module) -> list[Row]:
    """Every module of the block with a weight, in the model's order: frozen parameters, and A and B
    if adapted.
    """
    parts: list[Row] = []
    for name, module in block.named_modules():
        if any(name.startswith(f"{part['module']}.") for part in parts):
            continue
        adapted = isinstance(module, LoRALinear)
        base = module.base if isinstance(module, LoRALinear) else module
        if not isinstance(getattr(base, "weight", None), Tensor) and not adapted:
            continue
        # A quantized weight counts as its dequantized numbers.
        weight, bias = weight_of(base), getattr(base, "bias", None)
        part = {
            "module": name,
            "kind": type(base).__name__,
            "shape": _size(weight.shape),
            "parameters": weight.numel() + (bias.numel() if isinstance(bias, Tensor) else 0),
            "A": "",
            "B": "",
            "scale": None,
            "trained": 0,
        }
        if isinstance(module, LoRALinear):
            trained = sum(
                p.numel() for key, p in module.named_parameters() if not key.startswith("base.")
            )
            factors = {"A": _size(module.lora_A.shape), "B": _size(module.lora_B.shape)}
            part |= {**factors, "scale": module.scale, "trained": trained}
        parts.append(part)
    return parts


def _size(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


@dataclass(frozen=True)
class Drawing:
    """Boxes, branches and residual connections of a block, in coordinates where a box has height 1.

    The block runs from x at the top left to the output at the bottom right; residual connections
    run at the sides.
    """

    figure: Figure
    parts: Mapping[str, Row]
    heads: int

    @property
    def axis(self) -> Axis:
        return self.figure.gca()

    def draw(self) -> None:
        self.figure.subplots()
        self.axis.set(xlim=(-2.0, 24.2), ylim=(-15.6, 0.7), aspect="equal")
        self.axis.set_axis_off()
        self._box((CENTRE, TOP), "input x", NARROW, "white")
        self._path((CENTRE, TOP - 0.5), (CENTRE, NORM + 0.5))
        self._attention()
        self._path(
            (CENTRE + 0.3, END), (15.8, END), (15.8, TOP), (SECOND, TOP), (SECOND, NORM + 0.5)
        )
        self._feed_forward()
        self._path((SECOND, END - 0.3), (SECOND, END - 1.5))
        self._box((SECOND, END - 2), "output", NARROW, "white")
        self._box((2.2, -9.7), "frozen\nshape of W", WIDTH)
        if scales := sorted(
            {part["scale"] for part in self.parts.values() if part["scale"] is not None}
        ):
            text = f"trains, s = {' or '.join(f'{scale:g}' for scale in scales)}\nshapes of A and B"
            self._box((2.2, -11.2), text, WIDTH, GREEN, round_=True)

    def _attention(self) -> None:
        self._box((CENTRE, NORM), self._label("self_attn_layer_norm"), WIDTH)
        y, half = -7.7, 2.7
        for name, x in COLUMNS.items():
            below = self._projection(f"self_attn.{name}", x, (CENTRE, NORM - 0.5), FIRST)
            if x == CENTRE:
                self._path(below, (x, y + 0.5))
            else:
                self._path(below, (x, y), (CENTRE + (half if x > CENTRE else -half), y))
        self._box((CENTRE, y), f"causal self-attention\n{self.heads} heads", 2 * half, "white")
        self._residual(
            CENTRE, -1.4, self._projection("self_attn.out_proj", CENTRE, (CENTRE, y - 0.5), -9.9)
        )

    def _feed_forward(self) -> None:
        self._box((SECOND, NORM), self._label("final_layer_norm"), WIDTH)
        self._path(self._projection("fc1", SECOND, (SECOND, NORM - 0.5), FIRST), (SECOND, -7.2))
        self._box((SECOND, -7.7), "GELU", NARROW, "white")
        self._residual(SECOND, 23.4, self._projection("fc2", SECOND, (SECOND, -8.2), -9.9))

    def _label(self, name: str) -> str:
        """The module's last name and shape."""
        return f"{name.rsplit('.', 1)[-1]}\n{self.parts[name]['shape']}"

    def _projection(self, name: str, x: float, source: Point, y: float) -> Point:
        """A frozen matrix with its branch BA, if it has one. Returns the point below, from which to
        continue.
        """
        part = self.parts[name]
        columns = [x - BRANCH_OFFSET, x + BRANCH_OFFSET] if part["trained"] else [x]
        for at in columns:
            bend = [] if at == source[0] else [(source[0], y + 1.0), (at, y + 1.0)]
            self._path(source, *bend, (at, y + 0.5))
        self._box((columns[0], y), self._label(name), NARROW)
        if not part["trained"]:
            return x, y - 0.5
        self._box((columns[1], y), f"A {part['A']}\nB {part['B']}", NARROW, GREEN, round_=True)
        for at, side in zip(columns, (-0.3, 0.3), strict=True):
            self._path((at, y - 0.5), (at, y - 1.6), (x + side, y - 1.6))
        self._plus((x, y - 1.6))
        return x, y - 1.9

    def _residual(self, x: float, around: float, branch: Point) -> None:
        """A residual connection around the side at x = `around`, added to the branch's output."""
        side, top = -0.3 if around < x else 0.3, TOP - 0.9
        self._path((x, top), (around, top), (around, END), (x + side, END))
        self._path(branch, (x, END + 0.3))
        self._plus((x, END))
        vertical = {"rotation": 90, "ha": "center", "va": "center", "fontsize": SMALL}
        self.axis.text(around + 2 * side / 3 * 2.2, END / 2, "residual", **vertical)

    def _box(
        self, at: Point, text: str, width: float, color: str = FROZEN, round_: bool = False
    ) -> None:
        """A labelled box centered at `at`."""
        from matplotlib.patches import FancyBboxPatch

        shape = "round,pad=0,rounding_size=0.35" if round_ else "square,pad=0"
        edge: dict[str, Any] = {
            "edgecolor": INK if round_ else EDGE,
            "linewidth": 1.1 if round_ else 0.6,
        }
        corner = (at[0] - width / 2, at[1] - 0.5)
        self.axis.add_patch(
            FancyBboxPatch(corner, width, 1, boxstyle=shape, facecolor=color, zorder=2, **edge)
        )
        self.axis.text(
            *at, text, ha="center", va="center", fontsize=SMALL, zorder=3, linespacing=1.05
        )

    def _plus(self, at: Point) -> None:
        self.axis.plot(
            *at, "o", markersize=9, markerfacecolor="white", markeredgecolor=INK, zorder=2
        )
        self.axis.text(*at, "+", ha="center", va="center_baseline", fontsize=9, zorder=3)

    def _path(self, *points: Point) -> None:
        """A polyline through the points, with an arrowhead at the end."""
        xs, ys = zip(*points, strict=True)
        self.axis.plot(xs[:-1], ys[:-1], color=INK, linewidth=0.8, zorder=1)
        arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        self.axis.annotate("", points[-1], points[-2], arrowprops=arrow, zorder=1)
