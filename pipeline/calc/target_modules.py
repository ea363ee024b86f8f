"""What a target means, by the names of a model's linears: one rule for training and the calculator (§6)."""

from collections.abc import Iterable

from pipeline.errors import UserError

HEAD = "lm_head"
ALL_LINEAR = "all-linear"
GROUPS = {
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),
        *("c_attn", "attn.c_proj", "query_key_value", "attention.dense"),
        *("query", "key", "value", "attention.output.dense"),
    ),
    "feed_forward": (
        *("fc1", "fc2", "gate_proj", "up_proj", "down_proj", "gate_up_proj"),
        *("c_fc", "mlp.c_proj", "dense_h_to_4h", "dense_4h_to_h", "intermediate.dense", "output.dense"),
    ),
}
ALIASES = {"o_proj": "out_proj", "out_proj": "o_proj"}  # the document's name and OPT's


def chosen(names: Iterable[str], wanted: Iterable[str], head: str = HEAD) -> list[str]:
    """Those of the linears `names` that `wanted` means, in their order: last names, dotted suffixes, `attention`,
    `feed_forward`, or `all-linear` (every linear but `head` and experts, as in PEFT).

    Raises UserError if any of them matches nothing.
    """
    linears = list(names)
    found: set[str] = set()
    for want in wanted:
        matches = [name for name in linears if means(want, name, head)]
        if not matches:
            exist = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise UserError(
                f"target_modules: {want!r} matches no linear layer. The model has {', '.join(exist)}; "
                f"groups are {', '.join(GROUPS)} and all-linear."
            )
        found.update(matches)
    return [name for name in linears if name in found]


def means(want: str, name: str, head: str = HEAD) -> bool:
    """Whether the target `want` means the linear with this full name."""
    if want == ALL_LINEAR:
        return (
            not any(matches_suffix(name, form) for form in (head, f"{HEAD}.decoder")) and ".experts." not in f".{name}"
        )
    if want in GROUPS:
        in_attention = any(matches_suffix(name, form) for form in GROUPS["attention"])
        return (
            in_attention
            if want == "attention"
            else not in_attention and any(matches_suffix(name, f) for f in GROUPS[want])
        )
    return any(matches_suffix(name, form) for form in (want, ALIASES.get(want, want)))


def matches_suffix(name: str, form: str) -> bool:
    return name == form or name.endswith(f".{form}")
