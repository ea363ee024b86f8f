"""How a configuration and a size are written, on the command line and on the screen alike."""

from pipeline.calc.fit import GIB, gpus
from pipeline.calc.memory import PARTS
from pipeline.calc.parameters import Projection
from pipeline.calc.settings import FinetuningMethod

MIB = 2**20
SHADES = dict(zip(PARTS, ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_black"), strict=True))


PROJECTION = ("projection", "in → out", "A", "B", "count", "parameters")


def cells_of(projection: Projection) -> tuple[str, ...]:
    """A kind of projection under the heads of PROJECTION."""
    p = projection
    return (
        p.name,
        f"{p.inputs:,} → {p.outputs:,}",
        f"{p.rank} × {p.inputs:,}",
        f"{p.outputs:,} × {p.rank}",
        f"{p.count} × {p.experts} experts" if p.experts > 1 else f"{p.count}",
        f"{p.parameters:,}",
    )


def title_of(method: FinetuningMethod) -> str:
    """The method in words."""
    if method.kind == "lora":
        name = "DoRA" if method.dora else "rsLoRA" if method.rslora else "LoRA"
        ends = {"none": "", "all": ", embeddings and head", "new_rows": f", {method.new_rows} new rows"}
        return f"{name} r={method.rank} on {', '.join(method.targets)}{ends[method.embeddings]}"
    if method.kind == "freeze":
        blocks = f"freeze, last {method.last_blocks} blocks"
        return f"{blocks}, embeddings and head" if method.train_embeddings else blocks
    if method.kind in ("prefix", "prompt"):
        return f"{method.kind} tuning, {method.virtual_tokens} virtual tokens"
    return "full fine-tuning"


def gib(size: float) -> str:
    """GiB with two decimals; what is smaller than that in MiB or KiB, so that a tiny model has numbers too."""
    if size == 0:
        return "0"
    if size < 0.01 * GIB:
        return f"{size / MIB:.2f} MiB" if size >= 0.1 * MIB else f"{size / 1024:.1f} KiB"
    return f"{size / GIB:.2f}"


def smallest(size: int) -> str:
    """The label of the smallest NVIDIA device that holds so many bytes."""
    cards = (one for name, one in gpus().items() if not name.startswith("mac-"))
    return next((one.label for one in cards if one.bytes >= size), "none of these")


def capped(value: int | str, limit: int | None) -> str:
    """The largest found, or that the search ended, at its `limit`, before the memory did."""
    return f"{value:,} or more" if value == limit else f"{value:,}" if isinstance(value, int) else value
