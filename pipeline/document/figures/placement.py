"""Figure 5: where the adapter sits in a Transformer block, from the modules of the loaded model (§6)."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from pipeline.adapters.lora import LoRALinear, weight_of
from pipeline.document.figures.draw.blocks import Part, draw_block
from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import WIDE
from pipeline.document.tables import Row, Table
from pipeline.inference import engine
from pipeline.models.base import CausalLM
from pipeline.models.minigpt.attention import Attention
from pipeline.project.runner import Job

NAME = "placement"


@dataclass(frozen=True)
class Sums:
    """Parameters of one block that are frozen, and those of its A and B."""

    frozen: int
    trained: int

    @property
    def share(self) -> float:
        return self.trained / (self.frozen + self.trained)


def placement(job: Job) -> RenderedFigure:
    """Figure 5. Raises UserError."""
    model = engine.load(job.project.artifact("expand_vocab"), job.project.artifact("finetune_lora")).model
    block = _adapted_block(model)
    parts, heads = parts_of(block), _heads(block)
    sums = Sums(sum(part.parameters for part in parts), sum(part.trained for part in parts))
    return RenderedFigure(
        NAME,
        "Figure 5, §6",
        "Where LoRA sits in a Transformer block",
        _shows(parts, sums),
        _caption(parts, sums, model),
        (_table(parts),),
        lambda figure: draw_block(figure, {part.name: part for part in parts}, heads),
        (WIDE, 4.5),
    )


def _adapted_block(model: CausalLM) -> nn.Module:
    """The first that has A and B, as a config may name modules of one block alone; else the first."""
    adapted = (block for block in model.blocks if any(isinstance(m, LoRALinear) for m in block.modules()))
    return next(adapted, model.blocks[0])


def parts_of(block: nn.Module) -> list[Part]:
    """Every module of the block that has a weight of its own, in the order in which the model has them."""
    found: list[Part] = []
    for name, module in block.named_modules():
        if any(name.startswith(f"{part.name}.") for part in found):
            continue
        if isinstance(module, LoRALinear):
            a, b = tuple(module.lora_A.shape), tuple(module.lora_B.shape)
            trained = sum(p.numel() for key, p in module.named_parameters() if not key.startswith("base."))
            found.append(replace(_part(name, module.base), a=a, b=b, scale=module.scale, trained=trained))
        elif isinstance(getattr(module, "weight", None), Tensor):
            found.append(_part(name, module))
    return found


def _part(name: str, module: nn.Module) -> Part:
    """A weight in few bits counts as the numbers that it stands for."""
    weight, bias = weight_of(module), getattr(module, "bias", None)
    own = weight.numel() + (bias.numel() if isinstance(bias, Tensor) else 0)
    return Part(name, type(module).__name__, tuple(weight.shape), own)


def _heads(block: nn.Module) -> int:
    return next((module.n_heads for module in block.modules() if isinstance(module, Attention)), 1)


def _table(parts: list[Part]) -> Table:
    rows: list[Row] = [
        {
            "module": part.name,
            "kind": part.kind,
            "shape": part.size(part.shape),
            "parameters": part.parameters,
            "A": part.size(part.a),
            "B": part.size(part.b),
            "scale": part.scale,
            "trained": part.trained,
        }
        for part in parts
    ]
    return Table(NAME, "The modules of a block: frozen as they are, with A and B where the adapter has them", rows)


def _adapted(parts: list[Part]) -> list[str]:
    return [part.name.rsplit(".", 1)[-1] for part in parts if part.trained]


def _shows(parts: list[Part], sums: Sums) -> str:
    names = _adapted(parts)
    return (
        f"A and B on {len(names)} of the block's {len(parts)} modules ({', '.join(names)}): "
        f"{sums.trained:,} parameters beside {sums.frozen:,} frozen ones"
    )


def _caption(parts: list[Part], sums: Sums, model: CausalLM) -> str:
    return "\n\n".join(
        [
            "A block of MiniGPT as it is loaded with the adapter: names, shapes and scale are the model's own. Pale "
            "boxes are frozen; green boxes with round corners, beside the matrices that the adapter's config names, "
            "train, and what they give is added. The lines at the sides are the residual connections.",
            f"Measured: A and B on {', '.join(_adapted(parts))}; {sums.trained:,} trainable parameters beside "
            f"{sums.frozen:,} frozen ones in a block ({sums.share:.1%} of both), of which the model has "
            f"{len(model.blocks)}. Each norm stands inside the residual's branch, as the document draws it.",
        ]
    )
