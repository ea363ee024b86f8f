"""Figure 5: the position of the adapter in a Transformer block, read from the loaded model's modules (§6)."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from pipeline.adapters.lora import LoRALinear, weight_of
from pipeline.document.figures.draw.blocks import Part, draw_block
from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import WIDE
from pipeline.document.tables import Row, Table
from pipeline.inference import engine
from pipeline.models.base import CausalLM
from pipeline.models.minigpt import Attention
from pipeline.project.runner import Job

NAME = "placement"


@dataclass(frozen=True)
class BlockCounts:
    """The numbers of frozen and trainable (A and B) parameters of one block."""

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
    counts = BlockCounts(sum(part.parameters for part in parts), sum(part.trained for part in parts))
    return RenderedFigure(
        NAME,
        "Figure 5, §6",
        "Where LoRA sits in a Transformer block",
        _summary(parts, counts),
        _caption(parts, counts, model),
        (_table(parts),),
        lambda figure: draw_block(figure, {part.name: part for part in parts}, heads),
        (WIDE, 4.5),
    )


def _adapted_block(model: CausalLM) -> nn.Module:
    """The first block with A and B (target_modules may name modules of a single block); else the first block."""
    adapted = (block for block in model.blocks if any(isinstance(m, LoRALinear) for m in block.modules()))
    return next(adapted, model.blocks[0])


def parts_of(block: nn.Module) -> list[Part]:
    """Every module of the block with a weight, in the model's order."""
    parts: list[Part] = []
    for name, module in block.named_modules():
        if any(name.startswith(f"{part.name}.") for part in parts):
            continue
        if isinstance(module, LoRALinear):
            a, b = tuple(module.lora_A.shape), tuple(module.lora_B.shape)
            trained = sum(p.numel() for key, p in module.named_parameters() if not key.startswith("base."))
            parts.append(replace(_part(name, module.base), a=a, b=b, scale=module.scale, trained=trained))
        elif isinstance(getattr(module, "weight", None), Tensor):
            parts.append(_part(name, module))
    return parts


def _part(name: str, module: nn.Module) -> Part:
    """A module with its shape; a quantized weight counts as its dequantized numbers."""
    weight, bias = weight_of(module), getattr(module, "bias", None)
    parameters = weight.numel() + (bias.numel() if isinstance(bias, Tensor) else 0)
    return Part(name, type(module).__name__, tuple(weight.shape), parameters)


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
    return Table(NAME, "The modules of a block: frozen weights, and A and B if adapted", rows)


def _adapted_names(parts: list[Part]) -> list[str]:
    return [part.name.rsplit(".", 1)[-1] for part in parts if part.trained]


def _summary(parts: list[Part], counts: BlockCounts) -> str:
    names = _adapted_names(parts)
    return (
        f"A and B on {len(names)} of the block's {len(parts)} modules ({', '.join(names)}): "
        f"{counts.trained:,} parameters beside {counts.frozen:,} frozen ones"
    )


def _caption(parts: list[Part], counts: BlockCounts, model: CausalLM) -> str:
    return "\n\n".join(
        [
            "A block of MiniGPT loaded with the adapter; names, shapes and scale are read from the model. Pale boxes "
            "are frozen. Green boxes with round corners, beside the matrices in the adapter's target_modules, train, "
            "and their output is added. The lines at the sides are the residual connections.",
            f"Measured: A and B on {', '.join(_adapted_names(parts))}; {counts.trained:,} trainable parameters beside "
            f"{counts.frozen:,} frozen ones per block ({counts.share:.1%} of their sum); the model has "
            f"{len(model.blocks)} blocks. Each norm is inside the residual branch (pre-norm), as in the document.",
        ]
    )
