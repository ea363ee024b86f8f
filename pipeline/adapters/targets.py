"""Which linears a `target_modules` setting means (the document's §6)."""

from collections.abc import Sequence

from torch import nn

from pipeline.errors import UserError

GROUPS = {
    "attention": {"q_proj", "k_proj", "v_proj", "out_proj", "o_proj"},
    "feed_forward": {"fc1", "fc2", "gate_proj", "up_proj", "down_proj"},
}
ALIASES = {"o_proj": "out_proj", "out_proj": "o_proj"}  # the document's name and OPT's
HEAD = "lm_head"


def resolve(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the linears that `wanted` means: last names, dotted suffixes, `attention`,
    `feed_forward`, or `all-linear` (every linear but the head, as in PEFT).

    Raises UserError if any of them matches nothing.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: set[str] = set()
    for want in wanted:
        matches = [name for name in linears if _means(want, name)]
        if not matches:
            exist = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise UserError(
                f"target_modules: {want!r} matches no linear layer. The model has {', '.join(exist)}; "
                f"groups are {', '.join(GROUPS)} and all-linear."
            )
        found.update(matches)
    return [name for name in linears if name in found]


def _means(want: str, name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    if want == "all-linear":
        return last != HEAD
    if want in GROUPS:
        return last in GROUPS[want]
    return any(name == form or name.endswith(f".{form}") for form in (want, ALIASES.get(want, want)))
